"""Timelines stay legible with long names and long videos."""

import itertools

import numpy as np
import pytest
import torch
from matplotlib import pyplot

from serving.pictures import save_timeline

LONG = [f"pretending to put something into something else without doing it ({k})" for k in range(12)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "windows, seconds, names", [(200, 20 * 3600, LONG), (4, 0.7, ["ash", "birch"]), (12, 3599.5, LONG[:2])]
)
def test_captions_do_not_overlap_and_ticks_are_true(windows, seconds, names, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(pyplot, "close", drawn.append)
    starts = np.linspace(0, seconds, windows, endpoint=False)
    probabilities = np.random.default_rng(0).dirichlet(np.ones(len(names)), windows)
    times = np.stack([starts, starts + seconds / windows], 1)
    frames = torch.zeros(windows, 3, 8, 8)
    save_timeline(tmp_path / "t.png", frames, times, probabilities, names, title="t", mean=[0] * 3, std=[1] * 3)
    [figure] = drawn
    monkeypatch.undo()
    axes, *pictures = figure.axes
    boxes = [each.xaxis.label.get_window_extent() for each in pictures]
    assert len(boxes) == min(windows, 12)
    assert all(a.x1 < b.x0 for a, b in itertools.pairwise(boxes))
    assert axes.get_legend().get_window_extent().width < 4.2 * figure.dpi
    low, high = axes.get_xlim()
    ticks = [(label.get_text(), place) for label, place in zip(axes.get_xticklabels(), axes.get_xticks(), strict=True)]
    ticks = [(text, place) for text, place in ticks if low <= place <= high]
    assert 3 <= len(ticks) <= 11
    for text, place in ticks:
        parts = [float(part) for part in text.split(":")]
        assert sum(part * 60**power for power, part in enumerate(reversed(parts))) == pytest.approx(place, abs=1e-6)
    if names is LONG:
        shown = {text.get_text() for text in axes.get_legend().get_texts()}
        assert len(shown) == 8 and all(text.endswith("…") for text in shown)  # cut off, and yet distinct
    pyplot.close(figure)
