"""What predict.py is asked about: files, folders, globs, manifests and stdin, as videos in the order they are named."""

import codecs
import glob
import itertools
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from common.labels import read_manifest
from dali_pipelines.errors import InputError
from dali_pipelines.folders import is_in_loop, unreadable, videos_below
from dali_pipelines.manifest import Manifest, Video
from dali_pipelines.text import MARKS, UTF16_MARKS

STDIN = "-"
_CHUNK, _ROWS = 64, 1024
"""Videos for one loader, whose start takes a moment: files, which are probed before the first is decoded, and rows of
manifests, of which all is known."""


class Chunk(NamedTuple):
    """Some of the videos, in their order."""

    root: str | os.PathLike
    """What paths of rows are relative to."""
    videos: Sequence[str | Video]
    """A path that nothing is known of yet, or a row of a manifest."""


Found = list[str] | Manifest | str
"""Paths of files, or the rows of a manifest, or `STDIN`."""


def _warn(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def find_videos(arguments: Sequence[str], warn: Callable[[str], None] = _warn) -> list[Found]:
    """Files, manifests and `STDIN`, which is not read yet; `InputError` where an argument stands for nothing.

    A file that does not exist is found nevertheless: it has its place among the results, with the reason. `warn` is
    told what is passed over in folders.
    """
    found: list[Found] = []
    if arguments.count(STDIN) > 1:
        raise InputError(f"{STDIN} (stdin) is named {arguments.count(STDIN)} times; it can be read once")
    for argument in arguments:
        if argument == STDIN:
            found.append(STDIN)
        elif argument.endswith(".csv") and not os.path.isdir(argument):
            found.append(read_manifest(argument, key="the manifest"))
        else:
            if not (found and isinstance(found[-1], list)):
                found.append([])
            found[-1].extend(_files(argument, warn))
    return found


def _files(argument: str, warn: Callable[[str], None]) -> list[str]:
    if os.path.isdir(argument):
        paths, note = _below(argument)
        if not paths:
            raise InputError(f"{argument}: no videos in this folder or below it" + (f" ({note})" if note else ""))
        if note:
            warn(f"{argument}: {note}")
        return paths
    if os.path.lexists(argument) or not glob.has_magic(argument):
        return [argument]
    paths = []
    for match in itertools.filterfalse(is_in_loop, sorted(glob.glob(argument, recursive=True))):
        if not os.path.isdir(match):
            paths.append(match)
            continue
        try:
            below, note = _below(match)
        except OSError as error:
            below, note = [], error.strerror.lower()
        paths += below
        if note and "**" not in argument:  # with it, the files are named by the pattern itself
            warn(f"{match}: {note}")
    note = _closed(argument)
    if not paths:
        raise InputError(f"{argument}: no file and no pattern that any file fits" + (f" ({note})" if note else ""))
    if note:
        warn(f"{argument}: {note}")
    return list(dict.fromkeys(paths))  # `**` finds a folder and what is in it


def _closed(pattern: str) -> str:
    """Which folders a glob has passed over because they cannot be read; "" for none."""
    parts = pattern.split("/")
    closed = {}
    for count in (n for n, part in enumerate(parts) if glob.has_magic(part)):
        above = "/".join(parts[: count + (parts[count] == "**")]) + "/"
        for folder in glob.glob(above, recursive=True) if above != "/" or pattern.startswith("/") else ["."]:
            try:
                os.scandir(folder).close()
            except OSError as error:
                closed[folder] = f"{folder.rstrip('/')}: {error.strerror.lower()}"
    return unreadable(list(closed.values())) if closed else ""


def _below(folder: str) -> tuple[list[str], str]:
    found = videos_below(folder)
    return [str(Path(folder, path)) for path in found.videos], found.note


def count(found: Sequence[Found]) -> int | None:
    """How many videos there are; None where stdin will tell."""
    return None if STDIN in found else sum(map(len, found))


def chunks(found: Sequence[Found]) -> Iterator[Chunk]:
    """The videos a chunk at a time: those of stdin as soon as they come, however few."""
    for each in found:
        if each == STDIN:
            yield from _from_stdin()
        elif isinstance(each, Manifest):
            rows = map(each.__getitem__, range(len(each)))
            yield from (Chunk(each.root, videos) for videos in _split(rows, _ROWS))
        else:
            yield from (Chunk(".", videos) for videos in _split(each, _CHUNK))


def _split(videos: Iterable, size: int) -> Iterator[list]:
    videos = iter(videos)
    while chunk := list(itertools.islice(videos, size)):
        yield chunk


def _from_stdin() -> Iterator[Chunk]:
    """Paths as they come, one a line or each with a zero byte at its end (`find -print0`)."""
    are_none = True
    for entries in _stdin_entries():
        for paths in _split((os.fsdecode(entry) for entry in entries), _CHUNK):
            are_none = False
            yield Chunk(".", paths)
    if are_none:
        raise InputError("no path came on stdin; expected one a line")


def _stdin_entries() -> Iterator[list[bytes]]:
    """`read` returns what there is, where reading by lines would wait for more."""
    rest, end = b"", b"\n"
    recode = None  # from what stdin holds to UTF-8, once its first bytes have told
    while data := os.read(0, 1 << 16):
        rest += data if recode is None else recode(data)
        if recode is None:
            if rest not in MARKS and any(mark.startswith(rest) for mark in MARKS):
                continue  # not all of the byte order mark is here yet
            recode, rest = _recoder(rest)
        if b"\0" in rest:
            end = b"\0"
        *entries, rest = rest.split(end)
        yield [entry for entry in (_entry(each, end) for each in entries) if entry]
    if rest := _entry(rest, end):
        yield [rest]


def _recoder(start: bytes) -> tuple[Callable[[bytes], bytes], bytes]:
    """(what makes UTF-8 of the bytes that follow, the first bytes without a byte order mark, as UTF-8)."""
    if not start.startswith(UTF16_MARKS):
        return lambda data: data, start.removeprefix(codecs.BOM_UTF8)
    decoder = codecs.getincrementaldecoder("utf-16")("replace")
    return lambda data: decoder.decode(data).encode(), decoder.decode(start).encode()


def _entry(entry: bytes, end: bytes) -> bytes:
    """Without the carriage return of Windows, and b"" for a line of white space."""
    if end == b"\n":
        entry = entry.removesuffix(b"\r")
    return entry if entry.strip() else b""
