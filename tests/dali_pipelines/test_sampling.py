"""Frame positions against tables written by hand and against PaddleVideo's own."""

import numpy as np
import pytest

from dali_pipelines.sampling import frame_positions

PADDLEVIDEO = {  # ../shared/golden/three_crop.npz, `FILE/T/idx`: (frames, fps, T) -> positions
    (280, 28, 8): [0, 33, 67, 101, 135, 169, 203, 237],
    (280, 28, 16): [0, 31, 63, 95, 127, 158, 190, 222, 254, *[279] * 7],
    (300, 30, 8): [0, 36, 72, 109, 145, 182, 218, 255],
    (300, 30, 16): [0, 34, 68, 102, 136, 170, 204, 238, 272, *[299] * 7],
    (117, 25, 8): [0, 30, 60, 91, 116, 116, 116, 116],
    (131, 25, 16): [0, 28, 56, 85, 113, *[130] * 11],
}


def positions(frames, fps=30.0, num_frames=8, stride=32, target_fps=30, past_end="hold", start=0.0):
    return frame_positions(
        frames=frames,
        fps=fps,
        num_frames=num_frames,
        stride=stride,
        target_fps=target_fps,
        past_end=past_end,
        start=start,
    ).tolist()


@pytest.mark.parametrize("video", PADDLEVIDEO)
def test_hold_gives_paddlevideos_positions(video):
    frames, fps, num_frames = video
    assert positions(frames, fps, num_frames) == PADDLEVIDEO[video]


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (dict(frames=9, num_frames=5, stride=None), [0, 2, 4, 6, 8]),
        (dict(frames=10, num_frames=4, stride=None), [0, 3, 6, 9]),
        (dict(frames=6, num_frames=4, stride=None), [0, 1, 3, 5]),  # 1.67 and 3.33 are cut, not rounded
        (dict(frames=1, num_frames=4, stride=None), [0, 0, 0, 0]),
        (dict(frames=3, num_frames=5, stride=None), [0, 0, 1, 1, 2]),
        (dict(frames=3, num_frames=4, stride=1.5, past_end="hold"), [0, 1, 2, 2]),  # window 6: 0 1.67 3.33 5
        (dict(frames=3, num_frames=4, stride=1.5, past_end="fit"), [0, 0, 1, 2]),
        (dict(frames=20, num_frames=4, stride=2), [0, 2, 4, 7]),  # window 8: 0 2.33 4.67 7
        (dict(frames=20, num_frames=4, stride=2, start=0.99), [12, 14, 16, 19]),  # the last place it fits
        (dict(frames=20, num_frames=4, stride=2, start=0.01), [1, 3, 5, 8]),  # rounded up, as PaddleVideo does
        (dict(frames=20, num_frames=4, stride=2, fps=15), [0, 1, 2, 3]),  # half the rate, half the frames
        (dict(frames=20, num_frames=1, stride=4), [0]),
    ],
)
def test_by_hand(arguments, expected):
    assert positions(**arguments) == expected


def test_always_inside_ascending_and_whole():
    rng = np.random.default_rng(0)
    for _ in range(2000):
        frames, num_frames = int(rng.integers(1, 700)), int(rng.integers(1, 40))
        stride = None if rng.random() < 0.3 else float(rng.uniform(0.1, 64))
        past_end = ("fit", "hold")[int(rng.integers(2))]
        got = positions(frames, rng.uniform(5, 60), num_frames, stride, 30, past_end, rng.random())
        assert len(got) == num_frames and got == sorted(got) and got[0] >= 0 and got[-1] < frames
        if stride is None and num_frames > 1:
            assert got[0] == 0 and got[-1] == frames - 1


def test_fit_ends_on_the_last_frame_where_hold_repeats_it():
    fit = positions(100, 25.0, past_end="fit")
    hold = positions(100, 25.0, past_end="hold")
    assert fit[0] == hold[0] == 0 and fit[-1] == hold[-1] == 99
    assert len(set(fit)) == 8 and len(set(hold)) < 8
