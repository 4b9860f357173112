"""What the published results were reached with: pretrained weights, VideoMix, averaged weights, a teacher."""

import dataclasses

import numpy as np
import pytest
import torch

from common.config import load_config, preprocessing
from common.distributed import start_process
from common.weights import Weights, build_network, load_weights, save_weights
from dali_pipelines import InputError
from model import TimeSformer
from tests.training.test_engine import assert_equal_weights, lines, losses, train
from training.engine import Trainer

pytestmark = pytest.mark.slow

CLASSES = ("ash", "birch", "cedar")
MIX = ["mix.cutmix_prob=0.5", "mix.mixup_alpha=0.2"]


def weights_of(config_file, path, *overrides, classes=CLASSES, seed=3):
    """Random weights of the network of `config_file` with overrides, in a file."""
    config = load_config(str(config_file), overrides)
    torch.manual_seed(seed)
    network = build_network(config.model, preprocessing(config.data), len(classes))
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    save_weights(path, Weights(vars(config.model), preprocessing(config.data), classes, network.state_dict()))
    return network


# -- pretrained weights --


def test_training_starts_from_the_weights_and_reports_every_tensor(config_file, tmp_path, capsys):
    source = weights_of(config_file, tmp_path / "w.safetensors", "data.num_frames=8", classes=("a", "b", "c", "d"))
    pretrained = f"train.pretrained={tmp_path}/w.safetensors"
    config = load_config(str(config_file), [pretrained, "data.std=[0.5,0.5,0.5]"])
    with start_process("cpu") as process:
        trainer = Trainer(config, process, resume=False)
        trainer.train_loader.close()
        trainer.monitor.close()
    said = capsys.readouterr().out
    assert "time_embed: resized from 8 to 4 frames" in said and "a new head: 4 classes in the file, 3 here" in said
    assert "note: trained with data.std=[1.0, 1.0, 1.0], which is [0.5, 0.5, 0.5] here" in said
    assert (trainer.network.blocks[1].mlp.fc1.weight == source.blocks[1].mlp.fc1.weight).all()
    with pytest.raises(InputError, match="depth is 3|set model.depth"):
        train(config_file, pretrained, "model.depth=3", f"output={tmp_path}/deeper")


def test_a_resumed_run_does_not_begin_again(config_file, tmp_path, capsys):
    weights_of(config_file, tmp_path / "w.safetensors")
    settings = [f"train.pretrained={tmp_path}/w.safetensors"]
    train(config_file, *settings, f"output={tmp_path}/whole")
    train(config_file, *settings, "train.max_steps=4", f"output={tmp_path}/parts")
    (tmp_path / "w.safetensors").unlink()
    capsys.readouterr()
    train(config_file, *settings, f"output={tmp_path}/parts", resume=True)
    assert "tensors loaded" not in capsys.readouterr().out
    assert_equal_weights(tmp_path / "whole", tmp_path / "parts")


# -- VideoMix --


def test_mixing_is_the_same_in_an_unbroken_run_and_a_resumed_one(config_file, tmp_path):
    train(config_file, *MIX, f"output={tmp_path}/whole")
    train(config_file, *MIX, "train.max_steps=5", f"output={tmp_path}/parts")
    train(config_file, *MIX, f"output={tmp_path}/parts", resume=True)
    assert_equal_weights(tmp_path / "whole", tmp_path / "parts")
    train(config_file, f"output={tmp_path}/plain")
    assert losses(tmp_path / "whole") != losses(tmp_path / "plain")


# -- averaged weights --


@pytest.mark.parametrize("epochs", [1, 2, 3])
def test_the_average_is_that_of_the_last_epochs(config_file, tmp_path, epochs, capsys):
    output = tmp_path / "output"
    each = []
    for step in (3, 6, 9):  # an epoch each
        train(config_file, f"train.swa_epochs={epochs}", f"train.max_steps={step}", resume=step > 3)
        each.append(load_weights(output / "last.safetensors").state)
        assert (output / "swa.safetensors").exists() == (step // 3 > 3 - epochs)
    averaged = load_weights(output / "swa.safetensors")
    for name, value in averaged.state.items():
        expected = torch.stack([state[name] for state in each[3 - epochs :]]).mean(0)
        torch.testing.assert_close(value, expected, msg=lambda text, name=name: f"{name}: {text}")
    logged = [line for line in lines(output) if "swa/top1" in line]
    assert len(logged) == epochs and 0 <= logged[-1]["swa/top1"] <= 1
    assert f"average of {epochs} epochs: val top-1" in capsys.readouterr().out
    if epochs == 1:
        assert logged[-1]["swa/top1"] == logged[-1]["val/top1"] and logged[-1]["swa/loss"] == logged[-1]["val/loss"]


def test_an_average_that_has_begun_is_not_mixed_with_another(config_file, tmp_path):
    train(config_file, "train.swa_epochs=2")
    with pytest.raises(InputError, match="weights have been averaged since epoch 2; resume with the old train.epochs"):
        train(config_file, "train.swa_epochs=1", "train.epochs=5", resume=True)
    train(config_file, "train.swa_epochs=4", "train.epochs=5", resume=True)


# -- a teacher --


def trainer_of(config_file, tmp_path, *overrides):
    config = load_config(str(config_file), [f"distill.teacher={tmp_path}/teacher.safetensors", *overrides])
    with start_process("cpu") as process:
        trainer = Trainer(config, process, resume=False)
        batch = next(iter(trainer.train_loader))
        trainer.train_loader.close()
        trainer.monitor.close()
    return trainer, batch


@pytest.mark.parametrize("every", [1, 2])
def test_the_student_takes_every_kth_frame_of_the_teachers(config_file, tmp_path, every):
    weights_of(config_file, tmp_path / "teacher.safetensors", f"data.num_frames={4 * every}", "model.depth=3")
    trainer, batch = trainer_of(config_file, tmp_path, "distill.temperature=2", "distill.weight=0.25", "data.stride=2")
    assert batch.clips.shape[2] == 4 * every and trainer.teacher_frames == every
    assert trainer.train_loader._view.stride == 2 / every  # the window stays the student's
    assert not trainer.teacher.training and not any(value.requires_grad for value in trainer.teacher.parameters())
    seen = []
    trainer.network.register_forward_pre_hook(lambda _, clips: seen.append(clips[0]))
    torch.manual_seed(0)
    before = {name: value.clone() for name, value in trainer.teacher.state_dict().items()}
    loss_sum = trainer.forward_backward(batch, 0, is_last=True)[0].item()
    assert (seen[0] == batch.clips[:, :, ::every]).all()
    assert all((value == before[name]).all() for name, value in trainer.teacher.state_dict().items())
    # The same by hand; drop path is off, so that the network says the same again.
    assert trainer.config.model.drop_path == 0.2
    trainer, batch = trainer_of(
        config_file, tmp_path, "distill.temperature=2", "distill.weight=0.25", "data.stride=2",
        "model.drop_path=0", f"output={tmp_path}/again",
    )  # fmt: skip
    loss_sum = trainer.forward_backward(batch, 0, is_last=True)[0].item()
    with torch.no_grad():
        logits, teacher = trainer.network(batch.clips[:, :, ::every]), trainer.teacher(batch.clips)
    hard = torch.nn.functional.cross_entropy(logits, batch.labels, label_smoothing=0.1, reduction="sum")
    p, q = (teacher / 2).softmax(1), (logits / 2).softmax(1)
    soft = 4 * (p * (p.log() - q.log())).sum()
    assert loss_sum == pytest.approx((0.75 * hard + 0.25 * soft).item(), rel=1e-5)


def test_a_student_that_sees_only_the_teacher_becomes_it(config_file, tmp_path):
    weights_of(config_file, tmp_path / "teacher.safetensors", "model.drop_path=0")
    teacher = f"distill.teacher={tmp_path}/teacher.safetensors"
    settings = [teacher, "distill.weight=1", "model.drop_path=0", "optim.lr=0.01", "train.epochs=40", *MIX]
    trainer = train(config_file, *settings, f"output={tmp_path}/taught")
    divergence = losses(tmp_path / "taught")
    assert np.mean(divergence[-9:]) < 0.3 * np.mean(divergence[:9])
    assert trainer.teacher is not trainer.network


def test_teachers_that_do_not_fit(config_file, tmp_path):
    for changes, classes, message in [
        (["data.num_frames=6"], CLASSES, "takes 6 frames; expected data.num_frames, 4, or a multiple of it"),
        (["data.num_frames=2"], CLASSES, "takes 2 frames"),
        (["data.crop_size=64"], CLASSES, "was trained with data.crop_size=64; here it is 32"),
        (["data.mean=[0.5,0.5,0.5]"], CLASSES, "was trained with data.mean"),
        ([], ("a", "b", "c"), r"knows 3 classes \(a, ...\); expected the 3 here \(ash, ...\)"),
        ([], ("a", "b"), "knows 2 classes"),
    ]:
        weights_of(config_file, tmp_path / "teacher.safetensors", *changes, classes=classes)
        with pytest.raises(InputError, match=f"distill.teacher .*teacher.safetensors {message}"):
            train(config_file, f"distill.teacher={tmp_path}/teacher.safetensors")


# -- how it is computed --


def test_activation_checkpointing_changes_nothing(config_file, tmp_path):
    train(config_file, "train.max_steps=4", f"output={tmp_path}/plain")
    train(config_file, "train.max_steps=4", "train.activation_checkpointing=true", f"output={tmp_path}/less")
    assert_equal_weights(tmp_path / "plain", tmp_path / "less", within=1e-6)


def test_what_a_config_may_say_is_kept_in_the_weights(config_file, tmp_path):
    weights_of(config_file, tmp_path / "w.safetensors")
    fields = {field.name for field in dataclasses.fields(load_config(str(config_file)).model)}
    weights = load_weights(tmp_path / "w.safetensors")
    assert set(weights.model) == fields and isinstance(weights.build(), TimeSformer)
