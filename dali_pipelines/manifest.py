"""The table of videos: what is known of each before it is decoded.

A manifest is a CSV file that a person can read and edit. Comment lines before the column names say where the videos
are, the names of the classes, and how many listed videos were rejected:

    # root: videos
    # classes: ["archery", "bowling"]
    # listed 3, kept 2, rejected 1
    # made by: prepare.py folder videos
    path,label,frames,fps,width,height,codec,rotation,pixel_format,vfr,gop,mirrored
    a.mp4,0,280,28.0,340,256,h264,0,yuv420p,0,250,0
    b.webm,1,120,29.97002997002997,256,340,vp9,90,yuv420p,1,32,0

The columns after `rotation` may be missing; those of videos in tar shards are `shard,offset,size`.
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
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np

from dali_pipelines.errors import InputError
from dali_pipelines.files import Source, as_source, fetch, is_url, join, open_video, unfinished
from dali_pipelines.host_decoder import MAX_PIXELS, decode_packets, prepare
from dali_pipelines.packet_index import (
    PacketIndex,
    Recorder,
    StaleIndexError,
    Stream,
    hash_of,
    index_path,
    no_entry,
    write_index,
)
from dali_pipelines.packets import PacketReader, UncertainError, demux, video_stream
from dali_pipelines.text import cell_text, csv_writer, decode

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
    """That of most of the video by the times of its frames (`frame_rate`)."""
    width: int
    height: int
    codec: str
    """FFmpeg's name: h264, hevc, mpeg4, vp9, ..."""
    rotation: int
    """Degrees anticlockwise by which the coded frame, mirrored if it is, is turned to be shown: 0, 90, 180 or 270."""
    pixel_format: str = ""
    """FFmpeg's name: yuv420p, yuvj420p, yuv420p10le, ...; "" where unknown."""
    vfr: int = 0
    """1 where not every picture is shown for as long as the others."""
    gop: int = 0
    """Pictures of the longest group of pictures; all of the video where its headers do not tell; 0 where unknown."""
    shard: str = ""
    """The tar file that holds the video, as `path` relative to the root; "" where the video is a file of its own."""
    offset: int = 0
    """Where in the shard the video starts, in bytes."""
    size: int = 0
    """Bytes of the video in the shard."""
    mirrored: int = 0
    """1 if the coded frame is mirrored, left to right, before it is turned. Last: journals of earlier versions hold the
    others in this order."""


def place_for_people(video: Video, root: str | os.PathLike) -> str:
    """The path from here, or the shard and the name in it, of a row of a manifest with this root."""
    return f"{join(root, video.shard)}: {video.path}" if video.shard else join(root, video.path)


def source_of(video: Video, root: str | os.PathLike) -> Source:
    """What is opened for a row of a manifest with this root."""
    if video.shard:
        return Source(join(root, video.shard), video.offset, video.size)
    return Source(join(root, video.path))


def key_of(video: Video) -> int:
    """Of a row in the packet index: of where it says that the video is."""
    return hash_of(video.path, video.shard, video.offset)


def coded_size(video: Video) -> tuple[int, int]:
    """(height, width) of the pictures as coded, before they are turned to be shown."""
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


class Manifest:
    """Videos in the order of the file: `len(manifest)`, `manifest[i]` is a `Video`, `.labels` int64 [N].

    `root` is the folder, or the URL, that paths are relative to; `classes` the names of the classes, () where unknown;
    `listed` and `rejected` count the videos that the manifest was made from and those left out as unreadable; `made_by`
    is the command that made it. `index` is the file of its packet index, None where there is none; `entries` are those
    that `write` makes one of, by `key_of` their rows.
    """

    def __init__(
        self,
        videos: Iterable[Video],
        *,
        root: str | os.PathLike = ".",
        classes: Sequence[str] = (),
        rejected: int = 0,
        made_by: str = "",
    ):
        columns = list(zip(*videos, strict=True)) or [()] * len(Video._fields)
        self._fill([os.fsencode(path) for path in columns[0]], columns[1:])
        self.root = root if is_url(root) else Path(root)  # a Path would make one slash of two
        self.classes = tuple(classes)
        self.rejected = rejected
        self.made_by = made_by
        self.index: Path | None = None
        self.entries: dict[int, bytes] = {}

    def _fill(self, paths: list[bytes], columns: Sequence[Sequence]) -> None:
        self._rows = np.zeros(len(paths), _ROW)
        self._rows["path_end"] = np.cumsum([len(path) for path in paths])
        self._paths = np.frombuffer(b"".join(paths), np.uint8)
        self._shards = [""]
        for name, column in zip(Video._fields[1:], columns, strict=True):
            if name == "shard":
                self._shards = list(dict.fromkeys(["", *column]))
                numbers = {shard: number for number, shard in enumerate(self._shards)}
                column = [numbers[shard] for shard in column]
            self._rows[name] = np.asarray(column, dtype=_ROW[name])

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Video:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of a manifest of {len(self)}")
        start = int(self._rows["path_end"][index - 1]) if index else 0
        end, *values = self._rows[index].item()
        path = os.fsdecode(self._paths[start:end].tobytes())
        video = Video(path, *values)
        return video._replace(
            codec=video.codec.decode(), pixel_format=video.pixel_format.decode(), shard=self._shards[video.shard]
        )

    def __iter__(self) -> Iterator[Video]:
        return map(self.__getitem__, range(len(self)))

    @property
    def labels(self) -> np.ndarray:
        return self._rows["label"]

    def column(self, name: str) -> np.ndarray:
        """A field of `Video` for all rows, but path and shard; texts as str."""
        values = self._rows[name]
        return values.astype(str) if values.dtype.kind == "S" else values

    @property
    def codecs(self) -> list[str]:
        """Those that occur, sorted."""
        return [codec.decode() for codec in np.unique(self._rows["codec"]).tolist()]

    @property
    def shards(self) -> list[str]:
        """Those that occur, relative to the root; none where the videos are files of their own."""
        return self._shards[1:]

    @property
    def areas(self) -> np.ndarray:
        """Pixels of a picture of each video, int64 [N]."""
        return self._rows["width"].astype(np.int64) * self._rows["height"]

    @property
    def listed(self) -> int:
        return len(self) + self.rejected

    @property
    def hint(self) -> str:
        """What would make it faster to read; "" for nothing."""
        if self.index is not None:
            return ""
        how = self.made_by or "prepare.py index, folder, transcode or pack"
        return f"no packet index beside it, so each clip reads through its file; to get one, run again: {how}"

    def file(self, index: int) -> str:
        """Where row `index` is, for people: its path from here, or its shard and its name."""
        return place_for_people(self[index], self.root)

    def source(self, index: int) -> Source:
        """What is opened for row `index`."""
        return source_of(self[index], self.root)

    def place(self, name: str) -> str:
        """The path or URL of something that is named relative to the root."""
        return join(self.root, name)

    @classmethod
    def read(cls, path: str | os.PathLike) -> "Manifest":
        """Reads a manifest file; `InputError` names the file and the line where it is wrong."""
        path = Path(path)
        try:
            text = decode(path.read_bytes())
        except FileNotFoundError:
            raise InputError(f"{path}: no such manifest; `python prepare.py index` or `folder` makes one") from None
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

    def write(self, path: str | os.PathLike) -> None:
        """Writes the file beside its place and renames it, so that a kill leaves the old one or the new one; before it,
        a packet index of its `entries`, and of those that its videos have in `index`."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        entries = self._known_entries() | self.entries
        if entries:
            write_index(index_path(path), entries)
            self.index = index_path(path)
        else:
            index_path(path).unlink(missing_ok=True)
        root = self.root
        if not is_url(root):
            root, home = root.resolve(), path.parent.resolve()
            root = root.relative_to(home).as_posix() if root.is_relative_to(home) else root
        out = io.StringIO()
        plain = str(root).isprintable() and not str(root).startswith('"') and str(root) == str(root).strip()
        out.write(f"# root: {root if plain else json.dumps(str(root), ensure_ascii=False)}\n")
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
            part.write_bytes(out.getvalue().encode("utf-8", "surrogateescape"))
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)

    def _known_entries(self) -> dict[int, bytes]:
        found: dict[int, bytes] = {}
        with contextlib.suppress(StaleIndexError):
            index = PacketIndex(self.index) if self.index is not None else ()
            for key in map(key_of, self) if index else ():
                with contextlib.suppress(StaleIndexError):
                    found[key] = index.entry(key)
        return found

    def checksum(self, *, measured: bool = False) -> str:
        """A SHA-256 of which videos these are and how they are labelled: of labels, paths, frames, sizes and codecs, in
        their order.

        Not of the root, nor of a folder that all paths begin with, so the videos may move. Nor of shards that they are
        packed into. Only if `measured`, also of what else indexing measures: frame rate, orientation, pixel format,
        groups of pictures.
        """
        ends = self._rows["path_end"].tolist()
        whole = self._paths.tobytes()
        paths = [whole[start:end] for start, end in zip([0, *ends[:-1]], ends)]
        prefix = os.path.commonprefix([min(paths), max(paths)]) if paths else b""  # noqa: RUF071 (cut to folders below)
        folder = prefix.rpartition(b"/")[0]
        hashed = hashlib.sha256(b"\0".join(path[len(folder) :].lstrip(b"/") for path in paths))
        more = ("fps", "rotation", "mirrored", "pixel_format", "vfr", "gop") if measured else ()
        for name in ("label", "frames", "width", "height", "codec", *more):
            hashed.update(np.ascontiguousarray(self._rows[name]).tobytes())
        return hashed.hexdigest()

    def summary(self) -> str:
        """The number of videos and a checksum of all that is known of them, for people."""
        return f"{len(self)} videos, checksum {self.checksum(measured=True)[:12]}"

    def save_arrays(self, folder: str | os.PathLike) -> None:
        """Writes the table as arrays that `map_arrays` opens without copying: many workers share one in memory."""
        np.save(os.path.join(folder, "rows.npy"), self._rows)
        np.save(os.path.join(folder, "paths.npy"), self._paths)
        Path(folder, "shards.json").write_text(json.dumps(self._shards))

    @classmethod
    def map_arrays(cls, folder: str | os.PathLike, root: str | os.PathLike) -> "Manifest":
        manifest = cls((), root=root)
        manifest._rows = np.load(os.path.join(folder, "rows.npy"), mmap_mode="r")
        manifest._paths = np.load(os.path.join(folder, "paths.npy"), mmap_mode="r")
        manifest._shards = json.loads(Path(folder, "shards.json").read_text())
        return manifest


def _read_root(text: str) -> str:
    """A path with line ends or other odd characters is a JSON string."""
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


def _column(values: Sequence[str], name: str) -> np.ndarray | Sequence[str]:
    if name == "shard":
        return list(map(cell_text, values))
    if name in ("codec", "pixel_format"):
        return np.array([value.strip() for value in values], dtype="S16")
    if name == "fps":
        return np.fromiter(map(float, values), np.float64, len(values))
    return np.fromiter(map(int, values), np.int64, len(values))


def _first_bad_line(path: Path, body: str, first_line: int) -> InputError:
    """Reads once more, slowly, for the message."""
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


def probe(video: str | os.PathLike | Source, max_pixels: int = MAX_PIXELS, cache: str | None = None) -> Video:
    """What a decoder puts out for a file; label is 0.

    Frames are counted by their packets where that is exact, and by decoding elsewhere (`_PACKET_IS_PICTURE`).

    Raises `InputError` with a reason that a person understands if the file is no video that can be read, or its frames
    have more than `max_pixels`. `cache`: see `files.fetch`.
    """
    return probe_packets(fetch(video, cache), max_pixels=max_pixels)[0]


def probe_packets(video: str | os.PathLike | Source, *, max_pixels: int = MAX_PIXELS) -> tuple[Video, bytes]:
    """`probe`, and the entry of the video for the packet index."""
    source = fetch(video)
    try:
        with open_video(source) as container:
            stream = video_stream(container)
            codec = stream.codec_context.codec.canonical_name
            average_rate, guessed_rate, tick = stream.average_rate, stream.guessed_rate, stream.time_base
            structure = _read_structure(container, source, max_pixels)
        first = structure.first
        if first is None:
            with open_video(source) as container:
                prepare(container, max_pixels=max_pixels)
                first = next(decode_packets(demux(container)), None)
        if first is None:
            raise InputError("no frame comes out of its video stream")
        frames = len(structure.shown)
        if not frames or codec not in _PACKET_IS_PICTURE:
            with open_video(source) as container:
                prepare(container, max_pixels=max_pixels)
                frames = _count_frames(container, structure.shown, until_damage=codec in _PACKET_IS_PICTURE)
    except av.error.FFmpegError as error:
        raise InputError(f"not a video that FFmpeg can read ({error.strerror.lower()})") from None
    if not frames:
        raise InputError("all frames of its video stream are damaged")
    gaps = _gaps(structure.times)
    fps = frame_rate(gaps, tick, average_rate) or guessed_rate or average_rate
    if not fps:
        raise InputError("no frame rate in it")
    rotation, mirrored = _orientation(first)
    width, height = (first.width, first.height) if rotation in (0, 180) else (first.height, first.width)
    found = Video(
        path=as_source(video).path,
        label=0,
        frames=frames,
        fps=float(fps),
        width=width,
        height=height,
        codec=codec,
        rotation=rotation,
        pixel_format=first.format.name,
        vfr=_is_variable(gaps),
        gop=int(structure.gop) or frames,
        mirrored=mirrored,
    )
    return found, structure.entry


class _Structure(NamedTuple):
    """What the packets of a file say."""

    shown: list[int]
    """The number of the packet of each frame; [] where the headers do not tell."""
    gop: int
    """Frames of the longest group; 0 where the headers do not tell."""
    times: list[tuple[int | None, int | None]]
    """(pts, dts) of the packets of frames, in the order of the file."""
    first: av.VideoFrame | None
    """The first frame, if it has been decoded."""
    entry: bytes
    """For the packet index."""


def _read_structure(container: av.container.InputContainer, source: Source, max_pixels: int) -> _Structure:
    prepare(container, max_pixels=max_pixels)
    context = video_stream(container).codec_context
    stream, first = Stream.of(context), None
    try:
        with Recorder(source) as recorder:
            reader = PacketReader(container, recorder)
            shown = reader.shown()
            if reader.packets and reader.packets[0] is not None:
                first = next(_decode(reader.packets, context), None)
            if context.codec.intra_only:
                context.flush_buffers()
                shown = _without_broken_end(reader, shown)
            entry = recorder.entry(reader, stream)
    except UncertainError as error:
        with open_video(source) as again:
            packets = demux(again)
            times = [(packet.pts, packet.dts) for packet in packets if packet.size and not packet.is_discard]
        return _Structure([], 0, times, None, no_entry(str(error)))
    before = np.cumsum([0] + [picture.is_shown for picture in reader.pictures])
    starts = [number for number, picture in enumerate(reader.pictures) if picture.starts_group]
    gop = max(np.diff(before[[*starts, len(reader.pictures)]]), default=0)
    times = [time for time, picture in zip(reader.times, reader.pictures, strict=True) if picture.is_shown]
    return _Structure(shown, gop, times, first, entry)


def _decode(packets: Iterable[av.Packet], context: av.VideoCodecContext) -> Iterator[av.VideoFrame]:
    """All frames of the packets."""
    yield from decode_packets(packets)
    yield from context.decode(None)


def _without_broken_end(reader: PacketReader, shown: list[int]) -> list[int]:
    """A file that is cut off, and was closed or padded by some program since, is good up to there: frames at its end
    that cannot be decoded are not counted. Each packet must be a frame of its own."""
    while shown and (packet := reader.packets[shown[-1]]) is not None:
        try:
            packet.decode()
            break
        except av.error.FFmpegError:
            shown = shown[:-1]
    return shown


def _gaps(times: Sequence[tuple[int | None, int | None]]) -> np.ndarray:
    """Ticks from each frame to the next, float64; by pts, or by dts if pts are missing; empty if both are."""
    table = np.array(times, np.float64).reshape(-1, 2)  # None becomes NaN
    # Recordings that were joined: times begin anew.
    parts = np.split(table, np.flatnonzero(np.diff(table[:, 1]) < 0) + 1)
    for column in (0, 1):
        if np.isfinite(table[:, column]).sum() > _MOST_TIMES * len(table):
            return np.concatenate([np.diff(np.sort(part[np.isfinite(part[:, column]), column])) for part in parts])
    return np.empty(0)


_MOST_TIMES = 0.75
"""Times are of use if this share of frames has them."""


def frame_rate(gaps: np.ndarray, tick: Fraction, header_rate: Fraction | None) -> float | None:
    """Frames a second that most of a video has by the times of its frames; None if these say nothing.

    gaps: ticks of `tick` seconds from each frame to the next. `header_rate` is taken as it is if it agrees.

    The mean of the gaps that are near the median: long pauses and dropped frames do not count, and jitter and rounded
    times (33, 33, 34 ms) even out. If few are near it, such as when frames come in pairs, so for stretches of frames.
    """
    if not len(gaps) or not gaps.sum():
        return None
    for stretch in (1, min(_STRETCH, len(gaps))):
        sums = np.sort(np.convolve(gaps, np.ones(stretch), "valid"))
        near = sums[np.abs(sums - sums[len(sums) // 2]) <= sums[len(sums) // 2] / 2]
        gap = float(near.mean()) / stretch
        if len(near) > len(sums) * 2 / 3:
            break
    if not gap:
        return None
    if header_rate and abs(gap - 1 / float(header_rate * tick)) <= gap / 100 + 1 / len(gaps):
        return float(header_rate)
    rate = 1 / (gap * float(tick))
    whole = round(rate)
    if abs(rate - whole / 1.001) < rate / 10_000:
        return whole / 1.001
    return float(whole) if abs(rate - whole) < rate / 200 else rate


_STRETCH = 12
"""Frames: a multiple of 2, 3 and 4, in which they may come."""


def _is_variable(gaps: np.ndarray) -> int:
    """Whether a frame is shown for a time that is more than a tenth, and more than the rounding of a clock, off."""
    return int(len(gaps) > 0 and (np.abs(gaps - np.median(gaps)) > np.maximum(np.median(gaps) / 10, 1)).any())


_MOST_TILT = 10
"""Degrees that a display matrix may be off a quarter turn. Players show such a frame straight."""


def _orientation(frame: av.VideoFrame) -> tuple[int, int]:
    """`Video.rotation` and `Video.mirrored` by the display matrix of a frame. Raises `InputError`."""
    try:
        matrix = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # PyAV does not know some other data beside it, such as Exif
        if frame.rotation:
            raise InputError("turned or mirrored, beside other data that hides how; encode it anew") from None
        return 0, 0
    if matrix is None:
        return 0, 0
    # Column x of a coded frame goes to (x * a, x * b) of the shown one, row y to (y * c, y * d).
    a, b, _, c, d, *_ = map(int, np.frombuffer(matrix, np.int32))
    if a * d == b * c:  # nothing that could be shown: all zeros, by muxers that forgot it
        return 0, 0
    mirrored = a * d < b * c
    if mirrored:
        a, b = -a, -b
    angle = -math.degrees(math.atan2(b, a)) % 360
    rotation = 90 * round(angle / 90)
    if abs(angle - rotation) > _MOST_TILT:
        raise InputError(f"turned by {angle:.0f} degrees; only quarter turns are known")
    return rotation % 360, int(mirrored)


def _count_frames(container: av.container.InputContainer, shown: list[int], *, until_damage: bool) -> int:
    """Frames that come out of a decoder, up to the last one that is whole: a file that is cut off is good up to there.

    Raises `InputError` if they are not those of `shown` (unless empty): then nothing could be decoded but all of the
    video. Raises FFmpeg's errors if other packets follow, unless `until_damage`.
    """
    video_stream(container).codec_context.copy_opaque = True
    packets = _numbered(demux(container))
    count = 0
    try:
        for number, frame in enumerate(decode_packets(packets), start=1):
            if shown and frame.opaque != shown[number - 1 : number]:
                raise InputError(
                    "a decoder puts out other frames than its headers say: packets may be missing; encode it anew"
                )
            if not frame.is_corrupt:
                count = number
    except av.error.FFmpegError:
        is_at_end = not any(packet.size for packet in packets)
        if not (count and (until_damage or is_at_end)):
            raise
    return count


def _numbered(packets: Iterable[av.Packet]) -> Iterator[av.Packet]:
    """With the number of each that has data as its `opaque`, in a list: it is compared with a slice."""
    number = 0
    for packet in packets:
        packet.opaque = [number]
        number += bool(packet.size)
        yield packet
