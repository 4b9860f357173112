"""`benchmark.py loader`: clips per second of this loader, of its peers, of the reference way and of the floor.

Why it is fair:

- Everybody decodes the same list: the videos, frame positions, rectangles and flips of a training epoch, from `plan`.
  Before the clock, the first clips of everybody are compared with ours, and every frame with its neighbours.
- Everybody has `workers` processes (SPDL: threads) and gives float32 batches to a consumer that does nothing.
- Everybody's work has no end, and the clock runs within it. What was decoded ahead while the contestant started is
  consumed before the clock starts (more batches than any of them prefetches), and as the consumer is then always the
  one that waits, the queues are as empty when the clock stops as when it started. The same places of the list are
  timed for all, and a multiple of `workers` batches, as a DataLoader's workers finish theirs at the same time.
- Every run is a new process; contestants take turns, and ratios are taken within a turn, then their median.
"""

import contextlib
import importlib.metadata
import itertools
import json
import logging
import multiprocessing
import os
import platform
import re
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch

from benchmarks.contestants import (
    CONTESTANTS,
    FLOOR,
    OURS,
    REFERENCE,
    CannotReadError,
    cut,
    cut_exactly,
    is_installed,
    to_float,
)
from benchmarks.copies import copy_videos
from benchmarks.stages import stages
from benchmarks.work import Work, needed_packets, repeated
from common.system_metrics import processes, proportional_mib
from common.worker_pool import WorkerPool
from dali_pipelines import crops
from dali_pipelines.errors import InputError
from dali_pipelines.files import absolute, join, open_video, size_of
from dali_pipelines.folders import videos_below
from dali_pipelines.manifest import Manifest, Video, key_of, source_of
from dali_pipelines.packet_index import StaleIndexError, open_index
from dali_pipelines.packets import video_stream
from dali_pipelines.plan import View
from dali_pipelines.processes import end_with_parent
from preparation.index import index

TARGETS = {"best peer": 1.35, REFERENCE: 3.0, FLOOR: 0.9}
_PACKAGES = ("torch", "nvidia-dali-cuda120", "av", "decord2", "torchcodec", "spdl", "numpy")
_CHECKED_BATCHES = 2
_LISTED_VIDEOS = 8


@dataclass(frozen=True)
class Run:
    """One run of one contestant."""

    clips_per_second: float
    cpu_ms_per_clip: float
    """Processor time of all its processes together."""
    kb_read_per_clip: float
    """That all its processes read from files: 1 kB is 1000 bytes."""
    worker_mib: float
    """The largest of its processes but the first; 0 where there are none. Shared memory is counted in parts (PSS)."""
    main_mib: float


def benchmark_loader(
    videos: Sequence[str],
    *,
    contestants: Sequence[str] | None = None,
    workers: int,
    clips: int,
    rounds: int,
    num_frames: int,
    crop_size: int,
    batch_size: int,
    out: Path,
    gop: int = 0,
) -> None:
    """Measures, prints the table and writes loader.json and loader.png into `out`. Raises `InputError`.

    contestants: names out of `CONTESTANTS`; None: all.
    workers, clips, rounds: processes, clips that a run times, runs of each.
    gop: frames of a group in copies that take the place of the videos; 0: the videos as they are.
    """
    contestants = list(CONTESTANTS) if contestants is None else list(dict.fromkeys(contestants))
    for name in contestants:
        if name not in CONTESTANTS:
            raise InputError(f"--contestants {name}: expected some of {', '.join(CONTESTANTS)}")
    with tempfile.TemporaryDirectory() as folder:
        found = find_videos(videos)
        out.mkdir(parents=True, exist_ok=True)
        if gop:
            found = copy_videos(found, Path(folder), gop=gop)
        manifest = repeated(found, batch_size, Path(folder, "videos.packets"))
        _benchmark(found, manifest, contestants, workers, clips, rounds, num_frames, crop_size, batch_size, out)


def _benchmark(
    found: Manifest,
    manifest: Manifest,
    contestants: Sequence[str],
    workers: int,
    clips: int,
    rounds: int,
    num_frames: int,
    crop_size: int,
    batch_size: int,
    out: Path,
) -> None:
    work = Work(
        manifest=manifest,
        view=training_view(num_frames, crop_size),
        seed=0,
        batch_size=batch_size,
        workers=workers,
    )
    batches = workers * -(-clips // (workers * batch_size))
    results, checked = {}, {}
    for name in contestants:
        results[name] = {"what": CONTESTANTS[name].what, "failure": None, "runs": []}
        if not is_installed(CONTESTANTS[name]):
            results[name]["failure"] = "not installed"
        elif name != FLOOR and (first := attempt(results[name], first_clips, name, work)) is not None:
            checked[name] = torch.from_numpy(first)
    for name, difference in compare(work, checked).items():
        results[name] |= difference
    if OURS in checked:
        results[OURS]["stages"] = attempt(results[OURS], stages, OURS, work)
    for turn in range(rounds):
        for name in contestants:
            if results[name]["failure"] is None:
                if (run := attempt(results[name], time_run, name, work, batches)) is not None:
                    results[name]["runs"].append(asdict(run))
                print(f"turn {turn + 1} of {rounds}: {name}", file=sys.stderr, flush=True)
    report = {
        "command": " ".join(sys.argv),
        "machine": machine(),
        "settings": {
            "workers": workers,
            "clips_per_run": batches * batch_size,
            "rounds": rounds,
            "num_frames": num_frames,
            "crop_size": crop_size,
            "batch_size": batch_size,
        },
        "videos": [describe(video) for video in found],
        "packets": count_packets(work),
        "contestants": results,
        "ratios": ratios(results),
    }
    (out / "loader.json").write_text(json.dumps(report, indent=2) + "\n")
    print(table(report))
    print(f"\n{draw(report, out / 'loader.png')}, {out / 'loader.json'}")


def training_view(num_frames: int, crop_size: int) -> View:
    return View(
        mode="train",
        num_frames=num_frames,
        crop_size=crop_size,
        stride=32,
        target_fps=30,
        past_end="fit",
        short_sides=(crops.JITTER[0] * crop_size, crops.JITTER[1] * crop_size),
        flip=True,
    )


def find_videos(paths: Sequence[str]) -> Manifest:
    """Videos of files, folders and manifests, with absolute paths and the entries of their packet indexes. Raises
    `InputError` for one that cannot be read."""
    videos, entries, files = [], {}, []
    for path in map(Path, paths):
        if path.suffix == ".csv":
            manifest = Manifest.read(path)
            root = absolute(manifest.root)
            if manifest.hint:
                print(f"{path}: {manifest.hint}")
            for video in manifest:
                place = {"shard": join(root, video.shard)} if video.shard else {"path": join(root, video.path)}
                videos.append(video._replace(**place))
                if manifest.index is not None:
                    with contextlib.suppress(StaleIndexError):
                        entries[key_of(videos[-1])] = open_index(str(manifest.index)).entry(key_of(video))
        elif path.is_dir():
            found = videos_below(path)
            files += [path / name for name in found.videos]
            if found.note:
                print(f"{path}: {found.note}")
        else:
            files.append(path)
    if files:
        listed = [(os.path.abspath(file), 0) for file in files]
        with tempfile.TemporaryDirectory() as folder:
            probed, rejected = index(listed, root="/", journal=Path(folder, "journal"), crew=WorkerPool())
        if rejected:
            raise InputError(f"{rejected[0].path}: {rejected[0].reason}")
        videos += probed
        entries |= probed.entries
    if not videos:
        raise InputError(f"{', '.join(map(str, paths))}: no videos there")
    for video in videos:
        if video.rotation or video.mirrored:
            raise InputError(f"{video.path}: is turned or mirrored, which not all contestants can undo")
    found = Manifest(videos)
    found.entries = entries
    return found


# -- one contestant, in a process of its own --


def first_clips(name: str, work: Work) -> np.ndarray:
    """float32 [N, 3, T, S, S]: the clips of the first batches."""
    batches = CONTESTANTS[name].batches(work)
    return torch.cat([next(batches).cpu() for _ in range(_CHECKED_BATCHES)]).numpy()


def time_run(name: str, work: Work, count: int) -> Run:
    """Times `count` batches, then looks at the memory while as many as were prefetched go by."""
    prefetched = 2 * work.workers + 2
    batches = CONTESTANTS[name].batches(work)
    for _ in range(prefetched):
        next(batches)
    read, cpu, seconds = bytes_read(), cpu_seconds(), time.perf_counter()
    for _ in range(count):
        next(batches)
    seconds, cpu, read = time.perf_counter() - seconds, cpu_seconds() - cpu, bytes_read() - read
    worker_mib = main_mib = 0.0
    for _ in range(prefetched):
        next(batches)
        main, *others = map(proportional_mib, processes())
        worker_mib, main_mib = max(worker_mib, *others, 0), max(main_mib, main)
    clips = count * work.batch_size
    return Run(clips / seconds, 1000 * cpu / clips, read / clips / 1000, worker_mib, main_mib)


def cpu_seconds() -> float:
    ticks = 0
    for process in processes():
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])  # user, system
    return ticks / os.sysconf("SC_CLK_TCK")


def bytes_read() -> int:
    """By system calls of all processes: also what comes through pipes, which is little."""
    return sum(int(Path(f"/proc/{process}/io").read_text().split()[1]) for process in processes())


def attempt(result: dict[str, Any], function: Callable, name: str, *arguments: Any) -> Any:
    """What `function` returns in a new process; None, and the reason in `result`, where the contestant fails."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, function, name, *arguments))
    process.start()
    sender.close()
    try:
        answer, result["failure"] = receiver.recv()
        process.join()
    except EOFError:
        process.join()
        answer, result["failure"] = None, f"its process ended with exit code {process.exitcode}"
    except BaseException:  # Ctrl-C
        process.kill()
        raise
    return answer


def _answer(sender, function: Callable, name: str, *arguments: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the first process, which ends this one
    end_with_parent()
    logging.disable()  # SPDL logs what it raises
    torch.set_num_threads(1)
    try:
        sender.send((function(name, *arguments), None))
    except Exception as error:
        # A DataLoader puts the traceback of its worker in front of the message.
        message = (str(error).strip() or type(error).__name__).splitlines()[-1]
        sender.send((None, message.removeprefix(f"{CannotReadError.__module__}.{CannotReadError.__name__}: ")))


# -- what was decoded --


def compare(work: Work, clips: dict[str, torch.Tensor], base: str = OURS) -> dict[str, dict[str, float]]:
    """For each contestant its mean difference from `base`, of 255, and how many frames are nearer to a neighbour."""
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
            pictures = {n: frame.to_ndarray(format="rgb24") for n, frame in decoded if n in needed}
        for t, near in enumerate(neighbours):
            frames = torch.from_numpy(np.stack([pictures[n] for n in near]))
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
    """Packets a clip: in the file, in the window (up to the last wanted picture), and fed after selection."""
    clips = [work.clip(place) for place in range(_CHECKED_BATCHES * work.batch_size)]
    needed = [needed_packets(clip) for clip in clips]
    return {
        "in_window": statistics.mean(packets.in_window for packets in needed),
        "fed": statistics.mean(sum(map(len, packets.runs)) for packets in needed),
    }


def describe(video: Video) -> dict[str, Any]:
    """A video's row, its bytes, and how far its keyframes are apart, in packets."""
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


# -- what is reported --


def ratios(results: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Ours over each other, and over the best peer of each turn: median, lowest and highest of the turns."""
    speeds = {
        name: [run["clips_per_second"] for run in result["runs"]]
        for name, result in results.items()
        if result["failure"] is None
    }
    peers = [speeds[name] for name in speeds if CONTESTANTS[name].is_peer]
    if peers:
        speeds["best peer"] = [max(turn) for turn in zip(*peers)]
    found = {}
    for name, others in speeds.items():
        if OURS in speeds and name != OURS:
            turns = [ours / other for ours, other in zip(speeds[OURS], others)]
            found[name] = {"median": statistics.median(turns), "low": min(turns), "high": max(turns)}
            if name in TARGETS:
                found[name]["target"] = TARGETS[name]
    return found


def machine() -> dict[str, Any]:
    """Versions, and the processor."""
    versions = {"python": platform.python_version(), "ffmpeg (av)": av.ffmpeg_version_info}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    cpu = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.M)
    return {
        "cpu": cpu[1] if cpu else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": versions,
    }


def table(report: dict[str, Any]) -> str:
    """The report as text."""
    videos, packets, settings = report["videos"], report["packets"], report["settings"]
    lines = [f"{report['machine']['cpu']}, {report['machine']['cores']} cores; GPU: {report['machine']['gpu']}"]
    lines.append(", ".join(f"{name} {version}" for name, version in report["machine"]["versions"].items()))
    lines.append(", ".join(f"{name} {value}" for name, value in settings.items()))
    for video in videos[:_LISTED_VIDEOS]:
        lines.append(
            f"{video['path']}: {video['codec']}, {video['width']}x{video['height']}, {video['frames']} frames, "
            f"a keyframe every {video['mean_keyframe_spacing']:.0f} (at most {video['largest_keyframe_spacing']})"
        )
    if len(videos) > _LISTED_VIDEOS:
        lines.append(f"and {len(videos) - _LISTED_VIDEOS} more videos")
    lines.append(f"packets a clip: {packets['in_window']:.0f} up to the last frame, {packets['fed']:.0f} needed")
    lines.append(f"kB a video: {statistics.mean(video['bytes'] for video in videos) / 1000:.0f}")
    header = ["", "clips/s", "ours is", "(turns)", "CPU ms/clip", "kB read/clip", "MiB/worker", "MiB main", "diff/255"]
    header.append("wrong frames")
    rows = [header]
    for name, result in report["contestants"].items():
        if result["failure"] is not None:
            rows.append([name, result["failure"]])
            continue
        ratio = report["ratios"].get(name)
        rows.append(
            [
                name,
                f"{_median(result, 'clips_per_second'):.1f}",
                f"x {ratio['median']:.2f}" if ratio else "",
                f"{ratio['low']:.2f} .. {ratio['high']:.2f}" if ratio else "",
                f"{_median(result, 'cpu_ms_per_clip'):.1f}",
                f"{_median(result, 'kb_read_per_clip'):.0f}",
                f"{max(run['worker_mib'] for run in result['runs']):.0f}",
                f"{max(run['main_mib'] for run in result['runs']):.0f}",
                f"{result['mean_difference_of_255']:.2f}" if result.get("mean_difference_of_255") is not None else "",
                str(result.get("wrong_frames", "")),
            ]
        )
    widths = [max(len(row[column]) for row in rows if len(row) > 2) for column in range(len(header))]
    lines.append("")
    for name, *cells in rows:
        lines.append("  ".join([name.ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells, widths[1:]))]).rstrip())
    lines.append("")
    if by_stage := report["contestants"].get(OURS, {}).get("stages"):
        rest = _median(report["contestants"][OURS], "cpu_ms_per_clip") - sum(by_stage.values())
        listed = ", ".join(f"{stage} {ms:.2f}" for stage, ms in [*by_stage.items(), ("hand over and the rest", rest)])
        lines.append(f"ours, CPU ms a clip: {listed}")
    for name, ratio in report["ratios"].items():
        if "target" in ratio:
            lines.append(
                f"ours / {name}: {ratio['median']:.2f} ({ratio['low']:.2f} .. {ratio['high']:.2f}), "
                f"target {ratio['target']}"
            )
    return "\n".join(lines)


def draw(report: dict[str, Any], path: Path) -> str:
    """Draws the speeds as bars; returns what became of it."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "no picture: matplotlib is not installed"
    timed = {name: result for name, result in report["contestants"].items() if result["failure"] is None}
    speeds = np.array([[run["clips_per_second"] for run in result["runs"]] for result in timed.values()])
    middle = np.median(speeds, axis=1)
    figure = Figure(figsize=(7, 0.6 + 0.5 * len(timed)), layout="constrained")
    axes = figure.subplots()
    colours = ["tab:blue" if name == OURS else "tab:gray" for name in timed]
    bars = axes.barh(
        [f"{name}: {result['what']}" for name, result in timed.items()],
        middle,
        xerr=[middle - speeds.min(axis=1), speeds.max(axis=1) - middle],
        color=colours,
    )
    axes.bar_label(bars, fmt="%.1f", padding=4)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("clips per second: median and range")
    figure.savefig(path, dpi=120)
    return str(path)


def _median(result: dict[str, Any], name: str) -> float:
    return statistics.median(run[name] for run in result["runs"])
