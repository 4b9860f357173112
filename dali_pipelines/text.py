"""Text files as people have them: byte order marks, Windows line ends, and paths that are not UTF-8.

A line ends at a line feed, and nowhere else: class names and paths may hold any other character.
"""

import codecs
import csv
import os
from pathlib import Path
from typing import Any, Protocol

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


def read_lines(path: str | os.PathLike) -> list[str]:
    return split_lines(decode(Path(path).read_bytes()))


class _Writable(Protocol):
    def write(self, text: str, /) -> Any: ...


class _LineFeeds:
    """Writes rows to `file` with a line feed at their end."""

    def __init__(self, file: _Writable):
        self._file = file

    def write(self, row: str) -> None:
        self._file.write(row.removesuffix("\r\n") + "\n")


def csv_writer(file: _Writable) -> Any:
    """A `csv.writer` whose rows end with a line feed, and which quotes carriage returns. Python before 3.13 does so
    only if the line terminator holds one; unquoted, it could not read the row again."""
    return csv.writer(_LineFeeds(file), lineterminator="\r\n")
