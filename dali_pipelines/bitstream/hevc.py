"""HEVC. Sources: ITU-T H.265 7.3 (syntax) and 8.3.1 (picture order count)."""

from typing import NamedTuple

from dali_pipelines.bitstream.bits import Bits
from dali_pipelines.bitstream.nal import SLICE_HEADER_BYTES, Configuration, NalParser, rbsp, read_sets
from dali_pipelines.bitstream.parser import FrameHeader, StreamFormat, UncertainError

# nal_unit_type (table 7-1)
_RADL_AND_RASL, _RASL = range(6, 10), (8, 9)
_RESERVED_NON_IRAP, _FIRST_IRAP, _IDR, _CRA = range(10, 16), 16, (19, 20), 21
_FIRST_NON_VCL, _SPS, _PPS, _ENDS = 32, 33, 34, (36, 37)


class _Start(NamedTuple):
    """An SPS up to conformance_window_flag."""

    sps_seq_parameter_set_id: int
    is_interlaced: bool
    """The source is interlaced, and the frames may be fields."""
    sps_max_sub_layers_minus1: int
    separate_colour_plane_flag: int
    coded_size: tuple[int, int]
    """(height, width) in pixels."""


class _Sps(NamedTuple):
    """An SPS up to log2_max_pic_order_cnt_lsb_minus4."""

    start: _Start
    window: tuple[int, int, int, int]
    """Left, right, top, bottom of the conformance window, in units of chroma samples."""
    bits_pic_order_cnt_lsb: int


class _Pps(NamedTuple):
    sps: int
    output_flag_present_flag: int
    num_extra_slice_header_bits: int


class HevcParser(NalParser[_Sps, _Pps]):
    """HEVC (ITU-T H.265)."""

    def __init__(self, extradata: bytes):
        super().__init__(extradata)
        self._ended = False
        self._skips_leading = True  # RASL pictures of the last start of a group refer to frames the decoder never had

    @staticmethod
    def _read_configuration(data: bytes) -> Configuration:
        units: list[bytes] = []
        place = 23
        for _ in range(data[22]):
            array = list(read_sets(data, place + 3, int.from_bytes(data[place + 1 : place + 3])))
            place += 3 + sum(2 + len(unit) for unit in array)
            units += array
        return Configuration((data[21] & 3) + 1, units)

    def _keep_set(self, unit: bytes) -> None:
        if _is_of_other_layer(unit):
            return
        self._known.add(unit.rstrip(b"\0"))
        bits = Bits(rbsp(unit[2:]))
        if unit[0] >> 1 == _SPS:
            sps = _read_sps(bits)
            self._sps[sps.start.sps_seq_parameter_set_id] = sps
        elif unit[0] >> 1 == _PPS:
            pps_pic_parameter_set_id, pps_seq_parameter_set_id = bits.ue(), bits.ue()
            bits.skip(dependent_slice_segments_enabled_flag=1)
            output_flag_present_flag, num_extra_slice_header_bits = bits.u(1), bits.u(3)
            self._pps[pps_pic_parameter_set_id] = _Pps(
                pps_seq_parameter_set_id, output_flag_present_flag, num_extra_slice_header_bits
            )

    def read(self, packet: memoryview) -> FrameHeader:
        """See `Parser.read`."""
        found = None
        for unit in self._units(packet):
            if len(unit) < 2 or _is_of_other_layer(unit):
                continue
            nal_unit_type = unit[0] >> 1
            if nal_unit_type < _FIRST_NON_VCL:
                if unit[2] & 0x80:  # first_slice_segment_in_pic_flag
                    if found:
                        raise UncertainError("packets of several frames")
                    found = self._read_slice(nal_unit_type, unit)
            elif nal_unit_type in (_SPS, _PPS):
                self._check_set(bytes(unit))
            elif nal_unit_type in _ENDS:
                self._ended = True
        if found is None:
            raise UncertainError("a packet without the beginning of a frame")
        return found

    def _read_slice(self, nal_unit_type: int, unit: memoryview | bytes) -> FrameHeader:
        if self._ended:
            raise UncertainError("a sequence ends within the file")
        if nal_unit_type in _RESERVED_NON_IRAP or nal_unit_type > _CRA:
            raise UncertainError("a reserved kind of frame")
        is_irap = nal_unit_type >= _FIRST_IRAP
        is_first, is_idr, is_rasl = self._sequence < 0, nal_unit_type in _IDR, nal_unit_type in _RASL
        bits = Bits(rbsp(bytes(unit[2:SLICE_HEADER_BYTES])))
        bits.skip(first_slice_segment_in_pic_flag=1)
        no_output_of_prior_pics_flag = bits.u(1) if is_irap else 0
        if no_output_of_prior_pics_flag and not is_first:
            raise UncertainError("frames that are decoded and discarded")
        slice_pic_parameter_set_id = bits.ue()
        pps, sps = self._parameters(slice_pic_parameter_set_id)
        bits.skip(slice_reserved_flag=pps.num_extra_slice_header_bits)
        bits.skip_ue("slice_type")
        pic_output_flag = bits.u(1) if pps.output_flag_present_flag else 1
        if sps.start.separate_colour_plane_flag:
            bits.skip(colour_plane_id=2)
        restarts = is_first or (is_irap and nal_unit_type < _CRA)  # IDR, BLA: the order count restarts
        if restarts:
            self._sequence += 1
            self._previous = 0
        if is_irap:
            self._skips_leading = restarts
        slice_pic_order_cnt_lsb = 0 if is_idr else bits.u(sps.bits_pic_order_cnt_lsb)
        count = (
            slice_pic_order_cnt_lsb
            if restarts
            else self._order_count(slice_pic_order_cnt_lsb, sps.bits_pic_order_cnt_lsb)
        )
        temporal_id = (unit[1] & 7) - 1
        is_unreferenced = not is_irap and nal_unit_type % 2 == 0  # by pictures of its own temporal layer
        if temporal_id == 0 and not is_unreferenced and nal_unit_type not in _RADL_AND_RASL:
            self._previous = count
        is_skipped = is_rasl and self._skips_leading
        return FrameHeader(
            (self._sequence, count),
            starts_group=is_irap,
            is_clean=restarts,
            is_leading=is_rasl,
            is_disposable=is_skipped or (is_unreferenced and temporal_id == sps.start.sps_max_sub_layers_minus1),
            is_shown=bool(pic_output_flag) and not is_skipped,
        )

    def formats(self) -> list[StreamFormat]:
        """See `Parser.formats`."""
        return [_format(unit) for unit in self._parameter_sets() if self._is_sps(unit)]

    @staticmethod
    def _is_sps(unit: bytes) -> bool:
        return unit[0] >> 1 == _SPS

    @staticmethod
    def _read_up_to_cropping(unit: bytes) -> tuple[int, bytes, Bits, tuple[int, int]]:
        payload = rbsp(unit[2:])
        bits = Bits(payload)
        return 2, payload, bits, _read_start(bits).coded_size


def _is_of_other_layer(unit: memoryview | bytes) -> bool:
    """Whether nuh_layer_id is not 0."""
    return bool(unit[0] & 1 or unit[1] >> 3)


def _read_sps(bits: Bits) -> _Sps:
    start = _read_start(bits)
    conformance_window_flag = bits.u(1)
    window = (bits.ue(), bits.ue(), bits.ue(), bits.ue()) if conformance_window_flag else (0, 0, 0, 0)
    bits.skip_ue("bit_depth_luma_minus8", "bit_depth_chroma_minus8")
    log2_max_pic_order_cnt_lsb_minus4 = bits.ue()
    return _Sps(start, window, log2_max_pic_order_cnt_lsb_minus4 + 4)


def _read_start(bits: Bits) -> _Start:
    """Reads an SPS from `bits` up to conformance_window_flag."""
    bits.skip(sps_video_parameter_set_id=4)
    sps_max_sub_layers_minus1 = bits.u(3)
    bits.skip(sps_temporal_id_nesting_flag=1)
    bits.skip(general_profile_space=2, general_tier_flag=1, general_profile_idc=5)
    bits.skip(general_profile_compatibility_flags=32)
    general_progressive_source_flag, general_interlaced_source_flag = bits.u(1), bits.u(1)
    bits.skip(general_non_packed_constraint_flag=1, general_frame_only_constraint_flag=1)
    bits.skip(general_reserved_zero_43bits=43, general_inbld_flag=1, general_level_idc=8)
    present = [(bits.u(1), bits.u(1)) for _ in range(sps_max_sub_layers_minus1)]
    if sps_max_sub_layers_minus1:
        bits.skip(reserved_zero_2bits=2 * (8 - sps_max_sub_layers_minus1))
    for sub_layer_profile_present_flag, sub_layer_level_present_flag in present:
        if sub_layer_profile_present_flag:
            bits.skip(sub_layer_profile_space=2, sub_layer_tier_flag=1, sub_layer_profile_idc=5)
            bits.skip(sub_layer_profile_compatibility_flags=32, sub_layer_source_and_constraint_flags=48)
        if sub_layer_level_present_flag:
            bits.skip(sub_layer_level_idc=8)
    sps_seq_parameter_set_id = bits.ue()
    chroma_format_idc = bits.ue()
    separate_colour_plane_flag = bits.u(1) if chroma_format_idc == 3 else 0
    pic_width_in_luma_samples, pic_height_in_luma_samples = bits.ue(), bits.ue()
    return _Start(
        sps_seq_parameter_set_id,
        bool(general_interlaced_source_flag and not general_progressive_source_flag),
        sps_max_sub_layers_minus1,
        separate_colour_plane_flag,
        (pic_height_in_luma_samples, pic_width_in_luma_samples),
    )


def _format(unit: bytes) -> StreamFormat:
    bits = Bits(rbsp(unit[2:]))
    sps = _read_sps(bits)
    reorder_frames = 0
    sps_sub_layer_ordering_info_present_flag = bits.u(1)
    for _ in range(sps.start.sps_max_sub_layers_minus1 + 1 if sps_sub_layer_ordering_info_present_flag else 1):
        sps_max_dec_pic_buffering_minus1, sps_max_num_reorder_pics = bits.ue(), bits.ue()
        reorder_frames = min(sps_max_dec_pic_buffering_minus1, sps_max_num_reorder_pics)
        bits.skip_ue("sps_max_latency_increase_plus1")
    left, right, top, bottom = (2 * side for side in sps.window)  # 4:2:0, the only format that hardware gets
    height, width = sps.start.coded_size
    return StreamFormat(
        size=(height - top - bottom, width - left - right),
        offset=(top, left),
        has_fields=sps.start.is_interlaced,
        reorder_frames=reorder_frames,
    )
