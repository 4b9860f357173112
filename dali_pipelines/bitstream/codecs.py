"""The table of codecs: their parsers, the containers for remuxing their packets, and their decoders.

The host (PyAV) decodes all other codecs, frame by frame from the start of the file.
"""

from collections.abc import Callable
from typing import NamedTuple

from dali_pipelines.bitstream.av1 import Av1Parser
from dali_pipelines.bitstream.h264 import H264Parser
from dali_pipelines.bitstream.hevc import HevcParser
from dali_pipelines.bitstream.mjpeg import MjpegParser
from dali_pipelines.bitstream.mpeg4 import Mpeg4Parser
from dali_pipelines.bitstream.parser import Parser, UncertainError
from dali_pipelines.bitstream.vp8 import Vp8Parser
from dali_pipelines.bitstream.vp9 import Vp9Parser


class Codec(NamedTuple):
    """What the loader knows about a codec."""

    parser: Callable[[bytes], Parser]
    matroska_id: bytes
    """Matroska's CodecID."""
    remuxed_as: str = "mp4"
    """FFmpeg's name of the container for remuxing its packets: MP4, or Matroska if MP4 does not fit."""
    is_frame_a_packet: bool = False
    """Frames are counted by packets if `PacketReader` is certain about them, otherwise by decoding."""
    learns_padding: bool = False
    """FFmpeg learns from the first frames how the encoder pads: see `host_decoder`."""
    fed_share: float = 1.0
    """Share of a group's frames up to the wanted one that are fed; the rest are B frames that no other refers to.
    Measured on Kinetics-like files."""
    dali_cpu: bool = False
    """`fn.decoders.video` decodes it on the CPU (DALI 2.4 documentation)."""
    dali_gpu: bool = True
    nvdec: int | None = None
    """The driver's cudaVideoCodec, if torchcodec's NVDEC engine takes it (torchcodec 0.11 to 0.13); otherwise None."""
    nvdec_block: int = 1
    """For NVDEC, both sides of coded frames must be multiples of this many pixels. torchcodec reuses a hardware decoder
    for frames of the same size in whole blocks, and then crops as for the first (`uncrops`). How NVDEC rounds sizes is
    unknown: these are the largest blocks."""
    uncrops: bool = False
    """NVDEC gets parameter sets without a cropping window, and frames of any size are cropped afterwards.

    torchcodec (0.11 to 0.13) reuses a hardware decoder for another stream of the same coded size, but the decoder still
    crops as for the first one: without an error, 340x256 and 352x256 would get each other's frames
    (meta-pytorch/torchcodec#1704)."""
    has_h273_matrix: bool = False
    """Headers give the colour matrix in H.273's numbers, which torchcodec reads from NVDEC. VP9 has its own numbers.
    BT.2020 fails torchcodec's own comparison with the CPU (meta-pytorch/torchcodec#1267)."""


CODECS = {
    "av1": Codec(Av1Parser, b"V_AV1", is_frame_a_packet=True, nvdec=11, nvdec_block=64),
    "h264": Codec(
        H264Parser,
        b"V_MPEG4/ISO/AVC",
        is_frame_a_packet=True,
        fed_share=0.5,
        nvdec=4,
        nvdec_block=16,
        uncrops=True,
        has_h273_matrix=True,
    ),
    "hevc": Codec(
        HevcParser, b"V_MPEGH/ISO/HEVC", fed_share=0.5, nvdec=8, nvdec_block=16, uncrops=True, has_h273_matrix=True
    ),
    "mjpeg": Codec(
        MjpegParser, b"V_MJPEG", remuxed_as="matroska", is_frame_a_packet=True, dali_cpu=True, dali_gpu=False
    ),
    "mpeg4": Codec(Mpeg4Parser, b"V_MPEG4/ISO/ASP", learns_padding=True, nvdec=2, nvdec_block=16),
    "vp8": Codec(Vp8Parser, b"V_VP8", remuxed_as="matroska", dali_cpu=True, nvdec=9, nvdec_block=16),
    "vp9": Codec(Vp9Parser, b"V_VP9", remuxed_as="matroska", dali_cpu=True, nvdec=10, nvdec_block=64),
}
"""FFmpeg's name -> codec."""


def make_parser(codec: str, extradata: bytes) -> Parser:
    """The parser of a stream's headers. Raises `UncertainError` if its codec is not in the table."""
    if codec not in CODECS:
        raise UncertainError(f"no parser for {codec}")
    try:
        return CODECS[codec].parser(extradata)
    except IndexError:
        raise UncertainError("a header is cut off") from None
