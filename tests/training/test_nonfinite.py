"""Losses and gradients that are not finite: said, skipped in fp16, stopped at or gone back from otherwise."""

import csv
import json
import math

import pytest
import torch

from common.weights import load_weights
from dali_pipelines import InputError, Manifest
from tests.commands import run_forked
from tests.training.test_engine import assert_equal_weights, lines, losses, train
from training.checkpoints import load_newest_checkpoint
from training.engine import Trainer
from training.run_state import RunState

pytestmark = pytest.mark.slow


@pytest.fixture
def spoil(monkeypatch):
    """spoil(steps, what): the loss of these steps is multiplied by `what`; a step may come twice."""

    def install(steps, what=math.nan, times=None):
        plain, left = Trainer.loss, list(times or steps)

        def loss(self, *arguments):
            value = plain(self, *arguments)
            if self.step in steps and (times is None or self.step in left):
                if times is not None:
                    left.remove(self.step)
                return value * what
            return value

        monkeypatch.setattr(Trainer, "loss", loss)

    return install


def test_a_run_stops_there_and_names_step_rate_and_clips(config_file, tmp_path, spoil):
    spoil({4})
    message = r"step 4: the loss is nan and the gradient norm nan at a learning rate of 0.0\d+; clips: .*train_\d+.*try"
    with pytest.raises(InputError, match=message) as error:
        train(config_file, "train.on_nan=stop")
    assert str(error.value).count("/train_") == 4  # all four of the step, in one line
    assert len(losses(tmp_path / "output")) == 4  # steps 0 to 3


def test_many_clips_are_in_a_list(config_file, tmp_path, spoil):
    spoil({0})
    with pytest.raises(InputError, match=r"clips: (.*train_\d+.*, ){4}.*train_\d+\S+ and 7 more, in .*nonfinite.csv"):
        train(config_file, "optim.global_batch_size=12")
    assert len((tmp_path / "output" / "nonfinite.csv").read_text().splitlines()) == 12


def test_only_the_clips_with_bad_logits_are_named(config_file, monkeypatch):
    """One clip's contents that the network cannot take."""
    plain = Trainer.forward_backward

    def forward_backward(self, batch, *arguments, **settings):
        clips = batch.clips.clone()
        clips[batch.sample_ids == 7] = math.inf
        return plain(self, batch._replace(clips=clips), *arguments, **settings)

    monkeypatch.setattr(Trainer, "forward_backward", forward_backward)
    with pytest.raises(InputError, match=r"clips: \S*train_7\.webm; try"):
        train(config_file)


def test_fp16_skips_and_halves_the_scale(config_file, tmp_path, spoil, capsys):
    spoil({2, 5}, math.inf, times=[2, 5])
    trainer = train(config_file, "train.precision=fp16")
    assert trainer.step == 9 and trainer.loss_scale.value == 2.0**14
    said = capsys.readouterr().out
    assert "step 2: the loss is inf" in said and "skipped, and the loss scale of 65536 is halved" in said
    logged = [line for line in lines(tmp_path / "output") if "train/lr" in line]
    assert [line["train/skipped_steps"] for line in logged] == [0, 0, 1, 0, 0, 1, 0, 0, 0]
    assert [line["train/loss_scale"] for line in logged] == [2.0**16] * 3 + [2.0**15] * 3 + [2.0**14] * 3
    text = (tmp_path / "output" / "metrics.jsonl").read_text()
    assert all(json.loads(line, parse_constant=pytest.fail) for line in text.splitlines())


def test_a_skipped_step_changes_nothing_but_the_scale(config_file, tmp_path, spoil):
    """The weights after step 3 without 2 are those of a run whose step 2 had no readable video."""
    spoil({2}, math.inf)
    trainer = train(config_file, "train.precision=fp16", "train.max_steps=2", f"output={tmp_path}/before")
    before = {name: value.clone() for name, value in trainer.network.state_dict().items()}
    moments = [state["momentum_buffer"].clone() for state in trainer.optimizer.state.values()]
    trainer = train(config_file, "train.precision=fp16", "train.max_steps=3")
    assert all(torch.equal(value, before[name]) for name, value in trainer.network.state_dict().items())
    after = [state["momentum_buffer"] for state in trainer.optimizer.state.values()]
    assert all(torch.equal(one, two) for one, two in zip(moments, after, strict=True))


def test_fp16_stops_when_the_scale_cannot_fall_any_further(config_file, spoil):
    spoil(range(100))
    with pytest.raises(InputError, match="step 16: the loss is nan"):
        train(config_file, "train.precision=fp16", "train.epochs=20")


def test_rollback_restores_a_checkpoint_and_leaves_the_step_out(config_file, tmp_path, spoil, capsys):
    """The run is the one whose step 4 was not taken at all, and its log has every step once."""
    spoil({4})
    settings = ["train.on_nan=rollback", "train.checkpoint_every_steps=2"]
    trainer = train(config_file, *settings)
    assert trainer.step == 9
    said = capsys.readouterr().out
    assert (
        "step 4: the loss is nan" in said
        and "rolled back to step_00000004-" in said
        and "leaving out step 4 this" in said
    )
    steps = [line["step"] for line in lines(tmp_path / "output") if "train/lr" in line]
    assert steps == list(range(1, 10))
    assert len(losses(tmp_path / "output")) == 8  # none of the one left out
    spoil(())
    leaving = [*settings, f"output={tmp_path}/expected"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunState, "__init__", _with_left_out(RunState.__init__, 4))
        train(config_file, *leaving)
    assert_equal_weights(tmp_path / "output", tmp_path / "expected")


def _with_left_out(plain, step):
    def init(self, *arguments, **settings):
        plain(self, *arguments, **settings)
        self.left_out.add(step)

    return init


def test_rollback_without_a_checkpoint_or_without_an_end_stops(config_file, spoil):
    spoil(range(3, 100))
    with pytest.raises(InputError, match="step 6: the loss is nan .*; 3 rollbacks have not helped"):
        train(config_file, "train.on_nan=rollback")
    spoil({0})
    with pytest.raises(InputError, match="there is no checkpoint to roll back to"):
        train(config_file, "train.on_nan=rollback", f"output={config_file.parent}/other")


def test_weights_that_break_at_the_end_of_an_epoch_are_not_the_best(config_file, tmp_path, monkeypatch):
    """The update of step 5, the last of epoch 2; the run goes back to before it, or stops, and keeps nothing of it."""
    plain = Trainer._commit_step

    def commit_step(self, gradients, factor, result):
        plain(self, gradients, math.nan if self.step == 5 else factor, result)

    monkeypatch.setattr(Trainer, "_commit_step", commit_step)
    with pytest.raises(InputError, match="step 5: the weights are not finite after it, or the validation loss is not"):
        train(config_file, f"output={tmp_path}/stopped")
    trainer = train(config_file, "train.on_nan=rollback", "train.checkpoint_every_steps=1")
    assert trainer.step == 9 and trainer.state.left_out == {5}
    for folder in ("stopped", "output"):
        for name in ("best", "last"):
            assert all(
                v.isfinite().all() for v in load_weights(tmp_path / folder / f"{name}.safetensors").state.values()
            )


def test_weights_that_break_between_are_never_saved(config_file, tmp_path, monkeypatch, capsys):
    plain = Trainer._commit_step

    def commit_step(self, gradients, factor, result):
        plain(self, gradients, math.nan if self.step == 3 else factor, result)

    monkeypatch.setattr(Trainer, "_commit_step", commit_step)
    with pytest.raises(
        InputError,
        match="step 5: the weights are not finite after it, or the validation loss is not; 3 rollbacks have not helped",
    ):
        train(config_file, "train.on_nan=rollback", "train.checkpoint_every_steps=1")
    said = capsys.readouterr().out
    assert "step 4: the loss is nan" in said and "step 5: the loss is nan" in said
    assert said.count("rolled back to step_00000003-") == 3  # there is none of step 4
    assert load_newest_checkpoint(tmp_path / "output" / "checkpoints")[1]["step"] == 3


def test_a_run_that_stops_has_written_pending_weights(config_file, tmp_path, spoil, small_files, monkeypatch):
    """The files of epoch 1 could not be written; in epoch 2 the loss is not finite."""
    plain = Trainer.finish_epoch

    def finish_epoch(self):
        small_files(20_000)
        plain(self)
        self.saver.wait()
        small_files(None)

    spoil({4})
    monkeypatch.setattr(Trainer, "finish_epoch", finish_epoch)
    with pytest.raises(InputError, match="step 4: the loss is nan"):
        train(config_file)
    assert load_newest_checkpoint(tmp_path / "output" / "checkpoints")[1]["step"] == 3
    assert (tmp_path / "output" / "best.safetensors").exists()


def test_after_a_rollback_no_fault_appears_twice(config_file, small_data, tmp_path, spoil):
    manifest = Manifest.read(small_data / "train.csv")
    videos = [manifest[n]._replace(path=f"gone{n}" if n == 2 else manifest[n].path) for n in range(13)]
    Manifest(videos, root=small_data, classes=manifest.classes).write(tmp_path / "bad.csv")
    spoil({7})
    settings = [f"data.train={tmp_path}/bad.csv", "data.max_fault_fraction=1", "train.on_nan=rollback"]
    train(config_file, *settings)
    rows = [tuple(row[:3]) for row in csv.reader(open(tmp_path / "output" / "faults.csv"))][1:]
    assert len(rows) == len(set(rows)) >= 2


PATCHED_TRAIN = """
import sys
sys.path.insert(0, {project!r})
from training.engine import Trainer
plain = Trainer.loss
def loss(self, *arguments):
    value = plain(self, *arguments)
    return value * float("nan") if self.step == 4 and self.process.rank == 1 else value
Trainer.loss = loss
import train
from common.command_line import run_command
run_command(train.main)
"""


def test_two_processes_roll_back_together(config_file, tmp_path):
    """Only one of them has seen it."""
    from tests.commands import PROJECT

    (tmp_path / "patched.py").write_text(PATCHED_TRAIN.format(project=str(PROJECT)))
    settings = ["-c", config_file, "-o", "train.on_nan=rollback", "train.checkpoint_every_steps=2"]
    done = run_forked(tmp_path / "patched.py", *settings, processes=2)
    assert done.returncode == 0, done.stderr
    assert "rolled back to step_00000004-" in done.stdout
    assert [line["step"] for line in lines(tmp_path / "output") if "train/lr" in line] == list(range(1, 10))
    assert len(losses(tmp_path / "output")) == 8
