"""Accuracy and loss of networks on the validation videos."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from common.distributed import DistributedContext
from common.metrics import top_k_counts
from common.precision import autocast
from dali_pipelines import ClipLoader
from training.losses import summed_cross_entropy


class Accuracy(NamedTuple):
    """Accuracy and loss of one network, in the order of `Metric.VALIDATION`."""

    top1: float
    """Share of all videos, 0 to 1; unreadable ones count as wrong."""
    top5: float
    loss: float
    """Mean over the readable videos."""


@torch.no_grad()
def validate(
    networks: Sequence[nn.Module], loader: ClipLoader, process: DistributedContext, precision: str
) -> tuple[list[Accuracy], int]:
    """The accuracy of each network over one pass of `loader`, and the number of unreadable videos, on all processes.

    Puts the networks into evaluation mode. Every process must call it.
    """
    sums = torch.zeros(len(networks), 3, dtype=torch.float64)  # top-1, top-5, loss
    counts = torch.zeros(1, 3, dtype=torch.float64)
    process.heartbeat.update("validating")
    for batch in loader:
        for row, network in zip(sums, networks, strict=True):
            with autocast(process.device, precision):
                logits = network.eval()(batch.clips)
            logits = logits.float().cpu()
            loss = summed_cross_entropy(logits, batch.labels, batch.valid, label_smoothing=0)
            row += torch.cat([top_k_counts(logits, torch.where(batch.valid, batch.labels, -1)), loss[None]])
        counts[0, :2] += torch.stack([batch.valid.sum(), (batch.sample_ids >= 0).sum()])
        process.heartbeat.update("validating")
    *rows, (num_valid, num_videos, _) = process.sum(torch.cat([sums, counts])).tolist()
    accuracies = [Accuracy(top1 / num_videos, top5 / num_videos, loss / max(num_valid, 1)) for top1, top5, loss in rows]
    return accuracies, round(num_videos - num_valid)
