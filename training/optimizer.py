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


def learning_rate(step: int, optim: OptimConfig, *, steps_per_epoch: int, epochs: int) -> float:
    """The rate of optimizer step `step` (from 0).

    A cosine from `lr` at step 0 to `final_lr` at the end of the epochs (PaddleVideo solver/custom_lr.py,
    CustomWarmupCosineDecay), or a tenth of `lr` after each of `decay_epochs` (facebookresearch/TimeSformer, LR_POLICY
    steps_with_relative_lrs); the first `warmup_epochs` are a straight line from `warmup_start_lr` up to it.
    """

    def decayed(epoch: float) -> float:
        if optim.decay_epochs:
            return optim.lr * 0.1 ** sum(epoch >= end for end in optim.decay_epochs)
        return optim.final_lr + (optim.lr - optim.final_lr) * 0.5 * (1 + math.cos(math.pi * min(epoch / epochs, 1)))

    epoch = step / steps_per_epoch
    if epoch < optim.warmup_epochs:
        start = optim.warmup_start_lr
        return start + (decayed(optim.warmup_epochs) - start) * epoch / optim.warmup_epochs
    return decayed(epoch)
