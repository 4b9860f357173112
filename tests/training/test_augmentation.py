"""RandAugment against torchvision, frame by frame and clip by clip; random erasing; draws."""

import math

import numpy as np
import pytest
import torch

from common.config import AugmentConfig
from training.augmentation import OPERATIONS, augment_clips

MEAN, STD = [0.45, 0.4, 0.35], [0.225, 0.25, 0.2]
GEOMETRIC = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
PLAIN = {"mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0]}


def clip_of(seed=0, frames=3, size=24):
    """[3, T, S, S] of 8-bit values, smooth enough to be interpolated, and in another range for each colour."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(3, frames, 6, 6, generator=generator) * torch.tensor([0.9, 0.6, 0.7])[:, None, None, None]
    smooth = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear") + 0.1
    return (smooth * 255).round() / 255


def tall(clip):
    """The frames below each other, [3, T*S, S]: an image with the statistics of the whole clip."""
    return clip.flatten(1, 2)


def reference(name, clip, value):
    """torchvision's result."""
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2 import functional as tv

    frames = clip.transpose(0, 1)  # [T, 3, S, S]
    plain = {"interpolation": InterpolationMode.BILINEAR, "fill": [0.5] * 3}
    still = {"angle": 0, "translate": [0, 0], "scale": 1.0, "shear": [0.0, 0.0]} | plain
    size = clip.shape[-1]
    whole = {
        "contrast": lambda: tv.adjust_contrast(tall(clip), value),
        "autocontrast": lambda: tv.autocontrast(tall(clip)),
        "equalize": lambda: tv.equalize((tall(clip) * 255).round().to(torch.uint8)) / 255,
    }
    each = {
        "identity": lambda: frames,
        "brightness": lambda: tv.adjust_brightness(frames, value),
        "colour": lambda: tv.adjust_saturation(frames, value),
        "sharpness": lambda: tv.adjust_sharpness(frames, value),
        "posterize": lambda: tv.posterize(frames, int(value)),
        "solarize": lambda: tv.solarize(frames, value),
        "rotate": lambda: tv.affine(frames, **still | {"angle": value}),
        "shear_x": lambda: tv.affine(frames, **still | {"shear": [-math.degrees(math.atan(value)), 0.0]}),
        "shear_y": lambda: tv.affine(frames, **still | {"shear": [0.0, -math.degrees(math.atan(value))]}),
        "translate_x": lambda: tv.affine(frames, **still | {"translate": [value * size, 0]}),
        "translate_y": lambda: tv.affine(frames, **still | {"translate": [0, value * size]}),
    }
    return whole[name]().view(clip.shape) if name in whole else each[name]().transpose(0, 1)


@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation_is_torchvisions(torchvision_loads, name):
    operation, clip = OPERATIONS[name], clip_of()
    for strength in (0.25, 0.9, -0.9) if operation.is_signed else (0.25, 1.0):
        value = operation.parameter(strength)
        if name.startswith("translate"):
            value = round(value * 24) / 24  # torchvision moves by whole pixels
        ours, theirs = operation.apply(clip, value), reference(name, clip, value)
        covered = reference(name, torch.ones_like(clip), value) if name in GEOMETRIC else torch.ones_like(clip)
        sure = (covered == 1) | (covered == 0.5)  # between them, torchvision blends with the fill twice
        assert sure.float().mean() > 0.8
        ours, theirs = ours[sure], theirs[sure]
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=0)
        assert ours.min() >= 0 and ours.max() <= 1
        assert name == "identity" or (operation.apply(clip, value) != clip).any()


def test_no_strength_changes_nothing():
    clip = clip_of()
    for name in set(OPERATIONS) - {"autocontrast", "equalize", "posterize", "solarize"}:
        operation = OPERATIONS[name]
        torch.testing.assert_close(operation.apply(clip, operation.parameter(0.0)), clip, atol=1e-5, rtol=0)
    torch.testing.assert_close(OPERATIONS["posterize"].apply(clip, 8), clip, atol=1 / 255, rtol=0)


def test_clips_without_contrast_are_left_alone():
    flat = torch.full((3, 2, 16, 16), 0.5)
    for name in ("autocontrast", "equalize", "contrast", "colour", "sharpness"):
        operation = OPERATIONS[name]
        torch.testing.assert_close(operation.apply(flat, operation.parameter(0.5)), flat)


def test_off_is_the_clips_themselves():
    clips = torch.rand(2, 3, 2, 8, 8)
    random = np.random.default_rng(0)
    before = random.bit_generator.state
    assert augment_clips(clips, AugmentConfig(), random, **PLAIN) is clips
    assert random.bit_generator.state == before


def test_draws_differ_by_clip_and_repeat_with_the_generator():
    clips = torch.stack([clip_of()] * 8)
    augment = AugmentConfig(randaugment_ops=2, erasing_prob=0.25)
    before = clips.clone()
    one, two, other = (augment_clips(clips, augment, np.random.default_rng(seed), **PLAIN) for seed in (1, 1, 2))
    assert (clips == before).all() and (one == two).all() and (one != other).any()
    assert len({each.sum().item() for each in one}) > 4


def test_all_frames_get_the_same():
    still = clip_of(frames=1).expand(-1, 4, -1, -1)
    augment = AugmentConfig(randaugment_ops=2, erasing_prob=0.5)
    augmented = augment_clips(torch.stack([still] * 16), augment, np.random.default_rng(0), **PLAIN)
    assert (augmented == augmented[:, :, :1]).all() and (augmented != still).any()


def test_normalisation_is_undone_and_done_again():
    pixels = torch.stack([clip_of(seed) for seed in range(8)])
    mean, std = (torch.tensor(each).view(3, 1, 1, 1) for each in (MEAN, STD))
    augment = AugmentConfig(randaugment_ops=2, randaugment_magnitude=5, erasing_prob=0.5)
    plain = augment_clips(pixels, augment, np.random.default_rng(3), **PLAIN)
    normalised = augment_clips((pixels - mean) / std, augment, np.random.default_rng(3), mean=MEAN, std=STD)
    differs = (normalised * std + mean - plain).abs() > 1e-4
    assert differs.float().mean() < 0.02  # rounding: values on a threshold


def test_random_erasing():
    clips = torch.zeros(400, 3, 2, 20, 20)
    erased = augment_clips(clips, AugmentConfig(erasing_prob=0.25), np.random.default_rng(0), **PLAIN) != 0
    share = erased.flatten(1).any(1).float().mean()
    assert 0.18 < share < 0.32
    for each in erased[erased.flatten(1).any(1)]:
        rows, columns = each.any(0)[0].any(1), each.any(0)[0].any(0)
        assert (each == rows[:, None] & columns[None]).all()  # a box, in all colours and frames
        assert 0.01 < each.float().mean() < 0.4
    boxes = erased[:, 0, 0].float().mean(0)
    assert (boxes > 0).float().mean() > 0.95  # anywhere
