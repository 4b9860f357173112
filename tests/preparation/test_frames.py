"""Lists and folders of frame folders, to manifests that train, are evaluated and become videos."""

import csv

import numpy as np
import pytest

from commands import prepare, train
from common.worker_pool import WorkerPool
from dali_pipelines import InputError, Manifest
from dali_pipelines.files import Source, size_of
from dali_pipelines.folders import frame_folders_below
from dali_pipelines.host_decoder import decode_frames
from dali_pipelines.probe import probe
from preparation.frames import read_frame_list
from preparation.index import probe_file, read_folder, read_list
from preparation.pack import pack
from preparation.transcode import Settings, Task, target_names, transcode
from serving.video_arguments import find_videos
from tests.dali_pipelines.test_frames import BROKEN, write_frames


@pytest.fixture
def raw(tmp_path):
    """class/video/img_00001.jpg: three classes of two videos of 5 frames."""
    for number, name in enumerate(("ash/v 0", "ash/v1", "birch/v0", "birch/v1", "cedar/v0", "cedar/v1")):
        write_frames(tmp_path / "raw" / name, 5, seed=number)
    return tmp_path / "raw"


@pytest.mark.slow
def test_a_list_of_frame_folders(raw, in_process):
    """One frame is missing, one folder has other frames than the list says, and two have none; 25 frames a second."""
    (raw / "birch" / "v0" / "img_00003.jpg").unlink()
    (raw / "empty").mkdir()
    for name in ("left_1.jpg", "right_1.jpg"):
        (raw / "two").mkdir(exist_ok=True)
        (raw / "two" / name).write_bytes(b"")
    folders = raw.parent / "list.txt"
    folders.write_text("ash/v 0 5 0\r\nbirch/v0\t5\t1\r\nempty,5,1\n\ntwo 1 0\ngone 5 2\n")
    out = raw.parent / "train.csv"
    status, text, errors = in_process(
        prepare.main, "frames", "--list", folders, "--root", raw, "--out", out, "--fps", 25
    )
    assert status == 0, errors
    assert (
        "taken as 25 frames/s" in text and f"{out}: 2 of 5 videos" in text and "1 with gaps in the frames' num" in text
    )
    assert "1 of 2 folders have more or fewer frames than the list says" in text and "birch/v0 has 4, not 5" in text
    made = Manifest.read(out)
    assert [video.path for video in made] == [
        "ash/v 0/img_{00001..00005}.jpg",
        "birch/v0/img_{00001..00002,00004..00005}.jpg",
    ]
    assert [(v.label, v.frames, v.fps, v.width, v.height) for v in made] == [(0, 5, 25, 64, 48), (1, 4, 25, 64, 48)]
    rejected = list(csv.reader(open(raw.parent / "train.rejected.csv")))[1:]
    assert [(path, reason.split(",")[0]) for path, _, reason in rejected] == [
        ("empty", "no images with numbers in their names"),
        ("two", "images numbered in 2 ways"),
        ("gone", "no such file or directory"),
    ]
    assert list(csv.reader(open(raw.parent / "train.differing.csv")))[1:] == [["birch/v0", "5", "4"]]


@pytest.mark.parametrize("line", ["v 5", "v 0 1", "v 5 1 x", "v 5 -1", "5 1", "v 5 1,2", f"v 5 {2**31}"])
def test_lines_that_are_no_frame_folders(tmp_path, line):
    (tmp_path / "list.txt").write_text(f"w 5 0\n{line}\n")
    with pytest.raises(InputError, match=r"list.txt:2: expected `frame_dir total_frames label`"):
        read_frame_list(tmp_path / "list.txt")


def test_folders_that_paddlevideo_names_as_the_video(raw):
    (raw.parent / "list.txt").write_text("ash/v1.mp4 5 0\n")
    assert read_frame_list(raw.parent / "list.txt", raw).listed == [("ash/v1/img_{00001..00005}.jpg", 0)]


def test_a_list_of_another_folder(raw, in_process):
    elsewhere = "ash/v1 and others are not below {0}/ash, but below {0}: --root {0}"
    for verb, line, root, expected in (
        ("frames", "ash/v1 5 0", raw / "ash", elsewhere),
        ("index", "ash/v1 0", raw / "ash", elsewhere),
        (
            "index",
            "data/x/ash/v1 0",
            raw,
            "data/x/ash/v1 and others are not below {0}, but ash/v1 is: remove data/x/ from",
        ),
        ("index", "/old/ash/v1 0", raw, "/old/ash/v1 and others are not below {0}, but ash/v1 is: remove /old/ from"),
        ("index", "ash/v1 0", raw / "gone", "--root {0}/gone: no such folder"),
    ):
        (raw / "list.txt").write_text(line)
        given = (verb, "--list", raw / "list.txt", "--root", root, "--out", raw / "train.csv")
        status, _, error = in_process(prepare.main, *given)
        assert status == 2 and expected.format(raw) in error
    status, _, error = in_process(prepare.main, "index", "--list", raw, "--out", raw / "train.csv")
    assert status == 2 and f"{raw}: a folder; expected a file" in error


def test_an_offset_is_said(raw):
    (raw.parent / "list.txt").write_text("ash/v1 2 5 0\n")
    (rejected,) = read_frame_list(raw.parent / "list.txt", raw).rejected
    assert rejected.reason == "ash/v1 has an offset, 2; only whole folders are read: make one of the part"


def test_index_says_what_a_list_of_frame_folders_is(raw):
    folders = raw.parent / "list.txt"
    folders.write_text("ash/v1 5 0\n")
    command = rf"prepare.py frames --list {folders} --root {raw} --out FILE"
    with pytest.raises(InputError, match=f"found `frame_dir total_frames label`: a list of frame folders.*{command}"):
        read_list(folders, raw)
    with pytest.raises(
        InputError, match="found more than one number.*If it lists folders of frames: prepare.py frames"
    ):
        read_list(folders, "elsewhere")


def test_what_does_not_take_frame_folders_says_so(raw, in_process):
    status, _, errors = in_process(prepare.main, "folder", raw)
    assert status == 2 and f"if these images are the frames of videos: prepare.py frames {raw}" in errors
    status, _, errors = in_process(prepare.main, "frames")
    assert status == 2 and "expected: prepare.py frames DIR, or: prepare.py frames --list LIST" in errors


def test_a_folder_of_frames_to_predict(raw):
    notes = []
    assert find_videos([str(raw / "ash" / "v1")], notes.append) == [[f"{raw}/ash/v1/img_{{00001..00005}}.jpg"]]
    assert notes == [f"{raw}/ash/v1: images taken as the frames of videos (1), at 30 frames/s"]
    assert len(find_videos([str(raw)], notes.append)[0]) == 6


def test_a_folder_of_classes(raw):
    listed, classes, note = read_folder(raw, find=frame_folders_below)
    assert classes == ("ash", "birch", "cedar") and not note
    assert listed[:2] == [("ash/v 0/img_{00001..00005}.jpg", 0), ("ash/v1/img_{00001..00005}.jpg", 0)]
    assert [label for _, label in listed] == [0, 0, 1, 1, 2, 2]
    with pytest.raises(InputError, match=r"a folder of frames for each video, such as archery/v1/img_00001.jpg"):
        read_folder(raw / "ash" / "v1", find=frame_folders_below)


def test_verify_decode_finds_a_broken_frame(raw):
    path = f"{raw}/ash/v1/img_{{00001..00005}}.jpg"
    assert probe_file(path, decode=True).video.frames == 5
    (raw / "ash" / "v1" / "img_00003.jpg").write_bytes(BROKEN["cut off"])
    assert probe_file(path, decode=False).video.frames == 5  # reads only the first and the last
    with pytest.raises(InputError, match="^img_00003.jpg: cut off$"):
        probe_file(path, decode=True)


def test_frame_folders_become_videos_but_are_not_packed(raw, tmp_path):
    path = "ash/v1/img_{00001..00005}.jpg"
    video = probe(str(raw / path))._replace(path=path)
    Manifest([video], root=raw).write(tmp_path / "val.csv")
    with pytest.raises(InputError, match=f"make them files first: prepare.py transcode -m {tmp_path / 'val.csv'}"):
        pack(tmp_path / "val.csv", tmp_path / "packed", shard_bytes=1e9, pool=WorkerPool())
    names = target_names([("", path), ("", "ash/v1/left_{1}.jpg"), ("", "img_{1..2}.jpg")], ".mp4")
    assert list(names.values()) == [f"{path}.mp4", "ash/v1/left_{1}.jpg.mp4", "frames.mp4"]
    source = Source(str(raw / path))
    copy = transcode(*Task(source, video, str(tmp_path), "ash/v1.mp4", Settings(gop=2)).to_json())
    assert (copy.video.frames, copy.video.width, copy.source_bytes) == (5, 64, size_of(source))
    original, copied = (
        decode_frames(file, np.arange(5), size=(48, 64)).frames for file in (source, tmp_path / "ash/v1.mp4")
    )
    assert np.abs(original.astype(float) - copied).mean() < 4


@pytest.mark.slow
def test_training_on_frames_and_videos(raw, small_data, in_process, config_file):
    """Validation meets a frame that is gone since it was indexed, and says so."""
    videos = Manifest.read(small_data / "train.csv")
    rows = [
        probe(str(raw / path))._replace(label=label) for path, label in read_folder(raw, find=frame_folders_below)[0]
    ]
    rows += [video._replace(path=str(videos.root / video.path)) for video in list(videos)[:2]]
    Manifest(rows, classes=videos.classes).write(raw / "mixed.csv")
    settings = [
        f"data.train={raw}/mixed.csv",
        f"data.val={raw}/val.csv",
        "train.epochs=1",
        "data.max_fault_fraction=0.5",
    ]
    Manifest(rows[1:3], classes=videos.classes).write(raw / "val.csv")
    (raw / "birch" / "v0" / "img_00001.jpg").rename(raw / "elsewhere.jpg")
    status, text, errors = in_process(train.main, "-c", config_file, "-o", *settings)
    assert status == 0, errors
    assert "img_00001.jpg: no such file or directory" in text + errors
    assert "decoders: h264 host, jpeg frames DALI, vp9 host" in text, text
