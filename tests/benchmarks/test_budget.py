"""Frames, seconds and clips/s worked out by hand, and the command."""

import json
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch

import benchmarks.budget.report
import benchmarks.budget.survey
from benchmarks.budget.cost import run_cost
from benchmarks.budget.rates import (
    SEEK,
    SELECTED,
    SHORT_SIDE,
    START,
    TRANSCODED,
    VIEWS,
    Decode,
    Timings,
    clip_rates,
    clips_per_second,
    core_seconds,
    engine_seconds,
    judge,
    limits,
    network_demand,
    seeking_frames,
    transcoded_frames,
)
from benchmarks.budget.report import budget
from benchmarks.budget.survey import WINDOWS, _plan, _routing, _view, multiply_adds, survey
from benchmarks.budget.text import _number, table
from commands import benchmark, prepare
from common.config import load_config
from dali_pipelines import InputError, Manifest
from dali_pipelines.engines import estimate
from dali_pipelines.gpus import GPUS, HD, Generation, Gpu, find_gpu
from dali_pipelines.host_decoder import decode_frames
from dali_pipelines.manifest import Video
from dali_pipelines.packets import PacketReader
from dali_pipelines.probe import probe
from preparation.transcode import copy_size
from tests.commands import run
from tests.videos import textured, write_video

GPU = Gpu("X", 5, Generation(1000, {"h264": 100, "vp9": 300}), video_mhz=500, tflops=2)
# Frames/s of an engine of that GPU for the videos below, 144x160 in short groups: 50 at 1080p; 90 times fewer pixels,
# of which 0.17 of the time stays; 25,000 instead of 22,000 for short groups.
RATE = 50 / (0.17 + 0.83 / 90) * 25 / 22
CONFIG = """
data: {num_frames: 3, crop_size: 32, stride: null}
model: {embed_dim: 8, depth: 1, num_heads: 2}
"""
# Groups of 8, shown: I b b P b b P P; decoded: I P b b P b b P.
GROUPS_OF_8 = "keyint=8:min-keyint=8:scenecut=0:bframes=2:b-adapt=0:b-pyramid=none:open-gop=0"
AS_TRANSCODED = "keyint=16:min-keyint=16:scenecut=0:bframes=3:b-adapt=0:b-pyramid=none:open-gop=0"


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Manifest:
    """24 frames in groups of 8; and 20 whose headers do not allow a selection, and which NVDEC does not take."""
    folder = tmp_path_factory.mktemp("budget")
    frames = textured(24, height=144, width=160)
    write_video(folder / "groups.mp4", frames, options={"x264-params": GROUPS_OF_8})
    write_video(folder / "444.mp4", frames[:20], pix_fmt="yuv444p")
    rows = [probe(folder / name)._replace(path=name) for name in ("groups.mp4", "444.mp4")]
    Manifest(rows, root=folder).write(folder / "both.csv")
    Manifest(rows[:1], root=folder).write(folder / "one.csv")
    gone = [rows[0]._replace(path=f"gone{n}.mp4") for n in range(2)]
    Manifest([*rows[:1], *gone], root=folder).write(folder / "gone.csv")
    Manifest(gone, root=folder).write(folder / "all_gone.csv")
    (folder / "c.yaml").write_text(CONFIG)
    return Manifest.read(folder / "both.csv")


@pytest.fixture
def config(videos):
    return load_config(str(videos.root / "c.yaml"))


@pytest.mark.slow
def test_frames_of_a_known_structure(videos, config):
    """Three frames of 24, the whole video each time: 0, 11.5 and 23, truncated.

    start: all 24. seek: of group 0 the I (1); of group 1 frame 11, its first P: I P (2); of group 2 frame 23, its last
    P: all 8. selected: of group 2 only I P P P (4).
    transcoded to groups of 16: of the first, frames 0 and 11: I, the three P up to 12, and the B 11 itself (5); of the
    second, 8 long, frame 7, its last: I P P (3).
    """
    for gpu in (None, GPUS["a100"]):
        found = survey(videos, config, 2, gpu)
        one = found.decodes[found.rows.index(0) * WINDOWS]
        expected = {START: 24, SEEK: 1 + 2 + 8, SELECTED: 1 + 2 + 4, TRANSCODED: 5 + 3, VIEWS: 1 + 2 + 4}
        assert one.frames == expected and one.area == 144 * 160
        assert one.on_gpu == bool(gpu) and one.packets_read == 24 and one.fallback == "" and one.has_short_groups
        uncertain = found.decodes[found.rows.index(1) * WINDOWS]
        assert (uncertain.fallback, uncertain.on_gpu) == ("4:4:4", False)
        assert [uncertain.frames[way] for way in (START, SEEK, SELECTED)] == [20, 20, 20]
        assert len(found.decodes) == 2 * WINDOWS and not found.unreadable


def test_counted_is_what_the_workers_feed(videos, config):
    """In random windows of two seconds; the counts are those of `host_decoder`."""
    config.data.stride, config.data.target_fps = 5, 30  # 3 * 5 / 30 s
    found = survey(videos, config, 2, None)
    plans = [_plan(found, row, epoch) for row in found.rows for epoch in range(WINDOWS)]
    assert len({tuple(plan.positions) for plan in plans}) > 3
    for place, plan in enumerate(plans):
        row = found.rows[place // WINDOWS]
        decoded = decode_frames(videos.file(row), plan.positions, size=(144, 160))
        counted = found.decodes[place]
        assert counted.fallback == decoded.fallback == ("" if row == 0 else "4:4:4")
        if row == 0:
            assert (counted.frames[SELECTED], counted.packets_read) == (decoded.packets_kept, decoded.packets_read)
        else:  # the decoder holds some back before the last one comes out
            assert counted.frames[SELECTED] == plan.positions[-1] + 1 <= decoded.packets_kept


def test_a_decoder_that_seeks():
    # 3: packets 0 to 3 (4). 5: on to 5 (2). 12: from the keyframe 10 (3). 14: on (2).
    assert seeking_frames([0, 10], [5, 3, 14, 12]) == 4 + 2 + 3 + 2
    # 12 needs the group before its keyframe: from its position, 6 to 12 (7).
    assert seeking_frames([0, 10], [3, 5, 12, 14], frozenset({12})) == 4 + 2 + 7 + 2


@pytest.mark.parametrize("count", [37, 100])  # the last group: I b b b P, and I b b P
def test_the_structure_after_transcoding_is_that_of_real_files(tmp_path, count):
    path = write_video(tmp_path / "a.mp4", textured(count, height=32, width=48), options={"x264-params": AS_TRANSCODED})
    rng = np.random.default_rng(count)
    cases = [np.array([n]) for n in range(count)]
    cases += [np.unique(rng.integers(0, count, 6)) for _ in range(60)]
    for positions in cases:
        with av.open(path) as container:
            selected = sum(map(len, PacketReader(container).select(positions).runs))
        assert transcoded_frames(positions.tolist(), count) == selected, positions


def test_size_after_transcoding(videos, config, monkeypatch):
    """It is the size that `prepare.py transcode` writes. Sides are even: torchcodec takes no other from NVDEC."""

    def shown(height: int, width: int) -> Video:
        return Video("a.mp4", 0, 10, 25.0, width, height, "h264", 0)

    assert copy_size(shown(480, 640), SHORT_SIDE) == (256, 340)
    assert copy_size(shown(640, 480), SHORT_SIDE) == (340, 256)
    assert copy_size(shown(240, 320), SHORT_SIDE) == (240, 320)  # never enlarged
    found = survey(videos, config, 2, GPUS["h200"])
    assert {(each.transcoded_area, each.transcoded_on_gpu) for each in found.decodes} == {(144 * 160, True)}
    monkeypatch.setattr(benchmarks.budget.survey, "SHORT_SIDE", 96)  # 96x106.67: NVDEC takes no sides below 144
    found = survey(videos, config, 2, GPUS["h200"])
    assert {(each.transcoded_area, each.transcoded_on_gpu) for each in found.decodes} == {(96 * 106, False)}


def test_rates_of_an_engine():
    # 100 frames/s at 1000 MHz: 50 at 500. 0.17 of a frame's time at 1080p stays, the rest is in proportion to the
    # pixels: twice as many take 0.17 + 1.66 = 1.83 of the time, a quarter 0.17 + 0.2075 = 0.3775, none 0.17.
    rates = [GPU.frames_per_second("h264", area) for area in (2 * HD, HD, HD / 4, 0)]
    assert rates == pytest.approx([50 / 1.83, 50, 50 / 0.3775, 50 / 0.17], rel=1e-12)
    assert (GPU.frames_per_second("vp9", HD), GPU.frames_per_second("mpeg4", HD)) == (150, 50)
    assert GPU.frames_per_second("av1", HD) is None and GPUS["l4"].frames_per_second("av1", HD) > 0
    # NVIDIA: 771 frames/s of Turing's engine at 1860 MHz; A100 has the same at 1290 MHz.
    assert GPUS["a100"].frames_per_second("h264", HD) == pytest.approx(534.7, abs=0.1)
    # Measured on an H200: 22,000 frames/s of 340x256 on 7 engines, and 25,000 in groups of 16.
    area, h200 = 340 * 256, GPUS["h200"]
    assert h200.engines * h200.frames_per_second("h264", area) == pytest.approx(22_000, rel=0.01)
    clip = Decode("h264", area, area, True, True, {SELECTED: 7000, TRANSCODED: 7000}, 7000)
    assert 7 * 7000 / engine_seconds(clip, SELECTED, h200) == pytest.approx(22_000, rel=0.01)
    assert 7 * 7000 / engine_seconds(clip, TRANSCODED, h200) == pytest.approx(25_000, rel=0.01)
    short = clip._replace(has_short_groups=True)  # transcoded already: nothing to gain
    assert engine_seconds(short, SELECTED, h200) == engine_seconds(clip, TRANSCODED, h200)


def test_clips_of_the_decoders():
    decode = Decode("h264", HD, HD // 4, True, True, {SELECTED: 10, TRANSCODED: 4, START: 30}, 30)
    # 10 frames at 50/s are 0.2 s of an engine. A transcoded frame takes 0.3775 of the time for a quarter of the pixels,
    # and 22/25 of that in short groups: 4 * 0.3775 / 50 * 0.88 = 0.026576 s. 2 GPUs have 10 engines.
    seconds = [engine_seconds(decode, way, GPU) for way in (SELECTED, TRANSCODED)]
    assert seconds == pytest.approx([0.2, 0.026576], rel=1e-12)
    assert clips_per_second(10, 0.2) == 50 and clips_per_second(10, 0.2, clips=2) == 100
    by_workers = decode._replace(on_gpu=False)
    assert engine_seconds(decode._replace(transcoded_on_gpu=False), TRANSCODED, GPU) == 0
    assert engine_seconds(by_workers, SELECTED, GPU) == 0
    assert engine_seconds(by_workers, TRANSCODED, GPU) == pytest.approx(0.026576, rel=1e-12)
    # A worker: 10 ms for headers, 90 for 10 frames. All 30: 10 + 270; 4 of a quarter of the size: 10 + 9.
    timings = Timings(decode=0.1, headers=0.01, feed=0.004)
    seconds = [core_seconds([decode], way, timings, host_share=1) for way in (SELECTED, START, TRANSCODED)]
    assert seconds == pytest.approx([0.1, 0.28, 0.019])
    # NVDEC decodes one of two: 4 ms for that, 100 for the other.
    assert core_seconds([decode, by_workers], SELECTED, timings, host_share=0) == pytest.approx(0.052)
    # And NVDEC leaves a quarter of what it takes: 0.375 * 4 + 0.625 * 100.
    assert core_seconds([decode, by_workers], SELECTED, timings, host_share=0.25) == pytest.approx(0.064)


# 10 frames take 0.1 s of its one engine: NVDEC decodes 10 clips/s. A core decodes 4, or feeds 20.
TINY = Gpu("TINY", 1, Generation(1000, {"h264": 100}), video_mhz=1000, tflops=1)
TINY_DECODE = Decode("h264", HD, HD, True, True, {SELECTED: 10}, 10)
TINY_TIMINGS = Timings(decode=0.25, headers=0.05, feed=0.05)


def tiny_rates(decodes: list[Decode], **settings):
    return clip_rates(decodes, SELECTED, TINY_TIMINGS, **{"gpu": TINY, "gpus": 1} | settings)


def test_nvdec_and_the_cores_together():
    # 3 cores: 0.5 feed NVDEC's 10 clips/s, and 2.5 decode 10 more. Alone they decode 12, or feed 60.
    rates = tiny_rates([TINY_DECODE], cores=3, host_share=None)
    assert (rates.nvdec, rates.cores, rates.feeding) == pytest.approx((10, 12, 60))
    assert (rates.together, rates.host_share) == pytest.approx((20, 0.5))
    assert rates.nvdec_limit == pytest.approx(rates.cores_limit)  # both are busy
    # Twice of everything, or two clips of a decode: twice as many clips, the same share.
    for rates in (
        tiny_rates([TINY_DECODE], gpus=2, cores=6, host_share=None),
        tiny_rates([TINY_DECODE], cores=3, clips=2, host_share=None),
    ):
        assert (rates.nvdec, rates.together, rates.host_share) == pytest.approx((20, 40, 0.5))
    # A quarter of a core does not even feed NVDEC: 5 clips/s, and it decodes none.
    rates = tiny_rates([TINY_DECODE], cores=0.25, host_share=None)
    assert (rates.together, rates.host_share) == pytest.approx((5, 0))
    # A share of 0.25 as configured: NVDEC makes 3 of 4 clips; 3 cores need 0.25 * 0.25 + 0.75 * 0.05 = 0.1 s a clip.
    rates = tiny_rates([TINY_DECODE], cores=3, host_share=0.25)
    assert (rates.nvdec_limit, rates.cores_limit, rates.together) == pytest.approx((10 / 0.75, 30, 10 / 0.75))


def test_clips_that_nvdec_does_not_take_are_the_cores_part():
    half = [TINY_DECODE, TINY_DECODE._replace(on_gpu=False)]
    # 5 cores: 0.5 feed 10 clips/s, 4.5 decode 18. NVDEC makes 10 of the 14 that it takes.
    rates = tiny_rates(half, cores=5, host_share=None)
    assert (rates.nvdec, rates.together, rates.host_share) == pytest.approx((20, 28, 4 / 14))
    # 1 core has to decode every second clip: 1 / (0.5 * 0.25 + 0.5 * 0.05). NVDEC gets all that it takes.
    rates = tiny_rates(half, cores=1, host_share=None)
    assert (rates.together, rates.host_share) == pytest.approx((1 / 0.15, 0))
    none = tiny_rates([half[1]], cores=3, host_share=None)
    assert (none.nvdec, none.feeding, none.together) == (None, None, pytest.approx(12))
    assert tiny_rates([TINY_DECODE], gpu=None, cores=3) == none


def test_limits_are_those_of_the_configured_decode():
    rates = tiny_rates([TINY_DECODE], cores=3, host_share=None)
    assert limits(rates, is_auto=True, knows_cores=True) == {"NVDEC and CPU cores": pytest.approx(20)}
    rates = tiny_rates([TINY_DECODE], cores=3)
    assert limits(rates, is_auto=False, knows_cores=True) == pytest.approx({"NVDEC": 10, "CPU cores": 60})
    for is_auto in (False, True):
        assert limits(rates, is_auto=is_auto, knows_cores=False) == pytest.approx({"NVDEC": 10})
        by_cores = tiny_rates([TINY_DECODE], gpu=None, cores=3)
        assert limits(by_cores, is_auto=is_auto, knows_cores=False) == pytest.approx({"CPU cores": 12})


def test_nvdec_takes_what_the_loader_gives_it(config):
    def takes(gpu: str | None, **fields) -> bool:
        video = Video("a", 0, 10, 25.0, 340, 256, "h264", 0, "yuv420p")._replace(**fields)
        return _routing(config, find_gpu(gpu)).takes(video)

    assert takes("h200") and not takes("h200", codec="mjpeg") and not takes(None)
    assert takes("h200", codec="mpeg4", width=320) and not takes("h200", codec="mpeg4")  # 340 is no multiple of 16
    assert takes("l4", codec="av1", width=320) and not takes("h200", codec="av1", width=320)
    assert not takes("h200", pixel_format="yuv444p") and not takes("h200", pixel_format="yuv420p10le")
    assert takes("h200", width=144) and not takes("h200", width=142)
    assert not takes("h200", width=341)  # torchcodec does not, DALI does
    config.data.decode = "dali"
    assert takes("h200", width=341) and takes("h200", codec="vp8")


def test_demand_of_a_network(config):
    # T = 3 frames of N = 4 patches, D = 8, 400 classes; multiply-adds:
    embedding = 12 * (3 * 16 * 16) * 8
    over_time = 12 * (5 * 8 * 8 + 2 * 3 * 8)  # q, k, v, two projections; two products of 3 x 3
    over_space = 15 * 2 * 8 * 8 + 3 * (2 * 8 * 8 + 2 * 5 * 8)  # in the last block, the class token asks
    mlp = 8 * 8 * 8
    assert multiply_adds(config, 400) == embedding + over_time + over_space + mlp + 400 * 8
    # 2e12 operations/s at 0.4 are 8e11; a clip of 1e9 takes 6e9: 133.3 a GPU.
    assert network_demand(1e9, GPU, 3) == pytest.approx(400)
    assert network_demand(1e9, GPU, 3, passes=4) == pytest.approx(300)


@pytest.mark.parametrize(
    "limits, bound_by, times",
    [
        ({"NVDEC": 500, "CPU cores": 300}, "network", 3),
        ({"NVDEC": 50, "CPU cores": 300}, "NVDEC", 2),
        ({"NVDEC": 500, "CPU cores": 25}, "CPU cores", 4),
    ],
)
def test_who_bounds(limits, bound_by, times):
    assert judge(100, limits) == (bound_by, times)


@pytest.mark.slow
def test_the_report_says_who_bounds_and_what_would_help(videos, config, monkeypatch):
    monkeypatch.setattr(benchmarks.budget.report, "_MEASURE_S", 0.05)
    settings = {"samples": 5, "gpu": GPU, "gpus": 2, "cores": None}
    # groups.mp4, 7 frames at 317.0/s: 22.1 ms of one of 10 engines, 452.9 clips/s.
    # 2000 / 452.9 = 4.416; 1 - 1 / 4.416 = 77 %.
    path = str(videos.root / "one.csv")
    report = budget(path, config, network_clips=1000, **settings)
    assert report["ways"][SELECTED]["nvdec_clips_per_second"] == pytest.approx(10 * RATE / 7)
    assert report["bound_by"] == "NVDEC" and report["times"] == pytest.approx(2000 * 7 / (10 * RATE))
    assert (
        "NVDEC (10 engines) can supply 453 clips/s, and the network could consume 2,000, 4.4 times" in report["verdict"]
    )
    assert "wait 77% of the time" in report["verdict"] and "too close" not in report["verdict"]
    # Transcoding does not help 24 frames in groups of 8; two clips of the same three frames take one decode.
    assert report["remedies"][0].endswith("--gop 16`: nothing to gain")
    assert (
        "(adjacent clips of a video in a batch): 3.5 frames per clip instead of 7; NVDEC would supply 906"
        in report["remedies"][1]
    )
    assert "not enough" in report["remedies"][1]
    assert "CPU cores" not in report["limits"]  # those of the machine that trains are not known

    report = budget(path, config, network_clips=200, **settings)  # 400 for two GPUs
    assert report["bound_by"] == "network" and "too close to call" in report["verdict"]
    report = budget(path, config, network_clips=1e7, **settings | {"cores": 1})
    assert report["bound_by"] == "NVDEC and CPU cores" and list(report["limits"]) == ["NVDEC and CPU cores"]
    config.data.decode = "nvdec"
    report = budget(path, config, network_clips=1e7, **settings | {"cores": 1})
    assert set(report["limits"]) == {"NVDEC", "CPU cores"}
    config.data.decode = "host"
    report = budget(path, config, network_clips=1e7, **settings | {"cores": 1})
    assert report["bound_by"] == "CPU cores" and list(report["limits"]) == ["CPU cores"]


@pytest.fixture
def tiny(videos, config, monkeypatch):
    """Reports for groups.mp4 with the figures of `TINY`: an engine that decodes 10 clips/s, 3 cores that decode 12."""
    # 7 frames of 144x160 in short groups in 0.1 s.
    gpu = replace(TINY, video_mhz=700 * (0.17 + 0.83 / 90) * 22 / 25)

    def with_tiny_times(*arguments):
        found = survey(*arguments)
        found.headers_s, found.feed_s = TINY_TIMINGS.headers, TINY_TIMINGS.feed
        return found

    monkeypatch.setattr(benchmarks.budget.report, "survey", with_tiny_times)
    monkeypatch.setattr(benchmarks.budget.report, "time_decoding", lambda *_: (TINY_TIMINGS.decode, 1))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def report(decode: str, *, cores: int | None = 3, network_clips: float = 100, **data):
        for name, value in ({"decode": decode} | data).items():
            setattr(config.data, name, value)
        settings = {"samples": 5, "gpus": 1, "cores": cores, "network_clips": network_clips}
        return budget(str(videos.root / "one.csv"), config, gpu=gpu, **settings)

    report.gpu = gpu
    return report


def test_auto_reports_both_engines(videos, config, tiny):
    report = tiny("auto")
    row = report["ways"][SELECTED]
    assert [row[f"{name}_clips_per_second"] for name in ("nvdec", "cores", "together")] == pytest.approx([10, 12, 20])
    supply = report["supply"]
    assert supply["by_engine"] == pytest.approx({"NVDEC": 10, "CPU cores": 10}) and supply["host_share"] == 0.5
    assert supply["clips_per_second"] == report["limits"]["NVDEC and CPU cores"] == pytest.approx(20)
    # What the loader itself takes, which does not know these times, and what that gives.
    routing, view = _routing(config, tiny.gpu), _view(config)
    default = estimate(Manifest.read(videos.root / "one.csv"), view, routing, gpu=tiny.gpu, cores=3).host_share
    # By its own costs, frames as small as these cost a core less to decode than to feed: all for the cores, 3 / 0.25.
    assert supply["default_host_share"] == default == 1
    assert supply["default_clips_per_second"] == pytest.approx(12)
    # 100 clips/s: NVDEC decodes 10, the cores 90: 10 * 0.05 + 90 * 0.25 = 23.
    assert report["needed"] == pytest.approx({"cores": 23, "decoded_by_cores": 0.9})
    assert "NVDEC (1 engine) and the CPU (3 cores) together can supply 20 clips/s" in report["verdict"]
    assert "100, 5.0 times as many" in report["verdict"] and "--cores" not in report["verdict"]
    assert "NVDEC and the CPU would supply 40 clips/s, 2.0 times as many, not enough" in report["remedies"][1]
    text = " ".join(table(report).split())
    assert "NVDEC decodes 10 clips/s and the CPU decodes 10 clips/s, together 20, with data.host_share=0.5," in text
    assert f"The loader's default is {default:g}: " in text
    assert report["remedies"][2].startswith("data.host_share=0.5: 20 clips/s instead of ")
    assert "as training does 7.0 10 clips/s 12 clips/s 20 clips/s" in text
    assert "the workers need 23 CPU cores like these, to feed NVDEC and to decode 90% of the clips." in text

    report = tiny("auto", network_clips=19)  # the loader's default makes less than that
    assert (
        report["bound_by"] == "network"
        and "times as many, with data.host_share=0.5; the loader's default is too slow" in report["verdict"]
    )
    report = tiny("auto", network_clips=8)  # NVDEC alone is enough: 8 * 0.05
    assert report["needed"] == pytest.approx({"cores": 0.4, "decoded_by_cores": 0}) and report["bound_by"] == "network"

    report = tiny("auto", host_share=0.25)  # NVDEC makes 3 of 4
    assert len(report["remedies"]) == 2
    assert report["supply"] == {
        "clips_per_second": pytest.approx(40 / 3),
        "by_engine": pytest.approx({"NVDEC": 10, "CPU cores": 10 / 3}),
        "host_share": 0.25,
    }


@pytest.mark.parametrize("decode", ["nvdec", "dali"])
def test_nvdec_reports_one_engine(tiny, decode):
    report = tiny(decode)
    assert report["limits"] == pytest.approx({"NVDEC": 10, "CPU cores": 60}) and report["bound_by"] == "NVDEC"
    supply = {"clips_per_second": pytest.approx(10), "by_engine": {"NVDEC": pytest.approx(10)}, "host_share": 0}
    assert report["supply"] == supply and report["ways"][SELECTED]["together_clips_per_second"] is None
    assert report["needed"] == pytest.approx({"cores": 5, "decoded_by_cores": 0})
    assert f"decode={decode}: NVDEC decodes 10 clips/s.\n" in table(report) and "together" not in table(report)
    assert any("DALI's own decoder is far slower" in each for each in report["assumptions"]) == (decode == "dali")


@pytest.mark.parametrize("data", [{"decode": "host"}, {"decode": "auto", "host_share": 1.0}])
def test_host_reports_one_engine(tiny, data):
    report = tiny(**data)
    assert report["limits"] == pytest.approx({"CPU cores": 12}) and report["needed"] is None
    supply = {"clips_per_second": pytest.approx(12), "by_engine": {"CPU cores": pytest.approx(12)}, "host_share": None}
    assert report["supply"] == supply
    row = report["ways"][SELECTED]
    assert [row[f"{name}_clips_per_second"] for name in ("nvdec", "feeding", "together")] == [None] * 3
    assert f"decode={data['decode']}: the CPU decodes 12 clips/s.\n" in table(report)


def test_without_cores_auto_is_nvdec_and_says_so(tiny):
    report = tiny("auto", cores=None)
    assert report["limits"] == pytest.approx({"NVDEC": 10}) and report["bound_by"] == "NVDEC"
    supply = {"clips_per_second": pytest.approx(10), "by_engine": {"NVDEC": pytest.approx(10)}, "host_share": None}
    assert report["supply"] == supply
    assert "The CPU of that machine decodes as well; give `--cores N` to include it" in report["verdict"]
    assert any("(those here; --cores N for others)" in each for each in report["assumptions"])
    assert report["needed"] == pytest.approx({"cores": 23, "decoded_by_cores": 0.9})  # as above


def test_assumptions_say_what_is_measured_and_what_is_derived(videos, config, monkeypatch):
    monkeypatch.setattr(benchmarks.budget.report, "_MEASURE_S", 0.05)

    def assumptions(gpu: str) -> str:
        settings = {"samples": 5, "gpus": 1, "cores": 1, "network_clips": 1}
        return "\n".join(budget(str(videos.root / "one.csv"), config, gpu=GPUS[gpu], **settings)["assumptions"])

    measured = "one H200, 2026-11-27, torchcodec's CUDA decoder, 16 threads"
    for gpu in ("h200", "h100"):
        said = assumptions(gpu)
        assert measured in said and "22,000 frames/s of 340x256" in said and "25,000 at GOP 16" in said
        assert ("unconfirmed: the H100 was not measured" in said) == (gpu == "h100")
        assert "640x360" not in said


def test_files_that_nvdec_does_not_take_are_for_the_workers(videos, config, monkeypatch):
    monkeypatch.setattr(benchmarks.budget.report, "_MEASURE_S", 0.05)
    report = budget(str(videos.root / "both.csv"), config, samples=5, gpu=GPU, gpus=1, cores=1, network_clips=1)
    assert report["taken_by_nvdec"] == 0.5 and report["fallbacks"] == {"4:4:4": WINDOWS}
    assert "50% of the clips are decoded by the workers, not by NVDEC" in report["assumptions"]
    # An engine works for one of two clips.
    assert report["ways"][SELECTED]["nvdec_clips_per_second"] == pytest.approx(2 * 5 * RATE / 7)
    assert f"{WINDOWS} of {2 * WINDOWS} windows are decoded from the file's start: 4:4:4" in table(report)
    ways = report["ways"][SELECTED]
    assert ways["feeding_clips_per_second"] > ways["cores_clips_per_second"]


def test_without_a_gpu_the_network_is_measured_and_shares_the_cores(videos, config, monkeypatch):
    monkeypatch.setattr(benchmarks.budget.report, "_MEASURE_S", 0.05)
    config.device = "cpu"
    report = budget(str(videos.root / "one.csv"), config, samples=5, gpu=None, gpus=1, cores=None, network_clips=None)
    a, b = report["network"]["clips_per_second"], report["ways"][SELECTED]["cores_clips_per_second"]
    assert report["bound_by"] == ("network" if a < b else "CPU cores")
    assert "measured here" in report["network"]["how"]
    assert f"Both need the same cores: together about {_number(1 / (1 / a + 1 / b))}" in report["verdict"]
    assert report["ways"][SELECTED]["nvdec_clips_per_second"] is None
    # Of a decode that is measured here, headers are a part.
    assert 0 < report["core_ms_per_clip"]["headers"] < report["core_ms_per_clip"]["decode"]


def test_views_per_decode_share_a_decode(videos, config, monkeypatch):
    monkeypatch.setattr(benchmarks.budget.report, "_MEASURE_S", 0.05)
    config.data.views_per_decode = 2
    report = budget(str(videos.root / "one.csv"), config, samples=5, gpu=GPU, gpus=1, cores=None, network_clips=1)
    assert report["ways"][SELECTED]["frames_per_clip"] == 7 / 2 and report["ways"][VIEWS]["frames_per_clip"] == 7 / 4
    assert report["ways"][SELECTED]["nvdec_clips_per_second"] == pytest.approx(2 * 5 * RATE / 7)


def test_bad_input_is_named(videos, config):
    settings = {"samples": 5, "gpu": GPU, "gpus": 1, "cores": None, "network_clips": 1}
    with pytest.raises(InputError, match="--gpu p100: not known; expected one of v100, t4, a100, h100, h200, l4, l40s"):
        find_gpu("p100")
    with pytest.raises(
        InputError, match=r"gone\d.mp4: no such file or directory; none of 2 sampled videos can be read"
    ):
        budget(str(videos.root / "all_gone.csv"), config, **settings)
    (videos.root / "none.csv").write_text("path,label,frames,fps,width,height,codec,rotation\n")
    with pytest.raises(InputError, match="none.csv: no videos in it"):
        budget(str(videos.root / "none.csv"), config, **settings)
    with pytest.raises(InputError, match="no such manifest"):
        budget(str(videos.root / "nowhere.csv"), config, **settings)
    with pytest.raises(InputError, match="--gpus 2: there is no GPU here"):
        budget(str(videos.root / "one.csv"), config, **settings | {"gpu": None, "gpus": 2, "network_clips": None})


def test_every_gpu_says_where_it_is_unsure():
    assert {name: gpu.engines for name, gpu in GPUS.items()} == {
        "v100": 1, "t4": 2, "a100": 5, "h100": 7, "h200": 7, "l4": 4, "l40s": 3
    }  # fmt: skip
    assert not GPUS["a100"].unconfirmed and len(GPUS["v100"].unconfirmed) == 2
    assert find_gpu("A100") is GPUS["a100"] and find_gpu(None) is None
    assert replace(GPU, video_mhz=1000).frames_per_second("h264", HD) == 100


@pytest.mark.slow
def test_as_a_user_runs_it(videos):
    arguments = ["budget", "-m", videos.root / "gone.csv", "-c", videos.root / "c.yaml", "--gpu", "h100", "--gpus", 8]
    done = run("prepare.py", *arguments, "-o", "data.num_frames=4", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert set(report) >= {"ways", "limits", "network", "bound_by", "times", "verdict", "remedies", "assumptions"}
    assert report["unreadable"]["count"] == 2 and "gone0.mp4" in " ".join(report["unreadable"]["files"])
    # Frames 0, 7, 15 and 23: of group 0 I P P P, as of each other group, whose last P it is.
    assert report["ways"][SELECTED]["frames_per_clip"] == 12 and report["sampled_videos"] == 3
    assert report["gpu"] == {"name": "H100", "gpus": 8, "engines": 56}
    text = table(report)
    assert "2 of 3 sampled videos cannot be read" in text and report["assumptions"][0][:40] in text
    done = run("prepare.py", *arguments[:3], "--gpu", "rtx")
    assert (done.returncode, done.stdout) == (2, "") and "--gpu rtx: not known; expected one of v100" in done.stderr


K400 = str(Path(__file__).parents[2] / "configs" / "pptimesformer_k400.yaml")


@pytest.mark.slow
def test_what_a_run_costs(in_process):
    cost = run_cost(load_config(K400), videos=240_258, classes=400, gpus=8)
    assert [row["gpu"] for row in cost["rows"]] == ["V100", "T4", "A100", "H100", "H200", "L4", "L40S"]
    h200, a100 = cost["rows"][4], cost["rows"][2]
    # 184 clips/s at 8 clips a step, measured: 20 * 240258 / (8 * 184) s.
    assert h200["network_is_measured"] and h200["network_hours"] == pytest.approx(
        20 * 240_258 / (8 * 184) / 3600, rel=0.01
    )
    assert not a100["network_is_measured"]
    assert a100["network_hours"] / h200["network_hours"] == pytest.approx(989 / 312)
    assert h200["decoding_hours"]["transcoded"] == pytest.approx(20 * 240_258 / (8 * 797) / 3600)
    # 2 GiB, 12 bytes and an average for each of 121.5 M parameters, 8 clips of 0.55 GiB.
    assert cost["gpu_gib"] == pytest.approx(2 + 16 * 121.5e6 / 2**30 + 8 * 0.55, rel=0.01)
    assert cost["videos_gb"] == pytest.approx(134)
    for average, count in (("null", 0), ("0.999", 1)):
        config = load_config(K400, ["train.swa_epochs=0", f"train.ema_decay={average}"])
        other = run_cost(config, videos=240_258, classes=400, gpus=8)
        assert cost["gpu_gib"] - other["gpu_gib"] == pytest.approx((1 - count) * 4 * 121.5e6 / 2**30, rel=0.01)
        assert cost["output_gb"] - other["output_gb"] == pytest.approx((1 - count) * 2 * 4 * 0.1215, rel=0.01)
    given = ("budget", "-c", K400, "--gpus", 1, "--gpu", "t4", "--videos", 1000, "-o", "train.epochs=10")
    status, out, error = in_process(prepare.main, *given)
    assert status == 0, error
    assert (
        "10 epochs of 1,000 videos on 1 GPU, 64 clips a step" in out and "GiB of 16 GB: too much; use more GPUs" in out
    )
    assert "Not measured: * is scaled from an H200" in " ".join(out.split())
    status, _, error = in_process(prepare.main, *given, "-m", "x.csv")
    assert status == 2 and "--videos is the number of videos without a manifest" in error


@pytest.mark.slow
def test_parameters_and_multiply_adds_of_configs(in_process):
    status, out, _ = in_process(benchmark.main, "model", "--flops")
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.count(".")}
    assert status == 0 and rows["pptimesformer_k400"] == ["8", "224", "400", "121.5", "186.1", "3", "558.3"]
    assert rows["pptimesformer_ucf101"][2:4] == ["101", "121.3"]
    assert set(rows) >= {path.stem for path in Path(K400).parent.glob("*.yaml")}
    status, out, _ = in_process(benchmark.main, "model", "--flops", "-c", K400, "-o", "data.num_frames=16")
    assert status == 0 and "372." in out and "demo" not in out
    status, _, error = in_process(benchmark.main, "model", "-c", K400)
    assert status == 2 and "-c and -o are for --flops" in error
