"""Reads and writes real-world text files: with byte order marks, Windows line ends, and paths that are not UTF-8.

Only a line feed ends a line: class names and paths may contain any other character.
"""

import codecs
import csv
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol, TextIO

UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
MARKS = (codecs.BOM_UTF8, *UTF16_MARKS)


def decode(data: bytes) -> str:
    """UTF-8, or UTF-16 with a byte order mark; other bytes become surrogates, as in `os.fsdecode`."""
    if data.startswith(UTF16_MARKS):
        return data.decode("utf-16", "replace")
    return data.removeprefix(codecs.BOM_UTF8).decode("utf-8", "surrogateescape")


def split_lines(text: str) -> list[str]:
    """The lines without their ends, LF or CRLF."""
    lines = text.split("\n")
    if not lines[-1]:
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


def read_lines(path: str | os.PathLike[str]) -> list[str]:
    """The lines of a text file with any of the encodings of `decode`, and any line ends."""
    return split_lines(decode(Path(path).read_bytes()))


class _Writable(Protocol):
    def write(self, text: str, /) -> Any: ...


class _LineFeeds:
    """Writes rows to `file` with a line feed at their end."""

    def __init__(self, file: _Writable):
        self._file = file

    def write(self, row: str) -> None:
        self._file.write(row.removesuffix("\r\n") + "\n")


class _CsvWriter:
    def __init__(self, file: _Writable):
        self._writer = csv.writer(_LineFeeds(file), lineterminator="\r\n")

    def writerow(self, row: Iterable[Any]) -> None:
        self._writer.writerow(["'" + cell if isinstance(cell, str) and _FORMULA.match(cell) else cell for cell in row])

    def writerows(self, rows: Iterable[Iterable[Any]]) -> None:
        for row in rows:
            self.writerow(row)


def csv_writer(file: _Writable) -> _CsvWriter:
    """Writes CSV that every reader can read: rows end with a line feed, and carriage returns are quoted, which Python
    before 3.13 does only if the line terminator contains one.

    Text that a spreadsheet would run as a formula is prefixed with an apostrophe, and so is such text that already has
    apostrophes; `cell_text` removes it.
    """
    return _CsvWriter(file)


_FORMULA = re.compile(r"'*(\s*[=+\-@\uff1d\uff0b\uff0d\uff20]|[\t\r\n])")
"""Matches also after spaces, and the full-width characters of Japanese spreadsheets."""


def cell_text(cell: str) -> str:
    """The original text of a cell that `csv_writer` wrote."""
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell


class ForPeople:
    """A text stream on which names cannot move the cursor, change colours or reverse the writing direction: control
    characters are escaped, as \\x1b. A carriage return at either end of a write is kept, for progress bars. Passwords
    in URLs are hidden."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> int:
        """Writes text, with control characters escaped and passwords hidden."""
        text = hide_passwords(text)
        core = text.strip("\r")
        if not core.isprintable():
            start = text.index(core)
            text = text[:start] + core.translate(_SHOWN) + text[start + len(core) :]
        return self.stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


_CONTROLS = [
    *range(9),
    *range(11, 32),
    *range(127, 160),
    0x200E,
    0x200F,
    *range(0x202A, 0x202F),
    *range(0x2066, 0x206A),
]
_SHOWN = {code: f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" for code in _CONTROLS}


_PASSWORD = re.compile(r"(://[^/?#\s:]*):[^/?#\s]*@")


def hide_passwords(text: str) -> str:
    """The text with *** for the password of each URL in it, as rtsp://user:***@camera/stream."""
    return _PASSWORD.sub(r"\1:***@", text)


def for_data(stream: Any) -> Any:
    """`stream` itself for a terminal; for a file or a pipe, a stream that writes everything unescaped."""
    return stream.stream if isinstance(stream, ForPeople) and not stream.isatty() else stream
