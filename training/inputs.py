"""What predict.py is asked about: files, folders, globs, manifests and stdin, as videos in the order they are named."""

import glob
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from dali_pipelines.errors import InputError
from dali_pipelines.manifest import Manifest, Video
from preparation.index import is_video_name
from training.labels import read_manifest

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


def find_videos(arguments: Sequence[str]) -> list[Found]:
    """Files, manifests and `STDIN`, which is not read yet; `InputError` where an argument stands for nothing.

    A file that does not exist is found nevertheless: it has its place among the results, with the reason.
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
            found[-1].extend(_files(argument))
    return found


def _files(argument: str) -> list[str]:
    if os.path.isdir(argument):
        paths = _below(argument)
        if not paths:
            raise InputError(f"{argument}: no videos in this folder or below it")
        return paths
    if os.path.lexists(argument) or not glob.has_magic(argument):
        return [argument]
    matches = sorted(glob.glob(argument, recursive=True))
    paths = [path for match in matches for path in (_below(match) if os.path.isdir(match) else [match])]
    if not paths:
        raise InputError(f"{argument}: no file and no pattern that any file fits")
    return list(dict.fromkeys(paths))  # `**` finds a folder and what is in it


def _below(folder: str) -> list[str]:
    return [str(file) for file in sorted(Path(folder).rglob("*")) if is_video_name(file)]


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
    """Lines as they come: `read` returns what there is, where reading by lines would wait for more."""
    rest, are_none = b"", True
    while data := os.read(0, 1 << 16):
        *lines, rest = (rest + data).split(b"\n")
        for paths in _split((os.fsdecode(line) for line in lines if line.strip()), _CHUNK):
            are_none = False
            yield Chunk(".", paths)
    if rest.strip():
        yield Chunk(".", [os.fsdecode(rest)])
    elif are_none:
        raise InputError("no path came on stdin; expected one a line")
