"""The table of videos: what is known of each before it is decoded.

A manifest is a CSV file that a person can read and edit. Comment lines before the column names say where the videos
are, the names of the classes, and how many listed videos were rejected:

    # root: videos
    # classes: ["archery", "bowling"]
    # listed 3, kept 2, rejected 1
    path,label,frames,fps,width,height,codec,rotation
    a.mp4,0,280,28.0,340,256,h264,0
    b.webm,1,120,29.97002997002997,256,340,vp9,90
"""

import csv
import io
import json
import math
import os
import re
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np

from dali_pipelines.errors import InputError
from dali_pipelines.packets import PacketReader, UncertainError, video_stream

ROTATIONS = (0, 90, 180, 270)
_LARGEST = 2**31 - 1

_PACKET_IS_PICTURE = frozenset({"av1", "h264", "mjpeg"})
"""Codecs whose pictures are counted by their packets, where `PacketReader` is certain of them; those of others, and of
files that it is not certain of, by decoding."""


class Video(NamedTuple):
    """One row. Width and height are as shown, in pixels, with rotation metadata applied."""

    path: str
    """Relative to the manifest's root, or absolute."""
    label: int
    frames: int
    """Pictures that a decoder puts out, not what the header claims."""
    fps: float
    width: int
    height: int
    codec: str
    """FFmpeg's name: h264, hevc, mpeg4, vp9, ..."""
    rotation: int
    """Degrees anticlockwise by which the coded picture is turned to be shown: 0, 90, 180 or 270."""


def coded_size(video: Video) -> tuple[int, int]:
    """(height, width) of the pictures as coded, before they are turned to be shown."""
    return (video.height, video.width) if video.rotation in (0, 180) else (video.width, video.height)


def size_mismatch(found: tuple[int, int], expected: tuple[int, int]) -> str:
    """What is wrong with pictures of (height, width) `found` where the manifest has `expected`; "" for nothing."""
    if found == expected:
        return ""
    (height, width), (planned_height, planned_width) = found, expected
    return (
        f"the pictures are {width}x{height}, the manifest says {planned_width}x{planned_height}; index the file again"
    )


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
    ]
)


class Manifest:
    """Videos in the order of the file: `len(manifest)`, `manifest[i]` is a `Video`, `.labels` int64 [N].

    `root` is the folder that paths are relative to; `classes` the names of the classes, () where unknown; `listed` and
    `rejected` count the videos that the manifest was made from and those left out as unreadable.
    """

    def __init__(
        self,
        videos: Iterable[Video],
        *,
        root: str | os.PathLike = ".",
        classes: Sequence[str] = (),
        rejected: int = 0,
    ):
        columns = list(zip(*videos, strict=True)) or [()] * len(Video._fields)
        self._fill([os.fsencode(path) for path in columns[0]], columns[1:])
        self.root = Path(root)
        self.classes = tuple(classes)
        self.rejected = rejected

    def _fill(self, paths: list[bytes], columns: Sequence[Sequence]) -> None:
        self._rows = np.zeros(len(paths), _ROW)
        self._rows["path_end"] = np.cumsum([len(path) for path in paths])
        self._paths = np.frombuffer(b"".join(paths), np.uint8)
        for name, column in zip(Video._fields[1:], columns, strict=True):
            self._rows[name] = np.asarray(column, dtype="S16") if name == "codec" else np.asarray(column)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Video:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of a manifest of {len(self)}")
        start = int(self._rows["path_end"][index - 1]) if index else 0
        end, label, frames, fps, width, height, codec, rotation = self._rows[index].item()
        path = os.fsdecode(self._paths[start:end].tobytes())
        return Video(path, label, frames, fps, width, height, codec.decode(), rotation)

    @property
    def labels(self) -> np.ndarray:
        return self._rows["label"]

    @property
    def codecs(self) -> list[str]:
        """Those that occur, sorted."""
        return [codec.decode() for codec in np.unique(self._rows["codec"]).tolist()]

    @property
    def areas(self) -> np.ndarray:
        """Pixels of a picture of each video, int64 [N]."""
        return self._rows["width"].astype(np.int64) * self._rows["height"]

    @property
    def listed(self) -> int:
        return len(self) + self.rejected

    def file(self, index: int) -> str:
        """The path of row `index` that can be opened from here."""
        return os.path.join(self.root, self[index].path)

    @classmethod
    def read(cls, path: str | os.PathLike) -> "Manifest":
        """Reads a manifest file; `InputError` names the file and the line where it is wrong."""
        path = Path(path)
        try:
            text = path.read_bytes().decode("utf-8", "surrogateescape").removeprefix("\ufeff")
        except FileNotFoundError:
            raise InputError(f"{path}: no such manifest; `python prepare.py index` or `folder` makes one") from None
        body = re.sub(r"\A(?:#[^\n]*\n|\s*\n)*", "", text)
        header = dict(re.findall(r"^# (root|classes): (.*?)\r?$", text[: len(text) - len(body)], re.MULTILINE))
        rejected = re.search(r"^# listed \d+, kept \d+, rejected (\d+)", text[: len(text) - len(body)], re.MULTILINE)
        first_line = text[: len(text) - len(body)].count("\n") + 1
        manifest = cls(
            (),
            root=path.parent / header.get("root", "."),
            classes=_read_classes(path, header.get("classes", "[]")),
            rejected=int(rejected[1]) if rejected else 0,
        )
        manifest._fill(*_read_columns(path, body, first_line))
        return manifest

    def write(self, path: str | os.PathLike) -> None:
        """Writes the file beside its place and renames it, so that a kill leaves the old one or the new one."""
        path = Path(path)
        root = self.root.resolve()
        home = path.parent.resolve()
        out = io.StringIO()
        out.write(f"# root: {root.relative_to(home).as_posix() if root.is_relative_to(home) else root}\n")
        out.write(f"# classes: {json.dumps(self.classes, ensure_ascii=False)}\n")
        out.write(f"# listed {self.listed}, kept {len(self)}, rejected {self.rejected}\n")
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(Video._fields)
        writer.writerows(self[index] for index in range(len(self)))
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(path.name + ".part")
        unfinished.write_bytes(out.getvalue().encode("utf-8", "surrogateescape"))
        unfinished.replace(path)

    def save_arrays(self, folder: str | os.PathLike) -> None:
        """Writes the table as arrays that `map_arrays` opens without copying: many workers share one in memory."""
        np.save(os.path.join(folder, "rows.npy"), self._rows)
        np.save(os.path.join(folder, "paths.npy"), self._paths)

    @classmethod
    def map_arrays(cls, folder: str | os.PathLike, root: str | os.PathLike) -> "Manifest":
        manifest = cls((), root=root)
        manifest._rows = np.load(os.path.join(folder, "rows.npy"), mmap_mode="r")
        manifest._paths = np.load(os.path.join(folder, "paths.npy"), mmap_mode="r")
        return manifest


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
    missing = [name for name in Video._fields if name not in names]
    if missing:
        raise InputError(
            f"{path}:{first_line}: not a manifest: no column {', '.join(missing)}; "
            "to make one from a list of `path label` lines: python prepare.py index --list LIST --root DIR --out FILE"
        )
    try:
        rows = [row for row in reader if row]
    except csv.Error as error:
        raise InputError(f"{path}:{first_line + reader.line_num}: {error}; a quote that is not closed?") from None
    try:
        table = dict(zip(names, zip(*rows, strict=True), strict=True)) if rows else dict.fromkeys(names, ())
        columns = [_column(table[name], name) for name in Video._fields[1:]]
    except (ValueError, OverflowError):
        raise _first_bad_line(path, body, first_line) from None
    good = dict(zip(Video._fields[1:], columns, strict=True))
    bad = (good["label"] < 0) | (good["frames"] < 1) | ~((good["fps"] > 0) & np.isfinite(good["fps"]))
    for side in (good["width"], good["height"]):
        bad |= (side < 1) | (side > _LARGEST)
    if (bad | (good["frames"] > _LARGEST) | (good["label"] > _LARGEST) | ~np.isin(good["rotation"], ROTATIONS)).any():
        raise _first_bad_line(path, body, first_line)
    return [name.encode("utf-8", "surrogateescape") for name in table["path"]], columns


def _column(values: Sequence[str], name: str) -> np.ndarray:
    if name == "codec":
        return np.array([value.strip() for value in values], dtype="S16")
    return np.array(values, dtype="U").astype(np.float64 if name == "fps" else np.int64)


def _first_bad_line(path: Path, body: str, first_line: int) -> InputError:
    """Reads once more, slowly, for the message."""
    reader = csv.reader(io.StringIO(body, newline=""))
    names = next(reader)
    expected = {
        "label": (int, lambda value: 0 <= value <= _LARGEST, "a class number, 0 or more"),
        "frames": (int, lambda value: 1 <= value <= _LARGEST, "a count, 1 or more"),
        "fps": (float, lambda value: 0 < value < math.inf, "frames per second, more than 0"),
        "width": (int, lambda value: 1 <= value <= _LARGEST, "pixels, 1 or more"),
        "height": (int, lambda value: 1 <= value <= _LARGEST, "pixels, 1 or more"),
        "codec": (str, str.isascii, "FFmpeg's name of a codec"),
        "rotation": (int, lambda value: value in ROTATIONS, "0, 90, 180 or 270"),
    }
    for row in reader:
        where = f"{path}:{first_line + reader.line_num - 1}"
        if row and len(row) != len(names):
            return InputError(f"{where}: {len(row)} columns where the header names {len(names)}")
        for name, (kind, is_good, meaning) in expected.items() if row else ():
            value = row[names.index(name)]
            try:
                if is_good(kind(value)):
                    continue
            except ValueError:
                pass
            return InputError(f"{where}: {name} is {value!r}; expected {meaning}")
    return InputError(f"{path}: not a manifest")


def probe(path: str | os.PathLike) -> Video:
    """What a decoder puts out for the file at `path`; label is 0.

    Pictures are counted by their packets where that is exact, and by decoding elsewhere (`_PACKET_IS_PICTURE`).

    Raises `InputError` with a reason that a person understands where the file is no video that can be read.
    """
    try:
        with open_video(path) as container:
            stream = video_stream(container)
            codec = stream.codec_context.codec.canonical_name
            fps = stream.average_rate or stream.guessed_rate
            first = next(container.decode(stream), None)
        if first is None:
            raise InputError("no picture comes out of its video stream")
        frames = None
        if codec in _PACKET_IS_PICTURE:
            with open_video(path) as container:
                frames = _count_packets(container)
        if frames is None:
            with open_video(path) as container:
                frames = _count_pictures(container, until_damage=codec in _PACKET_IS_PICTURE)
    except av.error.FFmpegError as error:
        raise InputError(f"not a video that FFmpeg can read ({error.strerror.lower()})") from None
    if not fps:
        raise InputError("no frame rate in it")
    rotation = first.rotation % 360
    if rotation not in ROTATIONS:
        raise InputError(f"turned by {rotation} degrees; only quarter turns are known")
    width, height = (first.width, first.height) if rotation in (0, 180) else (first.height, first.width)
    return Video(os.fspath(path), 0, frames, float(fps), width, height, codec, rotation)


def _count_packets(container: av.container.InputContainer) -> int | None:
    try:
        return PacketReader(container).count()
    except UncertainError:
        return None


def _count_pictures(container: av.container.InputContainer, *, until_damage: bool) -> int:
    count = 0
    try:
        for _ in container.decode(video_stream(container)):
            count += 1
    except av.error.FFmpegError:
        if not (until_damage and count):  # a file that is cut off is good up to there
            raise
    return count


def open_video(path: str | os.PathLike) -> av.container.InputContainer:
    """Opens a file that has a video stream of a known codec; `InputError` says why another cannot be."""
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):  # a pipe would block for ever
            raise InputError("a folder" if stat.S_ISDIR(mode) else "not a regular file")
        container = av.open(ffmpeg_url(path), metadata_errors="replace")  # titles need not be UTF-8
    except PermissionError:
        raise InputError("no permission to read it") from None
    except av.error.FFmpegError as error:
        raise InputError(f"not a video that FFmpeg can read ({error.strerror.lower()})") from None
    except OSError as error:
        raise InputError(error.strerror.lower()) from None
    reason = ""
    stream = video_stream(container)
    if stream is None:
        reason = "no video stream in it"
    elif stream.codec_context is None:
        reason = "FFmpeg does not know the codec of its video stream"
    if reason:
        container.close()
        raise InputError(reason)
    return container


def ffmpeg_url(path: str | os.PathLike) -> str:
    """The path in a form that FFmpeg takes for a file and nothing else: "a:b.mp4" alone would be a protocol."""
    return f"file:{os.fspath(path)}"
