"""Turns normalised clips back into pixels."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor


def to_pixels(clips: Tensor, *, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Normalised clips [..., 3, T, S, S] -> uint8 [..., T, S, S, 3]."""
    channels_last = clips.detach().float().cpu().movedim(-4, -1).numpy()
    return np.clip((channels_last * std + mean) * 255 + 0.5, 0, 255).astype(np.uint8)


def clip_grid(clips: Tensor, *, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Clips [B, 3, T, S, S] -> one image uint8 [B*S, T*S, 3]: a row per clip, a column per frame."""
    pixels = to_pixels(clips, mean=mean, std=std)
    num_clips, num_frames, size = pixels.shape[:3]
    return pixels.transpose(0, 2, 1, 3, 4).reshape(num_clips * size, num_frames * size, 3)
