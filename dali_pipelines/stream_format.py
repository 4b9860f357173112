"""What the headers of a stream say that a hardware decoder may treat otherwise than FFmpeg does.

NVDEC itself decides in which order frames are shown, which part of the coded frame is shown, and in which colours. It
goes by the stream's own headers. FFmpeg also uses the container, and adapts while it decodes. `check_hardware`
finds the streams for which the two could differ; the host decodes these.

Sources: ITU-T H.264 7.3.2.1, annexes A.3.1 (MaxDpbMbs) and E.1; H.265 7.3.2.2; ISO/IEC 14496-2 6.2.3.
"""

from typing import NamedTuple

import av

from dali_pipelines.packets import (
    Bits,
    H264Sps,
    Remuxed,
    Rewrite,
    UncertainError,
    h264_sps,
    hevc_sps,
    hevc_up_to_window,
    rbsp,
)

_UNSPECIFIED = 2
_MATRICES = {_UNSPECIFIED: "BT.601", 5: "BT.601", 6: "BT.601", 1: "BT.709", 9: "BT.2020", 10: "BT.2020"}
"""matrix_coefficients -> the conversion to RGB that torchcodec, on the CPU and a GPU, and FFmpeg all take for it."""
CROPPED_LATER = ("h264", "hevc")
"""Codecs of which NVDEC is given frames without cropping (`uncrop`), whatever size the video has."""
_FULL_RANGE = 2  # AVCOL_RANGE_JPEG


class StreamFormat(NamedTuple):
    """What one set of parameters says; None where it is not read."""

    size: tuple[int, int] | None = None
    """(height, width) of the frames that are shown, in pixels."""
    offset: tuple[int, int] = (0, 0)
    """(rows, columns) that are cut off above and to the left of them."""
    has_fields: bool = False
    """Frames may be coded as two fields, or are fields."""
    reorder_frames: int | None = None
    """Frames that a decoder holds back at most."""
    matrix: int | None = None
    """matrix_coefficients of H.273: 1 is BT.709, 5 and 6 BT.601, 2 unspecified."""
    full_range: bool | None = None
    rare: str = ""
    """A tool of the codec that hardware may not have; "" for none."""


def check_hardware(file: Remuxed, context: av.VideoCodecContext) -> None:
    """Raises `UncertainError` where a hardware decoder may not give FFmpeg's frames for these packets."""
    _check_colours(context)
    for format in _formats(context.codec.canonical_name, file.parameter_sets):
        if format.has_fields:
            raise UncertainError("its frames may be coded as fields")
        if format.rare:
            raise UncertainError(format.rare)
        if format.reorder_frames is not None and file.reorder_delay > format.reorder_frames:
            raise UncertainError("frames are held back for longer than a decoder's buffer allows")
        if format.offset != (0, 0) or format.size not in (None, (context.height, context.width)):
            raise UncertainError("its frames are cropped at the top or left, or not to the size of the container")
        if format.matrix is not None and _MATRICES.get(format.matrix) != matrix_of(context):
            raise UncertainError("its colour matrix is in the container only")
        if format.full_range is not None and format.full_range != _is_full_range(context):
            raise UncertainError("its colour range is in the container only")


def _is_sps(codec: str, unit: bytes) -> bool:
    return unit[0] & 31 == 7 if codec == "h264" else unit[0] >> 1 == 33


def uncrop(codec: str, parameter_sets: list[bytes]) -> Rewrite | None:
    """Parameter sets of H.264 or HEVC without cropping, and the size that frames have with them; None without cropping.

    torchcodec (0.11 to 0.13) reuses a hardware decoder for another stream of the same coded size, but the decoder crops
    as it did for the first one: 340x256 and 352x256 would get each other's frames, without an error
    (meta-pytorch/torchcodec#1704). So decoders are given whole frames, which are cropped afterwards.
    """
    if codec not in CROPPED_LATER:
        return None
    found = {unit: _without_cropping(codec, unit) for unit in parameter_sets if _is_sps(codec, unit)}
    sizes = {size for _, size in found.values()}
    if len(sizes) != 1:
        raise UncertainError("parameter sets of several sizes")
    changed = {old: new for old, (new, _) in found.items() if new != old}
    return Rewrite(changed, sizes.pop()) if changed else None


def _without_cropping(codec: str, unit: bytes) -> tuple[bytes, tuple[int, int]]:
    """(the SPS with the flag of its cropping window cleared, coded (height, width))."""
    head = 1 if codec == "h264" else 2
    payload = rbsp(unit[head:])
    bits = Bits(payload)
    if codec == "h264":
        size = _h264_up_to_cropping(bits)[0]
    else:
        *_, size = hevc_up_to_window(bits)
    flag = bits.place
    if not bits.u(1):
        return unit, size
    for _ in range(4):
        bits.ue()
    text = bin(int.from_bytes(b"\1" + payload))[3:]
    rest = text[bits.place :].rstrip("0")  # ends with the stop bit
    text = text[:flag] + "0" + rest
    text += "0" * (-len(text) % 8)
    return unit[:head] + _with_emulation_prevention(int(text, 2).to_bytes(len(text) // 8)), size


def _with_emulation_prevention(payload: bytes) -> bytes:
    """The opposite of `rbsp`."""
    out, zeros = bytearray(), 0
    for byte in payload:
        if zeros == 2 and byte <= 3:
            out.append(3)
            zeros = 0
        out.append(byte)
        zeros = zeros + 1 if byte == 0 else 0
    return bytes(out)


def matrix_of(context: av.VideoCodecContext) -> str:
    """ "BT.601", "BT.709" or "BT.2020": how FFmpeg converts the frames to RGB; "" for other ways."""
    return _MATRICES.get(context.colorspace, "")


def _check_colours(context: av.VideoCodecContext) -> None:
    """Of any codec: for colours that torchcodec does not convert as FFmpeg does."""
    if not matrix_of(context):
        raise UncertainError("its colour matrix is neither BT.601 nor BT.709 nor BT.2020")
    if _is_full_range(context) and not (context.pix_fmt or "").startswith("yuvj"):
        raise UncertainError("full range that its pixel format does not tell")


def _is_full_range(context: av.VideoCodecContext) -> bool:
    return context.color_range == _FULL_RANGE or (context.pix_fmt or "").startswith("yuvj")


def _formats(codec: str, parameter_sets: list[bytes]) -> list[StreamFormat]:
    if codec == "h264":
        groups = "slice groups" if any(map(_has_slice_groups, parameter_sets)) else ""
        return [_h264(unit)._replace(rare=groups) for unit in parameter_sets if _is_sps(codec, unit)]
    if codec == "hevc":
        return [_hevc(unit) for unit in parameter_sets if _is_sps(codec, unit)]
    if codec == "mpeg4":
        return [_mpeg4(unit) for unit in parameter_sets]
    if codec == "vp8":
        return [StreamFormat(matrix=_UNSPECIFIED, full_range=False)]
    return []


# -- H.264 --

_MAX_DPB_MBS = {
    9: 396, 10: 396, 11: 900, 12: 2376, 13: 2376, 20: 2376, 21: 4752, 22: 8100, 30: 8100, 31: 18000, 32: 20480,
    40: 32768, 41: 32768, 42: 34816, 50: 110400, 51: 184320, 52: 184320, 60: 696320, 61: 696320, 62: 696320,
}  # fmt: skip
"""level_idc -> macroblocks of the frames in a decoder's buffer (table A-1); 9 means level 1b."""
_BASELINE_TO_EXTENDED = (66, 77, 88)
_EXTENDED_SAR = 255


def _h264_up_to_cropping(bits: Bits) -> tuple[tuple[int, int], H264Sps, tuple[int, int, int]]:
    """(coded (height, width), the SPS, (profile, constraints, level)); `bits` are read up to frame_cropping_flag."""
    profile, constraints, level = bits.u(8), bits.u(8), bits.u(8)
    bits.ue()  # seq_parameter_set_id
    sps = h264_sps(profile, bits)
    if not sps.frames_only:
        bits.u(1)  # mb_adaptive_frame_field_flag
    bits.u(1)  # direct_8x8_inference_flag
    size = 16 * sps.map_units * (2 - sps.frames_only), 16 * sps.width
    return size, sps, (profile, constraints, level)


def _h264(unit: bytes) -> StreamFormat:
    bits = Bits(rbsp(unit[1:]))
    (height, width), sps, (profile, constraints, level) = _h264_up_to_cropping(bits)
    left = right = top = bottom = 0
    if bits.u(1):  # frame_cropping_flag; in units of 4:2:0, which is all that hardware is given
        left, right, top, bottom = bits.ue(), bits.ue(), bits.ue(), bits.ue()
    unit_y = 2 * (2 - sps.frames_only)
    if level == 11 and constraints & 0x10 and profile in _BASELINE_TO_EXTENDED:
        level = 9
    held = min(256 * _MAX_DPB_MBS.get(level, 0) // (height * width), 16)
    matrix, full_range, reorder_frames = _UNSPECIFIED, False, held
    if bits.u(1):  # vui_parameters_present_flag
        matrix, full_range, reorder_frames = _h264_vui(bits, held)
    return StreamFormat(
        size=(height - unit_y * (top + bottom), width - 2 * (left + right)),
        offset=(unit_y * top, 2 * left),
        has_fields=not sps.frames_only,
        reorder_frames=reorder_frames if sps.order_type != 2 else 0,
        matrix=matrix,
        full_range=full_range,
    )


def _has_slice_groups(unit: bytes) -> bool:
    """Whether a NAL unit is a PPS with flexible macroblock ordering."""
    if unit[0] & 31 != 8:
        return False
    bits = Bits(rbsp(unit[1:]))
    bits.ue(), bits.ue()  # pic_parameter_set_id, seq_parameter_set_id
    bits.u(1 + 1)  # entropy_coding_mode_flag, bottom_field_pic_order_in_frame_present_flag
    return bits.ue() > 0  # num_slice_groups_minus1


def _h264_vui(bits: Bits, held: int) -> tuple[int, bool, int]:
    """(matrix_coefficients, video_full_range_flag, frames held back), of which at most `held` fit into the buffer."""
    if bits.u(1) and bits.u(8) == _EXTENDED_SAR:
        bits.u(16 + 16)
    if bits.u(1):  # overscan_info_present_flag
        bits.u(1)
    matrix, full_range = _video_signal_type(bits)
    if bits.u(1):  # chroma_loc_info_present_flag
        bits.ue(), bits.ue()
    if bits.u(1):  # timing_info_present_flag
        bits.u(32 + 32 + 1)
    has_nal_hrd = bits.u(1)
    if has_nal_hrd:
        _skip_hrd(bits)
    has_vcl_hrd = bits.u(1)
    if has_vcl_hrd:
        _skip_hrd(bits)
    if has_nal_hrd or has_vcl_hrd:
        bits.u(1)  # low_delay_hrd_flag
    bits.u(1)  # pic_struct_present_flag
    if not bits.u(1):  # bitstream_restriction_flag
        return matrix, full_range, held
    bits.u(1)  # motion_vectors_over_pic_boundaries_flag
    for _ in range(4):  # max_bytes_per_pic_denom to log2_max_mv_length_vertical
        bits.ue()
    max_num_reorder_frames, max_dec_frame_buffering = bits.ue(), bits.ue()
    return matrix, full_range, min(held, max_num_reorder_frames, max_dec_frame_buffering)


def _video_signal_type(bits: Bits) -> tuple[int, bool]:
    """(matrix_coefficients, video_full_range_flag)."""
    if not bits.u(1):  # video_signal_type_present_flag
        return _UNSPECIFIED, False
    bits.u(3)  # video_format
    full_range = bool(bits.u(1))
    if not bits.u(1):  # colour_description_present_flag
        return _UNSPECIFIED, full_range
    bits.u(8 + 8)  # colour_primaries, transfer_characteristics
    return bits.u(8), full_range


def _skip_hrd(bits: Bits) -> None:
    count = bits.ue() + 1
    bits.u(4 + 4)  # bit_rate_scale, cpb_size_scale
    for _ in range(count):
        bits.ue(), bits.ue(), bits.u(1)
    bits.u(5 + 5 + 5 + 5)


# -- HEVC --


def _hevc(unit: bytes) -> StreamFormat:
    bits = Bits(rbsp(unit[2:]))
    _, sps = hevc_sps(bits)
    reorder_frames = 0
    for _ in range(sps.top_layer + 1 if bits.u(1) else 1):  # sps_sub_layer_ordering_info_present_flag
        buffered = bits.ue()  # sps_max_dec_pic_buffering_minus1
        reorder_frames = min(buffered, bits.ue())
        bits.ue()  # sps_max_latency_increase_plus1
    left, right, top, bottom = (2 * side for side in sps.window)  # 4:2:0, which is all that hardware is given
    return StreamFormat(
        size=(sps.height - top - bottom, sps.width - left - right),
        offset=(top, left),
        has_fields=sps.is_interlaced,
        reorder_frames=reorder_frames,
    )


# -- MPEG-4 part 2 --


def _mpeg4(unit: bytes) -> StreamFormat:
    bits = Bits(unit[1:])
    bits.u(1 + 8)  # random_accessible_vol, video_object_type_indication
    version = 1
    if bits.u(1):  # is_object_layer_identifier
        version = bits.u(4)
        bits.u(3)
    if bits.u(4) == 15:  # aspect_ratio_info: extended_PAR
        bits.u(8 + 8)
    if bits.u(1):  # vol_control_parameters
        bits.u(2 + 1)
        if bits.u(1):  # vbv_parameters
            bits.u(79)
    bits.u(2 + 1)  # video_object_layer_shape: rectangular
    resolution = bits.u(16)
    bits.u(1)
    if bits.u(1):  # fixed_vop_rate
        bits.u(max((resolution - 1).bit_length(), 1))
    bits.u(1)
    width = bits.u(13)
    bits.u(1)
    height = bits.u(13)
    bits.u(1)
    interlaced, _, sprite = bits.u(1), bits.u(1), bits.u(1 if version == 1 else 2)
    if sprite:
        rare = "global motion compensation"
    else:
        rare = "data partitions" if _mpeg4_is_partitioned(bits, version) else ""
    return StreamFormat(
        size=(height, width),
        has_fields=bool(interlaced),
        rare=rare,
        matrix=_UNSPECIFIED,
        full_range=False,
    )


def _mpeg4_is_partitioned(bits: Bits, version: int) -> bool:
    """data_partitioned; `bits` begin after sprite_enable, which is 0. True if it cannot be told."""
    if bits.u(1):  # not_8_bit
        bits.u(4 + 4)
    if bits.u(1):  # quant_type: MPEG
        for _ in range(2):
            if bits.u(1):  # load_intra_quant_mat, load_nonintra_quant_mat
                for _ in range(64):
                    if not bits.u(8):
                        break
    if version != 1:
        bits.u(1)  # quarter_sample
    if not bits.u(1):  # complexity_estimation_disable
        return True
    bits.u(1)  # resync_marker_disable
    return bool(bits.u(1))
