"""`benchmark.py loader`: clips per second of this loader, of its peers, of a reference loader and of the floor.

Why the comparison is fair:

- All contestants decode the same list of clips: videos, frame positions, rectangles and flips of a training epoch, from
  `plan`. Before timing, the first clips of each are compared with ours, and every frame with its neighbours.
- All have `workers` processes (SPDL: threads) and give float32 batches to a consumer that does nothing.
- No contestant ever runs out of work. The batches decoded ahead during start-up are consumed before the clock starts
  (more batches than any contestant prefetches). From then on, the consumer is always waiting, so the queues are as
  empty when the clock stops as when it started. All are timed on the same part of the list, for a multiple of `workers`
  batches, because a DataLoader's workers finish theirs at the same time.
- Every run is a new process; contestants take turns. Ratios are taken within a turn, then their median.
"""

import itertools
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.attempt import attempt
from benchmarks.contestants import CONTESTANTS, FLOOR, OURS, REFERENCE, is_installed
from benchmarks.copies import copy_videos
from benchmarks.machine import bytes_read, cpu_seconds, machine
from benchmarks.reporting import Report, columns, command, listed, progress, spread, write
from benchmarks.stages import stages
from benchmarks.videos import CHECKED_BATCHES, compare, count_packets, find_videos, training_view, video_facts
from benchmarks.work import Work, repeated
from common.system_metrics import processes, proportional_mib
from dali_pipelines.errors import InputError

_BEST_PEER = "best peer"
_PRINTED_RATIOS = (_BEST_PEER, REFERENCE, FLOOR)
_LISTED_VIDEOS = 8


@dataclass(frozen=True)
class Run:
    """One run of one contestant."""

    clips_per_second: float
    cpu_ms_per_clip: float
    """CPU time of all its processes."""
    kb_read_per_clip: float
    """Read from files by all its processes; 1 kB is 1000 bytes."""
    worker_mib: float
    """Memory (PSS) of the largest process except the first; 0 if there is only one."""
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

    contestants: names from `CONTESTANTS`; None: all.
    workers, clips, rounds: number of processes, clips timed per run, and runs of each contestant.
    gop: measure copies with this many frames per GOP; 0: the original videos.
    """
    names = list(CONTESTANTS) if contestants is None else list(dict.fromkeys(contestants))
    for name in names:
        if name not in CONTESTANTS:
            raise InputError(f"--contestants {name}: expected some of {', '.join(CONTESTANTS)}")
    with tempfile.TemporaryDirectory() as folder:
        found = find_videos(videos)
        out.mkdir(parents=True, exist_ok=True)
        if gop:
            found = copy_videos(found, Path(folder), gop=gop)
        work = Work(
            manifest=repeated(found, batch_size, Path(folder, "videos.packets")),
            view=training_view(num_frames, crop_size),
            seed=0,
            batch_size=batch_size,
            workers=workers,
        )
        batches = workers * -(-clips // (workers * batch_size))
        results = _measure(work, names, rounds=rounds, batches=batches)
        report: Report = {
            "command": command(),
            "machine": machine(),
            "settings": {
                "workers": workers,
                "clips_per_run": batches * batch_size,
                "rounds": rounds,
                "num_frames": num_frames,
                "crop_size": crop_size,
                "batch_size": batch_size,
            },
            "videos": [video_facts(video) for video in found],
            "packets": count_packets(work),
            "contestants": results,
            "ratios": ratios(results),
        }
    write(report, out / "loader.json")
    print(table(report))
    print(f"\n{draw(report, out / 'loader.png')}, {out / 'loader.json'}")


def _measure(work: Work, names: Sequence[str], *, rounds: int, batches: int) -> dict[str, dict[str, Any]]:
    results: dict[str, dict[str, Any]] = {}
    checked: dict[str, torch.Tensor] = {}
    for name in names:
        result = results[name] = {"what": CONTESTANTS[name].what, "failure": None, "runs": []}
        if not is_installed(CONTESTANTS[name]):
            result["failure"] = "not installed: make peers"
        elif name != FLOOR and (first := attempt(result, first_clips, name, work)) is not None:
            checked[name] = torch.from_numpy(first)
    for name, difference in compare(work, checked, base=OURS).items():
        results[name] |= difference
    if OURS in checked:
        results[OURS]["stages"] = attempt(results[OURS], stages, OURS, work)
    for turn in range(rounds):
        for name, result in results.items():
            if result["failure"] is None:
                if (run := attempt(result, time_run, name, work, batches)) is not None:
                    result["runs"].append(asdict(run))
                progress(f"turn {turn + 1} of {rounds}: {name}")
    return results


# -- one contestant, in a process of its own --


def first_clips(name: str, work: Work) -> np.ndarray:
    """The clips of the first batches, float32 [N, 3, T, S, S]."""
    batches = itertools.islice(CONTESTANTS[name].batches(work), CHECKED_BATCHES)
    return torch.cat([batch.cpu() for batch in batches if batch is not None]).numpy()


def time_run(name: str, work: Work, count: int) -> Run:
    """Times `count` batches. Then measures memory while consuming the prefetched batches."""
    prefetched = 2 * work.workers + 2
    batches = CONTESTANTS[name].batches(work)
    for _ in range(prefetched):
        next(batches)
    read_before, cpu_before, began = bytes_read(), cpu_seconds(), time.perf_counter()
    for _ in range(count):
        next(batches)
    seconds, cpu, read = time.perf_counter() - began, cpu_seconds() - cpu_before, bytes_read() - read_before
    worker_mib = main_mib = 0.0
    for _ in range(prefetched):
        next(batches)
        main, *others = map(proportional_mib, processes())
        worker_mib, main_mib = max(worker_mib, *others, 0), max(main_mib, main)
    clips = count * work.batch_size
    return Run(clips / seconds, 1000 * cpu / clips, read / clips / 1000, worker_mib, main_mib)


# -- the report --


def ratios(results: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Our speed relative to each contestant, and to the best peer of each turn: median, lowest and highest turn."""
    speeds = {
        name: [run["clips_per_second"] for run in result["runs"]]
        for name, result in results.items()
        if result["failure"] is None
    }
    peers = [speeds[name] for name in speeds if CONTESTANTS[name].is_peer]
    if peers:
        speeds[_BEST_PEER] = [max(turn) for turn in zip(*peers)]
    found: dict[str, dict[str, float]] = {}
    for name, others in speeds.items():
        if OURS in speeds and name != OURS:
            turns = [ours / other for ours, other in zip(speeds[OURS], others)]
            found[name] = spread(turns)
    return found


def table(report: Report) -> str:
    """The report as text."""
    videos, packets = report["videos"], report["packets"]
    lines = [f"{report['machine']['cpu']}, {report['machine']['cores']} cores; GPU: {report['machine']['gpu']}"]
    lines += [listed(report["machine"]["versions"]), listed(report["settings"])]
    for video in videos[:_LISTED_VIDEOS]:
        lines.append(
            f"{video['path']}: {video['codec']}, {video['width']}x{video['height']}, {video['frames']} frames, "
            f"a keyframe every {video['mean_keyframe_spacing']:.0f} (at most {video['largest_keyframe_spacing']})"
        )
    if len(videos) > _LISTED_VIDEOS:
        lines.append(f"and {len(videos) - _LISTED_VIDEOS} more videos")
    lines.append(f"packets per clip: {packets['in_window']:.0f} up to the last frame, {packets['fed']:.0f} needed")
    lines.append(f"kB per video: {statistics.mean(video['bytes'] for video in videos) / 1000:.0f}")
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
    lines += ["", *columns(rows), ""]
    if by_stage := report["contestants"].get(OURS, {}).get("stages"):
        rest = _median(report["contestants"][OURS], "cpu_ms_per_clip") - sum(by_stage.values())
        stage_times = {stage: f"{ms:.2f}" for stage, ms in [*by_stage.items(), ("hand over and the rest", rest)]}
        lines.append(f"ours, CPU ms per clip: {listed(stage_times)}")
    for name, ratio in report["ratios"].items():
        if name in _PRINTED_RATIOS:
            lines.append(f"ours / {name}: {ratio['median']:.2f} ({ratio['low']:.2f} .. {ratio['high']:.2f})")
    return "\n".join(lines)


def draw(report: Report, path: Path) -> str:
    """Draws the speeds as bars into `path`. Returns the path, or the reason that there is no plot."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "no plot: matplotlib is not installed"
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
