"""The numbers behind the report: mistakes, confusions and calibration of an evaluation."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from evaluation.results import Results

BINS = 15  # as in Guo et al. 2017, On Calibration of Modern Neural Networks


def mistakes(results: Results) -> np.ndarray:
    """Rows of the readable videos with a wrong prediction, the most confident first: int64 [M]."""
    wrong = np.flatnonzero(results.valid & ~results.right)
    return wrong[np.argsort(-results.confidences[wrong], kind="stable")]


def confusion_cells(results: Results) -> np.ndarray:
    """The non-zero cells of the confusion matrix: int64 [C, 3] of label, prediction, number of videos."""
    num_classes = len(results.classes)
    pairs = (results.labels * num_classes + results.top[:, 0])[results.valid]
    keys, counts = np.unique(pairs, return_counts=True)
    return np.stack([keys // num_classes, keys % num_classes, counts], axis=1)


class Confusion(NamedTuple):
    """Videos of the class `label` that were mistaken for the class `predicted`."""

    label: int
    predicted: int
    videos: int
    share: float
    """Share of the readable videos with this label, 0 to 1."""


def confusions(results: Results, *, most: int) -> list[Confusion]:
    """The `most` frequent confusions of two classes; ties are ordered by share."""
    cells = confusion_cells(results)
    totals = np.bincount(cells[:, 0], cells[:, 2], len(results.classes))
    wrong = cells[cells[:, 0] != cells[:, 1]]
    order = np.lexsort((wrong[:, 1], wrong[:, 0], -wrong[:, 2] / totals[wrong[:, 0]], -wrong[:, 2]))
    return [
        Confusion(label, predicted, videos, videos / float(totals[label]))
        for label, predicted, videos in wrong[order[:most]].tolist()
    ]


class Bin(NamedTuple):
    """The videos with a confidence from number / BINS to (number + 1) / BINS."""

    number: int
    videos: int
    confidence: float
    """Mean over the videos, 0 to 1, like `accuracy`."""
    accuracy: float


@dataclass(frozen=True)
class Calibration:
    """Confidence against accuracy over the readable videos; all shares are 0 to 1."""

    bins: list[Bin]
    """The non-empty bins, in ascending order."""
    error: float
    """Expected calibration error: the mean distance between confidence and accuracy, weighted by videos per bin."""
    confidence: float
    accuracy: float


def calibration(results: Results) -> Calibration | None:
    """Computes the calibration; None if no video is readable."""
    valid = results.valid
    if not valid.any():
        return None
    confidences, right = results.confidences[valid], results.right[valid]
    numbers = np.minimum((confidences * BINS).astype(int), BINS - 1)
    counts = np.bincount(numbers, minlength=BINS)
    filled = np.flatnonzero(counts)
    accuracies = np.bincount(numbers, right, BINS)[filled] / counts[filled]
    means = np.bincount(numbers, confidences, BINS)[filled] / counts[filled]
    columns = (filled, counts[filled], means, accuracies)
    return Calibration(
        bins=[Bin(*row) for row in zip(*(column.tolist() for column in columns), strict=True)],
        error=float(np.abs(accuracies - means) @ counts[filled] / len(numbers)),
        confidence=float(confidences.mean()),
        accuracy=float(right.mean()),
    )
