"""What headers say that a hardware decoder may treat otherwise than FFmpeg."""

import av
import numpy as np
import pytest

from dali_pipelines import ClipLoader, Manifest
from dali_pipelines.bitstream.parser import StreamFormat, UncertainError
from dali_pipelines.files import open_video
from dali_pipelines.hardware_check import check_hardware
from dali_pipelines.packets import remux, video_stream
from dali_pipelines.probe import probe
from tests.videos import decode_all, filter_packets, numbered, read_numbers, write_video

SIZE = {"height": 144, "width": 176}


def look(path):
    """(format of the first set of parameters, why hardware is not given it or "")."""
    with open_video(path) as container:
        file = remux(container, np.arange(probe(path).frames))
        context = video_stream(container).codec_context
        formats = file.parser.formats()
        try:
            check_hardware(file, context)
        except UncertainError as error:
            return formats[0] if formats else None, str(error)
    return formats[0] if formats else None, ""


def x264(params):
    return {"options": {"x264-params": params}}


def x265(params):
    return {"options": {"x265-params": f"log-level=none:{params}"}}


@pytest.mark.parametrize(
    "codec, suffix, settings, expected",
    [
        ("h264", "mp4", {}, StreamFormat(size=(144, 176), reorder_frames=2, matrix=2, full_range=False)),
        ("h264", "mp4", x264("bframes=0"), StreamFormat((144, 176), reorder_frames=0, matrix=2, full_range=False)),
        ("h264", "mp4", x264("bframes=1"), StreamFormat((144, 176), reorder_frames=1, matrix=2, full_range=False)),
        ("h264", "mkv", {"matrix": 1}, StreamFormat((144, 176), reorder_frames=2, matrix=1, full_range=False)),
        (
            "h264",
            "mp4",
            {"matrix": 6, "full_range": True} | x264("nal-hrd=vbr:vbv-maxrate=900:vbv-bufsize=900:sar=4/3"),
            StreamFormat((144, 176), reorder_frames=2, matrix=6, full_range=True),
        ),
        ("hevc", "mp4", {}, StreamFormat(size=(144, 176), reorder_frames=2)),
        ("hevc", "mp4", x265("bframes=0"), StreamFormat(size=(144, 176), reorder_frames=0)),
        ("mpeg4", "avi", {}, StreamFormat(size=(144, 176), matrix=2, full_range=False)),
        ("vp8", "webm", {}, StreamFormat(matrix=2, full_range=False)),
    ],
)
def test_headers_are_parsed_as_written(tmp_path, codec, suffix, settings, expected):
    path = write_video(tmp_path / f"a.{suffix}", numbered(12, **SIZE), codec=codec, **settings)
    assert look(path) == (expected, "")


@pytest.mark.parametrize("codec, size", [("h264", (136, 170)), ("hevc", (136, 170)), ("mpeg4", (127, 95))])
def test_sizes_cropped_from_whole_blocks(tmp_path, codec, size):
    path = write_video(tmp_path / "a.mp4", numbered(6, height=size[0], width=size[1]), codec=codec)
    found, reason = look(path)
    assert found.size == size and found.offset == (0, 0) and not reason


def make_fields(folder):
    return write_video(folder / "a.mp4", numbered(12, **SIZE), **x264("tff=1:bframes=3"))


def make_fields_of_mpeg4(folder):
    return write_video(folder / "a.mp4", numbered(12, **SIZE), codec="mpeg4", options={"flags": "+ildct+ilme"})


def make_data_partitions(folder):
    return write_video(folder / "a.mp4", numbered(12, **SIZE), codec="mpeg4", options={"data_partitioning": "1"})


def make_small_buffer(folder):
    """B pyramids take two frames in the buffer; at level 1, frames of 352x288 leave room for one."""
    rgb_frames = numbered(12, height=288, width=352)
    return write_video(folder / "a.mp4", rgb_frames, **x264("level=10:bframes=3:b-pyramid=normal"))


def make_cropped(folder):
    whole = write_video(folder / "whole.mp4", numbered(12, height=144, width=192))
    return filter_packets(whole, folder / "a.mp4", "h264_metadata=crop_left=16:crop_top=8")


def make_cropped_hevc(folder):
    whole = write_video(folder / "whole.mp4", numbered(12, height=144, width=192), codec="hevc")
    return filter_packets(whole, folder / "a.mkv", "hevc_metadata=crop_left=16:crop_top=8")


def make_untold_matrix(folder):
    """BT.709 in the container, nothing in the stream."""
    whole = write_video(folder / "whole.mp4", numbered(12, **SIZE))
    with av.open(whole) as original, av.open(str(folder / "a.mkv"), "w") as container:
        stream = container.add_stream_from_template(original.streams.video[0])
        stream.codec_context.colorspace = 1
        for packet in original.demux(video=0):
            if packet.size:
                packet.stream = stream
                container.mux(packet)
    return str(folder / "a.mkv")


def make_untold_range(folder):
    return write_video(folder / "a.webm", numbered(12, **SIZE), codec="vp9", full_range=True)


def make_rare_matrix(folder):
    return write_video(folder / "a.mp4", numbered(12, **SIZE), matrix=7)


TROUBLE = [
    (make_fields, "its frames may be coded as fields"),
    (make_fields_of_mpeg4, "its frames may be coded as fields"),
    (make_data_partitions, "data partitions"),
    (make_small_buffer, "frames are held back for longer than a decoder's buffer allows"),
    (make_cropped, "its frames are cropped at the top or left, or not to the size of the container"),
    (make_cropped_hevc, "its frames are cropped at the top or left, or not to the size of the container"),
    (make_untold_matrix, "its colour matrix is in the container only"),
    (make_untold_range, "its full colour range does not show in its pixel format"),
    (make_rare_matrix, "its colour matrix is neither BT.601 nor BT.709 nor BT.2020"),
]


@pytest.mark.slow
@pytest.mark.parametrize("make, reason", TROUBLE)
def test_streams_that_hardware_could_get_wrong_are_decoded_by_the_host(tmp_path, make, reason):
    """Named, counted, and the right frames."""
    path = make(tmp_path)
    assert look(path)[1] == reason
    made = ClipLoader(
        Manifest([probe(path)]),
        mode="validate",
        batch_size=1,
        num_frames=12,
        crop_size=32,
        stride=None,
        workers=0,
        decode="nvdec",
    )
    batch = next(iter(made))
    assert batch.engines == ("host",) and made.stats.fallbacks == {f"not by NVDEC: {reason}": 1}
    shown = read_numbers(np.moveaxis(decode_all(path), -1, 0) / 255)
    assert read_numbers(batch.clips[0].numpy()) == shown[:12]
