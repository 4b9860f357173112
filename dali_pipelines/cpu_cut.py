"""Cuts clips out of decoded frames on the CPU with torch, as the graph does with DALI.

DALI's resize takes 4 ms for 8 frames of 224 pixels on one core, and its normalisation another. torch's `grid_sample`
takes half of that for the same values (docs/benchmarks.md).
"""

import weakref
from collections import deque

import numpy as np
import torch
from torch.nn.functional import grid_sample

from dali_pipelines.graph import Cut

_MOST_VALUES = 1 << 23
"""Frame values converted to float32 at a time: 32 MiB."""


class BatchMemory:
    """Memory for batches, reused once nothing refers to a batch any more: new memory costs as much time as the cut
    itself, as the system has to clear every page of it."""

    def __init__(self, shape: tuple[int, ...], dtype: type[np.floating]):
        self._shape, self._dtype = shape, dtype
        self._free: deque[np.ndarray] = deque(maxlen=2)

    def take(self) -> torch.Tensor:
        """Memory for a batch, not cleared."""
        memory = self._free.pop() if self._free else np.empty(self._shape, self._dtype)
        lent = memory.view()  # torch holds it as long as any tensor, or a view of one, needs its memory
        weakref.finalize(lent, self._free.append, memory).atexit = False
        return torch.from_numpy(lent)


def cut_clips(
    frames: np.ndarray, picks: np.ndarray, rectangles: np.ndarray, transpose: bool, cut: Cut, out: torch.Tensor
) -> None:
    """Fills `out`, [V, C, T, S, S], from frames, uint8 [N, H, W, 3]; for the other arguments, see `Sample`.

    The values are (value / 255 - mean) / std, each within 1e-4 of the graph's.
    """
    scale = [1 / (255 * std) for std in cut.std]
    shift = [-mean / std for mean, std in zip(cut.mean, cut.std, strict=True)]
    pixels = torch.from_numpy(frames)
    height, width = frames.shape[1:3]
    at_once = max(_MOST_VALUES // (3 * height * width), 1)
    grids = [_grid(rectangle, transpose, cut.crop_size, height, width) for rectangle in rectangles]
    crops = cut.clips // cut.windows
    for window, numbers in enumerate(torch.from_numpy(picks).long().split(1)):
        for first in range(0, picks.shape[1], at_once):
            some = numbers[0, first : first + at_once]
            # `grid_sample` reads each channel out of interleaved pixels: faster than splitting them into planes first.
            values = pixels.index_select(0, some).float()
            for clip in range(window * crops, (window + 1) * crops):
                for channel in range(3):
                    found = grid_sample(
                        values[None, ..., channel], grids[clip], padding_mode="border", align_corners=False
                    )
                    place = out[clip, channel, first : first + at_once]
                    torch.add(found[0].mul_(scale[channel]), shift[channel], out=place)


def _grid(rectangle: np.ndarray, transpose: bool, size: int, height: int, width: int) -> torch.Tensor:
    """float32 [1, S, S, 2]: where in the frame each pixel is taken from, in `grid_sample`'s coordinates."""
    steps = (np.arange(size) + 0.5) / size
    y0, x0, y1, x1 = rectangle.tolist()
    y = torch.from_numpy(2 * (y0 + steps * (y1 - y0)) / height - 1)
    x = torch.from_numpy(2 * (x0 + steps * (x1 - x0)) / width - 1)
    rows, columns = torch.meshgrid(y, x, indexing="ij")
    if transpose:
        rows, columns = rows.T, columns.T
    return torch.stack([columns, rows], dim=-1).float()[None]
