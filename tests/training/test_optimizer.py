"""The schedule against hand-made tables and PaddleVideo's, and which parameters decay."""

import pytest
import torch

from model import TimeSformer
from training.config import OptimConfig
from training.optimizer import learning_rate, make_optimizer

# ../shared/golden/train_tiny.npz `lrs`: warm-up of 4 steps from 0.005, cosine from 0.05 over 12
PADDLEVIDEO = [0.005, 0.013125, 0.02125, 0.029375, 0.0375, 0.031470476127563, 0.025, 0.018529523872437, 0.0125]
PADDLEVIDEO += [0.007322330470336, 0.003349364905389, 0.000851854342773]


def rate(step, *, steps_per_epoch=4, epochs=3, **optim):
    return learning_rate(step, OptimConfig(**optim), steps_per_epoch=steps_per_epoch, epochs=epochs)


def test_the_schedule_is_paddlevideos():
    rates = [rate(step, warmup_epochs=1, lr=0.05, warmup_start_lr=0.005) for step in range(12)]
    assert rates == pytest.approx(PADDLEVIDEO, abs=1e-12)


@pytest.mark.parametrize(
    "step, expected",
    [
        (0, 0.1),  # where the warm-up starts
        (2, 0.8),  # half-way: (0.1 + 1.5) / 2, the cosine at step 4 being 1.5
        (4, 1.5),  # the cosine, a third of the way: 1 + cos(pi / 3)
        (6, 1.0),  # half-way down
        (12, 0.0),
        (20, 0.0),  # stays there
    ],
)
def test_the_schedule_by_hand(step, expected):
    assert rate(step, warmup_epochs=1, lr=2.0, warmup_start_lr=0.1) == pytest.approx(expected)


def test_without_warmup_and_with_a_floor():
    rates = [rate(step, epochs=1, warmup_epochs=0, lr=1.0, final_lr=0.2) for step in range(5)]
    assert rates == pytest.approx([1.0, 0.8828427, 0.6, 0.3171573, 0.2])


def test_decay_in_steps():
    rates = [
        rate(step, steps_per_epoch=2, warmup_epochs=0.5, warmup_start_lr=0.1, lr=1.0, decay_epochs=[1, 2.5])
        for step in range(6)
    ]
    assert rates == pytest.approx([0.1, 1.0, 0.1, 0.1, 0.1, 0.01])


@pytest.mark.parametrize(
    "name, implementation",
    [("sgd", "fused"), ("sgd", "foreach"), ("adamw", "fused"), ("adamw", "foreach"), ("lamb", "foreach")],
)
def test_embeddings_and_the_heads_bias_do_not_decay(name, implementation):
    model = TimeSformer(num_frames=2, image_size=32, num_classes=3, embed_dim=24, depth=2, num_heads=3)
    optimizer = make_optimizer(model, OptimConfig(name=name, lr=0.1, weight_decay=0.5), implementation)
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    kept = {key for key, value in model.named_parameters() if (value == before[key]).all() and value.count_nonzero()}
    assert kept == {"cls_token", "pos_embed", "time_embed", "head.bias"}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(before)
