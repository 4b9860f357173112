"""The demo data set: real files, repeatable bytes, and classes that mean what their names say.

python -m pytest tests/preparation/test_demo.py
"""

from collections import Counter
from pathlib import Path

import av
import numpy as np
import pytest

from commands import prepare
from dali_pipelines.manifest import Manifest
from preparation import demo

SEED = 5
TRAIN_VIDEOS, VAL_VIDEOS = 48, 16
CODECS = {".mp4": "h264", ".webm": "vp9", ".avi": "mpeg4"}


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[tuple[str, int]]]]:
    out = tmp_path_factory.mktemp("demo")
    return out, _render(out, workers=1)


def _render(out: Path, *, seed: int = SEED, workers: int = 1, train: int = TRAIN_VIDEOS, val: int = VAL_VIDEOS):
    return demo.render_demo(out, train_videos=train, val_videos=val, seed=seed, workers=workers)


def _bytes(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def _scene(*, split: str, index: int, label: int | None = None) -> demo._Scene:
    rng = demo._generator(seed=SEED, split=split, index=index)
    return demo._draw_scene(rng, label=index % 8 if label is None else label)


def _decode(path: Path) -> np.ndarray:
    """(frames, height, width, 3) uint8 RGB."""
    with av.open(path) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.mark.slow
def test_every_file_is_listed_and_holds_what_was_drawn(rendered):
    out, listed = rendered
    paths = [path for split in ("train", "val") for path, _ in listed[split]]
    assert sorted(_bytes(out)) == sorted(paths)
    for split in ("train", "val"):
        for index, (path, label) in enumerate(listed[split]):
            scene = _scene(split=split, index=index)
            assert path == f"videos/{split}/{index:05d}_{demo.CLASSES[label]}{scene.suffix}"
            with av.open(out / path) as container:
                stream = container.streams.video[0]
                assert stream.codec_context.name == CODECS[scene.suffix]
                assert (stream.width, stream.height) == (scene.width, scene.height)
                assert float(stream.average_rate) == pytest.approx(float(scene.rate), rel=0.02)
                assert sum(1 for _ in container.decode(stream)) == len(scene.path)


def test_labels_are_balanced_in_every_prefix(rendered):
    _, listed = rendered
    for split, count in (("train", TRAIN_VIDEOS), ("val", VAL_VIDEOS)):
        labels = [label for _, label in listed[split]]
        assert len(labels) == count
        for end in range(1, count + 1):
            counts = [labels[:end].count(label) for label in range(len(demo.CLASSES))]
            assert max(counts) - min(counts) <= 1


def test_every_codec_is_there_and_most_are_h264(rendered):
    _, listed = rendered
    suffixes = Counter(Path(path).suffix for path, _ in listed["train"])
    assert set(suffixes) == set(CODECS)
    assert suffixes[".mp4"] > TRAIN_VIDEOS / 2


@pytest.mark.slow
def test_sizes_lengths_and_rates_vary_within_their_ranges():
    scenes = [_scene(split="train", index=index) for index in range(2000)]
    frames = [len(scene.path) for scene in scenes]
    assert min(frames) >= 5
    assert max(frames) <= 300
    assert 40 < np.mean(frames) < 50
    sides = np.array([(scene.width, scene.height) for scene in scenes])
    assert sides.min() >= 70
    assert sides.max() <= 165
    assert np.mean(sides.max(axis=1) > 110) < 0.1
    landscape, portrait = np.mean(sides[:, 0] > sides[:, 1]), np.mean(sides[:, 0] < sides[:, 1])
    assert landscape > 0.3 and portrait > 0.3 and landscape + portrait < 0.95
    h264 = np.array([scene.suffix == ".mp4" for scene in scenes])
    assert not np.any(sides[h264] % 2)
    assert np.any(sides[~h264] % 2)
    assert len({scene.rate for scene in scenes}) == 9


@pytest.mark.slow
def test_h264_has_b_frames_and_one_keyframe(rendered):
    out, listed = rendered
    paths = [path for path, _ in listed["train"] if path.endswith(".mp4")]
    for path in paths:
        with av.open(out / path) as container:
            frames = list(container.decode(video=0))
        assert any(frame.pict_type == av.video.frame.PictureType.B for frame in frames)
        assert sum(frame.key_frame for frame in frames) == (1 if len(frames) <= 250 else 2)


@pytest.mark.slow
def test_files_show_the_drawn_frames(rendered):
    """Every codec: the encoder got the right colours, and no frame is lost, doubled or moved."""
    out, listed = rendered
    for index, (path, label) in enumerate(listed["train"][:24]):
        rng = demo._generator(seed=SEED, split="train", index=index)
        drawn = np.stack(list(demo._render_frames(rng, demo._draw_scene(rng, label=label))))
        difference = np.abs(drawn.astype(int) - _decode(out / path)).mean(axis=(1, 2, 3))
        assert difference.max() < 10, path


@pytest.mark.slow
def test_bytes_depend_on_the_seed_and_on_nothing_else(rendered, tmp_path):
    out, _ = rendered
    expected = _bytes(out)
    _render(tmp_path / "two", workers=2)
    assert _bytes(tmp_path / "two") == expected
    _render(tmp_path / "fewer", train=9, val=1)
    assert all(expected[path] == data for path, data in _bytes(tmp_path / "fewer").items())
    _render(tmp_path / "other", seed=SEED + 1, train=8, val=8)
    assert not set(_bytes(tmp_path / "other").values()) & set(expected.values())


@pytest.mark.slow
def test_some_of_the_motions(tmp_path, in_process):
    status, _, errors = in_process(
        prepare.main, "demo", "--out", tmp_path, "--motions", "away", "left",
        "--train-videos", 4, "--val-videos", 2, "--workers", 1,
    )  # fmt: skip
    assert status == 0, errors
    manifest = Manifest.read(tmp_path / "train.csv")
    assert manifest.classes == ("away", "left") and [video.label for video in manifest] == [0, 1, 0, 1]
    names = [Path(video.path).stem for video in manifest]
    assert names == ["00000_away", "00001_left", "00002_away", "00003_left"]
    rng = demo._generator(seed=0, split="train", index=1)
    drawn = np.stack(list(demo._render_frames(rng, demo._draw_scene(rng, label=demo.CLASSES.index("left")))))
    assert np.abs(drawn.astype(int) - _decode(tmp_path / manifest[1].path)).mean() < 10
    status, _, errors = in_process(prepare.main, "demo", "--out", tmp_path, "--motions", "sideways")
    assert status == 2 and "invalid choice: 'sideways'" in errors


def test_train_and_val_share_no_video(rendered):
    out, _ = rendered
    contents = _bytes(out)
    assert len(set(contents.values())) == len(contents)
    draws = [_scene(split=split, index=index, label=0).drift[0] for split in ("train", "val") for index in range(200)]
    assert len(set(draws)) == len(draws)


def test_progress_counts_every_video(tmp_path):
    calls = []
    demo.render_demo(
        tmp_path, train_videos=2, val_videos=1, seed=0, workers=1, progress=lambda *call: calls.append(call)
    )
    assert calls == [(1, 3), (2, 3), (3, 3)]


def test_a_failed_render_leaves_no_file_under_a_final_name(tmp_path, monkeypatch):
    def stop_after_two(rng, scene):
        for number, frame in enumerate(drawn(rng, scene)):
            if number == 2:
                raise KeyboardInterrupt
            yield frame

    drawn = demo._render_frames
    monkeypatch.setattr(demo, "_render_frames", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        _render(tmp_path)
    assert all(name.endswith(".part") for name in _bytes(tmp_path))


def _motion(covers: np.ndarray) -> dict[str, float]:
    """(frames, height, width) of 0..1 -> what a viewer sees the shape do from the first frame to the last."""
    rows, columns = np.mgrid[: covers.shape[1], : covers.shape[2]]
    area = covers.sum(axis=(1, 2))
    x = (covers * columns).sum(axis=(1, 2)) / area
    y = (covers * rows).sum(axis=(1, 2)) / area
    # Twice the area between the path and its chord: y points down, so it is positive for a clockwise bend.
    bend = np.sum((x[:-1] - x[0]) * (y[1:] - y[0]) - (x[1:] - x[0]) * (y[:-1] - y[0]))
    return {"x": x[-1] - x[0], "y": y[-1] - y[0], "growth": np.log(area[-1] / area[0]), "bend": bend}


@pytest.mark.parametrize(
    ("name", "quantity", "sign"),
    [
        ("left", "x", -1),
        ("right", "x", 1),
        ("up", "y", -1),
        ("down", "y", 1),
        ("towards", "growth", 1),
        ("away", "growth", -1),
        ("clockwise", "bend", 1),
        ("anticlockwise", "bend", -1),
    ],
)
def test_the_shape_moves_as_its_class_says(name, quantity, sign):
    thresholds = {"x": 20, "y": 20, "growth": 1, "bend": 400}
    for index in range(20):
        scene = _scene(split="train", index=index, label=demo.CLASSES.index(name))
        eight = np.linspace(0, len(scene.path) - 1, 8).astype(int)
        motion = _motion(np.stack([demo._shape(scene, frame)[0] for frame in eight]))
        assert sign * motion[quantity] > thresholds[quantity], (index, motion)


@pytest.mark.parametrize("label", range(0, 8, 2))
def test_a_class_is_its_opposite_backwards(label):
    forwards = _scene(split="train", index=3, label=label)
    backwards = _scene(split="train", index=3, label=label + 1)
    assert np.array_equal(forwards.path, backwards.path[::-1])


def test_only_the_path_depends_on_the_class():
    for index in range(20):
        scenes = [vars(_scene(split="val", index=index, label=label)) for label in range(8)]
        for scene in scenes:
            assert len(scene.pop("path")) == len(_scene(split="val", index=index).path)
            scene.pop("label")
            for key, value in scene.items():
                assert np.array_equal(value, scenes[0][key]), key
