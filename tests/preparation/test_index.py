"""Lists and folders of videos as people have them, to manifests."""

import pytest

from dali_pipelines import InputError, Manifest
from preparation.index import index, read_folder, read_list, split, write_rejected
from preparation.work import Crew
from tests.training.conftest import run
from tests.videos import numbered, write_video


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three classes, one in a subfolder, with names that need care and two files that are no videos."""
    root = tmp_path_factory.mktemp("folder")
    pictures = numbered(6, height=32, width=48)
    for name in ("run fast/a.mp4", "run fast/b 1.mp4", "jump/c.avi", "jump/deep/d.webm", "swim/e.mp4", "swim/f.MP4"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        codec = {"avi": "mpeg4", "webm": "vp9"}.get(name.rpartition(".")[2], "h264")
        write_video(root / name, pictures, codec=codec)
    (root / "jump" / "notes.txt").write_text("not listed")
    (root / "jump" / "broken.mp4").write_text("no video " * 50)
    (root / "jump" / "._c.avi").write_text("of macOS")
    (root / ".cache").mkdir()
    return root


def test_a_list_as_paddlevideo_writes_it(tmp_path):
    (tmp_path / "list.txt").write_text("\ufeffa.mp4 0\nsome dir/b c.mp4 12\n\n  d.avi \t 3\n")
    assert read_list(tmp_path / "list.txt") == [("a.mp4", 0), ("some dir/b c.mp4", 12), ("d.avi", 3)]


@pytest.mark.parametrize("line", ["a.mp4", "a.mp4 x", "a.mp4 -1", "3", "a.mp4 99999999999999999999"])
def test_a_bad_line_is_named(tmp_path, line):
    (tmp_path / "list.txt").write_text(f"a.mp4 0\n{line}\n")
    with pytest.raises(InputError, match="list.txt:2: expected `path label`"):
        read_list(tmp_path / "list.txt")


def test_a_folder_a_class(folder):
    listed, classes = read_folder(folder)
    assert classes == ("jump", "run fast", "swim")
    assert listed == [
        ("jump/broken.mp4", 0),
        ("jump/c.avi", 0),
        ("jump/deep/d.webm", 0),
        ("run fast/a.mp4", 1),
        ("run fast/b 1.mp4", 1),
        ("swim/e.mp4", 2),
        ("swim/f.MP4", 2),
    ]


def test_folders_without_videos_are_named(tmp_path):
    with pytest.raises(InputError, match="no videos; expected a folder for each class"):
        read_folder(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a.mp4").touch()
    (tmp_path / "bare").mkdir()
    with pytest.raises(InputError, match="bare: no videos in this folder"):
        read_folder(tmp_path)


def test_folders_of_splits_are_not_classes(tmp_path):
    for name in ("train/cat", "val/dog"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "a.mp4").touch()
    with pytest.raises(InputError, match="holds train and val, which look like splits, not classes"):
        read_folder(tmp_path)


@pytest.mark.parametrize("workers", [1, 2])
def test_the_good_are_kept_in_order_and_the_bad_are_named(folder, tmp_path, workers):
    listed, classes = read_folder(folder)
    listed.insert(2, ("gone.mp4", 1))
    manifest, rejected = index(
        listed, root=folder, classes=classes, journal=tmp_path / "journal", crew=Crew(workers=workers)
    )
    assert [manifest[n].path for n in range(len(manifest))] == [
        path for path, _ in listed if path not in ("jump/broken.mp4", "gone.mp4")
    ]
    assert manifest.labels.tolist() == [0, 0, 1, 1, 2, 2] and manifest.classes == classes
    assert (manifest.listed, manifest.rejected) == (8, 2)
    assert [(entry.path, entry.label) for entry in rejected] == [("jump/broken.mp4", 0), ("gone.mp4", 1)]
    assert "not a video" in rejected[0].reason and rejected[1].reason == "no such file or directory"
    write_rejected(tmp_path / "r.csv", rejected)
    assert (tmp_path / "r.csv").read_text().splitlines()[2] == "gone.mp4,1,no such file or directory"
    write_rejected(tmp_path / "r.csv", [])
    assert not (tmp_path / "r.csv").exists()


def test_labels_beyond_the_names_are_refused(folder):
    with pytest.raises(InputError, match="label 3 is listed, but there are 3 classes"):
        index(
            [("swim/e.mp4", 3)], root=folder, classes=("a", "b", "c"), journal=folder / "journal", crew=Crew(workers=1)
        )


def test_the_split_is_by_class_and_always_the_same():
    listed = [(f"{label}/{n}.mp4", label) for label, count in enumerate((40, 10, 2, 1)) for n in range(count)]
    train, val = split(listed, 0.1)
    assert (train, val) == split(listed, 0.1) and sorted(train + val) == sorted(listed)
    assert [sum(label == wanted for _, label in val) for wanted in range(4)] == [4, 1, 1, 0]
    assert split(listed, 0) == (listed, [])


def test_index_and_folder_as_a_user_runs_them(folder, tmp_path):
    (tmp_path / "list.txt").write_text("swim/e.mp4 0\njump/broken.mp4 1\njump/c.avi 1\n")
    (tmp_path / "names.txt").write_text("swimming\njumping\n")
    done = run(
        "prepare.py",
        "index",
        "--list",
        "list.txt",
        "--root",
        folder,
        "--out",
        "m/v.csv",
        "--labels",
        "names.txt",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "jump/broken.mp4: not a video" in done.stdout and "v.csv: 2 of 3 videos, 2 classes" in done.stdout
    manifest = Manifest.read(tmp_path / "m" / "v.csv")
    assert manifest.classes == ("swimming", "jumping") and manifest.labels.tolist() == [0, 1]
    assert (tmp_path / "m" / "v.rejected.csv").exists()

    done = run("prepare.py", "folder", folder, "--out", tmp_path / "split", "--val-fraction", 0.3)
    assert done.returncode == 0, done.stderr
    train, val = (Manifest.read(tmp_path / "split" / f"{name}.csv") for name in ("train", "val"))
    assert train.classes == val.classes == ("jump", "run fast", "swim") and train.listed + val.listed == 7
    done = run("prepare.py", "folder", folder, "--out", tmp_path / "all.csv")
    assert done.returncode == 0 and len(Manifest.read(tmp_path / "all.csv")) == 6
