"""The files of an evaluation: writing them whole, and reading them back. Knows nothing of torch."""

import contextlib
import csv
import io
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.locking import LOCK
from dali_pipelines.errors import InputError
from dali_pipelines.text import cell_text, csv_writer

SUMMARY, PREDICTIONS, PER_CLASS = FILES = ("results.json", "predictions.csv", "per_class.csv")
AVERAGES = ("prob", "score")
TOP = 5
BEFORE_TOP = ("row", "path", "label", "class", "reason")
"""Columns of predictions.csv, before top1, ..., p0, ..."""
PER_CLASS_COLUMNS = (
    "label",
    "class",
    "videos",
    "correct",
    "accuracy",
    "top5_accuracy",
    "confused_with",
    "confused_count",
)
_PREFIX = (*BEFORE_TOP, *(f"top{k + 1}" for k in range(TOP)))
_KEYS = [
    "protocol",
    "windows",
    "crops",
    "average",
    "weights",
    "config",
    "manifest",
    "expected",
    "evaluated",
    "failed",
    "top1",
    "top1_interval",
    "top5",
    "top5_interval",
    "mean_class_accuracy",
    "classes",
    "faults",
    "date",
    "seconds",
    "versions",
]
TEXT = {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""}  # file names need not be UTF-8
Z_95 = 1.959963984540054
"""Quantile of the normal distribution that leaves 2.5 % above it."""


@dataclass(frozen=True)
class Protocol:
    """Which clips of a video are looked at, and how their answers become one. Raises `InputError` for what there is
    not."""

    windows: int = 1
    """Temporal windows, the first at the start of the video, the last at its end."""
    crops: int = 3
    """3: along the long side; 1: the centre crop of validation."""
    average: str = "prob"
    """prob: the mean of probabilities; score: of logits, whose softmax is reported."""

    def __post_init__(self):
        if self.windows < 1:
            raise InputError(f"--windows is {self.windows}; expected 1 or more")
        if self.crops not in (1, 3):
            raise InputError(f"--crops is {self.crops}; expected 1 or 3")
        if self.average not in AVERAGES:
            raise InputError(f"--average is {self.average}; expected one of {', '.join(AVERAGES)}")
        if self.crops == 1 and self.windows > 1:
            raise InputError(f"--windows {self.windows} needs --crops 3: the centre crop is of one window")

    @property
    def name(self) -> str:
        return f"test/top1_{self.windows}x{self.crops}_{self.average}"


@dataclass(frozen=True)
class Results:
    """An evaluation of N videos and K classes; rows in the order of the manifest."""

    summary: dict[str, Any]
    """What results.json holds."""
    paths: list[str]
    """As the manifest has them: relative to its root, or absolute."""
    labels: np.ndarray
    """int64 [N]"""
    probabilities: np.ndarray
    """float32 [N, K]; zeros for a video that was not evaluated."""
    top: np.ndarray
    """int64 [N, 5]: the likeliest classes, best first; -1 where there is none."""
    valid: np.ndarray
    """bool [N]: False for a video that was not evaluated, which counts as wrong."""

    @property
    def protocol(self) -> str:
        return self.summary["protocol"]

    @property
    def classes(self) -> list[str]:
        return self.summary["classes"]

    @property
    def right(self) -> np.ndarray:
        """bool [N]: the likeliest class is the video's."""
        return self.top[:, 0] == self.labels

    @property
    def right5(self) -> np.ndarray:
        """bool [N]: one of the five likeliest is."""
        return (self.top == self.labels[:, None]).any(1)


def make_results(
    facts: dict[str, Any],
    *,
    paths: list[str],
    labels: np.ndarray,
    probabilities: np.ndarray,
    valid: np.ndarray,
    reasons: dict[int, str],
) -> Results:
    """Arrays as in `Results`; `reasons` of the rows that are not valid; `facts` are the keys of results.json that do
    not follow from these."""
    top = np.full((len(labels), TOP), -1)
    # A stable sort: equal probabilities go by their place, as they do in argmax.
    top[:, : probabilities.shape[1]] = np.argsort(-probabilities, axis=1, kind="stable")[:, :TOP]
    top[~valid] = -1
    results = Results({}, paths, labels, probabilities, top, valid)
    count, videos, right = len(labels), *(np.bincount(each, minlength=1) for each in (labels, labels[results.right]))
    recalls = np.append(right, np.zeros(len(videos) - len(right)))[videos > 0] / videos[videos > 0]
    measured = {
        "expected": count,
        "evaluated": int(valid.sum()),
        "failed": int((~valid).sum()),
        "top1": int(results.right.sum()) / count,
        "top1_interval": wilson_interval(int(results.right.sum()), count),
        "top5": int(results.right5.sum()) / count,
        "top5_interval": wilson_interval(int(results.right5.sum()), count),
        "mean_class_accuracy": float(recalls.mean()),
        "faults": [{"row": row, "path": paths[row], "reason": reasons[row]} for row in np.flatnonzero(~valid).tolist()],
    }
    results.summary.update({key: {**facts, **measured}[key] for key in _KEYS})
    return results


def wilson_interval(right: int, count: int) -> tuple[float, float]:
    """The 95 % interval of Wilson (1927) for a share that was found to be right / count."""
    share, extra = right / count, Z_95**2 / count
    middle = (share + extra / 2) / (1 + extra)
    half = math.sqrt(extra * share * (1 - share) + extra**2 / 4) / (1 + extra)
    return max(middle - half, 0.0), min(middle + half, 1.0)


def make_folder(folder: Path) -> None:
    """Sees that results can go to `folder`: it is made, or it holds nothing, or an evaluation, which may be replaced.
    Raises `InputError` otherwise."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        names = set(os.listdir(folder))
        writable = os.access(folder, os.W_OK | os.X_OK)
    except OSError as error:
        raise InputError(f"{folder}: cannot be the folder of results: {error.strerror}; name one with --out") from None
    if not writable:
        raise InputError(f"{folder}: cannot be written to; name another folder with --out")
    if names <= {LOCK, *(f"{name}.part" for name in FILES)}:
        return
    for name in (SUMMARY, f"{SUMMARY}.part"):  # the latter: a run that ended between two renames
        with contextlib.suppress(InputError):
            _read_summary(folder / name)
            return
    raise InputError(f"{folder}: holds something that is not an evaluation; name another folder with --out")


def write_results(results: Results, folder: Path) -> None:
    """Writes the three files. All are complete and on disk before the first takes its place; results.json, without
    which the folder holds no evaluation, comes last. Raises `InputError` where they cannot be written."""
    contents = {
        PER_CLASS: _per_class_csv(results),
        PREDICTIONS: _predictions_csv(results),
        SUMMARY: [json.dumps(results.summary, indent=1), "\n"],
    }
    parts = {name: folder / f"{name}.part" for name in contents}
    try:
        for name, pieces in contents.items():
            with open(parts[name], "w", **TEXT) as file:
                file.writelines(pieces)
                file.flush()
                os.fsync(file.fileno())
        (folder / SUMMARY).unlink(missing_ok=True)
        for name, part in parts.items():
            part.replace(folder / name)
    except OSError as error:
        raise InputError(f"{folder}: the results cannot be written: {error.strerror}") from None
    finally:
        for part in parts.values():
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)


def _predictions_csv(results: Results) -> Iterator[str]:
    classes = results.classes
    reasons = {fault["row"]: fault["reason"] for fault in results.summary["faults"]}
    yield ",".join([*_PREFIX, *(f"p{k}" for k in range(len(classes)))]) + "\n"
    form = ",%.7g" * len(classes) + "\n"  # at once: 20,000 videos of 400 classes are eight million numbers
    nothing = "," * len(classes) + "\n"
    out = io.StringIO()
    writer = csv_writer(out)
    for row, (path, label, top) in enumerate(zip(results.paths, results.labels.tolist(), results.top.tolist())):
        out.seek(0)
        out.truncate()
        best = ["" if each < 0 else each for each in top]
        writer.writerow([row, path, label, classes[label], reasons.get(row, ""), *best])
        yield out.getvalue().removesuffix("\n") + (
            form % tuple(results.probabilities[row].tolist()) if results.valid[row] else nothing
        )


def _per_class_csv(results: Results) -> Iterator[str]:
    classes, labels = results.classes, results.labels
    wrong = results.valid & ~results.right
    confusion = np.zeros((len(classes), len(classes)), int)
    np.add.at(confusion, (labels[wrong], results.top[wrong, 0]), 1)
    videos, right, right5 = (
        np.bincount(each, minlength=len(classes)).tolist()
        for each in (labels, labels[results.right], labels[results.right5])
    )
    out = io.StringIO()
    writer = csv_writer(out)
    writer.writerow(PER_CLASS_COLUMNS)
    for label, (name, others) in enumerate(zip(classes, confusion)):
        count, worst = videos[label], int(others.argmax())
        shares = [f"{found / count:.7g}" if count else "" for found in (right[label], right5[label])]
        confused = [classes[worst], others[worst]] if others[worst] else ["", 0]
        writer.writerow([label, name, count, right[label], *shares, *confused])
    yield out.getvalue()


def read_results(path: str | os.PathLike) -> Results:
    """Reads what `write_results` wrote: `path` is the folder, or the results.json in it. Raises `InputError` that
    names the file, and the line where one is wrong."""
    path = Path(path)
    summary_file = path / SUMMARY if path.is_dir() else path
    summary = _read_summary(summary_file)
    file = summary_file.with_name(PREDICTIONS)
    count, classes = summary["expected"], len(summary["classes"])
    results = Results(
        summary,
        paths=[],
        labels=np.zeros(count, np.int64),
        probabilities=np.zeros((count, classes), np.float32),
        top=np.full((count, TOP), -1),
        valid=np.zeros(count, bool),
    )
    try:
        with open(file, **TEXT) as lines:
            _fill(results, csv.reader(lines), file)
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}; evaluate.py writes it beside {SUMMARY}") from None
    return results


def _fill(results: Results, reader: Any, file: Path) -> None:
    classes = len(results.classes)
    names = [*_PREFIX, *(f"p{k}" for k in range(classes))]
    row = 0
    try:
        if next(reader, None) != names:
            raise InputError(
                f"{file}: not the predictions of {SUMMARY}: its columns are not those of {classes} classes"
            )
        for row, values in enumerate(reader):
            number, path, label, _, reason, *best = values[: len(_PREFIX)]
            if int(number) != row or not 0 <= int(label) < classes or len(values) != len(names):
                raise ValueError
            results.paths.append(cell_text(path))
            results.labels[row] = int(label)
            if not reason:
                results.valid[row] = True
                results.top[row] = [int(each or -1) for each in best]
                results.probabilities[row] = np.fromiter(map(float, values[len(_PREFIX) :]), np.float32, classes)
    except (ValueError, IndexError, csv.Error) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{file}:{reader.line_num}: not a line that evaluate.py wrote; evaluate again") from None
    if len(results.paths) != len(results.labels):
        raise InputError(f"{file}: {len(results.paths)} videos, but {SUMMARY} speaks of {len(results.labels)}")


def _read_summary(file: Path) -> dict[str, Any]:
    try:
        summary = json.loads(file.read_bytes())
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}; expected the folder that evaluate.py wrote") from None
    except (ValueError, RecursionError):
        raise InputError(f"{file}: not JSON; expected the {SUMMARY} that evaluate.py wrote") from None
    missing = [key for key in _KEYS if not isinstance(summary, dict) or key not in summary]
    if missing:
        raise InputError(f"{file}: no key {missing[0]!r}; expected the {SUMMARY} that evaluate.py wrote")
    if not isinstance(summary["expected"], int) or not isinstance(summary["classes"], Sequence):
        raise InputError(f"{file}: `expected` must be a count, `classes` a list of names")
    return summary
