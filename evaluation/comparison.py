"""Whether two evaluations differ by more than chance. Knows nothing of torch."""

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
    """int64 [M]: the rows of the videos in A; `rows_b`: in B."""
    rows_b: np.ndarray

    @property
    def right(self) -> tuple[np.ndarray, np.ndarray]:
        """bool [M] each: which of the videos A and B get right."""
        return self.a.right[self.rows_a], self.b.right[self.rows_b]

    @property
    def only_a(self) -> np.ndarray:
        """Rows of A: the videos that A gets right and B does not."""
        right_a, right_b = self.right
        return self.rows_a[right_a & ~right_b]

    @property
    def only_b(self) -> np.ndarray:
        """Rows of B: the videos that B gets right and A does not."""
        right_a, right_b = self.right
        return self.rows_b[right_b & ~right_a]

    @property
    def gains(self) -> np.ndarray:
        """int64 [K]: for each class, how many more of its videos B gets right than A."""
        labels, classes = self.a.labels[self.rows_a], len(self.a.classes)
        of_a, of_b = (np.bincount(labels[right], minlength=classes) for right in self.right)
        return of_b - of_a


def compare(a: Results, b: Results, *, names: Sequence[str] = ("A", "B")) -> Comparison:
    """Pairs the videos of two evaluations: row by row where their manifests are one, else by path.

    Raises `InputError` where their classes differ, or where they share no videos, or not with the same labels; `names`
    are for the message.
    """
    if a.classes != b.classes:
        pairs = enumerate(zip(a.classes, b.classes, strict=False))
        different = [f"class {k} is {one!r} and {two!r}" for k, (one, two) in pairs if one != two]
        counts = f"{len(a.classes)} and {len(b.classes)} classes"
        raise InputError(f"{names[0]} and {names[1]} are not of the same classes: {(different or [counts])[0]}")
    if a.paths == b.paths:
        rows_a = rows_b = np.arange(len(a.paths))
    else:
        rows_a, rows_b = _shared(a, b, names)
    differs = np.flatnonzero(a.labels[rows_a] != b.labels[rows_b])
    if len(differs):
        row_a, row_b = rows_a[differs[0]], rows_b[differs[0]]
        raise InputError(
            f"{names[0]} and {names[1]} differ in the label of {a.paths[row_a]}: {a.labels[row_a]} and "
            f"{b.labels[row_b]}; evaluate both on one manifest"
        )
    return Comparison(a, b, rows_a, rows_b)


def _shared(a: Results, b: Results, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    places = {path: row for row, path in enumerate(b.paths)}
    pairs = [
        (row, places[path]) for path, row in {path: row for row, path in enumerate(a.paths)}.items() if path in places
    ]
    if not pairs:
        paths = [each.summary["manifest"]["path"] for each in (a, b)]
        raise InputError(
            f"{names[0]} and {names[1]} have no video in common: their manifests are {paths[0]} and {paths[1]}, the "
            f"first videos {a.paths[0]} and {b.paths[0]}"
        )
    return tuple(np.array(pairs).T)


def mcnemar(only_a: int, only_b: int) -> float:
    """Two-sided exact p value of McNemar's test: how likely a split of `only_a + only_b` coin tosses is that is at
    least as uneven. Exact in whole numbers, whatever their size."""
    count = only_a + only_b
    term = total = 1
    for k in range(min(only_a, only_b)):
        term = term * (count - k) // (k + 1)
        total += term
    return min(2 * total / 2**count, 1.0)


def paired_interval(only_a: int, only_b: int, count: int) -> tuple[float, float]:
    """The 95 % interval of the difference of accuracies, B - A, over `count` videos that both have seen: the adjusted
    Wald interval for paired data (Bonett and Price 2012)."""
    a, b = (only_a + 1) / (count + 2), (only_b + 1) / (count + 2)
    half = Z_95 * math.sqrt((a + b - (b - a) ** 2) / (count + 2))
    return max(b - a - half, -1.0), min(b - a + half, 1.0)


def report(comparison: Comparison, *, names: Sequence[str] = ("A", "B")) -> str:
    """The comparison in a few lines for a terminal."""
    a, b, gains = comparison.a, comparison.b, comparison.gains
    count, only_a, only_b = len(comparison.rows_a), len(comparison.only_a), len(comparison.only_b)
    lines = []
    for letter, name, each, right in zip("AB", names, (a, b), comparison.right):
        weights = " + ".join(member["path"] for member in each.summary["weights"])
        lines.append(f"{letter}: {each.protocol} {right.mean():.4f} ({right.sum()} of {count})  {name}: {weights}")
    if len(a.paths) != count or len(b.paths) != count:
        lines.append(f"only the {count} videos that both have: A has {len(a.paths)}, B {len(b.paths)}")
    lines.append(f"only A is right: {_some(a.paths[row] for row in comparison.only_a)}")
    lines.append(f"only B is right: {_some(b.paths[row] for row in comparison.only_b)}")
    order = np.argsort(gains, kind="stable").tolist()
    for word, labels in (
        ("gained", [k for k in order[::-1] if gains[k] > 0]),
        ("lost", [k for k in order if gains[k] < 0]),
    ):
        if labels:
            listed = ", ".join(f"{a.classes[k]} {gains[k]:+d}" for k in labels[:5])
            lines.append(f"classes that {word}: {listed}" + f", and {len(labels) - 5} more" * (len(labels) > 5))
    low, high = paired_interval(only_a, only_b, count)
    p = mcnemar(only_a, only_b)
    verdict = "more than chance" if p < 0.05 else "may be chance"
    lines.append(
        f"B - A {(only_b - only_a) / count:+.4f}, 95 % interval {low:+.4f} to {high:+.4f}; McNemar's exact test: "
        f"p = {p:.3g}, {verdict} (at 5 %)"
    )
    return "\n".join(lines)


def _some(paths) -> str:
    paths = list(paths)
    listed = ": " + ", ".join(paths[:5]) if paths else ""
    return f"{len(paths)}{listed}" + ", ..." * (len(paths) > 5)
