"""Accuracy and loss of networks on the validation videos, and which of them is the best so far."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from common.distributed import DistributedContext
from common.labels import shows_top5
from common.metrics import METRIC_NAMES, class_averages, top_k_counts
from common.precision import autocast
from dali_pipelines import ClipLoader
from training.losses import summed_cross_entropy


class Accuracy(NamedTuple):
    """Accuracy and loss of one network, in the order of `Metric.VALIDATION`; shares are 0 to 1."""

    top1: float
    """Share of all videos; unreadable ones count as wrong."""
    top5: float
    loss: float
    """Mean over the readable videos."""
    mean_class_accuracy: float
    """Mean over the classes that have a validation video."""
    macro_f1: float
    """Mean F1 of the classes that have a validation video."""

    def better_than(self, other: "Accuracy", metric: str) -> bool:
        """Whether `metric`, a value of `train.best_metric`, is better here, or equal with a lower loss."""
        sign = -1 if metric == "loss" else 1
        mine, theirs = sign * getattr(self, metric), sign * getattr(other, metric)
        return mine > theirs or (mine == theirs and self.loss < other.loss)

    def text(self, classes: Sequence[str]) -> str:
        """The metrics for a line of output; without the top-5 accuracy if there are too few classes for one."""
        names = [name for name in METRIC_NAMES if name != "top5" or shows_top5(classes)]
        return ", ".join(f"{METRIC_NAMES[name]} {getattr(self, name):.4f}" for name in names)


_WORST = Accuracy(-1.0, -1.0, math.inf, -1.0, -1.0)


@dataclass(frozen=True)
class Best:
    """The best weights so far, which are those in best.safetensors."""

    accuracy: Accuracy = _WORST
    epoch: int = 0
    """From 1; 0: none, or an epoch that an old checkpoint does not name."""
    source: str = "network"
    """The network, or an average of weights, such as "average of 3 epochs"."""
    num_stale: int = 0
    """Validations since then in which the metric did not improve."""

    @property
    def place(self) -> str:
        """The epoch in words."""
        return f"epoch {self.epoch}" if self.epoch else "an earlier epoch"

    def after(self, candidates: Sequence[tuple[str, Accuracy]], *, metric: str, epoch: int) -> "Best":
        """The best of this and of the `candidates` (source, accuracy) of the validation after `epoch`.

        Early stopping counts the validation as stale unless the metric itself improves; a lower loss is not enough.
        """
        best = self
        for source, accuracy in candidates:
            if accuracy.better_than(best.accuracy, metric):
                best = Best(accuracy, epoch, source)
        has_improved = getattr(best.accuracy, metric) != getattr(self.accuracy, metric)
        return dataclasses.replace(best, num_stale=0 if has_improved else self.num_stale + 1)

    def state_dict(self) -> dict[str, Any]:
        """Numbers, texts and lists for a checkpoint."""
        return {**vars(self), "accuracy": list(self.accuracy)}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "Best":
        """From the state of a checkpoint; older ones only have the best top-1 accuracy. Raises `ValueError` if the
        values are none that a run can have."""
        if "best" not in state:
            top1 = state["best_top1"]
            if not isinstance(top1, int | float) or not -1 <= top1 <= 1:
                raise ValueError("best_top1")
            return cls(_WORST._replace(top1=float(top1)))
        best = cls(**state["best"])
        accuracy = Accuracy(*best.accuracy)
        shares = (accuracy.top1, accuracy.top5, accuracy.mean_class_accuracy, accuracy.macro_f1)
        counts = (best.epoch, best.num_stale)
        if (
            not all(isinstance(value, int | float) and -1 <= value <= 1 for value in shares)
            or not (isinstance(accuracy.loss, int | float) and accuracy.loss >= 0)
            or not all(type(count) is int and 0 <= count < 1 << 62 for count in counts)
            or not isinstance(best.source, str)
        ):
            raise ValueError("best")
        return dataclasses.replace(best, accuracy=accuracy)


@torch.no_grad()
def validate(
    networks: Sequence[nn.Module], loader: ClipLoader, process: DistributedContext, precision: str, *, num_classes: int
) -> tuple[list[Accuracy], int]:
    """The accuracy of each network over one pass of `loader`, and the number of unreadable videos, on all processes.

    Puts the networks into evaluation mode. Every process must call it.
    """
    sums = torch.zeros(len(networks), 3, dtype=torch.float64)  # top-1, top-5, loss
    classes = torch.zeros(len(networks), 2, num_classes, dtype=torch.float64)  # videos taken for a class, and rightly
    num_valid = torch.zeros(1, dtype=torch.float64)
    process.heartbeat.update("validating")
    for batch in loader:
        labels = batch.labels[batch.valid]
        for index, network in enumerate(networks):
            with autocast(process.device, precision):
                logits = network.eval()(batch.clips)
            logits = logits.float().cpu()
            loss = summed_cross_entropy(logits, batch.labels, batch.valid, label_smoothing=0)
            logits = logits[batch.valid]
            sums[index] += torch.cat([top_k_counts(logits, labels), loss[None]])
            predicted = logits.argmax(1)
            classes[index, 0] += predicted.bincount(minlength=num_classes)
            classes[index, 1] += labels[predicted == labels].bincount(minlength=num_classes)
        num_valid += batch.valid.sum()
        process.heartbeat.update("validating")
    totals = process.sum(torch.cat([sums.flatten(), classes.flatten(), num_valid])).cpu()
    sums, classes = totals[: sums.numel()].view_as(sums), totals[sums.numel() : -1].view_as(classes)
    videos = torch.from_numpy(loader.manifest.labels.copy()).bincount(minlength=num_classes)
    num_videos, readable = len(loader.manifest), round(totals[-1].item())
    accuracies = [
        Accuracy(
            top1 / num_videos, top5 / num_videos, loss / max(readable, 1), *class_averages(counts[0], counts[1], videos)
        )
        for (top1, top5, loss), counts in zip(sums.tolist(), classes, strict=True)
    ]
    return accuracies, num_videos - readable
