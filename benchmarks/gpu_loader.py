"""`benchmark.py loader` on a GPU: clips per second of this loader's engines, of its peers, and of NVDEC alone.

Everybody decodes the same list of clips, as on the CPU (`benchmarks.loader`), on three sets of videos: the files as
they are, copies with short groups of pictures, and copies of many frame sizes, since a decoder that keeps hardware
decoders for reuse looks good on two. Every run is a new process. It consumes what was decoded ahead, then counts the
clips of some seconds. Every frame of its first clips is compared with that frame of the file and with its neighbours.
NVDEC's use and the memory of the GPU are NVML's and CUDA's figures, over the same seconds.
"""

import contextlib
import importlib.util
import itertools
import json
import statistics
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.contestants import cut, endless_clips, make_loader, to_float
from benchmarks.copies import copy_videos
from benchmarks.loader import (
    attempt,
    compare,
    count_packets,
    cpu_seconds,
    find_videos,
    machine,
    training_view,
)
from benchmarks.work import Clip, Work, repeated
from common.metrics import Metric
from common.system_metrics import nvml_metrics
from dali_pipelines.errors import InputError
from dali_pipelines.files import open_video
from dali_pipelines.manifest import Video
from dali_pipelines.nvdec import decode_file, load_torchcodec, nvdec_backend
from dali_pipelines.packets import UncertainError, remux
from dali_pipelines.stream_format import uncrop

_FLOOR_CLIPS = 96  # that the floor goes round
_CHECKED = 16  # clips
_DRAINED = 12  # batches, more than anybody decodes ahead
_LOOK_S = 0.2  # between two looks at NVDEC

UNTOUCHED = "as they are"
AUTO, NVDEC, HOST, DALI, FLOOR = "auto", "nvdec", "host", "dali", "nvdec floor"
PEER = "torchcodec"


@dataclass(frozen=True, kw_only=True)
class GpuWork(Work):
    threads: int
    """That decode, of those contestants that have threads."""
    device: str = "cuda"
    """The tests run all of it on "cpu"."""


class Contestant(NamedTuple):
    what: str
    batches: Callable[[GpuWork], tuple[Iterator[torch.Tensor | None], Any]]
    """(batches, `LoaderStats` or None); None for a batch: only decoding is timed."""
    package: str = "torchcodec"
    only_untouched: bool = False


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

    workers, threads: of this loader; peers use as many threads. seconds: that a run counts clips for.
    gop: frames of a group in the copies; sizes: different ones in the third set. 0 leaves that set out.
    """
    names = list(CONTESTANTS) if contestants is None else list(dict.fromkeys(contestants))
    for name in names:
        if name not in CONTESTANTS:
            raise InputError(f"--contestants {name}: expected some of {', '.join(CONTESTANTS)}")
    found = find_videos(videos)
    out.mkdir(parents=True, exist_ok=True)
    settings = {"workers": workers, "threads": threads, "rounds": rounds, "seconds": seconds}
    settings |= {"num_frames": num_frames, "crop_size": crop_size, "batch_size": batch_size}
    report = {"command": " ".join(sys.argv), "machine": gpu_machine(), "settings": settings, "sets": {}}
    with tempfile.TemporaryDirectory() as folder:
        sets = {UNTOUCHED: found}
        if gop:
            sets[f"gop {gop}"] = copy_videos(found, Path(folder, "gop"), gop=gop)
        if sizes:
            sets[f"gop {gop or 16}, {sizes} sizes"] = copy_videos(
                found, Path(folder, "sizes"), gop=gop or 16, sizes=sizes
            )
        for title, listed in sets.items():
            work = GpuWork(
                manifest=repeated(listed, batch_size, Path(folder, "videos.packets")),
                view=training_view(num_frames, crop_size),
                seed=0,
                batch_size=batch_size,
                workers=workers,
                threads=threads,
                device=device,
            )
            chosen = [name for name in names if title == UNTOUCHED or not CONTESTANTS[name].only_untouched]
            report["sets"][title] = _measure(title, listed, work, chosen, rounds=rounds, seconds=seconds)
            (out / "loader_gpu.json").write_text(json.dumps(report, indent=2) + "\n")
    report["targets"] = targets(report["sets"])
    (out / "loader_gpu.json").write_text(json.dumps(report, indent=2) + "\n")
    print(table(report))
    print(f"\n{out / 'loader_gpu.json'}")
    return report


def gpu_machine() -> dict[str, Any]:
    """As `machine`, with the GPU's driver and the CUDA of torch."""
    found = machine() | {"cuda": torch.version.cuda, "driver": None}
    if torch.cuda.is_available():
        import pynvml

        pynvml.nvmlInit()
        found["driver"] = pynvml.nvmlSystemGetDriverVersion()
    return found


def _measure(
    title: str, videos: Sequence[Video], work: GpuWork, names: Sequence[str], *, rounds: int, seconds: float
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
            print(f"{title}, turn {turn + 1} of {rounds}: {name}", file=sys.stderr, flush=True)
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
    """(figures, the first clips as float32 [N, 3, T, S, S] or None)."""
    is_cuda = work.device != "cpu"
    if is_cuda:
        torch.zeros(1, device=work.device)  # CUDA's own start is nobody's
        free = torch.cuda.mem_get_info()[0]
    began = time.perf_counter()
    batches, stats = CONTESTANTS[name].batches(work)
    first = [next(batches)]
    first_batch_s = time.perf_counter() - began
    for _ in range(_DRAINED):
        if len(first) * work.batch_size < _CHECKED:
            first.append(next(batches))
        else:
            next(batches)
        if time.perf_counter() - began > 3 * seconds:  # who is that slow has little decoded ahead
            break
    engines = dict(stats.engines) if stats else {}
    count, cpu, began = 0, cpu_seconds(), time.perf_counter()
    with _watch_nvdec(work.device) as shares:
        while time.perf_counter() - began < seconds:
            next(batches)
            count += work.batch_size
        if is_cuda:
            torch.cuda.synchronize()
        spent = time.perf_counter() - began
    cpu = cpu_seconds() - cpu
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
    if first[0] is None:
        return run, None
    return run, torch.cat([batch.float().cpu() for batch in first])[:_CHECKED].numpy()


@contextlib.contextmanager
def _watch_nvdec(device: str) -> Iterator[list[float]]:
    """The shares of time, 0 to 1, that NVDEC was busy for, a look every `_LOOK_S`; none on the CPU."""
    shares: list[float] = []
    if device == "cpu":
        yield shares
        return
    uuid, ended = str(torch.cuda.get_device_properties(device).uuid), threading.Event()

    def look() -> None:
        while not ended.wait(_LOOK_S):
            if (share := nvml_metrics(uuid).get(Metric.GPU_DECODER_SHARE)) is not None:
                shares.append(share)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield shares
    finally:
        ended.set()
        thread.join()


# -- contestants --


def _ours(work: GpuWork, *, decode: str):
    loader = make_loader(work, device=work.device, decode=decode, decode_threads=work.threads)
    return endless_clips(loader), loader.stats


def _in_threads(work: GpuWork, function: Callable[[int], Any]) -> Iterator[Any]:
    """`function(0)`, `function(1)`, ... in order, by `threads` threads that each have a stream of their own and are as
    far ahead as ours."""

    def start() -> None:
        if work.device != "cpu":
            torch.cuda.set_stream(torch.cuda.Stream(work.device))

    places, ahead = itertools.count(), deque()
    with ThreadPoolExecutor(work.threads, initializer=start) as pool:
        while True:
            while len(ahead) < 2 * work.threads + work.batch_size:
                ahead.append(pool.submit(function, next(places)))
            yield ahead.popleft().result()


def _peer(work: GpuWork, *, decode: Callable[[Clip, str], torch.Tensor]):
    """Frames by `decode`, cut out and resized as torch's transforms do."""

    def clip(place: int) -> torch.Tensor:
        found = work.clip(place)
        cut_out = cut(decode(found, work.device), found.rectangle, work.view.crop_size)
        if work.device != "cpu":
            torch.cuda.current_stream().synchronize()
        return cut_out

    def batches() -> Iterator[torch.Tensor]:
        clips = _in_threads(work, clip)
        while True:
            yield to_float(torch.stack(list(itertools.islice(clips, work.batch_size))))

    return batches(), None


def _torchcodec(clip: Clip, device: str) -> torch.Tensor:
    decoders = load_torchcodec().decoders
    with decoders.set_cuda_backend(nvdec_backend()):
        decoder = decoders.VideoDecoder(
            clip.source.path, dimension_order="NHWC", num_ffmpeg_threads=1, device=device, seek_mode="approximate"
        )
    frames = decoder.get_frames_at(clip.positions.tolist()).data
    if device != "cpu":
        torch.cuda.current_stream().synchronize()  # before another thread has its hardware decoder
    return frames


def _pynvvideocodec(clip: Clip, device: str) -> torch.Tensor:
    import PyNvVideoCodec

    decoder = PyNvVideoCodec.SimpleDecoder(
        clip.source.path, use_device_memory=True, output_color_type=PyNvVideoCodec.OutputColorType.RGB
    )
    frames = decoder.get_batch_frames_by_index(clip.positions.tolist())
    return torch.stack([torch.from_dlpack(frame) for frame in frames])


def _floor(work: GpuWork):
    """The streams that our workers make, by as many sessions as there are threads, and nothing else: what comes out is
    dropped."""
    files = []
    for place in range(_FLOOR_CLIPS):
        clip = work.clip(place)
        with open_video(clip.source) as container:
            try:
                files.append(remux(container, np.unique(clip.positions), uncrop))
            except UncertainError:
                continue
    device = torch.device(work.device)

    def decode(place: int) -> None:
        file = files[place % len(files)]
        decode_file(file.encoded, file.positions, file.size, device)

    def batches() -> Iterator[None]:
        done = _in_threads(work, decode)
        while True:
            for _ in range(work.batch_size):
                next(done)
            yield None

    return batches(), None


CONTESTANTS = {
    AUTO: Contestant("this loader: NVDEC and the cores", partial(_ours, decode=AUTO)),
    NVDEC: Contestant("this loader: NVDEC", partial(_ours, decode=NVDEC)),
    HOST: Contestant("this loader: the cores", partial(_ours, decode=HOST), "av"),
    FLOOR: Contestant("NVDEC alone: the same packets, nothing else", _floor),
    PEER: Contestant("torchcodec's CUDA decoder, whole files, threads", partial(_peer, decode=_torchcodec)),
    "pynvvideocodec": Contestant(
        "PyNvVideoCodec, whole files, threads", partial(_peer, decode=_pynvvideocodec), "PyNvVideoCodec"
    ),
    DALI: Contestant("this loader: NVDEC by DALI", partial(_ours, decode=DALI), "av", only_untouched=True),
}


# -- the report --


def median(result: dict[str, Any], key: str = "clips_per_second") -> float | None:
    values = [run[key] for run in result["runs"] if run[key] is not None]
    return statistics.median(values) if values else None


def targets(sets: dict[str, Any]) -> list[dict[str, Any]]:
    """What this project wants of its loader on a GPU, as far as it was measured."""
    rates = {
        title: {name: median(result) for name, result in each["contestants"].items()} for title, each in sets.items()
    }
    untouched, *copies = rates.values()
    wanted = [
        ("nvdec / nvdec floor, as they are", untouched.get(NVDEC), untouched.get(FLOOR), 0.95),
        ("nvdec / torchcodec on whole files, as they are", untouched.get(NVDEC), untouched.get(PEER), 1.2),
        (
            "auto / the better of nvdec and host, as they are",
            untouched.get(AUTO),
            max(filter(None, (untouched.get(NVDEC), untouched.get(HOST))), default=None),
            1.3,
        ),
    ]
    if copies:
        wanted.append(("nvdec / nvdec floor, short groups", copies[0].get(NVDEC), copies[0].get(FLOOR), 0.9))
    if len(copies) > 1:
        wanted.append(("nvdec, many sizes / few", copies[1].get(NVDEC), copies[0].get(NVDEC), 0.8))
    return [
        {"what": what, "value": value / of, "at_least": least, "met": value / of >= least}
        for what, value, of, least in wanted
        if value and of
    ]


def table(report: dict[str, Any]) -> str:
    """The report as text."""
    found = report["machine"]
    lines = [
        f"{found['gpu']}, driver {found['driver']}, CUDA {found['cuda']}; {found['cpu']}, {found['cores']} cores",
        ", ".join(f"{name} {version}" for name, version in found["versions"].items()),
        ", ".join(f"{name} {value}" for name, value in report["settings"].items()),
    ]
    header = ["clips/s", "CPU ms/clip", "NVDEC", "GPU MiB", "first batch s", "diff/255", "wrong frames", "decoded by"]
    for title, each in report["sets"].items():
        packets = each["packets"]
        lines += [
            "",
            f"{title}: {each['videos']} videos of {each['sizes']} sizes; packets a clip: {packets['in_window']:.0f} up "
            f"to the last frame, {packets['fed']:.0f} needed",
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
                    ", ".join(f"{engine} {count}" for engine, count in engines.items()),
                ]
            )
        widths = [max(len(row[column]) for row in rows if len(row) > 2) for column in range(len(rows[0]))]
        lines += [
            "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))]) for row in rows
        ]
        for name, result in each["contestants"].items():
            for reason, count in (result["runs"][-1]["fallbacks"] if result["runs"] else {}).items():
                lines.append(f"{name}: {count} of its clips {reason}")
    lines.append("")
    for target in report["targets"]:
        met = "met" if target["met"] else "missed"
        lines.append(f"{target['what']}: {target['value']:.2f}, target {target['at_least']}: {met}")
    return "\n".join(lines)
