"""Chooses the frames of a video that make up a clip.

A strategy places T points in a window of the video. The config, the loader and the tools take the names from
`STRATEGIES`: a new strategy is a function and a row there.
"""

import math
from typing import Protocol

import numpy as np


class Strategy(Protocol):
    """How a window's frames are spaced."""

    def __call__(self, *, window: float, frames: int, num_frames: int, start: float) -> np.ndarray:
        """`num_frames` points, ascending, in units of frames; points past the last frame count as the last one.

        The window is `window` frames long, which may exceed the `frames` frames of the video; `start` in [0, 1] places
        it between the first and the last position where it fits.
        """


def _fit(*, window: float, frames: int, num_frames: int, start: float) -> np.ndarray:
    """Shrinks the window to the video."""
    return _hold(window=min(window, frames), frames=frames, num_frames=num_frames, start=start)


def _hold(*, window: float, frames: int, num_frames: int, start: float) -> np.ndarray:
    """Repeats the last frame (PaddleVideo)."""
    first = math.ceil(start * max(frames - window, 0))
    return np.linspace(first, first + window - 1, num_frames)


STRATEGIES: dict[str, Strategy] = {"fit": _fit, "hold": _hold}
"""Strategies by `past_end`, since they differ only for windows longer than the video:

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
    first and the last position where it fits; an evaluation with one window uses 0. `past_end`: see `STRATEGIES`.
    """
    window = frames if stride is None else max(stride * num_frames / target_fps * fps, 1)
    points = STRATEGIES[past_end](window=window, frames=frames, num_frames=num_frames, start=start)
    positions: np.ndarray = np.clip(points, 0, frames - 1).astype(np.int64)
    return positions
