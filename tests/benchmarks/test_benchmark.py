"""benchmark.py as a person runs it; what it measures is not judged here, only that it measures."""

import contextlib
import importlib.util
import json
import multiprocessing
import os
import re
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

import benchmarks.model
import benchmarks.networks
import benchmarks.train
from benchmarks import fit, gpu_model
from benchmarks.contestants import CONTESTANTS
from benchmarks.copies import copy_videos
from benchmarks.gpu_contestants import FLOOR, HOST, NVDEC, PEER
from benchmarks.gpu_loader import benchmark_gpu_loader
from benchmarks.networks import COMPILED, NetworkWork, TorchContestant, hugging_face, ours
from benchmarks.train import LOADER, NETWORK, TOGETHER, Turn
from benchmarks.videos import find_videos
from common.config import load_config
from dali_pipelines import InputError, Manifest
from dali_pipelines.probe import probe
from tests.commands import fork_server, run_forked, run_here
from tests.videos import textured, write_video

pytestmark = pytest.mark.slow


@contextlib.contextmanager
def forked():
    """Contestants still have a new process each, but it is forked from one that has imported torch and DALI."""
    with mock.patch.object(multiprocessing, "get_context", return_value=fork_server()):
        yield


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    for number in range(2):
        frames = textured(30, height=64, width=80, seed=number)
        write_video(folder / f"{number}.mp4", frames, options={"x264-params": "keyint=12:scenecut=0"})
    return folder


@pytest.fixture(scope="module")
def report(videos):
    settings = ["--workers", 1, "--clips", 8, "--rounds", 1, "--num-frames", 4, "--crop-size", 32, "--batch-size", 4]
    with forked():
        done = run_here("benchmark.py", "loader", videos, *settings, "--device", "cpu", "--out", videos / "out")
    assert done.returncode == 0, done.stderr
    return json.loads((videos / "out" / "loader.json").read_text()) | {"stdout": done.stdout}


def test_every_contestant_is_timed_or_says_why_not(report):
    assert set(report["contestants"]) == set(CONTESTANTS)
    for name, result in report["contestants"].items():
        if importlib.util.find_spec(CONTESTANTS[name].package) is None:
            assert result["failure"] == "not installed: make peers" and not result["runs"]
        elif not CONTESTANTS[name].is_peer:  # a peer may be installed without the libraries that it needs
            assert result["failure"] is None and len(result["runs"]) == 1
        for measured in result["runs"]:
            # Processor time comes in ticks of 10 ms, which eight small clips may not take.
            assert measured["clips_per_second"] > 0 and measured["cpu_ms_per_clip"] >= 0 and measured["main_mib"] > 1
    runs = [measured for result in report["contestants"].values() for measured in result["runs"]]
    assert any(measured["cpu_ms_per_clip"] > 0 for measured in runs)
    assert report["contestants"]["ours"]["runs"][0]["worker_mib"] > 1


def test_soak(videos):
    done = run_forked("benchmark.py", "soak", videos, "--clips", 200, "--workers", 1, "--crop-size", 32, "--sizes", 2)
    assert done.returncode == 0 and "no growth; 0 faults, fallbacks: none" in done.stdout, done.stderr + done.stdout


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
    assert 0 < ratio["low"] <= ratio["median"] <= ratio["high"]
    assert "ours / floor: " in report["stdout"] and "target" not in report["stdout"]


def test_copies_of_a_benchmark(videos):
    """As many sizes as are asked for, all different to a decoder, in groups as short as they are to be."""
    found = find_videos([str(videos)])
    assert benchmark_on_a_gpu(videos, contestants=[FLOOR])["sets"].keys() == {"originals", "gop 8", "gop 8, 3 sizes"}
    with forked():
        copies = copy_videos(found, videos / "copies", gop=8, sizes=3)
        same = copy_videos(found, videos / "same", gop=8)
    coded = {(-(-video.width // 16), -(-video.height // 16)) for video in copies}
    assert len(coded) == 3 and all(video.gop == 8 and video.frames == 30 for video in copies)
    assert [(video.width, video.height) for video in same] == [(80, 64)] * 2
    with pytest.raises(InputError, match="--sizes is 1000; expected at most"):
        copy_videos(found, videos / "copies", gop=8, sizes=1000)


def benchmark_on_a_gpu(videos, **changes):
    """The benchmark of a GPU, with torchcodec's CPU decoder in the place of NVDEC."""
    settings = dict(
        workers=1, threads=2, rounds=1, seconds=0.3, gop=8, sizes=3, num_frames=4, crop_size=32, batch_size=4
    )
    with forked():
        return benchmark_gpu_loader([str(videos)], **settings | changes, out=videos / "gpu", device="cpu")


def test_the_benchmark_of_a_gpu(videos, capsys):
    names = [NVDEC, HOST, FLOOR, PEER, "pynvvideocodec"]
    report = benchmark_on_a_gpu(videos, contestants=names, gop=0, sizes=0)
    text = capsys.readouterr().out
    assert json.loads((videos / "gpu" / "loader_gpu.json").read_text()) == report
    found = report["sets"]["originals"]["contestants"]
    assert list(found) == names and found.pop("pynvvideocodec")["failure"] == "not installed"
    for name, result in found.items():
        (measured,) = result["runs"]
        assert result["failure"] is None and measured["clips_per_second"] > 0 and measured["first_batch_s"] > 0
        assert set(measured["engines"]) == {NVDEC: {"nvdec"}, HOST: {"host"}}.get(name, set())
        assert name == FLOOR or result["wrong_frames"] == 0
    assert found[NVDEC]["mean_difference_of_255"] < 1e-3 and found[PEER]["mean_difference_of_255"] < 8
    assert set(report["ratios"]) == {
        "nvdec / nvdec floor, originals",
        "nvdec / torchcodec on whole files, originals",
    }
    assert "nvdec / nvdec floor, originals: " in text and "wrong frames" in text


def test_the_benchmark_of_a_gpu_needs_one(videos, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = run_here("benchmark.py", "loader", videos, "--device", "cuda")
    assert done.returncode == 2 and "torch finds no GPU here" in done.stderr


@pytest.fixture(scope="module")
def model_report(tmp_path_factory):
    out = tmp_path_factory.mktemp("model")
    settings = ["--size", "tiny", "--batch-size", 1, "--num-frames", 2, "--image-size", 32, "--rounds", 1]
    with forked(), mock.patch.object(benchmarks.model, "_MATMUL_SIZE", 256):
        done = run_here("benchmark.py", "model", *settings, "--out", out)
    assert done.returncode == 0, done.stderr
    return json.loads((out / "model.json").read_text()) | {"stdout": done.stdout}


def test_network_is_timed_beside_its_peers_or_says_why_not(model_report):
    contestants, failures = model_report["contestants"], model_report["not_measured"]
    named = set(benchmarks.networks.CONTESTANTS) - {COMPILED}
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


def test_hugging_face_has_our_names():
    """Every one of our weights has a place in Hugging Face's network, and the other way round: loading is strict."""
    pytest.importorskip("transformers")
    work = NetworkWork("tiny", batch_size=1, num_frames=2, image_size=32, device="cpu")
    expected = ours(work).logits()
    for fused in (False, True):
        assert (hugging_face(work, fused=fused).logits() - expected).abs().max() < 1e-4


def test_network_that_computes_something_else_is_refused(monkeypatch, tmp_path):
    class Other(TorchContestant):
        def logits(self):
            return super().logits() + 1e-3

    def other(work):
        return Other(work.network(), work.clips(), work)

    monkeypatch.setitem(benchmarks.networks.CONTESTANTS, "huggingface eager", other)
    settings = dict(size="tiny", batch_size=1, num_frames=2, image_size=32, rounds=1, compile=False)
    with pytest.raises(InputError, match=r"huggingface eager: its logits differ from ours by 1.0e-03"):
        benchmarks.model.benchmark_model(**settings, out=tmp_path)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--size", "huge"], "--size huge: expected one of base, small, tiny"),
        (["--size", "tiny", "--image-size", 40], "image_size 40 is not a multiple of patch_size 16"),
        (["--size", "tiny", "--image-size", 40, "--fit"], "image_size 40 is not a multiple of patch_size 16"),
    ],
)
def test_networks_that_cannot_be_measured(tmp_path, arguments, message):
    done = run_here("benchmark.py", "model", *arguments, "--out", tmp_path)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_networks_on_a_gpu(tmp_path, capsys):
    """On the CPU. One that fails leaves the others."""
    shape = dict(size="tiny", num_frames=8, image_size=32, batch_sizes=(2, 3), rounds=2, seconds=0.05, device="cpu")
    names = [gpu_model.OURS, gpu_model.PEERS[1]]
    with forked():
        gpu_model.benchmark_gpu_model(**shape, contestants=[*names, "none such"], out=tmp_path)
    report = json.loads((tmp_path / "model.json").read_text())
    for batch_size in ("2", "3"):
        results = report["batches"][batch_size]
        assert results.pop("none such") == {"failure": "'none such'"} and set(results) == set(names)
        assert all(
            len(each["clips_per_second"]) == 2 and min(each["clips_per_second"]) > 0 for each in results.values()
        )
        assert set(report["attention_over_time_ms"][batch_size]) == {"sdpa", "products", "packed"}
    said = capsys.readouterr().out
    assert "batch 3, forward and backward in bf16" in said and said.endswith("model.json\n")
    assert re.search("none such +not measured: 'none such'", said)


@pytest.mark.parametrize("attend", [gpu_model._by_products, gpu_model._packed])
def test_ways_of_attention_over_time_are_the_same(attend):
    q, k, v = torch.randn(3, 16, 2, 8, 4, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(attend(q, k, v), expected)


def test_clips_that_fit(tmp_path, capsys, monkeypatch):
    measured, plain = {}, fit._kept_bytes

    def kept_bytes(network, work):  # once for each network and batch: compiling takes seconds
        key = (network.activation_checkpointing, work)
        if key not in measured:
            measured[key] = plain(network, work)
        return measured[key]

    monkeypatch.setattr(fit, "_kept_bytes", kept_bytes)
    fit.benchmark_fit(size="tiny", image_size=32, device="cpu", out=tmp_path)
    rows = json.loads((tmp_path / "fit.json").read_text())["rows"]
    a_clip = {(row["num_frames"], row["checkpointing"]): row["a_clip_gib"] for row in rows}
    assert a_clip[8, True] < 0.9 * a_clip[8, False] and 1.5 < a_clip[16, False] / a_clip[8, False] < 2.5
    for row in rows:
        for card, count in row["clips"].items():
            room = int(card) - 2 - row["once_gib"]
            assert count == min(room // row["a_clip_gib"], 65_535 // 4)  # 4 patches
    assert "computed on a CPU, not measured on a GPU" in capsys.readouterr().out


@pytest.fixture(scope="module")
def train_config(videos):
    """Two steps an epoch, each of two micro-steps: the loader comes to the end of epochs."""
    rows = [probe(videos / f"{n % 2}.mp4")._replace(path=f"{n % 2}.mp4", label=n % 2) for n in range(4)]
    Manifest(rows, root=videos, classes=("ash", "birch")).write(videos / "train.csv")
    (videos / "tiny.yaml").write_text(
        f"""
output: {videos}/run
device: cpu
data: {{train: {videos}/train.csv, num_frames: 2, crop_size: 32, batch_size: 1, workers: 1}}
model: {{embed_dim: 24, depth: 1, num_heads: 3}}
optim: {{global_batch_size: 2}}
train: {{pretrained: gone.safetensors}}
"""
    )
    return videos / "tiny.yaml"


@pytest.mark.parametrize("processes, settings", [(1, []), (2, ["-o", "data.workers=0"])], ids=["one", "two"])
def test_training_step(train_config, tmp_path, processes, settings):
    settings = ["-c", train_config, *settings, "--steps", 1, "--rounds", 2, "--out", tmp_path]
    done = run_forked("benchmark.py", "train", *settings, processes=processes, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(tmp_path / "train.json")
    report = json.loads((tmp_path / "train.json").read_text())
    assert set(report["turns"]) == {LOADER, NETWORK, TOGETHER} and report["unreadable_clips"] == 0
    for turns in report["turns"].values():
        assert len(turns) == 2
        assert all(turn["clips_per_second"] > 0 and turn["cpu_ms_per_clip"] > 0 for turn in turns)
    assert all(turn["wait_ms"] == 0 for turn in report["turns"][NETWORK])
    assert all(0 < turn["wait_ms"] <= turn["step_ms"] for turn in report["turns"][LOADER] + report["turns"][TOGETHER])
    assert report["settings"]["processes"] == processes and report["settings"]["micro_steps"] == 2 // processes
    assert report["verdict"] in done.stdout
    assert not (train_config.parent / "run").exists() and os.listdir(tmp_path) == ["train.json"]


def turns_of(*, loader, network, together, cores=2.0):
    """A turn from (clips/s, CPU ms a clip) of each; a step is one clip, and together half of it is waiting."""
    made = {}
    for name, (speed, cpu_ms), waiting in ((LOADER, loader, 1), (NETWORK, network, 0), (TOGETHER, together, 0.5)):
        made[name] = [Turn(speed, 1000 / speed, waiting * 1000 / speed, cpu_ms, cores)]
    return made


# Speeds and processor times; then the bounds (slower, cores, turns), together over the slower one, and the verdict.
VERDICTS = {
    "data": (
        dict(loader=(100, 10), network=(200, 5), together=(98, 15)),
        (100, 2000 / 15, 200 / 3), 0.98, "data", "supplies 100.0 clips/s, and the network could consume 200.0",
    ),
    "network": (
        dict(loader=(200, 5), network=(100, 10), together=(90, 15)),
        (100, 2000 / 15, 200 / 3), 0.90, "network", "it consumes 100.0 clips/s, and the loader could supply 200.0",
    ),
    "both need both cores": (
        dict(loader=(100, 20), network=(100, 20), together=(48, 40)),
        (100, 50, 50), 0.48, "cores", "allow 50.0 clips/s together, and 50.0 if the two take turns",
    ),
    "cores for 0.96 of it": (
        dict(loader=(120, 8), network=(100, 77 / 6), together=(95, 21)),
        (100, 96, 600 / 11), 0.95, "network", "bound by the network",
    ),
    "a GPU that computes": (
        dict(loader=(400, 2.5), network=(100, 2), together=(96, 5), cores=8.0),
        (100, 8000 / 4.5, 80), 0.96, "network", "bound by the network",
    ),
    "other programs": (
        dict(loader=(60, 10), network=(50, 10), together=(30, 20), cores=0.6),
        (50, 30, 300 / 11), 0.6, "cores", "other programs were running: only 0.6 of 2 cores were free",
    ),
}  # fmt: skip


@pytest.mark.parametrize("turns, bounds, value, bound_by, said", VERDICTS.values(), ids=VERDICTS)
def test_verdict(turns, bounds, value, bound_by, said):
    hints = {"data": ["decode less"], "network": ["compute less"]}
    found = benchmarks.train.judge(turns_of(**turns), turns.get("cores", 2), hints)
    if "other programs" in said:
        found = benchmarks.train.judge(turns_of(**turns), 2, hints)
    assert [found["bounds"][name] for name in ("slower", "cores", "turns")] == pytest.approx(bounds)
    assert found["together_over"]["slower"]["median"] == pytest.approx(value)
    assert found["bound_by"] == bound_by and said in found["verdict"]
    assert ("decode less" in found["verdict"]) == (bound_by != "network")
    assert ("compute less" in found["verdict"]) == (bound_by != "data")
    assert found["data_wait_share"] == 0.5
    assert ("other programs" in found["verdict"]) == (said.startswith("other programs"))


def test_ratios_are_of_a_round():
    """The machine is slower in each round: the medians are from different ones, 49 / 80, and say nothing."""
    rounds = [
        turns_of(loader=loader, network=(200, 5), together=together)
        for loader, together in (((100, 5), (98, 10)), ((50, 5), (49, 10)), ((80, 5), (40, 10)))
    ]
    turns = {name: [each[name][0] for each in rounds] for name in rounds[0]}
    found = benchmarks.train.judge(turns, 2, {"data": [], "network": []})
    assert found["together_over"]["slower"] == {"median": 0.98, "low": 0.5, "high": 0.98}
    assert found["medians"][LOADER]["clips_per_second"] == 80 and found["medians"][TOGETHER]["clips_per_second"] == 49


@pytest.mark.parametrize(
    "device, settings, expected",
    [
        ("cpu", [], {"data": 2, "network": 3}),
        ("cpu", ["data.workers=1", "data.views_per_decode=2"], {"data": 2, "network": 3}),
        ("cuda", ["data.decode=host", "train.precision=bf16", "train.compile=true"], {"data": 3, "network": 1}),
        ("cpu", ["train.activation_checkpointing=true"], {"data": 2, "network": 4}),
    ],
)
def test_hints_are_settings_that_there_are(device, settings, expected):
    config = load_config(None, settings)
    precision = "float32" if config.train.precision == "auto" else config.train.precision
    process = SimpleNamespace(cores=4, device=torch.device(device))
    settings_of = {
        "precision": precision,
        "micro_steps": 1,
        "batch_size": 8,
        "state": SimpleNamespace(mode="compiled" if config.train.compile is True else "eager"),
    }
    trainer = SimpleNamespace(config=config, process=process, **settings_of)
    hints = benchmarks.train.hints(trainer)
    assert {name: len(each) for name, each in hints.items()} == expected
    for hint in (hint.split(",")[0] for each in hints.values() for hint in each if "=" in hint):
        assert load_config(None, [*settings, hint]) != config


def test_cores_that_cannot_be_split(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 4, 5, 6, 8})
    process = SimpleNamespace(device=torch.device("cpu"), local_rank=1, local_world_size=2)
    assert benchmarks.train.halves(process) == ({4}, {6})
    process.local_world_size = 3
    process.local_rank = 2
    with pytest.raises(InputError, match="two cores or more per process; the device is cpu, with 1 for this"):
        benchmarks.train.halves(process)
    process = SimpleNamespace(device=torch.device("cuda", 0), local_rank=0, local_world_size=1)
    with pytest.raises(InputError, match="--split-cores needs the CPU as the device"):
        benchmarks.train.halves(process)


CASES = [
    ("text.mp4", "text.mp4: not a video that FFmpeg can read"),
    ("gone.mp4", "gone.mp4: no such file or directory"),
    ("gone.csv", "gone.csv: no such manifest"),
    ("empty", "empty: no videos there"),
    ("turned.mp4", "turned.mp4: no videos there that can be measured"),
]


@pytest.mark.parametrize("name, message", CASES, ids=[name for name, _ in CASES])
def test_videos_that_cannot_be_used(tmp_path, name, message):
    (tmp_path / "text.mp4").write_text("no video " * 50)
    (tmp_path / "empty").mkdir()
    write_video(tmp_path / "turned.mp4", textured(3, height=32, width=32), rotation=90)
    with pytest.raises(InputError, match=message):
        find_videos([str(tmp_path / name)])


def test_broken_and_turned_videos_are_skipped_and_counted(videos, tmp_path, capsys):
    os.link(videos / "0.mp4", tmp_path / "good.mp4")
    (tmp_path / "broken.mp4").write_text("no video " * 50)
    write_video(tmp_path / "turned.mp4", textured(4, height=32, width=32), rotation=90)
    found = find_videos([str(tmp_path)])
    assert [video.path for video in found] == [str(tmp_path / "good.mp4")]
    said = capsys.readouterr().out
    assert "broken.mp4: not a video" in said and "1 of 3 files cannot be read and are skipped" in said
    assert "1 videos are rotated or mirrored" in said
