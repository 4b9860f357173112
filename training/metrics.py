"""Counting what the network gets right."""

import torch
from torch import Tensor


def top_k_counts(scores: Tensor, labels: Tensor, *, ks: tuple[int, ...] = (1, 5)) -> Tensor:
    """How many of scores [B, K] have their label [B] among the k best, for each k; float64 [len(ks)].

    Rows without a label (-1) count for nothing.
    """
    labelled = labels >= 0
    target = scores.gather(1, labels.clamp(min=0)[:, None])
    # Ties count against us: a network that says the same for every class has not found the label.
    rank = (scores >= target).sum(1)  # from 1; 0 where the scores are not numbers
    return torch.stack([((rank >= 1) & (rank <= k) & labelled).sum() for k in ks]).double()
