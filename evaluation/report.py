"""report.html: an evaluation on one page, from the files that it left in a folder.

The page holds everything it shows, pictures included: it opens from disk, and its policy forbids the browser to fetch
anything. What it looks like stands in report.css, what it does when touched in report.js.
"""

import base64
import csv
import html
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from fractions import Fraction
from pathlib import Path
from typing import Any, TextIO

import av
import numpy as np

from dali_pipelines.errors import InputError
from dali_pipelines.files import unfinished
from dali_pipelines.host_decoder import decode_frames
from dali_pipelines.manifest import Manifest, coded_size
from dali_pipelines.plan import View, plan_sample
from dali_pipelines.text import cell_text
from evaluation.results import BEFORE_TOP, PER_CLASS, PER_CLASS_COLUMNS, PREDICTIONS, SUMMARY, TEXT

REPORT = "report.html"

_MOST_LISTED = 20_000  # mistakes whose paths are in the page, 1.5 MB: the most confident ones
_MOST_UNREADABLE = 1_000
_MOST_CONFUSIONS = 50
_FRAMES = 8
_THUMBNAIL = 112  # pixels a side
_BINS = 15  # of the confidence: as in Guo et al. 2017, On Calibration of Modern Neural Networks

_NUMBER = (int, float)
_RESULTS = {
    "protocol": str,
    "windows": int,
    "crops": int,
    "average": str,
    "weights": [{"path": str, "sha256": str, "top1": _NUMBER, "top5": _NUMBER}],
    "config": {
        "data": {
            "num_frames": int,
            "crop_size": int,
            "stride": (int, float, type(None)),
            "target_fps": _NUMBER,
            "past_end": str,
        }
    },
    "manifest": {"path": str, "sha256": str, "listed": int, "left_out": int},
    "expected": int,
    "evaluated": int,
    "failed": int,
    "top1": _NUMBER,
    "top1_interval": [_NUMBER, _NUMBER],
    "top5": _NUMBER,
    "top5_interval": [_NUMBER, _NUMBER],
    "mean_class_accuracy": _NUMBER,
    "classes": [str],
    "faults": [{"row": int, "path": str, "reason": str}],
    "date": str,
    "seconds": _NUMBER,
    "versions": {},
}
"""What the page reads of results.json; a list of one is any number of such, and there may be more keys."""


@dataclass(frozen=True)
class Predictions:
    """predictions.csv without the probabilities that the page does not show; one entry a video, in the file's order."""

    rows: np.ndarray
    """int64 [N]: row of the manifest."""
    paths: list[str]
    labels: np.ndarray
    """int64 [N]"""
    valid: np.ndarray
    """bool [N]: False for an unreadable video."""
    top: np.ndarray
    """int64 [N, M]: the M likeliest classes, best first; -1 for an unreadable video."""
    top_probabilities: np.ndarray
    """float64 [N, M]"""
    true_probabilities: np.ndarray
    """float64 [N]: of the class that the label says."""

    @property
    def confidences(self) -> np.ndarray:
        """float64 [N]: the probability of the predicted class."""
        return self.top_probabilities[:, 0]

    def mistakes(self) -> np.ndarray:
        """Indices of the readable videos with another prediction than their label, the most confident first."""
        wrong = np.flatnonzero(self.valid & (self.top[:, 0] != self.labels))
        return wrong[np.argsort(-self.confidences[wrong], kind="stable")]


@dataclass(frozen=True)
class ClassRow:
    """A line of per_class.csv; shares are 0 to 1, None for a class without videos."""

    label: int
    videos: int
    correct: int
    accuracy: float | None
    top5_accuracy: float | None
    confused_with: str
    confused_count: int


def write_report(folder: str | Path, *, most: int = 24) -> Path:
    """Writes report.html into `folder`, from its results.json, predictions.csv and per_class.csv; returns its path.

    The `most` most confident mistakes are shown with frames of their videos, decoded anew; a video or a manifest that
    is gone since then costs its pictures. Raises `InputError` where one of the three files is missing or is none of an
    evaluation.
    """
    folder = Path(folder)
    results = _read_results(folder / SUMMARY)
    classes = [_plain(name) for name in results["classes"]]
    predictions = _read_predictions(folder / PREDICTIONS, len(classes))
    if len(predictions.rows) != results["expected"]:
        raise InputError(
            f"{folder / PREDICTIONS}: {len(predictions.rows)} videos where {SUMMARY} has "
            f"{results['expected']}; the two are of different evaluations"
        )
    per_class = _read_per_class(folder / PER_CLASS, len(classes))
    page = _page(results, classes, predictions, per_class, most)
    path = folder / REPORT
    part = unfinished(path)  # renamed when whole, as manifests are
    part.write_text(page, encoding="utf-8")
    part.replace(path)
    return path


# Reading


def _open(path: Path) -> TextIO:
    try:
        return open(path, **TEXT)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; evaluate.py writes it") from None


def _read_results(path: Path) -> dict[str, Any]:
    with _open(path) as file:
        try:
            results = json.load(file)
            _check(results, _RESULTS, "the file")
        except json.JSONDecodeError as error:
            raise InputError(f"{path}: not JSON ({error})") from None
        except ValueError as error:
            raise InputError(f"{path}: not the results of evaluate.py: {error}") from None
    return results


def _check(value: Any, shape: Any, name: str) -> None:
    """`ValueError` where `value`, which is called `name`, is not built as `shape` is."""
    kind = type(shape) if isinstance(shape, dict | list) else shape
    if not isinstance(value, kind) or (kind is list and len(shape) > 1 and len(value) != len(shape)):
        raise ValueError(f"{name} is {str(value)[:60]!r}")
    if kind is dict:
        for key, inner in shape.items():
            if key not in value:
                raise ValueError(f"no {key}" + ("" if shape is _RESULTS else f" in {name}"))
            _check(value[key], inner, key)
    elif kind is list:
        for index, item in enumerate(value):
            _check(item, shape[min(index, len(shape) - 1)], f"{name}[{index}]")


def _read_predictions(path: Path, num_classes: int) -> Predictions:
    """Only the numbers that are shown are converted: a second for 20,000 videos of 400 classes."""
    with _open(path) as file:
        reader = csv.reader(file)
        header = next(reader, [])
        first = len(header) - num_classes  # column of p0
        if (
            tuple(header[:5]) != BEFORE_TOP
            or header[first:] != [f"p{k}" for k in range(num_classes)]
            or header[5:first] != [f"top{k + 1}" for k in range(first - 5)]
            or first == 5
        ):
            raise InputError(
                f"{path}: its columns are not those of evaluate.py for {num_classes} classes: row, path, label, class, "
                "reason, top1, ..., p0, ..."
            )
        rows, paths, labels, valid, tops, probabilities, trues = [], [], [], [], [], [], []
        try:
            for line in reader:
                if len(line) != len(header):
                    raise ValueError(f"{len(line)} columns where the header names {len(header)}")
                label = _class(line[2], num_classes)
                top = [] if line[4] else [_class(value, num_classes) for value in line[5:first] if value]
                if not (line[4] or top):
                    raise ValueError("neither a prediction nor a reason why there is none")
                missing = first - 5 - len(top)  # fewer classes than columns, or an unreadable video
                rows.append(int(line[0]))
                paths.append(cell_text(line[1]))
                labels.append(label)
                valid.append(not line[4])
                tops.append(top + [-1] * missing)
                probabilities.append([float(line[first + k]) for k in top] + [0.0] * missing)
                trues.append(0.0 if line[4] else float(line[first + label]))
        except (ValueError, csv.Error) as error:
            raise InputError(f"{path}:{reader.line_num}: {error}") from None
    return Predictions(
        rows=np.array(rows, np.int64),
        paths=paths,
        labels=np.array(labels, np.int64),
        valid=np.array(valid, bool),
        top=np.array(tops, np.int64).reshape(len(rows), first - 5),
        top_probabilities=np.nan_to_num(np.array(probabilities, np.float64).reshape(len(rows), first - 5)),
        true_probabilities=np.nan_to_num(np.array(trues, np.float64)),
    )


def _class(text: str, num_classes: int) -> int:
    label = int(text)
    if not 0 <= label < num_classes:
        raise ValueError(f"class {label} of {num_classes}")
    return label


def _read_per_class(path: Path, num_classes: int) -> list[ClassRow]:
    with _open(path) as file:
        reader = csv.reader(file)
        if tuple(next(reader, ())) != PER_CLASS_COLUMNS:
            raise InputError(f"{path}: its columns are not those of evaluate.py: {', '.join(PER_CLASS_COLUMNS)}")
        rows = {}
        try:
            for line in reader:
                if len(line) != len(PER_CLASS_COLUMNS):
                    raise ValueError(f"{len(line)} columns where the header names {len(PER_CLASS_COLUMNS)}")
                label, _, videos, correct, accuracy, top5_accuracy, confused_with, confused_count = line
                row = ClassRow(
                    _class(label, num_classes),
                    int(videos),
                    int(correct),
                    float(accuracy) if int(videos) else None,
                    float(top5_accuracy) if int(videos) else None,
                    cell_text(confused_with),
                    int(confused_count or 0),
                )
                rows[row.label] = row
        except (ValueError, csv.Error) as error:
            raise InputError(f"{path}:{reader.line_num}: {error}") from None
    return [rows.get(label, ClassRow(label, 0, 0, None, None, "", 0)) for label in range(num_classes)]


# Pictures


def _read_manifest(results: dict[str, Any]) -> Manifest | str:
    """The manifest that was evaluated, or why there is none."""
    try:
        return Manifest.read(results["manifest"]["path"])
    except (InputError, OSError) as error:
        return str(error)


def _frames_of(manifest: Manifest, row: int, path: str, view: View) -> list[tuple[float, bytes]]:
    """Up to `_FRAMES` frames of the first window: (seconds, JPEG of the middle crop). Raises `InputError`."""
    video = manifest[row] if row < len(manifest) else None
    if video is None or path not in (video.path, manifest.file(row)):
        raise InputError("the manifest has changed since then")
    plan = plan_sample(video, view, seed=0, epoch=0, sample_id=row)
    shown = np.unique(plan.picks[0])
    shown = shown[np.linspace(0, len(shown) - 1, min(len(shown), _FRAMES)).astype(int)]
    positions = plan.positions[shown]
    pictures = decode_frames(manifest.source(row), positions, size=coded_size(video)).frames
    side = min(_THUMBNAIL, view.crop_size)
    return [
        (position / video.fps, _jpeg(_crop(picture, plan.rectangles[1], plan.transpose), side))
        for position, picture in zip(positions, pictures, strict=True)
    ]


def _crop(picture: np.ndarray, rectangle: np.ndarray, transpose: bool) -> np.ndarray:
    """uint8 [H, W, 3] -> the part of it in `rectangle`, to whole pixels, as shown."""
    ends = np.round(rectangle).astype(int).reshape(2, 2).T
    for axis, (start, end) in enumerate(ends.tolist()):
        low = min(start, end, picture.shape[axis] - 1)
        part = np.arange(low, max(start, end, low + 1))
        picture = picture.take(part if start <= end else part[::-1], axis)
    return picture.swapaxes(0, 1) if transpose else picture


def _jpeg(picture: np.ndarray, side: int) -> bytes:
    """uint8 [H, W, 3] -> a JPEG of side x side pixels."""
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
    frame = frame.reformat(side, side, "yuvj420p", interpolation="AREA", dst_color_range="JPEG")
    context = av.CodecContext.create("mjpeg", "w")
    context.width, context.height, context.pix_fmt, context.time_base = side, side, "yuvj420p", Fraction(1)
    context.options = {"qmin": "4", "qmax": "4"}
    return b"".join(bytes(packet) for packet in [*context.encode(frame), *context.encode(None)])


# The page


def _plain(text: object) -> str:
    """`text` with what cannot be shown (bytes that are not UTF-8, control characters, changes of direction) as escape
    sequences."""
    return re.sub(
        "[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]",
        lambda match: _escape_sequence(ord(match[0])),
        str(text),
    )


def _escape_sequence(code: int) -> str:
    byte = code - 0xDC00 if 0xDC80 <= code <= 0xDCFF else code  # a byte that Python read as a surrogate
    return f"\\x{byte:02x}" if byte < 256 else f"\\u{code:04x}"


def _text(text: object) -> str:
    return html.escape(_plain(text))


def _percent(share: float | None, digits: int = 1) -> str:
    return "&ndash;" if share is None else f"{100 * share:.{digits}f}&#8239;%"


def _count(number: int, noun: str, plural: str | None = None) -> str:
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def _page(
    results: dict[str, Any], classes: list[str], predictions: Predictions, per_class: list[ClassRow], most: int
) -> str:
    mistakes = predictions.mistakes()
    sections = [
        _headline(results),
        _warnings(results, classes, per_class),
        _facts(results),
        _class_table(classes, per_class),
        _confusion(classes, predictions),
        _mistake_cards(results, classes, predictions, mistakes, most),
        _calibration(predictions),
        _unreadable(results["faults"]),
        _details(results),
    ]
    title = f"{_names_of_weights(results)} on {_name(results['manifest']['path'])}"
    body = "\n".join(section for section in sections if section)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}: top-1 {_percent(results["top1"])}</title>
<style>
{_asset("report.css")}</style>
<script>window.onerror = (message) => {{ document.documentElement.dataset.error = message; }};</script>
</head>
<body>
<main>
{body}
</main>
<script type="application/json" id="data">{_data(classes, predictions, mistakes)}</script>
<script>
{_asset("report.js")}</script>
</body>
</html>
"""


def _asset(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _data(classes: list[str], predictions: Predictions, mistakes: np.ndarray) -> str:
    """What report.js needs, as JSON that cannot end its element; probabilities in thousandths."""
    cells = _cells(predictions, len(classes))
    listed = mistakes[:_MOST_LISTED]
    data = {
        "classes": classes,
        "cells": cells.ravel().tolist(),
        "mistakes": {
            "row": predictions.rows[listed].tolist(),
            "path": [_plain(predictions.paths[index]) for index in listed],
            "label": predictions.labels[listed].tolist(),
            "predicted": predictions.top[listed, 0].tolist(),
            "confidence": np.rint(1000 * predictions.confidences[listed]).astype(int).tolist(),
            "true": np.rint(1000 * predictions.true_probabilities[listed]).astype(int).tolist(),
        },
    }
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")


def _cells(predictions: Predictions, num_classes: int) -> np.ndarray:
    """The cells of the confusion matrix that are not zero: int64 [C, 3] of label, prediction, videos."""
    pairs = (predictions.labels * num_classes + predictions.top[:, 0])[predictions.valid]
    keys, counts = np.unique(pairs, return_counts=True)
    return np.stack([keys // num_classes, keys % num_classes, counts], axis=1)


def _name(path: object) -> str:
    return _text(Path(str(path)).name)


def _names_of_weights(results: dict[str, Any]) -> str:
    first, *others = [_name(each["path"]) for each in results["weights"]] or ["weights"]
    return first + (f" and {_count(len(others), 'other')}" if others else "")


def _date(text: str) -> str:
    try:
        date = datetime.fromisoformat(text)
    except ValueError:
        return _text(text)
    zone = f" {date.tzname()}" if date.tzinfo else ""
    return f'<time datetime="{_text(text)}">{date.day} {date:%B %Y, %H:%M}{zone}</time>'


def _headline(results: dict[str, Any]) -> str:
    digits = 2 if results["expected"] >= 1000 else 1

    def tile(name: str, key: str) -> str:
        share, interval = results[key], results.get(f"{key}_interval")
        scale, note = f'<circle cx="{200 * share:.1f}" cy="6" r="4.5"/>', "every class counts the same"
        if interval:
            low, high = interval
            width = max(200 * (high - low), 2)
            scale = f'<rect class="band" x="{200 * low:.1f}" y="1" width="{width:.1f}" height="10" rx="3"/>{scale}'
            note = f"95&#8239;% interval {_percent(low, digits)} to {_percent(high, digits)}"
        return f"""<div class="tile">
<h2>{name}</h2>
<p class="big"><data id="{key}" value="{share!r}">{_percent(share, digits)}</data></p>
<svg class="scale" viewBox="-6 0 212 12" aria-hidden="true"><path d="M0 6H200"/>{scale}</svg>
<p class="note">{note}</p>
</div>"""

    return f"""<header>
<h1>{_names_of_weights(results)} <span>on</span> {_name(results["manifest"]["path"])}</h1>
<p class="note">Evaluated {_date(results["date"])} in {_duration(results["seconds"])},
 protocol {_text(results["protocol"])}</p>
</header>
<section class="tiles" aria-label="Headline">
{tile("Top-1 accuracy", "top1")}
{tile("Top-5 accuracy", "top5")}
{tile("Mean class accuracy", "mean_class_accuracy")}
</section>"""


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {seconds} s"


def _warnings(results: dict[str, Any], classes: list[str], per_class: list[ClassRow]) -> str:
    warnings = []
    if results["failed"]:
        verb = "counts" if results["failed"] == 1 else "count"
        warning = (
            f'<a href="#unreadable">{_count(results["failed"], "video")} could not be read</a> and {verb} as wrong.'
        )
        if results["evaluated"]:
            share = results["top1"] * results["expected"] / results["evaluated"]
            warning += f" Of the others, top-1 is {_percent(share)}."
        warnings.append(warning)
    low, high = results["top1_interval"]
    if high - low > 0.05:
        warnings.append(
            f"Only {_count(results['expected'], 'video')}: the interval of top-1 is {100 * (high - low):.0f} points "
            "wide; differences smaller than that say little."
        )
    empty = [classes[row.label] for row in per_class if not row.videos]
    if empty:
        names = ", ".join(f"<b>{_text(name)}</b>" for name in empty[:8]) + (", …" if len(empty) > 8 else "")
        warnings.append(f"{_count(len(empty), 'class has', 'classes have')} no video here: {names}.")
    items = "".join(f"<li>{warning}</li>\n" for warning in warnings)
    return f'<ul class="warnings" aria-label="Warnings">\n{items}</ul>' if warnings else ""


def _facts(results: dict[str, Any]) -> str:
    manifest, data = results["manifest"], results["config"]["data"]
    average = {"prob": "mean of their probabilities", "score": "mean of their scores"}
    counts = f"""<data id="expected" value="{results["expected"]}">{results["expected"]:,}</data> expected,
<data id="evaluated" value="{results["evaluated"]}">{results["evaluated"]:,}</data> evaluated,
<data id="failed" value="{results["failed"]}">{results["failed"]:,}</data> failed;
the manifest left out <data id="left_out" value="{manifest["left_out"]}">{manifest["left_out"]:,}</data>
of {manifest["listed"]:,} listed"""
    window = "the whole video"
    if data["stride"] is not None:
        window = f"{data['stride'] * data['num_frames'] / data['target_fps']:.3g} s"
    protocol = (
        f"{_count(results['windows'], 'window')} &times; {_count(results['crops'], 'crop')} a video, "
        f"{_text(average.get(results['average'], results['average']))}; clips of {data['num_frames']} frames "
        f"from {window}, {data['crop_size']} &times; {data['crop_size']} pixels"
    )
    rows = [("Videos", counts), ("Protocol", protocol), ("Manifest", _file(manifest))]
    weights = results["weights"]
    for each in weights:
        own = f"<br>by themselves top-1 {_percent(each['top1'])}, top-5 {_percent(each['top5'])}"
        rows.append(("Weights", _file(each) + (own if len(weights) > 1 else "")))
    items = "\n".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in rows)
    return f'<dl class="facts">\n{items}\n</dl>'


def _file(entry: dict[str, Any]) -> str:
    return (
        f'<span class="path">{_text(entry["path"])}</span><br>'
        f'<span class="hash">SHA-256 {_text(entry["sha256"])}</span>'
    )


def _class_table(classes: list[str], per_class: list[ClassRow]) -> str:
    numbers = {name: label for label, name in reversed(list(enumerate(classes)))}

    def line(row: ClassRow) -> str:
        confused = "&ndash;"
        if row.confused_count:
            target = numbers.get(_plain(row.confused_with))
            name = _text(row.confused_with)
            if target is not None:
                name = f'<a href="#true={row.label}&amp;predicted={target}" title="{name}">{name}</a>'
            confused = f"<span>{row.confused_count}</span> {name}"
        accuracy = "" if row.accuracy is None else f"{row.accuracy:.4f}"
        top5 = "" if row.top5_accuracy is None else f"{row.top5_accuracy:.4f}"
        bar = ""
        if row.videos:
            width, tick = 100 * row.accuracy, 100 * row.top5_accuracy
            bar = f'<i style="width:{width:.4g}%"></i><b style="left:{tick:.4g}%"></b>'
        name = _text(classes[row.label])
        return (
            f'<tr data-label="{row.label}" data-accuracy="{accuracy}" data-top5="{top5}" data-videos="{row.videos}">'
            f'<th scope="row"><a href="#true={row.label}" title="{name}">{name}</a></th>'
            f'<td class="bar"><div>{bar}</div></td><td>{_percent(row.accuracy)}</td>'
            f"<td>{_percent(row.top5_accuracy)}</td><td>{row.correct}&#8239;/&#8239;{row.videos}</td><td>{confused}</td></tr>"
        )

    worst_first = sorted(per_class, key=lambda row: (row.accuracy is None, row.accuracy or 0, row.label))
    lines = "\n".join(map(line, worst_first))
    return f"""<section id="classes">
<h2>Classes</h2>
<p class="tools"><label>Filter <input type="search" id="filter" autocomplete="off" spellcheck="false"></label>
<output id="shown" for="filter">{_count(len(classes), "class", "classes")}</output></p>
<div class="scroll" tabindex="0" role="region" aria-label="Accuracy of each class">
<table class="classes">
<colgroup><col class="name"><col>
<col class="number"><col class="number"><col class="number"><col class="name"></colgroup>
<thead><tr>
<th scope="col"><button type="button" data-sort="name">Class</button></th>
<th scope="col" colspan="2" aria-sort="ascending"><button type="button" data-sort="accuracy">Accuracy</button></th>
<th scope="col"><button type="button" data-sort="top5">Top-5</button></th>
<th scope="col"><button type="button" data-sort="videos">Videos</button></th>
<th scope="col">Most often taken for</th>
</tr></thead>
<tbody>
{lines}
</tbody>
</table>
</div>
<p class="note">The bar is the accuracy, the tick the top-5 accuracy. A class leads to its mistakes.</p>
</section>"""


def _confusion(classes: list[str], predictions: Predictions) -> str:
    cells = _cells(predictions, len(classes))
    totals = np.bincount(cells[:, 0], cells[:, 2], len(classes))
    wrong = cells[cells[:, 0] != cells[:, 1]]
    order = np.lexsort((wrong[:, 1], wrong[:, 0], -wrong[:, 2] / totals[wrong[:, 0]], -wrong[:, 2]))
    items = "\n".join(
        f'<li><a href="#true={label}&amp;predicted={predicted}">{_text(classes[label])} '
        f'<span class="arrow">→</span> {_text(classes[predicted])}</a> '
        f"<span>{count}&#8239;<small>({_percent(count / totals[label])})</small></span></li>"
        for label, predicted, count in wrong[order[:_MOST_CONFUSIONS]].tolist()
    )
    top = f'<ol class="pairs" id="pairs">\n{items}\n</ol>' if items else '<p class="note">No mistakes.</p>'
    return f"""<section id="confusion">
<h2>Confusion matrix</h2>
<div class="confusion">
<div class="matrix">
<canvas id="matrix" tabindex="0" role="application" aria-describedby="help"
 aria-label="Confusion matrix: a row for each true class, a column for each predicted one"></canvas>
<output id="readout"></output>
<div class="tools">
<span class="buttons"><button type="button" id="in" aria-label="Zoom in">+</button>
<button type="button" id="out" aria-label="Zoom out">&minus;</button>
<button type="button" id="all">Whole matrix</button></span>
<div class="legend"><div id="ramp"></div>
<span style="left:0">0</span><span style="left:22.4%">5</span><span style="left:50%">25</span>
<span style="left:70.7%">50</span><span style="left:100%">100&#8239;%</span></div>
</div>
<p class="note" id="help">Colours: share of the readable videos of a true class. Click the matrix, then turn the wheel
 or press + and &minus; to zoom; drag or press the arrow keys to move; a click or Enter lists the videos of a cell.</p>
</div>
<div class="side">
<h3>Most frequent confusions</h3>
{top}
<h3 id="chosen">Videos</h3>
<div id="videos" tabindex="0" role="region" aria-labelledby="chosen" aria-live="polite">
<p class="note">Choose a confusion, a cell or a class.</p></div>
</div>
</div>
</section>"""


def _mistake_cards(
    results: dict[str, Any], classes: list[str], predictions: Predictions, mistakes: np.ndarray, most: int
) -> str:
    if not len(mistakes) or not most:
        return ""
    data = results["config"]["data"]
    view = View(
        mode="test",
        num_frames=data["num_frames"],
        crop_size=data["crop_size"],
        stride=data["stride"],
        target_fps=data["target_fps"],
        past_end=data["past_end"],
        short_side=data["crop_size"],
        flip=False,
        num_windows=results["windows"],
    )
    manifest = _read_manifest(results)
    note = f"No pictures: {_text(manifest)}." if isinstance(manifest, str) else "Middle crop of the first window."
    extent = f"All {len(mistakes)}" if len(mistakes) <= most else f"The first {most} of {len(mistakes):,}"
    cards = []
    for index in mistakes[:most].tolist():
        frames = ""
        if not isinstance(manifest, str):
            try:
                frames = _figures(_frames_of(manifest, int(predictions.rows[index]), predictions.paths[index], view))
            except Exception as error:  # whatever is wrong with a video by now, it costs its pictures only
                frames = f'<p class="gone">No pictures: {_text(error)}.</p>'
        cards.append(_card(classes, predictions, index, frames))
    return f"""<section id="mistakes">
<h2>Most confident mistakes</h2>
<p class="note">{extent}, by the probability of the predicted class. {note}</p>
<div class="cards">
{"".join(cards)}</div>
</section>"""


def _figures(frames: Sequence[tuple[float, bytes]]) -> str:
    items = "".join(
        f'<figure><img alt="" src="data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}">'
        f"<figcaption>{seconds:.2f}&#8239;s</figcaption></figure>"
        for seconds, jpeg in frames
    )
    return f'<div class="frames">{items}</div>'


def _card(classes: list[str], predictions: Predictions, index: int, frames: str) -> str:
    label, top = int(predictions.labels[index]), predictions.top[index].tolist()
    bars = [(k, share) for k, share in zip(top, predictions.top_probabilities[index].tolist(), strict=True) if k >= 0]
    if label not in top:
        bars.append((label, float(predictions.true_probabilities[index])))
    kinds = {top[0]: "predicted", label: "true"}
    items = "\n".join(
        f'<li class="{kinds.get(k, "")}"><span class="name" title="{_text(classes[k])}">{_text(classes[k])}</span>'
        f"<em>{kinds.get(k, '')}</em>"
        f'<i><b style="width:{100 * min(share, 1):.4g}%"></b></i><span>{_percent(share)}</span></li>'
        for k, share in bars
    )
    return f"""<article class="card" id="row-{predictions.rows[index]}" data-label="{label}" data-predicted="{top[0]}">
{frames}
<p class="path">{_text(predictions.paths[index])}</p>
<ol class="top">
{items}
</ol>
</article>
"""


def _calibration(predictions: Predictions) -> str:
    """Confidence against accuracy, in bins of the same width, over the readable videos."""
    valid = predictions.valid
    if not valid.any():
        return ""
    confidences = predictions.confidences[valid]
    right = predictions.top[valid, 0] == predictions.labels[valid]
    bins = np.minimum((confidences * _BINS).astype(int), _BINS - 1)
    counts = np.bincount(bins, minlength=_BINS)
    filled = np.flatnonzero(counts)
    accuracies = np.bincount(bins, right, _BINS)[filled] / counts[filled]
    means = np.bincount(bins, confidences, _BINS)[filled] / counts[filled]
    error = float(np.abs(accuracies - means) @ counts[filled] / len(bins))
    width, bars = 300 / _BINS, []
    for k, accuracy, mean in zip(filled.tolist(), accuracies.tolist(), means.tolist(), strict=True):
        x, tall = k * width + 1, 36 * counts[k] / counts.max()
        bars.append(
            f"<g><title>{_percent(mean)} sure, {_percent(accuracy)} right, {_count(int(counts[k]), 'video')}</title>"
            f'<rect x="{x:.1f}" y="{300 - 300 * accuracy:.1f}" width="{width - 2:.1f}" height="{300 * accuracy:.1f}"/>'
            f'<rect class="count" x="{x:.1f}" y="{388 - tall:.1f}" width="{width - 2:.1f}" height="{tall:.1f}"/></g>'
        )
    grid = "".join(f"M0 {y}H300M{y} 0V300" for y in range(0, 301, 75))
    ticks = "".join(
        f'<text x="-8" y="{304 - 3 * k}" text-anchor="end">{k}</text>'
        f'<text x="{3 * k}" y="320" text-anchor="middle">{k}</text>'
        for k in (0, 25, 50, 75, 100)
    )
    mean, accuracy = float(confidences.mean()), float(right.mean())
    lean = (
        "as sure as right"
        if abs(mean - accuracy) < 0.005
        else "surer than right"
        if mean > accuracy
        else "less sure than right"
    )
    return f"""<section id="calibration">
<h2>Calibration</h2>
<div class="calibration">
<svg viewBox="-48 -8 360 400" role="img" aria-label="Accuracy for each confidence">
<path class="grid" d="{grid}"/><g class="bars">{"".join(bars)}</g><path class="ideal" d="M0 300L300 0"/>{ticks}
<text x="150" y="338" text-anchor="middle">confidence in %</text><text x="-8" y="388" text-anchor="end">videos</text>
<text transform="translate(-38 150) rotate(-90)" text-anchor="middle">accuracy in %</text>
</svg>
<div>
<p class="big"><data id="ece" value="{error!r}">{_percent(error)}</data></p>
<p>Expected calibration error: how far confidence and accuracy are apart on average,
in {_BINS} bins of the confidence.</p>
<p>Mean confidence {_percent(mean)}, accuracy of the readable videos {_percent(accuracy)}:
on average the network is {lean}. On the line it is exactly as often right as it is sure.</p>
</div>
</div>
</section>"""


def _unreadable(faults: list[dict[str, Any]]) -> str:
    if not faults:
        return ""
    lines = "\n".join(
        f'<tr data-row="{int(fault["row"])}"><td>{int(fault["row"])}</td><td class="path">{_text(fault["path"])}</td>'
        f"<td>{_text(fault['reason'])}</td></tr>"
        for fault in faults[:_MOST_UNREADABLE]
    )
    more = f", the first {_MOST_UNREADABLE:,} here" if len(faults) > _MOST_UNREADABLE else ""
    return f"""<section id="unreadable">
<h2>Unreadable videos</h2>
<p class="note">{_count(len(faults), "video")}{more}; each counts as wrong,
 and is in no cell of the confusion matrix.</p>
<div class="scroll" tabindex="0" role="region" aria-label="Unreadable videos">
<table>
<thead><tr><th scope="col">Row</th><th scope="col">Video</th><th scope="col">Reason</th></tr></thead>
<tbody>
{lines}
</tbody>
</table>
</div>
</section>"""


def _details(results: dict[str, Any]) -> str:
    versions = "".join(f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in results["versions"].items())
    config = "\n".join(map(_text, json.dumps(results["config"], indent=2, ensure_ascii=False).split("\n")))
    return f"""<section>
<details><summary>Configuration</summary><pre>{config}</pre></details>
<details><summary>Versions</summary><dl class="facts">{versions}</dl></details>
</section>"""
