"""Frames, seconds and clips/s worked out by hand, and the command."""

import json
from dataclasses import replace

import av
import numpy as np
import pytest

from dali_pipelines import InputError, Manifest
from dali_pipelines.host_decoder import decode_frames
from dali_pipelines.manifest import probe
from dali_pipelines.packets import PacketReader
from preparation import budget as module
from preparation.budget import (
    SEEK,
    SELECTED,
    START,
    TRANSCODED,
    VIEWS,
    Decode,
    Timings,
    budget,
    clips_per_second,
    core_seconds,
    engine_seconds,
    judge,
    multiply_adds,
    network_demand,
    seeking_frames,
    survey,
    table,
    transcoded_frames,
    transcoded_size,
)
from preparation.gpus import GPUS, HD, SMALL_GAIN, Generation, Gpu, find_gpu
from tests.training.conftest import run
from tests.videos import textured, write_video
from training.config import load_config

GPU = Gpu("X", 5, Generation(1000, {"h264": 100, "vp9": 300}), video_mhz=500, tflops=2)
CONFIG = """
data: {num_frames: 3, crop_size: 32, stride: null}
model: {embed_dim: 8, depth: 1, num_heads: 2}
"""
# Groups of 8, shown: I b b P b b P P; decoded: I P b b P b b P.
GROUPS_OF_8 = "keyint=8:min-keyint=8:scenecut=0:bframes=2:b-adapt=0:b-pyramid=none:open-gop=0"
AS_TRANSCODED = "keyint=16:min-keyint=16:scenecut=0:bframes=3:b-adapt=0:b-pyramid=none:open-gop=0"


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Manifest:
    """24 pictures in groups of 8; and 20 of a kind whose headers settle nothing, which NVDEC does not take either."""
    folder = tmp_path_factory.mktemp("budget")
    pictures = textured(24, height=144, width=160)
    write_video(folder / "groups.mp4", pictures, options={"x264-params": GROUPS_OF_8})
    write_video(folder / "444.mp4", pictures[:20], pix_fmt="yuv444p")
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


def test_frames_of_a_known_structure(videos, config):
    """Three frames of 24, the whole video each time: 0, 11.5 and 23, truncated.

    start: all 24. seek: of group 0 the I (1); of group 1 frame 11, its first P: I P (2); of group 2 frame 23, its last
    P: all 8. selected: of group 2 only I P P P (4).
    transcoded to groups of 16: of the first, frames 0 and 11: I, the three P up to 12, and the B 11 itself (5); of the
    second, 8 long, frame 7, its last: I P P (3).
    """
    for gpu in (None, GPUS["a100"]):
        found = survey(videos, config, 2, gpu)
        one = found.decodes[found.rows.index(0) * module.WINDOWS]
        expected = {START: 24, SEEK: 1 + 2 + 8, SELECTED: 1 + 2 + 4, TRANSCODED: 5 + 3, VIEWS: 1 + 2 + 4}
        assert one.frames == expected and one.area == 144 * 160
        assert one.on_gpu == bool(gpu) and one.packets_read == 24 and one.fallback == ""
        uncertain = found.decodes[found.rows.index(1) * module.WINDOWS]
        assert (uncertain.fallback, uncertain.on_gpu) == ("4:4:4", False)
        assert [uncertain.frames[way] for way in (START, SEEK, SELECTED)] == [20, 20, 20]
        assert len(found.decodes) == 2 * module.WINDOWS and not found.unreadable


def test_counted_is_what_the_workers_feed(videos, config):
    """In random windows of two seconds; the counts are those of `host_decoder`."""
    config.data.stride, config.data.target_fps = 5, 30  # 3 * 5 / 30 s
    found = survey(videos, config, 2, None)
    plans = [module._plan(found, row, epoch) for row in found.rows for epoch in range(module.WINDOWS)]
    assert len({tuple(plan.positions) for plan in plans}) > 3
    for place, plan in enumerate(plans):
        row = found.rows[place // module.WINDOWS]
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
    # 12 needs what is before its keyframe: from where it stands, 6 to 12 (7).
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


def test_size_after_transcoding():
    assert transcoded_size(480, 640) == (256, 341) and transcoded_size(640, 480) == (341, 256)
    assert transcoded_size(240, 320) == (240, 320)  # never enlarged


def test_rates_of_an_engine():
    # 100 frames/s at 1000 MHz: 50 at 500. A quarter of the pixels: 4 times as fast; tiny ones: 9 times, no faster.
    assert [GPU.frames_per_second("h264", area) for area in (2 * HD, HD, HD / 4, 100)] == [25, 50, 200, 50 * SMALL_GAIN]
    assert (GPU.frames_per_second("vp9", HD), GPU.frames_per_second("mpeg4", HD)) == (150, 50)
    assert GPU.frames_per_second("av1", HD) is None and GPUS["l4"].frames_per_second("av1", HD) > 0
    # NVIDIA: 771 frames/s of Turing's engine at 1860 MHz; A100 has the same at 1290 MHz.
    assert GPUS["a100"].frames_per_second("h264", HD) == pytest.approx(534.7, abs=0.1)


def test_clips_of_the_decoders():
    decode = Decode("h264", HD, HD // 4, True, True, {SELECTED: 10, TRANSCODED: 4, START: 30}, 30)
    # 10 frames at 50/s are 0.2 s of an engine; transcoded, 4 at 200/s are 0.02 s. 2 GPUs have 10 engines.
    assert [engine_seconds(decode, way, GPU) for way in (SELECTED, TRANSCODED)] == [0.2, 0.02]
    assert clips_per_second(10, 0.2) == 50 and clips_per_second(10, 0.2, clips=2) == 100
    by_workers = decode._replace(on_gpu=False)
    assert engine_seconds(decode._replace(transcoded_on_gpu=False), TRANSCODED, GPU) == 0
    assert engine_seconds(by_workers, SELECTED, GPU) == 0 and engine_seconds(by_workers, TRANSCODED, GPU) == 0.02
    # A worker: 10 ms for headers, 90 for 10 pictures. All 30: 10 + 270; 4 of a quarter of the size: 10 + 9.
    timings = Timings(decode=0.1, headers=0.01, feed=0.004)
    seconds = [core_seconds([decode], way, timings, on_gpu=False) for way in (SELECTED, START, TRANSCODED)]
    assert seconds == pytest.approx([0.1, 0.28, 0.019])
    # NVDEC decodes one of two: 4 ms for that, 100 for the other.
    assert core_seconds([decode, by_workers], SELECTED, timings, on_gpu=True) == pytest.approx(0.052)


def test_demand_of_a_network(config):
    # T = 3 frames of N = 4 patches, D = 8, 400 classes; multiply-adds:
    embedding = 12 * (3 * 16 * 16) * 8
    over_time = 12 * (5 * 8 * 8 + 2 * 3 * 8)  # q, k, v, two projections; two products of 3 x 3
    over_space = 15 * (4 * 8 * 8 + 2 * 5 * 8)  # with the class token of each frame
    mlp = 13 * 8 * 8 * 8
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


def test_the_report_says_who_bounds_and_what_would_help(videos, config, monkeypatch):
    monkeypatch.setattr(module, "_MEASURE_S", 0.05)
    settings = {"samples": 5, "gpu": GPU, "gpus": 2, "cores": None}
    # groups.mp4, 7 frames at 9 * 50/s: 15.6 ms of one of 10 engines, 643 clips/s.
    path = str(videos.root / "one.csv")
    report = budget(path, config, network_clips=1000, **settings)
    assert report["ways"][SELECTED]["nvdec_clips_per_second"] == pytest.approx(10 * 450 / 7)
    assert report["bound_by"] == "NVDEC" and report["times"] == pytest.approx(2000 * 7 / 4500)
    assert "NVDEC (10 engines) can supply 643 clips/s, and the network could take 2,000, 3.1 times" in report["verdict"]
    assert "wait for 68% of the time" in report["verdict"] and "too near" not in report["verdict"]
    # Transcoding does not help 24 pictures in groups of 8; two clips of the same three frames take one decode.
    assert report["remedies"][0].endswith("--gop 16`: nothing to gain")
    assert "side by side in a batch): 3.5 frames a clip instead of 7; NVDEC would supply 1,286" in report["remedies"][1]
    assert "not enough" in report["remedies"][1]
    assert "CPU cores" not in report["limits"]  # those of the machine that trains are not known

    report = budget(path, config, network_clips=300, **settings)
    assert report["bound_by"] == "network" and "too near to call" in report["verdict"]
    report = budget(path, config, network_clips=1e7, **settings | {"cores": 1})
    assert set(report["limits"]) == {"NVDEC", "CPU cores"}
    config.data.decode = "host"
    report = budget(path, config, network_clips=1e7, **settings | {"cores": 1})
    assert report["bound_by"] == "CPU cores" and list(report["limits"]) == ["CPU cores"]


def test_files_that_nvdec_does_not_take_are_for_the_workers(videos, config, monkeypatch):
    monkeypatch.setattr(module, "_MEASURE_S", 0.05)
    report = budget(str(videos.root / "both.csv"), config, samples=5, gpu=GPU, gpus=1, cores=1, network_clips=1)
    assert report["decoded_by_nvdec"] == 0.5 and report["fallbacks"] == {"4:4:4": module.WINDOWS}
    assert "50% of the clips are decoded by the workers, not by NVDEC" in report["assumptions"]
    # An engine works for one of two clips.
    assert report["ways"][SELECTED]["nvdec_clips_per_second"] == pytest.approx(2 * 5 * 450 / 7)
    assert f"{module.WINDOWS} of {2 * module.WINDOWS} windows are decoded from the file's start: 4:4:4" in table(report)
    ways = report["ways"][SELECTED]
    assert ways["feeding_clips_per_second"] > ways["cores_clips_per_second"]


def test_without_a_gpu_the_network_is_measured_and_shares_the_cores(videos, config, monkeypatch):
    monkeypatch.setattr(module, "_MEASURE_S", 0.05)
    config.device = "cpu"
    report = budget(str(videos.root / "one.csv"), config, samples=5, gpu=None, gpus=1, cores=None, network_clips=None)
    a, b = report["network"]["clips_per_second"], report["ways"][SELECTED]["cores_clips_per_second"]
    assert report["bound_by"] == ("network" if a < b else "CPU cores")
    assert "measured here" in report["network"]["how"]
    assert f"Both need the same cores: together about {module._number(1 / (1 / a + 1 / b))}" in report["verdict"]
    assert report["ways"][SELECTED]["nvdec_clips_per_second"] is None
    # Of a decode that is measured here, headers are a part.
    assert 0 < report["core_ms_per_clip"]["headers"] < report["core_ms_per_clip"]["decode"]


def test_views_per_decode_share_a_decode(videos, config, monkeypatch):
    monkeypatch.setattr(module, "_MEASURE_S", 0.05)
    config.data.views_per_decode = 2
    report = budget(str(videos.root / "one.csv"), config, samples=5, gpu=GPU, gpus=1, cores=None, network_clips=1)
    assert report["ways"][SELECTED]["frames_per_clip"] == 7 / 2 and report["ways"][VIEWS]["frames_per_clip"] == 7 / 4
    assert report["ways"][SELECTED]["nvdec_clips_per_second"] == pytest.approx(2 * 5 * 450 / 7)


def test_bad_input_is_named(videos, config):
    settings = {"samples": 5, "gpu": GPU, "gpus": 1, "cores": None, "network_clips": 1}
    with pytest.raises(InputError, match="--gpu p100: not known; expected one of v100, t4, a100, h100, l4, l40s"):
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
        "v100": 1, "t4": 2, "a100": 5, "h100": 7, "l4": 4, "l40s": 3
    }  # fmt: skip
    assert not GPUS["a100"].unconfirmed and len(GPUS["v100"].unconfirmed) == 2
    assert find_gpu("A100") is GPUS["a100"] and find_gpu(None) is None
    assert replace(GPU, video_mhz=1000).frames_per_second("h264", HD) == 100


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
