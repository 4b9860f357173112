"""Reads the lists of frame folders that PaddleVideo and mmaction2 train from: `frame_dir total_frames label`."""

import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

from dali_pipelines.errors import InputError, reason
from dali_pipelines.files import find_below_url, is_url, join
from dali_pipelines.folders import is_video_name
from dali_pipelines.frame_names import frame_files, name_frames
from dali_pipelines.text import decode, split_lines
from preparation.index import LARGEST_LABEL, Listed, Rejected

_FIELDS = re.compile(r"(.*\S)[ \t]+(\d+)[ \t]+(\d+)")
_COLUMNS = re.compile(r"(.*[^ ,;]) *[,;] *(\d+) *[,;] *(\d+)")
_THREADS = 16  # that list folders: on a network disk, each waits for its server


class FrameLists(NamedTuple):
    """The result of `read_frame_list`."""

    listed: list[Listed]
    """The path that names the frames of each video, and its label."""
    rejected: list[Rejected]
    """The folders without frames."""
    differing: list[tuple[str, int, int]]
    """(folder, frames according to the list, frames found) if these differ. What has been found is used."""


class _Line(NamedTuple):
    folder: str
    total: int
    label: int


def read_frame_list(path: str | os.PathLike, root: str | os.PathLike = ".") -> FrameLists:
    """Reads lines `frame_dir total_frames label`, separated by spaces, tabs, commas or semicolons, and finds the frames
    in each folder: all numbered images, from whatever number they start. Folders are relative to `root`, a folder or
    URL; their names may contain spaces. Raises `InputError` that names the line."""
    lines = []
    for number, text in enumerate(split_lines(decode(Path(path).read_bytes())), start=1):
        if text := text.strip(" \t\r\n"):
            match = _FIELDS.fullmatch(text) or _COLUMNS.fullmatch(text)
            if not match or not int(match[2]) or max(int(match[2]), int(match[3])) > LARGEST_LABEL:
                raise InputError(
                    f"{path}:{number}: expected `frame_dir total_frames label`, with 1 frame or more and one label of "
                    f"0 or more: {text[:80]!r}; for a list of `path label`: prepare.py index --list {path} ..."
                )
            lines.append(_Line(match[1], int(match[2]), int(match[3])))
    if not lines:
        raise InputError(f"{path}: no videos in it; expected lines `frame_dir total_frames label`")
    with ThreadPoolExecutor(_THREADS) as threads:
        found = list(threads.map(partial(_find_frames, root), [line.folder for line in lines]))
    lists = FrameLists([], [], [])
    for line, frames in zip(lines, found, strict=True):
        if isinstance(frames, InputError):
            lists.rejected.append(Rejected(line.folder, line.label, str(frames)))
            continue
        lists.listed.append((frames, line.label))
        if (count := len(frame_files(frames))) != line.total:
            lists.differing.append((line.folder, line.total, count))
    return lists


def _find_frames(root: str | os.PathLike, folder: str) -> str | InputError:
    """The path that names the frames in a folder, or why there is none. PaddleVideo's lists of Kinetics-400 name the
    folder `x` of its extract_rawframes.py as `x.mp4`."""
    place = join(root, folder)
    if is_video_name(folder) and not is_url(place) and not os.path.lexists(place):
        folder = os.path.splitext(folder)[0]
        place = join(root, folder)
    try:
        paths: Sequence[str] = name_frames(list(find_below_url(place)) if is_url(place) else os.listdir(place))
    except (OSError, ValueError) as error:  # also `InputError`
        without, _, number = folder.rpartition(" ")
        if number.isdecimal() and not is_url(place) and os.path.isdir(join(root, without)):
            return InputError(f"{without} has an offset, {number}; only whole folders are read: make one of the part")
        return InputError(reason(error))
    if not paths:
        return InputError("no images with numbers in their names, such as img_00001.jpg")
    if len(paths) > 1:
        return InputError(
            f"images numbered in {len(paths)} ways, such as {paths[0]} and {paths[1]}: which are the frames?"
        )
    return os.path.join(folder, paths[0])
