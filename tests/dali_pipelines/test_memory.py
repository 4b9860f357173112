"""Files that claim to be huge: memory stays bounded, and what does not fit is a named fault."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch

from dali_pipelines import ClipLoader, InputError, Manifest, clip_source, workers
from dali_pipelines.crops import Reducer
from dali_pipelines.probe import probe
from preparation.index import probe_file
from tests.dali_pipelines.sources import HUNGRY, HungrySource
from tests.videos import textured, write_video

PROJECT = Path(__file__).parents[2]
SIDE = 4096


def write_flat(path: Path, codec: str, pix_fmt: str, *, frames: int = 2) -> Path:
    """Of one colour: few bytes, and gigabytes when it is decoded."""
    with av.open(path, "w") as container:
        stream = container.add_stream(codec, rate=25, options={"deadline": "realtime", "cpu-used": "8"})
        stream.height = stream.width = SIDE
        stream.pix_fmt = pix_fmt
        stream.codec_context.thread_count = 2
        frame = av.VideoFrame(SIDE, SIDE, pix_fmt)
        for plane in frame.planes:
            plane.update(bytes([90]) * plane.buffer_size)
        for number in range(frames):
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return probe(write_video(tmp_path_factory.mktemp("small") / "a.mp4", textured(8, height=48, width=64)))


MEMORY = """
import resource, sys, torch
from dali_pipelines import ClipLoader, Manifest
from dali_pipelines.probe import probe

def peak_mib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10

path, mode, decode, small = sys.argv[1:]
torch.set_num_threads(1)
settings = dict(mode=mode, batch_size=2, num_frames=32, crop_size=64, stride=None, workers=1, decode=decode)
loader = ClipLoader(Manifest([probe(small)] * 2, root="/"), **settings)
assert next(iter(loader)).valid.all()
loader.close()
before = peak_mib()
loader = ClipLoader(Manifest([probe(path)] * 2, root="/"), **settings)
assert next(iter(loader)).valid.all(), loader.stats.faults
loader.close()
print(before, peak_mib() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "codec, pix_fmt, suffix, mode, decode",
    [
        ("mjpeg", "yuvj420p", "avi", "train", "auto"),
        ("mjpeg", "yuvj420p", "avi", "test", "dali"),
        ("png", "monob", "mov", "test", "host"),
        ("libvpx-vp9", "yuv420p", "webm", "validate", "nvdec"),
    ],
)
def test_huge_frames_do_not_fill_the_memory_of_the_training_process(
    tmp_path, small, codec, pix_fmt, suffix, mode, decode
):
    """32 frames of 4096x4096 are 1.6 GB; a file of two frames repeats them."""
    path = write_flat(tmp_path / f"bomb.{suffix}", codec, pix_fmt)
    command = [sys.executable, "-c", MEMORY, str(path), mode, decode, small.path]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    before, more = map(int, done.stdout.split())
    assert before > 50 and more < 150  # MiB


def test_frames_beyond_the_limit_are_refused_by_index_and_loader(tmp_path, small):
    path = str(write_flat(tmp_path / "bomb.avi", "mjpeg", "yuvj420p"))
    claims = "its frames are 4096x4096, more than 1000000 pixels: .*data.max_pixels.*--max-pixels"
    large = probe(path)
    assert (large.frames, large.width) == (2, SIDE)
    for read in (lambda: probe(path, max_pixels=10**6), lambda: probe_file(path, True, max_pixels=10**6).video):
        with pytest.raises(InputError, match=claims):
            read()
    settings = dict(mode="validate", batch_size=2, num_frames=2, crop_size=16, stride=None, workers=0)
    made = ClipLoader(Manifest([small, large], root="/"), max_pixels=10**6, **settings)
    (batch,) = made
    assert batch.valid.tolist() == [True, False]
    with pytest.raises(InputError, match=claims):
        raise InputError(made.stats.faults[0].reason)


def test_frames_larger_than_the_container_says(tmp_path):
    """Its header says 64x48, which the limit allows."""
    path = write_flat(tmp_path / "bomb.avi", "mjpeg", "yuvj420p")
    data, side = bytearray(path.read_bytes()), SIDE.to_bytes(4, "little")
    place = data.find(b"strf")
    for old, new in ((side + side, (64).to_bytes(4, "little") + (48).to_bytes(4, "little")),):
        start = data.index(old, place)
        data[start : start + 8] = new
    path.write_bytes(data)
    with pytest.raises(InputError):
        probe(path, max_pixels=10**6)


@pytest.mark.slow
@pytest.mark.parametrize("mode, changes", [("train", {}), ("train", {"views_per_decode": 2}), ("validate", {}),
                                           ("test", {}), ("test", {"num_windows": 2})])  # fmt: skip
def test_crops_by_the_workers_match_the_graph(tmp_path, monkeypatch, mode, changes):
    videos = []
    for number, (height, width) in enumerate([(120, 200), (200, 120), (99, 101)]):
        path = tmp_path / f"{number}.webm"
        videos.append(probe(write_video(path, textured(12, height=height, width=width), codec="vp9")))
    videos += [video._replace(rotation=rotation, width=video.height, height=video.width)
               for video in videos[:2] for rotation in (90, 270)]  # fmt: skip
    videos.append(videos[0]._replace(mirrored=1, rotation=180))
    settings = dict(mode=mode, batch_size=4, num_frames=4, crop_size=32, stride=16, workers=0) | changes

    def read() -> list:
        return list(ClipLoader(Manifest(videos, root="/"), **settings))

    expected, calls = read(), []
    monkeypatch.setattr(clip_source, "MOST_BYTES", 0)
    reduce = Reducer.__call__
    monkeypatch.setattr(Reducer, "__call__", lambda self, frame: calls.append(1) or reduce(self, frame))
    found = read()
    assert calls
    for before, after in zip(expected, found, strict=True):
        assert before.sample_ids.tolist() == after.sample_ids.tolist() and (before.valid == after.valid).all()
        error = (before.clips - after.clips).abs() * 255
        assert error.max() < 0.51 and error.mean() > 0.1  # it is rounded


@pytest.mark.slow
def test_a_worker_without_memory_costs_one_video(tmp_path, small, monkeypatch):
    monkeypatch.setattr(workers, "ClipSource", HungrySource)
    large = probe(write_flat(tmp_path / "bomb.avi", "mjpeg", "yuvj420p"))
    rows = [small, large, small, large]
    assert rows[HUNGRY] is large
    settings = dict(mode="validate", batch_size=2, num_frames=2, crop_size=16, stride=None, workers=1)
    made = ClipLoader(Manifest(rows, root="/"), **settings)
    assert torch.cat([batch.valid for batch in made]).tolist() == [True, False, True, True]
    (fault,) = made.stats.faults
    assert "memory" in fault.reason and "Error" not in fault.reason


def test_a_batch_that_does_not_fit_says_what_to_do(small, monkeypatch):
    """DALI's std::bad_alloc."""

    def run() -> None:
        raise MemoryError("std::bad_alloc")

    settings = dict(mode="validate", batch_size=2, num_frames=2, crop_size=16, stride=None, workers=0)
    made = ClipLoader(Manifest([small] * 2, root="/"), **settings)
    pipeline = SimpleNamespace(run=run, build=lambda: None, _py_pool=None)
    monkeypatch.setattr(made._workers, "_make_pipeline", lambda source: pipeline)
    with pytest.raises(InputError, match="out of memory for a batch of clips.*smaller batch"):
        next(iter(made))


def test_taps_stay_within_the_frame():
    frame = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    whole = Reducer(np.array([[0, 0, 4.0, 6]]), crop_size=12, size=(4, 6))
    assert whole(frame).shape == (12, 12, 3) and whole(frame).max() <= frame.max()
    flipped = Reducer(np.array([[0, 6.0, 4, 0]]), crop_size=12, size=(4, 6))
    assert (flipped(frame) == whole(frame)[:, ::-1]).all()
