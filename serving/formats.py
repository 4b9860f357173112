"""Predictions as text, as JSON lines and as CSV rows."""

import json
from collections.abc import Sequence
from typing import Any

from serving.prediction import Prediction, TopClass, Unreadable, top_classes

_CLASSES_PER_WINDOW = 3  # in text output


def as_text(prediction: Prediction, k: int, classes: Sequence[str], *, windows: bool) -> str:
    """Lines for the video, for each of its k most likely classes and, with `windows`, for each window."""
    lines = [prediction.video]
    for entry in top_classes(prediction.probabilities, k, classes):
        lines.append(f"    {entry['probability']:.4f}  {entry['class']} ({entry['label']})")
    for start, end, best in _windows(prediction, min(k, _CLASSES_PER_WINDOW), classes) if windows else ():
        listed = ", ".join(f"{entry['class']} ({entry['label']}) {entry['probability']:.2f}" for entry in best)
        lines.append(f"    {clock(start)} - {clock(end)}  {listed}")
    return "\n".join(lines)


def as_json(prediction: Prediction | Unreadable, k: int, classes: Sequence[str], *, windows: bool) -> str:
    """A JSON object on one line: video, error, top and, with `windows`, start, end (seconds) and top per window."""
    entry: dict[str, Any] = {
        "video": prediction.video,
        "error": prediction.reason,
        "top": _top(prediction, k, classes),
    }
    if windows:
        entry["windows"] = [
            {"start": round(start, 3), "end": round(end, 3), "top": best}
            for start, end, best in _windows(prediction, k, classes)
        ]
    return json.dumps(entry)


def csv_columns(k: int, classes: Sequence[str], *, windows: bool) -> list[str]:
    """The header of `csv_rows`."""
    best = [f"{name}{place + 1}" for place in range(min(k, len(classes))) for name in ("label", "class", "probability")]
    return ["video", "error", *(["start", "end"] if windows else []), *best]


def csv_rows(prediction: Prediction | Unreadable, k: int, classes: Sequence[str], *, windows: bool) -> list[list[Any]]:
    """A row for the video and, with `windows`, one for each window, with its start and end in seconds."""

    def row(times: list[Any], best: list[TopClass]) -> list[Any]:
        cells = [cell for entry in best for cell in (entry["label"], entry["class"], entry["probability"])]
        cells += [""] * (3 * min(k, len(classes)) - len(cells))
        return [prediction.video, prediction.reason or "", *(times if windows else []), *cells]

    rows = [row(["", ""], _top(prediction, k, classes))]
    if windows:
        rows += [row([round(start, 3), round(end, 3)], best) for start, end, best in _windows(prediction, k, classes)]
    return rows


def _top(prediction: Prediction | Unreadable, k: int, classes: Sequence[str]) -> list[TopClass]:
    return top_classes(prediction.probabilities, k, classes) if isinstance(prediction, Prediction) else []


def _windows(
    prediction: Prediction | Unreadable, k: int, classes: Sequence[str]
) -> list[tuple[float, float, list[TopClass]]]:
    """(start, end, most likely classes) of each window."""
    if isinstance(prediction, Unreadable):
        return []
    return [
        (start, end, top_classes(probabilities, k, classes))
        for (start, end), probabilities in zip(
            prediction.seconds.tolist(), prediction.window_probabilities, strict=True
        )
    ]


def clock(seconds: float) -> str:
    """Formats a time: 0:08.5, or 1:02:08.5 from an hour on."""
    tenths = round(10 * seconds)
    minutes, tenths = divmod(tenths, 600)
    hours, minutes = divmod(minutes, 60)
    rest = f"{tenths // 10:02d}.{tenths % 10}"
    return f"{hours}:{minutes:02d}:{rest}" if hours else f"{minutes}:{rest}"
