"""Resolves the VIDEO arguments of predict.py (files, folders, globs, manifests and stdin) to videos, in order."""

import codecs
import glob
import itertools
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from common.labels import read_manifest
from dali_pipelines.errors import InputError
from dali_pipelines.files import VideoLike
from dali_pipelines.folders import frame_folders_below, is_in_loop, unreadable, videos_below
from dali_pipelines.manifest import Manifest, Video
from dali_pipelines.probe import FRAMES_FPS
from dali_pipelines.text import MARKS, UTF16_MARKS

T = TypeVar("T")
STDIN = "-"
STREAMS = ("rtsp://", "rtsps://", "rtmp://", "udp://", "srt://", "/dev/video", "/dev/v4l")
"""Sources without an end: a connection that ends is lost. Files, HLS and HTTP say when they end."""
_CHUNK, _ROWS = 64, 1024
"""Videos per loader, which takes a moment to start: of files, which are all probed before the first is decoded, and of
rows of manifests, which need no probing."""


class Chunk(NamedTuple):
    """Consecutive videos for one loader."""

    root: str | os.PathLike[str]
    """The folder that the rows' paths are relative to."""
    videos: Sequence[str | Video]
    """Paths of files to probe, or rows of a manifest."""


Found = list[str] | Manifest | str
"""Paths of files, the rows of a manifest, or `STDIN`."""


def _warn(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def find_videos(arguments: Sequence[str], warn: Callable[[str], None] = _warn) -> list[Found]:
    """Resolves the arguments to files, manifests and `STDIN`, which is not read yet. Raises `InputError` if an argument
    matches nothing.

    A missing file is kept: its prediction is `Unreadable`. `warn` gets a message about skipped files in folders.
    """
    found: list[Found] = []
    files: list[str] = []  # the last of `found`, while arguments name files
    if arguments.count(STDIN) > 1:
        raise InputError(f"{STDIN} (stdin) is named {arguments.count(STDIN)} times, but can only be read once")
    for argument in arguments:
        if argument == STDIN:
            found.append(STDIN)
        elif argument.endswith(".csv") and not os.path.isdir(argument):
            found.append(read_manifest(argument, key="the manifest"))
        else:
            if not (found and found[-1] is files):
                files = []
                found.append(files)
            files += _files(argument, warn)
    return found


def _files(argument: str, warn: Callable[[str], None]) -> list[str]:
    if argument.startswith(STREAMS):
        raise InputError(f"{argument}: a stream without an end; predict it with --live")
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
            below, note = [], (error.strerror or "cannot be read").lower()
        paths += below
        if note and "**" not in argument:  # `**` matches the files in folders by itself
            warn(f"{match}: {note}")
    note = _closed(argument)
    if not paths:
        raise InputError(f"{argument}: no such file, and no match as a pattern" + (f" ({note})" if note else ""))
    if note:
        warn(f"{argument}: {note}")
    return list(dict.fromkeys(paths))  # `**` finds a folder and also its files


def _closed(pattern: str) -> str:
    """Names the folders that a glob skipped because they cannot be read; "" if there are none."""
    parts = pattern.split("/")
    closed = {}
    for count in (n for n, part in enumerate(parts) if glob.has_magic(part)):
        above = "/".join(parts[: count + (parts[count] == "**")]) + "/"
        for folder in glob.glob(above, recursive=True) if above != "/" or pattern.startswith("/") else ["."]:
            try:
                os.scandir(folder).close()
            except OSError as error:
                closed[folder] = f"{folder.rstrip('/')}: {(error.strerror or 'cannot be read').lower()}"
    return unreadable(list(closed.values())) if closed else ""


def _below(folder: str) -> tuple[list[str], str]:
    """Returns (paths of the videos in and below a folder, a note about skipped files). If it holds no video files, but
    folders of frames, or is one, these are the videos."""
    found = videos_below(folder)
    if not found.videos and (frames := frame_folders_below(folder)).videos:
        note = f"images taken as the frames of videos ({len(frames.videos)}), at {FRAMES_FPS:g} frames/s"
        found = frames._replace(note="; ".join(filter(None, (note, frames.note))))
    return [str(Path(folder, path)) for path in found.videos], found.note


def count(found: Sequence[Found]) -> int | None:
    """The number of videos; None if stdin is among them."""
    return None if STDIN in found else sum(map(len, found))


def one_source(arguments: Sequence[str]) -> VideoLike:
    """The one video that the arguments name: its path, or where a manifest says that it is."""
    [found] = find_videos(arguments, warn=lambda _: None)
    return found.source(0) if isinstance(found, Manifest) else found[0]


def chunks(found: Sequence[Found]) -> Iterator[Chunk]:
    """Yields the videos in chunks; paths from stdin are yielded as soon as they arrive."""
    for each in found:
        if isinstance(each, str):
            yield from _chunks_from_stdin()
        elif isinstance(each, Manifest):
            rows = map(each.__getitem__, range(len(each)))
            yield from (Chunk(each.root, videos) for videos in _split(rows, _ROWS))
        else:
            yield from (Chunk(".", videos) for videos in _split(each, _CHUNK))


def _split(videos: Iterable[T], size: int) -> Iterator[list[T]]:
    remaining = iter(videos)
    while chunk := list(itertools.islice(remaining, size)):
        yield chunk


def _chunks_from_stdin() -> Iterator[Chunk]:
    """Yields paths as they arrive, one per line or each ended by a zero byte (`find -print0`)."""
    is_empty = True
    for entries in _stdin_entries():
        for paths in _split((os.fsdecode(entry) for entry in entries), _CHUNK):
            is_empty = False
            yield Chunk(".", paths)
    if is_empty:
        raise InputError("no path on stdin; expected one per line")


def _stdin_entries() -> Iterator[list[bytes]]:
    """Yields lists of entries as they arrive: `os.read` returns the available bytes, while reading lines would wait for
    more."""
    rest, end = b"", b"\n"
    recode: Callable[[bytes], bytes] | None = None  # from stdin's encoding to UTF-8, known after the first bytes
    while data := os.read(0, 1 << 16):
        rest += data if recode is None else recode(data)
        if recode is None:
            if rest not in MARKS and any(mark.startswith(rest) for mark in MARKS):
                continue  # the byte order mark is still incomplete
            recode, rest = _recoder(rest)
        if b"\0" in rest:
            end = b"\0"
        *entries, rest = rest.split(end)
        yield [entry for entry in (_stripped(each, end) for each in entries) if entry]
    if rest := _stripped(rest, end):
        yield [rest]


def _recoder(start: bytes) -> tuple[Callable[[bytes], bytes], bytes]:
    """Returns (a function that recodes later bytes as UTF-8, the first bytes as UTF-8 without a byte order mark)."""
    if not start.startswith(UTF16_MARKS):
        return lambda data: data, start.removeprefix(codecs.BOM_UTF8)
    decoder = codecs.getincrementaldecoder("utf-16")("replace")
    return lambda data: decoder.decode(data).encode(), decoder.decode(start).encode()


def _stripped(entry: bytes, end: bytes) -> bytes:
    """Removes a Windows carriage return; b"" for a blank line."""
    if end == b"\n":
        entry = entry.removesuffix(b"\r")
    return entry if entry.strip() else b""
