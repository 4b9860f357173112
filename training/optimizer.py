"""Optimizers, which parameters decay, and the learning rate as a function of the step."""

import math

import torch
from torch import nn

from training.config import OptimConfig

_NO_DECAY = ("cls_token", "pos_embed", "time_embed", "head.bias")
"""PaddleVideo pptimesformer: vit_tweaks.py and ppTimeSformer_head.py give these no L2 decay, everything else has it."""


def make_optimizer(model: nn.Module, optim: OptimConfig) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum or AdamW; torch's fused kernels on a GPU, its multi-tensor ones on a CPU."""
    named = list(model.named_parameters())
    groups = [
        {"params": [value for name, value in named if name not in _NO_DECAY]},
        {"params": [value for name, value in named if name in _NO_DECAY], "weight_decay": 0.0},
    ]
    on_gpu = named[0][1].is_cuda
    common = {"lr": optim.lr, "weight_decay": optim.weight_decay, "fused": on_gpu, "foreach": not on_gpu}
    if optim.name == "sgd":
        return torch.optim.SGD(groups, momentum=optim.momentum, nesterov=optim.momentum > 0, **common)
    return torch.optim.AdamW(groups, betas=tuple(optim.betas), **common)


def learning_rate(
    step: float, *, steps: int, warmup_steps: float, lr: float, warmup_start_lr: float, final_lr: float = 0.0
) -> float:
    """The rate of optimizer step `step` (from 0) of `steps`.

    A cosine from `lr` at step 0 to `final_lr` at the end, whose first `warmup_steps` are replaced by a straight line
    from `warmup_start_lr` up to the cosine (PaddleVideo solver/custom_lr.py, CustomWarmupCosineDecay).
    """

    def cosine(at: float) -> float:
        return final_lr + (lr - final_lr) * 0.5 * (1 + math.cos(math.pi * at / steps))

    if step < warmup_steps:
        return warmup_start_lr + (cosine(warmup_steps) - warmup_start_lr) * step / warmup_steps
    return cosine(min(step, steps))
