"""Which frames of a video make a clip: T points of a linspace over a window, in frame positions."""

import math

import numpy as np

PAST_END = ("fit", "hold")


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
    first and the last place where it fits; an evaluation with one window uses 0.

    A window longer than the video: "fit" shrinks it to the video, "hold" repeats the last frame (PaddleVideo):

        3 frames, window of 6, T = 4:    fit 0 0 1 2    hold 0 1 2 2
    """
    window = frames if stride is None else max(stride * num_frames / target_fps * fps, 1)
    if past_end == "fit":
        window = min(window, frames)
    first = math.ceil(start * max(frames - window, 0))
    points = np.linspace(first, first + window - 1, num_frames)
    return np.clip(points, 0, frames - 1).astype(np.int64)
