"""The sections of the report with tables and figures: classes, confusion matrix, mistakes and calibration, as HTML."""

import base64
from collections.abc import Sequence

import numpy as np

from common.labels import shows_top5
from dali_pipelines.errors import InputError
from dali_pipelines.manifest import Manifest
from evaluation.report_frames import first_window, thumbnails
from evaluation.report_tables import BINS, calibration, confusions
from evaluation.report_text import counted, escape, percent
from evaluation.results import ClassResult, Results

_MOST_CONFUSIONS = 50


def class_table(results: Results, per_class: list[ClassResult]) -> str:
    """Returns the table of classes as HTML, the worst class first."""
    worst_first = sorted(per_class, key=lambda row: (row.accuracy is None, row.accuracy or 0, row.label))
    lines = "\n".join(_class_line(results.classes, row) for row in worst_first)
    top5, tick = "", ""
    if shows_top5(results.classes):
        top5 = '<th scope="col"><button type="button" data-sort="top5">Top-5</button></th>\n'
        tick = ", the tick the top-5 accuracy"
    return f"""<section id="classes">
<h2>Classes</h2>
<p class="tools"><label>Filter <input type="search" id="filter" autocomplete="off" spellcheck="false"></label>
<output id="shown" for="filter">{counted(len(per_class), "class", "classes")}</output></p>
<div class="scroll" tabindex="0" role="region" aria-label="Accuracy of each class">
<table class="classes">
<colgroup><col class="name"><col>
{'<col class="number">' * (3 if top5 else 2)}<col class="name"></colgroup>
<thead><tr>
<th scope="col"><button type="button" data-sort="name">Class</button></th>
<th scope="col" colspan="2" aria-sort="ascending"><button type="button" data-sort="accuracy">Accuracy</button></th>
{top5}<th scope="col"><button type="button" data-sort="videos">Videos</button></th>
<th scope="col">Most often mistaken for</th>
</tr></thead>
<tbody>
{lines}
</tbody>
</table>
</div>
<p class="note">The bar shows the accuracy{tick}. Click a class to see its mistakes.</p>
</section>"""


def _class_line(classes: Sequence[str], row: ClassResult) -> str:
    confused = "&ndash;"
    if row.confused_with is not None:
        target = escape(classes[row.confused_with])
        link = f"#true={row.label}&amp;predicted={row.confused_with}"
        confused = f'<span>{row.confused_count}</span> <a href="{link}" title="{target}">{target}</a>'
    accuracy, top5, bar = "", "", ""
    if row.accuracy is not None and row.top5_accuracy is not None:
        accuracy, top5 = f"{row.accuracy:.4f}", f"{row.top5_accuracy:.4f}"
        bar = f'<i style="width:{100 * row.accuracy:.4g}%"></i>'
        if shows_top5(classes):
            bar += f'<b style="left:{100 * row.top5_accuracy:.4g}%"></b>'
    top5_cell = f"<td>{percent(row.top5_accuracy)}</td>" if shows_top5(classes) else ""
    name = escape(classes[row.label])
    return (
        f'<tr data-label="{row.label}" data-accuracy="{accuracy}" data-top5="{top5}" data-videos="{row.videos}">'
        f'<th scope="row"><a href="#true={row.label}" title="{name}">{name}</a></th>'
        f'<td class="bar"><div>{bar}</div></td><td>{percent(row.accuracy)}</td>'
        f"{top5_cell}<td>{row.correct}&#8239;/&#8239;{row.videos}</td><td>{confused}</td></tr>"
    )


def confusion_matrix(results: Results) -> str:
    """Returns the confusion matrix and its largest confusions as HTML."""
    classes = results.classes
    items = "\n".join(
        f'<li><a href="#true={each.label}&amp;predicted={each.predicted}">{escape(classes[each.label])} '
        f'<span class="arrow">→</span> {escape(classes[each.predicted])}</a> '
        f"<span>{each.videos}&#8239;<small>({percent(each.share)})</small></span></li>"
        for each in confusions(results, most=_MOST_CONFUSIONS)
    )
    most_frequent = f'<ol class="pairs" id="pairs">\n{items}\n</ol>' if items else '<p class="note">No mistakes.</p>'
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
<p class="note" id="help">Colours: share of the readable videos of a true class. Click the matrix, then scroll
 or press + and &minus; to zoom; drag or press the arrow keys to move; click a cell or press Enter for its videos.</p>
</div>
<div class="side">
<h3>Most frequent confusions</h3>
{most_frequent}
<h3 id="chosen">Videos</h3>
<div id="videos" tabindex="0" role="region" aria-labelledby="chosen" aria-live="polite">
<p class="note">Choose a confusion, a cell or a class.</p></div>
</div>
</div>
</section>"""


def mistake_cards(results: Results, mistakes: np.ndarray, *, most: int) -> str:
    """Returns the first `most` of the rows `mistakes` as HTML, with frames of the videos that can still be decoded."""
    if not len(mistakes) or not most:
        return ""
    view, manifest, note = first_window(results.summary), None, "Middle crop of the first window."
    try:
        manifest = Manifest.read(results.summary["manifest"]["path"])
    except (InputError, OSError) as error:
        note = f"No frames: {escape(error)}."
    extent = f"All {len(mistakes)}" if len(mistakes) <= most else f"The first {most} of {len(mistakes):,}"
    cards = []
    for row in mistakes[:most].tolist():
        figures = ""
        if manifest is not None:
            try:
                figures = _figures(thumbnails(manifest, row, results.paths[row], view))
            except Exception as error:  # an unreadable video costs only its frames
                figures = f'<p class="gone">No frames: {escape(error)}.</p>'
        cards.append(_card(results, row, figures))
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


def _card(results: Results, row: int, figures: str) -> str:
    label, top = int(results.labels[row]), [k for k in results.top[row].tolist() if k >= 0]
    probabilities = results.probabilities[row].tolist()
    kinds = {top[0]: "predicted", label: "true"}
    items = "\n".join(
        f'<li class="{kinds.get(k, "")}"><span class="name" title="{name}">{name}</span>'
        f"<em>{kinds.get(k, '')}</em>"
        f'<i><b style="width:{100 * min(share, 1):.4g}%"></b></i><span>{percent(share)}</span></li>'
        for k, name, share in ((k, escape(results.classes[k]), probabilities[k]) for k in dict.fromkeys([*top, label]))
    )
    return f"""<article class="card" id="row-{row}" data-label="{label}" data-predicted="{top[0]}">
{figures}
<p class="path">{escape(results.paths[row])}</p>
<ol class="top">
{items}
</ol>
</article>
"""


def calibration_figure(results: Results) -> str:
    """Returns the reliability diagram as HTML; "" if no video could be read."""
    found = calibration(results)
    if found is None:
        return ""
    width, largest, bars = 300 / BINS, max(each.videos for each in found.bins), []
    for each in found.bins:
        x, height, count_height = each.number * width + 1, 300 * each.accuracy, 36 * each.videos / largest
        title = f"{percent(each.confidence)} confident, {percent(each.accuracy)} right, {counted(each.videos, 'video')}"
        size = f'width="{width - 2:.1f}" height'
        bars.append(
            f'<g><title>{title}</title><rect x="{x:.1f}" y="{300 - height:.1f}" {size}="{height:.1f}"/>'
            f'<rect class="count" x="{x:.1f}" y="{388 - count_height:.1f}" {size}="{count_height:.1f}"/></g>'
        )
    grid = "".join(f"M0 {y}H300M{y} 0V300" for y in range(0, 301, 75))
    ticks = "".join(
        f'<text x="-8" y="{304 - 3 * k}" text-anchor="end">{k}</text>'
        f'<text x="{3 * k}" y="320" text-anchor="middle">{k}</text>'
        for k in (0, 25, 50, 75, 100)
    )
    verdict = "overconfident" if found.confidence > found.accuracy else "underconfident"
    if abs(found.confidence - found.accuracy) < 0.005:
        verdict = "as confident as it is accurate"
    return f"""<section id="calibration">
<h2>Calibration</h2>
<div class="calibration">
<svg viewBox="-48 -8 360 400" role="img" aria-label="Accuracy for each confidence">
<path class="grid" d="{grid}"/><g class="bars">{"".join(bars)}</g><path class="ideal" d="M0 300L300 0"/>{ticks}
<text x="150" y="338" text-anchor="middle">confidence in %</text><text x="-8" y="388" text-anchor="end">videos</text>
<text transform="translate(-38 150) rotate(-90)" text-anchor="middle">accuracy in %</text>
</svg>
<div>
<p class="big"><data id="ece" value="{found.error!r}">{percent(found.error)}</data></p>
<p>Expected calibration error: the mean distance between confidence and accuracy,
in {BINS} bins of confidence.</p>
<p>Mean confidence {percent(found.confidence)}, accuracy of the readable videos {percent(found.accuracy)}:
on average the network is {verdict}. On the line, confidence equals accuracy.</p>
</div>
</div>
</section>"""
