"""Splitting a global batch: what is possible, and that what an error proposes is possible."""

import itertools
import re

import pytest

from common.config import Config
from dali_pipelines import InputError, Manifest
from dali_pipelines.manifest import Video
from training.data import balanced, split_global_batch


def shared(total, world_size, batch_size=None, views=1, clips=1000):
    config = Config()
    config.optim.global_batch_size, config.data.batch_size, config.data.views_per_decode = total, batch_size, views
    return split_global_batch(config, world_size, clips)


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ((64, 8), (8, 1)),
        ((64, 8, 4), (4, 2)),
        ((64, 1, 1), (1, 64)),
        ((12, 3, 2, 2), (2, 2)),
        ((13, 1, None, 1, 13), (13, 1)),
    ],
)
def test_by_hand(arguments, expected):
    assert shared(*arguments) == expected


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((5, 2), "is 5, which 2 processes cannot share evenly, a whole number each; the nearest that work: 4, 6"),
        ((4, 1, 3), "cannot share evenly, batches of 3 each; the nearest that work: 3, 6; or data.batch_size 2, 4"),
        (
            (14, 1, None, 1, 13),
            r"is 14, but an epoch has 13 clips, fewer than one step takes; try -o optim.global_batch_size=2 \(6 "
            r"steps an epoch\); the nearest .*: 13",
        ),
        ((14, 13, None, 1, 13), r"try -o optim.global_batch_size=13 \(1 step an epoch\)"),
        ((8, 1, 3, 2), "data.batch_size is 3; expected a multiple of data.views_per_decode, 2: 2, 4"),
        (
            (4, 8, None, 1, 4),
            "is 4, which 8 processes cannot share evenly, a whole number each$",
        ),  # nothing is possible
    ],
)
def test_errors_by_hand(arguments, message):
    with pytest.raises(InputError, match=message):
        shared(*arguments)


def test_what_an_error_proposes_is_possible():
    """All combinations of small numbers: each proposed global batch and batch size works, and some work as they are."""
    good = bad = proposals = 0
    sizes = itertools.product(range(1, 20), (1, 2, 3, 4), (None, 1, 2, 3, 4), (1, 2), (13, 26))
    for total, world_size, batch_size, views, clips in sizes:
        try:
            batch, micro_steps = shared(total, world_size, batch_size, views, clips)
            assert batch * micro_steps * world_size == total <= clips and batch % views == 0
            good += 1
            continue
        except InputError as error:
            bad += 1
            message = str(error)
        totals = re.search(r"nearest that work: ([\d, ]+)", message)
        for proposed in map(int, totals[1].split(",")) if totals else ():
            shared(proposed, world_size, batch_size, views, clips)
            proposals += 1
        for proposed, steps in re.findall(r"try -o optim.global_batch_size=(\d+) \((\d+) step", message):
            shared(int(proposed), world_size, batch_size, views, clips)
            assert clips // int(proposed) == int(steps)
        batches = re.search(r"or data.batch_size ([\d, ]+)", message)
        for proposed in map(int, batches[1].split(",")) if batches else ():
            shared(total, world_size, proposed, views, clips)
            proposals += 1
    assert good > 200 and bad > 200 and proposals > 200


def test_rarer_classes_are_repeated_until_all_are_as_frequent(tmp_path):
    """50, 5, 3, 0 and 40 videos: whole repetitions only, and nothing is left out."""
    labels = [0] * 50 + [1] * 5 + [2] * 3 + [4] * 40
    videos = [Video(f"{n}.mp4", label, 30, 25.0, 64, 48, "h264", 0) for n, label in enumerate(labels)]
    manifest = Manifest(videos, root=tmp_path, classes="abcde")
    manifest.index = tmp_path / "list.packets"
    result = balanced(manifest)
    assert [result.labels.tolist().count(label) for label in range(5)] == [50, 50, 51, 0, 40]
    assert set(result) == set(videos) and [video.path for video in result][50:61] == ["50.mp4"] * 10 + ["51.mp4"]
    assert (result.root, result.classes, result.index) == (manifest.root, manifest.classes, manifest.index)
    assert list(balanced(Manifest(videos[48:53]))) == [videos[48], videos[48], videos[49], videos[49], *videos[50:53]]
