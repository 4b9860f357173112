"""Losses, as sums over valid clips: dividing by how many there were over all processes comes last."""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy


def summed_cross_entropy(logits: Tensor, labels: Tensor, valid: Tensor, *, label_smoothing: float) -> Tensor:
    """Cross entropy of logits [B, K] and labels [B], summed over the clips that are valid [B]; a scalar.

    `label_smoothing` spreads that share of each label evenly over all classes. Clips that are not valid add nothing,
    whatever their label.
    """
    labels = torch.where(valid, labels, -100)
    return cross_entropy(logits.float(), labels, label_smoothing=label_smoothing, reduction="sum", ignore_index=-100)
