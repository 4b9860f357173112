"""VideoMix: each clip mixed with another of its micro-batch, on the device, with one share a micro-batch.

Mixup (Zhang et al. 2018) fades two clips; CutMix (Yun et al. 2019; for video VideoMix, Yun et al. 2020, section 3.2)
pastes a box of one into the other. PaddleVideo's VideoMix (loader/pipelines/mix.py) draws one of the two each batch.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.config import MixConfig


class Mixed(NamedTuple):
    clips: Tensor
    """[B, 3, T, S, S]"""
    partners: Tensor
    """int64 [B], on the clips' device: which clip was mixed into each."""
    share: float
    """How much of a clip is its own, 0 to 1, the same for all; the rest is its partner's."""


def mix_clips(clips: Tensor, valid: Tensor, mix: MixConfig, random: np.random.Generator) -> Mixed:
    """Clips [B, 3, T, S, S], those of them that are `valid` [B] (on the CPU) mixed among themselves, in new memory."""
    partners = torch.arange(len(clips))
    good = valid.nonzero()[:, 0]
    partners[good] = good[random.permutation(len(good))]
    partners = partners.to(clips.device, non_blocking=True)
    if random.random() < mix.cutmix_prob:
        return _cutmix(clips, partners, random.beta(mix.cutmix_alpha, mix.cutmix_alpha), mix.cutmix_box, random)
    if mix.mixup_alpha:
        share = random.beta(mix.mixup_alpha, mix.mixup_alpha)
        return Mixed(torch.lerp(clips[partners], clips, share), partners, share)
    return Mixed(clips, partners, 1.0)


def _cutmix(clips: Tensor, partners: Tensor, share: float, box: str, random: np.random.Generator) -> Mixed:
    """The box has a share of 1 - `share` and its centre anywhere; what of it lies outside is cut off."""
    height, width = clips.shape[-2:]
    # PaddleVideo's box spans frames and rows, whole rows of them, and counts against rows and columns: of 8 frames of
    # 224 pixels it replaces 27 % on average, and says 1 %. docs/training.md has more.
    axes = (2, 3) if box == "reference" else (3, 4)
    pasted = [slice(None)] * clips.ndim
    area = 1
    for axis in axes:
        size = clips.shape[axis]
        half, centre = int(size * math.sqrt(1 - share)) // 2, int(random.integers(size))
        low, high = max(centre - half, 0), min(centre + half, size)
        pasted[axis] = slice(low, high)
        area *= high - low
    clips, theirs = clips.clone(), clips
    clips[tuple(pasted)] = theirs[(partners, *pasted[1:])]
    return Mixed(clips, partners, 1 - area / (height * width))
