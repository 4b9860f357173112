"""benchmark.py as a person runs it; what it measures is not judged here, only that it measures."""

import importlib.util
import json

import pytest

import benchmarks.model
import dali_pipelines.loader
from benchmarks.contestants import CONTESTANTS
from benchmarks.loader import find_videos
from benchmarks.work import WholeFileSource
from dali_pipelines import ClipLoader, InputError, Manifest
from dali_pipelines.manifest import probe
from tests.training.conftest import run
from tests.videos import textured, write_video


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    for number in range(2):
        pictures = textured(30, height=64, width=80, seed=number)
        write_video(folder / f"{number}.mp4", pictures, options={"x264-params": "keyint=12:scenecut=0"})
    return folder


@pytest.fixture(scope="module")
def report(videos):
    settings = ["--workers", 1, "--clips", 8, "--rounds", 1, "--num-frames", 4, "--crop-size", 32, "--batch-size", 4]
    done = run("benchmark.py", "loader", videos, *settings, "--out", videos / "out")
    assert done.returncode == 0, done.stderr
    return json.loads((videos / "out" / "loader.json").read_text()) | {"stdout": done.stdout}


def test_every_contestant_is_timed_or_says_why_not(report):
    assert set(report["contestants"]) == set(CONTESTANTS)
    for name, result in report["contestants"].items():
        if importlib.util.find_spec(CONTESTANTS[name].package) is None:
            assert result["failure"] == "not installed" and not result["runs"]
        elif not CONTESTANTS[name].is_peer:  # a peer may be installed without the libraries that it needs
            assert result["failure"] is None and len(result["runs"]) == 1
        for measured in result["runs"]:
            assert measured["clips_per_second"] > 0 and measured["cpu_ms_per_clip"] > 0 and measured["main_mib"] > 1
    assert report["contestants"]["ours"]["runs"][0]["worker_mib"] > 1


def test_whole_files_for_dalis_decoder(tmp_path, monkeypatch):
    """As they are fed to NVDEC; here to what DALI decodes on the CPU."""
    video = probe(write_video(tmp_path / "a.webm", textured(20, height=64, width=80), codec="vp9"))
    settings = dict(mode="validate", batch_size=1, num_frames=4, crop_size=32, decode="dali", workers=0)
    selected, whole = (ClipLoader(Manifest([video]), **settings) for _ in range(2))
    expected = next(iter(selected)).clips
    monkeypatch.setattr(dali_pipelines.loader, "ClipSource", WholeFileSource)
    assert (next(iter(whole)).clips == expected).all() and whole.stats.packets_read == 0


def test_soak(videos):
    done = run("benchmark.py", "soak", videos, "--clips", 200, "--workers", 1, "--crop-size", 32)
    assert done.returncode == 0 and "flat; 0 faults, fall-backs none" in done.stdout, done.stderr + done.stdout


def test_all_decode_the_same(report):
    for result in report["contestants"].values():
        assert result.get("wrong_frames", 0) == 0
        assert result.get("mean_difference_of_255", 0) < 8  # rectangles of whole pixels against exact ones
    assert report["contestants"]["ours"]["mean_difference_of_255"] == 0


def test_says_what_was_measured(report, videos):
    assert report["settings"]["clips_per_run"] == 8
    assert [video["path"] for video in report["videos"]] == [str(videos / "0.mp4"), str(videos / "1.mp4")]
    assert report["videos"][0]["codec"] == "h264" and report["videos"][0]["largest_keyframe_spacing"] == 12
    assert 0 < report["packets"]["fed"] <= report["packets"]["in_window"] <= 30
    assert report["machine"]["versions"]["av"] and report["machine"]["cores"] >= 1
    ratio = report["ratios"]["floor"]
    assert 0 < ratio["low"] <= ratio["median"] <= ratio["high"] and ratio["target"] == 0.9
    assert "ours / floor: " in report["stdout"]


@pytest.fixture(scope="module")
def model_report(tmp_path_factory):
    out = tmp_path_factory.mktemp("model")
    settings = ["--size", "tiny", "--batch-size", 1, "--num-frames", 2, "--image-size", 32, "--rounds", 1]
    done = run("benchmark.py", "model", *settings, "--out", out)
    assert done.returncode == 0, done.stderr
    return json.loads((out / "model.json").read_text()) | {"stdout": done.stdout}


def test_network_is_timed_beside_its_peers_or_says_why_not(model_report):
    contestants, failures = model_report["contestants"], model_report["not_measured"]
    named = set(benchmarks.model.CONTESTANTS) - {benchmarks.model.COMPILED}
    assert set(contestants) | set(failures) == named and not set(contestants) & set(failures)
    for name, reason in failures.items():
        assert name not in ("ours", "ours checkpointed") and f"{name}: not measured: {reason}" in model_report["stdout"]
    for result in contestants.values():
        for measured in result.values():
            assert measured["training_mib"] >= 0
            for task in ("forward", "training"):
                assert measured[task]["seconds"] > 0 and measured[task]["gflops"] > 0
    assert contestants["ours"]["bf16"]["training"]["ours_is"] == {"median": 1, "low": 1, "high": 1}
    assert set(model_report["matmul_gflops"]) == {"float32", "bf16"}


def test_targets_of_the_network(model_report):
    for peer in set(benchmarks.model.PEERS) & set(model_report["contestants"]):
        found = [target for target in model_report["targets"] if target["what"].endswith(peer)]
        assert len(found) == 5
        for target in found:
            low, high = target.get("at_least", 0), target.get("at_most", float("inf"))
            met = low <= target["value"] <= high
            assert target["met"] == met and target["what"] in model_report["stdout"]


def test_hugging_face_has_our_names():
    """Every one of our weights has a place in Hugging Face's network, and the other way round: loading is strict."""
    pytest.importorskip("transformers")
    work = benchmarks.model.Work("tiny", batch_size=1, num_frames=2, image_size=32, device="cpu")
    expected = benchmarks.model.ours(work).logits()
    for fused in (False, True):
        assert (benchmarks.model.hugging_face(work, fused=fused).logits() - expected).abs().max() < 1e-4


def test_network_that_computes_something_else_is_refused(monkeypatch, tmp_path):
    class Other(benchmarks.model.TorchContestant):
        def logits(self):
            return super().logits() + 1e-3

    def other(work):
        return Other(work.network(), work.clips(), work)

    monkeypatch.setitem(benchmarks.model.CONTESTANTS, "huggingface eager", other)
    settings = dict(size="tiny", batch_size=1, num_frames=2, image_size=32, rounds=1, device="cpu", compile=False)
    with pytest.raises(InputError, match=r"huggingface eager: its logits are 1.0e-03 from ours"):
        benchmarks.model.benchmark_model(**settings, out=tmp_path)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(size="huge"), "--size huge: expected one of base, small, tiny"),
        (dict(image_size=40), "image_size 40 is not a multiple of patch_size 16"),
        (dict(device="tpu"), "--device tpu: expected cpu or cuda"),
    ],
)
def test_networks_that_cannot_be_measured(tmp_path, changes, message):
    settings = dict(size="tiny", batch_size=1, num_frames=2, image_size=32, rounds=1, device="cpu", compile=False)
    with pytest.raises(InputError, match=message):
        benchmarks.model.benchmark_model(**(settings | changes), out=tmp_path)


CASES = [
    ("text.mp4", "text.mp4: not a video that FFmpeg can read"),
    ("gone.mp4", "gone.mp4: no such file or directory"),
    ("gone.csv", "gone.csv: no such manifest"),
    ("empty", "empty: no videos there"),
    ("turned.mp4", "turned.mp4: is turned by 90 degrees"),
]


@pytest.mark.parametrize("name, message", CASES, ids=[name for name, _ in CASES])
def test_videos_that_cannot_be_used(tmp_path, name, message):
    (tmp_path / "text.mp4").write_text("no video " * 50)
    (tmp_path / "empty").mkdir()
    write_video(tmp_path / "turned.mp4", textured(3, height=32, width=32), rotation=90)
    with pytest.raises(InputError, match=message):
        find_videos([str(tmp_path / name)])
