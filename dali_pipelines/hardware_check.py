"""Streams that a hardware decoder may treat otherwise than FFmpeg does.

NVDEC itself decides in which order frames are shown, which part of the coded frame is shown, and in which colours. It
goes by the stream's own headers. FFmpeg also uses the container, and adapts while it decodes. `check_hardware`
finds the streams for which the two could differ; the host decodes these.
"""

import av

from dali_pipelines.bitstream.parser import UNSPECIFIED_MATRIX, UncertainError
from dali_pipelines.packets import Remuxed

_MATRICES = {UNSPECIFIED_MATRIX: "BT.601", 5: "BT.601", 6: "BT.601", 1: "BT.709", 9: "BT.2020", 10: "BT.2020"}
"""matrix_coefficients -> the conversion to RGB that torchcodec, on the CPU and a GPU, and FFmpeg all take for it."""
_FULL_RANGE = 2  # AVCOL_RANGE_JPEG


def check_hardware(file: Remuxed, context: av.VideoCodecContext) -> None:
    """Raises `UncertainError` if a hardware decoder may not give FFmpeg's frames for these packets."""
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
    """How FFmpeg converts the frames to RGB: "BT.601", "BT.709" or "BT.2020"; "" for other ways."""
    return _MATRICES.get(context.colorspace, "")


def _check_colours(context: av.VideoCodecContext) -> None:
    """Raises `UncertainError` for colours, of any codec, that torchcodec does not convert as FFmpeg does."""
    if not matrix_of(context):
        raise UncertainError("its colour matrix is neither BT.601 nor BT.709 nor BT.2020")
    if _is_full_range(context) and not (context.pix_fmt or "").startswith("yuvj"):
        raise UncertainError("full range that its pixel format does not tell")


def _is_full_range(context: av.VideoCodecContext) -> bool:
    return context.color_range == _FULL_RANGE or (context.pix_fmt or "").startswith("yuvj")
