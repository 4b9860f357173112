"""evaluate.py and predict.py: every video once, the same numbers whoever computes them."""

import json
import re
import time

import numpy as np
import pytest
import torch

from dali_pipelines import ClipLoader, Manifest
from tests.training.conftest import PROJECT, run
from tests.training.sharing import evaluations
from training.config import clip_settings, load_config, preprocessing
from training.distributed import start_process
from training.evaluation import collect, evaluate, predict_views
from training.prediction import predict
from training.results import FILES, Protocol, read_results
from training.weights import Weights, build_network, load_weights, open_weights, save_weights


@pytest.fixture
def weights_file(config_file, tmp_path):
    """Weights that say something different of every video."""
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
        results = collect(result, config, [weights], names, manifest, process, protocol=protocol, started=started)
    return Evaluated(result, results)


class Evaluated:
    """`Result` and the `Results` made of it, as one."""

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
def test_every_protocol_is_what_a_slow_computation_says(weights_file, small_data, protocol):
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
def test_every_video_once_for_any_number_of_processes_and_any_batch_size(weights_file, partly_bad, tmp_path, processes):
    with start_process("cpu") as process:
        found = evaluations(weights_file, partly_bad, process)
    expected = found[0]
    if processes > 1:
        arguments = [weights_file, partly_bad, tmp_path / "found.pt"]
        done = run("tests/training/sharing.py", *arguments, processes=processes, path=PROJECT)
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
    assert last.startswith(f"test/top1_1x3_prob {whole.top1:.4f}, top-5 1.0000 (95 % intervals ")
    folder = weights_file.parent / "evaluation"
    written = read_results(folder)
    np.testing.assert_allclose(written.probabilities, whole.probabilities, atol=1e-6)
    assert written.top.tolist() == whole.results.top.tolist() and written.valid.all()
    assert "13 videos evaluated, 0 unreadable; the manifest left out 0 of 13 listed" in done.stdout
    assert {path.name for path in folder.iterdir()} == {*FILES, "report.html"}


@pytest.mark.parametrize("processes", [1, 2])
def test_unreadable_videos_make_the_exit_status_1_unless_allowed(weights_file, small_data, tmp_path, processes):
    manifest = Manifest.read(small_data / "val.csv")
    for name, bad in (("one", {3}), ("all", set(range(7)))):
        videos = [manifest[n]._replace(path=f"gone{n}" if n in bad else manifest[n].path) for n in range(7)]
        Manifest(videos, root=small_data, classes=manifest.classes).write(tmp_path / f"{name}.csv")

    def evaluated(name, *flags):
        settings = ["-w", weights_file, "-o", f"data.test={tmp_path}/{name}.csv", "device=cpu", *flags]
        return run("evaluate.py", *settings, processes=processes)

    strict = evaluated("one")
    assert strict.returncode == 1
    assert f"{small_data}/gone3: no such file or directory; counted as wrong" in strict.stdout
    assert "7 videos evaluated, 1 unreadable" in strict.stdout
    reason = "evaluate.py: exit status 1: 1 of 7 videos cannot be read and count as wrong; --allow-missing makes it 0\n"
    assert reason in strict.stderr and (processes > 1 or strict.stderr == reason)
    lenient = evaluated("one", "--allow-missing")
    assert (lenient.returncode, lenient.stdout) == (0, strict.stdout), lenient.stderr
    if processes == 1:
        none = evaluated("all", "--allow-missing")
        assert none.returncode == 1 and "7 of 7 videos" in none.stderr and "does not help" in none.stderr


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


def test_predict_as_a_user_runs_it(weights_file, small_data, tmp_path):
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
    bad = run("predict.py", "-w", weights_file, videos[0], "-o", "device=nonsense")
    assert bad.returncode == 2 and "device is 'nonsense'" in bad.stderr
    plain = run("predict.py", "-w", weights_file, videos[0], "--device", "cpu", "--picture", tmp_path / "p.png")
    assert plain.returncode == 0 and re.search(
        r"^    0\.\d{4}  (ash|birch|cedar) \([012]\)$", plain.stdout, re.MULTILINE
    )
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_views_are_averaged_after_the_softmax():
    class Network(torch.nn.Module):
        def forward(self, clips):
            return clips.flatten(1)

    views = torch.tensor([[[10.0, 0.0], [0.0, 1.0]]]).view(1, 2, 2, 1, 1, 1)
    expected = (torch.tensor([10.0, 0.0]).softmax(0) + torch.tensor([0.0, 1.0]).softmax(0)) / 2
    torch.testing.assert_close(predict_views(Network(), views, "float32")[0], expected)


def test_an_ensemble_is_the_mean_of_its_members_and_is_compared(weights_file, small_data, tmp_path):
    weights = load_weights(weights_file)
    state = {name: value.roll(1, 0) for name, value in weights.state.items()}
    save_weights(tmp_path / "v.safetensors", Weights(weights.model, weights.preprocessing, weights.classes, state))
    settings = ["-o", f"data.test={small_data}/train.csv", "device=cpu", "data.workers=0"]
    alone = [result_of(tmp_path / name, small_data / "train.csv") for name in ("w.safetensors", "v.safetensors")]
    files = ["-w", weights_file, "-w", tmp_path / "v.safetensors"]
    done = run("evaluate.py", *files, *settings, "--out", tmp_path / "both")
    assert done.returncode == 0, done.stderr
    both = read_results(tmp_path / "both" / "results.json")
    mean = (alone[0].probabilities + alone[1].probabilities) / 2
    np.testing.assert_allclose(both.probabilities, mean, atol=1e-6)
    assert [each["top1"] for each in both.summary["weights"]] == [each.top1 for each in alone]

    assert run("evaluate.py", *files[:2], *settings).returncode == 0
    compared = run("evaluate.py", "--compare", tmp_path / "evaluation", tmp_path / "both")
    assert compared.returncode == 0, compared.stderr
    right = alone[0].results.right, both.right
    assert f"only A is right: {(right[0] & ~right[1]).sum()}" in compared.stdout
    assert f"{right[1].mean() - right[0].mean():+.4f}, 95 % interval" in compared.stdout

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    foreign = run("evaluate.py", *files[:2], *settings, "--out", tmp_path / "mine")
    assert foreign.returncode == 2 and "is not an evaluation; name another folder" in foreign.stderr
