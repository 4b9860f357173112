"""The manifest file, there and back, and what probing a file finds."""

import numpy as np
import pytest

from dali_pipelines import InputError, Manifest
from dali_pipelines.manifest import Video, probe
from tests.videos import numbered, write_video

HEADER = "path,label,frames,fps,width,height,codec,rotation\n"
VIDEOS = [
    Video("a.mp4", 0, 280, 28.0, 340, 256, "h264", 0),
    Video('b, "c"/ü \n.webm', 2, 1, 30000 / 1001, 256, 340, "vp9", 270),
    Video("x\udcff.avi", 1, 3, 25.0, 5, 7, "mpeg4", 180),  # a name that is not UTF-8
]


def test_there_and_back(tmp_path):
    made = Manifest(VIDEOS, root=tmp_path / "videos", classes=("one", "zwei, ä", "3"), rejected=4)
    made.write(tmp_path / "new" / "list.csv")
    read = Manifest.read(tmp_path / "new" / "list.csv")
    assert [read[index] for index in range(len(read))] == VIDEOS
    assert read.classes == made.classes and read.rejected == 4 and read.listed == 7
    assert read.root == made.root and read.labels.tolist() == [0, 2, 1]
    with pytest.raises(IndexError):
        read[3]


def test_a_root_inside_is_written_relative_so_that_the_folder_can_move(tmp_path):
    Manifest(VIDEOS, root=tmp_path / "here" / "videos").write(tmp_path / "here" / "list.csv")
    (tmp_path / "here").rename(tmp_path / "there")
    assert Manifest.read(tmp_path / "there" / "list.csv").file(0) == str(tmp_path / "there" / "videos" / "a.mp4")


def test_mapped_arrays_hold_the_same_rows(tmp_path):
    Manifest(VIDEOS).save_arrays(tmp_path)
    mapped = Manifest.map_arrays(tmp_path, "/somewhere")
    assert [mapped[index] for index in range(3)] == VIDEOS and isinstance(mapped._rows, np.memmap)


def test_columns_may_come_in_any_order_and_comments_may_be_missing(tmp_path):
    (tmp_path / "list.csv").write_text(
        "label,path,note,frames,fps,width,height,codec,rotation\n3,a,hi,1,25,2,2,vp9,0\n\n"
    )
    manifest = Manifest.read(tmp_path / "list.csv")
    assert manifest[0] == Video("a", 3, 1, 25.0, 2, 2, "vp9", 0) and manifest.root == tmp_path


def test_a_byte_order_mark_hides_nothing(tmp_path):
    Manifest(VIDEOS, root="/elsewhere", classes=("one", "two", "three")).write(tmp_path / "list.csv")
    (tmp_path / "list.csv").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "list.csv").read_bytes())
    manifest = Manifest.read(tmp_path / "list.csv")
    assert str(manifest.root) == "/elsewhere" and len(manifest.classes) == 3


@pytest.mark.parametrize(
    "text, message",
    [
        ("a.mp4 0\nb.mp4 1\n", "no column path.*prepare.py index"),
        ("", "no column"),
        (HEADER + "a,0,1,25,2,2,vp9,0\na,-1,1,25,2,2,vp9,0\n", "list.csv:3: label is '-1'; expected a class number"),
        (HEADER + "a,0,1,25,2,2,vp9,0\na,0,zero,25,2,2,vp9,0\n", "list.csv:3: frames is 'zero'"),
        ("# root: .\n\n" + HEADER + "a,0,1,nan,2,2,vp9,0\n", "list.csv:4: fps is 'nan'"),
        (HEADER + "a,0,1,25,2,2,vp9,45\n", "rotation is '45'; expected 0, 90, 180 or 270"),
        (HEADER + "a,0,99999999999999999999,25,2,2,vp9,0\n", "list.csv:2: frames is '99999999999999999999'"),
        (HEADER + "a,0,1,25,9999999999,2,vp9,0\n", "list.csv:2: width is '9999999999'"),
        (HEADER + "a,0,1,inf,2,2,vp9,0\n", "list.csv:2: fps is 'inf'"),
        (HEADER + "a,0,1,25,2,2,vp\u00e9,0\n", "list.csv:2: codec is"),
        (HEADER + "a,0,1,25,2,2\n", "list.csv:2: 6 columns where the header names 8"),
        ("# classes: one, two\n" + HEADER, "JSON list"),
    ],
)
def test_a_wrong_file_is_named_with_its_line(tmp_path, text, message):
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(InputError, match=message):
        Manifest.read(tmp_path / "list.csv")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match="gone.csv: no such manifest"):
        Manifest.read(tmp_path / "gone.csv")


def test_probe_counts_pictures_and_applies_rotation(numbered_videos):
    found = {numbered_videos[index].path: numbered_videos[index] for index in range(len(numbered_videos))}
    assert found["bframes.mp4"][2:] == (100, 25.0, 176, 144, "h264", 0)
    assert found["bframes.mkv"].frames == 100  # the header of a Matroska file claims 0
    assert found["av1.mp4"].codec == "av1"
    assert found["odd_size.webm"][4:6] == (127, 95)
    assert (found["turned_90.mp4"].width, found["turned_90.mp4"].height) == (144, 176)
    assert [found[f"turned_{r}.mp4"].rotation for r in (90, 180, 270)] == [90, 180, 270]
    assert found["uneven.mp4"].frames == 100 and found["uneven.mp4"].fps < 15


def test_probe_finds_the_shared_videos(shared_videos):
    found = [probe(path)[2:] for path in sorted(shared_videos.iterdir())]
    assert found == [
        (280, 28.0, 340, 256, "h264", 0),
        (300, 30.0, 340, 256, "h264", 0),
        (117, 25.0, 640, 480, "h264", 0),
        (131, 25.0, 320, 240, "mpeg4", 0),
    ]


def test_probe_names_what_is_no_video(tmp_path):
    good = write_video(tmp_path / "good.mp4", numbered(5, height=32, width=32))
    (tmp_path / "text.mp4").write_text("not a video at all\n" * 50)
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "cut.mp4").write_bytes(open(good, "rb").read()[:200])
    for name, reason in [
        ("text.mp4", "not a video"),
        ("empty.mp4", "not a video"),
        ("cut.mp4", "not a video"),
        ("gone.mp4", "no such file"),
        (".", "a folder"),
    ]:
        with pytest.raises(InputError, match=reason):
            probe(tmp_path / name)
    assert probe(good).frames == 5
