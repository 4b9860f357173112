"""Counting what the network gets right."""

import torch
from torch import Tensor


def top_k_counts(scores: Tensor, labels: Tensor, *, ks: tuple[int, ...] = (1, 5)) -> Tensor:
    """How many of scores [B, K] have their label [B] among the k best, for each k; float64 [len(ks)].

    Rows without a label (-1) count for nothing.
    """
    index = labels.clamp(min=0)[:, None]
    target = scores.gather(1, index)
    # Equal scores go by their place, as they do in argmax.
    before = (scores > target) | ((scores == target) & (torch.arange(scores.shape[1], device=scores.device) < index))
    rank = before.sum(1)
    counts = (labels >= 0) & ~target.isnan()[:, 0]
    return torch.stack([((rank < k) & counts).sum() for k in ks]).double()
