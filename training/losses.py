"""Losses, as sums over valid clips; later they are divided by the number of clips over all processes."""

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div


def summed_cross_entropy(
    logits: Tensor, labels: Tensor, valid: Tensor, *, label_smoothing: float, class_weights: Tensor | None = None
) -> Tensor:
    """Cross entropy of logits [B, K] and labels [B], summed over the clips that are valid (bool [B]); a scalar.

    label_smoothing: share of each label, 0 to 1, that is spread evenly over all classes. Labels of invalid clips are
    ignored. class_weights [K]: a clip's whole loss is multiplied by the weight of its label, as if it were drawn that
    often. (The weights of torch's `cross_entropy` also apply to the smoothed part, class by class: with many clips of
    one class, they would teach the network to expect the rare ones.)
    """
    labels = torch.where(valid, labels, -100)
    losses = cross_entropy(
        logits.float(),
        labels,
        label_smoothing=label_smoothing,
        reduction="sum" if class_weights is None else "none",
        ignore_index=-100,
    )
    return losses if class_weights is None else (losses * class_weights[labels.clamp(min=0)]).sum()


def balanced_class_weights(labels: np.ndarray, num_classes: int) -> Tensor:
    """Weights [K] inversely proportional to how often each class occurs in `labels` (int [N], 0 to K - 1); their mean
    over the labels is 1. float32. The weight of a class that does not occur has no effect, and is finite."""
    counts = torch.from_numpy(np.bincount(labels, minlength=num_classes))
    return (len(labels) / (counts.count_nonzero() * counts.clamp(min=1))).float()


def summed_distillation(logits: Tensor, teacher_logits: Tensor, valid: Tensor, *, temperature: float) -> Tensor:
    """Distance of logits [B, K] from the teacher's, summed over the clips that are valid (bool [B]); a scalar.

    It is the Kullback-Leibler divergence of softmax(logits / temperature), times temperature**2, so that at any
    temperature its gradients are as large as those of the labels (Hinton, Vinyals, Dean: Distilling the Knowledge in a
    Neural Network, 2015, section 2).
    """
    student, teacher = ((value.float() / temperature).log_softmax(1) for value in (logits, teacher_logits))
    divergence = kl_div(student, teacher, reduction="none", log_target=True).sum(1)
    return torch.where(valid, divergence, 0).sum() * temperature**2
