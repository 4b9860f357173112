"""Finds streams that a hardware decoder may treat differently from FFmpeg.

NVDEC decides the order of frames, the part of the coded frame that is shown, and its colours from the stream's own
headers. FFmpeg also uses the container, and adapts while decoding. `check_hardware` finds the streams for which the two
could differ; the host decodes these.
"""

import av

from dali_pipelines.bitstream.parser import UNSPECIFIED_MATRIX, UncertainError
from dali_pipelines.packets import Remuxed

_MATRICES = {UNSPECIFIED_MATRIX: "BT.601", 5: "BT.601", 6: "BT.601", 1: "BT.709", 9: "BT.2020", 10: "BT.2020"}
"""matrix_coefficients -> the conversion to RGB on which torchcodec (on the CPU and a GPU) and FFmpeg agree."""
_FULL_RANGE = 2  # AVCOL_RANGE_JPEG


def check_hardware(file: Remuxed, context: av.VideoCodecContext) -> None:
    """Raises `UncertainError` if a hardware decoder may give other frames than FFmpeg for these packets."""
    _check_colours(context)
    for format in file.parser.formats():
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


def matrix_of(context: av.VideoCodecContext) -> str:
    """How FFmpeg converts the frames to RGB: "BT.601", "BT.709" or "BT.2020"; "" for any other conversion."""
    return _MATRICES.get(context.colorspace, "")


def _check_colours(context: av.VideoCodecContext) -> None:
    """Raises `UncertainError` for colours that torchcodec converts differently from FFmpeg, whatever the codec."""
    if not matrix_of(context):
        raise UncertainError("its colour matrix is neither BT.601 nor BT.709 nor BT.2020")
    if _is_full_range(context) and not (context.pix_fmt or "").startswith("yuvj"):
        raise UncertainError("its full colour range does not show in its pixel format")


def _is_full_range(context: av.VideoCodecContext) -> bool:
    return context.color_range == _FULL_RANGE or (context.pix_fmt or "").startswith("yuvj")
