"""Shards of videos: what is in them, that WebDataset reads them, and that nothing is lost, doubled or half written."""

import gzip
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections import namedtuple
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import webdataset

import preparation.pack as pack_module
from common.config import load_config, preprocessing
from common.weights import Weights, build_network, save_weights
from common.worker_pool import WorkerPool
from dali_pipelines import InputError, Manifest
from dali_pipelines.files import read_bytes
from dali_pipelines.manifest import Video
from dali_pipelines.probe import probe
from preparation.pack import pack
from tests.commands import CONFIG, PROJECT, run_here
from tests.videos import textured, write_video

pytestmark = pytest.mark.slow

CLASSES = ("ash", "birch", "cedar", "ä")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A manifest of forty files of random bytes, ten of each class one after the other, with names that need care."""
    folder = tmp_path_factory.mktemp("source")
    rng = np.random.default_rng(0)
    videos = []
    for number in range(40):
        name = f"{CLASSES[number // 10]}/v.{number} x.{('mp4', 'AVI', 'webm', 'dat')[number % 4]}"
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(rng.bytes(10_000 + 100 * number))
        videos.append(Video(name, number // 10, 20 + number, 25.0, 64, 48, "h264", 0, "yuv420p", 0, 12))
    Manifest(videos, root=folder, classes=CLASSES, rejected=2).write(folder / "train.csv")
    return folder / "train.csv"


def packed(source: Path, out: Path, **changes):
    return pack(source, out, **(dict(shard_bytes=100_000, pool=WorkerPool(workers=1)) | changes))


def shards(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.glob("*.tar"))}


def inodes(out: Path) -> dict[str, tuple[int, int]]:
    """With the time of writing: numbers are used again."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in sorted(out.glob("*.tar"))}


def check(made: Manifest, source: Path, missing=()) -> None:
    """Every row, in order, with the bytes of its file."""
    original = Manifest.read(source)
    rows = [row for row in range(len(original)) if row not in missing]
    assert len(made) == len(rows) and made.classes == original.classes
    assert made.rejected == original.rejected + len(missing)
    for place, row in enumerate(rows):
        assert made[place]._replace(shard="", offset=0, size=0) == original[row]._replace(shard="", offset=0, size=0)
        assert read_bytes(made.source(place)) == read_bytes(original.source(row))


@pytest.mark.parametrize("workers", [1, 3])
def test_every_row_and_equal_bytes_for_equal_videos(source, tmp_path, workers):
    for name in ("one", "two"):
        made, rejected = packed(source, tmp_path / name, pool=WorkerPool(workers=workers))
        assert not rejected
        check(made, source)
    assert shards(tmp_path / "one") == shards(tmp_path / "two")
    assert 4 < len(made.shards) < 8 and all(len(data) <= 110_000 for data in shards(tmp_path / "one").values())
    assert not list(tmp_path.rglob("*.part"))


def test_webdataset_reads_them(source, tmp_path):
    made, _ = packed(source, tmp_path)
    samples = list(webdataset.WebDataset([str(tmp_path / name) for name in shards(tmp_path)], shardshuffle=False))
    assert len({sample["__key__"] for sample in samples}) == len(samples) == len(made)
    rows = {made[row].path: row for row in range(len(made))}
    for sample in samples:
        facts = json.loads(sample["json"])
        video = made[rows.pop(facts["path"])]
        suffix = {"mp4": "mp4", "AVI": "avi", "webm": "webm", "dat": "mp4"}[video.path.rpartition(".")[2]]
        assert sample[suffix] == (source.parent / video.path).read_bytes()
        assert int(sample["cls"]) == facts["label"] == video.label and facts["class"] == CLASSES[video.label]
        assert (facts["frames"], facts["codec"], facts["gop"]) == (video.frames, "h264", 12)
    assert not rows
    labels = [int(sample["cls"]) for sample in samples]
    assert sum(a != b for a, b in pairwise(labels)) > 20  # 3 in the order of the manifest


def test_a_second_run_writes_nothing_even_without_the_videos(source, tmp_path):
    shutil.copytree(source.parent, tmp_path / "in")
    packed(tmp_path / "in" / "train.csv", tmp_path / "out")
    before = inodes(tmp_path / "out")
    for name in CLASSES:
        shutil.rmtree(tmp_path / "in" / name)
    made, rejected = packed(tmp_path / "in" / "train.csv", tmp_path / "out")
    assert inodes(tmp_path / "out") == before and not rejected and len(made) == 40


def test_shards_are_known_again_and_damaged_ones_written_again(source, tmp_path):
    """As after a kill between the shard's name and the note that it is done."""
    packed(source, tmp_path)
    before, data = inodes(tmp_path), shards(tmp_path)
    names = list(before)
    (tmp_path / names[0]).unlink()
    os.truncate(tmp_path / names[1], 50_000)
    (tmp_path / names[2]).write_bytes(data[names[2]][:3000] + b"x" + data[names[2]][3001:])
    (tmp_path / "train.csv").touch()
    (tmp_path / "train.journal").unlink()
    made, _ = packed(source, tmp_path)
    check(made, source)
    assert shards(tmp_path) == data
    assert [name for name in names if inodes(tmp_path)[name] == before[name]] == names[3:]
    assert not (tmp_path / "train.csv").exists()  # it may speak of what was there before
    os.truncate(tmp_path / names[4], 50_000)  # noted as done
    packed(source, tmp_path)
    assert shards(tmp_path) == data


def _doubled(data: bytes) -> bytes:
    size = 512 + -(-int(data[124:135], 8) // 512) * 512  # of the first member
    return data[:size] + data


def _linked(data: bytes) -> bytes:
    info = tarfile.TarInfo("../../outside")
    info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
    return info.tobuf(tarfile.GNU_FORMAT) + data


@pytest.mark.parametrize("change", [gzip.compress, _doubled, _linked, None], ids=["gzip", "twice", "link", "pipe"])
def test_a_shard_that_is_none_of_ours_is_written_again(source, tmp_path, change):
    """Rows say where in the bytes of the file a video is, so it must be the tar itself."""
    packed(source, tmp_path)
    data, name = shards(tmp_path), next(iter(shards(tmp_path)))
    (tmp_path / name).unlink()
    (tmp_path / name).write_bytes(change(data[name])) if change else os.mkfifo(tmp_path / name)
    (tmp_path / "train.csv").touch()
    (tmp_path / "train.journal").unlink()
    made, _ = packed(source, tmp_path)
    check(made, source)
    assert shards(tmp_path) == data


def test_gone_and_changed_videos_are_named_and_left_out(source, tmp_path):
    shutil.copytree(source.parent, tmp_path / "in")
    source, out = tmp_path / "in" / "train.csv", tmp_path / "out"
    original = Manifest.read(source)
    os.remove(original.file(3))
    packed(source, out, pool=WorkerPool(workers=1, shard=(0, 2)))  # every second shard; all sizes are known
    os.rename(out / "train.journal.sizes-0-of-2", out / "train.journal.sizes-0-of-1")
    waiting = sorted(set(range(40)) - {3} - {int(name[:8]) for name in members(out)})
    grown, gone = waiting[:2]
    with open(original.file(grown), "ab") as file:
        file.write(b"more")
    os.remove(original.file(gone))
    made, rejected = packed(source, out)
    check(made, source, missing=(3, grown, gone))
    reasons = {entry.path: entry.reason for entry in rejected}
    assert [entry.path for entry in rejected] == [original[row].path for row in sorted((3, grown, gone))]
    assert reasons[original[3].path] == reasons[original[gone].path] == "no such file or directory"
    size = 10_000 + 100 * grown
    assert reasons[original[grown].path] == f"changed while it was packed: {size} bytes before, {size + 4} now"
    assert [row for row in range(40) if not [name for name in members(out) if int(name[:8]) == row]] == sorted(
        (3, grown, gone)
    )
    made.write(out / "train.csv")  # as the command does
    (out / "train.journal").unlink()  # shards that lack a video are known again, too
    before = inodes(out)
    packed(source, out)
    assert inodes(out) == before


def members(out: Path) -> list[str]:
    names = [str(out / name) for name in shards(out)]
    return [sample["__key__"] for sample in webdataset.WebDataset(names, shardshuffle=False)] if names else []


def test_parts_on_several_machines(source, tmp_path):
    for part in (1, 0):
        assert packed(source, tmp_path, pool=WorkerPool(workers=1, shard=(part, 2))) == (None, [])
    before = inodes(tmp_path)
    made, _ = packed(source, tmp_path)
    check(made, source)
    assert inodes(tmp_path) == before


def test_shards_of_another_size(source, tmp_path):
    first, _ = packed(source, tmp_path / "out")
    first.write(tmp_path / "out" / "train.csv")
    again, _ = packed(tmp_path / "out" / "train.csv", tmp_path / "again", shard_bytes=250_000)
    check(again, source)
    assert len(again.shards) < len(first.shards)
    (tmp_path / "out" / "train-1.tar").touch()  # not ours
    larger, _ = packed(source, tmp_path / "out", shard_bytes=250_000)
    check(larger, source)
    assert shards(tmp_path / "out") == shards(tmp_path / "again") | {"train-1.tar": b""}
    with pytest.raises(InputError, match="holds the videos to pack.*name another folder"):
        packed(source, source.parent)
    larger.write(tmp_path / "elsewhere.csv")
    with pytest.raises(InputError, match="holds the videos to pack"):
        packed(tmp_path / "elsewhere.csv", tmp_path / "out")


def test_a_disk_that_is_too_small_is_said_before_anything_is_written(source, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(pack_module.shutil, "disk_usage", lambda path: usage(0, 0, 400_000))
    with pytest.raises(InputError, match=r"the shards need 0\.\d GB, its disk has 0\.\d GB free; name a folder"):
        packed(source, tmp_path)
    assert not shards(tmp_path) and not list(tmp_path.glob("*.part"))
    monkeypatch.setattr(pack_module.shutil, "disk_usage", lambda path: usage(0, 0, 700_000))
    packed(source, tmp_path)
    monkeypatch.setattr(pack_module.shutil, "disk_usage", lambda path: usage(0, 0, 0))
    packed(source, tmp_path)  # nothing left to write
    assert sum(map(len, shards(tmp_path).values())) < 700_000


def test_what_cannot_be_written_leaves_nothing_and_is_tried_again(source, tmp_path, monkeypatch):
    files = sorted(packed(source, tmp_path / "good")[0].shards)
    os.mkdir(tmp_path / "out")
    os.mkdir(tmp_path / "out" / files[1])  # in the way
    with pytest.raises(InputError, match=f"{files[1]}: .*directory.*; run the same command again to resume"):
        packed(source, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.part"))
    os.rmdir(tmp_path / "out" / files[1])
    made, _ = packed(source, tmp_path / "out")
    check(made, source)

    def other(shard, name, data):
        return add(shard, name, data[:-1] + b"?")

    add = pack_module._add
    monkeypatch.setattr(pack_module, "_add", other)
    arguments = [str(source), hashlib.sha256(source.read_bytes()).hexdigest(), str(tmp_path / "a-000000.tar")]
    with pytest.raises(InputError, match="written at byte 512 differs when read back"):
        pack_module.write(*arguments, [0], [10_000])
    assert not list(tmp_path.glob("a-*"))


def test_killed_anywhere_it_goes_on(source, tmp_path):
    """kill -9 as soon as one more shard is there, again and again."""
    command = [sys.executable, str(PROJECT / "prepare.py"), "pack", "-m", str(source), "--out", str(tmp_path / "out")]
    command += ["--shard-size", "0.00003", "--workers", "1"]
    seen: dict[str, tuple[int, int]] = {}
    kills = 0
    for _ in range(40):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        while process.poll() is None:
            if kills < 4 and len(inodes(tmp_path / "out")) > len(seen):
                process.send_signal(signal.SIGKILL)
                process.wait()
                kills += 1
            time.sleep(0.002)
        found = inodes(tmp_path / "out")
        assert seen.items() <= found.items()
        seen = found
        if process.returncode == 0:
            break
    made = Manifest.read(tmp_path / "out" / "train.csv")
    check(made, source)
    assert kills == 4 and len(seen) == len(made.shards) > 12
    assert not list((tmp_path / "out").glob("*.part")) and "prepare.py pack" in made.made_by


def test_packed_videos_are_evaluated_as_plain_ones(tmp_path):
    videos = []
    for number, (codec, suffix) in enumerate([("h264", "mp4"), ("vp9", "webm"), ("mpeg4", "avi")]):
        path = write_video(tmp_path / f"{number}.{suffix}", textured(12, height=40, width=56, seed=number), codec=codec)
        videos.append(probe(path)._replace(path=os.path.basename(path), label=number))
    (tmp_path / "gone.mp4").touch()
    videos.append(videos[0]._replace(path="gone.mp4"))
    Manifest(videos, root=tmp_path, classes=CLASSES[:3]).write(tmp_path / "val.csv")
    os.remove(tmp_path / "gone.mp4")
    done = run_here("prepare.py", "pack", "-m", "val.csv", "--out", "packed", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "gone.mp4: no such file or directory" in done.stdout
    assert "packed/val.csv: 3 of 4 videos in 1 shards" in done.stdout
    assert (tmp_path / "packed" / "val.rejected.csv").read_text().splitlines()[1] == (
        "gone.mp4,0,no such file or directory"
    )
    Manifest(videos[:3], root=tmp_path, classes=CLASSES[:3], rejected=1).write(tmp_path / "val.csv")
    (tmp_path / "c.yaml").write_text(CONFIG.format(folder=tmp_path))
    config = load_config(str(tmp_path / "c.yaml"))
    network = build_network(config.model, preprocessing(config.data), 3)
    weights = Weights(vars(config.model), preprocessing(config.data), CLASSES[:3], network.state_dict())
    save_weights(tmp_path / "w.safetensors", weights)
    reports = [
        run_here("evaluate.py", "-w", "w.safetensors", "-c", "c.yaml", "-o", f"data.test={name}", cwd=tmp_path)
        for name in ("val.csv", "packed/val.csv")
    ]
    assert [done.returncode for done in reports] == [0, 0], reports[1].stderr
    assert reports[0].stdout == reports[1].stdout and "3 videos evaluated, 0 unreadable" in reports[0].stdout


def test_a_root_for_where_the_shards_will_lie(source, tmp_path):
    for root in ("s3://bucket//k400", "/somewhere/else"):
        done = run_here("prepare.py", "pack", "-m", source, "--out", tmp_path, "--root", root)
        assert done.returncode == 0, done.stderr
        made = Manifest.read(tmp_path / "train.csv")
        assert str(made.root) == root and made.file(0) == f"{root}/train-000000.tar: {made[0].path}"


def test_shards_of_somebody_else_are_not_overwritten(source, tmp_path):
    theirs = tmp_path / "out" / "train-000001.tar"
    theirs.parent.mkdir()
    theirs.write_bytes(b"years of work")
    with pytest.raises(
        InputError, match=r"train-000001.tar: exists, and was not packed from .*train.csv; name another"
    ):
        packed(source, tmp_path / "out")
    assert theirs.read_bytes() == b"years of work" and len(os.listdir(theirs.parent)) == 1
