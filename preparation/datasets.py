"""Reads the annotations of Kinetics, UCF101, HMDB51 and Something-Something V2, official or from other projects, and
finds the video files under any common naming scheme."""

import csv
import difflib
import io
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple, TypeVar

from common.labels import read_labels
from dali_pipelines.errors import InputError
from dali_pipelines.folders import VIDEO_SUFFIXES, videos_below
from dali_pipelines.text import decode, read_lines
from preparation.index import Listed, read_listed

_LABELS = Path(__file__).parents[1] / "configs" / "labels"
SPLITS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validate": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
    "holdout": "test",
}
"""What projects call the splits -> what we call them."""
T = TypeVar("T")
_CLIP = re.compile(r"(?P<id>.{11})_(?P<start>\d+)_(?P<end>\d+)(\.\w+)*")
"""YouTube id, first and last second: `-3B32lodo2M_000059_000069`, also with more suffixes, as yt-dlp leaves them
(`.f137`, `.mp4` before another suffix)."""

Clip = tuple[str, int, int]
"""YouTube id, and first and last second within the uploaded video."""


class Expected(NamedTuple):
    """A video listed in the annotations."""

    name: str
    """A path, or a file name without its suffix."""
    label: int
    split: str
    """train, val or test."""


@dataclass
class FoundSplit:
    """The found and the missing videos of one split."""

    listed: list[Listed] = field(default_factory=list)
    """Labels and paths relative to the video folder. If a video has several files, the best one is listed."""
    copies: dict[str, list[str]] = field(default_factory=dict)
    """Listed path -> the other files of the same video, best first."""
    missing: list[Expected] = field(default_factory=list)

    @property
    def expected(self) -> int:
        """Number of videos in the annotations."""
        return len(self.listed) + len(self.missing)


def kinetics_classes(classes: int, annotations: Sequence[Path], labels: str | None) -> tuple[str, ...]:
    """Names of the 400, 600 or 700 classes in alphabetical order: from the file `labels` if given, for 400 from our own
    list, otherwise from the annotations. Raises `InputError` if there is another number of classes."""
    if labels is not None:
        names = read_labels(labels)
        if len(names) != classes:
            raise InputError(f"{labels}: {len(names)} class names; expected the {classes} of Kinetics-{classes}")
        return names
    if classes == 400:
        return read_labels(str(_LABELS / "kinetics400.txt"))
    found = sorted({row["label"] for path in annotations for row in _read_rows(path) or ()} - {""}, key=str.lower)
    if len(found) != classes:
        raise InputError(
            f"{', '.join(map(str, annotations))}: {len(found)} class names; expected {classes}: give the official "
            "train.csv as well (--annotations train.csv val.csv), or the names in a file (--labels)"
        )
    return tuple(found)


def read_annotations(path: Path, classes: Sequence[str]) -> list[Expected]:
    """Reads an annotation file: the official CSV (columns label, youtube_id, time_start, time_end, split), or lines
    `path label` as PaddleVideo, mmaction2 and SlowFast write them. Raises `InputError` that names the line."""
    rows = _read_rows(path)
    if rows is None:
        listed, _ = read_listed(path, classes=classes)
        for name, label in listed:
            if label >= len(classes):
                raise InputError(f"{path}: {name} has label {label}; expected 0 to {len(classes) - 1}")
        split = _split_of_name(path)
        return [Expected(name, label, split) for name, label in listed]
    labels = {_plain(name): label for label, name in enumerate(classes)}
    expected = []
    for number, row in enumerate(rows, start=2):
        where = f"{path}:{number}"
        try:
            clip = (row["youtube_id"].strip(), round(float(row["time_start"])), round(float(row["time_end"])))
        except (AttributeError, TypeError, ValueError):
            raise InputError(f"{where}: expected label, youtube_id, time_start and time_end in seconds") from None
        if not row["label"]:
            raise InputError(f"{where}: no label; expected annotations with labels")
        label = _look_up(_plain(row["label"]), labels, where)
        split = _look_up(row["split"].strip().lower(), SPLITS, where) if row.get("split") else _split_of_name(path)
        expected.append(Expected(_clip_name(clip), label, split))
    if not expected:
        raise InputError(f"{path}: no videos in it")
    return expected


def _look_up(name: str, known: Mapping[str, T], where: str) -> T:
    if name not in known:
        near = difflib.get_close_matches(name, known, 1, 0)
        raise InputError(f"{where}: {name!r} is unknown; the nearest known name is {near[0]!r}")
    return known[name]


def _read_rows(path: Path) -> list[dict[str, str]] | None:
    """The rows of an official CSV file; None for any other file."""
    reader = csv.DictReader(io.StringIO(decode(path.read_bytes()), newline=""))
    try:
        reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
        if not {"label", "youtube_id", "time_start", "time_end"} <= set(reader.fieldnames):
            return None
        return list(reader)
    except csv.Error as error:
        raise InputError(
            f"{path}:{reader.line_num}: {error}; expected the official CSV or lines `path label`"
        ) from None


def _split_of_name(path: Path) -> str:
    words = re.split(r"[^a-z]+", path.stem.lower())
    splits = {SPLITS[word] for word in words if word in SPLITS}
    if len(splits) != 1:
        raise InputError(f"{path}: unknown split; expected train, val or test in the file name")
    return splits.pop()


def _plain(name: str) -> str:
    """Normalises the case, quotes and underscores of a class name, which differ between projects."""
    return " ".join(re.sub(r"[_\"']", " ", name.lower()).split())


def _clip_name(clip: Clip) -> str:
    return f"{clip[0]}_{clip[1]:06d}_{clip[2]:06d}"


def ucf101_annotations(folder: Path, split: int) -> tuple[list[Expected], tuple[str, ...]]:
    """Reads trainlist0N.txt and testlist0N.txt (as val) from the folder ucfTrainTestlist, and checks classInd.txt.
    Returns the videos, with labels from 0, and the class names. Raises `InputError`."""
    classes = read_labels(str(_LABELS / "ucf101.txt"))
    index = [line.split(None, 1) for line in read_lines(folder / "classInd.txt") if line.strip()]
    if sorted(index) != sorted([str(number), name] for number, name in enumerate(classes, start=1)):
        raise InputError(f"{folder / 'classInd.txt'}: not the 101 classes of UCF101 in alphabetical order")
    expected = []
    for name, part in (("trainlist", "train"), ("testlist", "val")):
        path = folder / f"{name}{split:02d}.txt"
        for number, line in enumerate(read_lines(path), start=1):
            if not line.strip():
                continue
            video = PurePosixPath(line.split()[0])
            if video.parent.name not in classes:
                raise InputError(f"{path}:{number}: expected CLASS/VIDEO.avi with a known class, not {line[:80]!r}")
            expected.append(Expected(str(video), classes.index(video.parent.name), part))
    return expected, classes


def hmdb51_annotations(folder: Path, split: int) -> tuple[list[Expected], tuple[str, ...]]:
    """Reads the 51 files CLASS_test_splitN.txt from the folder testTrainMulti_7030_splits. A line is `VIDEO.avi 1` for
    training, `... 2` for testing (as val) and `... 0` for a video that the split leaves out. Format: readme.txt beside
    them, https://serre-lab.clps.brown.edu/resource/hmdb-a-large-human-motion-database.
    Returns the videos, and the class names in alphabetical order, which number the labels. Raises `InputError`."""
    suffix = f"_test_split{split}.txt"
    files = sorted(folder.glob(f"*{suffix}"))
    if len(files) != 51:
        raise InputError(
            f"{folder}: {len(files)} files CLASS{suffix}; expected 51: unpack test_train_splits.rar there"
            + ("" if folder.is_dir() else " (no such folder)")
        )
    classes = tuple(file.name.removesuffix(suffix) for file in files)
    parts = {"1": "train", "2": "val", "0": ""}
    expected = []
    for label, file in enumerate(files):
        for number, line in enumerate(read_lines(file), start=1):
            if not line.strip():
                continue
            name, _, part = line.strip().rpartition(" ")
            if not name or part not in parts:
                raise InputError(f"{file}:{number}: expected `VIDEO.avi 0|1|2`, not {line[:80]!r}")
            if parts[part]:
                expected.append(Expected(f"{classes[label]}/{name.strip()}", label, parts[part]))
    return expected, classes


def ssv2_annotations(annotations: Sequence[Path], labels: Path) -> tuple[list[Expected], tuple[str, ...]]:
    """Reads something-something-v2-{train,validation}.json, lists of {"id", "label", "template", "placeholders"}, and
    something-something-v2-labels.json, which numbers the templates without their brackets: "Holding something next to
    something": "41". Format: https://www.qualcomm.com/developer/software/something-something-v-2-dataset.
    Returns the videos, which are files ID.webm, and the class names. Raises `InputError`."""
    classes = read_labels(str(labels))
    numbers = {_plain(name): label for label, name in enumerate(classes)}
    expected = []
    for path in annotations:
        split = _split_of_name(path)
        try:
            entries = json.loads(decode(path.read_bytes()))
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: not JSON ({error}); expected something-something-v2-{split}.json") from None
        if not isinstance(entries, list) or not entries:
            raise InputError(f'{path}: expected a list of videos, such as [{{"id": "78687", "template": "..."}}]')
        for number, entry in enumerate(entries):
            where = f"{path}: entry {number}"
            if not isinstance(entry, dict) or not str(entry.get("id", "")).isdecimal():
                raise InputError(f"{where}: expected an object with the `id` of a video, such as 78687")
            if not isinstance(template := entry.get("template"), str):
                raise InputError(f"{where}: no `template`, so no class; the test list has none: leave it out")
            label = _look_up(_plain(re.sub(r"[\[\]]", "", template)), numbers, where)
            expected.append(Expected(str(entry["id"]), label, split))
    return expected, classes


class Store:
    """All videos below a folder or a URL. Finds them by path, by file name, or by the clip that the name encodes.

    `passed_over` describes the other files; "" if there are none. Raises `InputError` if there are no videos."""

    def __init__(self, root: str | os.PathLike):
        self.root = root
        self.paths: set[str] = set()
        self._by_name: dict[str, list[str]] = {}
        self._by_clip: dict[Clip, list[str]] = {}
        self._by_id: dict[str, list[str]] = {}
        found = videos_below(root)
        self.passed_over = found.note
        for path in found.videos:
            stem, _ = os.path.splitext(os.path.basename(path))
            self.paths.add(path)
            self._by_name.setdefault(stem, []).append(path)
            if clip := _CLIP.fullmatch(stem):
                key = (clip["id"], int(clip["start"]), int(clip["end"]))
                self._by_clip.setdefault(key, []).append(path)
            elif len(stem) == 11 or _is_replacement(path):
                self._by_id.setdefault(stem[:11], []).append(path)
        if not self.paths:
            raise InputError(
                f"{self.root}: no videos in it; expected the videos in it or in folders below it"
                + (f" ({found.note})" if found.note else "")
            )

    def find(self, expected: Sequence[Expected]) -> dict[str, FoundSplit]:
        """Finds the files of each split. If a video has several files, those in a folder `replacement...` (CVDF's
        replacements of damaged files) are preferred, then those in a folder named after the split."""
        splits: dict[str, FoundSplit] = {}
        ids: dict[str, int] = {}
        for each in expected:
            if clip := _CLIP.fullmatch(PurePosixPath(each.name).stem):
                ids[clip["id"]] = ids.get(clip["id"], 0) + 1
        for each in expected:
            found = splits.setdefault(each.split, FoundSplit())
            paths = self._files(each.name, ids)
            if not paths:
                found.missing.append(each)
                continue
            first, *others = sorted(set(paths), key=lambda path: (_rank(path, each.split), path))
            found.listed.append((first, each.label))
            if others:
                found.copies[first] = others
        return splits

    def _files(self, name: str, ids: dict[str, int]) -> list[str]:
        if name in self.paths:
            return [name]
        stem = PurePosixPath(name).stem if PurePosixPath(name).suffix.lower() in VIDEO_SUFFIXES else name
        stem = PurePosixPath(stem).name
        paths = list(self._by_name.get(stem, ()))
        if clip := _CLIP.fullmatch(stem):
            paths += self._by_clip.get((clip["id"], int(clip["start"]), int(clip["end"])), ())
            if ids[clip["id"]] == 1:  # named by id only: ambiguous if the id has two clips
                paths += self._by_id.get(clip["id"], ())
        return paths


def _is_replacement(path: str) -> bool:
    return any(folder.lower().startswith("replacement") for folder in PurePosixPath(path).parts[:-1])


def _rank(path: str, split: str) -> int:
    if _is_replacement(path):
        return 0
    if len(PurePosixPath(path).stem) == 11:  # only the id: the clip, or the whole video
        return 3
    folders = [folder.lower() for folder in PurePosixPath(path).parts[:-1]]
    return 1 if any(split in re.split(r"[^a-z]+", folder) for folder in folders) else 2


def check_class_order(found: FoundSplit, classes: Sequence[str], name: str) -> None:
    """Raises `InputError` if most videos are in the folder of another class than their label: then the list numbers the
    classes in another order."""
    labels = {_plain(known): label for label, known in enumerate(classes)}
    pairs = [(path, labels.get(_plain(PurePosixPath(path).parent.name)), label) for path, label in found.listed]
    others = [(path, of_folder, label) for path, of_folder, label in pairs if of_folder not in (None, label)]
    if 2 * len(others) > sum(of_folder is not None for _, of_folder, _ in pairs):
        path, of_folder, label = others[0]
        raise InputError(
            f"{name}: numbers the classes in another order: {path} has label {label} ({classes[label]!r}), but its "
            f"folder has label {of_folder}; {len(others)} of {len(pairs)} differ. Expected alphabetical order, from 0"
        )
