"""ClipLoader: exactly the planned frames and pixels, whatever decodes them, however they are shared out."""

import errno
import mmap
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

import dali_pipelines.workers as workers_module
from dali_pipelines import ClipLoader, InputError, Manifest
from dali_pipelines.plan import PADDING
from dali_pipelines.probe import probe
from dali_pipelines.sampling import frame_positions
from tests.dali_pipelines.sources import CRASHES, HANGS, DyingSource, TroubledSource
from tests.videos import decode_all, edit_packets, numbered, read_numbers, textured, write_video

PROJECT = Path(__file__).parents[2]
SETTINGS = dict(batch_size=4, num_frames=8, crop_size=32, workers=0)


def loader(manifest, mode="train", **changes):
    return ClipLoader(manifest, mode=mode, **(SETTINGS | changes))


def by_sample(batches):
    """{sample id: clip}, padding left out."""
    return {
        int(sample_id): clip
        for batch in batches
        for sample_id, clip in zip(batch.sample_ids, batch.clips, strict=True)
        if sample_id != PADDING
    }


@pytest.fixture(scope="module")
def textured_videos(tmp_path_factory) -> Manifest:
    """Thirteen textured videos, three codecs mixed, of different sizes and lengths."""
    folder = tmp_path_factory.mktemp("textured")
    kinds = [("h264", "mp4"), ("vp9", "webm"), ("mpeg4", "avi")]
    videos = []
    for number in range(13):
        codec, suffix = kinds[number % 3]
        rgb_frames = textured(8 + 3 * number, height=48 + 2 * (number % 5), width=40 + 6 * number, seed=number)
        path = write_video(folder / f"{number}.{suffix}", rgb_frames, codec=codec)
        videos.append(probe(path)._replace(path=os.path.basename(path), label=number % 4))
    return Manifest(videos, root=folder)


# -- which frames --


ODD_SIDES = "not by NVDEC: torchcodec does not convert frames with odd sides as FFmpeg does"


@pytest.mark.slow
@pytest.mark.parametrize("workers, decode", [(0, "auto"), (2, "host"), (2, "dali"), (0, "nvdec"), (2, "nvdec")])
@pytest.mark.parametrize("mode", ["train", "validate", "test"])
def test_numbered_videos_of_every_kind_give_exactly_the_planned_frames(numbered_videos, mode, workers, decode):
    made = loader(numbered_videos, mode, batch_size=6, workers=workers, stride=8, decode=decode)
    clips = by_sample(made)
    assert len(clips) == len(numbered_videos)
    starts = set()
    for sample_id, clip in clips.items():
        video = numbered_videos[sample_id]
        for view in clip if mode == "test" else clip[None]:
            found = read_numbers(view.numpy())
            window = {"frames": video.frames, "fps": video.fps, "num_frames": 8, "stride": 8, "target_fps": 30}
            allowed = [
                frame_positions(**window, past_end="fit", start=start).tolist()
                for start in (np.linspace(0, 0.9999, 400) if mode == "train" else [0.0])
            ]
            assert found in allowed, (video.path, found)
            starts.add(found[0])
    assert len(starts) > 3 if mode == "train" else starts == {0}
    assert made.stats.faults == []
    assert made.stats.fallbacks == ({ODD_SIDES: 2} if decode == "nvdec" else {})


def not_coded_vop(number, data):
    """Every tenth packet becomes an MPEG-4 frame that says "as before", and that decoders put nothing out for."""
    if number % 10 != 8:
        return data
    bits = f"01{0:b}1{number % 25:05b}10" + "01111"  # type P, no more seconds, time within this one, vop_coded 0
    return bytes([0, 0, 1, 0xB6, int(bits[:8], 2), int(bits[8:], 2)])


def hidden_frame(number, data):
    """Every tenth VP8 frame is one that only others refer to."""
    return bytes([data[0] & ~0x10]) + data[1:] if number % 10 == 8 else data


@pytest.mark.parametrize("codec, suffix, edit", [("mpeg4", "avi", not_coded_vop), ("vp8", "webm", hidden_frame)])
def test_packets_without_a_frame_are_not_counted(tmp_path, codec, suffix, edit):
    whole = write_video(tmp_path / f"whole.{suffix}", numbered(40, height=48, width=64), codec=codec)
    video = probe(edit_packets(whole, tmp_path / f"edited.{suffix}", edit))
    shown = read_numbers(np.moveaxis(decode_all(video.path), -1, 0) / 255)
    assert len(shown) == video.frames == 36
    for decode in ("host", "dali", "nvdec"):
        made = loader(Manifest([video]), "validate", batch_size=1, stride=None, decode=decode)
        clip = by_sample(made)[0]
        assert read_numbers(clip.numpy()) == [shown[n] for n in np.linspace(0, 35, 8).astype(int)]
        assert not made.stats.faults


@pytest.mark.parametrize("decode", ["dali", "nvdec"])
@pytest.mark.parametrize("suffix", ["mp4", "webm"])
def test_a_file_with_a_changed_frame_size_is_a_fault_for_every_engine(tmp_path, suffix, decode):
    codec = {"mp4": "h264", "webm": "vp9"}[suffix]
    video = probe(write_video(tmp_path / f"a.{suffix}", numbered(9, height=48, width=64), codec=codec))
    write_video(tmp_path / f"a.{suffix}", numbered(9, height=96, width=128), codec=codec)
    made = loader(Manifest([video]), "test", batch_size=1, stride=None, mean=(0.5, 0.5, 0.5), decode=decode)
    batch = next(iter(made))
    assert not batch.valid[0] and (batch.clips == -0.5).all()
    assert "a frame is 128x96, not 64x48" in made.stats.faults[0].reason


@pytest.mark.slow
def test_views_of_one_decode_are_neighbours_with_their_own_windows_and_crops(numbered_videos):
    long = Manifest([numbered_videos[n]._replace(label=n) for n in (0, 2, 8, 11)], root=numbered_videos.root)
    single = by_sample(loader(long, stride=8, batch_size=2))
    for decode in ("host", "dali", "nvdec"):
        made = loader(long, stride=8, batch_size=6, views_per_decode=3, workers=1, decode=decode)
        assert len(made) == 2
        batches = list(made)
        sample_ids = torch.cat([batch.sample_ids for batch in batches]).view(4, 3)
        assert sorted(sample_ids[:, 0].tolist()) == [0, 1, 2, 3] and (sample_ids == sample_ids[:, :1]).all()
        assert all(batch.valid.all() and (batch.labels == long.labels[batch.sample_ids]).all() for batch in batches)
        starts = set()
        for sample_id, clips in zip(sample_ids[:, 0].tolist(), torch.cat([batch.clips for batch in batches]).split(3)):
            assert (clips[0] - single[sample_id]).abs().mean() < 2 / 255  # the first is what it is without the others
            numbers = [read_numbers(clip.numpy()) for clip in clips]
            steps = np.diff(numbers, axis=1)
            assert (steps >= 7).all() and (steps <= 8).all()
            starts |= {found[0] for found in numbers}
        assert len(starts) > 6
    assert made.stats.clips == 12


@pytest.mark.parametrize("decode", ["host", "dali", "nvdec"])
def test_windows_of_the_test_go_from_the_start_to_the_end_with_three_crops_each(numbered_videos, decode):
    long = Manifest([numbered_videos[n]._replace(label=n) for n in (0, 2, 8, 11)], root=numbered_videos.root)
    single = by_sample(loader(long, "test", stride=8))
    for sample_id, views in by_sample(loader(long, "test", stride=8, num_windows=3, decode=decode)).items():
        assert views.shape == (9, 3, 8, 32, 32)
        assert (views[:3] - single[sample_id]).abs().mean() < 2 / 255  # the first window is that of a single one
        numbers = [read_numbers(view.numpy()) for view in views]
        assert numbers[0::3] == numbers[1::3] == numbers[2::3]
        first, middle, last = numbers[0::3]
        assert first[0] == 0 and last[-1] == long[sample_id].frames - 1
        assert abs(middle[0] - last[0] / 2) <= 1 and np.ptp(first) == np.ptp(middle) == np.ptp(last)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_windows_in_parts_are_the_same_windows(numbered_videos, workers):
    """Five windows, two at once: three entries a video, the last window twice in the last of them."""
    gone = numbered_videos[2]._replace(path="gone.mp4")
    some = Manifest([numbered_videos[0], gone, numbered_videos[8]], root=numbered_videos.root)
    whole = by_sample(loader(some, "test", stride=8, num_windows=5))
    made = loader(some, "test", stride=8, num_windows=5, windows_at_once=2, batch_size=2, workers=workers)
    batches = list(made)
    sample_ids = torch.cat([batch.sample_ids for batch in batches])
    assert sample_ids.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, -1]
    assert torch.cat([batch.valid for batch in batches]).tolist() == [True] * 3 + [False] * 3 + [True] * 3 + [False]
    assert [fault.sample_id for fault in made.stats.faults] == [1, 1, 1]
    clips = torch.cat([batch.clips for batch in batches]).unflatten(1, (2, 3))
    for sample_id in (0, 2):
        windows = clips[sample_ids == sample_id].flatten(0, 1)
        expected = whole[sample_id].unflatten(0, (5, 3))
        torch.testing.assert_close(windows, torch.cat([expected, expected[4:]]))
    seconds = made.window_seconds(0)
    assert seconds.shape == (5, 2) and seconds[0, 0] == 0 and seconds[4, 1] == some[0].frames / some[0].fps
    assert (np.diff(seconds, axis=0) > 0).all()


def test_windows_without_a_stride_are_shares_of_the_video(numbered_videos):
    long = Manifest([numbered_videos[0]], root=numbered_videos.root)
    made = loader(long, "test", stride=None, num_windows=4, batch_size=1)
    numbers = [read_numbers(view.numpy()) for view in by_sample(made)[0][::3]]
    assert [(found[0], found[-1]) for found in numbers] == [(0, 24), (25, 49), (50, 74), (75, 99)]
    np.testing.assert_allclose(made.window_seconds(0), [[0, 1], [1, 2], [2, 3], [3, 4]])


def test_past_end_hold_repeats_the_last_frame(numbered_videos):
    short = next(n for n in range(len(numbered_videos)) if numbered_videos[n].frames == 50)
    clip = by_sample(loader(numbered_videos, "validate", past_end="hold"))[short]
    assert read_numbers(clip.numpy()) == [0, 30, *[49] * 6]


# -- which pixels --


def reference_views(video, file, positions, mode, crop):
    """Decode everything with PyAV, turn, resize, crop, in torch: [V, C, T, crop, crop]."""
    frames = np.rot90(decode_all(file)[positions], video.rotation // 90, axes=(1, 2)).copy()
    frames = torch.from_numpy(frames).permute(0, 3, 1, 2).double() / 255
    height, width = frames.shape[2:]
    short = crop if mode == "test" else round(crop * 8 / 7)
    size = (short, width * short // height) if height < width else (height * short // width, short)
    frames = interpolate(frames, size=size, mode="bilinear", align_corners=False)
    if mode == "test":
        step = (max(size) - crop) // 2
        corners = [(0, k * step) if height < width else (k * step, 0) for k in range(3)]
    else:
        corners = [tuple(round((side - crop) / 2) for side in size)]
    return torch.stack([frames[:, :, y : y + crop, x : x + crop].transpose(0, 1) for y, x in corners]).float()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["validate", "test"])
def test_pixels_are_those_of_resize_then_crop(textured_videos, mode):
    clips = by_sample(loader(textured_videos, mode, stride=None))
    for sample_id, clip in clips.items():
        video = textured_videos[sample_id]
        positions = np.floor(np.linspace(0, video.frames - 1, 8)).astype(int)
        views = reference_views(video, textured_videos.file(sample_id), positions, mode, 32)
        error = ((clip if mode == "test" else clip[None]) - views).abs()
        assert error.max() < 1e-3, video.path


@pytest.mark.slow
def test_dalis_decoder_gives_the_nearest_frame(textured_videos):
    """An error by one frame can hide in the tolerance between decoders; it cannot hide from a comparison with all."""
    clips = by_sample(loader(textured_videos, "validate", stride=None, decode="dali"))
    for sample_id, clip in clips.items():
        video = textured_videos[sample_id]
        everything = np.arange(video.frames)
        frames = reference_views(video, textured_videos.file(sample_id), everything, "validate", 32)[0]
        distance = (clip[:, :, None] - frames[:, None]).abs().mean(dim=(0, 3, 4))
        assert distance.argmin(dim=1).tolist() == np.floor(np.linspace(0, video.frames - 1, 8)).astype(int).tolist()
        assert distance.min(dim=1).values.max() < 2 / 255  # it converts colours a little differently from FFmpeg


def test_rotated_videos_are_shown_upright(tmp_path):
    rgb_frames = textured(10, height=48, width=64)
    videos = []
    for rotation in (0, 90, 180, 270):
        path = write_video(tmp_path / f"{rotation}.mp4", rgb_frames, rotation=rotation)
        videos.append(probe(path)._replace(path=f"{rotation}.mp4"))
    manifest = Manifest(videos, root=tmp_path)
    for mode in ("validate", "test"):
        for sample_id, clip in by_sample(loader(manifest, mode, stride=None)).items():
            positions = np.floor(np.linspace(0, 9, 8)).astype(int)
            views = reference_views(manifest[sample_id], manifest.file(sample_id), positions, mode, 32)
            assert ((clip if mode == "test" else clip[None]) - views).abs().max() < 1e-3


@pytest.mark.parametrize("num_frames", [8, 16])
def test_golden_three_crop_of_paddlevideo(shared_videos, num_frames):
    golden = np.load(shared_videos.parent / "golden" / "three_crop.npz")
    videos = [probe(path)._replace(path=path.name) for path in sorted(shared_videos.iterdir())]
    manifest = Manifest(videos, root=shared_videos)
    made = loader(manifest, "test", batch_size=2, num_frames=num_frames, crop_size=224, past_end="hold", workers=2)
    for sample_id, clip in by_sample(made).items():
        key = f"{manifest[sample_id].path}/{num_frames}"
        left, middle, right = clip
        views = torch.cat([left, right, middle], dim=1)  # PaddleVideo's order
        index = torch.from_numpy(golden[f"{key}/probe_index"]).long().T
        error = 255 * (views[tuple(index)] - torch.from_numpy(golden[f"{key}/probe_value"])).abs()
        assert error.mean() < 0.05 and error.max() < 0.5, key


@pytest.mark.slow
def test_mean_std_and_half_precision(textured_videos):
    plain = by_sample(loader(textured_videos, "validate"))
    mean, std = (0.45, 0.4, 0.5), (0.225, 0.2, 0.3)
    changed = by_sample(loader(textured_videos, "validate", mean=mean, std=std, dtype=torch.float16))
    for sample_id, clip in plain.items():
        expected = (clip - torch.tensor(mean).view(3, 1, 1, 1)) / torch.tensor(std).view(3, 1, 1, 1)
        assert changed[sample_id].dtype == torch.float16
        assert (changed[sample_id].float() - expected).abs().max() < 3e-3


# -- the same clips however they are shared out --


@pytest.fixture(scope="module", params=["train", "test"])
def reference(request, textured_videos):
    """(mode, every clip of its first epoch, one at a time and in this process)."""
    clips = by_sample(loader(textured_videos, request.param, batch_size=1))
    assert len(clips) == 13
    return request.param, clips


@pytest.mark.slow
@pytest.mark.parametrize("workers, batch_size", [(0, 8), (1, 1), (2, 3), (4, 8)])
def test_workers_and_batch_size_change_nothing(textured_videos, reference, workers, batch_size):
    mode, expected = reference
    clips = by_sample(loader(textured_videos, mode, workers=workers, batch_size=batch_size))
    assert len(clips) == (13 // batch_size * batch_size if mode == "train" else 13)
    assert all((expected[sample_id] == clip).all() for sample_id, clip in clips.items())


@pytest.mark.parametrize("mode", ["train", "validate"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_an_epoch(textured_videos, mode, world_size):
    reference = by_sample(loader(textured_videos, mode, batch_size=1, step_entries=6))
    settings = dict(mode=mode, batch_size=2 if world_size == 3 else 3, step_entries=6, world_size=world_size)
    ranks = [by_sample(loader(textured_videos, **settings, rank=rank)) for rank in range(world_size)]
    together = {sample_id: clip for clips in ranks for sample_id, clip in clips.items()}
    assert sum(map(len, ranks)) == len(together) == len(reference)
    assert all((reference[sample_id] == together[sample_id]).all() for sample_id in reference)


@pytest.mark.slow
def test_seeds_and_epochs(textured_videos):
    def epochs(seed):
        made = loader(textured_videos, seed=seed)
        return [list(made) for _ in range(2)]

    first, again, other = epochs(0), epochs(0), epochs(1)
    ids = [[batch.sample_ids.tolist() for batch in epoch] for epoch in (*first, *again, *other)]
    assert ids[:2] == ids[2:4] and len({str(found) for found in ids}) == 4
    for one, two in zip(first[0] + first[1], again[0] + again[1], strict=True):
        assert (one.clips == two.clips).all()
    assert not any(
        (by_sample(first[0])[k] == by_sample(first[1])[k]).all()
        for k in by_sample(first[0]).keys() & by_sample(first[1]).keys()
    )


# -- epochs and position --


def ids(batches):
    return [batch.sample_ids.tolist() for batch in batches]


@pytest.mark.slow
@pytest.mark.parametrize(
    "mode, changes", [("train", {}), ("validate", {}), ("test", {}), ("train", {"views_per_decode": 2})]
)
def test_state_restores_any_batch_even_with_other_workers_and_ranks(textured_videos, mode, changes):
    settings = dict(mode=mode, batch_size=2, step_entries=4, **changes)
    views = changes.get("views_per_decode", 1)
    unbroken = loader(textured_videos, **settings)
    assert len(unbroken) in (6, 8, 12)
    batches, states = [], []
    for _ in range(2):
        for batch in unbroken:
            batches.append(batch)
            states.append(unbroken.state_dict())
    per_epoch = len(unbroken)
    for consumed in (1, per_epoch - 1, per_epoch, per_epoch + 2):
        resumed = loader(textured_videos, **settings, workers=1)
        resumed.load_state_dict(states[consumed - 1])
        rest = [batch for _ in range(2 - consumed // per_epoch) for batch in resumed]
        for got, expected in zip(rest, batches[consumed:], strict=True):
            assert (got.sample_ids == expected.sample_ids).all() and (got.clips == expected.clips).all()
    resumed = [loader(textured_videos, **(settings | dict(rank=rank, world_size=2))) for rank in (0, 1)]
    for each in resumed:
        each.load_state_dict(states[1])  # one step of four entries
    merged = [
        [a, b]
        for one, two in zip(*map(iter, resumed), strict=True)
        for a, b in zip(*(batch.sample_ids.view(-1, views).tolist() for batch in (one, two)))
    ]
    assert sum(sum(merged, []), []) == sum(ids(batches[2:per_epoch]), [])


@pytest.mark.slow
def test_leaving_a_for_loop_early_ends_its_epoch(textured_videos):
    whole = loader(textured_videos)
    epochs = [ids(whole) for _ in range(3)]
    made = loader(textured_videos)
    next(iter(made))
    state = made.state_dict()
    assert ids(made) == epochs[1] and ids(made) == epochs[2]
    made.load_state_dict(state)
    assert ids(made) == epochs[0][1:]  # the state was that of the broken-off epoch
    made.set_epoch(1)
    assert ids(made) == epochs[1]


def test_an_old_iterator_takes_no_batches_from_a_new_one(textured_videos):
    made = loader(textured_videos)
    old = iter(made)
    next(old)
    made.set_epoch(0)
    new = iter(made)
    first = next(new)
    assert list(old) == [] and len([first, *new]) == len(made)


@pytest.mark.slow
def test_an_interrupt_while_waiting_loses_no_batch(textured_videos):
    made = loader(textured_videos)
    expected = ids(made)
    made.set_epoch(0)
    batches = iter(made)
    next(batches)
    run = made._workers.pipeline.run

    def interrupted():
        run()
        raise KeyboardInterrupt

    made._workers.pipeline.run = interrupted
    with pytest.raises(KeyboardInterrupt):
        next(batches)
    made.load_state_dict(made.state_dict())
    assert ids(made) == expected[1:]


def test_a_position_of_another_order_is_refused(textured_videos):
    state = loader(textured_videos).state_dict()
    with pytest.raises(InputError, match="seed 0, this loader 5"):
        loader(textured_videos, seed=5).load_state_dict(state)
    with pytest.raises(
        InputError, match=r"clips per step \(step_entries, optim.global_batch_size\): 8, this loader \d"
    ):
        loader(textured_videos).load_state_dict(state | {"step_entries": 8})
    with pytest.raises(InputError, match="within a batch"):
        loader(textured_videos).load_state_dict(state | {"entries": 3})


def test_evaluation_marks_its_padding(textured_videos):
    batches = list(loader(textured_videos, "validate"))
    last = batches[-1]
    assert last.sample_ids.tolist() == [12, -1, -1, -1] and last.labels.tolist() == [0, -1, -1, -1]
    assert last.valid.tolist() == [True, False, False, False] and last.clips[1:].abs().max() == 0
    assert torch.cat([batch.labels for batch in batches])[:13].tolist() == textured_videos.labels.tolist()


@pytest.mark.slow
def test_evaluation_stops_its_workers_and_training_keeps_them(textured_videos):
    before = set(multiprocessing.active_children())
    evaluation = loader(textured_videos, "validate", workers=2)
    list(evaluation)
    for _ in evaluation:  # left early
        break
    training = loader(textured_videos, workers=2)
    list(training)
    started = set(multiprocessing.active_children()) - before
    assert len(started) == 2
    training.close()
    deadline = time.monotonic() + 10
    while started & set(multiprocessing.active_children()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not started & set(multiprocessing.active_children())


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_their_process_however_it_ends(textured_videos, tmp_path, end):
    textured_videos.write(tmp_path / "list.csv")
    script = (
        "import multiprocessing, sys, time\n"
        "from dali_pipelines import ClipLoader, Manifest\n"
        "settings = dict(mode='train', batch_size=4, num_frames=2, crop_size=32, workers=2)\n"
        "loader = ClipLoader(Manifest.read('list.csv'), **settings)\n"
        "next(iter(loader))\n"
        "print(*(child.pid for child in multiprocessing.active_children()), flush=True)\n"
        "time.sleep(100)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as process:
        workers = [int(pid) for pid in process.stdout.readline().split()]
        process.send_signal(end)
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(workers) == 2 and not any(Path(f"/proc/{pid}").exists() for pid in workers)


@pytest.mark.slow
def test_a_killed_worker_costs_a_restart_and_no_clip(textured_videos):
    expected = ids(loader(textured_videos, batch_size=2))
    made = loader(textured_videos, batch_size=2, workers=2)
    got = []
    for batch in made:
        got.append(batch.sample_ids.tolist())
        if len(got) == 1:
            for child in multiprocessing.active_children():
                child.kill()
    assert got == expected and made.stats.fallbacks == {"a worker process died": 1}


@pytest.mark.slow
def test_a_hanging_and_a_crashing_decoder_cost_one_sample_each(textured_videos, monkeypatch):
    monkeypatch.setattr(workers_module, "ClipSource", TroubledSource)
    made = loader(textured_videos, "validate", workers=2, timeout_s=2)
    batches = list(made)
    assert sum(ids(batches), []) == [*range(13), -1, -1, -1]
    assert [n for n, valid in enumerate(torch.cat([batch.valid for batch in batches])[:13]) if not valid] == [4, 9]
    reasons = {fault.sample_id: fault.reason for fault in made.stats.faults}
    assert reasons[HANGS] == "not decoded within timeout_s = 2 seconds"
    assert reasons[CRASHES] == "the process that decodes it ended with signal 11, twice"
    assert made.stats.fallbacks == {"a worker process hung": 1, "a worker process died": 2}
    assert len(list(made)) == 4 and sum(made.stats.fallbacks.values()) == 3  # neither is tried again


@pytest.mark.slow
@pytest.mark.parametrize("trouble", ["stopped", "stopped while idle", "killed while idle", "killed with a lock"])
def test_workers_in_trouble_do_not_stop_the_run(textured_videos, trouble):
    """Idle ones sleep in a queue of DALI's, which waits for each that it wakes; one may die while it holds a lock."""
    made = loader(textured_videos, batch_size=2, workers=2, timeout_s=1)
    expected = ids(loader(textured_videos, batch_size=2))
    got = []
    for batch in made:
        got.append(batch.sample_ids.tolist())
        if len(got) == 2:
            if "idle" in trouble:
                time.sleep(0.5)
            if "lock" in trouble:
                lock = made._workers.pipeline._py_pool.pool._result_queue.lock
                if not os.fork():  # a process that ends with it
                    os._exit(not lock.acquire(timeout=10))
                assert os.wait()[1] == 0
            for child in multiprocessing.active_children():
                os.kill(child.pid, signal.SIGSTOP if "stopped" in trouble else signal.SIGKILL)
    assert got == expected and sum(made.stats.fallbacks.values()) == 1
    made.close()
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_workers_that_cannot_start_end_the_run(textured_videos, monkeypatch):
    monkeypatch.setattr(workers_module, "ClipSource", DyingSource)
    with pytest.raises(InputError, match="the loader's processes keep ending"):
        next(iter(loader(textured_videos, workers=2)))


def test_too_little_shared_memory_is_reported_before_it_kills_workers(textured_videos, monkeypatch):
    monkeypatch.setattr(workers_module.shutil, "disk_usage", lambda path: SimpleNamespace(free=2**16))
    with pytest.raises(InputError, match=r"/dev/shm has 0 MB free.*--shm-size"):
        next(iter(loader(textured_videos, workers=1, num_frames=32, batch_size=13)))


def test_shared_memory_that_the_loader_writes_to_is_reserved_at_creation():
    """On a full /dev/shm, the first write would end the process by SIGBUS."""
    with workers_module._reserved_shared_memory():
        made = workers_module.SharedMem.allocate(1 << 20)
    assert os.fstat(made.handle).st_blocks * 512 == mmap.PAGESIZE
    assert os.fstat(workers_module.SharedMem.allocate(1 << 20).handle).st_blocks == 0


def test_a_full_temporary_folder_is_named(textured_videos, monkeypatch):
    def no_room(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Manifest, "save_arrays", no_room)
    with pytest.raises(InputError, match="clip_loader_pid.*: cannot be written .No space left on device.; TMPDIR="):
        loader(textured_videos)


@pytest.mark.slow
def test_workers_do_not_load_torch_or_rerun_the_users_script(textured_videos, tmp_path):
    """The script has no main guard: spawn would run it again in every worker, and load torch."""
    textured_videos.write(tmp_path / "list.csv")
    (tmp_path / "script.py").write_text(
        "import multiprocessing, torch\n"
        "from dali_pipelines import ClipLoader, Manifest\n"
        "print('script runs', flush=True)\n"
        "settings = dict(mode='train', batch_size=4, num_frames=2, crop_size=32, workers=2)\n"
        "loader = ClipLoader(Manifest.read('list.csv'), **settings)\n"
        "batch = next(iter(loader))\n"
        "for worker in multiprocessing.active_children():\n"
        "    print('torch' if 'libtorch' in open(f'/proc/{worker.pid}/maps').read() else 'no torch')\n"
    )
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    for command, text in (
        ([sys.executable, "script.py"], None),
        ([sys.executable, "-"], (tmp_path / "script.py").read_text()),
    ):
        done = subprocess.run(
            command, input=text, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.stdout.split("\n")[:-1] == ["script runs", "no torch", "no torch"], done.stderr


# -- what cannot be read --


@pytest.mark.slow
def test_unreadable_videos_are_black_invalid_and_named(textured_videos, tmp_path):
    videos = [textured_videos[n]._replace(path=str(textured_videos.file(n))) for n in range(8)]
    (tmp_path / "text.mp4").write_text("no video " * 100)
    damaged = bytearray(Path(videos[4].path).read_bytes())  # VP9, for DALI's own decoder
    damaged[len(damaged) // 3 :] = b"\0" * 20
    (tmp_path / "damaged.webm").write_bytes(damaged)
    videos[1] = videos[1]._replace(path="/nowhere/gone.webm")
    videos[3] = videos[3]._replace(path=str(tmp_path / "text.mp4"))
    videos[4] = videos[4]._replace(path=str(tmp_path / "damaged.webm"))
    videos[6] = videos[6]._replace(frames=900)
    manifest = Manifest(videos, root=tmp_path)
    good = by_sample(loader(textured_videos, "validate", stride=None))
    for workers, decode in ((0, "host"), (2, "host"), (2, "dali"), (0, "nvdec")):
        made = loader(manifest, "validate", stride=None, workers=workers, decode=decode)
        for _ in range(2):
            batches = list(made)
            valid = torch.cat([batch.valid for batch in batches]).tolist()
            assert valid == [True, False, True, False, False, True, False, True]
            labels = torch.cat([batch.labels for batch in batches]).tolist()
            assert labels == [video.label for video in videos]
            for sample_id, clip in by_sample(batches).items():
                if valid[sample_id]:
                    assert (clip - good[sample_id]).abs().mean() < 2 / 255  # VP9 beside a bad one is decoded elsewhere
                else:
                    assert clip.abs().max() == 0
        first = {fault.sample_id: fault for fault in made.stats.faults if fault.epoch == 0}
        assert sorted(first) == [1, 3, 4, 6] and len(made.stats.faults) == 8
        assert first[1].reason == "no such file or directory" and first[1].path == "/nowhere/gone.webm"
        assert "only" in first[6].reason and "index it again" in first[6].reason
        assert "a text file" in first[3].reason


def test_statistics(textured_videos):
    made = loader(textured_videos, "validate")
    list(made)
    assert made.stats.clips == 13 and made.stats.packets_read >= made.stats.packets_kept > 100
    assert 0 < made.stats.wait_seconds <= made.stats.seconds and made.stats.clips_per_second > 0


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(mode="valid"), "mode is 'valid'; expected one of train, validate, test"),
        (dict(batch_size=0), "batch_size is 0"),
        (dict(past_end="loop"), "past_end"),
        (dict(stride=0), "stride is 0"),
        (dict(std=(1, 0, 1)), "std"),
        (dict(rank=1), "rank is 1; expected 0 to 0"),
        (dict(step_entries=6), "multiple of 4 clips x 1 ranks"),
        (dict(short_side=31), "at least the crop of 32"),
        (dict(short_side=(40, 35)), "low <= high"),
        (dict(batch_size=14), "13 videos, fewer than the 14 of one training step"),
        (dict(dtype=torch.bfloat16), "dtype"),
        (dict(device="gpu"), "device is 'gpu'; expected cpu, cuda or cuda:N"),
        (dict(seed=2**64), "seed is"),
        (dict(workers=-1), "workers is -1"),
        (dict(world_size=0), "world_size is 0"),
        (dict(decode="gpu"), "decode is 'gpu'; expected one of auto, nvdec, dali, host"),
        (dict(host_share=1.5), "host_share is 1.5; expected 0 to 1"),
        (dict(decode_threads=0), "decode_threads is 0"),
        (dict(num_windows=0), "num_windows is 0"),
        (dict(num_windows=2, windows_at_once=3), "windows_at_once is 3; expected 1 to the 2 num_windows"),
        (dict(views_per_decode=0), "views_per_decode is 0"),
        (dict(views_per_decode=3), "multiple of the 3 views_per_decode"),
        (dict(timeout_s=0), "timeout_s is 0"),
    ],
)
def test_settings_that_cannot_work(textured_videos, changes, message):
    with pytest.raises(InputError, match=message):
        loader(textured_videos, **changes)


def test_an_empty_manifest():
    with pytest.raises(InputError, match="no videos"):
        loader(Manifest(()), "validate")


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["train", "validate", "test"])
def test_dalis_decoder_on_a_gpu_gives_the_planned_frames(numbered_videos, mode):
    """Every codec that it takes, in one batch with those that it does not; see test_nvdec.py for the other ways."""
    on_host = by_sample(loader(numbered_videos, mode, batch_size=6, stride=8))
    made = loader(numbered_videos, mode, batch_size=6, stride=8, device="cuda", workers=2, decode="dali")
    routing = made._workers.routing
    for batch in made:
        for sample_id, clip, engine in zip(batch.sample_ids.tolist(), batch.clips, batch.engines):
            if sample_id == PADDING:
                continue
            video = numbered_videos[sample_id]
            assert engine == ("dali" if routing.takes(video) else "host"), (video.path, made.stats.fallbacks)
            assert clip.is_cuda
            views = zip(clip.cpu(), on_host[sample_id]) if mode == "test" else [(clip.cpu(), on_host[sample_id])]
            for got, expected in views:
                assert read_numbers(got.numpy()) == read_numbers(expected.numpy()), video.path
                assert (got - expected).abs().mean() < 4 / 255
    assert made.stats.engines["dali"] >= 10
