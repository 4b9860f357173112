"""VP8. Source: RFC 6386 9.1."""

from dali_pipelines.bitstream.in_order import InOrderParser
from dali_pipelines.bitstream.parser import UNSPECIFIED_MATRIX, FrameHeader, StreamFormat


class Vp8Parser(InOrderParser):
    """VP8 (RFC 6386)."""

    def _read(self, packet: memoryview) -> FrameHeader:
        is_key, show_frame = not packet[0] & 1, bool(packet[0] & 0x10)
        if is_key:
            width, height = (int.from_bytes(packet[at : at + 2], "little") & 0x3FFF for at in (6, 8))
            self._check_size((width, height))
            self._check_colours(packet[10] >> 6)  # color_space and clamping_type, which FFmpeg takes for the range
        return FrameHeader(starts_group=is_key, is_shown=show_frame)

    def formats(self) -> list[StreamFormat]:
        """See `Parser.formats`."""
        return [StreamFormat(matrix=UNSPECIFIED_MATRIX, full_range=False)]
