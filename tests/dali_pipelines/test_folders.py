"""Folders of videos: which suffixes, links and what is said of the rest."""

import os

import pytest

from dali_pipelines import InputError
from dali_pipelines.folders import VIDEO_SUFFIXES, is_video_name, videos_below
from serving.video_arguments import find_videos


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


SUFFIXES = (
    "mp4 mkv mov avi webm flv wmv asf ts mts m2ts m2t vob mpg mpeg mpe m2v m4v 3gp 3g2 ogv ogm gif mxf dv ivf rm rmvb"
)
SUFFIXES += " divx qt f4v mjpg mjpeg h264 264 hevc 265 obu y4m nut wtv mod tod mk3d insv"


@pytest.mark.parametrize("suffix", SUFFIXES.split())
def test_names_of_videos(suffix):
    assert (
        is_video_name(f"a.{suffix}") and is_video_name(f"b.c/A.{suffix.upper()}") and not is_video_name(f"._a.{suffix}")
    )


def test_names_that_are_not_videos():
    assert not VIDEO_SUFFIXES & {
        ".mp3",
        ".wav",
        ".m4a",
        ".ogg",
        ".jpg",
        ".png",
        ".srt",
        ".txt",
        ".csv",
        ".json",
        ".part",
        "",
    }


def test_skipped_files_are_counted(tmp_path):
    for name in ("b.MTS", "a/x.ogv", "n.txt", "a/o.TXT", "s.srt", "._b.mts", ".b.mts", "README"):
        touch(tmp_path / name)
    found = videos_below(tmp_path)
    assert found.videos == ["a/x.ogv", "b.MTS"]
    assert found.note.startswith("6 files skipped: 2 .txt, ")  # the most first
    others = found.note.removeprefix("6 files skipped: 2 .txt, ").split(", ")
    assert sorted(others) == ["1 ._* of macOS", "1 .srt", "1 hidden", "1 no suffix"]
    os.remove(tmp_path / "n.txt")
    assert videos_below(tmp_path / "a").note == "1 file skipped: 1 .txt"


def test_linked_folders_are_followed_from_each_place_and_loops_are_noticed(tmp_path):
    touch(tmp_path / "more" / "deep" / "b.mp4")
    for name in ("x", "y"):
        touch(tmp_path / "root" / name / "a.mp4")
        (tmp_path / "root" / name / "more").symlink_to(tmp_path / "more")
    (tmp_path / "root" / "x" / "link.mp4").symlink_to(tmp_path / "more" / "deep" / "b.mp4")
    (tmp_path / "root" / "x" / "up").symlink_to(tmp_path)
    (tmp_path / "more" / "deep" / "loop").symlink_to(tmp_path / "more")
    (tmp_path / "root" / "dead").symlink_to(tmp_path / "nowhere")
    found = videos_below(tmp_path / "root")
    assert found.videos == ["x/a.mp4", "x/link.mp4", "x/more/deep/b.mp4", "y/a.mp4", "y/more/deep/b.mp4"]
    for place in ("x/up", "x/more/deep/loop", "y/more/deep/loop"):
        assert f"{place}: not followed, leads back to {tmp_path}" in found.note
    (tmp_path / "linked").symlink_to(tmp_path / "root")
    assert videos_below(tmp_path / "linked").videos == found.videos


def test_folders_that_cannot_be_read_are_named(tmp_path, monkeypatch):
    touch(tmp_path / "a.mp4")
    touch(tmp_path / "closed" / "b.mp4")
    listdir = os.listdir

    def deny(path):
        if os.fspath(path).endswith("closed"):
            raise PermissionError(13, "Permission denied")
        return listdir(path)

    monkeypatch.setattr(os, "listdir", deny)
    assert videos_below(tmp_path) == (["a.mp4"], "closed: permission denied")
    for name in "bc":
        touch(tmp_path / name / "closed" / "b.mp4")
    assert videos_below(tmp_path).note == (
        "3 folders cannot be read: b/closed: permission denied, c/closed: permission denied, closed: permission denied"
    )
    for number in range(20):
        touch(tmp_path / str(number) / "closed" / "b.mp4")
    note = videos_below(tmp_path).note
    assert note.startswith("23 folders cannot be read: ") and note.endswith(", and 13 more") and len(note) < 500
    with pytest.raises(InputError, match="no such folder of videos"):
        videos_below(tmp_path / "gone")


def test_a_folder_that_can_be_listed_but_not_entered(tmp_path, monkeypatch):
    for name in ("a.mp4", "half/b.mp4", "half/deeper/c.mp4"):
        touch(tmp_path / name)
    stat = os.stat

    def deny(path, **settings):
        if "half/" in os.fspath(path):
            raise PermissionError(13, "Permission denied")
        return stat(path, **settings)

    monkeypatch.setattr(os, "stat", deny)
    found = videos_below(tmp_path)
    assert found == (["a.mp4", "half/b.mp4"], "half/deeper: permission denied")


@pytest.mark.parametrize("pattern", ["*/*.mp4", "**/*.mp4", "[xy]/**/*.mp4", "**", "*/*/*.mp4", "x/*"])
def test_folders_that_a_glob_cannot_read_are_named(tmp_path, monkeypatch, pattern):
    for name in ("x/a.mp4", "x/y/b.mp4", "x/closed/c.mp4"):
        touch(tmp_path / name)

    def denied(call):
        def deny(path="."):
            if os.fspath(path).rstrip("/").endswith("closed"):
                raise PermissionError(13, "Permission denied")
            return call(path)

        return deny

    monkeypatch.setattr(os, "scandir", denied(os.scandir))
    monkeypatch.setattr(os, "listdir", denied(os.listdir))
    monkeypatch.chdir(tmp_path)
    for start in ("", f"{tmp_path}/"):
        warnings = []
        (found,) = find_videos([start + pattern], warn=warnings.append)
        assert found and not any("c.mp4" in path for path in found)
        reaches = pattern != "*/*.mp4"
        assert [f"{start}x/closed: permission denied" in each for each in warnings] == [True] * reaches, warnings
