"""The manifest: a table of videos with what is known about each before decoding it.

A manifest is a CSV file, easy to read and edit. Comment lines before the column names give the folder of the videos,
the class names, and the number of listed videos that were rejected:

    # root: videos
    # classes: ["archery", "bowling"]
    # listed 3, kept 2, rejected 1
    # made by: prepare.py folder videos
    path,label,frames,fps,width,height,codec,rotation,pixel_format,vfr,gop,mirrored
    a.mp4,0,280,28.0,340,256,h264,0,yuv420p,0,250,0
    b.webm,1,120,29.97002997002997,256,340,vp9,90,yuv420p,1,32,0

The columns after `rotation` are optional. Videos within larger files have the further columns `shard,offset,size`.
"""

import contextlib
import csv
import hashlib
import io
import json
import math
import operator
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dali_pipelines.errors import InputError, naming
from dali_pipelines.files import Source, is_url, join, unfinished
from dali_pipelines.packet_index import (
    PacketIndex,
    StaleIndexError,
    hash_of,
    index_path,
    write_index,
)
from dali_pipelines.text import cell_text, csv_writer, decode

ROTATIONS = (0, 90, 180, 270)
_LARGEST = 2**31 - 1


class Video(NamedTuple):
    """One row. Width and height are as shown, in pixels, with rotation metadata applied."""

    path: str
    """Relative to the manifest's root, or absolute. If the frames are images in files of their own, it names them all:
    `archery/v1/img_{00001..00300}.jpg` (`frame_names`)."""
    label: int
    frames: int
    """Number of frames that a decoder outputs, not what the header claims."""
    fps: float
    """Frames per second, measured from the timestamps of most of the video (`probe.frame_rate`)."""
    width: int
    height: int
    codec: str
    """FFmpeg's name: h264, hevc, mpeg4, vp9, ...; "jpeg frames" or "png frames" if the frames are images."""
    rotation: int
    """Degrees by which the coded frame is rotated anticlockwise for display, after mirroring: 0, 90, 180 or 270."""
    pixel_format: str = ""
    """FFmpeg's name: yuv420p, yuvj420p, yuv420p10le, ...; "" if unknown."""
    vfr: int = 0
    """1 if the frame rate is variable."""
    gop: int = 0
    """Frames of the longest group of pictures; the whole video if its headers do not say; 0 if unknown."""
    shard: str = ""
    """The larger file (tar, Parquet, Arrow) that holds the video, relative to the root as `path` is; "" for none."""
    offset: int = 0
    """Start of the video in the shard, in bytes."""
    size: int = 0
    """Size of the video in the shard, in bytes."""
    mirrored: int = 0
    """1 if the coded frame is mirrored left to right before it is rotated. This field is last because journals of
    earlier versions hold the others in this order."""


def place_for_people(video: Video, root: str | os.PathLike[str]) -> str:
    """The path to show for a row of a manifest with this root: relative to here, or the shard and the name in it."""
    return f"{join(root, video.shard)}: {video.path}" if video.shard else join(root, video.path)


def source_of(video: Video, root: str | os.PathLike[str]) -> Source:
    """The bytes of a row of a manifest with this root."""
    if video.shard:
        return Source(join(root, video.shard), video.offset, video.size)
    return Source(join(root, video.path))


def key_of(video: Video) -> int:
    """The key of a row in the packet index: a hash of the video's location."""
    return hash_of(video.path, video.shard, video.offset)


def coded_size(video: Video) -> tuple[int, int]:
    """(height, width) of the frames as coded, before rotation."""
    return (video.height, video.width) if video.rotation in (0, 180) else (video.width, video.height)


_ROW = np.dtype(
    [
        ("path_end", np.int64),
        ("label", np.int64),
        ("frames", np.int64),
        ("fps", np.float64),
        ("width", np.int32),
        ("height", np.int32),
        ("codec", "S16"),
        ("rotation", np.int16),
        ("pixel_format", "S16"),
        ("vfr", np.int8),
        ("gop", np.int32),
        ("shard", np.int32),
        ("offset", np.int64),
        ("size", np.int64),
        ("mirrored", np.int8),
    ]
)
_OPTIONAL = Video._fields[len(Video._fields) - len(Video._field_defaults) :]
_IN_SHARDS = ("shard", "offset", "size")
_CODEC, _PIXEL_FORMAT, _SHARD = (Video._fields.index(name) - 1 for name in ("codec", "pixel_format", "shard"))


class Manifest:
    """Videos in the order of the file: `len(manifest)`, `manifest[i]` is a `Video`, `.labels` int64 [N].

    `root` is the folder or URL that paths are relative to; `classes` are the class names, () if unknown; `listed` and
    `rejected` count the videos that the manifest was made from and those left out as unreadable; `made_by` is the
    command that made it. `index` is its packet index file, or None; `entries` are the entries of which `write` makes
    one, by `key_of` their rows.
    """

    def __init__(
        self,
        videos: Iterable[Video],
        *,
        root: str | os.PathLike[str] = ".",
        classes: Sequence[str] = (),
        rejected: int = 0,
        made_by: str = "",
    ):
        columns = list(zip(*videos, strict=True)) or [()] * len(Video._fields)
        self._fill([os.fsencode(path) for path in columns[0]], columns[1:])
        self.root: str | Path = root if is_url(root) else Path(root)  # a Path would merge the two slashes of a URL
        self.classes = tuple(classes)
        self.rejected = rejected
        self.made_by = made_by
        self.index: Path | None = None
        self.entries: dict[int, bytes] = {}

    def _fill(self, paths: list[bytes], columns: Sequence[Sequence[Any] | np.ndarray]) -> None:
        self._rows = np.zeros(len(paths), _ROW)
        self._rows["path_end"] = np.cumsum([len(path) for path in paths])
        self._paths = np.frombuffer(b"".join(paths), np.uint8)
        self._shards = [""]
        for name, column in zip(Video._fields[1:], columns, strict=True):
            if name == "shard":
                self._shards = list(dict.fromkeys(["", *column]))
                numbers = {shard: number for number, shard in enumerate(self._shards)}
                column = np.array([numbers[shard] for shard in column], np.int32)
            self._rows[name] = np.asarray(column, dtype=_ROW[name])

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Video:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of a manifest of {len(self)}")
        start = int(self._rows["path_end"][index - 1]) if index else 0
        end, *values = self._rows[index].item()
        path = os.fsdecode(self._paths[start:end].tobytes())
        values[_CODEC], values[_PIXEL_FORMAT] = values[_CODEC].decode(), values[_PIXEL_FORMAT].decode()
        values[_SHARD] = self._shards[values[_SHARD]]
        return Video(path, *values)

    def __iter__(self) -> Iterator[Video]:
        return map(self.__getitem__, range(len(self)))

    @property
    def labels(self) -> np.ndarray:
        """The label of each video, int64 [N]."""
        return self._rows["label"]

    def column(self, name: str) -> np.ndarray:
        """A field of `Video` for all rows, except path and shard; text as str."""
        values = self._rows[name]
        return values.astype(str) if values.dtype.kind == "S" else values

    @property
    def codecs(self) -> list[str]:
        """The codecs that occur, sorted."""
        return [codec.decode() for codec in np.unique(self._rows["codec"]).tolist()]

    @property
    def shards(self) -> list[str]:
        """The shards that occur, relative to the root; none if the videos are files of their own."""
        return self._shards[1:]

    @property
    def areas(self) -> np.ndarray:
        """Pixels of a frame of each video, int64 [N]."""
        areas: np.ndarray = self._rows["width"].astype(np.int64) * self._rows["height"]
        return areas

    @property
    def listed(self) -> int:
        """Number of videos listed when indexing, rejected ones included."""
        return len(self) + self.rejected

    @property
    def hint(self) -> str:
        """How to make the manifest faster to read; "" if it has a packet index."""
        if self.index is not None:
            return ""
        how = self.made_by or "prepare.py index, folder, transcode or pack"
        return f"no packet index beside it, so each clip reads through its file; to get one, run again: {how}"

    def file(self, index: int) -> str:
        """The path to show for row `index`: relative to here, or its shard and its name."""
        return place_for_people(self[index], self.root)

    def source(self, index: int) -> Source:
        """The bytes of row `index`."""
        return source_of(self[index], self.root)

    def place(self, name: str) -> str:
        """The path or URL of a name relative to the root."""
        return join(self.root, name)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> "Manifest":
        """Reads a manifest file. Raises `InputError`, which names the file and the bad line."""
        path = Path(path)
        try:
            text = decode(path.read_bytes())
        except FileNotFoundError:
            raise InputError(f"{path}: no such manifest; `python prepare.py index` or `folder` makes one") from None
        except IsADirectoryError:
            raise InputError(_folder_message(path)) from None
        body = re.sub(r"\A(?:#[^\n]*\n|\s*\n)*", "", text)
        header = dict(re.findall(r"^# (root|classes|made by): (.*?)\r?$", text[: len(text) - len(body)], re.MULTILINE))
        rejected = re.search(r"^# listed \d+, kept \d+, rejected (\d+)", text[: len(text) - len(body)], re.MULTILINE)
        first_line = text[: len(text) - len(body)].count("\n") + 1
        root = _read_root(header.get("root", "."))
        manifest = cls(
            (),
            root=root if is_url(root) else path.parent / root,
            classes=_read_classes(path, header.get("classes", "[]")),
            rejected=int(rejected[1]) if rejected else 0,
            made_by=header.get("made by", ""),
        )
        manifest._fill(*_read_columns(path, body, first_line))
        index = index_path(path)
        manifest.index = index if index.is_file() else None
        return manifest

    def write(self, path: str | os.PathLike[str]) -> None:
        """Writes the file under another name and renames it, so that a kill leaves the old one or the new one. First
        writes a packet index with its `entries`, and those that its videos have in `index`."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        entries = self._known_entries() | self.entries
        if entries:
            write_index(index_path(path), entries)
            self.index = index_path(path)
        else:
            index_path(path).unlink(missing_ok=True)
        root = str(self.root)
        if isinstance(self.root, Path):
            folder, home = self.root.resolve(), path.parent.resolve()
            root = folder.relative_to(home).as_posix() if folder.is_relative_to(home) else str(folder)
        out = io.StringIO()
        is_plain = root.isprintable() and not root.startswith('"') and root == root.strip()
        out.write(f"# root: {root if is_plain else json.dumps(root, ensure_ascii=False)}\n")
        out.write(f"# classes: {json.dumps(self.classes, ensure_ascii=False)}\n")
        out.write(f"# listed {self.listed}, kept {len(self)}, rejected {self.rejected}\n")
        if self.made_by:
            out.write(f"# made by: {' '.join(self.made_by.split())}\n")
        columns = [name for name in Video._fields if len(self._shards) > 1 or name not in _IN_SHARDS]
        written = operator.itemgetter(*map(Video._fields.index, columns))
        writer = csv_writer(out)
        writer.writerow(columns)
        writer.writerows(written(self[index]) for index in range(len(self)))
        part = unfinished(path)
        try:
            with naming(path):
                part.write_bytes(out.getvalue().encode("utf-8", "surrogateescape"))
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)

    def _known_entries(self) -> dict[int, bytes]:
        """The entries of the videos in `index`, by `key_of` their rows."""
        found: dict[int, bytes] = {}
        if self.index is None:
            return found
        with contextlib.suppress(StaleIndexError):
            index = PacketIndex(self.index)
            for key in map(key_of, self) if len(index) else ():
                with contextlib.suppress(StaleIndexError):
                    found[key] = index.entry(key)
        return found

    def checksum(self, *, measured: bool = False) -> str:
        """A SHA-256 of the labels, paths, frames, sizes and codecs of the videos, in their order.

        It leaves out the root, any folder that all paths begin with, and the shards, so the videos may move. With
        `measured`, it also covers the rest of what indexing measures: frame rate, orientation, pixel format, groups of
        pictures.
        """
        ends = self._rows["path_end"].tolist()
        whole = self._paths.tobytes()
        paths = [whole[start:end] for start, end in zip([0, *ends[:-1]], ends)]
        ends_of_range = [os.fsdecode(min(paths)), os.fsdecode(max(paths))] if paths else []
        prefix = os.path.commonprefix(ends_of_range)  # noqa: RUF071 (cut to folders below)
        folder = os.fsencode(prefix.rpartition("/")[0])
        hashed = hashlib.sha256(b"\0".join(path[len(folder) :].lstrip(b"/") for path in paths))
        more = ("fps", "rotation", "mirrored", "pixel_format", "vfr", "gop") if measured else ()
        for name in ("label", "frames", "width", "height", "codec", *more):
            hashed.update(np.ascontiguousarray(self._rows[name]).tobytes())
        return hashed.hexdigest()

    def summary(self) -> str:
        """A line with the number of videos and a checksum of all that is known about them."""
        return f"{len(self)} videos, checksum {self.checksum(measured=True)[:12]}"

    def save_arrays(self, folder: str | os.PathLike[str]) -> None:
        """Writes the table as arrays that `map_arrays` opens without copying: all workers share one copy in memory."""
        np.save(os.path.join(folder, "rows.npy"), self._rows)
        np.save(os.path.join(folder, "paths.npy"), self._paths)
        Path(folder, "shards.json").write_text(json.dumps(self._shards))

    @classmethod
    def map_arrays(cls, folder: str | os.PathLike[str], root: str | os.PathLike[str]) -> "Manifest":
        """Maps the arrays that another process saved in `folder`; they are shared, not copied."""
        manifest = cls((), root=root)
        manifest._rows = np.load(os.path.join(folder, "rows.npy"), mmap_mode="r")
        manifest._paths = np.load(os.path.join(folder, "paths.npy"), mmap_mode="r")
        manifest._shards = json.loads(Path(folder, "shards.json").read_text())
        return manifest


def _read_root(text: str) -> str:
    """The root; a path with line ends or other odd characters is written as a JSON string."""
    if text.startswith('"'):
        with contextlib.suppress(ValueError):
            return str(json.loads(text))
    return text


def _read_classes(path: Path, text: str) -> list[str]:
    try:
        classes = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: the line `# classes:` must be a JSON list of names ({error})") from None
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise InputError(f"{path}: the line `# classes:` must be a JSON list of names, not {text[:60]}")
    return classes


def _read_columns(path: Path, body: str, first_line: int) -> tuple[list[bytes], list[np.ndarray]]:
    reader = csv.reader(io.StringIO(body, newline=""))
    names = next(reader, [])
    missing = [name for name in Video._fields if name not in (*names, *_OPTIONAL)]
    if missing:
        raise InputError(_header_message(path, first_line, body.partition("\n")[0].strip(), missing))
    try:
        rows = [row for row in reader if row]
    except csv.Error as error:
        raise InputError(f"{path}:{first_line + reader.line_num}: {error}; a quote that is not closed?") from None
    try:
        table = dict(zip(names, zip(*rows, strict=True), strict=True)) if rows else dict.fromkeys(names, ())
        good = {
            name: _column(table[name], name) if name in names else np.full(len(rows), Video._field_defaults[name])
            for name in Video._fields[1:]
        }
    except (ValueError, OverflowError):
        raise _first_bad_line(path, body, first_line) from None
    bad = ~((good["fps"] > 0) & np.isfinite(good["fps"])) | ~np.isin(good["rotation"], ROTATIONS)
    for name, (least, most) in _RANGES.items():
        bad |= (good[name] < least) | (good[name] > most)
    if bad.any():
        raise _first_bad_line(path, body, first_line)
    return [cell_text(name).encode("utf-8", "surrogateescape") for name in table["path"]], list(good.values())


def _folder_message(path: Path) -> str:
    """Says what to do about a folder that was given as a manifest."""
    if existing := sorted(each.name for each in path.glob("*.csv")):
        return f"{path}: a folder; expected a manifest, such as {path / existing[0]}"
    return (
        f"{path}: a folder; expected a manifest. If it holds a folder of videos for each class, "
        f"`python prepare.py folder {path}` makes {path / 'train.csv'} and {path / 'val.csv'}"
    )


def _header_message(path: Path, line: int, first: str, missing: Sequence[str]) -> str:
    """Says what a file is whose first line does not name the columns of a manifest, and what to do."""
    cells = first.split(";")
    if {"path", "label", "frames"} <= set(cells):
        return f"{path}:{line}: columns separated by semicolons; expected commas: save the file as comma-separated CSV"
    command = "python prepare.py index --list {} --root DIR --out {}"
    if len(cells) == 2 or first.count(",") == 1 or re.fullmatch(r"[^,;]*\S[ \t]+\d+[ \t]*", first):
        return (
            f"{path}:{line}: a list of videos and labels, not a manifest. Make one of it, and name that instead: "
            + command.format(path, path.with_suffix(".manifest.csv"))
        )
    return (
        f"{path}:{line}: not a manifest: no column {', '.join(missing)}; to make one from a list of `path label` or "
        f"`path,label` lines: {command.format('LIST', 'FILE')}"
    )


_RANGES = {
    "label": (0, _LARGEST),
    "frames": (1, _LARGEST),
    "width": (1, _LARGEST),
    "height": (1, _LARGEST),
    "vfr": (0, 1),
    "gop": (0, _LARGEST),
    "mirrored": (0, 1),
    "offset": (0, 2**63 - 1),
    "size": (0, 2**63 - 1),
}


def _column(values: Sequence[str], name: str) -> np.ndarray:
    if name == "shard":
        return np.array(list(map(cell_text, values)), object)
    if name in ("codec", "pixel_format"):
        return np.array([value.strip() for value in values], dtype="S16")
    if name == "fps":
        return np.fromiter(map(float, values), np.float64, len(values))
    return np.fromiter(map(int, values), np.int64, len(values))


def _first_bad_line(path: Path, body: str, first_line: int) -> InputError:
    """Reads the file again, slowly, to find the line for the message."""
    reader = csv.reader(io.StringIO(body, newline=""))
    names = next(reader)
    expected = {
        "label": "a class number, 0 or more",
        "frames": "a count, 1 or more",
        "fps": "frames per second, more than 0",
        "width": "pixels, 1 or more",
        "height": "pixels, 1 or more",
        "codec": "FFmpeg's name of a codec",
        "rotation": "0, 90, 180 or 270",
        "pixel_format": "FFmpeg's name of a pixel format",
        "vfr": "0 or 1",
        "gop": "a count, 0 or more",
        "mirrored": "0 or 1",
        "offset": "bytes, 0 or more",
        "size": "bytes, 0 or more",
    }

    def is_good(name: str, value: str) -> bool:
        if name in ("codec", "pixel_format"):
            return value.isascii()
        if name == "fps":
            return 0 < float(value) < math.inf
        if name == "rotation":
            return int(value) in ROTATIONS
        least, most = _RANGES[name]
        return least <= int(value) <= most

    for row in reader:
        where = f"{path}:{first_line + reader.line_num - 1}"
        if row and len(row) != len(names):
            return InputError(f"{where}: {len(row)} columns where the header names {len(names)}")
        for name in [name for name in expected if name in names] if row else ():
            value = row[names.index(name)]
            with contextlib.suppress(ValueError):
                if is_good(name, value):
                    continue
            return InputError(f"{where}: {name} is {value!r}; expected {expected[name]}")
    return InputError(f"{path}: not a manifest")
