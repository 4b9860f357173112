"""Shared functions for the reports of the benchmarks."""

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Report = dict[str, Any]


def command() -> str:
    """The command line of this benchmark."""
    return " ".join(sys.argv)


def progress(text: str) -> None:
    """Prints a line to stderr."""
    print(text, file=sys.stderr, flush=True)


def write(report: Report, path: Path) -> None:
    """Writes a report as JSON."""
    path.write_text(json.dumps(report, indent=2) + "\n")


def write_and_print(report: Report, path: Path, text: str) -> None:
    """Writes a report as JSON and prints it as `text`, followed by the path."""
    write(report, path)
    print(text)
    print(f"\n{path}")


def spread(values: Sequence[float]) -> dict[str, float]:
    """Returns the median, lowest and highest value."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def listed(values: Mapping[str, Any]) -> str:
    """Formats names and values in one line."""
    return ", ".join(f"{name} {value}" for name, value in values.items())


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Aligns the cells of `rows` in columns: the first to the left, the others to the right. Rows of two cells (a name
    and a reason) do not widen the columns."""
    widths = [max(len(row[column]) for row in rows if len(row) > 2) for column in range(len(rows[0]))]
    return [
        "  ".join([name.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells, widths[1:]))]).rstrip()
        for name, *cells in rows
    ]
