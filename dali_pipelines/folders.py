"""Finds the videos in a folder, as files or as folders of frames, and describes the files it skips."""

import collections
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from dali_pipelines.errors import InputError, reason
from dali_pipelines.files import find_below_url, is_url
from dali_pipelines.frame_names import name_frames

_SUFFIXES = """
    264 265 266 3g2 3gp 3gp2 3gpp 3gpp2 amv asf avc avi avs2 avs3 bik cavs dav dif divx dv dvr-ms evo f4p f4v flc fli
    flv gif gxf h261 h263 h264 h265 h266 h26l hevc insv ismv ivf ivr kux lrv m1v m2p m2t m2ts m2v m4v mj2 mjpeg
    mjpg mk3d mkv mod mov mp2v mp4 mp4v mpe mpeg mpeg1 mpeg2 mpeg4 mpg mpg2 mpg4 mpv mts mxf mxg nsv nut nuv obu ogm
    ogv ogx pva qt rcv rm rmvb roq smk swf tod tp trp ts ty vc1 viv vob vro vvc webm wm wmv wtv xmv xvid y4m
"""
VIDEO_SUFFIXES = frozenset(f".{suffix}" for suffix in _SUFFIXES.split())
"""Suffixes of FFmpeg's video demuxers, and those that cameras, recorders and discs use for the same formats. Excluded:
audio, images, subtitles, playlists, and formats without a header (.yuv)."""
_KINDS_SHOWN, _FOLDERS_SHOWN = 6, 10


def is_video_name(path: str | os.PathLike[str]) -> bool:
    """Whether a file has the name of a video. Hidden files, such as the `._NAME` of macOS, do not count."""
    name = os.path.basename(path)
    return os.path.splitext(name)[1].lower() in VIDEO_SUFFIXES and not name.startswith(".")


class Found(NamedTuple):
    """The videos found below a folder."""

    videos: list[str]
    """Paths relative to the folder, sorted."""
    note: str
    """What was skipped, such as "12 files skipped: 10 .txt, 2 .srt"; "" for nothing."""


def videos_below(root: str | os.PathLike[str]) -> Found:
    """The videos in a folder and its subfolders, or below a URL; follows links, not into hidden folders. Raises
    `InputError`."""
    notes: list[str] = []
    closed: list[str] = []
    files = find_below_url(root) if is_url(root) else _walk(os.fspath(root), notes, closed)
    videos: list[str] = []
    kinds: collections.Counter[str] = collections.Counter()
    for path in files:
        if is_video_name(path):
            videos.append(path)
        else:
            kinds[_kind(path)] += 1
    return _found(videos, kinds, notes, closed)


def frame_folders_below(root: str | os.PathLike[str]) -> Found:
    """The folders of frames in a folder and its subfolders, or below a URL, each as the path that names its frames
    (`frame_names`). Raises `InputError`."""
    notes: list[str] = []
    closed: list[str] = []
    names: dict[str, list[str]] = {}
    for path in find_below_url(root) if is_url(root) else _walk(os.fspath(root), notes, closed):
        folder, name = os.path.split(path)
        names.setdefault(folder, []).append(name)
    videos: list[str] = []
    kinds: collections.Counter[str] = collections.Counter()
    for folder, inside in names.items():
        paths = name_frames(inside)
        if len(paths) == 1:
            videos.append(os.path.join(folder, paths[0]))
            inside = [name for name in inside if not _is_image(name)]
        elif paths:
            notes.append(f"{folder or '.'}: skipped, as its images are numbered in {len(paths)} ways")
        kinds.update(map(_kind, inside))
    return _found(videos, kinds, notes, closed)


def _is_image(name: str) -> bool:
    return name.lower().endswith((".jpg", ".jpeg", ".png"))


def _kind(path: str) -> str:
    """The kind of a file that is skipped."""
    name = os.path.basename(path)
    if name.startswith("."):
        return "._* of macOS" if name.startswith("._") else "hidden"
    return os.path.splitext(name)[1].lower() or "no suffix"


def _found(videos: list[str], kinds: "collections.Counter[str]", notes: list[str], closed: list[str]) -> Found:
    if kinds:
        named = [f"{count} {kind}" for kind, count in kinds.most_common(_KINDS_SHOWN)]
        if rest := kinds.total() - sum(count for _, count in kinds.most_common(_KINDS_SHOWN)):
            named.append(f"{rest} others")
        count = "1 file" if kinds.total() == 1 else f"{kinds.total()} files"
        notes.insert(0, f"{count} skipped: {', '.join(named)}")
    notes += [unreadable(closed)] if closed else []
    return Found(sorted(videos, key=lambda path: PurePosixPath(path).parts), "; ".join(notes))


def unreadable(folders: Sequence[str]) -> str:
    """A one-line message about folders that cannot be read, given as "path: reason"."""
    if len(folders) == 1:
        return folders[0]
    more = f", and {len(folders) - _FOLDERS_SHOWN} more" if len(folders) > _FOLDERS_SHOWN else ""
    return f"{len(folders)} folders cannot be read: {', '.join(sorted(folders)[:_FOLDERS_SHOWN])}{more}"


def leads_back(root: str | os.PathLike[str], path: str | os.PathLike[str]) -> bool:
    """Whether `path`, a folder in `root`, is a link to `root` or to a folder above it."""
    return _holds(os.path.realpath(path), os.path.realpath(root))


def is_in_loop(path: str | os.PathLike[str]) -> bool:
    """Whether `path`, such as a glob's result, is or goes through a link that leads back to a folder above it."""
    places = [Path(path), *Path(path).parents]
    return any(os.path.islink(place) and leads_back(place.parent, place) for place in places)


def _holds(folder: str, other: str) -> bool:
    return f"{other}/".startswith(f"{folder.rstrip('/')}/")


def _walk(root: str, notes: list[str], closed: list[str]) -> Iterator[str]:
    """The files below `root`, without hidden folders; `notes` gets the links it skips, `closed` the folders it cannot
    read.

    Only links that lead back to a folder they are in are skipped: several classes may link to the same folder.
    """
    if not os.path.isdir(root):
        raise InputError(f"{root}: no such folder of videos")
    pending: list[tuple[str, tuple[str, ...]]] = [("", (os.path.realpath(root),))]
    while pending:
        folder, above = pending.pop()
        try:
            entries = os.listdir(os.path.join(root, folder))
        except OSError as error:
            if not folder:
                raise
            closed.append(f"{folder}: {reason(error)}")
            continue
        for name in entries:
            path = os.path.join(folder, name)
            try:
                is_folder = stat.S_ISDIR(os.stat(os.path.join(root, path)).st_mode)
            except PermissionError as error:  # `folder` may be listed but not entered, so this may be a folder
                is_folder = False
                if not is_video_name(path):
                    closed.append(f"{path}: {reason(error)}")
                    continue
            except OSError:  # a link to nowhere
                is_folder = False
            if not is_folder:
                yield path
                continue
            if name.startswith("."):  # .ipynb_checkpoints, .Trash-1000
                continue
            place = os.path.realpath(os.path.join(root, path))
            if any(_holds(place, each) for each in above):
                notes.append(f"{path}: not followed, leads back to {place}")
            else:
                pending.append((path, (*above, place)))
