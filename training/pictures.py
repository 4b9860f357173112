"""Pictures of clips and predictions."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor


def to_pixels(clips: Tensor, *, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Normalised clips [..., 3, T, S, S] -> uint8 [..., T, S, S, 3]."""
    channels_last = clips.detach().float().cpu().movedim(-4, -1).numpy()
    return np.clip((channels_last * std + mean) * 255 + 0.5, 0, 255).astype(np.uint8)


def clip_grid(clips: Tensor, *, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Clips [B, 3, T, S, S] -> one picture uint8 [B*S, T*S, 3]: a row a clip, a column a frame."""
    pixels = to_pixels(clips, mean=mean, std=std)
    num_clips, num_frames, size = pixels.shape[:3]
    return pixels.transpose(0, 2, 1, 3, 4).reshape(num_clips * size, num_frames * size, 3)


def _plain(text: str) -> str:
    """`text` as it is, where matplotlib would read dollar signs as mathematics."""
    return text.replace("$", r"\$")


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
    """Draws the frames and the three crops [3, 3, T, S, S] that the network saw, and a bar for each of the `most`
    likeliest classes."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    pixels = to_pixels(views, mean=mean, std=std)  # [V, T, S, S, 3]
    num_views, num_frames = pixels.shape[:2]
    shown = np.linspace(0, num_frames - 1, min(num_frames, 8)).astype(int)
    figure = pyplot.figure(figsize=(1.5 * len(shown), 6.4), layout="constrained")
    figure.suptitle(_plain(title))
    upper, lower = figure.subfigures(2, 1, height_ratios=[1, 2.2])
    upper.suptitle("the frames (middle crop)", fontsize="medium")
    for axes, frame in zip(upper.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        axes.imshow(pixels[num_views // 2, frame])
        axes.set_title(str(frame + 1), fontsize="small")
        axes.axis("off")
    left, right = lower.subfigures(1, 2)
    left.suptitle("the three crops (middle frame)", fontsize="medium")
    for axes, view in zip(left.subplots(1, num_views, squeeze=False)[0], pixels, strict=True):
        axes.imshow(view[num_frames // 2])
        axes.axis("off")
    best = np.argsort(probabilities)[::-1][:most]
    axes = right.subplots()
    bars = axes.barh([_plain(classes[index]) for index in best], [probabilities[index] for index in best])
    axes.bar_label(bars, fmt="%.3f", padding=3)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.15)
    axes.set_xlabel("probability, mean of the three crops")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
