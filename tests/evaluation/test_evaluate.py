"""evaluate.py and predict.py: every video once, and the same numbers however they are computed."""

import dataclasses
import itertools
import json
import math
import re
import time
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch

import evaluate as command
import predict as predict_command
from common.config import clip_settings, load_config, preprocessing
from common.distributed import start_process
from common.weights import Weights, build_network, load_weights, open_weights, save_weights
from common.worker_pool import WorkerPool
from dali_pipelines import ClipLoader, Manifest
from dali_pipelines.probe import probe
from evaluation.evaluate import build_results, evaluate, predict_views
from evaluation.result_files import FILES, read_results
from evaluation.results import Protocol
from preparation.pack import pack
from serving.prediction import predict
from tests.commands import run, run_forked
from tests.training.sharing import evaluations
from tests.videos import textured, write_video

pytestmark = pytest.mark.slow

IN_PROCESS = ("device=cpu", "data.workers=0")


@pytest.fixture
def weights_file(config_file, tmp_path):
    """Weights whose predictions differ from video to video."""
    config = load_config(str(config_file))
    torch.manual_seed(3)
    network = build_network(config.model, preprocessing(config.data), 3)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    torch.nn.init.normal_(network.patch_embed.proj.weight, std=3)  # what is seen outweighs where it is
    weights = Weights(vars(config.model), preprocessing(config.data), ("ash", "birch", "cedar"), network.state_dict())
    save_weights(tmp_path / "w.safetensors", weights)
    return tmp_path / "w.safetensors"


def result_of(weights_file, manifest_file, *overrides, protocol=None):
    settings = [f"data.test={manifest_file}", "device=cpu", "data.workers=0", *overrides]
    weights, config, _ = open_weights(str(weights_file), None, settings)
    manifest, protocol, started = Manifest.read(manifest_file), protocol or Protocol(), time.monotonic()
    with start_process("cpu") as process:
        result = evaluate(config, [weights], manifest, process, protocol=protocol)
        names = [str(weights_file)]
        results = build_results(result, config, [weights], names, manifest, process, protocol=protocol, started=started)
    return Evaluated(result, results)


class Evaluated:
    """`Predictions` and the `Results` made of them, as one."""

    def __init__(self, result, results):
        self.results = results
        self.probabilities, self.labels, self.valid, self.faults = (
            result.probabilities,
            result.labels,
            result.valid,
            result.faults,
        )
        self.top1 = results.summary["top1"]


@pytest.mark.parametrize("protocol", [Protocol(1, 1), Protocol(3, 3), Protocol(2, 3, "score")], ids=lambda p: p.name)
def test_every_protocol_matches_a_plain_computation(weights_file, small_data, protocol):
    weights = load_weights(weights_file)
    config = load_config(
        None, ["data.stride=1", "data.target_fps=25"], defaults={"model": weights.model, "data": weights.preprocessing}
    )
    weights.preprocessing.update(preprocessing(config.data))
    manifest, network = Manifest.read(small_data / "val.csv"), weights.build()
    with start_process("cpu") as process:
        result = evaluate(config, [weights], manifest, process, protocol=protocol)
    mode = "validate" if protocol.crops == 1 else "test"
    settings = clip_settings(config.data, mode) | {"num_windows": protocol.windows}
    for batch in ClipLoader(manifest, **settings, batch_size=1, workers=0):
        views = batch.clips if mode == "test" else batch.clips[:, None]
        assert views.shape[1] == protocol.windows * protocol.crops
        with torch.no_grad():
            logits = [network(view) for view in views.unbind(1)]
        if protocol.average == "prob":
            expected = torch.stack([each.softmax(1) for each in logits]).mean(0)
        else:
            expected = torch.stack(logits).mean(0).softmax(1)
        torch.testing.assert_close(result.probabilities[batch.sample_ids], expected, atol=1e-6, rtol=0)


def test_probabilities_are_the_mean_over_three_crops(weights_file, small_data):
    weights = load_weights(weights_file)
    result = result_of(weights_file, small_data / "val.csv")
    config = load_config(None, defaults={"model": weights.model, "data": weights.preprocessing})
    manifest = Manifest.read(small_data / "val.csv")
    network = weights.build()
    different = 0
    for batch in ClipLoader(manifest, **clip_settings(config.data, "test"), batch_size=1, workers=0):
        with torch.no_grad():
            views = [network(view).softmax(1) for view in batch.clips.unbind(1)]
        different += len(views) == 3 and not torch.allclose(views[0], views[2], atol=1e-4)
        torch.testing.assert_close(result.probabilities[batch.sample_ids], torch.stack(views).mean(0))
    assert different >= 4  # one of the seven videos is a square, whose crops are equal
    assert result.labels.tolist() == manifest.labels.tolist() and result.valid.all()


def test_unreadable_videos_count_as_wrong_and_are_never_replaced(weights_file, small_data, tmp_path):
    manifest = Manifest.read(small_data / "train.csv")
    whole = result_of(weights_file, small_data / "train.csv")
    right = (whole.probabilities.argmax(1) == whole.labels).nonzero()[:, 0].tolist()
    bad = {right[0], 12}
    videos = [manifest[n]._replace(path="gone.mp4" if n in bad else manifest[n].path) for n in range(13)]
    Manifest(videos, root=small_data, classes=manifest.classes).write(tmp_path / "bad.csv")
    result = result_of(weights_file, tmp_path / "bad.csv")
    assert (~result.valid).nonzero()[:, 0].tolist() == sorted(bad) and len(result.labels) == 13
    assert [fault.sample_id for fault in result.faults] == sorted(bad)
    good = [n for n in range(13) if n not in bad]
    torch.testing.assert_close(result.probabilities[good], whole.probabilities[good])
    assert result.top1 == pytest.approx((len(set(right) - bad)) / 13)
    assert result.results.summary["failed"] == 2 and not result.results.right[sorted(bad)].any()


@pytest.fixture
def partly_bad(small_data, tmp_path):
    """A manifest of 13 videos, of which three cannot be read."""
    (tmp_path / "text.mp4").write_text("no video " * 50)
    manifest = Manifest.read(small_data / "train.csv")
    bad = {0: "gone.mp4", 7: tmp_path / "text.mp4", 12: "gone too.mp4"}
    videos = [manifest[n]._replace(path=str(bad.get(n, manifest[n].path))) for n in range(13)]
    Manifest(videos, root=small_data, classes=manifest.classes).write(tmp_path / "bad.csv")
    return tmp_path / "bad.csv"


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_results_match_for_any_number_of_processes_and_batch_size(weights_file, partly_bad, tmp_path, processes):
    with start_process("cpu") as process:
        found = evaluations(weights_file, partly_bad, process)
    expected = found[0]
    if processes > 1:
        arguments = [weights_file, partly_bad, tmp_path / "found.pt"]
        done = run_forked("tests/training/sharing.py", *arguments, processes=processes)
        assert done.returncode == 0, done.stderr
        found = torch.load(tmp_path / "found.pt")
    assert len(found) == 3
    for each in found:
        assert (each["probabilities"] - expected["probabilities"]).abs().max() < 1e-6
        for key in ("labels", "valid"):
            assert each[key].tolist() == expected[key].tolist()
        assert all(each[key] == expected[key] for key in ("faults", "top", "summary"))
        assert [row for row, _, _ in each["faults"]] == [0, 7, 12]
        assert each["members"][0, 1] == each["valid"].sum() == 10  # of three classes, all are among the first five


def test_evaluate_as_a_user_runs_it(weights_file, small_data):
    done = run("evaluate.py", "-w", weights_file, "-o", f"data.test={small_data}/train.csv", "device=cpu")
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    whole = result_of(weights_file, small_data / "train.csv")
    assert last.startswith(f"test/top1_1x3_prob {whole.top1:.4f} (95% interval ")
    folder = weights_file.parent / "evaluation"
    written = read_results(folder)
    np.testing.assert_allclose(written.probabilities, whole.probabilities, atol=1e-6)
    assert written.top.tolist() == whole.results.top.tolist() and written.valid.all()
    assert "13 videos evaluated, 0 unreadable; the manifest left out 0 of 13 listed" in done.stdout
    assert {path.name for path in folder.iterdir()} == {*FILES, "report.html"}


@pytest.mark.parametrize("processes", [1, 2])
def test_unreadable_videos_make_the_exit_status_1(weights_file, small_data, tmp_path, processes, in_process):
    manifest = Manifest.read(small_data / "val.csv")
    for name, bad in (("one", {3}), ("all", set(range(7)))):
        videos = [manifest[n]._replace(path=f"gone{n}" if n in bad else manifest[n].path) for n in range(7)]
        Manifest(videos, root=small_data, classes=manifest.classes).write(tmp_path / f"{name}.csv")

    def evaluated(name, *flags):
        settings = ["-w", weights_file, "-o", f"data.test={tmp_path}/{name}.csv", "device=cpu", *flags]
        if processes == 1:
            return in_process(command.main, *settings)
        done = run_forked("evaluate.py", *settings, processes=processes)
        return done.returncode, done.stdout, done.stderr

    status, said, errors = evaluated("one")
    assert status == 1
    assert f"{small_data}/gone3: no such file or directory; counted as wrong" in said
    assert "7 videos evaluated, 1 unreadable" in said
    reason = "evaluate.py: exit status 1: 1 of 7 videos cannot be read and count as wrong; --allow-missing makes it 0\n"
    assert reason in errors and (processes > 1 or errors == reason)
    lenient = evaluated("one", "--allow-missing")
    assert lenient[:2] == (0, said), lenient[2]
    if processes == 1:
        status, _, errors = evaluated("all", "--allow-missing")
        assert status == 1 and "7 of 7 videos" in errors and "does not help" in errors


def test_the_videos_of_the_run_are_found_beside_its_weights(weights_file, small_data, config_file, in_process):
    run_config = weights_file.with_name("config.yaml")
    given = ["-w", weights_file, "-o", *IN_PROCESS]
    status, _, errors = in_process(command.main, *given)
    remedy = "name a manifest with -o data.test=FILE, or a config with -c\n"
    assert status == 2 and errors.endswith(f"and there is no config.yaml beside {weights_file}: {remedy}")
    run_config.write_text(config_file.read_text())
    status, said, errors = in_process(command.main, *given)
    assert status == 0 and "7 videos evaluated, 0 unreadable" in said, errors
    run_config.write_text("data: {val: gone.csv}")
    status, _, errors = in_process(command.main, *given)
    assert status == 2 and errors.endswith(
        f"{run_config} names {run_config.parent}/gone.csv, which does not exist: {remedy}"
    )
    status, _, errors = in_process(command.main, *given, f"data.test={small_data}/val.csv")
    assert status == 0, errors


def test_predictions_agree_with_evaluation_for_every_video(weights_file, small_data):
    result = result_of(weights_file, small_data / "val.csv")
    manifest = Manifest.read(small_data / "val.csv")
    files = [manifest.file(n) for n in range(len(manifest))]
    with start_process("cpu") as process:
        weights, config, _ = open_weights(str(weights_file), None)
        predictions = list(predict(weights, config, files, process))
    assert [prediction.video for prediction in predictions] == files
    for prediction, row in zip(predictions, result.probabilities, strict=True):
        torch.testing.assert_close(prediction.probabilities, row, atol=1e-6, rtol=0)


def test_predict_as_a_user_runs_it(weights_file, small_data, tmp_path, in_process):
    (tmp_path / "text.mp4").write_text("no video " * 50)
    videos = [small_data / "val_0.mp4", tmp_path / "text.mp4", tmp_path / "gone.mp4", small_data / "val_1.webm"]
    done = run("predict.py", "-w", weights_file, *videos, "--json", "--top-k", 2, "--device", "cpu")
    assert done.returncode == 1
    entries = {entry["video"]: entry for entry in map(json.loads, done.stdout.splitlines())}
    assert set(entries) == set(map(str, videos))
    assert (
        "not a video" in entries[str(videos[1])]["error"]
        and entries[str(videos[2])]["error"] == "no such file or directory"
    )
    for path in (videos[0], videos[3]):
        top = entries[str(path)]["top"]
        assert len(top) == 2 and top[0]["probability"] >= top[1]["probability"] and top[0]["class"] in "ash birch cedar"
    status, _, errors = in_process(predict_command.main, "-w", weights_file, videos[0], "-o", "device=nonsense")
    assert status == 2 and "device is 'nonsense'" in errors
    arguments = ["-w", weights_file, videos[0], "--device", "cpu", "--picture", tmp_path / "p.png"]
    status, said, _ = in_process(predict_command.main, *arguments)
    assert status == 0 and re.search(r"^    0\.\d{4}  (ash|birch|cedar) \([012]\)$", said, re.MULTILINE)
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_views_are_averaged_after_the_softmax():
    class Network(torch.nn.Module):
        def forward(self, clips):
            return clips.flatten(1)

    views = torch.tensor([[[10.0, 0.0], [0.0, 1.0]]]).view(1, 2, 2, 1, 1, 1)
    expected = (torch.tensor([10.0, 0.0]).softmax(0) + torch.tensor([0.0, 1.0]).softmax(0)) / 2
    torch.testing.assert_close(predict_views(Network(), views, "float32")[0], expected)


def test_an_ensemble_is_the_mean_of_its_members(weights_file, small_data, tmp_path, in_process):
    weights = load_weights(weights_file)
    state = {name: value.roll(1, 0) for name, value in weights.state.items()}
    save_weights(tmp_path / "v.safetensors", Weights(weights.model, weights.preprocessing, weights.classes, state))
    settings = ["-o", f"data.test={small_data}/train.csv", "device=cpu", "data.workers=0"]
    alone = [result_of(tmp_path / name, small_data / "train.csv") for name in ("w.safetensors", "v.safetensors")]
    files = ["-w", weights_file, "-w", tmp_path / "v.safetensors"]
    status, _, errors = in_process(command.main, *files, *settings, "--out", tmp_path / "both")
    assert status == 0, errors
    both = read_results(tmp_path / "both" / "results.json")
    mean = (alone[0].probabilities + alone[1].probabilities) / 2
    np.testing.assert_allclose(both.probabilities, mean, atol=1e-6)
    assert [each["top1"] for each in both.summary["weights"]] == [each.top1 for each in alone]

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    status, _, errors = in_process(command.main, *files[:2], *settings, "--out", tmp_path / "mine")
    assert status == 2 and "that are not an evaluation; name another folder" in errors


def test_members_of_an_ensemble_that_do_not_fit_are_named(weights_file, small_data, tmp_path, in_process):
    weights, other = load_weights(weights_file), tmp_path / "other.safetensors"
    preprocessed = weights.preprocessing
    settings = ["-w", weights_file, "-w", other, "-o", f"data.test={small_data}/val.csv", *IN_PROCESS]
    for changes, message in (
        ({"classes": ("birch", "ash", "cedar")}, f"its classes differ from those of {weights_file}"),
        (
            {"preprocessing": preprocessed | {"stride": 2.0}},
            f"trained with data.stride=2.0, {weights_file} with None",
        ),
    ):
        save_weights(other, dataclasses.replace(weights, **changes))
        status, _, said = in_process(command.main, *settings)
        assert status == 2 and said.startswith(f"evaluate.py: error: {other}: {message}"), said
    assert not (tmp_path / "evaluation").exists()


def test_an_ensemble_of_scores_is_the_softmax_of_the_mean_of_all_logits(weights_file, small_data):
    first = load_weights(weights_file)
    second = dataclasses.replace(first, state={name: value.roll(1, 0) for name, value in first.state.items()})
    config = load_config(None, ["data.workers=0"], defaults=first.config())
    manifest = Manifest.read(small_data / "val.csv")
    with start_process("cpu") as process:
        result = evaluate(config, [first, second], manifest, process, protocol=Protocol(average="score"))
    networks = [first.build(), second.build()]
    for batch in ClipLoader(manifest, **clip_settings(config.data, "test"), batch_size=1, workers=0):
        with torch.no_grad():
            logits = torch.stack([network(view) for network in networks for view in batch.clips.unbind(1)])
        expected = logits.mean(0).softmax(1)
        torch.testing.assert_close(result.probabilities[batch.sample_ids], expected, atol=1e-6, rtol=0)
        assert (logits.softmax(2).mean(0) - expected).abs().max() > 1e-3


class Overflowing:
    """Weights whose network overflows for blue videos, those of class 2."""

    def __init__(self, weights):
        self.classes, self.preprocessing, self._network = weights.classes, weights.preprocessing, weights.build()

    def build(self, device):
        def network(clips):
            red, _, blue = clips.mean((2, 3, 4)).unbind(1)
            return self._network(clips).masked_fill((blue > red + 0.1)[:, None] & torch.eye(3)[2].bool(), math.inf)

        return network


@pytest.mark.parametrize("average", ["prob", "score"])
def test_an_output_that_is_not_finite_counts_as_unreadable(weights_file, small_data, average):
    weights = load_weights(weights_file)
    config = load_config(None, ["data.workers=0"], defaults=weights.config())
    bad, manifest = [2, 5, 8, 11], Manifest.read(small_data / "train.csv")
    with start_process("cpu") as process:
        given = manifest, process
        good, result = (
            evaluate(config, [each], *given, protocol=Protocol(average=average))
            for each in (weights, Overflowing(weights))
        )
    assert (~result.valid).nonzero()[:, 0].tolist() == bad == [fault.sample_id for fault in result.faults]
    reason = "the network's output is not finite in float32; try -o train.precision=float32"
    assert {(fault.path, fault.reason) for fault in result.faults} == {(manifest.file(n), reason) for n in bad}
    assert torch.equal(result.probabilities, good.probabilities * result.valid[:, None])
    right = (good.probabilities.argmax(1) == good.labels) & result.valid
    assert right.any() and result.members.tolist() == [[right.sum().item(), 9]]


def test_weights_adapt_to_more_frames_but_not_to_other_crops(weights_file, small_data, tmp_path, in_process):
    settings = ["-w", weights_file, "--out", tmp_path / "out", "-o", f"data.test={small_data}/val.csv", *IN_PROCESS]
    status, said, errors = in_process(command.main, *settings, "data.num_frames=16")
    assert status == 0 and "time_embed" in said and "resized" in said, said + errors
    found = read_results(tmp_path / "out")
    assert found.summary["config"]["data"]["num_frames"] == 16
    weights, config, _ = open_weights(str(weights_file), None, ["data.num_frames=16"])
    network = weights.build()
    manifest = Manifest.read(small_data / "val.csv")
    for batch in ClipLoader(manifest, **clip_settings(config.data, "test"), batch_size=1, workers=0):
        assert batch.clips.shape[1:4] == (3, 3, 16)
        [expected] = predict_views(network, batch.clips, "float32")
        np.testing.assert_allclose(found.probabilities[batch.sample_ids.item()], expected, atol=1e-6)
    status, _, said = in_process(command.main, *settings, "data.crop_size=48")
    assert status == 2 and "data.crop_size is 48, but these weights were trained with 32" in said


def test_windows_are_other_frames_of_the_video(weights_file, tmp_path):
    """Against all 16 frames of the videos in one clip, of which each window is a quarter."""
    videos = [
        probe(write_video(tmp_path / f"{n}.mp4", textured(16, height=40, width=60, seed=n)))._replace(label=n % 3)
        for n in range(3)
    ]
    manifest, weights = Manifest(videos, root=tmp_path, classes=("ash", "birch", "cedar")), load_weights(weights_file)
    weights.preprocessing.update(stride=1.0, target_fps=25.0)
    config = load_config(None, ["data.workers=0"], defaults=weights.config())
    with start_process("cpu") as process:
        result = evaluate(config, [weights], manifest, process, protocol=Protocol(4, 3))
    whole, network = clip_settings(config.data, "test") | {"num_frames": 16}, weights.build()
    for batch in ClipLoader(manifest, **whole, batch_size=1, workers=0):
        with torch.no_grad():
            views = [network(clip).softmax(1) for view in batch.clips.unbind(1) for clip in view.split(4, dim=2)]
        torch.testing.assert_close(
            result.probabilities[batch.sample_ids], torch.stack(views).mean(0), atol=1e-6, rtol=0
        )
        assert all((one - two).abs().max() > 1e-4 for one, two in itertools.pairwise(views[:4]))


def test_a_packed_manifest_gives_the_results_of_its_videos(weights_file, small_data, tmp_path, in_process):
    packed, left_out = pack(
        small_data / "train.csv", tmp_path / "shards", shard_bytes=50_000, pool=WorkerPool(workers=1)
    )
    packed.write(tmp_path / "shards" / "train.csv")
    assert len(packed.shards) > 1 and not left_out
    settings = ["-w", weights_file, "-o", f"data.test={tmp_path}/shards/train.csv", *IN_PROCESS]
    status, _, errors = in_process(command.main, *settings)
    assert status == 0, errors
    found, expected = read_results(tmp_path / "evaluation"), result_of(weights_file, small_data / "train.csv")
    np.testing.assert_allclose(found.probabilities, expected.probabilities, atol=1e-6)
    assert found.paths == expected.results.paths
    page = tmp_path / "evaluation" / "report.html"
    first = page.read_bytes()
    assert b"data:image/jpeg" in first  # of the mistakes, from the shards
    page.unlink()
    assert in_process(command.main, "--report", tmp_path / "evaluation") == (0, f"{page}\n", "")
    assert page.read_bytes() == first


def test_videos_below_a_url_give_the_results_of_files(weights_file, small_data, tmp_path, in_process):
    manifest = Manifest.read(small_data / "train.csv")
    memory = fsspec.filesystem("memory")
    for row in range(len(manifest)):
        memory.pipe(f"evaluated/{manifest[row].path}", Path(manifest.file(row)).read_bytes())
    memory.rm(f"evaluated/{manifest[3].path}")
    Manifest(list(manifest), root="memory://evaluated", classes=manifest.classes).write(tmp_path / "url.csv")
    settings = ["-w", weights_file, "--out", tmp_path / "evaluation", "-o", "data.workers=0"]
    status, said, errors = in_process(command.main, *settings, f"data.test={tmp_path / 'url.csv'}")
    assert status == 1 and "1 of 13 videos cannot be read" in errors
    assert f"memory://evaluated/{manifest[3].path}: no such file on its server; counted as wrong" in said
    results = read_results(tmp_path / "evaluation")
    assert results.summary["manifest"]["root"] == "memory://evaluated" and results.valid.sum() == 12
    status, _, errors = in_process(command.main, *settings, f"data.test={small_data / 'train.csv'}")
    files = read_results(tmp_path / "evaluation")
    assert status == 0 and np.array_equal(files.probabilities[results.valid], results.probabilities[results.valid])


def test_a_comparison_as_a_user_sees_it(weights_file, small_data, tmp_path, in_process):
    weights = load_weights(weights_file)
    head = {name: value.roll(1, 0) for name, value in weights.state.items() if name.startswith("head.")}
    save_weights(tmp_path / "v.safetensors", dataclasses.replace(weights, state=weights.state | head))
    manifest, rights = Manifest.read(small_data / "train.csv"), []
    videos = [manifest[n]._replace(label=int(n in (4, 9))) for n in range(13)]
    Manifest(videos, root=small_data, classes=manifest.classes).write(tmp_path / "other.csv")
    for name in "wv":
        settings = ["-w", tmp_path / f"{name}.safetensors", "-o", f"data.test={tmp_path}/other.csv", *IN_PROCESS]
        assert in_process(command.main, *settings, "--out", tmp_path / name)[0] == 0
        rights.append(read_results(tmp_path / name).right)
    only_a, only_b = (rights[0] & ~rights[1]).sum(), (rights[1] & ~rights[0]).sum()
    tosses = only_a + only_b
    p = min(2 * sum(math.comb(tosses, k) for k in range(min(only_a, only_b) + 1)) / 2**tosses, 1)
    assert p < 0.05 and only_a > only_b > 0
    status, said, _ = in_process(command.main, "--compare", tmp_path / "w", tmp_path / "v")
    assert status == 0 and f"only A is right: {only_a}" in said and f"only B is right: {only_b}" in said
    assert f"B - A {(only_b - only_a) / 13:+.4f}" in said and f"McNemar's exact test: p = {p:.3g}, " in said
