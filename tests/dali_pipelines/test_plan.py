"""Samples are pure functions of (seed, epoch, sample id), and ranks share an epoch without overlap."""

import numpy as np
import pytest

from dali_pipelines.manifest import Video
from dali_pipelines.plan import PADDING, EntrySampler, View, plan_sample

VIDEO = Video("a.mp4", 0, 300, 30.0, 340, 256, "h264", 0)
TRAIN = View(
    mode="train",
    num_frames=8,
    crop_size=224,
    stride=16,
    target_fps=30,
    past_end="fit",
    short_side=(256, 320),
    flip=True,
)


def plan(seed=0, epoch=0, sample_id=0, view=TRAIN, video=VIDEO):
    made = plan_sample(video, view, seed=seed, epoch=epoch, sample_id=sample_id)
    return made.positions.tolist(), made.rectangles.tolist(), made.transpose


def order(rows, training=True, seed=0, step=4, rank=0, world=1):
    return EntrySampler(rows=rows, training=training, seed=seed, step_entries=step, rank=rank, world_size=world)


def test_equal_keys_give_equal_samples_and_others_differ():
    assert plan(1, 2, 3) == plan(1, 2, 3)
    different = [plan(1, 2, 3), plan(0, 2, 3), plan(1, 0, 3), plan(1, 2, 0), plan(2, 1, 3), plan(3, 2, 1)]
    for index, made in enumerate(different):
        assert made not in different[:index]


def test_windows_scales_offsets_and_flips_vary_as_they_should():
    plans = [plan_sample(VIDEO, TRAIN, seed=0, epoch=0, sample_id=n) for n in range(2000)]
    starts = np.array([made.positions[0] for made in plans])
    assert starts.min() < 5 and starts.max() == 300 - 128  # window of 16 * 8 / 30 s at 30 fps: 128 frames
    boxes = np.concatenate([made.rectangles for made in plans])
    flipped = boxes[:, 1] > boxes[:, 3]
    assert 0.45 < flipped.mean() < 0.55
    sides = 224 * 256 / (boxes[:, 2] - boxes[:, 0])  # the short side that each was resized to
    assert np.isclose(sides, sides.round(), atol=1e-6).all() and sides.min() < 257 and sides.max() > 319
    left, right = np.minimum(boxes[:, 1], boxes[:, 3]), np.maximum(boxes[:, 1], boxes[:, 3])
    # The resized long side is rounded down, so its pixels are not exactly as wide as they are high.
    assert left.min() >= 0 and right.max() <= 340 + 1e-9 and left.max() > 120 and boxes[:, 0].max() > 60


def test_evaluation_is_the_same_in_every_epoch_and_for_every_seed():
    for mode, views in (("validate", 1), ("test", 3)):
        view = View(**{**TRAIN.__dict__, "mode": mode, "short_side": 256})
        assert view.clips_per_entry == views == len(plan(view=view)[1])
        assert plan(1, 2, 3, view) == plan(4, 5, 6, view) and plan(view=view)[0][0] == 0


def test_a_rotated_video_is_planned_as_it_is_shown():
    view = View(**{**TRAIN.__dict__, "mode": "validate", "short_side": 256})
    _, boxes, transpose = plan(view=view, video=VIDEO._replace(width=256, height=340, rotation=90))
    assert transpose
    assert np.ptp(np.array(boxes)[:, [0, 2]]) == pytest.approx(224)  # the coded frame is 256 high, scale 1
    assert np.array(boxes)[:, [1, 3]].max() <= 340


def epoch_entries(rows, epoch=0, **settings):
    """The entries of an epoch over all ranks in the order of steps."""
    world = settings.get("world", 1)
    ranks = [order(rows, rank=rank, **settings) for rank in range(world)]
    count = ranks[0].rank_entries
    places = range(epoch * count, (epoch + 1) * count)
    samples = [[each.sample(place) for place in places] for each in ranks]
    assert all(found == epoch for row in samples for found, _ in row)
    return [sample_id for column in zip(*samples, strict=True) for _, sample_id in column]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_global_order_does_not_depend_on_the_number_of_ranks(world):
    for epoch in (0, 3):
        assert epoch_entries(23, epoch, world=world, step=8) == epoch_entries(23, epoch, world=1, step=8)


def test_training_shuffles_every_epoch_anew_and_drops_the_tail():
    first, second = epoch_entries(23), epoch_entries(23, 1)
    assert len(first) == len(set(first)) == 20 and first != second and set(first) <= set(range(23))
    assert epoch_entries(23, seed=1) != first
    dropped = {tuple(sorted(set(range(23)) - set(epoch_entries(23, epoch)))) for epoch in range(5)}
    assert len(dropped) > 1  # not always the same three


@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_visits_every_row_once_in_order_and_pads_the_end(world):
    entries = epoch_entries(23, training=False, step=6, world=world)
    assert entries == [*range(23), PADDING]
