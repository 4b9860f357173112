"""Compares two evaluations by video and class, with a significance test. Does not import torch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dali_pipelines.errors import InputError
from evaluation.results import Z_95, Results


@dataclass(frozen=True)
class Comparison:
    """Two evaluations, A and B, of the same M videos."""

    a: Results
    b: Results
    rows_a: np.ndarray
    """int64 [M]: the rows of the videos in A."""
    rows_b: np.ndarray
    """int64 [M]: the rows of the same videos in B."""

    @property
    def right(self) -> tuple[np.ndarray, np.ndarray]:
        """Which videos A and B get right: bool [M] each."""
        return self.a.right[self.rows_a], self.b.right[self.rows_b]

    @property
    def only_a(self) -> np.ndarray:
        """Rows of A: the videos that only A gets right."""
        right_a, right_b = self.right
        return self.rows_a[right_a & ~right_b]

    @property
    def only_b(self) -> np.ndarray:
        """Rows of B: the videos that only B gets right."""
        right_a, right_b = self.right
        return self.rows_b[right_b & ~right_a]

    @property
    def gains(self) -> np.ndarray:
        """How many more videos of each class B gets right than A: int64 [K], negative if A is better."""
        labels, classes = self.a.labels[self.rows_a], len(self.a.classes)
        of_a, of_b = (np.bincount(labels[right], minlength=classes) for right in self.right)
        return of_b - of_a


def compare(a: Results, b: Results, *, names: Sequence[str] = ("A", "B")) -> Comparison:
    """Pairs the videos of two evaluations: row by row if they list the same paths, otherwise by path.

    Raises `InputError` if their classes differ, if they have no video in common, or if the labels of a video differ;
    the message uses `names`.
    """
    if a.classes != b.classes:
        pairs = enumerate(zip(a.classes, b.classes, strict=False))
        different = [f"class {k} is {one!r} and {two!r}" for k, (one, two) in pairs if one != two]
        counts = f"{len(a.classes)} and {len(b.classes)} classes"
        raise InputError(f"{names[0]} and {names[1]} have different classes: {(different or [counts])[0]}")
    if a.paths == b.paths:
        rows_a = rows_b = np.arange(len(a.paths))
    else:
        rows_a, rows_b = _shared_rows(a, b, names)
    differs = np.flatnonzero(a.labels[rows_a] != b.labels[rows_b])
    if len(differs):
        row_a, row_b = rows_a[differs[0]], rows_b[differs[0]]
        raise InputError(
            f"{names[0]} and {names[1]} differ in the label of {a.paths[row_a]}: {a.labels[row_a]} and "
            f"{b.labels[row_b]}; evaluate both on the same manifest"
        )
    return Comparison(a, b, rows_a, rows_b)


def _shared_rows(a: Results, b: Results, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    in_a, in_b = ({path: row for row, path in enumerate(each.paths)} for each in (a, b))
    shared = [path for path in in_a if path in in_b]
    if not shared:
        paths = [each.summary["manifest"]["path"] for each in (a, b)]
        raise InputError(
            f"{names[0]} and {names[1]} have no video in common: their manifests are {paths[0]} and {paths[1]}, the "
            f"first videos {a.paths[0]} and {b.paths[0]}"
        )
    return np.array([in_a[path] for path in shared]), np.array([in_b[path] for path in shared])


def mcnemar(only_a: int, only_b: int) -> float:
    """The exact two-sided p value of McNemar's test: the probability that `only_a + only_b` coin tosses split at
    least as unevenly. Computed in integers, so it is exact for any count."""
    count = only_a + only_b
    term = total = 1
    for k in range(min(only_a, only_b)):
        term = term * (count - k) // (k + 1)
        total += term
    return min(2 * total / 2**count, 1.0)


def paired_interval(only_a: int, only_b: int, count: int) -> tuple[float, float]:
    """The 95% interval of the difference of accuracies, B - A, over `count` videos that both evaluated: the adjusted
    Wald interval for paired data (Bonett and Price 2012)."""
    a, b = (only_a + 1) / (count + 2), (only_b + 1) / (count + 2)
    half = Z_95 * math.sqrt((a + b - (b - a) ** 2) / (count + 2))
    return max(b - a - half, -1.0), min(b - a + half, 1.0)


def comparison_text(comparison: Comparison, *, names: Sequence[str] = ("A", "B")) -> str:
    """Summarises the comparison for a terminal."""
    a, b, gains = comparison.a, comparison.b, comparison.gains
    count, only_a, only_b = len(comparison.rows_a), len(comparison.only_a), len(comparison.only_b)
    lines = []
    for letter, name, each, right in zip("AB", names, (a, b), comparison.right):
        weights = " + ".join(member["path"] for member in each.summary["weights"])
        lines.append(f"{letter}: {each.protocol} {right.mean():.4f} ({right.sum()} of {count})  {name}: {weights}")
    if len(a.paths) != count or len(b.paths) != count:
        lines.append(f"compared on the {count} videos in both: A has {len(a.paths)}, B {len(b.paths)}")
    lines.append(f"only A is right: {_some([a.paths[row] for row in comparison.only_a])}")
    lines.append(f"only B is right: {_some([b.paths[row] for row in comparison.only_b])}")
    order = np.argsort(gains, kind="stable").tolist()
    for word, labels in (
        ("gained", [k for k in order[::-1] if gains[k] > 0]),
        ("lost", [k for k in order if gains[k] < 0]),
    ):
        if labels:
            listed = ", ".join(f"{a.classes[k]} {gains[k]:+d}" for k in labels[:5])
            more = f", and {len(labels) - 5} more" if len(labels) > 5 else ""
            lines.append(f"classes that {word}: {listed}{more}")
    low, high = paired_interval(only_a, only_b, count)
    p = mcnemar(only_a, only_b)
    verdict = "more than chance" if p < 0.05 else "may be chance"
    lines.append(
        f"B - A {(only_b - only_a) / count:+.4f}, 95% interval {low:+.4f} to {high:+.4f}; McNemar's exact test: "
        f"p = {p:.3g}, {verdict} (at 5%)"
    )
    return "\n".join(lines)


def _some(paths: Sequence[str]) -> str:
    """The number of paths, and the first five."""
    listed = ": " + ", ".join(paths[:5]) if paths else ""
    return f"{len(paths)}{listed}{', ...' if len(paths) > 5 else ''}"
