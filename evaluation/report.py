"""report.html: an evaluation on one page, written from the files in its folder.

The page is self-contained, frames included: it opens from disk, and its content policy forbids the browser from
fetching anything. report.css has its styles, report.js its behaviour.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from common.labels import shows_top5
from dali_pipelines.files import unfinished
from evaluation.report_sections import calibration_figure, class_table, confusion_matrix, mistake_cards
from evaluation.report_tables import confusion_cells, mistakes
from evaluation.report_text import counted, date, duration, escape, file_name, percent, printable
from evaluation.result_files import read_results
from evaluation.results import (
    ClassResult,
    FaultSummary,
    ManifestSummary,
    Results,
    Summary,
    WeightsSummary,
    class_results,
)

REPORT = "report.html"

_MOST_LISTED = 20_000  # mistakes whose paths are in the page (1.5 MB), the most confident first
_MOST_UNREADABLE = 1_000


def write_report(folder: str | Path, *, most_cards: int = 24) -> Path:
    """Writes report.html into `folder`, from the results there; returns its path.

    The `most_cards` most confident mistakes are shown with frames of their videos, decoded again; if a video or the
    manifest no longer exists, only the frames are missing. Raises `InputError` if the folder holds no evaluation.
    """
    folder = Path(folder)
    page = _page(read_results(folder), most_cards)
    path = folder / REPORT
    part = unfinished(path)  # renamed once complete, as manifests are
    part.write_text(page, encoding="utf-8")
    part.replace(path)
    return path


def _page(results: Results, most_cards: int) -> str:
    summary, wrong, per_class = results.summary, mistakes(results), class_results(results)
    sections = [
        _headline(results),
        _warnings(summary, per_class),
        _facts(summary),
        class_table(results, per_class),
        confusion_matrix(results),
        mistake_cards(results, wrong, most=most_cards),
        calibration_figure(results),
        _unreadable(summary["faults"]),
        _details(summary["config"], summary["versions"]),
    ]
    body = "\n".join(section for section in sections if section)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{_weights_names(summary)} on {file_name(summary["manifest"]["path"])}: top-1 {percent(summary["top1"])}</title>
<style>
{_asset("report.css")}</style>
<script>window.onerror = (message) => {{ document.documentElement.dataset.error = message; }};</script>
</head>
<body>
<main>
{body}
</main>
<script type="application/json" id="data">{_data(results, wrong)}</script>
<script>
{_asset("report.js")}</script>
</body>
</html>
"""


def _asset(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _data(results: Results, wrong: np.ndarray) -> str:
    """The data for report.js, as JSON that cannot close its script element; probabilities in thousandths."""
    listed = wrong[:_MOST_LISTED]
    labels = results.labels[listed]
    data = {
        "classes": [printable(name) for name in results.classes],
        "cells": confusion_cells(results).ravel().tolist(),
        "mistakes": {
            "row": listed.tolist(),
            "path": [printable(results.paths[row]) for row in listed],
            "label": labels.tolist(),
            "predicted": results.top[listed, 0].tolist(),
            "confidence": np.rint(1000 * results.confidences[listed]).astype(int).tolist(),
            "true": np.rint(1000 * results.probabilities[listed, labels]).astype(int).tolist(),
        },
    }
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")


def _weights_names(summary: Summary) -> str:
    first, *others = [file_name(each["path"]) for each in summary["weights"]] or ["weights"]
    return first + (f" and {counted(len(others), 'other')}" if others else "")


def _headline(results: Results) -> str:
    summary = results.summary
    digits = 2 if summary["expected"] >= 1000 else 1
    top1 = _tile("Top-1 accuracy", "top1", summary["top1"], digits, summary["top1_interval"])
    top5 = ""
    if shows_top5(results.classes):
        top5 = _tile("Top-5 accuracy", "top5", summary["top5"], digits, summary["top5_interval"]) + "\n"
    mean = _tile("Mean class accuracy", "mean_class_accuracy", summary["mean_class_accuracy"], digits)
    f1 = _tile("Macro F1", "macro_f1", results.macro_f1, digits)
    return f"""<header>
<h1>{_weights_names(summary)} <span>on</span> {file_name(summary["manifest"]["path"])}</h1>
<p class="note">Evaluated {date(summary["date"])} in {duration(summary["seconds"])},
 protocol {escape(summary["protocol"])}</p>
</header>
<section class="tiles" aria-label="Headline">
{top1}
{top5}{mean}
{f1}
</section>"""


def _tile(title: str, name: str, share: float, digits: int, interval: tuple[float, float] | None = None) -> str:
    scale, note = f'<circle cx="{200 * share:.1f}" cy="6" r="4.5"/>', "every class counts the same"
    if interval:
        low, high = interval
        width = max(200 * (high - low), 2)
        scale = f'<rect class="band" x="{200 * low:.1f}" y="1" width="{width:.1f}" height="10" rx="3"/>{scale}'
        note = f"95&#8239;% interval {percent(low, digits)} to {percent(high, digits)}"
    return f"""<div class="tile">
<h2>{title}</h2>
<p class="big"><data id="{name}" value="{share!r}">{percent(share, digits)}</data></p>
<svg class="scale" viewBox="-6 0 212 12" aria-hidden="true"><path d="M0 6H200"/>{scale}</svg>
<p class="note">{note}</p>
</div>"""


def _warnings(summary: Summary, per_class: list[ClassResult]) -> str:
    warnings = []
    if summary["failed"]:
        verb = "counts" if summary["failed"] == 1 else "count"
        failed = counted(summary["failed"], "video")
        warning = f'<a href="#unreadable">{failed} could not be read</a> and {verb} as wrong.'
        if summary["evaluated"]:
            share = summary["top1"] * summary["expected"] / summary["evaluated"]
            warning += f" Of the others, top-1 is {percent(share)}."
        warnings.append(warning)
    low, high = summary["top1_interval"]
    if high - low > 0.05:
        warnings.append(
            f"Only {counted(summary['expected'], 'video')}: the interval of top-1 is {100 * (high - low):.0f} points "
            "wide; smaller differences mean little."
        )
    empty = [summary["classes"][row.label] for row in per_class if not row.videos]
    if empty:
        names = ", ".join(f"<b>{escape(name)}</b>" for name in empty[:8]) + (", …" if len(empty) > 8 else "")
        warnings.append(f"{counted(len(empty), 'class has', 'classes have')} no video here: {names}.")
    items = "".join(f"<li>{warning}</li>\n" for warning in warnings)
    return f'<ul class="warnings" aria-label="Warnings">\n{items}</ul>' if warnings else ""


def _facts(summary: Summary) -> str:
    manifest, data, weights = summary["manifest"], summary["config"]["data"], summary["weights"]
    average = {"prob": "mean of their probabilities", "score": "mean of their scores"}
    counts = f"""<data id="expected" value="{summary["expected"]}">{summary["expected"]:,}</data> expected,
<data id="evaluated" value="{summary["evaluated"]}">{summary["evaluated"]:,}</data> evaluated,
<data id="failed" value="{summary["failed"]}">{summary["failed"]:,}</data> failed;
the manifest left out <data id="left_out" value="{manifest["left_out"]}">{manifest["left_out"]:,}</data>
of {manifest["listed"]:,} listed"""
    window = "the whole video"
    if data["stride"] is not None:
        window = f"{data['stride'] * data['num_frames'] / data['target_fps']:.3g} s"
    protocol = (
        f"{counted(summary['windows'], 'window')} &times; {counted(summary['crops'], 'crop')} per video, "
        f"{escape(average.get(summary['average'], summary['average']))}; clips of {data['num_frames']} frames "
        f"from {window}, {data['crop_size']} &times; {data['crop_size']} pixels"
    )
    rows = [("Videos", counts), ("Protocol", protocol), ("Manifest", _file(manifest))]
    for each in weights:
        alone = f"<br>alone top-1 {percent(each['top1'])}"
        if shows_top5(summary["classes"]):
            alone += f", top-5 {percent(each['top5'])}"
        rows.append(("Weights", _file(each) + (alone if len(weights) > 1 else "")))
    items = "\n".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in rows)
    return f'<dl class="facts">\n{items}\n</dl>'


def _file(entry: ManifestSummary | WeightsSummary) -> str:
    return (
        f'<span class="path">{escape(entry["path"])}</span><br>'
        f'<span class="hash">SHA-256 {escape(entry["sha256"])}</span>'
    )


def _unreadable(faults: list[FaultSummary]) -> str:
    if not faults:
        return ""
    lines = "\n".join(
        f'<tr data-row="{fault["row"]}"><td>{fault["row"]}</td><td class="path">{escape(fault["path"])}</td>'
        f"<td>{escape(fault['reason'])}</td></tr>"
        for fault in faults[:_MOST_UNREADABLE]
    )
    more = f"; the first {_MOST_UNREADABLE:,} are listed" if len(faults) > _MOST_UNREADABLE else ""
    return f"""<section id="unreadable">
<h2>Unreadable videos</h2>
<p class="note">{counted(len(faults), "video")}{more}. Each counts as wrong
 and is not in the confusion matrix.</p>
<div class="scroll" tabindex="0" role="region" aria-label="Unreadable videos">
<table>
<thead><tr><th scope="col">Row</th><th scope="col">Video</th><th scope="col">Reason</th></tr></thead>
<tbody>
{lines}
</tbody>
</table>
</div>
</section>"""


def _details(config: Mapping[str, Any], versions: Mapping[str, Any]) -> str:
    items = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in versions.items())
    text = "\n".join(map(escape, json.dumps(config, indent=2, ensure_ascii=False).split("\n")))
    return f"""<section>
<details><summary>Configuration</summary><pre>{text}</pre></details>
<details><summary>Versions</summary><dl class="facts">{items}</dl></details>
</section>"""
