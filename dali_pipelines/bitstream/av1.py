"""AV1. Source: AV1 bitstream specification 5.3 to 5.5 and 5.9."""

from collections.abc import Iterator
from typing import NamedTuple

from dali_pipelines.bitstream.bits import Bits
from dali_pipelines.bitstream.in_order import InOrderParser
from dali_pipelines.bitstream.parser import FrameHeader, UncertainError

_SEQUENCE_HEADER, _FRAME_HEADER, _FRAME = 1, 3, 6  # obu_type
_KEY_FRAME, _INTER_FRAME, _SWITCH_FRAME = 0, 1, 3  # frame_type
_SELECT = 2
"""SELECT_SCREEN_CONTENT_TOOLS and SELECT_INTEGER_MV: each frame header sets it."""
_HEADER_BYTES = 16
"""Bytes to parse of a frame header, which needs fewer."""


class _Sequence(NamedTuple):
    order_hint_bits: int
    seq_force_screen_content_tools: int
    seq_force_integer_mv: int


class Av1Parser(InOrderParser):
    """A packet is a temporal unit: one shown frame, and hidden ones."""

    _header: bytes | None = None
    _sequence: _Sequence

    def _read(self, packet: memoryview) -> FrameHeader:
        frames, has_header = [], False
        for obu_type, unit in _obus(packet):
            if obu_type == _SEQUENCE_HEADER:
                has_header = True
                self._keep_header(bytes(unit))
            elif obu_type in (_FRAME_HEADER, _FRAME):
                frames.append(self._read_frame(unit))
        shown = sum(frame.is_shown for frame in frames)
        if shown != 1:
            raise UncertainError("packets of several frames" if shown else "a packet without a frame")
        return FrameHeader(
            starts_group=has_header and frames[0].starts_group,
            is_disposable=all(frame.is_disposable for frame in frames),
        )

    def _keep_header(self, header: bytes) -> None:
        """Keeps the stream's own sequence header; that of the container may differ (SVT-AV1's does)."""
        if self._header is None:
            self._header, self._sequence = header, _read_sequence(Bits(header))
        elif header != self._header:
            raise UncertainError("the parameters of the stream change")

    def _read_frame(self, data: memoryview) -> FrameHeader:
        if self._header is None:
            raise UncertainError("the file does not begin with a frame that can be decoded alone")
        bits = Bits(bytes(data[:_HEADER_BYTES]))
        show_existing_frame = bits.u(1)
        if show_existing_frame:
            return FrameHeader()
        frame_type, show_frame = bits.u(2), bits.u(1)
        if not show_frame:
            bits.skip(showable_frame=1)
        is_key, is_switch = frame_type == _KEY_FRAME and bool(show_frame), frame_type == _SWITCH_FRAME
        error_resilient_mode = 1 if is_key or is_switch else bits.u(1)
        bits.skip(disable_cdf_update=1)
        allow_screen_content_tools = self._sequence.seq_force_screen_content_tools
        if allow_screen_content_tools == _SELECT:
            allow_screen_content_tools = bits.u(1)
        if allow_screen_content_tools and self._sequence.seq_force_integer_mv == _SELECT:
            bits.skip(force_integer_mv=1)
        frame_size_override_flag = 1 if is_switch else bits.u(1)
        if frame_size_override_flag:
            raise UncertainError("the size of the frames changes")
        bits.skip(order_hint=self._sequence.order_hint_bits)
        if frame_type == _INTER_FRAME and not error_resilient_mode:
            bits.skip(primary_ref_frame=3)
        refresh_frame_flags = 255 if is_key or is_switch else bits.u(8)
        return FrameHeader(starts_group=is_key, is_disposable=not refresh_frame_flags, is_shown=bool(show_frame))


def _obus(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Yields (obu_type, payload) of the units of a packet."""
    place = 0
    while place < len(data):
        head = data[place]
        obu_type, obu_extension_flag, obu_has_size_field = head >> 3 & 15, head >> 2 & 1, head & 2
        place += 1 + obu_extension_flag
        obu_size, shift = len(data) - place, 0
        if obu_has_size_field:
            obu_size = 0
            while place < len(data):  # leb128
                byte = data[place]
                place += 1
                obu_size |= (byte & 127) << shift
                shift += 7
                if byte < 128:
                    break
        if place + obu_size > len(data):
            raise UncertainError("a packet is cut off")
        yield obu_type, data[place : place + obu_size]
        place += obu_size


def _read_sequence(bits: Bits) -> _Sequence:
    bits.skip(seq_profile=3)
    still_picture, reduced_still_picture_header = bits.u(1), bits.u(1)
    if still_picture or reduced_still_picture_header:
        raise UncertainError("a still picture")
    timing_info_present_flag = bits.u(1)
    if timing_info_present_flag:
        raise UncertainError("timing in the stream header")
    initial_display_delay_present_flag = bits.u(1)
    operating_points_cnt_minus_1 = bits.u(5)
    if operating_points_cnt_minus_1:
        raise UncertainError("several layers")
    bits.skip(operating_point_idc=12)
    seq_level_idx = bits.u(5)
    if seq_level_idx > 7:
        bits.skip(seq_tier=1)
    if initial_display_delay_present_flag:
        initial_display_delay_present_for_this_op = bits.u(1)
        if initial_display_delay_present_for_this_op:
            bits.skip(initial_display_delay_minus_1=4)
    frame_width_bits_minus_1, frame_height_bits_minus_1 = bits.u(4), bits.u(4)
    bits.skip(max_frame_width_minus_1=frame_width_bits_minus_1 + 1)
    bits.skip(max_frame_height_minus_1=frame_height_bits_minus_1 + 1)
    frame_id_numbers_present_flag = bits.u(1)
    if frame_id_numbers_present_flag:
        raise UncertainError("frame numbers in the frame headers")
    bits.skip(use_128x128_superblock=1, enable_filter_intra=1, enable_intra_edge_filter=1)
    bits.skip(enable_interintra_compound=1, enable_masked_compound=1, enable_warped_motion=1, enable_dual_filter=1)
    enable_order_hint = bits.u(1)
    if enable_order_hint:
        bits.skip(enable_jnt_comp=1, enable_ref_frame_mvs=1)
    seq_choose_screen_content_tools = bits.u(1)
    seq_force_screen_content_tools = _SELECT if seq_choose_screen_content_tools else bits.u(1)
    seq_force_integer_mv = _SELECT
    if seq_force_screen_content_tools:
        seq_choose_integer_mv = bits.u(1)
        seq_force_integer_mv = _SELECT if seq_choose_integer_mv else bits.u(1)
    order_hint_bits = bits.u(3) + 1 if enable_order_hint else 0
    return _Sequence(order_hint_bits, seq_force_screen_content_tools, seq_force_integer_mv)
