"""Datasets that `datasets` itself wrote, and files of other writers."""

import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest

from commands import prepare
from dali_pipelines import ClipLoader, InputError, Manifest
from preparation.huggingface import read_dataset

NAMES = ["ash", "birch", "cedar"]


@pytest.fixture(scope="module")
def videos(small_data) -> list[Path]:
    return [path for number in range(6) for path in small_data.glob(f"train_{number}.*")]


@pytest.fixture(scope="module")
def datasets():
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.TORCHCODEC_AVAILABLE", False)  # it needs FFmpeg's libraries, even to write
        datasets.disable_progress_bars()
        yield datasets


@pytest.fixture(scope="module")
def made(datasets, videos, tmp_path_factory) -> Path:
    """A dataset in the layout of `push_to_hub`, with one video twice, and the same as `save_to_disk` writes it."""
    features = datasets.Features(
        {"video": datasets.Video(), "note": datasets.Value("string"), "label": datasets.ClassLabel(names=NAMES)}
    )
    folder = tmp_path_factory.mktemp("dataset")
    splits = {}
    for split, paths in (("train", [*videos[:4], videos[0]]), ("validation", videos[4:])):
        rows = {"video": [{"bytes": path.read_bytes(), "path": f"x/{path.name}"} for path in paths]}
        rows |= {"note": ["n"] * len(paths), "label": [n % 3 if split == "train" else 2 - n for n in range(len(paths))]}
        splits[split] = datasets.Dataset.from_dict(rows, features=features)
        (folder / "parquet" / "data").mkdir(parents=True, exist_ok=True)
        splits[split].to_parquet(folder / "parquet" / "data" / f"{split}-00000-of-00001.parquet", batch_size=2)
    datasets.DatasetDict(splits).save_to_disk(folder / "arrow")
    return folder


def clips(manifest: Manifest) -> list[np.ndarray]:
    loader = ClipLoader(
        manifest, mode="validate", batch_size=2, num_frames=4, crop_size=32, stride=None, device="cpu", workers=0
    )
    return [batch.clips.numpy().copy() for batch in loader]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["parquet", "arrow"])
def test_videos_of_datasets_are_read_in_place(made, videos, tmp_path, in_process, form):
    status, out, error = in_process(prepare.main, "huggingface", made / form, "--out", tmp_path, "--workers", 1)
    assert status == 0, error
    assert "train: 5 videos read in place, 0 written" in out and not (tmp_path / "videos").exists()
    train, val = (Manifest.read(tmp_path / f"{name}.csv") for name in ("train", "val"))
    assert train.classes == val.classes == tuple(NAMES)
    assert train.labels.tolist() == [0, 1, 2, 0, 1] and val.labels.tolist() == [2, 1]
    for row, path in zip([*train, *val], [*videos[:4], videos[0], *videos[4:]], strict=True):
        stored = (made / form / row.shard).read_bytes()
        assert stored[row.offset : row.offset + row.size] == path.read_bytes()
        assert row.path.endswith(f"_{path.name}")
    plain = Manifest([row._replace(path=str(path), shard="", offset=0, size=0) for row, path in zip(val, videos[4:])])
    for mine, expected in zip(clips(val), clips(plain), strict=True):
        np.testing.assert_array_equal(mine, expected)


def parquet(path: Path, columns: dict, **settings) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, **settings)
    return path


@pytest.mark.parametrize("settings", [{"compression": "snappy"}, {"compression": "none"}])
def test_compressed_videos_are_written_out(videos, tmp_path, settings):
    """Without compression, pyarrow's own default is a dictionary, whose values are in one piece too."""
    data = [path.read_bytes() for path in (*videos[:2], videos[0])]
    parquet(tmp_path / "x" / "test.parquet", {"video": data, "action": ["run", "jump", "run"]}, **settings)
    splits, classes = read_dataset(tmp_path / "x", tmp_path / "out")
    assert classes == ("jump", "run") and [label for _, label in splits["test"].listed] == [1, 0, 1]
    if settings["compression"] == "none":
        assert splits["test"].written == 0 and len(splits["test"].parts) == 3
        return
    assert splits["test"].written == 3
    assert [Path(path).read_bytes() for path, _ in splits["test"].listed] == data
    written = Path(splits["test"].listed[0][0])
    before = written.stat().st_mtime_ns
    written.with_name("000001.mp4").write_bytes(b"of a killed run")
    read_dataset(tmp_path / "x", tmp_path / "out")
    assert written.stat().st_mtime_ns == before and written.with_name("000001.mp4").read_bytes() == data[1]


@pytest.mark.parametrize("compression", ["uncompressed", "lz4"])
def test_arrow_files_of_other_writers(videos, tmp_path, compression):
    data = [path.read_bytes() for path in videos[:3]]
    feather.write_feather(pa.table({"video": data, "label": [2, 0, 1]}), tmp_path / "a.arrow", compression=compression)
    splits, _ = read_dataset(tmp_path, tmp_path / "out")
    rows = splits["train"]
    assert [label for _, label in rows.listed] == [2, 0, 1] and rows.written == (3 if compression == "lz4" else 0)
    file = (tmp_path / "a.arrow").read_bytes()
    stored = [
        file[part.offset : part.offset + part.size] if (part := rows.parts.get(name)) else Path(name).read_bytes()
        for name, _ in rows.listed
    ]
    assert stored == data


def test_paths_of_videos_and_rows_without_a_label(videos, tmp_path):
    for name in ("x/a.mp4", "data/b.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(videos[0], tmp_path / name)
    paths = ["x/a.mp4", "b.mp4", str(videos[1]), "https://host/c.mp4", "gone.mp4", "d.mp4"]
    columns = {"video": [{"path": path, "bytes": None} for path in paths], "label": [1, 0, 2, 1, 0, -1]}
    columns = {"video": [None, {"path": None, "bytes": None}, *columns["video"]], "label": [0, 0, *columns["label"]]}
    parquet(tmp_path / "data" / "train.parquet", columns)
    splits, classes = read_dataset(tmp_path, tmp_path / "out", classes=NAMES)
    expected = ["x/a.mp4", "data/b.mp4", str(videos[1]), "https://host/c.mp4", "gone.mp4"]
    assert splits["train"].listed == list(zip(expected, [1, 0, 2, 1, 0]))
    assert (splits["train"].unlabelled, splits["train"].without_video) == (1, 2)
    assert classes == tuple(NAMES)


@pytest.mark.parametrize(
    "columns, given, message",
    [
        ({"video": [b"x"], "label": [[1]]}, {}, "label is .1.; expected one whole number or name"),
        (
            {"meta": [{"video": b"x"}], "label": [1]},
            {},
            r"no columns of videos .* write the dataset with dataset.flatten",
        ),
        ({"video": [{"path": 3, "bytes": b""}], "label": [1]}, {}, "video has a row without a video"),
        ({"clip": [b"x"], "label": [1]}, {}, "no columns of videos among clip, label; name one with --video-column"),
        ({"video": [b"x"], "y": [1]}, {}, "no columns of labels among video, y; name one with --label-column"),
        ({"video": [b"x"], "label": [1]}, {"video_column": "v"}, "no column v; its columns are video, label"),
        ({"video": [b"x"], "label": ["fir"]}, {"classes": NAMES}, "'fir' is not one of the 3 classes"),
        ({"video": [b"x"], "label": [-2]}, {}, "has label -2; expected 0 to 2147483647"),
    ],
)
def test_other_columns_are_said(tmp_path, columns, given, message):
    parquet(tmp_path / "a.parquet", columns)
    with pytest.raises(InputError, match=f"{message}"):
        read_dataset(tmp_path, tmp_path, **given)


def test_other_files_are_said(videos, tmp_path):
    with pytest.raises(InputError, match=r"no Parquet or Arrow files \(found no files\)"):
        read_dataset(tmp_path, tmp_path)
    with pytest.raises(InputError, match=r"--files /a/\*.parquet: expected a pattern relative to the dataset"):
        read_dataset(tmp_path, tmp_path, pattern="/a/*.parquet")
    shutil.copy(videos[0], tmp_path / "a.mp4")
    with pytest.raises(InputError, match=r"found .mp4\); .* prepare.py folder"):
        read_dataset(tmp_path, tmp_path)
    path = parquet(tmp_path / "a.parquet", {"video": [os.urandom(9000)] * 3, "label": [1, 2, 3]})
    whole = path.read_bytes()
    for damaged in (whole[:500], b"PAR1" + bytes(8996) + whole[9000:], b""):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="a.parquet: (not a Parquet|damaged)"):
            read_dataset(tmp_path, tmp_path)


@pytest.mark.slow
def test_a_dataset_on_the_hub(videos, tmp_path, in_process, monkeypatch):
    """The hub's client is replaced: it returns the folder of its cache, or raises its own errors."""
    import huggingface_hub

    folder = tmp_path / "snapshots" / "abc"
    for name, some in (("a", videos[:2]), ("b", videos[2:])):
        columns = {"video": [path.read_bytes() for path in some], "label": [0, 1] * (len(some) // 2)}
        parquet(folder / name / "data.parquet", columns)
    parquet(folder / "test.parquet", {"video": [videos[0].read_bytes()], "label": [-1]})
    asked = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **given: asked.append((name, given)) or folder
    )
    monkeypatch.chdir(tmp_path)
    status, out, error = in_process(prepare.main, "huggingface", "me/trees", "--val-fraction", 0.3, "--workers", 1)
    assert status == 0, error
    assert asked == [("me/trees", {"repo_type": "dataset", "allow_patterns": ["*.parquet", "*.json"]})]
    assert "no validation or test split with labels: 2 videos of train are val" in out
    assert "videos of 2 folders: a, b; if these are configurations of the dataset, read one: --files 'a/*.par" in out
    assert [len(Manifest.read(tmp_path / "data" / "trees" / f"{name}.csv")) for name in ("train", "val")] == [4, 2]

    def gone(name, **_):
        raise huggingface_hub.errors.OfflineModeIsEnabled("cannot reach the hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", gone)
    status, _, error = in_process(prepare.main, "huggingface", "me/none")
    assert status == 2 and "me/none: neither a folder here nor a dataset that the hub gives out: cannot reach" in error
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    status, _, error = in_process(prepare.main, "huggingface", "me/none")
    assert status == 2 and "needs huggingface_hub; install it with" in error.replace(": install", "; install")
