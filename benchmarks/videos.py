"""Finds the videos of a benchmark, compares clips, and counts the packets they need."""

import contextlib
import itertools
import os
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.contestants import cut, cut_exactly, to_float
from benchmarks.work import Work, needed_packets
from common.worker_pool import WorkerPool
from dali_pipelines.errors import InputError
from dali_pipelines.files import absolute, join, open_video, size_of
from dali_pipelines.folders import videos_below
from dali_pipelines.manifest import Manifest, Video, key_of, source_of
from dali_pipelines.packet_index import StaleIndexError, open_index
from dali_pipelines.packets import video_stream
from dali_pipelines.plan import View
from preparation.index import index

CHECKED_BATCHES = 2
_SHOWN = 10  # unreadable videos to print


def find_videos(paths: Sequence[str]) -> Manifest:
    """The videos of files, folders and manifests, with absolute paths and packet index entries. Those that cannot be
    read, or that not all contestants can, are printed, counted and left out. Raises `InputError` if none is left."""
    videos: list[Video] = []
    entries: dict[int, bytes] = {}
    files: list[Path] = []
    for path in map(Path, paths):
        if path.suffix == ".csv":
            manifest = Manifest.read(path)
            root = absolute(manifest.root)
            if manifest.hint:
                print(f"{path}: {manifest.hint}")
            for video in manifest:
                if video.shard:
                    videos.append(video._replace(shard=join(root, video.shard)))
                else:
                    videos.append(video._replace(path=join(root, video.path)))
                if manifest.index is not None:
                    with contextlib.suppress(StaleIndexError):
                        entries[key_of(videos[-1])] = open_index(str(manifest.index)).entry(key_of(video))
        elif path.is_dir():
            below = videos_below(path)
            files += [path / name for name in below.videos]
            if below.note:
                print(f"{path}: {below.note}")
        else:
            files.append(path)
    if files:
        listed = [(os.path.abspath(file), 0) for file in files]
        with tempfile.TemporaryDirectory() as folder:
            probed, rejected = index(listed, root="/", journal=Path(folder, "journal"), pool=WorkerPool())
        if rejected and not len(probed) and not videos:
            more = f" (and {len(rejected) - 1} more that cannot be read)" if len(rejected) > 1 else ""
            raise InputError(f"{rejected[0].path}: {rejected[0].reason}{more}")
        for each in rejected[:_SHOWN]:
            print(f"{each.path}: {each.reason}")
        if rejected:
            more = f", {len(rejected) - _SHOWN} more than are shown" if len(rejected) > _SHOWN else ""
            print(f"{len(rejected)} of {len(files)} files cannot be read and are skipped{more}")
        videos += probed
        entries |= probed.entries
    upright = [video for video in videos if not (video.rotation or video.mirrored)]
    if turned := len(videos) - len(upright):
        print(f"{turned} videos are rotated or mirrored, which not all contestants support, and are skipped")
    videos = upright
    if not videos:
        raise InputError(f"{', '.join(map(str, paths))}: no videos there that can be measured")
    found = Manifest(videos)
    found.entries = entries
    return found


def training_view(num_frames: int, crop_size: int) -> View:
    """How training cuts clips of `num_frames` frames and `crop_size` pixels from videos."""
    return View(mode="train", num_frames=num_frames, crop_size=crop_size)


def compare(work: Work, clips: dict[str, torch.Tensor], base: str) -> dict[str, dict[str, Any]]:
    """For each contestant, the mean difference from `base` on a scale of 255, and the number of frames that are closer
    to a neighbour of the expected frame. `clips`: by name, the first clips of `work`, float32 [N, 3, T, S, S]."""
    if not clips:
        return {}
    wrong = dict.fromkeys(clips, 0)
    count = min(map(len, clips.values()))
    clips = {name: contestant[:count] for name, contestant in clips.items()}
    for place in range(count):
        clip, row = work.clip(place), work.row(place)
        last = work.manifest[row].frames - 1
        neighbours = [(n, max(n - 1, 0), min(n + 1, last)) for n in clip.positions.tolist()]
        needed = set(itertools.chain(*neighbours))
        with open_video(clip.source) as container:
            decoded = itertools.islice(enumerate(container.decode(video_stream(container))), max(needed) + 1)
            images = {n: frame.to_ndarray(format="rgb24") for n, frame in decoded if n in needed}
        for t, near in enumerate(neighbours):
            frames = torch.from_numpy(np.stack([images[n] for n in near]))
            expected = torch.stack([c(frames, clip.rectangle, work.view.crop_size) for c in (cut, cut_exactly)])
            for name, contestant in clips.items():
                differences = (to_float(expected) - contestant[place, :, t, None]).abs().mean(dim=(1, 3, 4))
                right, *others = differences.amin(dim=0).tolist()
                wrong[name] += right > min(others)
    return {
        name: {
            "wrong_frames": wrong[name],
            "mean_difference_of_255": 255 * (contestant - clips[base]).abs().mean().item() if base in clips else None,
        }
        for name, contestant in clips.items()
    }


def count_packets(work: Work) -> dict[str, float]:
    """Mean packets per clip: up to the last requested frame ("in_window"), and fed after selection ("fed")."""
    clips = [work.clip(place) for place in range(CHECKED_BATCHES * work.batch_size)]
    needed = [needed_packets(clip) for clip in clips]
    return {
        "in_window": statistics.mean(packets.in_window for packets in needed),
        "fed": statistics.mean(sum(map(len, packets.runs)) for packets in needed),
    }


def video_facts(video: Video) -> dict[str, Any]:
    """A video's row of the manifest, its size in bytes, and the spacing of its keyframes in packets."""
    source = source_of(video, ".")
    with open_video(source) as container:
        is_keyframe = [packet.is_keyframe for packet in container.demux(video=0) if packet.size]
    spacing = np.diff([*np.flatnonzero(is_keyframe), len(is_keyframe)])
    return video._asdict() | {
        "bytes": size_of(source),
        "keyframes": len(spacing),
        "mean_keyframe_spacing": float(np.mean(spacing)),
        "largest_keyframe_spacing": int(np.max(spacing)),
    }
