"""Writes the files of an evaluation atomically, and reads them. Does not import torch."""

import contextlib
import csv
import io
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import UnionType
from typing import IO, Any, Literal, get_args, get_origin, get_type_hints, is_typeddict

import numpy as np

from common.locking import LOCK
from dali_pipelines.errors import InputError
from dali_pipelines.text import cell_text, csv_writer
from evaluation.results import TOP, Results, Summary, class_results

SUMMARY, PREDICTIONS, PER_CLASS = FILES = ("results.json", "predictions.csv", "per_class.csv")
_BEFORE_TOP = ("row", "path", "label", "class", "reason")
_BEFORE_PROBABILITIES = (*_BEFORE_TOP, *(f"top{k + 1}" for k in range(TOP)))
"""Columns of predictions.csv before the class probabilities p0, p1, ..."""
_PER_CLASS_COLUMNS = (
    "label",
    "class",
    "videos",
    "correct",
    "accuracy",
    "top5_accuracy",
    "confused_with",
    "confused_count",
)


def _open(path: Path, mode: str = "r") -> IO[str]:
    return open(path, mode, encoding="utf-8", errors="surrogateescape", newline="")  # file names need not be UTF-8


def results_folder(weights: str) -> Path:
    """Returns the default results folder of weights: `evaluation` beside their file, or in the working directory for a
    name on the Hugging Face Hub."""
    return (Path(weights).resolve().parent if Path(weights).exists() else Path()) / "evaluation"


# -- writing --


def prepare_folder(folder: Path) -> None:
    """Creates `folder`, or checks that it is empty or holds an evaluation, which will be replaced. Otherwise raises
    `InputError`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        names = set(os.listdir(folder))
        writable = os.access(folder, os.W_OK | os.X_OK)
    except OSError as error:
        raise InputError(f"{folder}: cannot be the results folder: {error.strerror}; name one with --out") from None
    if not writable:
        raise InputError(f"{folder}: not writable; name another folder with --out")
    if names <= {LOCK, *(f"{name}.part" for name in FILES)}:
        return
    for name in (SUMMARY, f"{SUMMARY}.part"):  # .part: a run was killed between two renames
        with contextlib.suppress(InputError):
            read_summary(folder / name)
            return
    raise InputError(f"{folder}: contains files that are not an evaluation; name another folder with --out")


def write_results(results: Results, folder: Path) -> None:
    """Writes the three files. All are complete and on disk before the first is renamed. results.json comes last:
    without it, the folder holds no evaluation. Raises `InputError` if they cannot be written."""
    contents: dict[str, Iterable[str]] = {
        PER_CLASS: _per_class_csv(results),
        PREDICTIONS: _predictions_csv(results),
        SUMMARY: [json.dumps(results.summary, indent=1), "\n"],
    }
    parts = {name: folder / f"{name}.part" for name in contents}
    try:
        for name, pieces in contents.items():
            with _open(parts[name], "w") as file:
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
    yield ",".join([*_BEFORE_PROBABILITIES, *(f"p{k}" for k in range(len(classes)))]) + "\n"
    form = ",%.7g" * len(classes) + "\n"  # per row, for speed: 20,000 videos of 400 classes are eight million numbers
    blanks = "," * len(classes) + "\n"
    out = io.StringIO()
    writer = csv_writer(out)
    for row, (path, label, top) in enumerate(zip(results.paths, results.labels.tolist(), results.top.tolist())):
        out.seek(0)
        out.truncate()
        best = ["" if each < 0 else each for each in top]
        writer.writerow([row, path, label, classes[label], reasons.get(row, ""), *best])
        numbers = form % tuple(results.probabilities[row].tolist()) if results.valid[row] else blanks
        yield out.getvalue().removesuffix("\n") + numbers


def _per_class_csv(results: Results) -> Iterator[str]:
    classes = results.classes
    out = io.StringIO()
    writer = csv_writer(out)
    writer.writerow(_PER_CLASS_COLUMNS)
    for row in class_results(results):
        accuracies = ["" if share is None else f"{share:.7g}" for share in (row.accuracy, row.top5_accuracy)]
        confused_with = "" if row.confused_with is None else classes[row.confused_with]
        counts = (row.videos, row.correct)
        writer.writerow([row.label, classes[row.label], *counts, *accuracies, confused_with, row.confused_count])
    yield out.getvalue()


# -- reading --


def read_results(path: str | os.PathLike[str]) -> Results:
    """Reads the results that `write_results` wrote. `path` is the folder, or its results.json. Raises `InputError` that
    names the file and, if one is wrong, the line."""
    path = Path(path)
    summary_file = path / SUMMARY if path.is_dir() else path
    summary = read_summary(summary_file)
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
        with _open(file) as lines:
            _read_predictions(results, lines, file)
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}; evaluate.py writes it beside {SUMMARY}") from None
    np.nan_to_num(results.probabilities, copy=False)
    return results


def read_summary(file: Path) -> Summary:
    """Reads only results.json. Raises `InputError` with the reason."""
    try:
        return _parsed(json.loads(file.read_bytes()), Summary, "the file")
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}; evaluate.py writes it into the results folder") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        raise InputError(f"{file}: not JSON; expected the {SUMMARY} that evaluate.py wrote") from None
    except ValueError as error:
        raise InputError(f"{file}: not the results of evaluate.py: {error}") from None


def _parsed(value: Any, kind: Any, name: str) -> Any:
    """Converts `value` from JSON to the type `kind`, which may turn lists into tuples; extra keys are kept. Raises
    `ValueError` with `name` if the value does not fit."""
    if is_typeddict(kind):
        if not isinstance(value, dict):
            raise ValueError(f"{name} is {str(value)[:60]!r}")
        hints = get_type_hints(kind)
        if missing := [key for key in hints if key in kind.__required_keys__ and key not in value]:
            raise ValueError(f"no {missing[0]}" + ("" if kind is Summary else f" in {name}"))
        return value | {key: _parsed(value[key], hint, key) for key, hint in hints.items() if key in value}
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (list, tuple):
        if not isinstance(value, list) or (origin is tuple and len(value) != len(arguments)):
            raise ValueError(f"{name} is {str(value)[:60]!r}")
        kinds = arguments * len(value) if origin is list else arguments
        return origin(_parsed(each, its_kind, f"{name}[{n}]") for n, (each, its_kind) in enumerate(zip(value, kinds)))
    if origin is Literal:
        fits = value in arguments
    else:
        allowed = arguments if isinstance(kind, UnionType) else (origin or kind,)
        fits = isinstance(value, (*allowed, int) if float in allowed else allowed)
    if not fits:
        raise ValueError(f"{name} is {str(value)[:60]!r}")
    return value


def _read_predictions(results: Results, lines: Iterable[str], file: Path) -> None:
    """Fills `results` from the lines of predictions.csv."""
    count, num_classes = len(results.labels), len(results.classes)
    columns = [*_BEFORE_PROBABILITIES, *(f"p{k}" for k in range(num_classes))]
    reader = csv.reader(lines)
    try:
        if next(reader, None) != columns:
            raise InputError(f"{file}: its columns are not those of evaluate.py for {num_classes} classes")
        for row, values in enumerate(reader):
            if len(values) != len(columns):
                raise ValueError(f"{len(values)} columns, but the header names {len(columns)}")
            number, path, label, _, reason, *best = values[: len(_BEFORE_PROBABILITIES)]
            if int(number) != row:
                raise ValueError(f"row {number}, expected {row}")
            results.paths.append(cell_text(path))
            if row >= count:
                continue
            results.labels[row] = _label(label, num_classes)
            if not reason:
                if not best[0]:
                    raise ValueError("neither a prediction nor a reason for its absence")
                results.valid[row] = True
                results.top[row] = [_label(each, num_classes) if each else -1 for each in best]
                probabilities = map(float, values[len(_BEFORE_PROBABILITIES) :])
                results.probabilities[row] = np.fromiter(probabilities, np.float32, num_classes)
    except (ValueError, csv.Error) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{file}:{reader.line_num}: {error}; evaluate again") from None
    if len(results.paths) != count:
        raise InputError(
            f"{file}: {len(results.paths)} videos, but {SUMMARY} has {count}; the two are from different evaluations"
        )


def _label(text: str, num_classes: int) -> int:
    label = int(text)
    if not 0 <= label < num_classes:
        raise ValueError(f"class {label} of {num_classes}")
    return label
