"""Damages video files by their structure: finds the fields of a file, and makes them lie.

fields = find_fields(data, codec_bytes)         # {"sizes": [Field(...), ...], "tables": ..., ...}
damaged = damage(data, fields, "tables", np.random.default_rng(0), other=another_file)
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import av
import numpy as np

FIELD_KINDS = ("sizes", "tables", "headers", "claims", "times", "packets")
"""Sizes of boxes, elements, chunks, PES packets; sample tables, cues, indexes, PAT and PMT; parameter sets and other
headers of streams; width and height; timestamps; the first bytes and the lengths of coded frames."""
KINDS = (*FIELD_KINDS, "regions", "cut", "bits")
"""`regions` are doubled, swapped, removed, overwritten or spliced in from another file."""


class Field(NamedTuple):
    place: int
    length: int
    order: Literal["big", "little"] = "big"


Fields = dict[str, list[Field]]


def find_fields(path: Path) -> Fields:
    """The fields of the file at `path`, by kind."""
    data = path.read_bytes()
    found: Fields = defaultdict(list)
    parsers = {b"ftyp": _mp4, b"moov": _mp4, b"\x1aE\xdf\xa3": _matroska, b"RIFF": _avi, b"FLV": _flv, b"OggS": _ogg}
    parser = next((each for mark, each in parsers.items() if mark in data[:8]), None)
    if parser is None and data[:1] == b"G" and data[188:189] == b"G":
        parser = _transport
    if parser is None and data[:4] in (b"\0\0\1\xba", b"DKIF"):
        parser = _program if data[:1] == b"\0" else _ivf
    if parser:
        parser(data, found)
    else:
        found["headers"] += [Field(place, 1) for place in range(min(len(data), 1024))]
    _coded(path, data, found)
    return {kind: [each for each in found[kind] if each.place + each.length <= len(data)] for kind in FIELD_KINDS}


def _coded(path: Path, data: bytes, found: Fields) -> None:
    """What the codec writes: its header, the starts of its packets, and sizes of frames in them."""
    with av.open(str(path)) as container:
        stream = container.streams.best("video")
        extradata = bytes(stream.codec_context.extradata or b"")
        packets = [bytes(packet) for packet in container.demux(stream) if packet.size]
    starts = [data.find(packet[:24]) for packet in packets]
    for start in (start for start in starts if start >= 0):
        found["packets"] += [Field(start, 4), *(Field(start + at, 1) for at in range(24))]
    start = data.find(extradata) if extradata else -1
    if start >= 0:
        found["headers"] += [Field(start + at, 1) for at in range(len(extradata))]
    for match in re.finditer(rb"\0\0\x01[\x67\x68\x42\x44\x40\xb3\xb5\xb8\xb6\x20]", data):
        found["headers"] += [Field(match.end() + at, 1) for at in range(16)]
    for mark, sides in _CLAIMS:
        for match in re.finditer(mark, data, re.DOTALL):
            found["claims"] += [Field(match.end() + at, length, order) for at, length, order in sides]


_CLAIMS: Sequence[tuple[bytes, list[tuple[int, int, str]]]] = (
    (rb"\x9d\x01\x2a", [(0, 2, "little"), (2, 2, "little")]),  # VP8
    (rb"\x49\x83\x42", [(at, 2, "big") for at in range(5)]),  # VP9
    (rb"\xff\xc0\x00\x11\x08", [(0, 2, "big"), (2, 2, "big")]),  # JPEG
    (rb"\0\0\x01\xb3", [(0, 3, "big")]),  # MPEG-1, MPEG-2
    (rb"IHDR", [(0, 4, "big"), (4, 4, "big")]),  # PNG
    (rb"icpf.{4}", [(4, 2, "big"), (6, 2, "big")]),  # ProRes
    (rb"\AGIF8..", [(0, 2, "little"), (2, 2, "little")]),
)

_PARENTS = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"edts", b"moof", b"traf", b"mvex", b"udta", b"dinf")
_TABLES = (b"stts", b"ctts", b"stsc", b"stsz", b"stco", b"co64", b"stss", b"elst", b"trun", b"sidx", b"tfhd", b"trex")
_CLOCKS = (b"mvhd", b"mdhd", b"tfdt", b"mfhd", b"elst", b"mehd", b"stts", b"ctts")


def _mp4(data: bytes, found: Fields, start: int = 0, end: int | None = None) -> None:
    end = len(data) if end is None else end
    while start + 8 <= end:
        size, name = int.from_bytes(data[start : start + 4]), data[start + 4 : start + 8]
        size = end - start if size == 0 else size
        if size < 8:
            return
        found["sizes"] += [Field(start, 4), Field(start + 4, 4)]
        words = [Field(at, 4) for at in range(start + 8, start + size - 3, 4)]
        if name in _PARENTS:
            _mp4(data, found, start + 8, start + size)
        if name in _TABLES:
            found["tables"] += words[:200]
        if name in _CLOCKS:
            found["times"] += words[1:60]
        if name == b"tkhd":
            found["claims"] += words
        if name == b"stsd":
            found["claims"] += [Field(start + 16 + 32, 2), Field(start + 16 + 34, 2)]
            found["headers"] += [Field(at, 1) for at in range(start + 8, start + size)]
            _mp4(data, found, start + 16 + 86, start + size)
        start += size


_MASTERS = {
    0x18538067,
    0x1F43B675,
    0x1654AE6B,
    0xAE,
    0xE0,
    0x1C53BB6B,
    0xBB,
    0xB7,
    0x114D9B74,
    0x4DBB,
    0xA0,
    0x1549A966,
}
_MASTERS |= {0x1A45DFA3}


def _matroska(data: bytes, found: Fields, start: int = 0, end: int | None = None, parent: int = 0) -> None:
    end = len(data) if end is None else end
    while start < end and data[start]:
        id_length = 9 - data[start].bit_length()
        name = int.from_bytes(data[start : start + id_length])
        place = start + id_length
        if place >= end or not data[place]:
            return
        length = 9 - data[place].bit_length()
        size = int.from_bytes(data[place : place + length]) - (1 << 7 * length)
        body = place + length
        size = min(size, end - body)
        found["sizes"] += [Field(start, id_length), Field(place, 1), Field(place, length)]
        if name in _MASTERS:
            _matroska(data, found, body, body + size, name)
        elif parent in (0xBB, 0xB7, 0x4DBB):
            found["tables"].append(Field(body, size))
        elif name in (0xE7, 0x2AD7B1, 0x4489, 0x23E383, 0x9B, 0xFB, 0x55EE):
            found["times"].append(Field(body, size))
        elif name in (0xB0, 0xBA, 0x54B0, 0x54BA):
            found["claims"].append(Field(body, size))
        elif name in (0xA3, 0xA1):
            found["times"].append(Field(body + 1, 2))
            found["packets"] += [Field(body, 1), Field(body + 3, 1), Field(body + 3, 2)]  # track, flags: lacing
        elif parent in (0xAE, 0xE0, 0x1A45DFA3):
            found["headers"] += [Field(at, 1) for at in range(body, body + size)]
        start = body + size


def _avi(data: bytes, found: Fields, start: int = 0, end: int | None = None) -> None:
    end = len(data) if end is None else end
    while start + 8 <= end:
        name, size = data[start : start + 4], int.from_bytes(data[start + 4 : start + 8], "little")
        body = start + 8
        size = min(size, end - body)
        found["sizes"] += [Field(start, 4), Field(start + 4, 4, "little")]
        words = [Field(at, 4, "little") for at in range(body, body + size - 3, 4)]
        if name in (b"RIFF", b"LIST"):
            _avi(data, found, body + 4, body + size)
        elif name in (b"idx1", b"indx", b"ix00"):
            found["tables"] += words
        elif name in (b"avih", b"strh"):
            found["times"] += words
            found["claims"] += words[8:10] if name == b"avih" else []
        elif name == b"strf":
            found["claims"] += words[1:3]
            found["headers"] += words
        start = body + size + size % 2


def _flv(data: bytes, found: Fields) -> None:
    found["headers"] += [Field(at, 1) for at in range(13)]
    start = 13
    while start + 11 <= len(data):
        size = int.from_bytes(data[start + 1 : start + 4])
        found["sizes"] += [Field(start + 1, 3), Field(start + 11 + size, 4)]
        found["times"] += [Field(start + 4, 3), Field(start + 7, 1), Field(start + 13, 3)]
        found["packets"] += [Field(start, 1), Field(start + 11, 1), Field(start + 12, 1)]
        if data[start] == 18:  # script data: duration, width, height
            found["tables"] += [Field(start + 11 + at, 1) for at in range(size)]
            found["claims"] += [Field(match.end(), 8) for match in re.finditer(rb"(width|height)\0", data)]
        start += 11 + size + 4


def _ogg(data: bytes, found: Fields) -> None:
    for match in re.finditer(rb"OggS\0", data):
        start, count = match.start(), data[match.start() + 26]
        found["times"].append(Field(start + 6, 8, "little"))
        found["tables"] += [Field(start + 5, 1), Field(start + 14, 4, "little"), Field(start + 18, 4, "little")]
        found["sizes"] += [Field(start + 26 + at, 1) for at in range(count + 1)]
        if start < 4096:
            found["headers"] += [Field(start + 27 + count + at, 1) for at in range(60)]
            found["claims"] += [Field(start + 27 + count + at, 2) for at in (10, 12, 14, 17)]


def _transport(data: bytes, found: Fields) -> None:
    for start in range(0, len(data) - 187, 188):
        found["packets"] += [Field(start, 1), Field(start + 1, 2), Field(start + 3, 1)]
        pid, body = int.from_bytes(data[start + 1 : start + 3]) & 0x1FFF, start + 4
        if data[start + 3] & 0x20:
            found["sizes"].append(Field(body, 1))
            found["times"] += [Field(body + 2, 4)]
            body += 1 + data[body]
        if pid in (0, 17, 0x1000):  # PAT, SDT, PMT
            found["tables"] += [Field(at, 1) for at in range(body, min(body + 40, start + 188))]
        elif data[start + 1] & 0x40:
            _pes(body, found)


def _program(data: bytes, found: Fields) -> None:
    for match in re.finditer(rb"\0\0\x01([\xba\xbb\xbe\xe0])", data):
        if match[1] == b"\xe0":
            _pes(match.start(), found)
        else:
            found["times" if match[1] == b"\xba" else "tables"] += [Field(match.end() + at, 1) for at in range(10)]
            found["sizes"].append(Field(match.end(), 2))


def _pes(start: int, found: Fields) -> None:
    found["sizes"] += [Field(start + 4, 2), Field(start + 8, 1)]
    found["headers"] += [Field(start + 3, 1), Field(start + 6, 2)]
    found["times"] += [Field(start + 9 + at, 1) for at in range(10)]


def _ivf(data: bytes, found: Fields) -> None:
    found["headers"] += [Field(at, 2, "little") for at in range(0, 32, 2)]
    found["claims"] += [Field(12, 2, "little"), Field(14, 2, "little")]
    found["tables"] += [Field(at, 4, "little") for at in (16, 20, 24)]
    start = 32
    while start + 12 <= len(data):
        found["sizes"].append(Field(start, 4, "little"))
        found["times"].append(Field(start + 4, 8, "little"))
        start += 12 + int.from_bytes(data[start : start + 4], "little")


def damage(data: bytes, fields: Fields, kind: str, rng: np.random.Generator, *, other: bytes) -> bytes:
    """`data` with one to four pieces of damage of a kind of `KINDS`; `other` is another file to splice from."""
    changed = bytearray(data)
    for _ in range(min(int(rng.geometric(0.5)), 4)):
        if kind == "bits":
            for place in rng.integers(0, len(changed), rng.integers(1, 9)):
                changed[place] ^= 1 << rng.integers(8)
        elif kind == "cut":
            return _cut(changed, fields, rng)
        elif kind == "regions":
            changed = _move(changed, fields, rng, other)
        elif fields[kind]:
            _lie(changed, fields[kind], rng, is_claim=kind == "claims")
    if data[:4] == b"OggS" and rng.random() < 0.7:
        _sign_pages(changed)
    return bytes(changed)


_SIDES = (0, 1, 2, 7, 15, 17, 128, 4096, 8192, 16000, 16383, 65535)


def _lie(data: bytearray, fields: list[Field], rng: np.random.Generator, *, is_claim: bool) -> None:
    """Another value for a field, or for up to 40 that follow each other."""
    first = int(rng.integers(len(fields)))
    for place, length, order in fields[first : first + (1 if rng.random() < 0.8 else int(rng.integers(2, 40)))]:
        old = int.from_bytes(data[place : place + length], order)
        most = (1 << 8 * length) - 1
        another = fields[int(rng.integers(len(fields)))]
        values = [
            0,
            1,
            most,
            most >> 1,
            old + 1,
            old - 1,
            old * 2,
            old // 2,
            old ^ (1 << int(rng.integers(8 * length or 1))),
        ]
        values += [
            int.from_bytes(rng.bytes(length)),
            old + int(rng.integers(-99, 99)),
            old | 1 << max(8 * length - 1, 0),
        ]
        values += [int.from_bytes(data[another.place : another.place + another.length], another.order)]
        values = [*_SIDES, old * 2, old * 100, old + 1, old - 1] if is_claim else values
        new = values[int(rng.integers(len(values)))] & most
        data[place : place + length] = new.to_bytes(length, order)


def _place(size: int, fields: Fields, rng: np.random.Generator) -> int:
    """Where something begins, mostly."""
    sizes = fields["sizes"]
    if sizes and rng.random() < 0.7:
        return min(sizes[int(rng.integers(len(sizes)))].place, size - 1)
    return int(rng.integers(size))


def _cut(data: bytearray, fields: Fields, rng: np.random.Generator) -> bytes:
    place = _place(len(data), fields, rng) + int(rng.integers(-9, 40))
    kept = bytes(data[: max(place, 1)])
    return kept + bytes(len(data) - len(kept)) if rng.random() < 0.3 else kept  # the disk was full


def _move(data: bytearray, fields: Fields, rng: np.random.Generator, other: bytes) -> bytearray:
    """A region that is doubled, removed, zero, swapped with the next, or from another file (in place, or put in)."""
    start, end = sorted(_place(len(data), fields, rng) for _ in range(2))
    end = min(end, start + int(rng.choice([64, 1000, len(data)]))) + 1
    before, region, after = data[:start], data[start:end], data[end:]
    foreign = other[start:end]
    made = (region + region, b"", bytes(len(region)), after[: len(region)] + region, foreign + region, rng.bytes(9))
    choice = int(rng.integers(len(made) + 1))
    if choice == len(made):
        return before + foreign + after[max(len(foreign) - len(region), 0) :]
    return before + made[choice] + (after[len(region) :] if choice == 3 else after) or bytearray(b"\0")


def _sign_pages(data: bytearray) -> None:
    """Ogg's checksums, so that the damage is not noticed by them."""
    for match in list(re.finditer(rb"OggS\0", bytes(data))):
        start = match.start()
        count = data[start + 26] if start + 27 <= len(data) else 0
        end = start + 27 + count + sum(data[start + 27 : start + 27 + count])
        if end <= len(data):
            data[start + 22 : start + 26] = bytes(4)
            data[start + 22 : start + 26] = _crc(data[start:end]).to_bytes(4, "little")


def _crc(data: bytes) -> int:
    value = 0
    for byte in data:
        value = (value << 8) & 0xFFFFFFFF ^ _CRC[value >> 24 ^ byte]
    return value


def _crc_table() -> Iterator[int]:
    for value in range(256):
        value <<= 24
        for _ in range(8):
            value = value << 1 ^ (0x104C11DB7 if value >> 31 else 0)
        yield value


_CRC = list(_crc_table())
