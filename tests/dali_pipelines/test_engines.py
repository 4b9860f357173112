"""Which engine decodes a video, and how much of the work each gets."""

import numpy as np
import pytest

from dali_pipelines.engines import CODECS, Limits, Routing, cpu_limits, estimate, general_limits, share_of_nvdec
from dali_pipelines.gpus import FIXED_SHARE, GPUS, HD, Generation, Gpu, gpu_of_device, unknown_gpu
from dali_pipelines.manifest import Manifest, Video
from dali_pipelines.plan import View

HOPPER = {
    ("h264", 8): Limits(48, 16, 4096, 4096, 65536, 7),
    ("hevc", 8): Limits(144, 144, 8192, 8192, 262144, 7),
    ("hevc", 10): Limits(144, 144, 8192, 8192, 262144, 7),
    ("vp9", 8): Limits(128, 128, 8192, 8192, 262144, 7),
}
NVDEC = Routing(engine="nvdec", on_gpu=True, limits=HOPPER)
VIEW = View(
    mode="train",
    num_frames=8,
    crop_size=224,
    stride=32,
    target_fps=30,
    past_end="fit",
    short_side=(256, 320),
    flip=True,
)


def video(codec="h264", *, frames=300, width=340, height=256, rotation=0, pixel_format="yuv420p", gop=250):
    return Video("a", 0, frames, 30.0, width, height, codec, rotation, pixel_format, 0, gop)


@pytest.mark.parametrize(
    "row, reason",
    [
        (video(), ""),
        (video(pixel_format=""), ""),
        (video(pixel_format="yuvj420p"), ""),
        (video("hevc", pixel_format="yuv420p10le"), ""),
        (video("av1"), "NVDEC here does not take av1 in yuv420p"),  # Hopper and A100
        (video("mpeg4"), "NVDEC here does not take mpeg4 in yuv420p"),  # not in these limits
        (video(pixel_format="yuv420p10le"), "NVDEC here does not take h264 in yuv420p10le"),
        (video(pixel_format="yuv444p"), "NVDEC here does not take h264 in yuv444p"),
        (video("hevc", width=142), "NVDEC here does not take frames of this size"),
        (video(width=4098), "NVDEC here does not take frames of this size"),
        (video(width=20, height=200), "NVDEC here does not take frames of this size"),
        (video(width=200, height=20), ""),  # 48 x 16 is the least
        (video(width=20, height=200, rotation=90), ""),  # turned: 200 x 20 as coded
        (video(width=341), "torchcodec does not convert frames with odd sides as FFmpeg does"),
    ],
)
def test_codecs_and_sizes_that_a_hopper_gpu_takes(row, reason):
    size = (row.width, row.height) if row.rotation else (row.height, row.width)
    assert NVDEC.refusal(row.codec, row.pixel_format, size) == reason
    assert NVDEC.takes(row) == (not reason)


def test_sides_in_whole_blocks():
    """torchcodec may mix up others; of H.264 and HEVC NVDEC is given whole blocks whatever the size is."""
    limits = Limits(48, 16, 8192, 8192, 65536, block=64)
    routing = Routing(engine="nvdec", on_gpu=True, limits={("vp9", 8): limits, ("h264", 8): limits})
    assert routing.takes(video("vp9", width=320)) and routing.takes(video(width=340))
    for size in ({"width": 340}, {"width": 320, "height": 240}):
        assert not routing.takes(video("vp9", **size))


def test_macroblocks_have_their_own_limit():
    limits = Limits(48, 16, 8192, 8192, 65536)
    assert limits.takes(4096, 4096) and not limits.takes(8192, 4096)


def test_the_table_of_codecs():
    """Who decodes what, before a file is opened."""
    codecs = [*sorted(CODECS), "png"]
    taken = {
        "nvdec": {"av1", "h264", "hevc", "mpeg4", "vp8", "vp9"},
        "dali on a GPU": {"av1", "h264", "hevc", "mpeg4", "vp8", "vp9"},
        "dali": {"mjpeg", "vp8", "vp9"},
        "host": set(),
    }
    for name, expected in taken.items():
        engine = name.split()[0]
        limits = cpu_limits() if engine == "nvdec" else None
        routing = Routing(engine=engine, on_gpu=name.endswith("GPU"), limits=limits)
        assert {codec for codec in codecs if routing.engine_for(video(codec), 0) == engine != "host"} == expected
        assert {codec for codec in codecs if routing.takes_codec(codec)} == expected


def test_dali_takes_eight_bits_only():
    dali = Routing(engine="dali", on_gpu=True, limits=HOPPER)
    assert dali.refusal("hevc", "yuv420p10le", (256, 340)) and not dali.refusal("hevc", "yuv420p", (256, 341))


def test_without_a_driver_only_common_limits_apply():
    limits = general_limits(decodes_av1=False)
    assert ("av1", 8) not in limits and ("av1", 8) in general_limits(decodes_av1=True)
    routing = Routing(engine="dali", on_gpu=True, limits=limits)
    assert routing.takes(video()) and not routing.takes(video(width=142)) and not routing.takes(video(width=4098))


# -- the share of the host --


def test_the_host_decodes_the_same_videos_every_time():
    def chosen(share, seed=0):
        routing = Routing(engine="nvdec", on_gpu=True, limits=HOPPER, host_share=share, seed=seed)
        return {number for number in range(2000) if routing.engine_for(video(), number) == "host"}

    assert chosen(0) == set() and len(chosen(1)) == 2000
    assert 540 < len(chosen(0.3)) < 660
    assert chosen(0.3) == chosen(0.3) < chosen(0.4)  # a larger share adds videos and takes none away
    assert chosen(0.3, seed=1) != chosen(0.3)


def test_the_share_keeps_engines_and_cores_busy():
    # 10 clips/s of NVDEC, whose feeding takes 10 * 0.1 = 1 of 3 cores; the other 2 decode 4 clips/s at 0.5 s.
    x = share_of_nvdec(nvdec=10, host=0.5, feed=0.1, cores=3, most=1)
    assert x == pytest.approx(10 / 14)
    assert share_of_nvdec(nvdec=10, host=0.5, feed=0.1, cores=3, most=0.6) == 0.6
    assert share_of_nvdec(nvdec=10, host=0.5, feed=0.1, cores=1, most=1) == 1  # no core is left
    assert share_of_nvdec(nvdec=10, host=0.1, feed=0.1, cores=9, most=1) == 0  # not worth feeding


def manifest(gop, count=90, **settings):
    sizes = [dict(width=340, height=256), dict(width=426, height=240), dict(width=340, height=256)]
    return Manifest([video(gop=gop, **(sizes[number % 3] | settings)) for number in range(count)])


@pytest.mark.parametrize("gop, nvdec, together", [(250, 159, 226), (16, 797, None)])
def test_the_estimate_is_near_what_was_measured_on_an_h200(gop, nvdec, together):
    """159 and 797 clips/s of NVDEC, 16 cores; 226 is the sum of what both give (docs/benchmarks.md)."""
    found = estimate(manifest(gop), VIEW, NVDEC, gpu=GPUS["h200"], cores=16)
    assert found.nvdec == pytest.approx(nvdec, rel=0.2)
    assert together is None or found.together == pytest.approx(together, rel=0.1)
    assert 0.05 < found.host_share < 0.4 and found.together > found.nvdec
    assert found == estimate(manifest(gop), VIEW, NVDEC, gpu=GPUS["h200"], cores=16)


def test_more_cores_and_fewer_engines_give_the_host_more():
    few, many = (estimate(manifest(250), VIEW, NVDEC, gpu=GPUS["h200"], cores=cores) for cores in (2, 64))
    assert few.host_share == 0 and many.host_share > 0.5
    one = Gpu("one", 1, GPUS["h200"].generation, 1545, 1)
    assert estimate(manifest(250), VIEW, NVDEC, gpu=one, cores=16).host_share > 0.7


def test_what_the_host_must_decode_counts():
    """Half of the videos are none for NVDEC: the cores have less time for the others."""
    rows = [video("h264" if number % 2 else "png") for number in range(64)]
    found = estimate(Manifest(rows), VIEW, NVDEC, gpu=GPUS["h200"], cores=16)
    assert found.host_share < estimate(manifest(250), VIEW, NVDEC, gpu=GPUS["h200"], cores=16).host_share
    none = estimate(Manifest([video("png")]), VIEW, NVDEC, gpu=GPUS["h200"], cores=16)
    assert none.nvdec == 0 and none.host_share == 0 and np.isfinite(none.together)


# -- GPUs --


def test_small_frames_have_a_fixed_cost():
    gpu = Gpu("x", 1, Generation(1000, {"h264": 100}), 500, 1)
    assert gpu.frames_per_second("h264", HD) == 50
    assert gpu.frames_per_second("h264", 0) == pytest.approx(50 / FIXED_SHARE)
    # Measured: 22,000 frames/s of 340x256 on the seven engines of an H200.
    assert 7 * GPUS["h200"].frames_per_second("h264", 340 * 256) == pytest.approx(22_000, rel=0.02)


@pytest.mark.parametrize(
    "name, key",
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("Tesla V100-SXM2-16GB", "v100"),
        ("Tesla T4", "t4"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", "l40s"),
    ],
)
def test_names_of_devices(name, key):
    assert gpu_of_device(name) is GPUS[key]


def test_an_unknown_gpu():
    assert gpu_of_device("NVIDIA GeForce RTX 4090") is None
    gpu = unknown_gpu("NVIDIA GeForce RTX 4090", 2)
    assert gpu.engines == 2 and gpu.frames_per_second("h264", HD) == 771 and "4090" in gpu.unconfirmed[0]
