"""Rectangles against resize-then-crop done step by step in torch."""

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from dali_pipelines import crops


def sample(frame: torch.Tensor, rectangle: np.ndarray, size: int) -> torch.Tensor:
    """What a resize from the rectangle must give: bilinear at half-pixel centres, clamped at the border. [C, s, s]"""
    height, width = frame.shape[1:]
    y0, x0, y1, x1 = rectangle
    centres = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    y, x = y0 + centres * (y1 - y0) - 0.5, x0 + centres * (x1 - x0) - 0.5
    y_low, x_low = y.floor(), x.floor()
    rows = [(y_low + k).clamp(0, height - 1).long() for k in (0, 1)]
    columns = [(x_low + k).clamp(0, width - 1).long() for k in (0, 1)]
    wy, wx = (y - y_low)[:, None], (x - x_low)[None, :]
    top, bottom = (frame[:, row][:, :, columns[0]] * (1 - wx) + frame[:, row][:, :, columns[1]] * wx for row in rows)
    return top * (1 - wy) + bottom * wy


def resize_then_crop(frame: torch.Tensor, size: tuple[int, int], y: int, x: int, crop: int) -> torch.Tensor:
    resized = interpolate(frame[None], size=size, mode="bilinear", align_corners=False, antialias=False)[0]
    return resized[:, y : y + crop, x : x + crop]


@pytest.fixture
def frame() -> torch.Tensor:
    return torch.rand(3, 61, 90, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_resized_size_keeps_the_short_side_and_rounds_the_long_one_down():
    assert crops.resized_size(256, 340, 224) == (224, 297)
    assert crops.resized_size(340, 256, 224) == (297, 224)
    assert crops.resized_size(64, 64, 32) == (32, 32)
    assert crops.resized_size(3, 5, 224) == (224, 373)


@pytest.mark.parametrize("draws", [(0, 0, 0, 0.9), (0.5, 0.3, 0.8, 0.9), (0.999, 0.999, 0.999, 0.9)])
def test_random_crop_is_resize_then_crop(frame, draws):
    height, width = frame.shape[1:]
    box = crops.random_crop(
        height=height, width=width, crop_size=32, short_sides=(36.6, 45.7), flip=True, draws=np.array(draws)
    )
    short = round(36.6 + draws[0] * 9.1)
    size = crops.resized_size(height, width, short)
    y, x = int(draws[1] * (size[0] - 32 + 1)), int(draws[2] * (size[1] - 32 + 1))
    assert torch.allclose(sample(frame, box[0], 32), resize_then_crop(frame, size, y, x, 32), atol=1e-9)


def test_a_flip_is_the_mirror_image(frame):
    arguments = dict(height=61, width=90, crop_size=32, short_sides=(40, 40), flip=True)
    plain = crops.random_crop(**arguments, draws=np.array([0, 0.4, 0.2, 0.5]))
    mirrored = crops.random_crop(**arguments, draws=np.array([0, 0.4, 0.2, 0.49]))
    assert torch.allclose(sample(frame, mirrored[0], 32), sample(frame, plain[0], 32).flip(2), atol=1e-9)
    never = crops.random_crop(**(arguments | {"flip": False}), draws=np.array([0, 0.4, 0.2, 0.49]))
    assert (never == plain).all()


def test_random_crops_reach_every_offset_and_no_further():
    seen = {
        tuple(
            crops.random_crop(
                height=8, width=10, crop_size=7, short_sides=(8, 8), flip=False, draws=np.array([0, y, x, 0.9])
            )[0]
        )
        for y in np.linspace(0, 0.9999, 20)
        for x in np.linspace(0, 0.9999, 20)
    }
    assert seen == {(y, x, y + 7, x + 7) for y in (0, 1) for x in (0, 1, 2, 3)}


def test_centre_crop_is_resize_then_crop(frame):
    box = crops.centre_crop(height=61, width=90, crop_size=32, short_side=37)
    size = crops.resized_size(61, 90, 37)
    y, x = (round((side - 32) / 2) for side in size)
    assert torch.allclose(sample(frame, box[0], 32), resize_then_crop(frame, size, y, x, 32), atol=1e-9)


@pytest.mark.parametrize("turn", [False, True])
def test_uniform_crops_are_at_the_start_middle_and_end_of_the_long_side(frame, turn):
    frame = frame.transpose(1, 2) if turn else frame
    height, width = frame.shape[1:]
    boxes = crops.uniform_crops(height=height, width=width, crop_size=32, short_side=32)
    size = crops.resized_size(height, width, 32)
    step = (max(size) - 32) // 2
    for box, offset in zip(boxes, (0, step, 2 * step), strict=True):
        y, x = (offset, 0) if turn else (0, offset)
        assert torch.allclose(sample(frame, box, 32), resize_then_crop(frame, size, y, x, 32), atol=1e-9)


@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("flip", [False, True])
def test_to_coded_crops_the_same_pixels_as_in_the_shown_frame(frame, rotation, mirrored, flip):
    shown = torch.rot90(frame.flip(2) if mirrored else frame, rotation // 90, dims=(1, 2))
    height, width = shown.shape[1:]
    box = crops.random_crop(
        height=height,
        width=width,
        crop_size=32,
        short_sides=(37, 45),
        flip=flip,
        draws=np.array([0.3, 0.7, 0.2, 0.1]),
    )
    coded, transpose = crops.to_coded(box, rotation=rotation, mirrored=mirrored, height=61, width=90)
    got = sample(frame, coded[0], 32)
    got = got.transpose(1, 2) if transpose else got
    assert torch.allclose(got, sample(shown, box[0], 32), atol=1e-9)
