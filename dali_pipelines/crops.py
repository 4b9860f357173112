"""Which pixels of a frame make up a view: "resize the short side, then crop a square" as one rectangle.

A rectangle is float64 [4]: y0, x0, y1, x1 in continuous source-pixel coordinates (the first pixel spans 0..1).
Resizing it to crop_size x crop_size gives the same result as resize-then-crop (bilinear, half-pixel centres, no
antialiasing). Swapped ends flip: x0 > x1 is a horizontal flip.
"""

import math

import numpy as np

JITTER = (8 / 7, 10 / 7)  # 256 and 320 at 224, PaddleVideo pptimesformer_k400_videos.yaml
VALIDATION_SCALE = 8 / 7  # 256 at 224


def resized_size(height: int, width: int, short_side: int) -> tuple[int, int]:
    """(height, width) with the short side resized to `short_side`; the long one is rounded down (PaddleVideo Scale)."""
    if width < height:
        return math.floor(height / width * short_side), short_side
    return short_side, math.floor(width / height * short_side)


def random_crop(
    *, height: int, width: int, crop_size: int, short_sides: tuple[float, float], flip: bool, draws: np.ndarray
) -> np.ndarray:
    """One rectangle [1, 4] for training; `draws` are four uniform numbers in [0, 1): scale, y, x, flip."""
    low, high = short_sides
    size = resized_size(height, width, round(low + draws[0] * (high - low)))
    y, x = (int(u * (side - crop_size + 1)) for u, side in zip(draws[1:3], size, strict=True))
    rectangle = _rectangle(height, width, size, y, x, crop_size)
    return rectangle[:, [0, 3, 2, 1]] if flip and draws[3] < 0.5 else rectangle


def centre_crop(*, height: int, width: int, crop_size: int, short_side: int) -> np.ndarray:
    """One rectangle [1, 4] for validation."""
    size = resized_size(height, width, short_side)
    y, x = (round((side - crop_size) / 2) for side in size)
    return _rectangle(height, width, size, y, x, crop_size)


def uniform_crops(*, height: int, width: int, crop_size: int, short_side: int) -> np.ndarray:
    """Three rectangles [3, 4] at the start, middle and end of the long side (PaddleVideo UniformCrop)."""
    size = resized_size(height, width, short_side)
    step_y, step_x = ((side - crop_size) // 2 for side in size)
    if size[0] > size[1]:
        corners = [(view * step_y, step_x) for view in range(3)]
    else:
        corners = [(step_y, view * step_x) for view in range(3)]
    return np.concatenate([_rectangle(height, width, size, y, x, crop_size) for y, x in corners])


def to_coded(
    rectangles: np.ndarray, *, rotation: int, mirrored: bool, height: int, width: int
) -> tuple[np.ndarray, bool]:
    """Rectangles in the frame as shown -> rectangles in the frame as coded, and whether to transpose after.

    To be shown, the coded frame (`height` x `width`) is mirrored left to right if `mirrored`, then rotated
    anticlockwise by `rotation` degrees.
    """
    y0, x0, y1, x1 = rectangles.T
    if rotation == 90:
        turned = (x0, width - y0, x1, width - y1)
    elif rotation == 180:
        turned = (height - y0, width - x0, height - y1, width - x1)
    elif rotation == 270:
        turned = (height - x0, y0, height - x1, y1)
    else:
        turned = (y0, x0, y1, x1)
    if mirrored:
        y0, x0, y1, x1 = turned
        turned = (y0, width - x0, y1, width - x1)
    return np.stack(turned, axis=1), rotation in (90, 270)


_Taps = tuple[np.ndarray, np.ndarray, np.ndarray]


class Reducer:
    """Cuts and resizes the crops of a frame, for frames too large to be passed on whole.

        reduce = Reducer(rectangles, crop_size=224, size=(4320, 7680))
        reduce(frame)           # uint8 [3 * 224, 224, 3]: the crops, one below the other
        reduce.rectangles       # [V, 4]: where each crop is in that

    The pixels are those of the graph's resize, rounded to 8 bits: at most 0.5/255 off. Written in numpy, unlike
    `cpu_cut`, because the workers do not load torch.
    """

    def __init__(self, rectangles: np.ndarray, *, crop_size: int, size: tuple[int, int]):
        distinct, which = np.unique(rectangles, axis=0, return_inverse=True)
        self._taps = [
            (_taps(y0, y1, crop_size, size[0]), _taps(x0, x1, crop_size, size[1])) for y0, x0, y1, x1 in distinct
        ]
        tops = crop_size * which.reshape(-1, 1)
        self.rectangles = np.hstack([tops, 0 * tops, tops + crop_size, 0 * tops + crop_size]).astype(np.float64)

    def __call__(self, frame: np.ndarray) -> np.ndarray:
        """uint8 [H, W, 3] of `size` -> uint8 [K * crop_size, crop_size, 3], K distinct rectangles."""
        return np.concatenate([self._crop(frame, *taps) for taps in self._taps])

    @staticmethod
    def _crop(frame: np.ndarray, rows: _Taps, columns: _Taps) -> np.ndarray:
        (top, bottom, down), (left, right, across) = rows, columns
        down, across = down[:, None, None], across[None, :, None]
        upper, lower = (
            frame[np.ix_(row, left)] * (1 - across) + frame[np.ix_(row, right)] * across for row in (top, bottom)
        )
        pixels: np.ndarray = np.rint(upper * (1 - down) + lower * down)
        return pixels.astype(np.uint8)


def _taps(start: float, end: float, count: int, length: int) -> _Taps:
    """(first pixel, second pixel, weight of the second) for each of `count` pixels spread from start to end."""
    places = start + (np.arange(count) + 0.5) * (end - start) / count - 0.5
    first = np.floor(places)
    pixels = np.clip(np.stack([first, first + 1]), 0, length - 1).astype(int)
    return pixels[0], pixels[1], (places - first).astype(np.float32)


def _rectangle(height: int, width: int, size: tuple[int, int], y: int, x: int, crop_size: int) -> np.ndarray:
    scale_y, scale_x = height / size[0], width / size[1]
    return np.array([[y * scale_y, x * scale_x, (y + crop_size) * scale_y, (x + crop_size) * scale_x]])
