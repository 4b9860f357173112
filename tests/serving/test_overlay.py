"""predict.py --overlay: the same video with a label and a timeline."""

import av
import numpy as np
import pytest
import torch

from dali_pipelines import InputError
from dali_pipelines.probe import probe
from serving.overlay import _text_mask, write_overlay
from serving.prediction import Prediction
from tests.videos import textured, write_video

CLASSES = ("ash", "birch", "a class with a name that is far too long for a narrow video")


def prediction_of(windows, seconds):
    """Window k is of class k."""
    probabilities = torch.eye(3)[torch.arange(windows)] * 0.9 + 0.03
    starts = np.linspace(0, seconds, windows, endpoint=False)
    return Prediction(
        video="v",
        probabilities=probabilities.mean(0),
        views=torch.zeros(0),
        seconds=np.stack([starts, starts + seconds / windows], 1),
        window_probabilities=probabilities,
    )


def shown(path):
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    return np.stack([frame.to_ndarray(format="rgb24") for frame in frames]), [float(frame.time) for frame in frames]


@pytest.mark.slow
@pytest.mark.parametrize("rotation, encoder", [(0, "libx264"), (90, "libx264"), (0, "mpeg4")])
def test_only_the_strips_differ(tmp_path, monkeypatch, rotation, encoder):
    monkeypatch.setattr("serving.overlay._has_encoder", lambda _: encoder == "libx264")
    smooth = [np.repeat(np.repeat(frame[::16, ::16], 16, 0), 16, 1) for frame in textured(24, height=96, width=160)]
    source = write_video(tmp_path / "v.mp4", smooth, rotation=rotation)
    row = probe(source)
    count = write_overlay(tmp_path / "out.mp4", str(source), prediction_of(3, row.frames / row.fps), CLASSES)
    made, times = shown(tmp_path / "out.mp4")
    before, expected_times = shown(source)
    before = np.rot90(before, rotation // 90, axes=(1, 2))
    assert count == len(made) == 24 and made.shape == before.shape == (24, row.height, row.width, 3)
    np.testing.assert_allclose(np.diff(times), np.diff(expected_times), atol=1e-3)
    again = probe(tmp_path / "out.mp4")
    assert (again.rotation, again.fps, again.width, again.height) == (0, row.fps, row.width, row.height)
    difference = np.abs(made.astype(int) - before)
    assert difference[:, 20:-12].mean() < 6 and np.median(difference[:, 20:-12]) <= 4
    assert difference[:, :12].mean() > 40 and difference[:, -3:].mean() > 20
    # Each third of the video has the colour of its window beside the label.
    blue, orange, green = (made[n, 2:10, 1].astype(int).mean(0) for n in (3, 12, 21))
    assert blue.argmax() == 2 and orange.argmax() == 0 and green.argmax() == 1
    # The marker moves from the left to the right.
    bright = made[:, -2].astype(int).min(2)
    assert bright[0].argmax() < 8 and abs(int(bright[12].argmax()) - row.width // 2) < 8


def test_one_window_has_no_timeline_and_odd_sizes_stay(tmp_path):
    source = write_video(tmp_path / "v.webm", textured(4, height=61, width=95), codec="vp9")
    write_overlay(tmp_path / "out.mkv", str(source), prediction_of(1, 1.0), CLASSES)
    made, _ = shown(tmp_path / "out.mkv")
    before, _ = shown(source)
    assert made.shape == before.shape == (4, 61, 95, 3)
    assert np.abs(made[:, -3:].astype(int) - before[:, -3:]).mean() < 12
    assert {each.name for each in tmp_path.iterdir()} == {"v.webm", "out.mkv"}
    with pytest.raises(InputError, match="--overlay .*none/out.mp4: cannot be written: No such file"):
        write_overlay(tmp_path / "none" / "out.mp4", str(source), prediction_of(1, 1.0), CLASSES)


def test_a_failure_keeps_the_older_file(tmp_path, monkeypatch):
    source, out = write_video(tmp_path / "v.mp4", textured(4, height=48, width=64)), tmp_path / "out.mp4"
    out.write_text("older")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("serving.overlay._Strips.draw", full)
    with pytest.raises(InputError, match="out.mp4: cannot be written: No space left"):
        write_overlay(out, str(source), prediction_of(1, 1.0), CLASSES)
    assert out.read_text() == "older" and {each.name for each in tmp_path.iterdir()} == {"v.mp4", "out.mp4"}


def test_long_names_end_in_an_ellipsis():
    """Its dots are on the baseline; without it, the last column would have the upper end of an H."""
    from matplotlib import get_data_path
    from PIL import ImageFont

    font = ImageFont.truetype(f"{get_data_path()}/fonts/ttf/DejaVuSans.ttf", 12)
    for text, is_cut in (("H" * 200, True), ("HH", False)):
        mask = _text_mask(text, font, 20, 100)
        last_column = mask[:, np.flatnonzero(mask.any(0))[-1]]
        assert (np.flatnonzero(last_column)[0] > 10) == is_cut
