"""H.264. Sources: ITU-T H.264 7.3 (syntax), 8.2.1 (picture order count), annexes A.3.1 (MaxDpbMbs) and E.1 (VUI)."""

from typing import NamedTuple

from dali_pipelines.bitstream.bits import Bits
from dali_pipelines.bitstream.nal import SLICE_HEADER_BYTES, Configuration, NalParser, rbsp, read_sets
from dali_pipelines.bitstream.parser import UNSPECIFIED_MATRIX, FrameHeader, StreamFormat, UncertainError

_SLICE, _PARTITIONS, _IDR_SLICE, _SPS, _PPS = 1, (2, 3, 4), 5, 7, 8  # nal_unit_type
_I_SLICES = (2, 7)  # slice_type
_HIGH_PROFILES = (100, 110, 122, 244, 44, 83, 86, 118, 128, 138, 139, 134, 135)
_BASELINE_TO_EXTENDED = (66, 77, 88)
_EXTENDED_SAR = 255
_MAX_DPB_MBS = {
    9: 396, 10: 396, 11: 900, 12: 2376, 13: 2376, 20: 2376, 21: 4752, 22: 8100, 30: 8100, 31: 18000, 32: 20480,
    40: 32768, 41: 32768, 42: 34816, 50: 110400, 51: 184320, 52: 184320, 60: 696320, 61: 696320, 62: 696320,
}  # fmt: skip
"""level_idc -> size of the decoded picture buffer in macroblocks (table A-1); 9 means level 1b."""


class _Sps(NamedTuple):
    """An SPS up to frame_mbs_only_flag, named after its syntax elements (`bits_` for log2_max_*_minus4 + 4)."""

    profile_idc: int
    constraint_flags: int
    level_idc: int
    seq_parameter_set_id: int
    bits_frame_num: int
    pic_order_cnt_type: int
    bits_pic_order_cnt_lsb: int
    gaps_in_frame_num_allowed: int
    pic_width_in_mbs: int
    pic_height_in_map_units: int
    """In macroblocks of a frame (`frame_mbs_only`) or of a field."""
    frame_mbs_only: int

    @property
    def coded_size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return 16 * self.pic_height_in_map_units * (2 - self.frame_mbs_only), 16 * self.pic_width_in_mbs


class _Pps(NamedTuple):
    sps: int


class H264Parser(NalParser[_Sps, _Pps]):
    """H.264 (ITU-T H.264)."""

    def __init__(self, extradata: bytes):
        super().__init__(extradata)
        self._count = 0
        self._is_intra = self._follows_gap = False  # of the frame being read
        self._frame_num: int | None = None  # of the last reference frame

    @staticmethod
    def _read_configuration(data: bytes) -> Configuration:
        sps = list(read_sets(data, 6, data[5] & 31))
        place = 6 + sum(2 + len(unit) for unit in sps)
        return Configuration((data[4] & 3) + 1, sps + list(read_sets(data, place + 1, data[place])))

    def _keep_set(self, unit: bytes) -> None:
        self._known.add(unit.rstrip(b"\0"))
        bits = Bits(rbsp(unit[1:]))
        if unit[0] & 31 == _SPS:
            sps = _read_sps(bits)
            self._sps[sps.seq_parameter_set_id] = sps
        elif unit[0] & 31 == _PPS:
            pic_parameter_set_id = bits.ue()
            self._pps[pic_parameter_set_id] = _Pps(bits.ue())

    def read(self, packet: memoryview) -> FrameHeader:
        """See `Parser.read`."""
        starts_group = is_reference = self._follows_gap = False
        self._is_intra = True
        counts: list[int] = []
        fields = 0
        for unit in self._units(packet):
            nal_unit_type = unit[0] & 31 if len(unit) > 1 else 0
            if nal_unit_type in (_SLICE, _IDR_SLICE):
                is_reference |= unit[0] & 0x60 > 0  # nal_ref_idc
                if unit[1] & 0x80:  # first_mb_in_slice 0: a frame or field begins
                    if nal_unit_type == _IDR_SLICE and not counts:
                        starts_group = True
                        self._sequence += 1
                        self._previous = self._frame_num = 0
                    count, is_field = self._read_slice(unit)
                    counts.append(count)
                    fields += is_field
            elif nal_unit_type in (_SPS, _PPS):
                self._check_set(bytes(unit))
            elif nal_unit_type in _PARTITIONS:
                raise UncertainError("data partitions")
        if not counts:
            raise UncertainError("a packet without the beginning of a frame")
        if fields == 1:
            raise UncertainError("packets with one field each")
        if len(counts) > max(fields, 1) or fields > 2:
            raise UncertainError("packets of several frames")
        return FrameHeader(
            (self._sequence, min(counts)),
            starts_group=starts_group,
            is_disposable=not is_reference,
            is_intra=self._is_intra,
            follows_gap=self._follows_gap,
        )

    def _read_slice(self, unit: memoryview | bytes) -> tuple[int, int]:
        """Returns (order count, field_pic_flag)."""
        bits = Bits(rbsp(bytes(unit[1:SLICE_HEADER_BYTES])))
        bits.skip_ue("first_mb_in_slice")
        slice_type = bits.ue()
        self._is_intra &= slice_type in _I_SLICES
        _, sps = self._parameters(bits.ue())
        frame_num = bits.u(sps.bits_frame_num)
        if self._frame_num is None:  # the file begins within a group
            self._frame_num = frame_num
        gap = (frame_num - self._frame_num) % (1 << sps.bits_frame_num)
        self._follows_gap |= gap > 1 and not sps.gaps_in_frame_num_allowed
        nal_ref_idc = unit[0] & 0x60
        if nal_ref_idc:
            self._frame_num = frame_num
        field_pic_flag = 0 if sps.frame_mbs_only else bits.u(1)
        if field_pic_flag:
            bits.skip(bottom_field_flag=1)
        if unit[0] & 31 == _IDR_SLICE:
            bits.skip_ue("idr_pic_id")
        self._count += 1
        if sps.pic_order_cnt_type == 2:  # shown as decoded
            return self._count, field_pic_flag
        pic_order_cnt_lsb = bits.u(sps.bits_pic_order_cnt_lsb)
        count = self._order_count(pic_order_cnt_lsb, sps.bits_pic_order_cnt_lsb)
        if nal_ref_idc:
            self._previous = count
        return count, field_pic_flag

    def formats(self) -> list[StreamFormat]:
        """See `Parser.formats`."""
        rare = "slice groups" if any(map(_has_slice_groups, self._parameter_sets())) else ""
        return [_format(unit)._replace(rare=rare) for unit in self._parameter_sets() if self._is_sps(unit)]

    @staticmethod
    def _is_sps(unit: bytes) -> bool:
        return unit[0] & 31 == _SPS

    @staticmethod
    def _read_up_to_cropping(unit: bytes) -> tuple[int, bytes, Bits, tuple[int, int]]:
        payload = rbsp(unit[1:])
        bits = Bits(payload)
        return 1, payload, bits, _read_sps_up_to_cropping(bits).coded_size


def _read_sps(bits: Bits) -> _Sps:
    profile_idc, constraint_flags, level_idc = bits.u(8), bits.u(8), bits.u(8)
    seq_parameter_set_id = bits.ue()
    if profile_idc in _HIGH_PROFILES:
        chroma_format_idc = bits.ue()
        if chroma_format_idc == 3:  # FFmpeg's decoding depends on the version of x264, which only the first packet has
            raise UncertainError("4:4:4")
        bits.skip_ue("bit_depth_luma_minus8", "bit_depth_chroma_minus8")
        bits.skip(qpprime_y_zero_transform_bypass_flag=1)
        seq_scaling_matrix_present_flag = bits.u(1)
        if seq_scaling_matrix_present_flag:
            for index in range(8):
                seq_scaling_list_present_flag = bits.u(1)
                if seq_scaling_list_present_flag:
                    _skip_scaling_list(bits, 16 if index < 6 else 64)
    bits_frame_num = bits.ue() + 4
    pic_order_cnt_type = bits.ue()
    if pic_order_cnt_type == 1:
        raise UncertainError("picture order count type 1")
    bits_pic_order_cnt_lsb = bits.ue() + 4 if pic_order_cnt_type == 0 else 0
    bits.skip_ue("max_num_ref_frames")
    gaps_in_frame_num_allowed = bits.u(1)
    pic_width_in_mbs, pic_height_in_map_units = bits.ue() + 1, bits.ue() + 1
    return _Sps(
        profile_idc,
        constraint_flags,
        level_idc,
        seq_parameter_set_id,
        bits_frame_num,
        pic_order_cnt_type,
        bits_pic_order_cnt_lsb,
        gaps_in_frame_num_allowed,
        pic_width_in_mbs,
        pic_height_in_map_units,
        frame_mbs_only=bits.u(1),
    )


def _skip_scaling_list(bits: Bits, size: int) -> None:
    last_scale = next_scale = 8
    for _ in range(size):
        if next_scale:
            code = bits.ue()
            delta_scale = (code + 1) // 2 * (1 if code % 2 else -1)
            next_scale = (last_scale + delta_scale) % 256
        last_scale = next_scale or last_scale


def _read_sps_up_to_cropping(bits: Bits) -> _Sps:
    """Reads an SPS from `bits` up to frame_cropping_flag."""
    sps = _read_sps(bits)
    if not sps.frame_mbs_only:
        bits.skip(mb_adaptive_frame_field_flag=1)
    bits.skip(direct_8x8_inference_flag=1)
    return sps


def _format(unit: bytes) -> StreamFormat:
    bits = Bits(rbsp(unit[1:]))
    sps = _read_sps_up_to_cropping(bits)
    height, width = sps.coded_size
    left = right = top = bottom = 0
    frame_cropping_flag = bits.u(1)
    if frame_cropping_flag:  # in units of 4:2:0, the only format that hardware gets
        left, right, top, bottom = bits.ue(), bits.ue(), bits.ue(), bits.ue()
    unit_y = 2 * (2 - sps.frame_mbs_only)
    level = sps.level_idc
    constraint_set3_flag = sps.constraint_flags & 0x10
    if level == 11 and constraint_set3_flag and sps.profile_idc in _BASELINE_TO_EXTENDED:
        level = 9
    held = min(256 * _MAX_DPB_MBS.get(level, 0) // (height * width), 16)
    matrix, full_range, reorder_frames = UNSPECIFIED_MATRIX, False, held
    vui_parameters_present_flag = bits.u(1)
    if vui_parameters_present_flag:
        matrix, full_range, reorder_frames = _read_vui(bits, held)
    return StreamFormat(
        size=(height - unit_y * (top + bottom), width - 2 * (left + right)),
        offset=(unit_y * top, 2 * left),
        has_fields=not sps.frame_mbs_only,
        reorder_frames=reorder_frames if sps.pic_order_cnt_type != 2 else 0,
        matrix=matrix,
        full_range=full_range,
    )


def _has_slice_groups(unit: bytes) -> bool:
    """Whether a NAL unit is a PPS with flexible macroblock ordering."""
    if unit[0] & 31 != _PPS:
        return False
    bits = Bits(rbsp(unit[1:]))
    bits.skip_ue("pic_parameter_set_id", "seq_parameter_set_id")
    bits.skip(entropy_coding_mode_flag=1, bottom_field_pic_order_in_frame_present_flag=1)
    num_slice_groups_minus1 = bits.ue()
    return num_slice_groups_minus1 > 0


def _read_vui(bits: Bits, held: int) -> tuple[int, bool, int]:
    """Reads (matrix_coefficients, video_full_range_flag, frames held back); at most `held` frames fit in the buffer."""
    aspect_ratio_info_present_flag = bits.u(1)
    if aspect_ratio_info_present_flag:
        aspect_ratio_idc = bits.u(8)
        if aspect_ratio_idc == _EXTENDED_SAR:
            bits.skip(sar_width=16, sar_height=16)
    overscan_info_present_flag = bits.u(1)
    if overscan_info_present_flag:
        bits.skip(overscan_appropriate_flag=1)
    matrix, full_range = _read_video_signal_type(bits)
    chroma_loc_info_present_flag = bits.u(1)
    if chroma_loc_info_present_flag:
        bits.skip_ue("chroma_sample_loc_type_top_field", "chroma_sample_loc_type_bottom_field")
    timing_info_present_flag = bits.u(1)
    if timing_info_present_flag:
        bits.skip(num_units_in_tick=32, time_scale=32, fixed_frame_rate_flag=1)
    nal_hrd_parameters_present_flag = bits.u(1)
    if nal_hrd_parameters_present_flag:
        _skip_hrd(bits)
    vcl_hrd_parameters_present_flag = bits.u(1)
    if vcl_hrd_parameters_present_flag:
        _skip_hrd(bits)
    if nal_hrd_parameters_present_flag or vcl_hrd_parameters_present_flag:
        bits.skip(low_delay_hrd_flag=1)
    bits.skip(pic_struct_present_flag=1)
    bitstream_restriction_flag = bits.u(1)
    if not bitstream_restriction_flag:
        return matrix, full_range, held
    bits.skip(motion_vectors_over_pic_boundaries_flag=1)
    bits.skip_ue("max_bytes_per_pic_denom", "max_bits_per_mb_denom")
    bits.skip_ue("log2_max_mv_length_horizontal", "log2_max_mv_length_vertical")
    max_num_reorder_frames, max_dec_frame_buffering = bits.ue(), bits.ue()
    return matrix, full_range, min(held, max_num_reorder_frames, max_dec_frame_buffering)


def _read_video_signal_type(bits: Bits) -> tuple[int, bool]:
    """(matrix_coefficients, video_full_range_flag)."""
    video_signal_type_present_flag = bits.u(1)
    if not video_signal_type_present_flag:
        return UNSPECIFIED_MATRIX, False
    bits.skip(video_format=3)
    video_full_range_flag = bool(bits.u(1))
    colour_description_present_flag = bits.u(1)
    if not colour_description_present_flag:
        return UNSPECIFIED_MATRIX, video_full_range_flag
    bits.skip(colour_primaries=8, transfer_characteristics=8)
    return bits.u(8), video_full_range_flag


def _skip_hrd(bits: Bits) -> None:
    cpb_cnt_minus1 = bits.ue()
    bits.skip(bit_rate_scale=4, cpb_size_scale=4)
    for _ in range(cpb_cnt_minus1 + 1):
        bits.skip_ue("bit_rate_value_minus1", "cpb_size_value_minus1")
        bits.skip(cbr_flag=1)
    bits.skip(initial_cpb_removal_delay_length_minus1=5, cpb_removal_delay_length_minus1=5)
    bits.skip(dpb_output_delay_length_minus1=5, time_offset_length=5)
