"""Which weights become best.safetensors, when a run validates, and when it stops."""

import itertools
import math

import numpy as np
import pytest
import torch

from common.metrics import class_averages
from common.weights import load_weights
from tests.training.test_engine import lines, train
from training import engine
from training.checkpoints import load_checkpoint, save_checkpoint
from training.validation import Accuracy, Best


def accuracy(top1, loss=1.0, mean_class_accuracy=0.5, macro_f1=0.5):
    return Accuracy(top1, 1.0, loss, mean_class_accuracy, macro_f1)


# -- the decision --


@pytest.mark.parametrize(
    "metric, one, other, expected",
    [
        ("top1", accuracy(0.6, loss=2), accuracy(0.5), True),
        ("top1", accuracy(0.5, loss=0.508), accuracy(0.5, loss=1.298), True),
        ("top1", accuracy(0.5), accuracy(0.5), False),
        ("loss", accuracy(0.1, loss=0.5), accuracy(0.9), True),
        ("macro_f1", accuracy(0.1, macro_f1=0.6), accuracy(0.9), True),
        ("mean_class_accuracy", accuracy(0.9), accuracy(0.1, mean_class_accuracy=0.6), False),
    ],
)
def test_the_metric_decides_and_then_the_loss(metric, one, other, expected):
    assert one.better_than(other, metric) is expected


def test_a_lower_loss_alone_replaces_the_weights_but_does_not_prevent_early_stopping():
    best = Best().after([("network", accuracy(0.5))], metric="top1", epoch=1)
    assert (best.epoch, best.num_stale) == (1, 0)
    best = best.after([("network", accuracy(0.5, loss=0.9)), ("average", accuracy(0.4))], metric="top1", epoch=2)
    assert (best.epoch, best.source, best.num_stale) == (2, "network", 1)
    best = best.after([("network", accuracy(0.4)), ("average", accuracy(0.6))], metric="top1", epoch=3)
    assert (best.epoch, best.source, best.num_stale) == (3, "average", 0)
    assert Best.from_state({"best": best.state_dict()}) == best


def test_averages_over_classes_by_hand():
    """Class 2 has no video and counts in neither, though a video of class 0 was taken for it."""
    labels, predicted = [0, 0, 0, 1, 1, 3], [0, 0, 2, 1, 0, 1]
    counts = torch.from_numpy(np.stack([np.bincount(each, minlength=4) for each in (predicted, labels)]))
    correct = torch.tensor([2, 1, 0, 0])
    recall, f1 = class_averages(counts[0], correct, counts[1])
    assert recall == pytest.approx((2 / 3 + 1 / 2 + 0) / 3) and f1 == pytest.approx((4 / 6 + 2 / 4 + 0) / 3)


def test_top5_is_shown_from_six_classes_on():
    assert "top-5" not in accuracy(0.5).text("abcde") and "top-1 0.5000, top-5 1.0000, mean class" in accuracy(
        0.5
    ).text("abcdef")


# -- runs --


@pytest.fixture
def scripted(monkeypatch):
    """Validations with given results: of the network, then of the averaged weights."""

    def script(*validations):
        results = iter(validations)

        def validate(self, *networks):
            return [next(results) for _ in networks], 0

        monkeypatch.setattr(engine.Trainer, "validate", validate)

    return script


@pytest.mark.slow
def test_validation_agrees_with_scores_video_by_video(config_file, tmp_path):
    trainer = train(config_file, "train.epochs=1")
    (found,), _ = trainer.validate(trainer.network)
    trainer.network.eval()
    with torch.no_grad():
        batches = list(trainer.val_loader)
        predicted = torch.cat([trainer.network(batch.clips).argmax(1)[batch.valid] for batch in batches])
    labels = torch.cat([batch.labels[batch.valid] for batch in batches])
    recalls, f1s = [], []
    for label in range(3):
        hits, of_class, taken = (
            each.sum().item()
            for each in ((predicted == label) & (labels == label), labels == label, predicted == label)
        )
        recalls.append(hits / of_class)
        f1s.append(2 * hits / (of_class + taken))
    assert found.mean_class_accuracy == pytest.approx(sum(recalls) / 3)
    assert found.macro_f1 == pytest.approx(sum(f1s) / 3)
    assert lines(tmp_path / "output")[-1]["val/macro_f1"] == pytest.approx(found.macro_f1)


@pytest.mark.slow
def test_best_is_the_best_of_network_and_average_and_the_output_says_so(config_file, tmp_path, scripted, capsys):
    scripted(accuracy(0.5, 2), accuracy(0.5, 1), accuracy(0.4), accuracy(0.4), accuracy(0.7))
    result = train(
        config_file, "train.swa_epochs=2", "train.max_steps=6"
    ).result()  # epoch 2: both, of the same weights
    assert result.best == Best(accuracy(0.5), 2, num_stale=1)
    output = tmp_path / "output"
    scripted(accuracy(0.4), accuracy(0.8))
    result = train(config_file, "train.swa_epochs=2", resume=True).result()
    names = ("best", "last", "swa")
    best, last, swa = (load_weights(output / f"{name}.safetensors").state["head.weight"] for name in names)
    assert torch.equal(best, swa) and not torch.equal(best, last)
    assert result.best == Best(accuracy(0.8), 3, "average of 2 epochs") and result.accuracy == accuracy(0.4)
    said = capsys.readouterr().out
    assert f"in {output}/swa.safetensors, best so far: {output}/best.safetensors" in said
    assert f"best: average of 2 epochs, epoch 3, val top-1 0.8000: {output}/best.safetensors" in said
    assert result.weights == {name: output / f"{name}.safetensors" for name in names}


@pytest.mark.slow
def test_ties_go_to_the_lower_loss(config_file, tmp_path, scripted, capsys):
    scripted(accuracy(0.5, 1.298), accuracy(0.5, 0.508), accuracy(0.5, 0.6))
    trainer = train(config_file)
    assert trainer.state.best == Best(accuracy(0.5, 0.508), 2, num_stale=2)
    assert (
        "epoch 3: val top-1 0.5000, mean class accuracy 0.5000, macro F1 0.5000, loss 0.6000, best top-1 0.5000 "
        in (capsys.readouterr().out)
    )


@pytest.mark.slow
def test_early_stopping_ends_a_run_and_more_patience_continues_it(config_file, tmp_path, scripted, capsys):
    settings = ["train.epochs=6", "train.early_stopping=2"]
    scripted(accuracy(0.5), accuracy(0.5, 0.9), accuracy(0.4))
    result = train(config_file, *settings).result()
    assert (result.step, result.stopped_early, result.best.epoch) == (9, True, 2)
    message = "stopped after epoch 3: no better than top-1 0.5000 for 2 validations (train.early_stopping); a larger"
    assert message in capsys.readouterr().out
    assert train(config_file, *settings, resume=True).step == 9
    assert message in capsys.readouterr().out
    scripted(accuracy(0.6), accuracy(0.6), accuracy(0.6))
    result = train(config_file, "train.epochs=6", "train.early_stopping=3", resume=True).result()
    assert (result.step, result.stopped_early, result.best.epoch) == (18, False, 4)


@pytest.mark.slow
def test_epochs_between_validations_are_trained_averaged_and_saved(config_file, tmp_path, capsys):
    trainer = train(config_file, "train.epochs=5", "train.validate_every=2", "train.swa_epochs=3")
    output = tmp_path / "output"
    logged = lines(output)
    assert [line["step"] for line in logged if "val/top1" in line] == [6, 12, 15]
    assert [line["step"] for line in logged if "swa/top1" in line] == [12, 15] and trainer.average.count == 3
    assert [path.name[:13] for path in sorted((output / "checkpoints").iterdir())] == ["step_00000012", "step_00000015"]
    assert "epoch 3: not validated, train.validate_every=2 (" in capsys.readouterr().out


@pytest.mark.slow
def test_weights_that_are_not_finite_are_noticed_without_a_validation(config_file, monkeypatch):
    from dali_pipelines import InputError

    update = engine.Trainer.train_epoch

    def train_epoch(self):
        update(self)
        with torch.no_grad():
            self.network.head.bias[0] = math.inf

    monkeypatch.setattr(engine.Trainer, "train_epoch", train_epoch)
    with pytest.raises(InputError, match="step 2: the weights are not finite after it"):
        train(config_file, "train.validate_every=5")


@pytest.mark.slow
def test_another_metric_on_resume_starts_from_the_saved_weights(config_file, tmp_path, scripted, capsys):
    scripted(accuracy(0.9, macro_f1=0.3), accuracy(0.5, macro_f1=0.2))
    train(config_file, "train.max_steps=6")
    scripted(accuracy(0.5, macro_f1=0.4))
    best = train(config_file, "train.best_metric=macro_f1", resume=True).state.best
    assert (best.epoch, best.accuracy.macro_f1) == (3, 0.4)
    note = (
        "note: best.safetensors holds the weights of epoch 1, chosen by their top1; from now on weights with a better "
        "macro_f1 replace them (train.best_metric)"
    )
    assert note in capsys.readouterr().out.splitlines()


@pytest.mark.slow
@pytest.mark.parametrize("old_top1, expected", [(0.9, 0), (0.5, 3)])
def test_older_checkpoints_only_know_the_best_top1(config_file, tmp_path, scripted, old_top1, expected):
    scripted(*itertools.repeat(accuracy(0.5), 3))
    train(config_file, "train.max_steps=6")
    path = sorted((tmp_path / "output" / "checkpoints").iterdir())[-1]
    state = load_checkpoint(path)
    del state["best"]
    for key in ("best_metric", "early_stopping", "validate_every"):
        del state["config"]["train"][key]
    path.unlink()
    save_checkpoint(path.parent, state["step"], state | {"best_top1": old_top1})
    assert train(config_file, resume=True).state.best.epoch == expected
