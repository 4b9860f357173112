"""Predictions as text for a person, as JSON lines and as rows of CSV."""

import json
from collections.abc import Sequence

from serving.prediction import Prediction, top

_IN_A_LINE = 3  # classes of a window in the text


def as_text(prediction: Prediction, k: int, classes: Sequence[str], *, windows: bool) -> str:
    """The video, a line for each of its k likeliest classes, and with `windows` a line for each of these."""
    lines = [prediction.video]
    for entry in top(prediction.probabilities, k, classes):
        lines.append(f"    {entry['probability']:.4f}  {entry['class']} ({entry['label']})")
    for start, end, best in _windows(prediction, min(k, _IN_A_LINE), classes) if windows else ():
        said = ", ".join(f"{entry['class']} {entry['probability']:.2f}" for entry in best)
        lines.append(f"    {clock(start)} - {clock(end)}  {said}")
    return "\n".join(lines)


def as_json(prediction: Prediction, k: int, classes: Sequence[str], *, windows: bool) -> str:
    """One object in one line: video, error, top, and with `windows` start and end in seconds and top of each."""
    answer = {
        "video": prediction.video,
        "error": prediction.reason,
        "top": top(prediction.probabilities, k, classes),
    }
    if windows:
        answer["windows"] = [
            {"start": round(start, 3), "end": round(end, 3), "top": best}
            for start, end, best in _windows(prediction, k, classes)
        ]
    return json.dumps(answer)


def csv_columns(k: int, classes: Sequence[str], *, windows: bool) -> list[str]:
    best = [f"{name}{place + 1}" for place in range(min(k, len(classes))) for name in ("label", "class", "probability")]
    return ["video", "error", *(["start", "end"] if windows else []), *best]


def csv_rows(prediction: Prediction, k: int, classes: Sequence[str], *, windows: bool) -> list[list]:
    """A row for the video and, with `windows`, one for each of these, with start and end in seconds."""

    def row(times: list, best: list[dict]) -> list:
        cells = [entry[name] for entry in best for name in ("label", "class", "probability")]
        cells += [""] * (3 * min(k, len(classes)) - len(cells))
        return [prediction.video, prediction.reason or "", *(times if windows else []), *cells]

    rows = [row(["", ""], top(prediction.probabilities, k, classes))]
    if windows:
        rows += [row([round(start, 3), round(end, 3)], best) for start, end, best in _windows(prediction, k, classes)]
    return rows


def _windows(prediction: Prediction, k: int, classes: Sequence[str]) -> list[tuple[float, float, list[dict]]]:
    if prediction.seconds is None:
        return []
    return [
        (start, end, top(probabilities, k, classes))
        for (start, end), probabilities in zip(
            prediction.seconds.tolist(), prediction.window_probabilities, strict=True
        )
    ]


def clock(seconds: float) -> str:
    """0:08.5, or 1:02:08.5 from an hour on."""
    tenths = round(10 * seconds)
    minutes, tenths = divmod(tenths, 600)
    hours, minutes = divmod(minutes, 60)
    rest = f"{tenths // 10:02d}.{tenths % 10}"
    return f"{hours}:{minutes:02d}:{rest}" if hours else f"{minutes}:{rest}"
