"""RandAugment and random erasing of clips, on their device.

RandAugment (Cubuk et al. 2020) applies random operations of one strength; for video as in UniFormer and VideoMAE: the
same operations with the same parameters in all frames of a clip. What an operation measures (the mean brightness, the
range and the histogram of a colour) it measures over the whole clip, so that nothing flickers. The operations and their
ranges are those of torchvision's `RandAugment`, with magnitudes 0 to 10 instead of bins 0 to 30. None of them mirrors
or reverses a clip, and rotation ends at 30 degrees: left stays left, up stays up.

Random erasing (Zhong et al. 2020) fills a box of a clip with noise, the same in all frames.

Operations take clips [3, T, S, S] with values 0 to 1 and a parameter, and return the same.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from common.config import AugmentConfig

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
_FILL = 0.5  # grey, for what a shift or rotation uncovers
_ERASED_AREA = (0.02, 1 / 3)  # share of a frame: Zhong et al., table 3 (and timm's defaults)
_LOG_ASPECT = math.log(1 / 0.3)  # boxes are at most this far from square
_ATTEMPTS = 10  # to find a box that fits; timm gives up after as many


def augment_clips(
    clips: Tensor, augment: AugmentConfig, random: np.random.Generator, *, mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    """Augment clips [B, 3, T, S, S], each on its own, into new memory; `clips` itself if all is switched off.

    Clips are normalised as (value - mean) / std, value 0 to 1, and so is the result.
    """
    if not augment.randaugment_ops and not augment.erasing_prob:
        return clips
    shift, scale = (torch.tensor(each).view(3, 1, 1, 1).to(clips, non_blocking=True) for each in (mean, std))
    augmented = torch.empty_like(clips)
    for source, target in zip(clips, augmented, strict=True):
        clip = (source * scale + shift).clamp(0, 1)
        for _ in range(augment.randaugment_ops):
            clip = _randaugment(clip, augment.randaugment_magnitude / 10, random)
        if random.random() < augment.erasing_prob:
            clip = _erase(clip, random)
        torch.div(clip - shift, scale, out=target)
    return augmented


class Operation(NamedTuple):
    """An operation of RandAugment, and its parameter."""

    apply: Callable[[Tensor, float], Tensor]
    """(clip, parameter) -> clip"""
    parameter: Callable[[float], float]
    """The parameter for a strength of 0 to 1, or -1 to 1 if `is_signed`."""
    is_signed: bool = False


def _randaugment(clip: Tensor, strength: float, random: np.random.Generator) -> Tensor:
    """Apply one random operation."""
    operation = OPERATIONS[list(OPERATIONS)[random.integers(len(OPERATIONS))]]
    sign = -1 if random.random() < 0.5 and operation.is_signed else 1
    return operation.apply(clip, operation.parameter(sign * strength))


def identity(clip: Tensor, _: float) -> Tensor:
    """The clip itself."""
    return clip


def brightness(clip: Tensor, factor: float) -> Tensor:
    """0 is black, 1 the clip itself."""
    return (clip * factor).clamp(0, 1)


def contrast(clip: Tensor, factor: float) -> Tensor:
    """0 is the clip's mean grey, 1 the clip itself."""
    return _blend(_grey(clip).mean(), clip, factor)


def colour(clip: Tensor, factor: float) -> Tensor:
    """0 is without colour, 1 the clip itself."""
    return _blend(_grey(clip), clip, factor)


def sharpness(clip: Tensor, factor: float) -> Tensor:
    """0 is blurred by PIL's SMOOTH filter, except at the borders, 1 the clip itself."""
    smooth = clip.clone()
    rows = clip[..., :-2, :] + clip[..., 1:-1, :] + clip[..., 2:, :]  # on a CPU, avg_pool2d takes 18 times as long
    smooth[..., 1:-1, 1:-1] = (rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * clip[..., 1:-1, 1:-1]) / 13
    return _blend(smooth, clip, factor)


def posterize(clip: Tensor, bits: float) -> Tensor:
    """Round each value down to `bits` bits, a whole number."""
    levels = 2**bits
    return (clip * levels).floor().clamp(max=levels - 1) / levels


def solarize(clip: Tensor, threshold: float) -> Tensor:
    """Invert the values from `threshold` on."""
    return torch.where(clip >= threshold, 1 - clip, clip)


def autocontrast(clip: Tensor, _: float) -> Tensor:
    """Stretch each colour to the range 0 to 1."""
    low, high = clip.amin((1, 2, 3), keepdim=True), clip.amax((1, 2, 3), keepdim=True)
    return torch.where(high > low, (clip - low) / (high - low), clip)


def equalize(clip: Tensor, _: float) -> Tensor:
    """Make the histogram of each colour, in 256 steps, as even as PIL's equalize does."""
    values = (clip * 255).round().long().flatten(1)  # [3, pixels]
    offsets = 256 * torch.arange(3, device=clip.device)[:, None]
    # Not torch.bincount, which waits for a GPU.
    counts = values.new_zeros(3 * 256).scatter_add_(0, (values + offsets).flatten(), torch.ones_like(values).flatten())
    counts = counts.view(3, 256)
    step = (values.shape[1] - counts.gather(1, values.amax(1, keepdim=True))) // 255
    below = counts.cumsum(1) - counts
    table = ((below + step // 2) // step.clamp(min=1)).clamp(max=255)
    equalized = table.gather(1, values).view(clip.shape).to(clip.dtype) / 255
    return torch.where(step.view(3, 1, 1, 1) > 0, equalized, clip)


def rotate(clip: Tensor, degrees: float) -> Tensor:
    """Rotate clockwise about the centre."""
    angle = math.radians(degrees)
    return _warp(clip, [[math.cos(angle), math.sin(angle), 0.0], [-math.sin(angle), math.cos(angle), 0.0]])


def shear_x(clip: Tensor, factor: float) -> Tensor:
    """Shift each row to the right by `factor` times its distance below the centre."""
    return _warp(clip, [[1.0, -factor, 0.0], [0.0, 1.0, 0.0]])


def shear_y(clip: Tensor, factor: float) -> Tensor:
    """Shift each column down by `factor` times its distance right of the centre."""
    return _warp(clip, [[1.0, 0.0, 0.0], [-factor, 1.0, 0.0]])


def translate_x(clip: Tensor, share: float) -> Tensor:
    """Shift to the right by this share of the width."""
    return _warp(clip, [[1.0, 0.0, -2 * share], [0.0, 1.0, 0.0]])


def translate_y(clip: Tensor, share: float) -> Tensor:
    """Shift down by this share of the height."""
    return _warp(clip, [[1.0, 0.0, 0.0], [0.0, 1.0, -2 * share]])


def _factor(strength: float) -> float:
    return 1 + 0.9 * strength


def _shift(strength: float) -> float:
    return 150 / 331 * strength  # 150 pixels of 331


def _slope(strength: float) -> float:
    return 0.3 * strength


OPERATIONS = {
    "identity": Operation(identity, float),
    "brightness": Operation(brightness, _factor, is_signed=True),
    "contrast": Operation(contrast, _factor, is_signed=True),
    "colour": Operation(colour, _factor, is_signed=True),
    "sharpness": Operation(sharpness, _factor, is_signed=True),
    "posterize": Operation(posterize, lambda strength: 8 - round(4 * strength)),
    "solarize": Operation(solarize, lambda strength: 1 - strength),
    "autocontrast": Operation(autocontrast, float),
    "equalize": Operation(equalize, float),
    "rotate": Operation(rotate, lambda strength: 30 * strength, is_signed=True),
    "shear_x": Operation(shear_x, _slope, is_signed=True),
    "shear_y": Operation(shear_y, _slope, is_signed=True),
    "translate_x": Operation(translate_x, _shift, is_signed=True),
    "translate_y": Operation(translate_y, _shift, is_signed=True),
}
"""The 14 operations of RandAugment (section 3 of the paper), by name."""


def _blend(degenerate: Tensor, clip: Tensor, factor: float) -> Tensor:
    """`degenerate` at 0, `clip` at 1, and beyond it above 1."""
    return torch.lerp(degenerate.expand_as(clip), clip, factor).clamp(0, 1)


def _grey(clip: Tensor) -> Tensor:
    red, green, blue = clip
    return (_LUMA[0] * red + _LUMA[1] * green + _LUMA[2] * blue)[None]


def _warp(clip: Tensor, inverse: list[list[float]]) -> Tensor:
    """Each pixel moves by an affine map of the frame, whose axes span -1 to 1. inverse: 2 x 3, from the result's
    coordinates to the clip's."""
    frames = clip.flatten(0, 1)[None] - _FILL
    grid = affine_grid(torch.tensor([inverse]).to(clip, non_blocking=True), list(frames.shape), align_corners=False)
    return (grid_sample(frames, grid, align_corners=False) + _FILL).view(clip.shape)


def _erase(clip: Tensor, random: np.random.Generator) -> Tensor:
    """Fill a random box of rows and columns with noise, 0 to 1, the same in all frames."""
    height, width = clip.shape[2:]
    for _ in range(_ATTEMPTS):
        area = random.uniform(*_ERASED_AREA) * height * width
        aspect = math.exp(random.uniform(-_LOG_ASPECT, _LOG_ASPECT))
        rows, columns = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if rows < height and columns < width:
            break
    else:
        return clip
    top, left = random.integers(height - rows + 1), random.integers(width - columns + 1)
    noise = torch.from_numpy(random.random((3, 1, rows, columns), dtype=np.float32))
    erased = clip.clone()
    erased[:, :, top : top + rows, left : left + columns] = noise.to(clip, non_blocking=True)
    return erased
