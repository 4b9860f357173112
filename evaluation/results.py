"""The results of an evaluation: accuracies, intervals and confusions. Does not import torch."""

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, NotRequired, TypedDict

import numpy as np

from dali_pipelines.errors import InputError

AVERAGES = ("prob", "score")
TOP = 5
Z_95 = 1.959963984540054
"""Quantile of the normal distribution that leaves 2.5% above it."""


@dataclass(frozen=True)
class Protocol:
    """Which clips of a video the network sees, and how their predictions are averaged. Raises `InputError` for invalid
    combinations."""

    windows: int = 1
    """Temporal windows, the first at the start of the video, the last at its end."""
    crops: int = 3
    """3: along the long side; 1: the centre crop of validation."""
    average: str = "prob"
    """prob: mean of the probabilities; score: softmax of the mean of the logits."""

    def __post_init__(self) -> None:
        if self.windows < 1:
            raise InputError(f"--windows is {self.windows}; expected 1 or more")
        if self.crops not in (1, 3):
            raise InputError(f"--crops is {self.crops}; expected 1 or 3")
        if self.average not in AVERAGES:
            raise InputError(f"--average is {self.average}; expected one of {', '.join(AVERAGES)}")
        if self.crops == 1 and self.windows > 1:
            raise InputError(f"--windows {self.windows} needs --crops 3: the centre crop has one window")

    @property
    def name(self) -> str:
        """The name of the top-1 accuracy of this protocol in results.json."""
        return f"test/top1_{self.windows}x{self.crops}_{self.average}"


class WeightsSummary(TypedDict):
    """One of the evaluated weights files, with the accuracies of that network alone."""

    path: str
    sha256: str
    top1: float
    top5: float


class ClipSummary(TypedDict):
    """The part of a config's `data` section that defines the clips; the file holds the whole section."""

    num_frames: int
    crop_size: int
    stride: float | None
    target_fps: float
    past_end: Literal["fit", "hold"]


class ConfigSummary(TypedDict):
    """The config of the evaluation; the file holds all its sections."""

    data: ClipSummary


class ManifestSummary(TypedDict):
    """The evaluated manifest in results.json."""

    path: str
    sha256: str
    root: str
    listed: int
    kept: int
    left_out: int


class FaultSummary(TypedDict):
    """A video that could not be evaluated."""

    row: int
    path: str
    reason: str


class Summary(TypedDict):
    """The content of results.json; accuracies are 0 to 1."""

    protocol: str
    windows: int
    crops: int
    average: str
    weights: list[WeightsSummary]
    config: ConfigSummary
    manifest: ManifestSummary
    expected: int
    evaluated: int
    failed: int
    top1: float
    top1_interval: tuple[float, float]
    top5: float
    top5_interval: tuple[float, float]
    mean_class_accuracy: float
    macro_f1: NotRequired[float]
    """Missing in the files of older versions."""
    classes: list[str]
    faults: list[FaultSummary]
    date: str
    seconds: float
    versions: dict[str, Any]


@dataclass(frozen=True, repr=False)
class Results:
    """An evaluation of N videos and K classes; rows are in the order of the manifest."""

    summary: Summary
    paths: list[str]
    """Paths as in the manifest: relative to its root, or absolute."""
    labels: np.ndarray
    """int64 [N]"""
    probabilities: np.ndarray
    """float32 [N, K]; zeros for a video that was not evaluated."""
    top: np.ndarray
    """int64 [N, 5]: the most likely classes, best first; -1 if there is none."""
    valid: np.ndarray
    """bool [N]: False for a video that was not evaluated, which counts as wrong."""

    def __repr__(self) -> str:
        """The figures in a line, for notebooks, which show the value of a cell."""
        return (
            f"Results({self.protocol} {self.top1:.4f}, mean class accuracy {self.mean_class_accuracy:.4f}, macro F1 "
            f"{self.macro_f1:.4f}, {len(self.labels)} videos, {len(self.classes)} classes)"
        )

    @property
    def protocol(self) -> str:
        """The name of the protocol."""
        return self.summary["protocol"]

    @property
    def classes(self) -> list[str]:
        """Class names in the order of their labels."""
        return self.summary["classes"]

    @property
    def top1(self) -> float:
        """The share of videos whose most likely class is the label, 0 to 1."""
        return self.summary["top1"]

    @property
    def mean_class_accuracy(self) -> float:
        """The mean recall of the classes that have videos, 0 to 1."""
        return self.summary["mean_class_accuracy"]

    @property
    def right(self) -> np.ndarray:
        """bool [N]: True if the most likely class is the label."""
        return is_top1(self.top, self.labels)

    @property
    def macro_f1(self) -> float:
        """The mean F1 score of the classes, 0 to 1; see `macro_f1`."""
        return macro_f1(self.labels, self.top)

    @property
    def confidences(self) -> np.ndarray:
        """float64 [N]: the probability of the most likely class; 0 for a video that was not evaluated."""
        return self.probabilities[np.arange(len(self.labels)), self.top[:, 0]].astype(np.float64)


def is_top1(top: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Whether each label [N] is the first of the five best classes [N, 5]: bool [N]."""
    return top[:, 0] == labels


def is_top5(top: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Whether each label [N] is among the five best classes [N, 5]: bool [N]."""
    return (top == labels[:, None]).any(1)


def macro_f1(labels: np.ndarray, top: np.ndarray) -> float:
    """The mean F1 score (2 TP / (2 TP + FP + FN), 0 to 1) of the classes that occur in labels [N], for the best
    classes `top` [N, 5]. As in the mean class accuracy, classes without videos are left out, and a video without a
    prediction (-1) counts as missed."""
    size = int(max(labels.max(), top[:, 0].max())) + 1
    predicted = top[top[:, 0] >= 0, 0]
    videos, predictions, right = (
        np.bincount(each, minlength=size) for each in (labels, predicted, labels[is_top1(top, labels)])
    )
    present = videos > 0
    return float((2 * right[present] / (videos + predictions)[present]).mean())


def make_results(
    facts: dict[str, Any],
    *,
    paths: list[str],
    labels: np.ndarray,
    probabilities: np.ndarray,
    valid: np.ndarray,
    reasons: dict[int, str],
) -> Results:
    """Computes the summary. The arrays are those of `Results`; `reasons` has an entry for each row that is not valid;
    `facts` has the keys of `Summary` that do not follow from the arrays."""
    top = np.full((len(labels), TOP), -1)
    # The sort is stable: equal probabilities keep the order of their classes, as in argmax.
    top[:, : probabilities.shape[1]] = np.argsort(-probabilities, axis=1, kind="stable")[:, :TOP]
    top[~valid] = -1
    right, right5 = is_top1(top, labels), is_top5(top, labels)
    videos, correct = (np.bincount(each, minlength=int(labels.max()) + 1) for each in (labels, labels[right]))
    recalls = correct[videos > 0] / videos[videos > 0]
    count = len(labels)
    summary: Summary = {
        "protocol": facts["protocol"],
        "windows": facts["windows"],
        "crops": facts["crops"],
        "average": facts["average"],
        "weights": facts["weights"],
        "config": facts["config"],
        "manifest": facts["manifest"],
        "expected": count,
        "evaluated": int(valid.sum()),
        "failed": int((~valid).sum()),
        "top1": int(right.sum()) / count,
        "top1_interval": wilson_interval(int(right.sum()), count),
        "top5": int(right5.sum()) / count,
        "top5_interval": wilson_interval(int(right5.sum()), count),
        "mean_class_accuracy": float(recalls.mean()),
        "macro_f1": macro_f1(labels, top),
        "classes": facts["classes"],
        "faults": [{"row": row, "path": paths[row], "reason": reasons[row]} for row in np.flatnonzero(~valid).tolist()],
        "date": facts["date"],
        "seconds": facts["seconds"],
        "versions": facts["versions"],
    }
    return Results(summary, paths, labels, probabilities, top, valid)


def wilson_interval(right: int, count: int) -> tuple[float, float]:
    """The 95% interval of Wilson (1927) for a proportion measured as right / count."""
    share, extra = right / count, Z_95**2 / count
    middle = (share + extra / 2) / (1 + extra)
    half = math.sqrt(extra * share * (1 - share) + extra**2 / 4) / (1 + extra)
    return max(middle - half, 0.0), min(middle + half, 1.0)


class ClassResult(NamedTuple):
    """The results of one class; accuracies are 0 to 1, None for a class without videos."""

    label: int
    videos: int
    correct: int
    accuracy: float | None
    top5_accuracy: float | None
    confused_with: int | None
    """The label that its videos are most often mistaken for; None if there are no mistakes."""
    confused_count: int


def class_results(results: Results) -> list[ClassResult]:
    """Returns one entry per class, in the order of labels."""
    num_classes, labels = len(results.classes), results.labels
    wrong = results.valid & ~results.right
    confusion = np.zeros((num_classes, num_classes), int)
    np.add.at(confusion, (labels[wrong], results.top[wrong, 0]), 1)
    videos, correct, correct5 = (
        np.bincount(each, minlength=num_classes).tolist()
        for each in (labels, labels[results.right], labels[is_top5(results.top, labels)])
    )
    rows = []
    for label, others in enumerate(confusion):
        count, worst = videos[label], int(others.argmax())
        rows.append(
            ClassResult(
                label,
                count,
                correct[label],
                correct[label] / count if count else None,
                correct5[label] / count if count else None,
                worst if others[worst] else None,
                int(others[worst]),
            )
        )
    return rows
