"""`benchmark.py loader` on a GPU: clips per second of this loader's engines, of its peers, and of NVDEC alone.

All contestants decode the same list of clips, as on the CPU (`benchmarks.loader`), from three sets of videos: the
originals, copies with short GOPs, and copies in many frame sizes, because a decoder that caches hardware decoders looks
good on two sizes. Every run is a new process. It consumes the batches decoded ahead, then counts clips for some
seconds. Every frame of its first clips is compared with that frame of the file and its neighbours. NVML and CUDA
measure NVDEC's utilisation and the GPU's memory over the same seconds.
"""

import contextlib
import importlib.util
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.attempt import attempt
from benchmarks.copies import copy_videos
from benchmarks.gpu_contestants import AUTO, CONTESTANTS, FLOOR, HOST, NVDEC, PEER, GpuWork
from benchmarks.machine import cpu_seconds, gpu_machine, wait_for_gpu
from benchmarks.reporting import Report, columns, command, listed, progress, write, write_and_print
from benchmarks.videos import compare, count_packets, find_videos, training_view
from benchmarks.work import repeated
from common.metrics import Metric
from common.system_metrics import nvml_metrics
from dali_pipelines.errors import InputError
from dali_pipelines.manifest import Manifest

_CHECKED = 16  # clips
_DRAINED = 12  # batches, more than any contestant decodes ahead
_SAMPLE_S = 0.2  # seconds between samples of NVDEC's utilisation

UNTOUCHED = "originals"


def benchmark_gpu_loader(
    videos: Sequence[str],
    *,
    contestants: Sequence[str] | None,
    workers: int,
    threads: int,
    rounds: int,
    seconds: float,
    gop: int,
    sizes: int,
    num_frames: int,
    crop_size: int,
    batch_size: int,
    out: Path,
    device: str = "cuda",
) -> dict[str, Any]:
    """Measures, prints the tables and writes loader_gpu.json into `out`. Raises `InputError`.

    workers, threads: of our loader; peers use the same number of threads.
    seconds: time for which a run counts clips.
    gop: frames per GOP of the copies; sizes: number of frame sizes in the third set. 0 omits that set.
    """
    names = list(CONTESTANTS) if contestants is None else list(dict.fromkeys(contestants))
    for name in names:
        if name not in CONTESTANTS:
            raise InputError(f"--contestants {name}: expected some of {', '.join(CONTESTANTS)}")
    found = find_videos(videos)
    out.mkdir(parents=True, exist_ok=True)
    settings = {"workers": workers, "threads": threads, "rounds": rounds, "seconds": seconds}
    settings |= {"num_frames": num_frames, "crop_size": crop_size, "batch_size": batch_size}
    report: Report = {"command": command(), "machine": gpu_machine(), "settings": settings, "sets": {}}
    with tempfile.TemporaryDirectory() as folder:
        sets = {UNTOUCHED: found}
        if gop:
            sets[f"gop {gop}"] = copy_videos(found, Path(folder, "gop"), gop=gop)
        if sizes:
            sets[f"gop {gop or 16}, {sizes} sizes"] = copy_videos(
                found, Path(folder, "sizes"), gop=gop or 16, sizes=sizes
            )
        for title, videos_of_set in sets.items():
            work = GpuWork(
                manifest=repeated(videos_of_set, batch_size, Path(folder, "videos.packets")),
                view=training_view(num_frames, crop_size),
                seed=0,
                batch_size=batch_size,
                workers=workers,
                threads=threads,
                device=device,
            )
            chosen = [name for name in names if title == UNTOUCHED or not CONTESTANTS[name].only_untouched]
            report["sets"][title] = _measure(title, videos_of_set, work, chosen, rounds=rounds, seconds=seconds)
            write(report, out / "loader_gpu.json")
    report["ratios"] = ratios(report["sets"])
    write_and_print(report, out / "loader_gpu.json", table(report))
    return report


def _measure(
    title: str, videos: Manifest, work: GpuWork, names: Sequence[str], *, rounds: int, seconds: float
) -> dict[str, Any]:
    results: dict[str, dict[str, Any]] = {}
    clips: dict[str, torch.Tensor] = {}
    for name in names:
        results[name] = {"what": CONTESTANTS[name].what, "failure": None, "runs": []}
        if importlib.util.find_spec(CONTESTANTS[name].package) is None:
            results[name]["failure"] = "not installed"
    for turn in range(rounds):
        for name in names:
            if results[name]["failure"] is not None:
                continue
            progress(f"{title}, turn {turn + 1} of {rounds}: {name}")
            if (answer := attempt(results[name], time_run, name, work, seconds)) is not None:
                run, first = answer
                results[name]["runs"].append(run)
                if first is not None:
                    clips.setdefault(name, torch.from_numpy(first))
    if HOST in clips:
        for name, difference in compare(work, clips, base=HOST).items():
            results[name] |= difference
    return {
        "videos": len(videos),
        "sizes": len({(video.width, video.height) for video in videos}),
        "packets": count_packets(work),
        "contestants": results,
    }


# -- one run, in a process of its own --


def time_run(name: str, work: GpuWork, seconds: float) -> tuple[dict[str, Any], Any]:
    """(measurements, the first clips as float32 [N, 3, T, S, S], or None if the contestant only decodes)."""
    is_cuda = work.device != "cpu"
    if is_cuda:
        torch.zeros(1, device=work.device)  # start CUDA outside the contestant's time
        free, _ = torch.cuda.mem_get_info()
    began = time.perf_counter()
    batches, stats = CONTESTANTS[name].batches(work)
    first = [next(batches)]
    first_batch_s = time.perf_counter() - began
    for _ in range(_DRAINED):
        if len(first) * work.batch_size < _CHECKED:
            first.append(next(batches))
        else:
            next(batches)
        if time.perf_counter() - began > 3 * seconds:  # a contestant this slow has decoded little ahead
            break
    engines = dict(stats.engines) if stats else {}
    count, cpu_before, began = 0, cpu_seconds(), time.perf_counter()
    with _watch_nvdec(work.device) as shares:
        while time.perf_counter() - began < seconds:
            next(batches)
            count += work.batch_size
        wait_for_gpu(work.device)
        spent = time.perf_counter() - began
    cpu = cpu_seconds() - cpu_before
    run = {
        "clips_per_second": count / spent,
        "cpu_ms_per_clip": 1000 * cpu / count,
        "first_batch_s": first_batch_s,
        "nvdec_share": statistics.mean(shares) if shares else None,
        "gpu_mib": (free - torch.cuda.mem_get_info()[0]) / 2**20 if is_cuda else None,
        "engines": {engine: stats.engines[engine] - engines.get(engine, 0) for engine in stats.engines}
        if stats
        else {},
        "fallbacks": dict(stats.fallbacks) if stats else {},
    }
    clips = [batch.float().cpu() for batch in first if batch is not None]
    return run, torch.cat(clips)[:_CHECKED].numpy() if clips else None


@contextlib.contextmanager
def _watch_nvdec(device: str) -> Iterator[list[float]]:
    """Collects NVDEC's utilisation, 0 to 1, every `_SAMPLE_S` seconds; nothing on the CPU."""
    shares: list[float] = []
    if device == "cpu":
        yield shares
        return
    uuid, ended = str(torch.cuda.get_device_properties(device).uuid), threading.Event()

    def sample() -> None:
        while not ended.wait(_SAMPLE_S):
            if (share := nvml_metrics(uuid).get(Metric.GPU_DECODER_SHARE)) is not None:
                shares.append(share)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield shares
    finally:
        ended.set()
        thread.join()


# -- the report --


def median(result: dict[str, Any], key: str = "clips_per_second") -> float | None:
    """Median of the runs; None if it was not measured."""
    values = [run[key] for run in result["runs"] if run[key] is not None]
    return statistics.median(values) if values else None


def ratios(sets: Report) -> dict[str, float]:
    """How many times as fast one is as another, as far as measured."""
    rates = {
        title: {name: median(result) for name, result in each["contestants"].items()} for title, each in sets.items()
    }
    untouched, *copies = rates.values()
    pairs = [
        ("nvdec / nvdec floor, originals", untouched.get(NVDEC), untouched.get(FLOOR)),
        ("nvdec / torchcodec on whole files, originals", untouched.get(NVDEC), untouched.get(PEER)),
        (
            "auto / the better of nvdec and host, originals",
            untouched.get(AUTO),
            max(filter(None, (untouched.get(NVDEC), untouched.get(HOST))), default=None),
        ),
    ]
    if copies:
        pairs.append(("nvdec / nvdec floor, short GOPs", copies[0].get(NVDEC), copies[0].get(FLOOR)))
    if len(copies) > 1:
        pairs.append(("nvdec, many sizes / few", copies[1].get(NVDEC), copies[0].get(NVDEC)))
    return {what: value / of for what, value, of in pairs if value and of}


def table(report: Report) -> str:
    """The report as text."""
    found = report["machine"]
    lines = [
        f"{found['gpu']}, driver {found['driver']}, CUDA {found['cuda']}; {found['cpu']}, {found['cores']} cores",
        listed(found["versions"]),
        listed(report["settings"]),
    ]
    header = ["clips/s", "CPU ms/clip", "NVDEC", "GPU MiB", "first batch s", "diff/255", "wrong frames", "decoded by"]
    for title, each in report["sets"].items():
        packets = each["packets"]
        lines += [
            "",
            f"{title}: {each['videos']} videos in {each['sizes']} sizes; packets per clip: {packets['in_window']:.0f} "
            f"up to the last frame, {packets['fed']:.0f} needed",
        ]
        rows = [["", *header]]
        for name, result in each["contestants"].items():
            if result["failure"] is not None:
                rows.append([name, result["failure"]])
                continue
            share, memory = median(result, "nvdec_share"), median(result, "gpu_mib")
            engines = result["runs"][-1]["engines"]
            difference = result.get("mean_difference_of_255")
            rows.append(
                [
                    name,
                    f"{median(result):.1f}",
                    f"{median(result, 'cpu_ms_per_clip'):.1f}",
                    "" if share is None else f"{share:.0%}",
                    "" if memory is None else f"{memory:.0f}",
                    f"{median(result, 'first_batch_s'):.1f}",
                    "" if difference is None else f"{difference:.2f}",
                    str(result.get("wrong_frames", "")),
                    listed(engines),
                ]
            )
        lines += columns(rows)
        for name, result in each["contestants"].items():
            for reason, count in (result["runs"][-1]["fallbacks"] if result["runs"] else {}).items():
                lines.append(f"{name}: {count} of its clips {reason}")
    lines.append("")
    lines += [f"{what}: {ratio:.2f}" for what, ratio in report["ratios"].items()]
    return "\n".join(lines)
