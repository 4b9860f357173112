"""Shared by the codecs that show frames in packet order: MJPEG, VP8, VP9, AV1."""

from abc import abstractmethod
from collections.abc import Hashable

from dali_pipelines.bitstream.parser import FrameHeader, Parser, UncertainError


class InOrderParser(Parser):
    """A codec whose packets come in display order."""

    reorder = 0
    waits_for_start = True

    def __init__(self, extradata: bytes):
        self._count = 0
        self._size: tuple[int, int] | None = None
        self._colours: Hashable = None

    def _check_colours(self, colours: Hashable) -> None:
        """Raises `UncertainError` if a key frame has another range or matrix than the first: torchcodec ignores the
        change."""
        if self._colours not in (None, colours):
            raise UncertainError("the colours of the frames change")
        self._colours = colours

    def _check_size(self, size: tuple[int, int]) -> None:
        """Raises `UncertainError` if the frame size changes: hardware decoders do not handle that."""
        if self._size not in (None, size):
            raise UncertainError("the size of the frames changes")
        self._size = size

    def read(self, packet: memoryview) -> FrameHeader:
        """See `Parser.read`."""
        self._count += 1
        return self._read(packet)._replace(order=(0, self._count))

    @abstractmethod
    def _read(self, packet: memoryview) -> FrameHeader:
        """The header of a packet's frame, except for its order."""
