"""Fine-tuning: frozen blocks, rates by layer, moving average, class weights and augmentation, together and resumed."""

import pytest
import torch

from common.config import load_config
from common.distributed import start_process
from common.weights import load_weights
from dali_pipelines import InputError
from model import TimeSformer
from tests.training.test_engine import assert_equal_weights, lines, train
from tests.training.test_recipe import weights_of
from training.averaging import WeightAverage
from training.checkpoints import load_newest_checkpoint, save_checkpoint
from training.engine import Trainer

RECIPE = [
    "train.epochs=2",
    "optim.name=adamw",
    "optim.lr=0.003",
    "optim.layer_decay=0.7",
    "optim.head_lr_factor=5",
    "train.freeze_blocks=1",
    "train.ema_decay=0.9",
    "data.balance_classes=true",
    "augment.randaugment_ops=2",
    "augment.erasing_prob=0.5",
    "mix.mixup_alpha=0.2",
]


def network(depth=3):
    torch.manual_seed(0)
    return TimeSformer(num_frames=2, image_size=32, num_classes=3, embed_dim=24, depth=depth, num_heads=3)


@pytest.mark.slow
def test_a_fine_tuned_run_resumes_exactly(config_file, tmp_path, capsys):
    source = weights_of(config_file, tmp_path / "w.safetensors").state_dict()
    recipe = [*RECIPE, f"train.pretrained={tmp_path}/w.safetensors"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    trainer = train(config_file, *recipe, f"output={whole}")
    said = capsys.readouterr().out
    assert "optimizer AdamW (torch fused) with 0.7 to 5 times the learning rate" in said
    assert "average of 6 steps: val top-1 0." in said and f"{whole}/ema.safetensors" in said
    train(config_file, *recipe, f"output={parts}", "train.max_steps=4")
    assert (parts / "ema.safetensors").exists()  # also in the middle of an epoch
    train(config_file, *recipe, f"output={parts}", resume=True)
    assert_equal_weights(whole, parts)
    averages = [load_weights(folder / "ema.safetensors").state for folder in (whole, parts)]
    last = load_weights(whole / "last.safetensors").state
    frozen = ("cls_token", "pos_embed", "time_embed", "patch_embed.", "blocks.0.")
    for name, value in averages[0].items():
        assert (value == averages[1][name]).all(), name
        if name.startswith(frozen):
            assert (value == source[name]).all() and (last[name] == source[name]).all(), name
        else:
            assert (value != last[name]).any() and (last[name] != source[name]).any(), name
    logged = [line for line in lines(whole) if "ema/top1" in line]
    assert len(logged) == 2 and {"ema/top5", "ema/loss", "val/top1"} <= set(logged[0])
    assert trainer.network.blocks[0].mlp.fc1.weight.grad is None
    with pytest.raises(InputError, match="train.freeze_blocks was 1 and is 2 now"):
        train(config_file, *recipe, "train.freeze_blocks=2", f"output={whole}", resume=True)
    other = ["train.ema_decay=null", "train.swa_epochs=1", "train.epochs=3"]
    with pytest.raises(InputError, match="a moving average of the weights; resume with train.swa_epochs=0"):
        train(config_file, *recipe, *other, f"output={whole}", resume=True)


@pytest.mark.slow
def test_the_step_augments(config_file):
    with start_process("cpu") as process:
        trainer = Trainer(load_config(str(config_file)), process, resume=False)
        batch = next(iter(trainer.train_loader))
        trainer.train_loader.close()
        trainer.monitor.close()
        clips = batch.clips.clone()
        plain = trainer.forward_backward(batch, 0, is_last=True)
        trainer.config.augment.randaugment_ops = 4
        augmented = [trainer.forward_backward(batch, micro_step, is_last=True)[0] for micro_step in (0, 0, 1)]
        assert augmented[0] == augmented[1] and len({plain[0], augmented[0], augmented[2]}) == 3
        assert (batch.clips == clips).all()


@pytest.mark.slow
def test_checkpoints_from_before_these_settings(config_file, tmp_path):
    train(config_file, "train.max_steps=6")
    output = tmp_path / "output"
    newest = load_newest_checkpoint(output / "checkpoints")
    old = newest.state
    del old["average_kind"], old["config"]["augment"], old["config"]["optim"]["layer_decay"]
    del old["config"]["data"]["balance_classes"]
    for group in old["optimizer"]["param_groups"]:
        del group["lr_factor"]
    newest.path.unlink()
    save_checkpoint(output / "checkpoints", old["step"], old)
    with pytest.raises(InputError, match="optim.layer_decay was 1.0 and is 0.5 now"):
        train(config_file, "optim.layer_decay=0.5", resume=True)
    train(config_file, resume=True)
    train(config_file, f"output={tmp_path}/whole")
    assert_equal_weights(tmp_path / "whole", output)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_frozen_blocks_get_no_gradients_and_keep_nothing(checkpointing):
    model = network().train()
    model.activation_checkpointing = checkpointing
    model.freeze(2)
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda _, inputs, outputs: seen.append((inputs[2], outputs[0].requires_grad)))
    model(torch.rand(2, 3, 2, 32, 32)).sum().backward()
    assert [needs for _, needs in seen[:3]] == [False, False, True]  # checkpointing runs the last one again
    assert [paths is None for paths, _ in seen[:3]] == [True, True, False]  # drop path
    trained = {name for name, value in model.named_parameters() if value.grad is not None}
    assert trained == {name for name, _ in model.named_parameters() if name.startswith(("blocks.2.", "norm.", "head."))}
    model.freeze(3)
    model.zero_grad()
    model(torch.rand(2, 3, 2, 32, 32)).sum().backward()
    assert {name for name, value in model.named_parameters() if value.grad is not None} == {
        "norm.weight", "norm.bias", "head.weight", "head.bias",
    }  # fmt: skip
    with pytest.raises(ValueError, match="num_blocks is 4; expected 0 to 3"):
        model.freeze(4)


def test_freezing_changes_no_other_draw():
    clips, results = torch.rand(2, 3, 2, 32, 32), []
    for frozen in (0, 1):  # the first block drops nothing anyway
        model = network().train()
        model.freeze(frozen)
        torch.manual_seed(1)
        results.append(model(clips))
    assert (results[0] == results[1]).all()


def test_the_moving_average_by_hand():
    """timm's warm-up: after n steps the decay is (1 + n) / (10 + n), at most the given one."""
    model = network(depth=1)
    average = WeightAverage(model, decay=0.2)
    values, expected = [1.0, 2.0, -1.0, 5.0, 0.0], []
    for n, value in enumerate(values):
        torch.nn.init.constant_(model.head.bias, value)
        average.update(model)
        decay = min(0.2, (1 + n) / (10 + n))
        expected.append(value if n == 0 else decay * expected[-1] + (1 - decay) * value)
        torch.testing.assert_close(average.network.head.bias, torch.full((3,), expected[-1]))
    assert average.count == 5 and average.name == "ema" and min(0.2, 2 / 11) != min(0.2, 4 / 13)
