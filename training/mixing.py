"""VideoMix: mixes each clip with another one of its micro-batch, on the device, with one share per micro-batch.

Mixup (Zhang et al. 2018) blends two clips; CutMix (Yun et al. 2019; for video VideoMix, Yun et al. 2020, section 3.2)
pastes a box of one into the other. PaddleVideo's VideoMix (loader/pipelines/mix.py) draws one of them for each batch.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.config import MixConfig


class Mixed(NamedTuple):
    """A mixed batch of clips."""

    clips: Tensor
    """[B, 3, T, S, S]"""
    partners: Tensor
    """int64 [B], on the clips' device: index of the clip that was mixed into each."""
    share: float
    """Share of each clip that remains, 0 to 1; the rest is its partner's."""

    def label_shares(self, labels: Tensor) -> list[tuple[float, Tensor]]:
        """Shares that sum to 1, each with its labels [B]."""
        if self.share == 1:
            return [(1.0, labels)]
        return [(self.share, labels), (1 - self.share, labels[self.partners])]


def mix_clips(clips: Tensor, valid: Tensor, mix: MixConfig, random: np.random.Generator) -> Mixed:
    """Mix the `valid` clips (bool [B], on the CPU) of clips [B, 3, T, S, S] with each other, into new memory."""
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
    """Paste a box of 1 - `share` of the area, with a random centre, clipped at the borders."""
    height, width = clips.shape[-2:]
    # PaddleVideo's box spans frames and entire rows, but its area is computed from rows and columns: of 8 frames of
    # 224 pixels it replaces 27 % on average, but counts 1 %. See docs/train.md.
    axes = (2, 3) if box == "reference" else (3, 4)
    index = [slice(None)] * clips.ndim
    area = 1
    for axis in axes:
        size = clips.shape[axis]
        half, centre = int(size * math.sqrt(1 - share)) // 2, int(random.integers(size))
        low, high = max(centre - half, 0), min(centre + half, size)
        index[axis] = slice(low, high)
        area *= high - low
    mixed = clips.clone()
    mixed[tuple(index)] = clips[tuple(index)][partners]
    return Mixed(mixed, partners, 1 - area / (height * width))
