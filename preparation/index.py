"""Looks at every video of a list or a folder and makes a manifest of those that can be read."""

import csv
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from dali_pipelines.errors import InputError
from dali_pipelines.files import absolute, as_source, check_reachable, fetch, join
from dali_pipelines.host_decoder import decode_all
from dali_pipelines.manifest import Manifest, Video, coded_size, probe
from preparation.work import Crew, Failed, run

VIDEO_SUFFIXES = frozenset(
    [".3gp", ".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm", ".wmv"]
)

_LARGEST_LABEL = 2**31 - 1
_SPLITS = frozenset({"train", "training", "val", "valid", "validation", "test"})

Listed = tuple[str, int]
"""A path, relative to a root or absolute, and its label."""


def is_video_name(path: str | os.PathLike) -> bool:
    """Whether a file is called as videos are; macOS puts others into archives, `._NAME` for every NAME."""
    name = os.path.basename(path)
    return os.path.splitext(name)[1].lower() in VIDEO_SUFFIXES and not name.startswith("._")


@dataclass(frozen=True)
class Rejected:
    """A listed video that is no use, and why."""

    path: str
    label: int
    reason: str


def read_list(path: str | os.PathLike) -> list[Listed]:
    """Lines `path label`, as PaddleVideo and mmaction2 write them; paths may hold spaces, empty lines are skipped."""
    listed = []
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise InputError(f"{path}: not a text file; expected lines `path label`") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        file, label = ("", *line.strip().rsplit(None, 1))[-2:]
        if not file or not label.isdecimal() or int(label) > _LARGEST_LABEL:
            raise InputError(f"{path}:{number}: expected `path label` with a label of 0 or more, not {line[:80]!r}")
        listed.append((file, int(label)))
    if not listed:
        raise InputError(f"{path}: no videos in it; expected lines `path label`")
    return listed


def read_folder(root: str | os.PathLike) -> tuple[list[Listed], tuple[str, ...]]:
    """A folder a class, videos in it or below it: the videos with paths relative to `root`, and the sorted classes."""
    root = Path(root)
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; expected one that holds a folder of videos for each class")
    classes = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if classes and _SPLITS.issuperset(name.lower() for name in classes):
        raise InputError(
            f"{root}: holds {' and '.join(classes)}, which look like splits, not classes; index each of them, "
            f"such as: folder {root / classes[0]} --out {classes[0]}.csv"
        )
    listed = [
        (file.relative_to(root).as_posix(), label)
        for label, name in enumerate(classes)
        for file in sorted((root / name).rglob("*"))
        if is_video_name(file)
    ]
    if not listed:
        raise InputError(
            f"{root}: no videos; expected a folder for each class with videos in it, such as archery/1.mp4"
        )
    empty = sorted(set(range(len(classes))) - {label for _, label in listed})
    if empty:
        raise InputError(f"{root / classes[empty[0]]}: no videos in this folder; fill it or remove it")
    return listed, tuple(classes)


def index(
    listed: Sequence[Listed],
    *,
    root: str | os.PathLike,
    journal: Path,
    crew: Crew,
    classes: Sequence[str] = (),
    copies: Mapping[str, Sequence[str]] = MappingProxyType({}),
    decode: bool = False,
) -> tuple[Manifest, list[Rejected]]:
    """Looks at every listed video; the manifest of the good ones in the order of the list, and the others with reasons.

    `copies`: other files of a listed one, which are tried in order where it cannot be read. `decode`: decodes all of
    every file, and rejects those with a damaged picture. `journal`: see `work.run`.
    """
    for _, label in listed:
        if classes and label >= len(classes):
            raise InputError(f"label {label} is listed, but there are {len(classes)} classes (0 to {len(classes) - 1})")
    place = absolute(root)  # workers elsewhere have another working folder

    def look_at(paths: Sequence[str]) -> list[Any]:
        return run("index.look", [(join(place, path), decode) for path in paths], journal=journal, crew=crew)

    paths = [path for path, _ in listed]
    for path in paths[:1]:
        check_reachable(as_source(join(place, path)))
    found = look_at(paths)
    for choice in range(max(map(len, copies.values()), default=0)):
        rows = [
            row
            for row, (path, _) in enumerate(listed)
            if isinstance(found[row], Failed) and found[row].is_done and choice < len(copies.get(path, ()))
        ]
        others = [copies[listed[row][0]][choice] for row in rows]
        for row, path, result in zip(rows, others, look_at(others), strict=True):
            if not isinstance(result, Failed):
                paths[row], found[row] = path, result
    good, rejected = [], []
    for path, (_, label), result in zip(paths, listed, found, strict=True):
        if isinstance(result, Failed):
            rejected.append(Rejected(path, label, result))
        else:
            good.append(Video(*result)._replace(path=path, label=label))
    return Manifest(good, root=root, classes=classes, rejected=len(rejected)), rejected


def look(path: str, decode: bool) -> Video:
    """What there is to know of the file at `path`; with `decode`, all of it is decoded. Raises `InputError`."""
    source = fetch(path)
    video = probe(source)
    if decode:
        for _ in decode_all(source, frames=video.frames, size=coded_size(video)):
            pass
    return video


def split(listed: Sequence[Listed], val_fraction: float) -> tuple[list[Listed], list[Listed]]:
    """(train, val): the same share of every class, the same videos every time; each class keeps one for training."""
    train, val = [], []
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
    """A CSV file `path,label,reason`; removes an old one where nothing was rejected."""
    write_table(path, ("path", "label", "reason"), [(entry.path, entry.label, entry.reason) for entry in rejected])


def write_table(path: str | os.PathLike, columns: Sequence[str], rows: Sequence[Sequence]) -> None:
    """A CSV file; removes an old one where there are no rows."""
    path = Path(path)
    if not rows:
        path.unlink(missing_ok=True)
        return
    with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)


def check_is_ours(path: str | os.PathLike) -> None:
    """Raises `InputError` where there is a file at `path` that is no manifest: it would be lost."""
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path}: a folder; expected the name of a file to write")
    if path.exists():
        try:
            Manifest.read(path)
        except InputError:
            raise InputError(f"{path}: exists, and is no manifest; it is not overwritten: name another --out") from None


def describe(manifest: Manifest) -> str:
    """What kinds of videos these are, in a line."""

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
        f"longest groups of pictures {spread(manifest.column('gop'))}",
    ]
    for count, what in (
        ((manifest.column("vfr") > 0).sum(), "with a variable frame rate"),
        ((manifest.column("rotation") > 0).sum(), "turned"),
        ((manifest.column("mirrored") > 0).sum(), "mirrored"),
        ((~np.isin(manifest.column("pixel_format"), ["yuv420p", "yuvj420p", ""])).sum(), "not 8-bit 4:2:0"),
    ):
        parts += [f"{count} {what}"] * bool(count)
    return "; ".join(parts)
