"""Kinetics and UCF101 under the names and in the folders that people have them in."""

import csv
import os
import random
import shutil
import signal
import string
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import pytest

from commands import prepare
from dali_pipelines import InputError, Manifest
from preparation.datasets import (
    Expected,
    Store,
    check_class_order,
    hmdb51_annotations,
    kinetics_classes,
    read_annotations,
    ssv2_annotations,
    ucf101_annotations,
)
from tests.commands import run, run_here
from tests.videos import numbered, write_video

K400 = kinetics_classes(400, [], None)
ROOT = Path(__file__).parents[2]
CLASSES = ("archery", "passing American football (in game)", "massaging person's head", "zumba")
HEADER = "label,youtube_id,time_start,time_end,split,is_cc\n"


@pytest.fixture(scope="module")
def video(tmp_path_factory) -> Path:
    return Path(write_video(tmp_path_factory.mktemp("one") / "one.mp4", numbered(6, height=32, width=48)))


def put(video: Path, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    os.link(video, path)


def rows(path: Path) -> list[list[str]]:
    return list(csv.reader(path.open()))


def test_the_400_classes_are_alphabetical():
    assert len(K400) == 400 and list(K400) == sorted(K400, key=str.lower) and K400[5] == "archery"


def test_official_annotations(tmp_path):
    (tmp_path / "some.csv").write_text(
        HEADER + "archery,-3B32lodo2M,59,69,train,0\n"
        '"passing_american football (in game)",___qijXy2f0,11,21,validate,0\nzumba,abcdefghijk,1.0,11.0,test,1\n'
    )
    assert read_annotations(tmp_path / "some.csv", K400) == [
        Expected("-3B32lodo2M_000059_000069", 5, "train"),
        Expected("___qijXy2f0_000011_000021", K400.index(CLASSES[1]), "val"),
        Expected("abcdefghijk_000001_000011", 399, "test"),
    ]


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.csv", HEADER + "archry,-3B32lodo2M,59,69,train,0\n", "a.csv:2: 'archry' is unknown; .* 'archery'"),
        ("a.csv", HEADER + "archery,-3B32lodo2M,59,69,trian,0\n", "a.csv:2: 'trian' is unknown; .* 'train'"),
        ("a.csv", HEADER + "archery,-3B32lodo2M,x,69,train,0\n", "a.csv:2: expected label, youtube_id, time_start"),
        ("a.csv", HEADER + ",-3B32lodo2M,59,69,test,0\n", "a.csv:2: no label"),
        ("a.csv", HEADER, "a.csv: no videos"),
        ("train.list", "x.mp4 400\n", "x.mp4 has label 400; expected 0 to 399"),
        ("list.txt", "x.mp4 4\n", "unknown split"),
        ("train.txt", "x.mp4,1\ny.mp4 2\n", "train.txt:2: expected `path,label`"),
        ("train.txt", "nothing\n", "train.txt:1: expected `path label`"),
    ],
)
def test_bad_annotations_are_named_with_their_line(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        read_annotations(tmp_path / name, K400)


def test_classes_of_kinetics_600_are_those_of_its_annotations(tmp_path):
    names = [f"class {number:03d}" for number in range(600)]
    lines = [f"{name},abcdefghij{n % 10},{n},{n + 10},train,0\n" for n, name in enumerate(random.sample(names, 600))]
    (tmp_path / "train.csv").write_text(HEADER + "".join(lines))
    assert kinetics_classes(600, [tmp_path / "train.csv"], None) == tuple(names)
    with pytest.raises(InputError, match="600 class names; expected 700"):
        kinetics_classes(700, [tmp_path / "train.csv"], None)
    (tmp_path / "names.txt").write_text("archery\nzumba\n")
    with pytest.raises(InputError, match="names.txt: 2 class names; expected the 600 of Kinetics-600"):
        kinetics_classes(600, [], str(tmp_path / "names.txt"))


@pytest.mark.parametrize(
    "stored",
    [
        "train/-3B32lodo2M_000059_000069.mp4",  # CVDF
        "archery/-3B32lodo2M_000059_000069.mp4",  # the crawler
        "train_256/passing_american_football/-3B32lodo2M_59_69.MKV",  # renamed, transcoded
        "-3B32lodo2M.webm",  # by id alone
        "train/-3B32lodo2M_000059_000069.mp4.mkv",  # yt-dlp
        "train/-3B32lodo2M_000059_000069.f137.mp4",
    ],
)
@pytest.mark.parametrize("listed", ["-3B32lodo2M_000059_000069", "/data/old/x/-3B32lodo2M_000059_000069.mp4"])
def test_files_are_found_under_all_their_names(video, tmp_path, stored, listed):
    put(video, tmp_path / stored)
    put(video, tmp_path / "x" / "-3B32lodo2M_000159_000169.mp4")  # another clip of the same video
    put(video, tmp_path / "x" / "._-3B32lodo2M_000059_000069.mp4")
    found = Store(tmp_path).find([Expected(listed, 5, "train"), Expected("gone", 1, "train")])["train"]
    assert found.listed == [(stored, 5)] and [each.name for each in found.missing] == ["gone"]


def test_videos_below_a_url_are_found_as_well(video):
    memory = fsspec.filesystem("memory")
    for name in ("k400/val/-3B32lodo2M_000059_000069.mp4", "k400/archery/notes.txt", "k400/x/y/___qijXy2f0.mkv"):
        memory.pipe(name, video.read_bytes())
    names = "-3B32lodo2M_000059_000069", "___qijXy2f0_000011_000021"
    found = Store("memory://k400").find([Expected(name, label, "val") for label, name in enumerate(names)])
    assert found["val"].listed == [("val/-3B32lodo2M_000059_000069.mp4", 0), ("x/y/___qijXy2f0.mkv", 1)]
    with pytest.raises(InputError, match="memory://nowhere: no videos in it"):
        Store("memory://nowhere")


def test_a_file_with_the_id_alone_is_of_no_clip_where_there_are_two(video, tmp_path):
    put(video, tmp_path / "-3B32lodo2M.mp4")
    clips = [Expected(f"-3B32lodo2M_{start:06d}_{start + 10:06d}", 5, "train") for start in (59, 159)]
    assert Store(tmp_path).find(clips)["train"].missing == clips


def test_replacements_and_the_own_split_come_first_and_others_are_copies(video, tmp_path):
    name = "-3B32lodo2M_000059_000069"
    places = ["replacement_for_corrupted_k400", "val", "all", "train"]
    for place in places:
        put(video, tmp_path / place / f"{name}.mp4")
    (tmp_path / "all" / "loop").symlink_to(tmp_path)
    for split, order in (("train", (0, 3, 2, 1)), ("val", (0, 1, 2, 3))):
        found = Store(tmp_path).find([Expected(name, 5, split)])[split]
        (path, _), *_ = found.listed
        assert [Path(each).parent.name for each in (path, *found.copies[path])] == [places[n] for n in order]


def test_a_list_that_counts_classes_in_another_order_is_refused(video, tmp_path):
    names = ("abseiling", "archery", "zumba")
    for name in names:
        put(video, tmp_path / name.upper() / f"{name}.mp4")
    good = [Expected(f"{name}.mp4", K400.index(name), "train") for name in names]
    check_class_order(Store(tmp_path).find(good)["train"], K400, "train.list")
    wrong = [each._replace(label=number) for number, each in enumerate(good)]
    with pytest.raises(InputError, match=r"another order: ARCHERY/archery.mp4 has label 1 \('air drumming'\), .* 5; 2"):
        check_class_order(Store(tmp_path).find(wrong)["train"], K400, "train.list")


def clip_names(count: int) -> list[tuple[str, int]]:
    """(YouTube id, start): ids with - and _ at the places where they hurt."""
    rng = random.Random(0)
    letters = string.ascii_letters + string.digits + "-_"
    return [("-_"[n % 2] + "".join(rng.choices(letters, k=10)), rng.randrange(3000)) for n in range(count)]


@pytest.fixture
def kinetics(video, tmp_path) -> Path:
    """Sixty clips in three naming schemes, a sixth damaged, some missing, some twice, and their annotations."""
    lines = {"train": [], "val": []}
    for number, (name, start) in enumerate(clip_names(60)):
        split, label = ("val" if number % 6 == 5 else "train"), CLASSES[number % 4]
        lines[split].append(f'"{label}",{name},{start},{start + 10},{"validate" if split == "val" else split},0\n')
        file = f"{name}_{start:06d}_{start + 10:06d}.mp4"
        path = (
            tmp_path
            / "videos"
            / [f"{split}/{file}", f"{split}/{label.replace(' ', '_')}/{file}", f"byid/{name}.mp4"][number % 3]
        )
        if number % 15 == 14:
            continue
        put(video, path)
        if number % 10 == 1:
            path.unlink()
            path.write_bytes([b"", b"not a video" * 100, video.read_bytes()[:300]][number // 10 % 3])
        if number in (21, 30):  # 21 is damaged, and there is a good one
            put(video, tmp_path / "videos" / "copies" / file)
    for split, each in lines.items():
        (tmp_path / f"k400_{split}.csv").write_text(HEADER + "".join(each))
    return tmp_path


@pytest.mark.slow
def test_kinetics_as_a_user_runs_it(kinetics):
    command = ["prepare.py", "kinetics400", "--annotations", "k400_train.csv", "k400_val.csv", "--videos", "videos"]
    done = run(*command, cwd=kinetics)
    assert done.returncode == 0, done.stderr
    assert "train: 50 expected, 48 found (2 more than once), 2 missing" in done.stdout
    assert "val: 10 expected, 8 found (0 more than once), 2 missing" in done.stdout
    out = kinetics / "data" / "k400"
    train, val = Manifest.read(out / "train.csv"), Manifest.read(out / "val.csv")
    assert train.classes == K400 and {K400[label] for label in train.labels} == set(CLASSES)
    assert (train.listed, len(train), train.rejected) == (50, 45, 5) and (val.listed, len(val)) == (10, 6)
    assert [row[1] for row in rows(out / "train.missing.csv")[1:]] == [CLASSES[14 % 4], CLASSES[44 % 4]]
    assert sorted(Path(row[1]).parent.name for row in rows(out / "train.duplicated.csv")[1:]) == ["copies", "copies"]
    assert len(rows(out / "train.rejected.csv")) == 1 + 3 and len(rows(out / "val.rejected.csv")) == 1 + 2
    assert all((kinetics / "videos" / train[row].path).stat().st_size > 1000 for row in range(len(train)))
    assert any(train[row].path.startswith("copies") for row in range(len(train)))  # for the damaged one
    assert train.made_by.startswith("prepare.py kinetics400 --annotations k400_train.csv")
    text = (out / "train.csv").read_text()
    assert run_here(*command, cwd=kinetics).returncode == 0 and (out / "train.csv").read_text() == text

    shutil.copy(kinetics / "k400_train.csv", out / "train.csv")
    done = run_here(*command, cwd=kinetics)
    assert done.returncode == 2 and "train.csv: exists and is not a manifest" in done.stderr


@pytest.mark.slow
def test_killed_and_started_again_it_writes_the_same(kinetics):
    command = [sys.executable, ROOT / "prepare.py", "kinetics400", "--annotations", "k400_train.csv", "--videos"]
    command += ["videos", "--verify", "decode"]
    subprocess.run([*command, "--out", "unbroken"], cwd=kinetics, check=True, stdout=subprocess.DEVNULL)
    journal, kills = kinetics / "broken" / "train.csv.journal", 0
    while not (kinetics / "broken" / "train.csv").exists():
        before = len(journal.read_bytes().splitlines()) if journal.exists() else 0
        process = subprocess.Popen([*command, "--out", "broken"], cwd=kinetics, stdout=subprocess.DEVNULL)
        while process.poll() is None:
            time.sleep(0.002)
            if kills < 3 and journal.exists() and len(journal.read_bytes().splitlines()) > before + 5:
                process.send_signal(signal.SIGKILL)
                process.wait()
                kills += 1
    assert kills == 3 and not journal.exists()
    for name in ("train.csv", "train.rejected.csv", "train.missing.csv", "train.duplicated.csv"):
        texts = [(kinetics / folder / name).read_text() for folder in ("unbroken", "broken")]
        assert texts[0].replace("unbroken", "broken") == texts[1]


@pytest.mark.slow
def test_parts_of_a_slurm_array_merge(kinetics):
    command = ["prepare.py", "kinetics400", "--annotations", "k400_train.csv", "--videos", "videos", "--out", "parts"]
    for part in (1, 0):
        done = run_here(*command, "--shard", f"{part}/2", cwd=kinetics)
        assert f"part {part} of 2 is done" in done.stdout and not (kinetics / "parts" / "train.csv").exists()
    shutil.move(kinetics / "videos", kinetics / "elsewhere")  # nothing is looked at again
    (kinetics / "videos").mkdir()
    for path in (kinetics / "elsewhere").rglob("*.mp4"):
        empty = kinetics / "videos" / path.relative_to(kinetics / "elsewhere")
        empty.parent.mkdir(parents=True, exist_ok=True)
        empty.touch()
    done = run_here(*command, cwd=kinetics)
    assert done.returncode == 0 and len(Manifest.read(kinetics / "parts" / "train.csv")) == 45
    assert not list((kinetics / "parts").glob("*journal*"))


@pytest.mark.slow
def test_a_folder_of_something_else_is_said(video, tmp_path):
    put(video, tmp_path / "videos" / "holiday.mp4")
    (tmp_path / "train.csv").write_text(HEADER + "archery,-3B32lodo2M,59,69,train,0\n")
    command = ["prepare.py", "kinetics400", "--annotations", "train.csv", "--videos"]
    done = run_here(*command, "videos", cwd=tmp_path)
    assert done.returncode == 2 and "none of the train videos is below videos; expected names such as" in done.stderr
    assert "1 other videos below videos are not in these annotations" in done.stdout
    done = run_here(*command, "nowhere", cwd=tmp_path)
    assert done.returncode == 2 and "nowhere: no such folder of videos" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["{parent}/{name}", "{name}", "UCF-101/{parent}/{name}"])
def test_ucf101_as_a_user_runs_it(video, tmp_path, layout):
    classes = read_labels_of_ucf101()
    splits = tmp_path / "ucfTrainTestlist"
    splits.mkdir()
    (splits / "classInd.txt").write_text("".join(f"{number} {name}\r\n" for number, name in enumerate(classes, 1)))
    train = ["ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi", "YoYo/v_YoYo_g08_c01.avi", "YoYo/v_YoYo_g09_c01.avi"]
    test = ["ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi"]
    (splits / "trainlist02.txt").write_text(f"{train[0]} 1\r\n{train[1]} 101\r\n{train[2]} 101\r\n")
    (splits / "testlist02.txt").write_text(f"{test[0]}\r\n")
    for path in map(Path, train[:2] + test):
        put(video, tmp_path / "videos" / layout.format(parent=path.parent, name=path.name))
    done = run_here("prepare.py", "ucf101", "--splits", splits, "--videos", "videos", "--split", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "train: 3 expected, 2 found (0 more than once), 1 missing" in done.stdout
    found, val = (Manifest.read(tmp_path / "data" / "ucf101_split2" / f"{name}.csv") for name in ("train", "val"))
    assert found.classes == classes and found.labels.tolist() == [0, 100] and val.labels.tolist() == [0]
    assert rows(tmp_path / "data" / "ucf101_split2" / "train.missing.csv")[1] == [train[2], "YoYo"]
    with pytest.raises(FileNotFoundError, match="trainlist01"):
        ucf101_annotations(splits, 1)


def read_labels_of_ucf101() -> tuple[str, ...]:
    return tuple((ROOT / "configs" / "labels" / "ucf101.txt").read_text().splitlines())


@pytest.fixture
def hmdb51(tmp_path) -> Path:
    """Split 2 of 51 classes with one video each for training, testing and neither."""
    folder = tmp_path / "splits"
    folder.mkdir()
    for number in range(51):
        name = f"class_{number:02d}"
        lines = [f"{name}_np1_{part}.avi {part} \n" for part in (1, 2, 0)]
        (folder / f"{name}_test_split2.txt").write_text("".join(lines))
    return folder


@pytest.mark.slow
def test_hmdb51_as_a_user_runs_it(video, hmdb51, tmp_path, in_process):
    for name in ("class_00/class_00_np1_1.avi", "class_50/class_50_np1_2.avi", "class_03/class_03_np1_0.avi"):
        put(video, tmp_path / "hmdb51_org" / name)
    given = ("--splits", hmdb51, "--videos", tmp_path / "hmdb51_org", "--split", 2, "--out", tmp_path, "--workers", 1)
    status, out, _ = in_process(prepare.main, "hmdb51", *given)
    assert status == 0 and "train: 51 expected, 1 found (0 more than once), 50 missing" in out
    assert "1 other videos below" in out  # the one that the split leaves out
    train, val = (Manifest.read(tmp_path / f"{name}.csv") for name in ("train", "val"))
    assert train.classes == val.classes and train.classes[50] == "class_50"
    assert train.labels.tolist() == [0] and val.labels.tolist() == [50]


def test_bad_splits_of_hmdb51(hmdb51):
    with pytest.raises(InputError, match="0 files CLASS_test_split1.txt; expected 51"):
        hmdb51_annotations(hmdb51, 1)
    (hmdb51 / "class_07_test_split2.txt").write_text("a.avi 1\nb.avi 3\n")
    with pytest.raises(InputError, match="class_07_test_split2.txt:2: expected `VIDEO.avi 0|1|2`"):
        hmdb51_annotations(hmdb51, 2)


SSV2_LABELS = '{"Holding something next to something": "0", "Pushing something from left to right": "1"}'


@pytest.mark.slow
def test_ssv2_as_a_user_runs_it(video, tmp_path, in_process):
    (tmp_path / "labels.json").write_text(SSV2_LABELS)
    pushing = '"template": "Pushing [something] from left to right", "placeholders": ["a cup"]}'
    (tmp_path / "something-something-v2-train.json").write_text(
        '[{"id": "78687", "label": "holding potato next to bottle", '
        '"template": "Holding [something] next to [something]", "placeholders": ["potato", "bottle"]}, '
        f'{{"id": "42326", "label": "pushing a cup from left to right", {pushing}]'
    )
    (tmp_path / "something-something-v2-validation.json").write_text(f'[{{"id": "7", "label": "x", {pushing}]')
    for name in ("78687.webm", "7.webm"):
        put(video, tmp_path / "videos" / name)
    files = [tmp_path / f"something-something-v2-{name}.json" for name in ("train", "validation")]
    given = ("--annotations", *files, "--labels", tmp_path / "labels.json", "--videos", tmp_path / "videos")
    status, out, error = in_process(prepare.main, "ssv2", *given, "--out", tmp_path, "--workers", 1)
    assert status == 0, error
    assert "train: 2 expected, 1 found (0 more than once), 1 missing" in out and "-o data.flip=false" in out
    train, val = (Manifest.read(tmp_path / f"{name}.csv") for name in ("train", "val"))
    assert train.classes[1] == "Pushing something from left to right"
    assert train.labels.tolist() == [0] and val.labels.tolist() == [1]


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("train.json", "[", "train.json: not JSON"),
        ("train.json", '{"a": 1}', "expected a list of videos"),
        ("train.json", '[{"id": "../x", "template": "a"}]', "entry 0: expected an object with the `id`"),
        ("train.json", '[{"id": "1", "template": "Holding [cup]"}]', "entry 0: 'holding cup' is unknown; the nearest"),
        ("test.json", '[{"id": "1"}]', "the test list has none: leave it out"),
    ],
)
def test_bad_annotations_of_ssv2(tmp_path, name, text, message):
    (tmp_path / "labels.json").write_text(SSV2_LABELS)
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        ssv2_annotations([tmp_path / name], tmp_path / "labels.json")
