"""Shared by H.264 and HEVC: packets of NAL units, parameter sets, picture order counts.

Sources: ITU-T H.264 7.3 and 8.2.1, annex B; H.265 7.3 and 8.3.1; ISO/IEC 14496-15 (avcC and hvcC).
"""

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from typing import Generic, NamedTuple, Protocol, TypeVar

from dali_pipelines.bitstream.bits import Bits
from dali_pipelines.bitstream.parser import Parser, Rewrite, UncertainError

SLICE_HEADER_BYTES = 32
"""Bytes to parse of a slice header, which needs fewer."""


def rbsp(nal: bytes) -> bytes:
    """The payload without the emulation_prevention_three_bytes, which prevent start codes from appearing in it."""
    return nal.replace(b"\0\0\3", b"\0\0")


def with_emulation_prevention(payload: bytes) -> bytes:
    """The inverse of `rbsp`."""
    out, zeros = bytearray(), 0
    for byte in payload:
        if zeros == 2 and byte <= 3:
            out.append(3)
            zeros = 0
        out.append(byte)
        zeros = zeros + 1 if byte == 0 else 0
    return bytes(out)


def annex_b(data: bytes) -> Iterator[bytes]:
    """The units between start codes."""
    start = data.find(b"\0\0\1")
    while start >= 0:
        end = data.find(b"\0\0\1", start + 3)
        yield data[start + 3 : end if end >= 0 else None].rstrip(b"\0")
        start = end


def _length_prefixed(data: memoryview, size: int) -> Iterator[memoryview]:
    place = 0
    while place < len(data):
        end = place + size + int.from_bytes(data[place : place + size])
        if end > len(data):
            raise UncertainError("a packet is cut off")
        yield data[place + size : end]
        place = end


def read_sets(data: bytes, place: int, count: int) -> Iterator[bytes]:
    """Yields `count` units with 16-bit lengths, starting at byte `place`."""
    for _ in range(count):
        end = place + 2 + int.from_bytes(data[place : place + 2])
        yield data[place + 2 : end]
        place = end


class Configuration(NamedTuple):
    """The header of a stream in MP4 and Matroska: avcC or hvcC."""

    length_size: int
    """Size in bytes of the length prefix of each NAL unit in a packet."""
    units: list[bytes]
    """Parameter sets."""


class HasSps(Protocol):
    """A PPS."""

    @property
    def sps(self) -> int:
        """The id of its SPS."""


Sps = TypeVar("Sps")
Pps = TypeVar("Pps", bound=HasSps)


class NalParser(Parser, Generic[Sps, Pps]):
    """Keeps the needed fields of each SPS and PPS."""

    reorder = 16  # the largest size of a decoder's buffer

    def __init__(self, extradata: bytes):
        self._sps: dict[int, Sps] = {}
        self._pps: dict[int, Pps] = {}
        self._known: set[bytes] = set()
        self._active_sps: int | None = None  # its id
        self._sequence = -1  # number of the last picture that restarted the order count
        self._previous = 0  # order count that the next one is relative to
        self._length_size = 0  # 0: start codes
        units: Iterable[bytes] = annex_b(extradata)
        if extradata[:1] == b"\1":
            self._length_size, units = self._read_configuration(extradata)
        for unit in units:
            self._keep_set(unit)

    @staticmethod
    @abstractmethod
    def _read_configuration(data: bytes) -> Configuration:
        """Reads avcC or hvcC."""

    @abstractmethod
    def _keep_set(self, unit: bytes) -> None:
        """Reads a parameter set into `_sps` or `_pps`, and adds it to `_known`."""

    @staticmethod
    @abstractmethod
    def _is_sps(unit: bytes) -> bool:
        """Whether a NAL unit is an SPS."""

    @staticmethod
    @abstractmethod
    def _read_up_to_cropping(unit: bytes) -> tuple[int, bytes, Bits, tuple[int, int]]:
        """(bytes of the NAL unit header, payload of the SPS, its bits read up to the flag of its cropping window, coded
        (height, width))."""

    def _parameter_sets(self) -> list[bytes]:
        return sorted(self._known)

    def _units(self, data: memoryview) -> Iterable[memoryview | bytes]:
        return _length_prefixed(data, self._length_size) if self._length_size else annex_b(bytes(data))

    def _check_set(self, unit: bytes) -> None:
        """Raises `UncertainError` for a new parameter set within the stream: a decoder that skips packets could miss
        it."""
        if unit.rstrip(b"\0") not in self._known:
            raise UncertainError("the parameters of the stream change")

    def _parameters(self, number: int) -> tuple[Pps, Sps]:
        """The PPS with id `number`, and its SPS."""
        try:
            pps = self._pps[number]
            sps = self._sps[pps.sps]
        except KeyError:
            raise UncertainError("a frame without its parameters") from None
        if self._active_sps not in (None, pps.sps):  # the size may be another
            raise UncertainError("the parameters of the stream change")
        self._active_sps = pps.sps
        return pps, sps

    def _order_count(self, lsb: int, bits: int) -> int:
        """The full count, from its low bits and the previous count (H.264 8.2.1.1, H.265 8.3.1)."""
        period = 1 << bits
        previous_lsb = self._previous % period
        count = self._previous - previous_lsb + lsb
        if previous_lsb - lsb >= period // 2:
            return count + period
        if lsb - previous_lsb > period // 2:
            return count - period
        return count

    def without_cropping(self) -> Rewrite | None:
        """Parameter sets without a cropping window."""
        found = {unit: self._without_cropping(unit) for unit in self._parameter_sets() if self._is_sps(unit)}
        sizes = {size for _, size in found.values()}
        if len(sizes) != 1:
            raise UncertainError("parameter sets with several sizes")
        changed = {old: new for old, (new, _) in found.items() if new != old}
        return Rewrite(changed, sizes.pop(), self._length_size) if changed else None

    def _without_cropping(self, unit: bytes) -> tuple[bytes, tuple[int, int]]:
        """(the SPS with the flag of its cropping window cleared, coded (height, width))."""
        head, payload, bits, size = self._read_up_to_cropping(unit)
        flag = bits.position
        if not bits.u(1):
            return unit, size
        bits.skip_ue("left", "right", "top", "bottom")
        text = bin(int.from_bytes(b"\1" + payload))[3:]
        rest = text[bits.position :].rstrip("0")  # ends with the stop bit
        text = text[:flag] + "0" + rest
        text += "0" * (-len(text) % 8)
        return unit[:head] + with_emulation_prevention(int(text, 2).to_bytes(len(text) // 8)), size
