"""Lists and folders of videos as people have them, to manifests."""

import os
import shutil

import pytest

from commands import prepare
from common.locking import FolderLock
from common.worker_pool import WorkerPool
from dali_pipelines import InputError, Manifest
from preparation.index import (
    few_for_validation,
    index,
    odd_labels,
    read_folder,
    read_list,
    read_listed,
    split_train_val,
    write_rejected,
)
from tests.commands import run, run_here
from tests.videos import numbered, write_video


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three classes, one in a subfolder, with names that need care and two files that are no videos."""
    root = tmp_path_factory.mktemp("folder")
    frames = numbered(6, height=32, width=48)
    for name in ("run fast/a.mp4", "run fast/b 1.mp4", "jump/c.avi", "jump/deep/d.webm", "swim/e.mp4", "swim/f.MP4"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        codec = {"avi": "mpeg4", "webm": "vp9"}.get(name.rpartition(".")[2], "h264")
        write_video(root / name, frames, codec=codec)
    (root / "jump" / "notes.txt").write_text("not listed")
    (root / "jump" / "broken.mp4").write_text("no video " * 50)
    (root / "jump" / "._c.avi").write_text("of macOS")
    (root / ".cache").mkdir()
    return root


def test_a_list_as_paddlevideo_writes_it(tmp_path):
    (tmp_path / "list.txt").write_text("\ufeffa.mp4 0\nsome dir/b c.mp4 12\n\n  d.avi \t 3\n")
    assert read_list(tmp_path / "list.txt") == [("a.mp4", 0), ("some dir/b c.mp4", 12), ("d.avi", 3)]


@pytest.mark.parametrize(
    "content",
    [
        "a.mp4 0\r\nb c.mp4 1\r\n",
        "a.mp4 0\nb c.mp4 1\n".encode("utf-16"),
        b"\xff\xfe" + "a.mp4 0\r\nb c.mp4 1".encode("utf-16-le"),
        "a.mp4 0\0b c.mp4 1\0",
    ],
)
def test_a_list_from_other_systems(tmp_path, content):
    (tmp_path / "list.txt").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert read_list(tmp_path / "list.txt") == [("a.mp4", 0), ("b c.mp4", 1)]


def test_paths_hold_any_character_and_need_not_be_utf8(tmp_path):
    (tmp_path / "list.txt").write_bytes("a\u2028b\x0bc\x85.mp4 0\n".encode() + b"d\xff\x1c.mp4 1\n")
    assert read_list(tmp_path / "list.txt") == [("a\u2028b\x0bc\x85.mp4", 0), ("d\udcff\x1c.mp4", 1)]


@pytest.mark.parametrize(
    "line, found",
    [
        ("a.mp4", "no label"),
        ("a.mp4 x", "the label 'x'"),
        ("a.mp4 -1", "the label '-1'; leave out what has no label"),
        ("a.mp4 99999999999999999999", "the label '99999999999999999999'"),
        ("3", "a single number"),
        ("0 a.mp4", "no label"),
        ("a.mp4 0 1", "more than one number"),
        ("a.mp4\t30\t0", "more than one number"),
        ("frames/a 163 1", "more than one number"),
        ("a.mp4 1.5 11.5 3", "more than one number"),
        ("a.mp4,0", "a comma"),
        ("a.mp4, 0", "a comma"),
        ("a.mp4 0,1", "a comma"),
        ("a.mp4; 0", "a comma or semicolon"),
        ("34870;Drumming Fingers", "columns, but no header and no suffix of a video: add a first line `path;label`"),
        ('"a b.mp4" 0', "a path in quotes"),
        ("'a b.mp4' 0", "a path in quotes"),
        ("a.mp4 archery 1", "more than one field after 'a.mp4'"),
        ("a.mp4 0\rb.mp4 1", "a line end within the path"),
    ],
)
def test_a_bad_line_is_named_with_what_was_found(tmp_path, line, found):
    (tmp_path / "list.txt").write_text(f"a.mp4 0\n{line}\n", newline="\n")
    with pytest.raises(InputError) as error:
        read_list(tmp_path / "list.txt", tmp_path)
    assert "list.txt:2: expected `path label`" in str(error.value) and f"found {found}" in str(error.value)


def test_odd_paths_are_good_if_the_file_is_there(tmp_path):
    odd = ["a.mp4 0", "take 3", '"b.mp4"', "c,", "d.mp4 old"]
    for name in odd:
        (tmp_path / name).touch()
    (tmp_path / "list.txt").write_text("".join(f"{name} 1\n" for name in odd))
    assert read_list(tmp_path / "list.txt", tmp_path) == [(name, 1) for name in odd]
    with pytest.raises(InputError, match="list.txt:1: .* more than one number"):
        read_list(tmp_path / "list.txt", tmp_path / "elsewhere")


@pytest.mark.parametrize(
    "content, classes, labels, names",
    [
        ("path,label\na.mp4,1\nb.mp4,0\n", (), [1, 0], ()),
        ("a.mp4,1\nb.mp4,0\n", ("x", "y"), [1, 0], ("x", "y")),
        ("a.mp4;dog\r\nb.mp4;cat\r\n", (), [1, 0], ("cat", "dog")),
        ("Split,Video,Class\nt,a.mp4,dog\nv,b.mp4,cat\n", ("dog", "cat", "eel"), [0, 1], ("dog", "cat", "eel")),
        ("a.mp4 1\nb.mp4 0\n", (), [1, 0], ()),
        ("path\tlabel\na.mp4\t1\nb.mp4\t0\n", (), [1, 0], ()),
        ("a.mp4\tplay, dog\r\nb.mp4\tcat\r\n", (), [1, 0], ("cat", "play, dog")),
        ("File Name;Class ID\na.mp4;1\nb.mp4;0\n", (), [1, 0], ()),
        ("clip,behaviour\na.mp4,1\nb.mp4,0\n", (), [1, 0], ()),
    ],
)
def test_a_list_of_paths_and_labels_in_columns(tmp_path, content, classes, labels, names):
    (tmp_path / "l.csv").write_text(content, newline="")
    assert read_listed(tmp_path / "l.csv", classes=classes) == (list(zip(["a.mp4", "b.mp4"], labels)), names)


def test_paths_that_windows_or_paddlevideo_wrote(tmp_path):
    for name in ("dogs/a.mp4", "cats/b.mp4", "odd\\name.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    rows = [("dogs\\a.mp4", 1), ("cats\\b.mp4", 0), ("odd\\name.mp4", 0), ("gone\\c.mp4", 0), ("gone/d", 0)]
    rows += [("cats/b", 0), ("dogs\\a", 1)]  # without a suffix, as PaddleVideo's list of UCF101
    for separator in (" ", ","):
        (tmp_path / "l.csv").write_text("".join(f"{path}{separator}{label}\r\n" for path, label in rows))
        assert [path for path, _ in read_listed(tmp_path / "l.csv", tmp_path)[0]] == [
            "dogs/a.mp4",
            "cats/b.mp4",
            "odd\\name.mp4",
            "gone\\c.mp4",
            "gone/d",
            "cats/b.mp4",
            "dogs/a.mp4",
        ]


def test_a_comma_within_a_path(tmp_path):
    (tmp_path / "l.csv").write_text('"a, b.mp4",0\nc,d.mp4,1\n')
    assert read_listed(tmp_path / "l.csv")[0] == [("a, b.mp4", 0), ("c,d.mp4", 1)]


@pytest.mark.parametrize(
    "content, message",
    [
        ("a.mp4,0\nb.mp4,x\n", "l.csv:2: .* labels that are whole numbers, 0 or more"),
        ("a.mp4,cat\nb.mp4,-1\n", "l.csv:2: expected `path,label`, .* labels that are class names"),
        ("a.mp4,4.0\nb.mp4,1.0\n", "l.csv:1: .* whole numbers, .* the label '4.0'"),
        ('a.mp4,"1,3"\nb.mp4,1\n', "l.csv:1: .* one label each, .* the label '1,3'"),
        ("path,label\na.mp4\n", "l.csv:2: expected `path,label`"),
        ("path,label\n", "only a header"),
        ("path,label\na.mp4,cta\n", "l.csv:2: 'cta' is not one of the 2 classes; the nearest is 'cat'"),
        ("frames/a,163,1\n", "l.csv:1: expected `path label`"),
        ("label,clip_id\ncat,1\n", "no column of paths among label, clip_id; expected one named path"),
        ("label,youtube_id,time_start\ncat,x,1\n", "expected one named path; .* prepare.py kinetics400"),
        ('{"x1": {"annotations": {"label": "cat"}}}', "l.csv: JSON; expected lines `path label`"),
        ('[{"path": "a.mp4", "label": 0}]', "l.csv: JSON; expected"),
        ("# root: .\npath,label\na.mp4,0\n", "l.csv: a manifest already, as training reads it"),
        ("id,clip,behaviour\n1,a.mp4,cat\n", "columns id, clip, behaviour; expected `path,label`, or a header that"),
        ("cat,a.mp4\n", "columns cat, a.mp4; expected `path,label`"),
        ("a.mp4;f\xfcr\n", "l.csv:1: not UTF-8: the class .*; save the file as UTF-8"),
        ("PK\3\4\24\0", "l.csv: a workbook or a ZIP archive; save the table as CSV"),
    ],
)
def test_a_bad_row_of_a_list_in_columns(tmp_path, content, message):
    (tmp_path / "l.csv").write_text(content, encoding="cp1252")
    with pytest.raises(InputError, match=message):
        read_listed(tmp_path / "l.csv", classes=("cat", "dog"))


@pytest.mark.parametrize(
    "listed, classes, notes",
    [
        ([("a", 1), ("b", 2)], (), ["the lowest label is 1, but labels count from 0; does the list count from 1?"]),
        ([("a", 0), ("b", 7)], (), ["2 of the labels 0 to 7 occur, but the network gets 8 classes"]),
        ([("a", 1), ("b", 3)], ("w", "x", "y", "z"), []),
        ([("a", 0), ("b", 1), ("a", 0)], (), ["1 of 3 lines repeat a video"]),
        (
            [("a", 0), ("a", 1), ("b", 1)],
            (),
            ["1 of 3 lines repeat a video, 1 with different labels, such as a"],
        ),
        ([], (), []),
    ],
)
def test_labels_that_are_probably_not_meant(listed, classes, notes):
    assert odd_labels(listed, classes) == notes


@pytest.mark.slow
def test_a_list_of_class_names_as_a_user_indexes_it(folder, tmp_path, in_process):
    (tmp_path / "l.csv").write_text("path,label\nswim/e.mp4,swim\njump/c.avi,jump\n")
    given = ("index", "--list", tmp_path / "l.csv", "--root", folder, "--out", tmp_path / "m.csv", "--workers", 1)
    status, out, _ = in_process(prepare.main, *given)
    assert status == 0 and "2 class names; label 0 is 'jump'" in out
    manifest = Manifest.read(tmp_path / "m.csv")
    assert manifest.classes == ("jump", "swim") and manifest.labels.tolist() == [1, 0]
    (tmp_path / "l.csv").write_text("swim/e.mp4 2\n")
    status, out, _ = in_process(prepare.main, *given)
    assert status == 0 and "l.csv: the lowest label is 2, but labels count from 0" in out
    (tmp_path / "names.txt").write_text("jump\nswim\n")
    status, _, error = in_process(prepare.main, *given, "--labels", tmp_path / "names.txt")
    assert status == 2 and "names.txt; add the missing names there" in error


def test_a_folder_a_class(folder):
    listed, classes, _ = read_folder(folder)
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
    with pytest.raises(InputError, match="bare: no videos in this folder; fill or remove it or, .* --classes"):
        read_folder(tmp_path)
    assert read_folder(tmp_path, ("bare", "full")).listed == [("full/a.mp4", 1)]


def test_videos_without_a_class_folder_are_counted_with_what_to_do(tmp_path):
    for name in ("a.mp4", "b.mov", "notes.txt"):
        (tmp_path / name).touch()
    message = "2 videos in no class folder, such as a.mp4; expected a folder for each class .*prepare.py index --list"
    with pytest.raises(InputError, match=f"{message}.*predict.py -w WEIGHTS"):
        read_folder(tmp_path)


def test_classes_with_few_videos_for_validation():
    listed = [(f"{label}/{n}.mp4", label) for label, count in enumerate((60, 20)) for n in range(count)]
    warning = few_for_validation(*split_train_val(listed, 0.1), ("cat", "dog"))
    assert warning.startswith("1 of 2 classes have fewer than 5 videos for validation ('dog': 2)")
    assert "use --val-fraction 0.25" in warning
    assert not few_for_validation(*split_train_val(listed, 0.25), ("cat", "dog"))
    assert not few_for_validation(listed, [], ("cat", "dog"))
    assert few_for_validation(listed[:3], listed[3:6], ("cat",)).endswith("rough; record more videos")


def test_folders_of_splits_are_not_classes(tmp_path):
    for name in ("train/cat", "val/dog"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "a.mp4").touch()
    message = "holds train and val, which look like splits, .* folder .*/val --classes train.csv --out val.csv"
    with pytest.raises(InputError, match=message):
        read_folder(tmp_path)


@pytest.mark.slow
def test_a_split_without_a_class_keeps_the_labels_of_the_training_manifest(folder, tmp_path):
    """As a user runs it: from the manifest, and from a file of names."""
    for name in ("jump/c.avi", "run fast/a.mp4", "swim/e.mp4"):
        for part in ("train", "val"):
            if (part, name) != ("val", "jump/c.avi"):
                (tmp_path / part / name).parent.mkdir(parents=True)
                (tmp_path / part / name).symlink_to(folder / name)
    done = run_here("prepare.py", "folder", "train", "--out", "t.csv", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (tmp_path / "names.txt").write_text("jump\nrun fast\nswim\n")
    (tmp_path / "list.txt").write_text("run fast/a.mp4 1\nswim/e.mp4 2\n")
    (tmp_path / "val" / "notes.srt").touch()
    for arguments in (
        ("folder", "val", "--classes", "t.csv"),
        ("folder", "val", "--classes", "names.txt"),
        ("index", "--list", "list.txt", "--root", "val", "--classes", "t.csv"),
    ):
        done = run_here("prepare.py", *arguments, "--out", "v.csv", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert ("1 file skipped: 1 .srt" in done.stdout) == (arguments[0] == "folder")
        manifest = Manifest.read(tmp_path / "v.csv")
        assert manifest.classes == ("jump", "run fast", "swim")
        labels = {manifest[n].path: manifest[n].label for n in range(len(manifest))}
        assert labels == {"run fast/a.mp4": 1, "swim/e.mp4": 2}
    (tmp_path / "names.txt").write_text("jump\nrunfast\nswim\n")
    done = run_here("prepare.py", "folder", "val", "--classes", "names.txt", "--out", "w.csv", cwd=tmp_path)
    assert done.returncode == 2 and "val/run fast: not one of the 3 classes" in done.stderr
    assert "the nearest is 'runfast'" in done.stderr and not (tmp_path / "w.csv").exists()


def test_a_class_that_is_named_twice_is_refused(folder):
    with pytest.raises(InputError, match="--classes names 'swim' twice"):
        read_folder(folder, ("jump", "swim", "run fast", "swim"))


def test_videos_outside_the_classes_and_other_files_are_counted(folder, tmp_path):
    for name in ("a/x.mp4", "a/x.srt", "y.mp4", ".hidden/z.mp4", "a/.ipynb_checkpoints/x-checkpoint.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "loop").symlink_to(tmp_path)
    listed, classes, note = read_folder(tmp_path)
    assert listed == [("a/x.mp4", 0)] and classes == ("a",)
    assert note == (
        f"1 file skipped: 1 .srt; loop: not followed, leads back to {tmp_path}; 1 video is not in a class folder"
    )


def test_folders_that_may_not_be_meant_as_classes_are_noted(tmp_path):
    def note(*names):
        for name in names:
            (tmp_path / name).mkdir(parents=True, exist_ok=True)
            (tmp_path / name / "a.mp4").touch()
        return read_folder(tmp_path).note

    assert "such as 'cats/tame'; if these are the classes, index" in note("cats/wild", "cats/tame", "dogs/big")
    assert not note("dogs")
    assert note("val") == "val: taken as a class like the others"


@pytest.mark.slow
def test_files_of_cameras_and_other_programs_are_found_and_read(tmp_path):
    """Real ones: container and codec are what the suffix says."""
    made = [("a.MTS", "ts", "h264"), ("b.m2ts", "ts", "h264"), ("c.3g2", "3g2", "h264"), ("d.asf", "asf", "mpeg4")]
    made += [("e.ivf", "ivf", "vp9"), ("f.h264", "h264", "h264"), ("g.mk3d", "mkv", "h264"), ("h.nut", "nut", "mpeg4")]
    (tmp_path / "root" / "x").mkdir(parents=True)
    for name, container, codec in made:
        path = write_video(tmp_path / f"a.{container}", numbered(6, height=32, width=48), codec=codec)
        os.rename(path, tmp_path / "root" / "x" / name)
    done = run_here("prepare.py", "folder", "root", "--out", "m.csv", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    manifest = Manifest.read(tmp_path / "m.csv")
    found = [(manifest[n].path, manifest[n].codec) for n in range(len(manifest))]
    assert found == [(f"x/{name}", codec) for name, _, codec in made]


@pytest.mark.slow
def test_linked_videos_are_indexed(folder, tmp_path):
    """As a user runs it: a link in a class, and a class that is a link."""
    (tmp_path / "root" / "x").mkdir(parents=True)
    (tmp_path / "root" / "x" / "more").symlink_to(folder / "jump" / "deep")
    (tmp_path / "root" / "y").symlink_to(folder / "swim")
    done = run_here("prepare.py", "folder", "root", "--out", "m.csv", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    manifest = Manifest.read(tmp_path / "m.csv")
    assert [manifest[n].path for n in range(len(manifest))] == ["x/more/d.webm", "y/e.mp4", "y/f.MP4"]
    assert manifest.labels.tolist() == [0, 1, 1]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_the_good_are_kept_in_order_and_the_bad_are_named(folder, tmp_path, workers):
    listed, classes, _ = read_folder(folder)
    listed.insert(2, ("gone.mp4", 1))
    manifest, rejected = index(
        listed, root=folder, classes=classes, journal=tmp_path / "journal", pool=WorkerPool(workers=workers)
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
            [("swim/e.mp4", 3)],
            root=folder,
            classes=("a", "b", "c"),
            journal=folder / "journal",
            pool=WorkerPool(workers=1),
        )


def test_the_split_is_by_class_and_always_the_same():
    listed = [(f"{label}/{n}.mp4", label) for label, count in enumerate((40, 10, 2, 1)) for n in range(count)]
    train, val = split_train_val(listed, 0.1)
    assert (train, val) == split_train_val(listed, 0.1) and sorted(train + val) == sorted(listed)
    assert [sum(label == wanted for _, label in val) for wanted in range(4)] == [4, 1, 1, 0]
    assert split_train_val(listed, 0) == (listed, [])
    more = [(f"4/{n}.mp4", 0) for n in range(9)] + [(path, label + 1) for path, label in [*listed, ("0/new.mp4", 0)]]
    moved = {path for path, _ in split_train_val(more, 0.1)[1]} - {path for path, _ in val}
    assert len(moved) == 1 and moved.pop().startswith("4/")


@pytest.mark.slow
def test_copies_and_names_that_are_alike_are_warned_about(tmp_path, in_process):
    names = [f"{label}/{number}.mp4" for label in ("Ash", "ash") for number in range(6)]
    for number, name in enumerate(names):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_video(tmp_path / name, numbered(4 + number, height=32, width=32))
    (tmp_path / "list.csv").write_text("".join(f"{name},{name.partition('/')[0]}\n" for name in names))
    given = ("index", "--list", tmp_path / "list.csv", "--root", tmp_path, "--out", tmp_path / "out", "--workers", 1)
    status, out, _ = in_process(prepare.main, *given)
    assert status == 0 and "copies of" not in out and "warning: 'Ash' and 'ash' are two classes; if they" in out
    train, val = (Manifest.read(tmp_path / "out" / f"{name}.csv") for name in ("train", "val"))
    assert sorted(video.path for video in [*train, *val]) == names and len(val) == 2
    first, second, last = (tmp_path / train[number].path for number in (0, 1, len(train) - 1))
    shutil.copy(first, last)
    shutil.copy(tmp_path / val[0].path, second)
    _, out, _ = in_process(prepare.main, *given)
    assert f"1 with two classes, such as '{train[0].path}' and '{train[len(train) - 1].path}'" in out
    assert f"1 in both train and val, such as '{train[1].path}' and '{val[0].path}'" in out


@pytest.mark.slow
def test_a_class_whose_only_validation_video_is_broken_is_warned_about(tmp_path, in_process):
    videos = [(f"{label}/{number}.mp4", label == "birch") for label in ("ash", "birch") for number in "01"]
    for path, _ in videos:
        (tmp_path / path).parent.mkdir(exist_ok=True)
        write_video(tmp_path / path, numbered(4, height=32, width=32))
    _, ((lost, _), _) = split_train_val(videos, 0.5)
    (tmp_path / lost).write_bytes(b"broken")
    status, out, _ = in_process(prepare.main, "folder", tmp_path, "--val-fraction", 0.5, "--workers", 1)
    assert status == 0
    assert "warning: 2 of 2 classes have fewer than 5 videos for validation ('ash': 0)" in out


@pytest.mark.slow
def test_index_and_folder_as_a_user_runs_them(folder, tmp_path):
    (tmp_path / "list.txt").write_text("swim/e.mp4 0\njump/broken.mp4 1\njump/c.avi 1\n")
    (tmp_path / "names.txt").write_text("swimming\njumping\n")
    done = run_here(
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

    done = run_here("prepare.py", "folder", folder, "--out", tmp_path / "split", "--val-fraction", 0.3)
    assert done.returncode == 0, done.stderr
    train, val = (Manifest.read(tmp_path / "split" / f"{name}.csv") for name in ("train", "val"))
    assert train.classes == val.classes == ("jump", "run fast", "swim") and train.listed + val.listed == 7
    done = run_here("prepare.py", "folder", folder, "--out", tmp_path / "all.csv")
    assert done.returncode == 0 and len(Manifest.read(tmp_path / "all.csv")) == 6


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["folder", "transcode", "pack"])
def test_a_second_run_with_the_same_out_is_refused(tmp_path, verb):
    """Two runs with other settings would mix their copies, shards or splits."""
    (tmp_path / "videos" / "ash").mkdir(parents=True)
    write_video(tmp_path / "videos" / "ash" / "a.mp4", numbered(4, height=32, width=32))
    folder = ("folder", tmp_path / "videos", "--out")
    assert run_here("prepare.py", *folder, tmp_path / "all.csv").returncode == 0
    out = tmp_path / "out"
    given = (*folder, out / "all.csv") if verb == "folder" else (verb, "-m", tmp_path / "all.csv", "--out", out)
    lock = FolderLock(out, name="all.csv.lock", remedy="")
    refused = run("prepare.py", *given)  # a process may lock a file twice
    assert refused.returncode == 2 and "another process is writing there" in refused.stderr
    lock.release()
    assert run_here("prepare.py", *given).returncode == 0
    assert not list(out.glob("*.lock"))
