"""Which frames of a video make a clip.

A strategy places T points over a window of the video. `STRATEGIES` is the one table of them: the config, the loader and
the tools take the names from it. A new strategy is a function and a row.
"""

import math
from typing import Protocol

import numpy as np


class Strategy(Protocol):
    """How a window's frames are spaced."""

    def __call__(self, *, window: float, frames: int, num_frames: int, start: float) -> np.ndarray:
        """`num_frames` points, ascending, in units of frames; those past the last frame count as the last one.

        The window is `window` frames long, maybe longer than the video, which has `frames`; `start` in [0, 1] places it
        between the first and the last place where it fits.
        """


def _fit(*, window: float, frames: int, num_frames: int, start: float) -> np.ndarray:
    """Shrinks the window to the video."""
    return _hold(window=min(window, frames), frames=frames, num_frames=num_frames, start=start)


def _hold(*, window: float, frames: int, num_frames: int, start: float) -> np.ndarray:
    """Repeats the last frame (PaddleVideo)."""
    first = math.ceil(start * max(frames - window, 0))
    return np.linspace(first, first + window - 1, num_frames)


STRATEGIES: dict[str, Strategy] = {"fit": _fit, "hold": _hold}
"""By the value of `past_end`, since the two differ in windows longer than the video:

3 frames, window of 6, T = 4:    fit 0 0 1 2    hold 0 1 2 2
"""


def frame_positions(
    *,
    frames: int,
    fps: float,
    num_frames: int,
    stride: float | None,
    target_fps: float,
    past_end: str,
    start: float = 0.0,
) -> np.ndarray:
    """Positions of `num_frames` frames in a video of `frames` frames at `fps`; int64 [num_frames], ascending.

    The window is `stride * num_frames / target_fps` seconds long (None: the whole video), and the positions are
    its linspace, end points included, truncated to integers as PaddleVideo does (loader/pipelines/decode.py and
    sample.py; rounding gives other frames for most lengths). `start` in [0, 1] places the window between the
    first and the last place where it fits; an evaluation with one window uses 0. `past_end`: see `STRATEGIES`.
    """
    window = frames if stride is None else max(stride * num_frames / target_fps * fps, 1)
    points = STRATEGIES[past_end](window=window, frames=frames, num_frames=num_frames, start=start)
    positions: np.ndarray = np.clip(points, 0, frames - 1).astype(np.int64)
    return positions
