"""Probes every video of a list or folder and makes a manifest of the readable ones."""

import base64
import difflib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from common.worker_pool import Failed, WorkerPool, run
from dali_pipelines.errors import InputError
from dali_pipelines.files import absolute, as_source, check_reachable, fetch, is_url, join
from dali_pipelines.folders import Found, is_video_name, leads_back, videos_below
from dali_pipelines.frame_names import frame_files, is_frames
from dali_pipelines.host_decoder import MAX_PIXELS, decode_all
from dali_pipelines.manifest import Manifest, Video, coded_size, key_of
from dali_pipelines.packet_index import index_path, is_index
from dali_pipelines.probe import probe_packets
from dali_pipelines.text import csv_writer, decode, split_lines

_LARGEST_LABEL = 2**31 - 1
_SPLITS = frozenset({"train", "training", "val", "valid", "validation", "test"})

Listed = tuple[str, int]
"""A path, relative to a root or absolute, and its label."""


@dataclass(frozen=True)
class Rejected:
    """A listed video that cannot be used, and the reason."""

    path: str
    label: int
    reason: str


def read_list(path: str | os.PathLike, root: str | os.PathLike = ".") -> list[Listed]:
    """Reads lines `path label`, as PaddleVideo and mmaction2 write them, or entries that end with a zero byte. Paths
    may contain spaces; empty lines are skipped. Raises `InputError` that names the line."""
    text = decode(Path(path).read_bytes())
    lines = text.split("\0") if "\0" in text else split_lines(text)
    listed = []
    for number, line in enumerate(lines, start=1):
        line = line.strip(" \t\r\n")
        if not line:
            continue
        file, label = ("", *re.split(r"[ \t]+(?=[^ \t]*$)", line, maxsplit=1))[-2:]
        problem = _problem(file, label, root)
        if problem:
            frames = ""
            if re.search(r"[ \t]\d+$", file):
                frames = f". If it lists folders of frames: prepare.py frames --list {path} --root {root} --out FILE"
            raise InputError(
                f"{path}:{number}: expected `path label`, with one label of 0 or more; {problem}: {line[:80]!r}{frames}"
            )
        listed.append((file, int(label)))
    if not listed:
        raise InputError(f"{path}: no videos in it; expected lines `path label`")
    return listed


def _problem(file: str, label: str, root: str | os.PathLike) -> str:
    """Describes the problem with a line of a list; "" if there is none. Odd paths are accepted if the file exists."""
    if not label.isdecimal() or int(label) > _LARGEST_LABEL:
        if is_video_name(label):
            return "found no label after the path"
        if re.search(r"[^,;]*[,;][ \t]*\d+$", label):
            return "found a comma or semicolon"
        return f"found the label {label[:40]!r}"
    if not file:
        return "found a single number"
    if not is_url(file) and not is_url(root) and os.path.lexists(join(root, file)):
        return ""
    if file.endswith((",", ";")):
        return "found a comma or semicolon"
    if file[0] in "\"'`" and file[-1] == file[0]:
        return "found a path in quotes"
    if re.search(r"[ \t][+-]?\d+(\.\d*)?[,;]?$", file):
        folder = re.sub(r"[ \t]+[+-]?\d+(\.\d*)?[,;]?$", "", file)
        if not is_url(file) and not is_url(root) and os.path.isdir(join(root, folder)):
            return "found `frame_dir total_frames label`: a list of frame folders"
        return "found more than one number (several labels, or a frame count?)"
    if "\r" in file or "\n" in file:
        return "found a line end within the path"
    first = re.match(r"(.*?\.\w+)[ \t,;]", file)
    if first and is_video_name(first[1]) and not is_video_name(file):
        return f"found more than one field after {first[1]!r}"
    return ""


class Folder(NamedTuple):
    """The result of `read_folder`."""

    listed: list[Listed]
    classes: tuple[str, ...]
    note: str
    """Describes the skipped files; "" if there are none."""


def read_folder(
    root: str | os.PathLike, classes: Sequence[str] = (), find: Callable[[Path], Found] = videos_below
) -> Folder:
    """Lists the videos of a folder that holds one folder per class, with videos at any depth. Paths are relative to
    `root`.

    The folders are labels 0, 1, ... in alphabetical order. With `classes`, labels are positions in it, and a class
    may have no folder. `find` is `videos_below` or `frame_folders_below`. Raises `InputError`, also for a folder that
    `classes` does not name."""
    root = Path(root)
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; expected a folder with one folder of videos per class")
    entries = [entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
    folders = sorted(entry.name for entry in entries if not leads_back(root, entry))
    if folders and _SPLITS.issuperset(name.lower() for name in folders):
        first, *others = sorted(folders, key=lambda name: (not name.lower().startswith("train"), name))
        more = f", and then: folder {root / others[0]} --classes {first}.csv --out {others[0]}.csv" if others else ""
        raise InputError(
            f"{root}: holds {' and '.join(folders)}, which look like splits, not classes; index each of them, "
            f"such as: folder {root / first} --out {first}.csv{more}"
        )
    found = find(root)
    by_folder: dict[str, list[str]] = {name: [] for name in folders}
    outside = 0
    for path in found.videos:
        name, *rest = path.split("/", 1)
        if rest and name in by_folder:
            by_folder[name].append(path)
        else:
            outside += 1
    notes = [found.note] if found.note else []
    if outside:
        notes.append(f"{outside} {'video is' if outside == 1 else 'videos are'} not in a class folder")
    note = "; ".join(notes)
    if not any(by_folder.values()):
        example, hint = "videos in it, such as archery/1.mp4", ""
        if find is not videos_below:
            example = "a folder of frames for each video, such as archery/v1/img_00001.jpg"
        elif re.search(r"\.(jpe?g|png)\b", note):
            hint = f"; if these images are the frames of videos: prepare.py frames {root}"
        raise InputError(
            f"{root}: no videos; expected a folder for each class with {example}"
            + (f" ({note})" if note else "")
            + hint
        )
    if classes:
        if len(set(classes)) < len(classes):
            twice = next(name for name in classes if classes.count(name) > 1)
            raise InputError(f"--classes names {twice!r} twice; its videos cannot have two labels")
        unknown = [name for name in folders if name not in classes]
        if unknown:
            near = difflib.get_close_matches(unknown[0], classes, 1, 0)[0]
            raise InputError(
                f"{root / unknown[0]}: not one of the {len(classes)} classes in --classes (the nearest is "
                f"{near!r}); rename or remove this folder"
            )
    else:
        empty = [name for name, videos in by_folder.items() if not videos]
        if empty:
            raise InputError(
                f"{root / empty[0]}: no videos in this folder; fill or remove it or, if this is one of several splits, "
                "pass the training manifest as --classes, so that the labels stay the same"
                + (f" ({note})" if note else "")
            )
        classes = folders
    labels = {name: label for label, name in enumerate(classes)}
    return Folder([(path, labels[name]) for name, paths in by_folder.items() for path in paths], tuple(classes), note)


def index(
    listed: Sequence[Listed],
    *,
    root: str | os.PathLike,
    journal: Path,
    pool: WorkerPool,
    classes: Sequence[str] = (),
    copies: Mapping[str, Sequence[str]] = MappingProxyType({}),
    decode: bool = False,
    max_pixels: int = MAX_PIXELS,
    frames_fps: float | None = None,
) -> tuple[Manifest, list[Rejected]]:
    """Probes every listed video. Returns the manifest of the readable ones, in the order of the list, and the others.

    copies: other files of a listed video, tried in order if it cannot be read.
    decode: decode each file completely, and reject those with a damaged frame.
    max_pixels: the largest accepted frame.
    frames_fps: frames per second of videos whose frames are images in files of their own.
    journal: see `worker_pool.run`.

    Raises `InputError`.
    """
    for path, label in listed:
        if classes and label >= len(classes):
            raise InputError(
                f"{path}: label {label} is listed, but there are {len(classes)} classes (0 to {len(classes) - 1})"
            )
    home = absolute(root)  # remote workers have a different working directory

    def probe_all(paths: Sequence[str]) -> list[Any]:
        tasks = [(join(home, path), decode, None, max_pixels) for path in paths]
        return run(probe_file, tasks, journal=journal, pool=pool)

    paths = [path for path, _ in listed]
    for path in paths[:1]:
        check_reachable(as_source(join(home, path)), timeout_s=pool.timeout_s)
    found = probe_all(paths)
    for choice in range(max(map(len, copies.values()), default=0)):
        rows = [
            row
            for row, (path, _) in enumerate(listed)
            if isinstance(found[row], Failed) and found[row].is_done and choice < len(copies.get(path, ()))
        ]
        others = [copies[listed[row][0]][choice] for row in rows]
        for row, path, result in zip(rows, others, probe_all(others), strict=True):
            if not isinstance(result, Failed):
                paths[row], found[row] = path, result
    good: list[Video] = []
    entries: dict[int, bytes] = {}
    rejected: list[Rejected] = []
    for path, (_, label), result in zip(paths, listed, found, strict=True):
        if isinstance(result, Failed):
            rejected.append(Rejected(path, label, result))
        else:
            video, entry = result
            good.append(Video(*video)._replace(path=path, label=label))
            if frames_fps and is_frames(path):
                good[-1] = good[-1]._replace(fps=frames_fps)
            entries[key_of(good[-1])] = base64.b64decode(entry)
    manifest = Manifest(good, root=root, classes=classes, rejected=len(rejected))
    manifest.entries = entries
    return manifest, rejected


class Probed(NamedTuple):
    """The result of `probe_file`."""

    video: Video
    entry: str
    """The packet index entry, in base64."""


def probe_file(path: str, decode: bool, cache: str | None = None, max_pixels: int = MAX_PIXELS) -> Probed:
    """Probes a file; runs in a child process. `decode`: also decode it completely. `cache`: see `files.fetch`. Raises
    `InputError`."""
    source = fetch(path, cache)
    video, entry = probe_packets(source, max_pixels=max_pixels)
    if decode:
        for _ in decode_all(source, frames=video.frames, size=coded_size(video)):
            pass
    return Probed(video, base64.b64encode(entry).decode())


def split_train_val(listed: Sequence[Listed], val_fraction: float) -> tuple[list[Listed], list[Listed]]:
    """Splits into (train, val): every class gives the same share (0 to 1) to val, but keeps at least one video for
    train. The choice is always the same."""
    train: list[Listed] = []
    val: list[Listed] = []
    by_label: dict[int, list[Listed]] = {}
    for entry in listed:
        by_label.setdefault(entry[1], []).append(entry)
    for label, entries in sorted(by_label.items()):
        order = np.random.default_rng(label).permutation(len(entries))
        count = min(max(round(val_fraction * len(entries)), 1), len(entries) - 1) if val_fraction else 0
        chosen = set(order[:count].tolist())
        for number, entry in enumerate(entries):
            (val if number in chosen else train).append(entry)
    return train, val


def write_rejected(path: str | os.PathLike, rejected: Sequence[Rejected]) -> None:
    """Writes a CSV file `path,label,reason`, or removes an old one if nothing was rejected."""
    write_table(path, ("path", "label", "reason"), [(entry.path, entry.label, entry.reason) for entry in rejected])


def write_table(path: str | os.PathLike, columns: Sequence[str], rows: Sequence[Sequence]) -> None:
    """Writes a CSV file, or removes an old one if there are no rows."""
    path = Path(path)
    if not rows:
        path.unlink(missing_ok=True)
        return
    with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv_writer(file)
        writer.writerow(columns)
        writer.writerows(rows)


def check_overwritable(path: str | os.PathLike) -> None:
    """Raises `InputError` if `path` exists and is not a manifest."""
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path}: a folder; expected the name of a file to write")
    if path.exists():
        try:
            Manifest.read(path)
        except InputError:
            raise InputError(
                f"{path}: exists and is not a manifest, so it is not overwritten; name another --out"
            ) from None
    if index_path(path).exists() and not is_index(index_path(path)):
        raise InputError(f"{index_path(path)}: would be overwritten, but is not a packet index; remove it")


def summary(manifest: Manifest) -> str:
    """Summarises codecs, sizes, lengths and unusual properties of the videos in one line."""

    def spread(values: np.ndarray) -> str:
        low, middle, high = np.percentile(values, [0, 50, 100]).round().astype(int).tolist()
        return str(low) if low == high else f"{low} to {high} (median {middle})"

    codecs = ", ".join(
        f"{codec} {count}" for codec, count in zip(*np.unique(manifest.column("codec"), return_counts=True))
    )
    sides = np.minimum(manifest.column("width"), manifest.column("height"))
    parts = [
        codecs,
        f"short side {spread(sides)}",
        f"{spread(manifest.column('frames') / manifest.column('fps'))} s",
        f"longest GOP {spread(manifest.column('gop'))}",
    ]
    for count, what in (
        ((manifest.column("vfr") > 0).sum(), "with a variable frame rate"),
        ((manifest.column("rotation") > 0).sum(), "rotated"),
        ((manifest.column("mirrored") > 0).sum(), "mirrored"),
        (
            sum(bool(frame_files(v.path).gaps) for v in manifest if is_frames(v.path)),
            "with gaps in the frames' numbers",
        ),
        ((~np.isin(manifest.column("pixel_format"), ["yuv420p", "yuvj420p", ""])).sum(), "not 8-bit 4:2:0"),
    ):
        if count:
            parts.append(f"{count} {what}")
    return "; ".join(parts)
