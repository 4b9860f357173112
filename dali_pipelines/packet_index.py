"""The packet index of a manifest: where the packets of its videos are, and what their headers say.

`prepare.py` reads every packet of a video anyway. The results of `PacketReader` are kept in one file beside the
manifest: `train.packets` beside `train.csv`. A clip then needs no demuxer and no headers: `IndexedVideo` reads only the
bytes of the packets that the wanted frames need, from a disk or a server.

The file is in the safetensors format. Workers map it, so they share one copy in memory:

    keys      uint64 [N], ascending: a hash of the shard, the path and the offset of a video, as in the manifest
    ends      uint64 [N]: where its entry ends in `entries`
    entries   uint8 [bytes]: one after the other, each compressed with zlib, whose checksum detects damage

An entry holds the container's settings for a decoder (`Stream`), and `_COLUMNS` of numbers, one per packet. None is
trusted: the bytes before and after the packets (on a disk) and every packet that is read must have the checksums in the
index. Otherwise `StaleIndexError` sends the caller back to the demuxer.
"""

import functools
import hashlib
import io
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
import safetensors.numpy

from dali_pipelines.bitstream.codecs import CODECS, make_parser
from dali_pipelines.bitstream.parser import Parser, UncertainError
from dali_pipelines.errors import InputError, naming, reason
from dali_pipelines.files import Source, is_url, read_ranges, size_of, unfinished
from dali_pipelines.packets import Flag, PacketReader, Selection, VideoPacket, choose_runs, make_packet

SUFFIX = ".packets"
_FORMATS = "dali-timesformer packets "
_FORMAT = f"{_FORMATS}2"
_HEAD = 1 << 12
"""Bytes at the start of a file that are always checked, packets or not."""
_MOST_CHECKED = 1 << 16
"""Bytes before the first and after the last packet that are checked: an MP4 keeps its edit lists, parameter sets and
sample tables there, which decide what its packets show."""
_BEFORE = 64
"""Bytes that a container may have between FFmpeg's position of a packet and its data: MP4 0, AVI 8, FLV 16, Matroska a
few."""
_MOST_BYTES = 1 << 28
"""Bytes of an unpacked entry: 14 million packets. The limit for the file's header is a hundredth of it."""
_IGNORED_SIDE_DATA = frozenset({"mpegts_stream_id"})
"""Side data of packets that no decoder uses. A video whose packets have other side data is not indexed."""
_COLUMNS = {"gap": np.int64, "size": np.int32, "order": np.int32, "flags": np.uint8, "check": np.uint16}
"""Numbers per packet: bytes between the end of the previous packet and its data; size in bytes; the number of places by
which its frame is shown later than it is decoded; its `Flag`s; the low bits of its CRC-32."""


class StaleIndexError(UncertainError):
    """The index has no packets for a video, or no longer matches it; the message is the reason."""


class Stream(NamedTuple):
    """A container's settings for a decoder, in FFmpeg's terms."""

    decoder: str
    extradata: str
    """Latin-1: one character per byte."""
    codec_tag: str
    width: int
    height: int
    pix_fmt: str | None
    reorder_depth: int
    field_order: int
    bits_per_coded_sample: int
    color_range: int
    colorspace: int
    color_primaries: int
    color_trc: int

    @classmethod
    def of(cls, context: av.VideoCodecContext) -> "Stream":
        """The settings of an open decoder."""
        settings = {name: getattr(context, name) for name in _SETTINGS}
        settings |= {name: int(value) for name, value in settings.items() if not isinstance(value, (str, type(None)))}
        return cls(context.codec.name, bytes(context.extradata or b"").decode("latin-1"), **settings)

    def context(self) -> av.VideoCodecContext:
        """A decoder, not opened yet, with these settings. Raises `StaleIndexError` if FFmpeg has none, or does not
        know the values."""
        try:
            context = av.CodecContext.create(self.decoder, "r")
            if not isinstance(context, av.VideoCodecContext):
                raise ValueError("not a video decoder")
            for name in _SETTINGS:
                if (value := getattr(self, name)) is not None:
                    setattr(context, name, value)
            if self.extradata:
                context.extradata = self.extradata.encode("latin-1")
        except (ValueError, TypeError, OverflowError, AttributeError, av.error.FFmpegError):
            raise StaleIndexError(f"FFmpeg here has no decoder {self.decoder!r} as in the index") from None
        return context


_SETTINGS = Stream._fields[2:]


@functools.lru_cache(maxsize=64)
def open_header(stream: Stream) -> av.container.InputContainer:
    """A Matroska file without packets and with `stream` as its only stream: a muxer needs one to copy from. Raises
    `StaleIndexError`."""

    def element(name: str, *content: bytes) -> bytes:
        data = b"".join(content)
        return bytes.fromhex(name) + (1 << 56 | len(data)).to_bytes(8) + data

    def number(name: str, value: int) -> bytes:
        return element(name, value.to_bytes(8))

    codec = stream.context().codec.canonical_name
    # RFC 9559; the names of the elements are those of its section 5.
    colour = [
        number("55B1", stream.colorspace),
        number("55B9", stream.color_range),
        number("55BA", stream.color_trc),
        number("55BB", stream.color_primaries),
    ]
    video = element("E0", number("B0", stream.width), number("BA", stream.height), element("55B0", *colour))
    private = element("63A2", stream.extradata.encode("latin-1")) if stream.extradata else b""
    track = element(
        "AE",
        number("D7", 1),
        number("73C5", 1),
        number("83", 1),
        element("86", CODECS[codec].matroska_id),
        private,
        video,
    )
    file = element("1A45DFA3", element("4282", b"matroska"), number("4287", 4), number("4285", 2))
    info, cluster = element("1549A966", number("2AD7B1", 10**6)), element("1F43B675", number("E7", 0))
    file += element("18538067", info, element("1654AE6B", track), cluster)
    try:
        return av.open(io.BytesIO(file), "r", format="matroska")
    except av.error.FFmpegError as error:
        raise StaleIndexError(reason(error)) from None


class Recorder:
    """Builds the entry of a video while its packets are read: pass it to `PacketReader` as its `note`.

    with Recorder(source) as recorder:
        reader = PacketReader(container, recorder)
        reader.shown()
        entry = recorder.entry(reader, stream)
    """

    def __init__(self, source: Source):
        self._source = source
        self._file = None if source.data is not None else os.open(source.path, os.O_RDONLY | os.O_CLOEXEC)
        self._rows: list[tuple[int, int, int]] = []  # offset, bytes, CRC-32
        self._before = 0
        self._refusal = ""

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            os.close(self._file)

    def __call__(self, packet: VideoPacket) -> None:
        """Records one packet of the demuxer."""
        if self._refusal:
            return
        data = bytes(packet)
        offset = self._find(packet.pos, data)
        if offset is None:
            self._refusal = "its packets are not stored in one piece"
        elif any(side.data_type not in _IGNORED_SIDE_DATA for side in packet.iter_sidedata()):
            self._refusal = "its packets have side data"
        else:
            self._rows.append((offset, len(data), zlib.crc32(data)))

    def _find(self, place: int | None, data: bytes) -> int | None:
        """The offset of the packet's bytes in the video: a few bytes after `place`, FFmpeg's position."""
        if place is None or place < 0:
            return None
        if self._read(place + self._before, len(data)) != data:  # usually the same as for the previous packet
            self._before = self._read(place, _BEFORE + len(data)).find(data)
            if self._before < 0:
                return None
        return place + self._before

    def _read(self, first: int, count: int) -> bytes:
        if self._source.size is not None:
            count = min(count, self._source.size - first)
        if self._source.data is not None:
            return self._source.data[first : first + count]
        assert self._file is not None  # opened for every source without `data`
        return os.pread(self._file, max(count, 0), self._source.offset + first)

    def entry(self, reader: PacketReader, stream: Stream) -> bytes:
        """The entry of the video, after `reader` has read all of it without an error."""
        if self._refusal or not self._rows:
            return no_entry(self._refusal or "it has no packets")
        offsets, sizes, checks = np.array(self._rows, np.int64).reshape(-1, 3).T
        count = len(offsets)
        order = np.empty(count, np.int64)
        order[reader.order(range(count))] = np.arange(count)
        columns = {
            "gap": np.diff(offsets, prepend=0) - np.append(0, sizes[:-1]),
            "size": sizes,
            "order": order - np.arange(count),
            "flags": np.frombuffer(reader.flags, np.uint8),
            "check": checks & 0xFFFF,
        }
        size, after = size_of(self._source), int((offsets + sizes).max())
        ranges = [
            (0, min(max(_HEAD, int(offsets.min())), _MOST_CHECKED, size)),
            (after, min(after + _MOST_CHECKED, size)),
        ]
        checked = [(first, end, zlib.crc32(self._read(first, end - first))) for first, end in ranges if first < end]
        header = {"stream": stream, "size": size, "checked": checked}
        # Grouping bytes by significance makes them compress to a quarter of the size.
        planes = (columns[name].astype(kind).view(np.uint8).reshape(count, -1).T for name, kind in _COLUMNS.items())
        return _pack(header, b"".join(plane.tobytes() for plane in planes))


def no_entry(reason: str) -> bytes:
    """The entry of a video that cannot be indexed."""
    return _pack({"none": reason})


def names_packets(entry: bytes) -> bool:
    """Whether an entry names the packets of its video: two such entries are equal only if the videos are."""
    return zlib.decompressobj().decompress(entry, 7) != b'{"none"'


def _pack(header: Mapping[str, Any], data: bytes = b"") -> bytes:
    return zlib.compress(json.dumps(header).encode() + b"\n" + data)


class IndexedVideo:
    """The packets of a video, found by its index entry: a `PacketSource` that reads only the packets it needs.

    Raises `StaleIndexError` if the entry has no packets, or is damaged.
    """

    def __init__(self, source: Source, entry: bytes):
        self._source = source
        self._data: dict[int, bytes] = {}  # number of a packet -> its bytes
        try:
            unpacker = zlib.decompressobj()
            header, _, data = unpacker.decompress(entry, _MOST_BYTES).partition(b"\n")
            header = json.loads(header)
            if not unpacker.eof:
                raise ValueError("cut off")
            if "none" in header:
                raise StaleIndexError(str(header["none"]))
            self.stream = Stream(*header["stream"])
            self._size = int(header["size"])
            self._checked = [(int(first), int(end), int(check)) for first, end, check in header["checked"]]
            self._read_columns(data)
            if any(not 0 <= first < end <= min(self._size, first + _MOST_CHECKED) for first, end, _ in self._checked):
                raise ValueError("ranges that cannot be")
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError, zlib.error):
            raise StaleIndexError("the entry of this video is damaged") from None

    def _read_columns(self, data: bytes) -> None:
        widths = {name: np.dtype(kind).itemsize for name, kind in _COLUMNS.items()}
        count, rest = divmod(len(data), sum(widths.values()))
        if rest or not count:
            raise ValueError("another number of bytes")
        columns, place = {}, 0
        for name, width in widths.items():
            planes = np.frombuffer(data, np.uint8, width * count, place).reshape(width, count)
            columns[name] = np.ascontiguousarray(planes.T).view(_COLUMNS[name]).ravel()
            place += width * count
        sizes = columns["size"].astype(np.int64)
        self._ends = np.cumsum(columns["gap"] + sizes)
        self._firsts = self._ends - sizes
        order = columns["order"] + np.arange(count)
        is_sound = (sizes > 0).all() and self._firsts.min() >= 0 and self._ends.max() <= self._size
        if not is_sound or (np.sort(order) != np.arange(count)).any():
            raise ValueError("numbers that cannot be")
        self._order = order
        self._checks = columns["check"]
        self._flag_column = columns["flags"]
        self.flags = columns["flags"].tobytes()

    @property
    def packets_read(self) -> int:
        """Number of packets read so far."""
        return len(self._data)

    @functools.cached_property
    def parser(self) -> Parser:
        """See `PacketSource.parser`."""
        codec = av.Codec(self.stream.decoder, "r").canonical_name
        return make_parser(codec, self.stream.extradata.encode("latin-1"))

    def select(self, positions: np.ndarray, *, in_one_go: bool = False) -> Selection:
        """See `PacketSource.select`; reads the packets. Raises `UncertainError`, `StaleIndexError` and `InputError`."""
        is_shown = self._flag_column & Flag.IS_SHOWN.value > 0
        numbers = np.argsort(self._order)
        shown = numbers[is_shown[numbers]].tolist()
        if positions[-1] >= len(shown):
            raise UncertainError("it has fewer frames than are wanted")
        wanted = {shown[position] for position in positions.tolist()}
        starts = np.flatnonzero(self._flag_column & Flag.STARTS_GROUP.value).tolist()
        runs = choose_runs(self.flags, starts, wanted, in_one_go=in_one_go)
        self._read(sorted({number for run in runs for number in run}))
        return Selection(runs, shown)

    def _read(self, numbers: Sequence[int]) -> None:
        """Reads the packets, and for a file on a disk also the ranges that are checked."""
        places: list[tuple[int, int, int, int | None]] = list(
            zip(self._firsts[numbers].tolist(), self._ends[numbers].tolist(), self._checks[numbers].tolist(), numbers)
        )
        if self._source.data is not None or not is_url(self._source.path):
            if size_of(self._source) != self._size:
                raise StaleIndexError("the file's size has changed since it was indexed")
            places += [(first, end, check, None) for first, end, check in self._checked]
        places.sort(key=lambda place: place[:2])
        try:
            data, _ = read_ranges(self._source, [place[:2] for place in places], size=self._size)
        except InputError as error:
            raise StaleIndexError(str(error)) from None
        for (_, _, check, number), some in zip(places, data, strict=True):
            if number is None and zlib.crc32(some) != check:
                raise StaleIndexError("the file is not the one that was indexed")
            if number is not None:
                if zlib.crc32(some) & 0xFFFF != check:
                    raise StaleIndexError("the file has changed since it was indexed")
                self._data[number] = some

    def packet(self, number: int) -> VideoPacket:
        """See `PacketSource.packet`."""
        data = self._data[number]
        packet = make_packet(len(data))  # a packet made from bytes lacks the padding that decoders need
        packet.update(data)
        packet.is_keyframe = bool(self.flags[number] & Flag.IS_KEYFRAME.value)
        return packet

    def first(self, count: int) -> list[VideoPacket]:
        """See `PacketSource.first`."""
        numbers = range(min(count, len(self.flags)))
        if missing := [number for number in numbers if number not in self._data]:
            self._read(missing)
        return list(map(self.packet, numbers))

    def order(self, numbers: Sequence[int]) -> list[int]:
        """See `PacketSource.order`."""
        return sorted(numbers, key=self._order.__getitem__)


def index_path(manifest: str | os.PathLike[str]) -> Path:
    """The path of the index of a manifest file."""
    return Path(manifest).with_suffix(SUFFIX)


def hash_of(path: str, shard: str, offset: int) -> int:
    """The key of a video."""
    name = f"{shard}\0{path}\0{offset}".encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest())


def write_index(path: str | os.PathLike[str], entries: Mapping[int, bytes]) -> None:
    """Writes the entries, by `key_of` their videos: the whole file or nothing. Raises OSError."""
    path = Path(path)
    keys = sorted(entries)
    tensors: dict[str, np.ndarray] = {
        "keys": np.array(keys, np.uint64),
        "ends": np.cumsum([len(entries[key]) for key in keys], dtype=np.uint64),
        "entries": np.frombuffer(b"".join(entries[key] for key in keys), np.uint8),
    }
    part = unfinished(path)
    try:
        with naming(path):
            part.write_bytes(safetensors.numpy.save(tensors, {"format": _FORMAT}))
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


class PacketIndex:
    """A mapped index file. Raises `StaleIndexError` if it cannot be read."""

    def __init__(self, path: str | os.PathLike[str]):
        try:
            with open(path, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length if length < _MOST_BYTES // 100 else 0))
            if header["__metadata__"]["format"] != _FORMAT:
                raise ValueError("another version")
            arrays = {}
            for name, kind in (("keys", "uint64"), ("ends", "uint64"), ("entries", "uint8")):
                first, end = header[name]["data_offsets"]
                count = (end - first) // np.dtype(kind).itemsize
                arrays[name] = np.memmap(path, kind, "r", 8 + length + first, (count,)) if count else np.empty(0, kind)
        except FileNotFoundError:
            raise StaleIndexError("there is none") from None
        except (OSError, ValueError, KeyError, TypeError, OverflowError):
            raise StaleIndexError("the index is damaged, or from another version") from None
        self._keys, self._ends, self._entries = arrays["keys"], arrays["ends"], arrays["entries"]

    def __len__(self) -> int:
        return len(self._keys)

    def entry(self, key: int) -> bytes:
        """The entry for a key. Raises `StaleIndexError` if there is none."""
        place = int(np.searchsorted(self._keys, np.uint64(key)))
        if place >= min(len(self._keys), len(self._ends)) or int(self._keys[place]) != key:
            raise StaleIndexError("this video is not in the index")
        first = int(self._ends[place - 1]) if place else 0
        return self._entries[first : int(self._ends[place])].tobytes()


def is_index(path: str | os.PathLike[str]) -> bool:
    """Whether a file starts like an index of this or another version. Raises OSError."""
    with open(path, "rb") as file:
        return _FORMATS.encode() in file.read(200)


@functools.lru_cache(maxsize=4)
def open_index(path: str) -> PacketIndex:
    """The index at a path, opened once per process. Raises `StaleIndexError`."""
    return PacketIndex(path)
