"""Losses, as sums over valid clips; later they are divided by the number of clips over all processes."""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div


def summed_cross_entropy(logits: Tensor, labels: Tensor, valid: Tensor, *, label_smoothing: float) -> Tensor:
    """Cross entropy of logits [B, K] and labels [B], summed over the clips that are valid (bool [B]); a scalar.

    label_smoothing: share of each label, 0 to 1, that is spread evenly over all classes. Labels of invalid clips are
    ignored.
    """
    labels = torch.where(valid, labels, -100)
    return cross_entropy(logits.float(), labels, label_smoothing=label_smoothing, reduction="sum", ignore_index=-100)


def summed_distillation(logits: Tensor, teacher_logits: Tensor, valid: Tensor, *, temperature: float) -> Tensor:
    """Distance of logits [B, K] from the teacher's, summed over the clips that are valid (bool [B]); a scalar.

    It is the Kullback-Leibler divergence of softmax(logits / temperature), times temperature**2, so that at any
    temperature its gradients are as large as those of the labels (Hinton, Vinyals, Dean: Distilling the Knowledge in a
    Neural Network, 2015, section 2).
    """
    student, teacher = ((value.float() / temperature).log_softmax(1) for value in (logits, teacher_logits))
    divergence = kl_div(student, teacher, reduction="none", log_target=True).sum(1)
    return torch.where(valid, divergence, 0).sum() * temperature**2
