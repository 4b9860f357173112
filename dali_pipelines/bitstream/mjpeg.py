"""MJPEG. Source: ITU-T T.81 annex B."""

from dali_pipelines.bitstream.in_order import InOrderParser
from dali_pipelines.bitstream.parser import FrameHeader

_SOF = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
"""Markers of frame headers; the others in this range define tables."""


class MjpegParser(InOrderParser):
    """Motion JPEG: every packet is an independent frame."""

    _place, _header = 0, b""  # of the last frame header: most packets have the same one at the same place

    def _read(self, packet: memoryview) -> FrameHeader:
        if not self._header or packet[self._place : self._place + len(self._header)] != self._header:
            self._read_size(packet)
        return FrameHeader(starts_group=True, is_disposable=True)

    def _read_size(self, packet: memoryview) -> None:
        place = 2  # after SOI
        while packet[place] == 0xFF:
            if packet[place + 1] in _SOF:
                self._place, self._header = place, bytes(packet[place : place + 9])
                width, height = (int.from_bytes(self._header[at : at + 2]) for at in (7, 5))  # X, Y
                self._check_size((width, height))
                return
            place += 2 + int.from_bytes(packet[place + 2 : place + 4])
