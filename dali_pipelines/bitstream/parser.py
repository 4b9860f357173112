"""The interface of a codec's header parser, and the types of its results."""

from abc import abstractmethod
from typing import NamedTuple, Protocol

UNSPECIFIED_MATRIX = 2
"""matrix_coefficients (H.273) of a stream that does not state its colour matrix."""


class UncertainError(Exception):
    """The headers do not say which frame a packet holds; the message is the reason."""


class MissingFrameError(UncertainError):
    """A reference frame seems to be missing."""


class FrameHeader(NamedTuple):
    """What the headers of one packet say about its frame."""

    order: tuple[int, int] = (0, 0)
    """Frames are shown in ascending order of this value."""
    starts_group: bool = False
    """Neither this frame nor a later one that is not `is_leading` refers to an earlier one."""
    is_clean: bool = True
    """If it starts a group: a decoder that has just decoded another group needs no reset."""
    is_leading: bool = False
    """Refers, or may refer, to frames before the start of its group."""
    is_disposable: bool = False
    """No other frame refers to it."""
    is_shown: bool = True
    is_intra: bool = False
    """Refers to no other frame. Only set for H.264."""
    follows_gap: bool = False
    """Reference frames are missing before it."""


class StreamFormat(NamedTuple):
    """What one parameter set says; None for fields that are not read."""

    size: tuple[int, int] | None = None
    """(height, width) of the frames that are shown, in pixels."""
    offset: tuple[int, int] = (0, 0)
    """(rows, columns) cropped at their top and left."""
    has_fields: bool = False
    """Frames may be coded as two fields, or are fields."""
    reorder_frames: int | None = None
    """The most frames that a decoder holds back."""
    matrix: int | None = None
    """matrix_coefficients of H.273: 1 is BT.709, 5 and 6 BT.601, 2 unspecified."""
    full_range: bool | None = None
    rare: str = ""
    """A tool of the codec that hardware may not support; "" for none."""


class Rewrite(NamedTuple):
    """New parameter sets, keyed by those they replace, each a NAL unit."""

    sets: dict[bytes, bytes]
    size: tuple[int, int]
    """(height, width) of the frames with the new ones."""
    length_size: int
    """Size in bytes of the length prefix of each NAL unit in a packet; 0 for start codes."""

    def packet(self, data: bytes) -> bytes:
        """The packet with the new sets."""
        for old, new in self.sets.items():
            data = data.replace(_framed(old, self.length_size), _framed(new, self.length_size))
        return data

    def extradata(self, data: bytes) -> bytes:
        """The codec's header in the container, with the new sets. Raises `UncertainError` if it does not contain the
        old ones verbatim."""
        length_size = 2 if data[:1] == b"\1" else 0  # avcC and hvcC, or start codes
        for old, new in self.sets.items():
            if _framed(old, length_size) not in data:
                raise UncertainError("parameter sets that cannot be rewritten")
            data = data.replace(_framed(old, length_size), _framed(new, length_size))
        return data


def _framed(unit: bytes, length_size: int) -> bytes:
    return len(unit).to_bytes(length_size) + unit if length_size else unit


class Parser(Protocol):
    """Reads the headers of one stream. It is created from the codec's header in the container (FFmpeg's extradata), and
    then reads every packet in decoding order."""

    reorder: int
    """The most frames that a decoder may hold back."""
    waits_for_start: bool = False
    """Whether a decoder outputs nothing before the first group starts."""

    @abstractmethod
    def read(self, packet: memoryview) -> FrameHeader:
        """The header of the frame in the next packet. Raises `UncertainError`, or IndexError if the packet ends within
        a header."""

    def formats(self) -> list[StreamFormat]:
        """The format that each parameter set describes; empty for codecs without them."""
        return []

    def without_cropping(self) -> Rewrite | None:
        """Parameter sets for frames as coded; None if frames are not cropped. Raises `UncertainError`."""
        return None

    def with_header(self, packet: bytes) -> bytes:
        """The first packet of a stream with the header added, for decoders that read the stream's header only in
        packets."""
        return packet
