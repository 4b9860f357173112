"""Copies of videos that decode fast: the same frames, the same labels, groups as asked for, nothing done twice.

python -m pytest tests/preparation/test_transcode.py
"""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from common.child_process import end_children
from common.worker_pool import WorkerPool
from dali_pipelines import InputError, Manifest
from dali_pipelines.files import open_video
from dali_pipelines.host_decoder import decode_frames
from dali_pipelines.manifest import Video, coded_size
from dali_pipelines.packets import PacketReader
from dali_pipelines.probe import probe
from preparation import transcode
from preparation.transcode import CODECS, Job, Settings, copy_size, target_names
from tests.commands import PROJECT, run_here
from tests.videos import ENCODERS, decode_all, edit_packets, numbered, read_numbers, set_matrix, textured, write_video

GOP = 8


def make(folder: Path, name: str, frames: list[np.ndarray], **settings) -> list:
    """Writes a video and makes its copy in this process: (original as probed, copy as probed, path of the copy)."""
    video = probe(write_video(folder / name, frames, **settings))
    return copy(folder, video)


def copy(folder: Path, video, *, codec: str = "h264", short_side: int = 64, crf: int | None = None, gop: int = GOP):
    settings = {"short_side": short_side, "gop": gop, "codec": codec, "crf": CODECS[codec].crf if crf is None else crf}
    suffix = CODECS[codec].suffix
    arguments = ([video.path], list(video._replace(path="v")), str(folder / "out"), f"v{suffix}", settings)
    made = transcode.transcode(*arguments)
    return video, made.video, folder / "out" / f"v{suffix}"


def numbers(path: str | Path) -> list[int]:
    return read_numbers(decode_all(path).transpose(3, 0, 1, 2) / 255)


def write_manifest(folder: Path, names: list[str], *, classes: tuple[str, ...] = ("ash", "birch", "cedar")) -> Path:
    videos = [probe(folder / name)._replace(path=name, label=(2 * n) % 3) for n, name in enumerate(names)]
    Manifest(videos, root=folder, classes=classes, rejected=2).write(folder / "all.csv")
    return folder / "all.csv"


def command(folder: Path, *arguments: object, out: str = "out") -> subprocess.CompletedProcess:
    return run_here(
        "prepare.py", "transcode", "-m", folder / "all.csv", "--out", folder / out, "--short-side", 32, *arguments
    )


def files(folder: Path) -> dict[str, tuple[int, int]]:
    """Inodes and times of change."""
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.suffix not in (".csv", ".packets") and ".journal" not in path.name and path.is_file()
    }


@pytest.fixture
def folder(tmp_path) -> Path:
    """Five videos of three kinds and a manifest of them."""
    frames = numbered(12, height=48, width=64)
    for name in ("a/1.mp4", "a/2, b.avi", "b/1.webm", "b/ä.mkv", "c.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_video(tmp_path / name, frames, codec={".avi": "mpeg4", ".webm": "vp9"}.get(Path(name).suffix, "h264"))
    write_manifest(tmp_path, ["c.mp4", "a/1.mp4", "a/2, b.avi", "b/1.webm", "b/ä.mkv"])
    yield tmp_path
    end_children()


@pytest.mark.slow
@pytest.mark.parametrize("codec", CODECS)
def test_every_codec_frames_one_to_one_in_closed_groups_that_selection_understands(tmp_path, codec):
    video = probe(write_video(tmp_path / "v.mp4", numbered(53, height=64, width=96), codec="h264"))
    _, made, path = copy(tmp_path, video, codec=codec)
    assert numbers(path) == list(range(53))
    assert (made.frames, made.fps, made.width, made.height, made.codec) == (53, 25.0, 96, 64, codec)
    assert made.pixel_format == CODECS[codec].pixel_format and not made.vfr
    with open_video(path) as container:
        assert not container.streams.audio
        reader = PacketReader(container)
        assert len(reader.shown()) == 53
    starts = [number for number, header in enumerate(reader.headers) if header.starts_group]
    assert np.diff([*starts, len(reader.headers)]).max() == made.gop == (1 if codec == "mjpeg" else GOP)
    assert not any(header.is_leading or not header.is_shown for header in reader.headers)
    assert codec == "vp9" or np.mean([header.is_disposable for header in reader.headers]) > 0.5
    positions = np.array([0, 7, 8, 13, 30, 47, 51, 52])
    decoded = decode_frames(path, positions, size=coded_size(made))
    assert decoded.fallback == "" and decoded.packets_kept < (40 if codec == "vp9" else 30)
    assert np.array_equal(decoded.frames, decode_all(path)[positions])


@pytest.mark.parametrize("codec", ["h264", "mjpeg"])
@pytest.mark.parametrize("mirrored", [0, 1])
@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
def test_turned_and_mirrored_videos_are_so_for_good(tmp_path, rotation, mirrored, codec):
    path = write_video(tmp_path / "v.mp4", textured(3, height=48, width=80, seed=rotation))
    a, b = {0: (1, 0), 90: (0, -1), 180: (-1, 0), 270: (0, 1)}[rotation]
    set_matrix(path, [-a, -b, -b, a] if mirrored else [a, b, -b, a])
    original = probe(path)
    assert (original.rotation, original.mirrored) == (rotation, mirrored)
    _, made, path = copy(tmp_path, original, codec=codec, crf=1)
    assert (made.rotation, made.mirrored) == (0, 0)
    assert (made.height, made.width) == (original.height, original.width)
    frames = decode_all(original.path)
    shown = np.rot90(frames[:, :, ::-1] if mirrored else frames, rotation // 90, axes=(1, 2))
    assert np.abs(decode_all(path).astype(int) - shown).mean() < 5


@pytest.mark.parametrize(
    ("size", "short_side", "expected"),
    [((95, 127), 256, (94, 126)), ((127, 95), 64, (84, 64)), ((96, 171), 48, (48, 84)), ((37, 36), 20, (20, 20))],
)
def test_sides_are_even_and_never_enlarged(tmp_path, size, short_side, expected):
    video = probe(write_video(tmp_path / "v.webm", numbered(4, height=size[0], width=size[1]), codec="vp9"))
    assert copy_size(video, short_side) == expected
    _, made, path = copy(tmp_path, video, short_side=short_side)
    assert (made.height, made.width) == expected
    assert numbers(path) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("name", "settings"),
    {
        "uneven times": ("v.mp4", {"times": np.cumsum(np.arange(40) % 4 + 1).tolist()}),
        "open groups": ("v.mkv", {"options": {"x264-params": "keyint=10:bframes=3:open-gop=1"}}),
        "B-frames in AVI": ("v.avi", {"codec": "mpeg4", "options": {"bf": "2"}}),
        "another rate": ("v.webm", {"codec": "vp9", "fps": Fraction(30000, 1001)}),
        "one frame": ("one.mp4", {}),
    }.values(),
)
def test_frame_k_stays_frame_k(tmp_path, name, settings):
    count = 1 if name == "one.mp4" else 40
    original, made, path = make(tmp_path, name, numbered(count, height=48, width=64), **settings)
    assert numbers(path) == numbers(original.path) == list(range(count))
    assert made.fps == pytest.approx(original.fps, rel=1e-4)
    assert not made.vfr
    with open_video(path) as container:
        reader = PacketReader(container)
        reader.shown()
    assert [n for n, header in enumerate(reader.headers) if header.starts_group] == list(range(0, count, GOP))


def test_an_edit_list_cuts_what_it_cuts(tmp_path):
    whole = write_video(tmp_path / "whole.mp4", numbered(30, height=48, width=64))
    with av.open(whole) as source, av.open(str(tmp_path / "v.mp4"), "w") as out:
        stream = out.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                packet.pts, packet.dts = packet.pts - 5 * packet.duration, packet.dts - 5 * packet.duration
                out.mux(packet)
    video = probe(tmp_path / "v.mp4")
    assert numbers(video.path) == list(range(5, 30))
    assert numbers(copy(tmp_path, video)[2]) == list(range(5, 30))


@pytest.mark.parametrize("target", ["h264", "mjpeg"])
@pytest.mark.parametrize(
    ("codec", "pixel_format", "matrix", "full"),
    [
        ("h264", "yuv420p", 1, False),
        ("h264", "yuv420p", 5, False),
        ("hevc", "yuv420p10le", 1, False),
        ("h264", "yuv444p", 1, False),
        ("h264", "yuvj420p", 5, True),
        ("mjpeg", "yuvj420p", 5, True),
    ],
)
def test_colours_do_not_shift(tmp_path, codec, pixel_format, matrix, full, target):
    """Strong colours, each a frame: a wrong matrix or range moves some of them by 10 or more."""
    colours = [(60, 120, 180), (180, 60, 60), (60, 180, 60), (120, 120, 120), (200, 180, 40)]
    path = str(tmp_path / ("v.mkv" if codec == "mjpeg" else "v.mp4"))
    with av.open(path, "w") as container:
        stream = container.add_stream(ENCODERS[codec][0], rate=25, options=ENCODERS[codec][1] | {"crf": "5"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, pixel_format
        context = stream.codec_context
        context.color_range, context.colorspace = 2 if full else 1, matrix
        context.color_primaries = context.color_trc = matrix
        for colour in colours:
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), colour, np.uint8), format="rgb24")
            frame = frame.reformat(
                format=pixel_format, dst_colorspace=matrix, dst_color_range="JPEG" if full else "MPEG"
            )
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    _, made, copied = copy(tmp_path, probe(path), codec=target, crf=2 if target == "mjpeg" else 5)
    before, after = decode_all(path).mean((1, 2)), decode_all(copied).mean((1, 2))
    assert np.abs(before - colours).max() < 4, "the test's own video"
    assert np.abs(after - before).max() < 3
    assert made.pixel_format == CODECS[target].pixel_format
    with av.open(str(copied)) as container:
        frame = next(container.decode(video=0))
    assert target == "mjpeg" or (frame.color_range, frame.colorspace) == (1, matrix)


@pytest.mark.parametrize("to_full", [True, False])
def test_ranges_are_converted_without_bias(to_full):
    """FFmpeg's own conversion is half a level of chroma off on average."""
    video = Video("v", 0, 1, 25.0, 256, 256, "h264", 0)
    planes = np.random.default_rng(0).integers(60, 200, (256 * 3 // 2, 256)).astype(np.uint8)
    frame = av.VideoFrame.from_ndarray(planes, format="yuv420p" if to_full else "yuvj420p")
    frame.color_range = 1 if to_full else 2
    scaled = transcode._Scaler(video, Settings(codec="mjpeg" if to_full else "h264", crf=4)).scale(frame)
    assert (scaled.format.name, scaled.color_range) == (("yuvj420p", 2) if to_full else ("yuv420p", 1))
    made, luma = scaled.to_ndarray().astype(float), np.arange(384) < 256
    expected = np.where(luma[:, None], 255 / 219 * (planes - 16.0), 255 / 224 * (planes - 128.0) + 128)
    if not to_full:
        expected = np.where(luma[:, None], 219 / 255 * planes + 16, 224 / 255 * (planes - 128.0) + 128)
    assert np.abs(made - expected).max() <= 0.5
    assert np.abs([(made - expected)[luma].mean(), (made - expected)[~luma].mean()]).max() < 0.05


@pytest.mark.slow
def test_labels_order_and_classes_are_kept(folder):
    done = command(folder)
    assert done.returncode == 0, done.stderr
    made = Manifest.read(folder / "out" / "all.csv")
    assert [made[row].path for row in range(5)] == ["c.mp4", "a/1.mp4", "a/2, b.mp4", "b/1.mp4", "b/ä.mp4"]
    assert made.labels.tolist() == [0, 2, 1, 0, 2]
    assert made.classes == ("ash", "birch", "cedar") and (made.rejected, made.listed) == (2, 7)
    assert made.made_by.startswith("prepare.py transcode -m ")
    for row in range(5):
        assert numbers(made.file(row)) == list(range(12))
        assert made[row][2:7] == (12, 25.0, 42, 32, "h264")
    assert "5 of 5 videos" in done.stdout and "size: " in done.stdout and "times as fast" in done.stdout
    assert sorted(path.name for path in (folder / "out").iterdir()) == ["a", "all.csv", "all.packets", "b", "c.mp4"]


@pytest.mark.slow
def test_a_second_run_does_nothing_and_other_settings_do(folder):
    assert command(folder).returncode == 0
    before = files(folder / "out")
    (folder / "out" / ".transcode-0.part").write_text("left by a kill")
    again = command(folder)
    assert again.returncode == 0 and "sample" not in again.stdout, again.stderr
    assert files(folder / "out") == before
    (folder / "out" / "b" / "1.mp4").unlink()
    assert command(folder).returncode == 0
    after = files(folder / "out")
    assert [name for name in before if after[name] != before[name]] == ["b/1.mp4"]
    assert command(folder, "--gop", 4).returncode == 0
    assert not set(files(folder / "out").values()) & set(after.values())
    assert all(Manifest.read(folder / "out" / "all.csv")[row].gop == 4 for row in range(5))


@pytest.mark.slow
def test_a_source_that_has_changed_is_encoded_again(folder):
    assert command(folder).returncode == 0
    before = files(folder / "out")
    write_video(folder / "c.mp4", numbered(9, height=48, width=64))
    write_manifest(folder, ["c.mp4", "a/1.mp4"])
    assert command(folder).returncode == 0
    after = files(folder / "out")
    assert [name for name in before if after[name] != before[name]] == ["c.mp4"]
    assert numbers(folder / "out" / "c.mp4") == list(range(9))


@pytest.mark.slow
def test_killed_anywhere_it_goes_on_where_it_was(folder):
    """A real kill -9, as soon as another copy is there, until a run comes to its end."""
    for number in range(6):
        write_video(folder / f"{number}.mp4", textured(60, height=96, width=128, seed=number))
    write_manifest(folder, [f"{number}.mp4" for number in range(6)])
    arguments = ["prepare.py", "transcode", "-m", folder / "all.csv", "--out", folder / "out", "--workers", "1"]
    seen: dict[str, tuple[int, int]] = {}
    kills = 0
    while True:
        process = subprocess.Popen(
            [sys.executable, *map(str, arguments)], cwd=PROJECT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while process.poll() is None:
            there = {
                name: stamp for name, stamp in files(folder / "out").items() if not name.endswith((".part", ".lock"))
            }
            if kills < 3 and len(there) > len(seen):
                process.send_signal(signal.SIGKILL)
            time.sleep(0.005)
        there = {name: stamp for name, stamp in files(folder / "out").items() if not name.endswith((".part", ".lock"))}
        assert {name: there[name] for name in seen} == seen, "encoded twice"
        seen = there
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL
        kills += 1
        assert not (folder / "out" / "all.csv").exists()
    assert kills == 3
    assert sorted(files(folder / "out")) == [f"{number}.mp4" for number in range(6)]
    assert not list((folder / "out").glob("*.journal*"))


@pytest.mark.slow
def test_a_journal_that_is_out_of_date_is_not_believed(folder):
    """Killed, then run with other settings, then with the first ones again."""
    manifest, journal = Manifest.read(folder / "all.csv"), folder / "j"
    for gop in (4, 8, 4):
        settings = Settings(short_side=32, gop=gop)
        copies, rejected, _ = Job(
            manifest, folder / "out", settings, journal=journal, pool=WorkerPool(workers=1)
        ).transcode()
        assert not rejected and all(copies[row].gop == probe(copies.file(row)).gop == gop for row in range(5))


@pytest.mark.slow
def test_a_full_disk_is_said_before_and_while(folder, monkeypatch):
    manifest = Manifest.read(folder / "all.csv")
    job = Job(manifest, folder / "out", Settings(short_side=32), journal=folder / "j", pool=WorkerPool(workers=1))
    usage = namedtuple("usage", "total used free")
    estimate = job.estimate()
    assert estimate.sampled == 2 and 1000 < estimate.needed_bytes < 100_000 and estimate.seconds > 0
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1 << 40, 0, estimate.needed_bytes))
    with pytest.raises(
        InputError, match=r"out: needs about 0\.0 MiB, but only 0\.0 MiB are free; make room, or choose"
    ):
        job.check_disk(estimate)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1 << 40, 0, 2 * estimate.needed_bytes))
    assert job.check_disk(estimate) == 2 * estimate.needed_bytes
    full = {
        "key": json.dumps(["preparation.transcode:transcode", job._tasks[0].to_json()]),
        "failed": transcode._DISK_FULL,
    }
    (folder / "j").write_text(json.dumps(full) + "\n")
    with pytest.raises(InputError, match="no space is left on the disk; make room and run the command again"):
        job.transcode()
    assert not (folder / "j").exists()
    made, rejected, _ = job.transcode()
    assert len(made) == 5 and not rejected


@pytest.mark.slow
def test_bad_videos_are_left_out_and_the_rest_goes_on(folder):
    (folder / "a" / "1.mp4").write_text("no video " * 50)
    write_video(folder / "b" / "1.webm", numbered(7, height=48, width=64), codec="vp9")
    done = command(folder)
    assert done.returncode == 0, done.stderr
    made = Manifest.read(folder / "out" / "all.csv")
    assert (len(made), made.rejected, made.listed) == (3, 4, 7)
    rejected = (folder / "out" / "all.rejected.csv").read_text().splitlines()
    assert rejected[1].startswith("a/1.mp4,2,not a video that FFmpeg can read")
    assert rejected[2] == 'b/1.webm,0,"it decodes to 7 frames, not 12; if the file was replaced, index it again"'
    assert not list((folder / "out").rglob("*.part"))
    for name in ("c.mp4", "a/2, b.avi", "b/ä.mkv"):
        (folder / name).unlink()
    none = command(folder, out="none")
    assert none.returncode == 2 and "none of the 5 videos" in none.stderr
    assert not (folder / "none" / "all.csv").exists()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data: data[: len(data) // 3], r"invalid data found .* after frame"),
        (lambda data: data[: len(data) // 2] + bytes(len(data) - len(data) // 2), r"frame \d+ is damaged"),
    ],
)
def test_a_damaged_frame_is_no_copy(tmp_path, damage, reason):
    whole = write_video(tmp_path / "whole.mp4", textured(40, height=96, width=128))
    path = edit_packets(whole, tmp_path / "v.mp4", lambda n, data: damage(data) if n == 20 else data)
    with pytest.raises(InputError, match=reason):
        copy(tmp_path, probe(whole)._replace(path=path))
    assert not list((tmp_path / "out").iterdir())


def test_names():
    def names(*paths):
        return list(target_names([("", path) for path in paths], ".mp4").values())

    assert names("a.avi", "b/A.MP4", "v_1.5", "x") == ["a.mp4", "b/A.MP4", "v_1.5.mp4", "x.mp4"]
    assert names("a.avi", "a.webm", "a.mp4") == ["a.avi.mp4", "a.webm.mp4", "a.mp4"]
    assert names("a.avi", "a.mkv", "a.avi.mp4") == ["a.avi.mp4", "a.mkv.mp4", "a.avi.mp4.mp4"]
    shards = target_names([("s/0.tar", "a.mp4"), ("s/1.tar", "a.mp4")], ".mp4")
    assert list(shards.values()) == ["s/0/a.mp4.mp4", "s/1/a.mp4.mp4"]


@pytest.mark.slow
def test_a_video_listed_twice_and_by_other_spellings_is_one_copy(folder):
    videos = [Manifest.read(folder / "all.csv")[0]._replace(label=label) for label in (0, 1)]
    videos.append(videos[0]._replace(path="a/../c.mp4", label=2))
    videos.append(videos[0]._replace(path=str(folder / "c.mp4")))
    manifest = Manifest(videos, root=folder)
    pool = WorkerPool(workers=1)
    made, _, copies = Job(manifest, folder / "out", Settings(), journal=folder / "j", pool=pool).transcode()
    assert [made[row].path for row in range(4)] == ["c.mp4"] * 4 and made.labels.tolist() == [0, 1, 2, 0]
    assert len(files(folder / "out")) == 1 and len(copies) == 4


@pytest.mark.slow
def test_originals_and_other_files_are_never_overwritten(folder):
    before = files(folder)
    for out in (".", "../" + folder.name):
        done = command(folder, out=out)
        assert done.returncode == 2 and "the manifest itself" in done.stderr
    shutil.copy(folder / "all.csv", folder / "other.csv")
    done = run_here("prepare.py", "transcode", "-m", folder / "other.csv", "--out", folder / "a" / "..")
    assert done.returncode == 2 and "the manifest itself" in done.stderr
    (folder / "lists").mkdir()
    manifest = Manifest.read(folder / "all.csv")
    manifest.write(folder / "lists" / "all.csv")
    done = run_here("prepare.py", "transcode", "-m", folder / "lists" / "all.csv", "--out", folder)
    assert done.returncode == 2 and "c.mp4: would overwrite the original" in done.stderr
    write_manifest(folder, ["b/1.webm"])
    assert command(folder, out="full").returncode == 0
    (folder / "b" / "1.avi").write_bytes((folder / "a" / "2, b.avi").read_bytes())
    write_manifest(folder, ["b/1.avi"])
    done = command(folder, out="full")
    assert done.returncode == 2 and "b/1.mp4 exists and is a copy of b/1.webm; name another --out" in done.stdout
    write_manifest(folder, ["c.mp4"])
    shutil.copy(folder / "c.mp4", folder / "full" / "c.mp4")
    before |= {"full/b/1.mp4": files(folder)["full/b/1.mp4"]}
    before |= {"full/c.mp4": files(folder)["full/c.mp4"]}
    done = command(folder, out="full")
    assert "c.mp4 exists and was not made by prepare.py transcode, so it is not overwritten" in done.stdout
    now = files(folder)
    assert {name: now[name] for name in before} == before


@pytest.mark.slow
def test_parts_make_the_whole(folder):
    for part in (1, 0):
        done = command(folder, "--shard", f"{part}/2")
        assert done.returncode == 0 and f"part {part} of 2 is done" in done.stdout, done.stderr
    before = files(folder / "out")
    assert len(before) == 5
    assert command(folder).returncode == 0
    assert files(folder / "out") == before and len(Manifest.read(folder / "out" / "all.csv")) == 5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--crf", "52"], "--crf is 52; expected 0 to 51 for h264"), (["--short-side", "1"], "--short-side is 1")],
)
def test_bad_settings(folder, arguments, message):
    done = command(folder, *arguments)
    assert done.returncode == 2 and message in done.stderr


def test_workers_elsewhere_find_originals_and_copies(tmp_path, monkeypatch):
    """Those of dask have another working folder."""
    monkeypatch.chdir(tmp_path)
    manifest = Manifest([probe(write_video("a.mp4", textured(3, height=32, width=32)))._replace(path="a.mp4")])
    (task,) = Job(manifest, Path("out"), Settings(), journal=Path("j"), pool=WorkerPool(workers=1))._tasks
    assert task.source.path == str(tmp_path / "a.mp4") and task.out == str(tmp_path / "out")
