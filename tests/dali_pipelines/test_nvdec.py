"""The way of the GPU: workers, threads with torchcodec, graph. Here torchcodec's CPU decoder takes the place of NVDEC.

It gives the host decoder's frames exactly, and clips to within the rounding of their rectangles. The tests marked `gpu`
run the same on a GPU.
"""

import gc
import multiprocessing
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dali_pipelines import ClipLoader, InputError, Manifest, decode_stage, nvdec, routing
from dali_pipelines.bitstream.parser import UncertainError
from dali_pipelines.clip_source import ClipSource
from dali_pipelines.engines import Limits, Routing
from dali_pipelines.files import Source, open_video
from dali_pipelines.host_decoder import decode_frames
from dali_pipelines.manifest import coded_size
from dali_pipelines.nvdec import DecodePool, UnavailableError, decode_file
from dali_pipelines.packets import remux
from dali_pipelines.plan import PADDING, EntrySampler
from dali_pipelines.probe import probe
from tests.videos import join_packets, numbered, read_numbers, textured, write_video

SETTINGS = dict(batch_size=4, num_frames=8, crop_size=32, workers=0, stride=8)
CPU = torch.device("cpu")
BY_NVDEC = {"av1", "h264", "hevc", "mpeg4", "vp8", "vp9"}


def loader(manifest, mode="validate", **changes):
    return ClipLoader(manifest, mode=mode, **(SETTINGS | {"decode": "nvdec"} | changes))


def by_sample(batches):
    """{sample id: (clip, engine)}, padding left out."""
    return {
        int(sample_id): (clip, engine)
        for batch in batches
        for sample_id, clip, engine in zip(batch.sample_ids, batch.clips, batch.engines, strict=True)
        if sample_id != PADDING
    }


def is_same(one, other):
    """But for float32: a rectangle is moved to the part that was kept in the workers, or after it was rounded."""
    return (one - other).abs().max() < 1e-5


def is_even(video):
    return video.width % 2 == 0 and video.height % 2 == 0


@pytest.fixture(scope="module")
def some(tmp_path_factory) -> Manifest:
    """Twelve textured videos of four codecs and twelve sizes."""
    folder = tmp_path_factory.mktemp("some")
    kinds = [("h264", "mp4"), ("vp9", "webm"), ("hevc", "mp4"), ("mpeg4", "avi")]
    videos = []
    for number in range(12):
        codec, suffix = kinds[number % 4]
        rgb_frames = textured(12 + 2 * number, height=64 + 2 * number, width=96 + 4 * number, seed=number)
        path = write_video(folder / f"{number}.{suffix}", rgb_frames, codec=codec)
        videos.append(probe(path)._replace(path=Path(path).name, label=number % 3))
    return Manifest(videos, root=folder)


# -- frames and pixels --


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("mode", ["train", "validate", "test"])
def test_clips_match_the_host_decoder(numbered_videos, mode, workers):
    """Of every codec, container and oddity; and each was decoded where it should have been."""
    on_host = by_sample(loader(numbered_videos, mode, decode="host", workers=workers))
    made = loader(numbered_videos, mode, workers=workers)
    clips = by_sample(made)
    assert clips.keys() == on_host.keys() and len(clips) == len(numbered_videos)
    for sample_id, (clip, engine) in clips.items():
        video = numbered_videos[sample_id]
        assert engine == ("nvdec" if video.codec in BY_NVDEC and is_even(video) else "host"), video.path
        assert is_same(clip, on_host[sample_id][0]), video.path
    assert made.stats.engines == {"nvdec": 20, "host": 4} and not made.stats.faults


@pytest.mark.slow
@pytest.mark.parametrize(
    "codec, suffix", [("h264", "mp4"), ("h264", "mkv"), ("hevc", "mp4"), ("mpeg4", "mp4"), ("vp9", "webm")]
)
def test_any_positions_of_remuxed_packets(tmp_path, codec, suffix):
    """With short and open groups: the decoder goes through what is left of them once, and does not seek."""
    options = {
        "h264": {"x264-params": "keyint=9:bframes=3:open-gop=1"},
        "hevc": {"x265-params": "log-level=none:keyint=9:bframes=3:open-gop=1"},
        "mpeg4": {"bf": "2", "g": "9"},
        "vp9": {"g": "9"},
    }[codec]
    rgb_frames = textured(60, height=64, width=96)
    path = write_video(tmp_path / f"a.{suffix}", rgb_frames, codec=codec, options=options)
    rng = np.random.default_rng(0)
    tried = 0
    for _ in range(30):
        positions = np.unique(rng.integers(0, 60, rng.integers(1, 9)))
        with open_video(path) as container:
            try:
                file = remux(container, positions)
            except UncertainError:
                continue
        tried += 1
        frames = decode_file(file.encoded, file.positions, (64, 96), CPU).numpy()
        assert (frames == decode_frames(path, positions, size=(64, 96)).frames).all(), positions
    assert tried > 20


@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_remuxed_packets_are_not_rotated(tmp_path, rotation):
    """torchcodec applies the display matrix; rectangles refer to the frame as coded."""
    path = write_video(tmp_path / "a.mp4", textured(9, height=64, width=96), rotation=rotation)
    with open_video(path) as container:
        file = remux(container, np.array([0, 8]))
    frames = decode_file(file.encoded, file.positions, (64, 96), CPU).numpy()
    assert (frames == decode_frames(path, np.array([0, 8]), size=(64, 96)).frames).all()


SAME_BLOCKS = [(256, 340), (256, 344), (256, 352), (180, 320), (192, 320)]
"""Sizes, of which some are the same in whole macroblocks: the same hardware decoder is reused for them."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "codec, suffix", [("h264", "mp4"), ("h264", "mkv"), ("h264", "ts"), ("hevc", "mp4"), ("hevc", "ts")]
)
@pytest.mark.parametrize("size", SAME_BLOCKS)
def test_streams_are_uncropped_to_whole_blocks(tmp_path, codec, suffix, size):
    """torchcodec's hardware decoders crop as for the stream that they were made for, so nothing is left to crop."""
    path = write_video(tmp_path / f"a.{suffix}", textured(10, height=size[0], width=size[1]), codec=codec)
    positions = np.array([0, 4, 9])
    with open_video(path) as container:
        file = remux(container, positions, uncropped=True)
    assert file.size == tuple(-(-side // 16) * 16 for side in size)
    with open_video(Source("", data=file.encoded.tobytes())) as container:  # the stream's own headers, not the file's
        assert remux(container, file.positions).parser.without_cropping() is None
    frames = decode_file(file.encoded, file.positions, file.size, CPU).numpy()[:, : size[0], : size[1]]
    assert (frames == decode_frames(path, positions, size=size).frames).all()


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_mpeg4_packets_carry_the_header(tmp_path, suffix):
    """torchcodec 0.11 does not give NVDEC that of the container."""
    path = write_video(tmp_path / f"a.{suffix}", textured(10, height=64, width=96), codec="mpeg4")
    with open_video(path) as container:
        assert b"\0\0\1\x20" not in bytes(next(container.demux(video=0)))
    with open_video(path) as container:
        file = remux(container, np.array([2, 9]))
    with open_video(Source("", data=file.encoded.tobytes())) as container:
        assert b"\0\0\1\x20" in bytes(next(container.demux(video=0)))
    frames = decode_file(file.encoded, file.positions, file.size, CPU).numpy()
    assert (frames == decode_frames(path, np.array([2, 9]), size=(64, 96)).frames).all()


COLOURS = [(matrix, full) for matrix in (None, 1, 5, 6, 9) for full in (False, True)]


@pytest.mark.slow
@pytest.mark.parametrize("matrix, full_range", COLOURS)
@pytest.mark.parametrize("codec, suffix", [("h264", "mp4"), ("hevc", "mp4"), ("vp9", "webm")])
def test_engines_agree_on_colours(tmp_path, codec, suffix, matrix, full_range):
    """torchcodec on the CPU exactly; DALI's decoder on the CPU by 1.5/255 on average (it interpolates chroma, and knows
    BT.601 only). Saturated halves would reveal a wrong matrix (BT.709 for BT.601: 4/255 on average)."""
    rgb_frames = textured(6, height=96, width=128)
    for number, colour in enumerate(([255, 0, 0], [0, 255, 0], [0, 0, 255])):
        rgb_frames[number][:, :64] = colour
    path = write_video(tmp_path / f"a.{suffix}", rgb_frames, codec=codec, matrix=matrix, full_range=full_range)
    manifest = Manifest([probe(path)])
    settings = dict(batch_size=1, num_frames=6, stride=None, crop_size=64)
    on_host = by_sample(loader(manifest, decode="host", **settings))[0][0]
    twin, engine = by_sample(loader(manifest, **settings))[0]
    assert engine == ("host" if codec == "vp9" and full_range else "nvdec")
    assert is_same(twin, on_host)
    by_dali, engine = by_sample(loader(manifest, decode="dali", **settings))[0]
    assert engine == ("dali" if codec == "vp9" and matrix in (None, 5, 6) else "host")
    assert (by_dali - on_host).abs().mean() < 1.5 / 255


@pytest.mark.parametrize("num_frames", [8, 16])
def test_golden_three_crop_of_paddlevideo(shared_videos, num_frames):
    golden = np.load(shared_videos.parent / "golden" / "three_crop.npz")
    videos = [probe(path)._replace(path=path.name) for path in sorted(shared_videos.iterdir())]
    settings = dict(batch_size=2, num_frames=num_frames, crop_size=224, stride=32, past_end="hold", workers=2)
    clips = by_sample(loader(Manifest(videos, root=shared_videos), "test", **settings))
    assert len(clips) == len(videos) and {engine for _, engine in clips.values()} == {"nvdec"}
    for sample_id, (clip, _) in clips.items():
        key = f"{videos[sample_id].path}/{num_frames}"
        left, middle, right = clip
        views = torch.cat([left, right, middle], dim=1)  # PaddleVideo's order
        index = torch.from_numpy(golden[f"{key}/probe_index"]).long().T
        error = 255 * (views[tuple(index)] - torch.from_numpy(golden[f"{key}/probe_value"])).abs()
        assert error.mean() < 0.05 and error.max() < 0.5, key


# -- both engines at once --


@pytest.mark.slow
def test_the_share_of_the_host_depends_on_nothing_but_the_video(some):
    def engines(**changes):
        made = loader(some, host_share=0.5, **changes)
        epochs = [{key: engine for key, (_, engine) in by_sample(made).items()} for _ in range(2)]
        assert epochs[0] == epochs[1] and len(epochs[0]) == 12
        return epochs[0]

    reference = engines()
    assert 0 < sum(engine == "host" for engine in reference.values()) < 12
    assert engines(workers=2, batch_size=3) == engines(decode_threads=1, batch_size=5) == reference
    assert engines(seed=1) != reference
    training = loader(some, "train", host_share=0.5)
    assert {key: engine for key, (_, engine) in by_sample(training).items()} == reference
    assert training.stats.engines.keys() == {"nvdec", "host"} and not training.stats.fallbacks
    assert set(loader(some, host_share=1).decoders.values()) == {"torchcodec and host (100%)"}
    assert set(loader(some).decoders.values()) == {"torchcodec"}


@pytest.mark.slow
def test_the_share_is_part_of_the_position(some):
    """A resumed run decodes each video where it was decoded before, whatever this machine would choose."""
    before = loader(some, host_share=0.5)
    expected = by_sample(before)
    before.set_epoch(0)
    next(iter(before))
    state = before.state_dict()
    assert state["host_share"] == 0.5 and state["entries"] == 4
    resumed = loader(some)
    next(iter(resumed))  # it runs already, with a share of its own
    resumed.load_state_dict(state)
    rest = by_sample(resumed)
    assert len(rest) == 8 and resumed.host_share == 0.5
    for sample_id, (clip, engine) in rest.items():
        assert engine == expected[sample_id][1] and (clip == expected[sample_id][0]).all()
    told = loader(some, host_share=0.0)
    told.load_state_dict(state)
    assert {engine for _, engine in by_sample(told).values()} == {"nvdec"}
    other = loader(some, decode="host")  # a position of before there was a share, or without a GPU
    assert "host_share" not in other.state_dict()
    other.load_state_dict(state)
    resumed.load_state_dict(other.state_dict())
    assert resumed.host_share == 0.5


# -- one sample fails, one sample is named --


def fail(monkeypatch, sizes, error):
    """torchcodec raises `error` for videos of these coded sizes."""
    decode = nvdec.decode_file

    def failing(encoded, positions, size, device):
        if size in sizes:
            raise error
        return decode(encoded, positions, size, device)

    monkeypatch.setattr(nvdec, "decode_file", failing)


@pytest.mark.slow
@pytest.mark.parametrize(
    "error", [RuntimeError("Failed to create NVDEC decoder: 2\nmore"), torch.OutOfMemoryError("full")]
)
def test_the_host_decodes_the_same_bytes_if_nvdec_fails(some, monkeypatch, error):
    expected = by_sample(loader(some, decode="host"))
    fail(monkeypatch, {coded_size(some[5]), (96, 144)}, error)  # VP9; HEVC of 84x136, in whole blocks
    made = loader(some, workers=2)
    opened = []
    monkeypatch.setattr(
        nvdec, "decode_frames", lambda source, *a, **k: opened.append(source) or decode_frames(source, *a, **k)
    )
    clips = by_sample(made)
    assert {key for key, (_, engine) in clips.items() if engine == "host"} == {5, 10}
    assert all(is_same(clip, expected[key][0]) for key, (clip, _) in clips.items())
    line = str(error).splitlines()[0]
    assert made.stats.fallbacks == {f"by the host, as NVDEC failed: {line}": 2} and not made.stats.faults
    assert len(opened) >= 2 and all(source.path == "" and source.data for source in opened)


@pytest.mark.slow
def test_a_damaged_stream_costs_one_sample_and_no_restart(some, tmp_path, monkeypatch):
    videos = [some[n]._replace(path=some.file(n)) for n in range(len(some))]
    data = bytearray(Path(videos[1].path).read_bytes())  # VP9
    data[len(data) // 3 :] = bytes(20)
    (tmp_path / "cut.webm").write_bytes(data)
    videos[1] = videos[1]._replace(path=str(tmp_path / "cut.webm"))
    whole = Path(videos[5].path).read_bytes()  # VP9, its headers whole
    at = len(whole) // 2
    (tmp_path / "bits.webm").write_bytes(
        whole[:at] + bytes(255 - byte for byte in whole[at : at + 200]) + whole[at + 200 :]
    )
    videos[5] = videos[5]._replace(path=str(tmp_path / "bits.webm"))
    made = loader(Manifest(videos), "train", workers=2, batch_size=3, stride=None)
    started = []
    start = ClipSource.__init__
    monkeypatch.setattr(ClipSource, "__init__", lambda source, **k: started.append(1) or start(source, **k))
    batches = [batch for _ in range(2) for batch in made]
    made.close()
    faults = {fault.sample_id for fault in made.stats.faults}
    assert 1 in faults and faults <= {1, 5} and all(fault.reason for fault in made.stats.faults)
    assert len(started) == 1  # one pipeline, from the first batch to the last
    bad = [clip for batch in batches for clip, valid in zip(batch.clips, batch.valid) if not valid]
    assert bad and all(clip.abs().max() == 0 for clip in bad)
    assert all((engine == "") == (not valid) for b in batches for engine, valid in zip(b.engines, b.valid))


@pytest.mark.slow
@pytest.mark.parametrize(
    "codec, suffix",
    [
        ("vp8", "webm"),
        ("vp9", "webm"),
        ("mjpeg", "avi"),
        ("mjpeg", "mkv"),
        ("mpeg4", "avi"),
        ("h264", "ts"),
        ("hevc", "ts"),
    ],
)
@pytest.mark.parametrize("decode", ["host", "dali", "nvdec"])
@pytest.mark.parametrize("heights", [(96, 64), (64, 96)])
def test_a_size_change_mid_stream_is_a_fault(tmp_path, codec, suffix, decode, heights):
    """As WebRTC recordings do; never a sheared clip that counts as valid."""
    paths = [
        write_video(tmp_path / f"{height}.{suffix}", numbered(20, height=height, width=128), codec=codec)
        for height in heights
    ]
    path = join_packets(*paths, tmp_path / f"joined.{suffix}")
    video = probe(paths[0])._replace(path=path, frames=40)
    made = loader(Manifest([video]), batch_size=1, stride=None, decode=decode)
    batch = next(iter(made))
    assert not batch.valid[0] and batch.clips.abs().max() == 0
    reason = made.stats.faults[0].reason
    assert f"a frame is 128x{heights[1]}, not 128x{heights[0]}" in reason and "manifest" not in reason
    start = loader(Manifest([video._replace(frames=20)]), batch_size=1, stride=None, decode=decode)  # before it changes
    assert read_numbers(by_sample(start)[0][0].numpy()) == [0, 2, 5, 8, 10, 13, 16, 19]


@pytest.mark.parametrize("decode", ["host", "dali", "nvdec"])
def test_a_stream_that_changes_between_sizes_announced_at_its_start_is_a_fault(tmp_path, decode):
    """Both parameter sets of H.264 are in the first packet, so that none is new later."""
    streams = [
        Path(
            write_video(
                tmp_path / f"{number}.h264",
                numbered(20, height=96 - 32 * number, width=128),
                options={"x264-params": f"sps-id={number}:bframes=2"},
            )
        ).read_bytes()
        for number in range(2)
    ]
    sets = b"".join(b"\0\0\1" + unit for unit in streams[1].split(b"\0\0\1")[1:] if unit[0] & 31 in (7, 8))
    path = tmp_path / "both.h264"
    path.write_bytes(b"\0" + sets + b"".join(streams))
    video = probe(path)
    assert video.frames == 40
    with open_video(path) as container, pytest.raises(UncertainError, match="the parameters of the stream change"):
        remux(container, np.array([39]))
    made = loader(Manifest([video]), batch_size=1, stride=None, decode=decode)
    assert not next(iter(made)).valid[0] and "a frame is 128x64, not 128x96" in made.stats.faults[0].reason


@pytest.mark.slow
def test_av1_that_changes_its_size_is_a_fault(tmp_path):
    """Its sequence header keeps the size; the frames' own headers have another."""
    options = {"svtav1-params": "resize-mode=1:resize-denom=16:resize-kf-denom=8"}
    path = write_video(tmp_path / "a.mp4", textured(20, height=256, width=256), codec="av1", options=options)
    video = probe(path)
    with open_video(path) as container, pytest.raises(UncertainError, match="the size of the frames changes"):
        remux(container, np.arange(video.frames))
    made = loader(Manifest([video]), batch_size=1, stride=None)
    batch = next(iter(made))
    assert not batch.valid[0] and "128x128, not 256x256" in made.stats.faults[0].reason


def test_frames_in_another_order_than_planned_are_noticed(tmp_path):
    """A file that marks every I-VOP as a keyframe: torchcodec seeks to them, and loses the B-VOPs that follow."""
    path = write_video(
        tmp_path / "a.mp4", numbered(40, height=64, width=96), codec="mpeg4", options={"bf": "2", "g": "9"}
    )
    encoded = np.fromfile(path, np.uint8)
    reasons = set()
    for position in range(1, 40):
        try:
            frames = decode_file(encoded, np.array([0, position]), (64, 96), CPU)
        except RuntimeError as error:
            reasons.add(str(error))
        else:
            assert read_numbers(frames.numpy().transpose(3, 0, 1, 2) / 255) == [0, position]
    assert reasons == {"frames come out in another order than their headers say"}


@pytest.mark.slow
def test_a_thread_that_hangs_costs_one_sample(some, monkeypatch):
    decode, ended = nvdec.decode_file, threading.Event()

    def hanging(encoded, positions, size, device):
        if size == coded_size(some[1]):
            ended.wait()
        return decode(encoded, positions, size, device)

    monkeypatch.setattr(nvdec, "decode_file", hanging)
    made = loader(some, timeout_s=0.5, decode_threads=1)
    clips = by_sample(made)
    ended.set()
    assert len(clips) == 12
    assert [(fault.sample_id, fault.reason) for fault in made.stats.faults] == [
        (1, "not decoded within timeout_s = 0.5 seconds")
    ]


def test_bugs_are_not_faults(some, monkeypatch):
    fail(monkeypatch, {coded_size(some[3])}, TypeError("a bug"))
    with pytest.raises(TypeError, match="a bug"):
        list(loader(some))


# -- what it holds on to --


@pytest.mark.slow
def test_frames_decoded_ahead_are_bounded(some, monkeypatch):
    expected = by_sample(loader(some))
    ahead = []
    submit = decode_stage._Feed._submit
    monkeypatch.setattr(decode_stage._Feed, "_submit", lambda feed: ahead.append(len(feed._under_way)) or submit(feed))
    clips = by_sample(loader(some, batch_size=1, decode_threads=4))
    assert max(ahead) == 8  # two samples a thread and the batch that is waited for
    assert all((clip == expected[key][0]).all() for key, (clip, _) in clips.items())
    ahead.clear()
    monkeypatch.setattr(decode_stage, "_AHEAD_BYTES", 1)
    assert len(by_sample(loader(some, batch_size=1, decode_threads=4))) == 12
    assert max(ahead) == 0


@pytest.mark.slow
def test_a_loader_that_is_dropped_leaves_no_thread_and_no_process(some):
    gc.collect()
    gc.disable()  # nothing may wait for the collector
    try:
        before = set(threading.enumerate()), set(multiprocessing.active_children())
        made = loader(some, "train", workers=1, decode_threads=3)
        next(iter(made))
        started = set(threading.enumerate()) - before[0]
        assert sum(thread.name == "decode" for thread in started) == 3
        del made
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline and (
            set(threading.enumerate()) - before[0] or set(multiprocessing.active_children()) - before[1]
        ):
            time.sleep(0.05)
        assert not set(multiprocessing.active_children()) - before[1]
        assert not [thread for thread in set(threading.enumerate()) - before[0] if thread.name == "decode"]
    finally:
        gc.enable()


def test_an_interrupt_loses_no_batch(some, monkeypatch):
    made = loader(some)
    expected = [batch.sample_ids.tolist() for batch in made]
    made.set_epoch(0)
    batches = iter(made)
    next(batches)
    result = DecodePool.result

    def interrupted(pool, task):
        raise KeyboardInterrupt

    monkeypatch.setattr(DecodePool, "result", interrupted)
    with pytest.raises(KeyboardInterrupt):
        next(batches)
    monkeypatch.setattr(DecodePool, "result", result)
    made.load_state_dict(made.state_dict())
    assert [batch.sample_ids.tolist() for batch in made] == expected[1:]


def test_evaluation_decodes_nothing_past_its_end(some, monkeypatch):
    decoded = []
    decode = nvdec._decode
    monkeypatch.setattr(
        nvdec, "_decode", lambda task, *rest: decoded.append(int(task.sample.sample_id)) or decode(task, *rest)
    )
    made = loader(some, batch_size=4, decode_threads=8)
    for _ in range(2):
        decoded.clear()
        assert len(by_sample(made)) == 12
        assert sorted(number for number in decoded if number != PADDING) == list(range(12))


@pytest.mark.slow
def test_a_script_that_ends_mid_epoch_exits_cleanly(some, tmp_path):
    """A thread that is within C++ when the interpreter ends would abort it."""
    some.write(tmp_path / "list.csv")
    script = (
        "from dali_pipelines import ClipLoader, Manifest\n"
        "settings = dict(mode='train', batch_size=4, num_frames=8, crop_size=32, workers=0, decode='nvdec')\n"
        "loader = ClipLoader(Manifest.read('list.csv'), decode_threads=8, **settings)\n"
        "next(iter(loader))\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0 and not done.stderr


@pytest.mark.slow
def test_threads_that_cannot_start_end_the_run(some, monkeypatch):
    def broken(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "device", broken)
    monkeypatch.setattr(
        nvdec,
        "load_torchcodec",
        lambda: SimpleNamespace(decoders=SimpleNamespace(set_nvdec_cache_capacity=lambda count: None)),
    )
    pool = DecodePool(torch.device("cuda", 0), threads=2, timeout_s=5)
    sample = SimpleNamespace(is_host=False)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        pool.result(pool.submit(sample, (1, 1)))
    pool.close()
    with pytest.raises(RuntimeError, match="the decoding threads have ended"):
        pool.result(pool.submit(sample, (1, 1)))


# -- what must be installed --


@pytest.mark.slow
def test_torchcodec_takes_the_ffmpeg_of_pyav():
    """One FFmpeg in the process beside DALI's own, and none that the system would have to bring."""
    script = (
        "from dali_pipelines.nvdec import prepare\n"
        "import torch\n"
        "prepare(torch.device('cpu'))\n"
        "print(*{line.split()[-1] for line in open('/proc/self/maps') if 'libavcodec' in line and '.so' in line})\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    # "(deleted)" is the empty one of that name.
    libraries = [name for name in done.stdout.split() if name != "(deleted)" and "/nvidia/dali/" not in name]
    assert len(libraries) == 1 and "/av.libs/" in libraries[0], done.stderr


@pytest.mark.parametrize(
    "reason",
    [
        "torchcodec is not installed: pip install 'torchcodec>=0.11'",
        "the driver reports no NVDEC engine on this GPU",
    ],
)
def test_without_torchcodec_or_nvdec(some, monkeypatch, reason):
    """decode="nvdec" is an error that says what to do; "auto" uses the host, and says so in one line."""

    def unavailable(device):
        raise UnavailableError(reason)

    monkeypatch.setattr(routing, "prepare", unavailable)
    with pytest.raises(InputError, match=f"decode is 'nvdec', but {re.escape(reason)}"):
        loader(some)
    pretend_a_gpu(monkeypatch)
    made = loader(some, decode="auto", device="cuda")
    assert made.decode_note == f"the GPU does not decode: {reason}"
    assert set(made.decoders.values()) == {"host"} and made._workers.routing.engine == "host"


def pretend_a_gpu(monkeypatch):
    """For what a loader decides before it starts."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")


def test_auto_on_a_gpu_uses_both_and_says_so(monkeypatch):
    pretend_a_gpu(monkeypatch)
    limits = {("h264", 8): Limits(48, 16, 4096, 4096, 65536, 7)}
    monkeypatch.setattr(routing, "prepare", lambda device: limits)
    from tests.dali_pipelines.test_engines import manifest

    made = loader(manifest(250), "train", decode="auto", device="cuda", workers=16, crop_size=224, stride=32)
    assert made._workers.routing.engine == "nvdec" and 0.2 < made.host_share < 0.4
    assert re.fullmatch(
        r"estimated from the manifest: NVDEC \(7 engines\) alone decodes about 1\d\d clips/s, with 16 workers about "
        rf"2\d\d: host_share {made.host_share:g}",
        made.decode_note,
    )
    assert made.decoders == {"h264": f"NVDEC and host ({made.host_share:.0%})"}
    alone = loader(manifest(250), "train", decode="nvdec", device="cuda", workers=16, crop_size=224, stride=32)
    assert alone.host_share == 0 and alone.decoders == {"h264": "NVDEC"}


def test_torchcodec_that_does_not_work_is_found_at_the_start(monkeypatch):
    """Every clip would else be decoded by the host, slowly."""

    def broken(*_):
        raise RuntimeError("Failed to load NPP library.\nmore")

    monkeypatch.setattr(nvdec, "decode_file", broken)
    with pytest.raises(UnavailableError, match="^torchcodec fails on a test video: Failed to load NPP library.$"):
        nvdec.prepare(CPU)


def test_the_host_decodes_what_hardware_does_not_take(some, tmp_path):
    """As on a GPU with these limits: no AV1, no 10 bits, no frames below 144 pixels; counted with the reason."""
    size = dict(height=144, width=176)
    made = [
        write_video(tmp_path / "h264.mp4", numbered(9, **size)),
        write_video(tmp_path / "av1.mp4", numbered(9, **size), codec="av1"),
        write_video(tmp_path / "ten.mp4", numbered(9, **size), pix_fmt="yuv420p10le"),
        write_video(tmp_path / "small.mp4", numbered(9, height=96, width=96)),
    ]
    manifest = Manifest([probe(path) for path in made])
    manifest.save_arrays(tmp_path)
    rules = Routing(engine="nvdec", on_gpu=True, limits={("h264", 8): Limits(144, 144, 4096, 4096, 65536)})
    source = ClipSource(
        table=str(tmp_path),
        root="",
        index=None,
        cache=None,
        view=loader(manifest)._view,
        sampler=EntrySampler(rows=4, training=False, seed=0, step_entries=1, rank=0, world_size=1),
        start=0,
        end=None,
        routing=rules,
        host_ids=frozenset(),
        given_up={},
        max_pixels=1 << 26,
    )
    samples = [source.sample(place) for place in range(4)]
    assert [bool(sample.is_host) for sample in samples] == [False, True, True, True]
    assert [sample.fallback.tobytes().decode() for sample in samples] == [
        "",
        "not by NVDEC: NVDEC here does not take av1 in yuv420p",
        "not by NVDEC: NVDEC here does not take h264 in yuv420p10le",
        "not by NVDEC: NVDEC here does not take frames of this size",
    ]
    assert not any(sample.fault.size for sample in samples)


# -- on a GPU --


@pytest.mark.gpu
def test_the_driver_reports_its_limits():
    limits = nvdec.driver_limits(torch.device("cuda", 0))
    assert limits["h264", 8].takes(256, 340) and limits["h264", 8].engines >= 1
    assert not limits["h264", 8].takes(2, 2)
    assert ("mjpeg", 8) not in limits


@pytest.mark.gpu
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("mode", ["train", "validate", "test"])
def test_nvdec_gives_the_planned_frames_itself(numbered_videos, mode, workers):
    """The host decodes what this GPU does not take, and nothing else."""
    on_host = by_sample(loader(numbered_videos, mode, decode="host"))
    made = loader(numbered_videos, mode, device="cuda", workers=workers)
    rules = made._workers.routing
    for sample_id, (clip, engine) in by_sample(made).items():
        video = numbered_videos[sample_id]
        assert engine == ("nvdec" if rules.takes(video) else "host"), (video.path, made.stats.fallbacks)
        expected = on_host[sample_id][0]
        for got, right in zip(clip.cpu(), expected) if mode == "test" else [(clip.cpu(), expected)]:
            assert read_numbers(got.numpy()) == read_numbers(right.numpy()), video.path
            assert (got - right).abs().mean() < 2 / 255
    assert made.stats.engines["nvdec"] >= 10 and not made.stats.faults


@pytest.mark.gpu
def test_sizes_that_share_a_hardware_decoder(tmp_path):
    """In turn, many times, in many threads: each has its own frames."""
    videos = []
    for codec in ("h264", "hevc"):
        for number, (height, width) in enumerate(SAME_BLOCKS):
            path = tmp_path / f"{codec}{number}.mp4"
            write_video(path, textured(12, height=height, width=width, seed=number), codec=codec)
            videos.append(probe(path)._replace(path=path.name))
    manifest = Manifest(videos * 10, root=tmp_path)
    settings = dict(batch_size=10, stride=None, crop_size=64, workers=4)
    on_host = by_sample(loader(manifest, decode="host", **settings))
    made = loader(manifest, device="cuda", decode_threads=8, **settings)
    for sample_id, (clip, engine) in by_sample(made).items():
        assert engine == "nvdec"
        assert (clip.cpu() - on_host[sample_id][0]).abs().mean(dim=(0, 2, 3)).max() < 3 / 255  # of each frame


@pytest.mark.gpu
@pytest.mark.parametrize("matrix, full_range", COLOURS)
@pytest.mark.parametrize("codec, suffix", [("h264", "mp4"), ("hevc", "mp4"), ("vp9", "webm")])
def test_nvdecs_colours(tmp_path, codec, suffix, matrix, full_range):
    """2/255 on average, and a wrong matrix would be 4."""
    rgb_frames = textured(6, height=160, width=192)
    for number, colour in enumerate(([255, 0, 0], [0, 255, 0], [0, 0, 255])):
        rgb_frames[number][:, :96] = colour
    path = write_video(tmp_path / f"a.{suffix}", rgb_frames, codec=codec, matrix=matrix, full_range=full_range)
    settings = dict(batch_size=1, num_frames=6, stride=None, crop_size=64)
    on_host = by_sample(loader(Manifest([probe(path)]), decode="host", **settings))[0][0]
    clip, engine = by_sample(loader(Manifest([probe(path)]), device="cuda", **settings))[0]
    is_known = matrix in (None, 5, 6) or (matrix == 1 and codec != "vp9")
    assert engine == ("nvdec" if is_known and not (codec == "vp9" and full_range) else "host")
    assert (clip.cpu() - on_host).abs().mean() < 2 / 255


@pytest.mark.gpu
def test_auto_uses_both_engines(numbered_videos):
    made = loader(numbered_videos, "train", device="cuda", host_share=0.5, decode="auto", workers=2)
    clips = by_sample(made)
    assert {engine for _, engine in clips.values()} == {"nvdec", "host"} and not made.stats.faults
