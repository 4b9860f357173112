"""Probes every video of a list or folder and makes a manifest of the readable ones."""

import base64
import csv
import difflib
import hashlib
import io
import itertools
import os
import re
import shlex
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from common.worker_pool import Failed, WorkerPool, run
from dali_pipelines.errors import InputError
from dali_pipelines.files import Source, absolute, as_source, check_reachable, fetch, is_url, join
from dali_pipelines.folders import Found, is_video_name, leads_back, videos_below
from dali_pipelines.frame_names import frame_files, is_frames
from dali_pipelines.host_decoder import MAX_PIXELS, decode_all
from dali_pipelines.manifest import Manifest, Video, coded_size, key_of
from dali_pipelines.packet_index import index_path, is_index, names_packets
from dali_pipelines.probe import probe_packets
from dali_pipelines.text import csv_writer, decode, split_lines

LARGEST_LABEL = 2**31 - 1  # int32
_SPLITS = frozenset({"train", "training", "val", "valid", "validation", "test"})

_PATH_COLUMNS = {"path", "file", "filename", "file_name", "file_path", "filepath", "video", "video_path", "video_name"}
_LABEL_COLUMNS = {"label", "label_id", "class", "class_id", "class_name", "classname", "category", "action", "target"}
MIN_VAL_VIDEOS = 5
"""With fewer videos in validation, one video moves the accuracy of its class by more than 20 points."""
_NOT_A_NAME = re.compile(r"[-+.,; \d]*")
"""Labels that are numbers, or several of them: `3`, `3.0`, `-1`, `1,3`."""

Listed = tuple[str, int]
"""A path, relative to a root or absolute, and its label."""


class Part(NamedTuple):
    """The place of a video within a larger file, such as a Parquet file."""

    file: str
    """Relative to the root."""
    offset: int
    """Start of the video in bytes."""
    size: int
    """Size of the video in bytes."""


@dataclass(frozen=True)
class Rejected:
    """A listed video that cannot be used, and the reason."""

    path: str
    label: int
    reason: str


def read_listed(
    path: str | os.PathLike, root: str | os.PathLike = ".", classes: Sequence[str] = ()
) -> tuple[list[Listed], tuple[str, ...]]:
    """Reads a list of videos, and returns it with its class names.

    The list has lines `path label` (see `read_list`), or columns `path,label`, `path;label` or with a tab, with or
    without a header. A header may name further columns, which are ignored. Labels are numbers from 0, or class names:
    positions in `classes` or, without them, in the alphabetical order of the names. Paths may have the backslashes of
    Windows, or lack the suffix of the file. Raises `InputError` that names the line."""
    content = Path(path).read_bytes()
    if content.startswith(b"PK\3\4"):
        raise InputError(f"{path}: a workbook or a ZIP archive; save the table as CSV (comma-separated, UTF-8)")
    text = decode(content)
    if text.startswith("# root: "):
        raise InputError(f"{path}: a manifest already, as training reads it; expected a list of videos")
    if re.match(r"\s*[\[{]\s*[\[{\"\n]", text):
        raise InputError(f"{path}: JSON; expected lines `path label` or CSV `path,label`, such as Kinetics' train.csv")
    rows = _table_rows(path, text) if "\0" not in text else None
    if rows is None:
        listed = read_list(path, root)
        files = _on_disk([file for file, _ in listed], root)
        return [(file, label) for file, (_, label) in zip(files, listed, strict=True)], tuple(classes)
    files = _on_disk([file for _, file, _ in rows], root)
    rows = [(number, file, label) for file, (number, _, label) in zip(files, rows, strict=True)]
    are_numbers = _NOT_A_NAME.fullmatch(rows[0][2]) is not None
    for number, file, label in rows:
        if not label.isascii() and re.search("[\ud800-\udfff]", label):
            raise InputError(f"{path}:{number}: not UTF-8: the class {label[:80]!r}; save the file as UTF-8")
        wanted = label.isdecimal() if are_numbers else not _NOT_A_NAME.fullmatch(label)
        if not file or not wanted or (are_numbers and int(label) > LARGEST_LABEL):
            kind = "whole numbers, 0 or more" if are_numbers else "class names"
            raise InputError(
                f"{path}:{number}: expected `path,label`, with one label each, and labels that are {kind} as in the "
                f"first row; found the path {file[:80]!r} and the label {label[:40]!r}"
            )
    if are_numbers:
        return [(file, int(label)) for _, file, label in rows], tuple(classes)
    classes = tuple(classes) or tuple(sorted({label for _, _, label in rows}))
    labels = {name: label for label, name in enumerate(classes)}
    for number, _, label in rows:
        if label not in labels:
            near = difflib.get_close_matches(label, classes, 1, 0)[0]
            raise InputError(
                f"{path}:{number}: {label[:80]!r} is not one of the {len(classes)} classes; the nearest is {near!r}"
            )
    return [(file, labels[label]) for _, file, label in rows], classes


def _on_disk(listed: Sequence[str], root: str | os.PathLike) -> list[str]:
    """The paths as the files below `root` are named: with slashes for the backslashes of Windows (`archery\\1.mp4`),
    and with the suffix that PaddleVideo's list of UCF101 leaves out (`archery/1`)."""
    names: dict[str, dict[str, str]] = {}

    def find(file: str) -> str:
        if (is_video_name(file) and "\\" not in file) or is_url(file) or is_url(root):
            return file
        if os.path.lexists(join(root, file)):
            return file
        folder, name = os.path.split(file.replace("\\", "/"))
        if folder not in names:
            try:
                found = sorted(os.listdir(join(root, folder)))
            except OSError:
                found = []
            names[folder] = {os.path.splitext(each)[0]: each for each in filter(is_video_name, found)}
            names[folder] |= {each: each for each in found}
        return os.path.join(folder, names[folder][name]) if name in names[folder] else file

    return [find(file) for file in listed]


def _table_rows(path: str | os.PathLike, text: str) -> list[tuple[int, str, str]] | None:
    """(line number, path, label) of each row of a CSV list; None if the text is not one. Raises `InputError`."""
    first = next((line for line in split_lines(text) if line.strip()), "")
    delimiter = max("\t,;", key=first.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
    rows: list[tuple[int, list[str]]] = []
    try:
        for row in reader:
            if any(cell.strip() for cell in row):
                rows.append((reader.line_num, [cell.strip() for cell in row]))
    except csv.Error as error:
        raise InputError(f"{path}:{reader.line_num}: {error}; expected `path label` or `path,label`") from None
    if not rows or len(rows[0][1]) < 2:
        return None
    names = [cell.lower().replace(" ", "_") for cell in rows[0][1]]
    if not (_PATH_COLUMNS.isdisjoint(names) or _LABEL_COLUMNS.isdisjoint(names)):
        file, label = (
            next(n for n, name in enumerate(names) if name in known) for known in (_PATH_COLUMNS, _LABEL_COLUMNS)
        )
        table = [
            (number, row[file], row[label]) if len(row) == len(names) else (number, "", "") for number, row in rows
        ]
        if len(table) == 1:
            raise InputError(f"{path}: only a header; expected rows `path,label` below it")
        return table[1:]
    if not _LABEL_COLUMNS.isdisjoint(names) and not any(map(is_video_name, names)):
        official = "; for the official CSV of Kinetics: prepare.py kinetics400" if "youtube_id" in names else ""
        raise InputError(f"{path}: no column of paths among {', '.join(names)}; expected one named path{official}")
    is_video = [is_video_name(row[0]) for _, row in rows[:2]]
    if len(names) == 2 and is_video == [False, True]:  # a header of the user's own
        del rows[0]
    # An unquoted path may have a comma itself, as in `take 1,2.mp4,0`.
    table = [(number, delimiter.join(row[:-1]), row[-1]) for number, row in rows]
    _, first_file, first_label = table[0]
    if first_label and (is_video_name(first_file) or (len(names) == 2 and first_label.isdecimal())):
        return table
    if any(is_video_name(cell) for _, row in rows[:2] for cell in row):
        raise InputError(
            f"{path}: columns {', '.join(cell[:40] for cell in rows[0][1])}; expected `path,label`, or a header that "
            "calls one column path (or file, video) and one label (or class, category)"
        )
    return None


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
    if not label.isdecimal() or int(label) > LARGEST_LABEL:
        if is_video_name(label):
            return "found no label after the path"
        if re.fullmatch(r"-\d+", label):
            return f"found the label {label!r}; leave out what has no label, as in test lists"
        if re.search(r"[^,;]*[,;][ \t]*\d+$", label):
            return "found a comma or semicolon"
        if columns := re.fullmatch(r"[^,;]+([,;])[^,;]+", f"{file} {label}".strip()):
            return f"found columns, but no header and no suffix of a video: add a first line `path{columns[1]}label`"
        return f"found the label {label[:40]!r} (class names need a comma or a tab before them)"
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
    is_for_frames = find is not videos_below
    if splits := [name for name in folders if name.lower() in _SPLITS]:
        notes.append(f"{' and '.join(splits)}: taken as {'a class' if len(splits) == 1 else 'classes'} like the others")
    videos = list(itertools.chain(*by_folder.values()))
    inner = {tuple(path.split("/")[:2]) for path in videos}
    if not is_for_frames and len(inner) > len(folders) and all(path.count("/") > 1 for path in videos):
        notes.append(
            f"each of the {len(folders)} folders is taken as a class, and all videos are in folders within them, such "
            f"as {'/'.join(min(inner))!r}; if these are the classes, index a folder of links to them: "
            f"mkdir flat && ln -s {shlex.quote(os.path.abspath(root))}/*/* flat"
        )
    note = "; ".join(notes)
    if not any(by_folder.values()):
        example = (
            "a folder of frames for each video, such as archery/v1/img_00001.jpg"
            if is_for_frames
            else "videos in it, such as archery/1.mp4"
        )
        expected = f"expected a folder for each class with {example}"
        if outside and not is_for_frames:
            raise InputError(
                f"{root}: {'1 video' if outside == 1 else f'{outside} videos'} in no class folder, such as "
                f"{found.videos[0]}; {expected}. To train, move each video into the folder of its class, or list "
                f"`path,label` in a file (prepare.py index --list FILE --root {root}). To classify the videos: "
                f"predict.py -w WEIGHTS {root}"
            )
        hint = ""
        if not is_for_frames and re.search(r"\.(jpe?g|png)\b", note):
            hint = f"; if these images are the frames of videos: prepare.py frames {root}"
        raise InputError(f"{root}: no videos; {expected}" + (f" ({note})" if note else "") + hint)
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
    classes_from: str = "",
    copies: Mapping[str, Sequence[str]] = MappingProxyType({}),
    parts: Mapping[str, Part] = MappingProxyType({}),
    decode: bool = False,
    max_pixels: int = MAX_PIXELS,
    frames_fps: float | None = None,
) -> tuple[Manifest, list[Rejected]]:
    """Probes every listed video. Returns the manifest of the readable ones, in the order of the list, and the others.

    classes_from: the file that names the classes, for messages.
    copies: other files of a listed video, tried in order if it cannot be read.
    parts: listed videos that are a part of a file.
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
                + (f" in {classes_from}; add the missing names there, or correct the label" if classes_from else "")
            )
    home = absolute(root)  # remote workers have a different working directory

    def place(path: str) -> str | tuple[str, int, int]:
        part = parts.get(path)
        return (join(home, part.file), part.offset, part.size) if part else join(home, path)

    def probe_all(paths: Sequence[str]) -> list[Any]:
        tasks = [(place(path), decode, None, max_pixels) for path in paths]
        return run(probe_file, tasks, journal=journal, pool=pool)

    paths = [path for path, _ in listed]
    for path in paths[:1]:
        check_reachable(_source(place(path)), timeout_s=pool.timeout_s)
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
            probed = Video(*video)._replace(path=path, label=label)
            if frames_fps and is_frames(path):
                probed = probed._replace(fps=frames_fps)
            if part := parts.get(path):
                probed = probed._replace(shard=part.file, offset=part.offset, size=part.size)
            good.append(probed)
            entries[key_of(good[-1])] = base64.b64decode(entry)
    manifest = Manifest(good, root=root, classes=classes, rejected=len(rejected))
    manifest.entries = entries
    return manifest, rejected


class Probed(NamedTuple):
    """The result of `probe_file`."""

    video: Video
    entry: str
    """The packet index entry, in base64."""


def _source(place: str | Sequence[Any]) -> Source:
    return as_source(place) if isinstance(place, str) else Source(*place)


def probe_file(
    place: str | Sequence[Any], decode: bool, cache: str | None = None, max_pixels: int = MAX_PIXELS
) -> Probed:
    """Probes a file, or a part of one: (file, offset, size). Runs in a child process. `decode`: also decode it
    completely. `cache`: see `files.fetch`. Raises `InputError`."""
    source = fetch(_source(place), cache)
    video, entry = probe_packets(source, max_pixels=max_pixels)
    if decode:
        for _ in decode_all(source, frames=video.frames, size=coded_size(video)):
            pass
    return Probed(video, base64.b64encode(entry).decode())


def split_train_val(listed: Sequence[Listed], val_fraction: float) -> tuple[list[Listed], list[Listed]]:
    """Splits into (train, val): every class gives the same share (0 to 1) to val, but keeps at least one video for
    train.

    A hash of the path decides: the choice is always the same, and few videos change sides when others are added, so
    weights that were trained on the old split can be fine-tuned and tested on the new one.
    """
    by_label: dict[int, list[Listed]] = {}
    for entry in listed:
        by_label.setdefault(entry[1], []).append(entry)
    val: set[Listed] = set()
    for entries in by_label.values():
        distinct = sorted(set(entries), key=lambda entry: hashlib.sha256(os.fsencode(entry[0])).digest())
        count = min(max(round(val_fraction * len(distinct)), 1), len(distinct) - 1) if val_fraction else 0
        val.update(distinct[:count])
    return [entry for entry in listed if entry not in val], [entry for entry in listed if entry in val]


def few_for_validation(train: Sequence[Listed], val: Sequence[Listed], classes: Sequence[object]) -> str:
    """Warns of classes with fewer than `MIN_VAL_VIDEOS` videos in validation, and says what to do; "" if there are
    none."""
    in_val = Counter(label for _, label in val)
    in_all = in_val + Counter(label for _, label in train)
    few = [label for label in sorted(in_all) if in_val[label] < MIN_VAL_VIDEOS]
    if not few or not val:
        return ""
    worst = min(few, key=lambda label: (in_val[label], label))
    smallest = min(in_all.values())
    remedy = "record more videos"
    if smallest > MIN_VAL_VIDEOS + 1:
        fraction = -(-100 * MIN_VAL_VIDEOS // smallest) / 100
        remedy = f"use --val-fraction {min(fraction, 0.5):g}, or record more videos"
    return (
        f"{len(few)} of {len(in_all)} classes have fewer than {MIN_VAL_VIDEOS} videos for validation "
        f"({classes[worst]!r}: {in_val[worst]}), so their accuracy will be rough; {remedy}"
    )


def check_root(listed: Sequence[str], root: str | os.PathLike, other_roots: Sequence[Path]) -> None:
    """Raises `InputError` if `root` is not a folder, or if the first listed files are not below it but below one of
    `other_roots`, or would be below it without the first folders of their paths."""
    if is_url(root):
        return
    if not os.path.isdir(root):
        raise InputError(f"--root {root}: no such folder; expected the folder that the listed paths are relative to")
    some = [path for path in listed[:16] if not is_url(path)]

    def has_some(folder: str | os.PathLike) -> bool:
        return any(os.path.lexists(join(folder, path)) for path in some)

    if has_some(root):
        return
    for other in filter(has_some, other_roots):
        raise InputError(f"{some[0]} and others are not below {root}, but below {other}: --root {other}")
    for path in some:
        for prefix in map(str, reversed(PurePath(path).parents)):
            rest = os.path.relpath(path, prefix)
            if prefix != "." and os.path.lexists(join(root, rest)):
                raise InputError(
                    f"{path} and others are not below {root}, but {rest} is: remove {prefix.rstrip('/')}/ from the list"
                )


def odd_labels(listed: Sequence[Listed], classes: Sequence[str]) -> list[str]:
    """Warnings of labels that are probably not meant: without class names, labels that do not start at 0 or leave out
    numbers; and videos that are listed more than once."""
    labels = {label for _, label in listed}
    count = max(labels, default=-1) + 1
    notes = []
    if labels and not classes and 0 not in labels:
        notes.append(f"the lowest label is {min(labels)}, but labels count from 0; does the list count from 1?")
    elif not classes and len(labels) < count:
        notes.append(f"{len(labels)} of the labels 0 to {count - 1} occur, but the network gets {count} classes")
    by_path: dict[str, set[int]] = {}
    for path, label in listed:
        by_path.setdefault(path, set()).add(label)
    if twice := len(listed) - len(by_path):
        several = [path for path, labels in by_path.items() if len(labels) > 1]
        differing = f", {len(several)} with different labels, such as {several[0]}" if several else ""
        notes.append(f"{twice} of {len(listed)} lines repeat a video{differing}")
    return notes


def copies_between(manifests: Mapping[str, Manifest]) -> str:
    """Warns of videos that are the same, packet by packet, in two classes or in two of the `manifests` (by name); ""
    if there are none. A manifest needs the `entries` of its videos."""
    places: dict[bytes, list[tuple[str, Video]]] = {}
    for name, manifest in manifests.items():
        for video in manifest:
            if names_packets(entry := manifest.entries[key_of(video)]):
                places.setdefault(entry, []).append((name, video))
    found = []
    for what, differ in (
        ("with two classes", lambda a, b: a[1].label != b[1].label),
        (f"in both {' and '.join(manifests)}", lambda a, b: a[0] != b[0]),
    ):
        pairs = [(each[0], other) for each in places.values() for other in each[1:] if differ(each[0], other)]
        if pairs:
            (_, one), (_, other) = pairs[0]
            found.append(f"{len(pairs)} {what}, such as {one.path!r} and {other.path!r}")
    return f"copies of the same videos: {'; '.join(found)}. Remove one of each" if found else ""


def names_alike(classes: Sequence[str]) -> str:
    """Warns of two classes whose names differ only in upper and lower case or in spaces; "" if there are none."""
    seen: dict[str, str] = {}
    for name in classes:
        if (other := seen.setdefault("".join(name.casefold().split()), name)) != name:
            return f"{other!r} and {name!r} are two classes; if they are one, give them the same name"
    return ""


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
