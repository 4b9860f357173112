"""dali_timesformer: what a notebook calls."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch
import yaml

import dali_timesformer as dt
from common.config import Config
from tests.commands import PROJECT
from training.engine import Trainer


def test_settings_of_every_kind(config_file, tmp_path):
    config = dt.load_config(config_file, {"optim.lr": 1e-5, "data": {"stride": None}, "output": tmp_path / "a b"})
    assert (config.optim.lr, config.data.stride, config.output) == (1e-5, None, f"{tmp_path}/a b")
    assert config.optim.global_batch_size == 4  # of the file
    assert dt.load_config(config) == config and dt.load_config(config) is not config
    assert dt.load_config(config, {"name": "yes"}).name == "yes"  # a text, though YAML has another word for it
    assert dt.load_config(yaml.safe_load(config_file.read_text())) == dt.load_config(str(config_file))
    assert dt.load_config({"optim.betas": [0.9, 0.95], "name": "x"}).output == "output/x"
    assert config.model.depth == 2 != Config().model.depth


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"optim.lr": "high"}, "optim.lr"),
        ({"optim.lr": -1}, "optim.lr is -1.0; expected more than 0"),
        ({"optim.rate": 1}, "unknown key optim.rate"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(dt.InputError, match=message):
        dt.load_config({}, settings)


@pytest.mark.slow
def test_train_evaluate_and_predict_in_one_process_again_and_again(
    config_file, small_data, tmp_path, capsys, monkeypatch
):
    threads = torch.get_num_threads()
    settings = {"train.epochs": 2, "train.validate_every": 2, "train.swa_epochs": 1}
    result = dt.train(config_file, settings, verbose=False)
    output = tmp_path / "output"
    assert capsys.readouterr() == ("", "")
    assert (result.step, result.best.epoch, result.num_faults, result.stopped_early) == (6, 2, 0, False)
    assert result.weights == {name: output / f"{name}.safetensors" for name in ("best", "last", "swa")}
    assert all(path.exists() for path in result.weights.values())

    with pytest.raises(dt.InputError, match="holds the checkpoints of an earlier run"):
        dt.train(config_file, settings)
    assert not (output / "lock").exists()  # though the exception is still held
    again = dt.train(config_file, settings | {"train.epochs": 2}, resume=True, verbose=False)
    assert (again.step, again.accuracy, again.best) == (6, None, result.best)

    quiet = {"device": "cpu", "data.workers": 0}
    results = dt.evaluate(result.weights["best"], overrides=quiet, protocol=dt.Protocol(crops=1))  # data.val of the run
    assert results.summary["expected"] == 7 and results.classes == ["ash", "birch", "cedar"]
    assert results.top1 == pytest.approx(result.best.accuracy.top1)
    assert repr(results).startswith("Results(test/top1_1x1_prob 0.") and len(repr(results)) < 200
    assert results.mean_class_accuracy == pytest.approx(result.best.accuracy.mean_class_accuracy)
    both = dt.evaluate([result.weights["best"], result.weights["last"]], small_data / "train.csv", overrides=quiet)
    assert both.summary["expected"] == 13 and len(both.summary["weights"]) == 2
    alone = shutil.copy(result.weights["best"], tmp_path / "alone.safetensors")
    with pytest.raises(dt.InputError, match="data.test is not set, and there is no config.yaml beside"):
        dt.evaluate(alone)

    predictions = dt.predict(result.weights["best"], [small_data / "val_0.mp4", "gone.mp4"], overrides=quiet)
    assert predictions.classes == ("ash", "birch", "cedar")
    seen, unreadable = predictions
    (best,) = predictions.top(seen, 1)
    assert best["class"] == predictions.classes[best["label"]] and best["probability"] >= 1 / 3
    assert isinstance(unreadable, dt.Unreadable) and "no such file" in unreadable.reason
    with dt.predict(result.weights["best"], [small_data / "val_0.mp4"] * 2, overrides=quiet) as predictions:
        assert next(predictions).video.endswith("val_0.mp4")
    assert torch.get_num_threads() == threads and not list(predictions)
    with pytest.raises(dt.InputError, match="num_windows is 0"):
        dt.predict(result.weights["best"], "a.mp4", num_windows=0)
    with pytest.raises(dt.InputError, match="no weights given"):
        dt.evaluate([])
    with pytest.raises(dt.InputError, match=f"{output}: the folder of a run; .* such as {output}/best.safetensors"):
        dt.evaluate(output)
    assert torch.get_num_threads() == threads
    assert capsys.readouterr().out == "" and len(repr(seen)) < 1000

    snippet = re.search(
        r"## Use it from Python\n\n```python\n(.*?)```", (PROJECT / "README.md").read_text(), re.DOTALL
    )[1]
    video = "data/demo/videos/val/00089_right.mp4"
    assert video in snippet
    monkeypatch.setattr(dt, "train", lambda config, overrides: dt.load_config(PROJECT / config, overrides) and result)
    exec(snippet.replace(video, f"{small_data}/val_0.mp4"), {})
    assert f"{small_data}/val_0.mp4 [{{'class': '" in capsys.readouterr().out


@pytest.mark.slow
def test_an_iteration_over_epochs_that_stops_can_be_resumed(config_file, tmp_path, capsys):
    config = dt.load_config(config_file)
    for epoch in Trainer(config).epochs():
        assert (epoch.epoch, epoch.step) == (1, 3) and epoch.accuracy.loss > 0 and epoch.is_best
        assert epoch.clips_per_second > 0 and epoch.averaged is None
        break
    assert not (tmp_path / "output" / "lock").exists()
    assert "next: " not in capsys.readouterr().out
    with contextlib.suppress(KeyboardInterrupt):  # of the caller
        for epoch in Trainer(config, resume=True).epochs():
            assert epoch.epoch == 2
            raise KeyboardInterrupt
    trainer = Trainer(config, resume=True)
    assert [epoch.epoch for epoch in trainer.epochs()] == [3]
    result = trainer.result()
    whole = Trainer(dt.load_config(config, {"output": tmp_path / "whole"}), verbose=False).train()
    assert (result.step, result.accuracy, result.best) == (9, whole.accuracy, whole.best)
    assert "next: " in capsys.readouterr().out
    Trainer(config, resume=True).close()
    assert "all 9 steps are done already" in capsys.readouterr().out
    assert not (tmp_path / "output" / "lock").exists()


@pytest.mark.slow
def test_the_example_of_the_module_runs_from_stdin(config_file, small_data, tmp_path):
    """As in a notebook: `__main__` has no file that the loader's workers could import."""
    example = textwrap.dedent(re.search(r"\n\n(    import .*?)\n\nThe functions", dt.__doc__, re.DOTALL)[1])
    assert 10 <= len(example.splitlines()) <= 14
    for old, new in (
        ("configs/small.yaml", str(config_file)),
        ("train.csv", f"{small_data}/train.csv"),
        ("val.csv", f"{small_data}/val.csv"),
        ("holiday.mp4", f"{small_data}/val_0.mp4"),
        ('.csv"}', '.csv", "data.workers": 1, "train.epochs": 1}'),
    ):
        assert old in example
        example = example.replace(f'"{old}"', f'"{new}"') if old != '.csv"}' else example.replace(old, new)
    done = subprocess.run(
        [sys.executable, "-"],
        input=example,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "Accuracy(top1=" in done.stdout and f"{small_data}/val_0.mp4 [{{'class': '" in done.stdout
