"""Plots of clips and predictions, as image files."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor
from torch.nn.functional import interpolate

from common.clip_images import to_pixels
from dali_pipelines.errors import InputError
from serving.formats import clock


def require_matplotlib(option: str) -> None:
    """Raises `InputError` if matplotlib, which `option` needs, is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise InputError(f"{option} needs matplotlib: pip install matplotlib") from None


def _literal(text: str) -> str:
    """Escapes `text` for matplotlib, which reads dollar signs as maths and refuses names that are not UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode().replace("$", r"\$")


def save_prediction_picture(
    path: str | Path,
    views: Tensor,
    probabilities: Sequence[float],
    classes: Sequence[str],
    *,
    title: str,
    mean: Sequence[float],
    std: Sequence[float],
    most: int = 8,
) -> None:
    """Draws the frames and the three crops that the network saw, float32 [3, 3, T, S, S] normalised with `mean` and
    `std`, and a bar for each of the `most` likely classes."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    pixels = to_pixels(views, mean=mean, std=std)  # [V, T, S, S, 3]
    num_views, num_frames = pixels.shape[:2]
    shown = np.linspace(0, num_frames - 1, min(num_frames, 8)).astype(int)
    figure = pyplot.figure(figsize=(1.5 * len(shown), 6.4), layout="constrained")
    figure.suptitle(_literal(title))
    upper, lower = figure.subfigures(2, 1, height_ratios=[1, 2.2], squeeze=False).flat
    upper.suptitle("the frames (middle crop)", fontsize="medium")
    for axes, frame in zip(upper.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        axes.imshow(pixels[num_views // 2, frame])
        axes.set_title(str(frame + 1), fontsize="small")
        axes.axis("off")
    left, right = lower.subfigures(1, 2, squeeze=False).flat
    left.suptitle("the three crops (middle frame)", fontsize="medium")
    for axes, view in zip(left.subplots(1, num_views, squeeze=False)[0], pixels, strict=True):
        axes.imshow(view[num_frames // 2])
        axes.axis("off")
    best = np.argsort(probabilities)[::-1][:most]
    axes = right.subplots()
    bars = axes.barh([_literal(classes[index]) for index in best], [probabilities[index] for index in best])
    axes.bar_label(bars, fmt="%.3f", padding=3)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.15)
    axes.set_xlabel("probability, mean of the three crops")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def save_explanation(
    path: str | Path, clip: Tensor, attention: Tensor, *, title: str, mean: Sequence[float], std: Sequence[float]
) -> None:
    """Draws the frames of a normalised clip [3, T, S, S] and, below, the same frames overlaid with the network's
    attention [T, rows, columns], resized, with each frame's share of the total. All share one scale: 1 is the mean."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    pixels = to_pixels(clip, mean=mean, std=std)  # [T, S, S, 3]
    num_frames, size = pixels.shape[:2]
    times_mean = attention / attention.mean()
    heat = interpolate(times_mean[:, None], size=(size, size), mode="bilinear")[:, 0].numpy()  # [T, S, S]
    shares = (attention.sum((1, 2)) / attention.sum()).tolist()
    grey = pixels @ np.array([0.299, 0.587, 0.114]) * 0.75
    shown = np.linspace(0, num_frames - 1, min(num_frames, 16)).astype(int)
    figure, rows = pyplot.subplots(2, len(shown), figsize=(1.5 * len(shown) + 0.6, 3.7), squeeze=False)
    figure.subplots_adjust(
        left=0.01, right=1 - 0.7 / (1.5 * len(shown) + 0.6), top=0.83, bottom=0.07, wspace=0.04, hspace=0.04
    )
    figure.suptitle(_literal(title), x=0.01, ha="left")
    for (upper, lower), frame in zip(rows.T, shown, strict=True):
        upper.imshow(pixels[frame])
        upper.set_title(f"frame {frame + 1}", fontsize="small")
        lower.imshow(grey[frame], cmap="gray", vmin=0, vmax=255)
        opacity = np.clip(heat[frame] / heat.max(), 0, 1) ** 0.7 * 0.85
        lower.imshow(heat[frame], cmap="inferno", vmin=0, vmax=heat.max(), alpha=opacity)
        lower.set_xlabel(f"{shares[frame]:.0%} of attention", fontsize="small", labelpad=2)
        for axes in (upper, lower):
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
    place = rows[1, -1].get_position()
    scale = figure.add_axes((place.x1 + 0.008, place.y0, 0.008, place.height))
    figure.colorbar(pyplot.cm.ScalarMappable(pyplot.Normalize(0, heat.max()), "inferno"), cax=scale)
    scale.tick_params(labelsize="x-small")
    scale.set_title("x mean", fontsize="x-small", loc="left")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


_TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200)
"""Seconds from one tick of a timeline to the next: the first that gives at most ten. The labels show them exactly."""


def save_timeline(
    path: str | Path,
    frames: Tensor,
    seconds: np.ndarray,
    probabilities: np.ndarray,
    classes: Sequence[str],
    *,
    title: str,
    mean: Sequence[float],
    std: Sequence[float],
    most: int = 8,
    most_frames: int = 12,
) -> None:
    """Draws the probabilities [N, K] of N windows over time, from start to end in `seconds` [N, 2], for the `most`
    classes with the highest peaks, and below them the normalised frames [N, 3, S, S] of up to `most_frames` windows."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.font_manager import FontProperties
    from matplotlib.patches import ConnectionPatch

    figure = pyplot.figure(figsize=(13, 5), dpi=110)
    canvas = figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    measure = canvas.get_renderer().get_text_width_height_descent

    def fitted(text: str, inches: float, size: float) -> str:
        """`text` for matplotlib, cut off with an ellipsis to fit into `inches` in a font of `size` points."""
        font = FontProperties(size=size)
        shown = _literal(text)
        while text and measure(shown, font, False)[0] > inches * figure.dpi:
            text = text[:-1]
            shown = _literal(text.rstrip()) + "…"
        return shown

    def name(label: int, inches: float, size: float) -> str:
        """The class name if it fits; otherwise its beginning, after its label, as others may begin alike."""
        shown = fitted(classes[label], inches, size)
        return shown if shown == _literal(classes[label]) else fitted(f"{label}: {classes[label]}", inches, size)

    best = np.argsort(probabilities.max(0))[::-1][:most]
    centres = seconds.mean(1)
    shown = np.unique(np.linspace(0, len(frames) - 1, min(len(frames), most_frames)).astype(int))
    pixels = to_pixels(frames[shown].unsqueeze(2), mean=mean, std=std)[:, 0]  # [n, S, S, 3]
    figure.suptitle(_literal(title), x=0.06, ha="left")
    axes = figure.add_axes((0.06, 0.4, 0.77, 0.5))
    colours = {label: f"C{place}" for place, label in enumerate(best)}  # C7 is grey, so other classes are black
    marker = min(4, 240 / len(centres))
    for label in best:
        axes.plot(centres, probabilities[:, label], "o-", color=colours[label], ms=marker, label=name(label, 3, 10))
    axes.set(xlim=(0, seconds[-1, 1]), ylim=(-0.03, 1.03), ylabel="probability")
    step = next((each for each in _TICKS if seconds[-1, 1] <= 10 * each), _TICKS[-1])
    axes.xaxis.set_major_locator(pyplot.MultipleLocator(step))
    axes.xaxis.set_major_formatter(lambda value, _: clock(value) if step < 1 else clock(value).removesuffix(".0"))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    width = 0.77 / len(shown)
    for place, (window, frame) in enumerate(zip(shown, pixels, strict=True)):
        label = int(probabilities[window].argmax())
        below = figure.add_axes((0.06 + place * width + 0.04 * width, 0.1, 0.92 * width, 0.2), anchor="N")
        below.imshow(frame)
        below.set(xticks=[], yticks=[])
        below.spines[:].set(color=colours.get(label, "black"), linewidth=3)
        start, end = map(clock, seconds[window])
        times = f"{start} - {end}"
        if fitted(times, 12 * width, 7) != times:
            times = f"{start} -\n{end}"
        below.set_xlabel(f"{name(label, 12 * width, 7)}\n{times}", fontsize=7)
        figure.add_artist(
            ConnectionPatch(
                (centres[window], 0), (0.5, 1), axes.get_xaxis_transform(), below.transAxes, color="grey", lw=0.6
            )
        )
    figure.savefig(path, dpi=110, bbox_inches="tight")
    pyplot.close(figure)
