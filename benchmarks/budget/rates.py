"""Computes frames, seconds and clips/s of decoding, without reading files."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dali_pipelines.engines import share_of_nvdec
from dali_pipelines.gpus import Gpu

UTILISATION = 0.4
"""Share of a GPU's peak that training reaches; an estimate, not measured."""
GOP, B_FRAMES, SHORT_SIDE = 16, 3, 256
"""The settings of `prepare.py transcode --short-side 256 --gop 16`."""
MEASURED_GPU = "H200"
"""The GPU on which decoding was measured (docs/benchmarks.md)."""
MEASURED_SIZE = 256, 340
MEASURED_FPS, MEASURED_GOP_16_FPS = 22_000, 25_000
"""H.264 frames/s of that size on all engines together: without B-frames, and at GOP `GOP`. `Gpu` models the first."""
MEASURED_HOW = f"one {MEASURED_GPU}, 2026-11-27, torchcodec's CUDA decoder, 16 threads"
NVDEC, CORES, BOTH = "NVDEC", "CPU cores", "NVDEC and CPU cores"

START, SEEK, SELECTED, TRANSCODED, VIEWS = WAYS = "start", "seek", "selected", "transcoded", "views"
"""Ways to decode; `text` gives their titles."""


class Decode(NamedTuple):
    """The cost of decoding one training sample."""

    codec: str
    area: int
    """Pixels of a frame as coded."""
    transcoded_area: int
    """The same after transcoding."""
    on_gpu: bool
    """Whether NVDEC supports the video; otherwise the workers decode it."""
    transcoded_on_gpu: bool
    frames: dict[str, int]
    """Way -> number of frames decoded."""
    packets_read: int
    fallback: str = ""
    """The reason that all packets from the start are decoded; "" if packets are selected."""
    has_short_groups: bool = False
    """Whether its GOPs are no longer than `GOP`."""


def seeking_frames(starts: Sequence[int], wanted: Iterable[int], leading: frozenset[int] = frozenset()) -> int:
    """Number of frames decoded by a decoder that, like those with a file index, seeks to the keyframe before each
    wanted frame unless it is already past it. All arguments are packet numbers: `starts` those of keyframes,
    `leading` those of frames that need the keyframe before their own."""
    count = done = 0
    for number in sorted(wanted):
        place = int(np.searchsorted(starts, number, side="right")) - 1 - (number in leading)
        count += number + 1 - max(starts[max(place, 0)], done)
        done = number + 1
    return count


def transcoded_frames(positions: Sequence[int], frames: int) -> int:
    """Number of frames to decode for those at `positions` of a video of `frames` frames after it is transcoded to
    closed GOPs of `GOP` frames, in which a reference frame follows every `B_FRAMES` B-frames and ends the GOP:

        I b b b P b b b P b b b P b b P | I b b b ...
    """
    count = 0
    for start in {position // GOP * GOP for position in positions}:
        last = min(GOP, frames - start) - 1
        places = {position - start for position in positions if start <= position < start + GOP}
        is_b = [place for place in places if place % (B_FRAMES + 1) and place != last]
        references = -(-max(places) // (B_FRAMES + 1)) + 1  # a B-frame needs the reference frame after it
        count += references + len(is_b)
    return count


def is_taken(decode: Decode, way: str) -> bool:
    """Whether NVDEC supports the video, or its transcoded copy."""
    return decode.transcoded_on_gpu if way == TRANSCODED else decode.on_gpu


def frames_per_second(gpu: Gpu, codec: str, area: float) -> float:
    """Frames/s of one NVDEC engine for frames of `area` pixels, of a codec that it supports."""
    rate = gpu.frames_per_second(codec, area)
    assert rate is not None, f"NVDEC of {gpu.name} does not support {codec}"
    return rate


def engine_seconds(decode: Decode, way: str, gpu: Gpu) -> float:
    """Time of one NVDEC engine in seconds; 0 if NVDEC does not support the video."""
    if not is_taken(decode, way):
        return 0.0
    is_new = way == TRANSCODED
    codec, area = ("h264", decode.transcoded_area) if is_new else (decode.codec, decode.area)
    gain = MEASURED_GOP_16_FPS / MEASURED_FPS if is_new or decode.has_short_groups else 1
    return decode.frames[way] / (gain * frames_per_second(gpu, codec, area))


def pixels(decode: Decode, way: str) -> float:
    """Number of pixels decoded."""
    return decode.frames[way] * (decode.transcoded_area if way == TRANSCODED else decode.area)


@dataclass(frozen=True)
class Timings:
    """CPU seconds of one decode, measured on this machine."""

    decode: float
    """Work of a worker that decodes the sample itself."""
    headers: float
    """The part of `decode` that opens the file, reads packets and selects them."""
    feed: float
    """Work of a worker for a sample that NVDEC decodes, without torchcodec's own time."""


def core_seconds(decodes: Sequence[Decode], way: str, timings: Timings, *, host_share: float) -> float:
    """Mean CPU seconds of a decode in a worker, which decodes `host_share` (0 to 1) of the videos that NVDEC supports
    and all others, and feeds the rest to NVDEC. Measured for `SELECTED`; for other ways, the time after the headers is
    scaled by the number of decoded pixels."""
    fed = (1 - host_share) * float(np.mean([is_taken(each, way) for each in decodes]))
    scale = sum(pixels(each, way) for each in decodes) / sum(pixels(each, SELECTED) for each in decodes)
    host = timings.headers + (timings.decode - timings.headers) * scale
    return fed * timings.feed + (1 - fed) * host


def clips_per_second(units: float, seconds: float, clips: int = 1) -> float:
    """Clips/s of `units` engines or cores, if a decode takes one of them `seconds` and gives `clips` clips."""
    return units * clips / seconds if seconds else float("inf")


class Rates(NamedTuple):
    """Clips/s of all clips together, by decoder."""

    cores: float
    """The cores decode everything."""
    nvdec: float | None = None
    """NVDEC decodes all videos that it supports and is always busy; None if there are none."""
    feeding: float | None = None
    """The cores feed NVDEC, and decode only the videos that it does not support."""
    nvdec_limit: float = float("inf")
    """NVDEC's limit when it leaves `host_share` to the cores."""
    cores_limit: float = float("inf")
    """The cores' limit when they feed NVDEC and decode the rest, with the same `host_share`."""
    host_share: float = 1.0
    """Share of the videos that NVDEC supports which the cores decode."""

    @property
    def together(self) -> float:
        """NVDEC and the cores together, with `host_share`."""
        return min(self.nvdec_limit, self.cores_limit)


def clip_rates(
    decodes: Sequence[Decode],
    way: str,
    timings: Timings,
    *,
    gpu: Gpu | None,
    gpus: int,
    cores: float,
    clips: int = 1,
    host_share: float | None = 0.0,
) -> Rates:
    """Clips/s of `gpus` GPUs and `cores` CPU cores.

    gpu: None without NVDEC.
    clips: clips per decode.
    host_share: share of the NVDEC-compatible videos that the cores decode; None for the share that keeps both busy.
    """
    own, fed = (core_seconds(decodes, way, timings, host_share=each) for each in (1.0, 0.0))
    alone = clips_per_second(cores, own, clips)
    taken = float(np.mean([is_taken(each, way) for each in decodes]))
    if gpu is None or not taken:
        return Rates(alone, cores_limit=alone)
    engines = gpu.engines * gpus
    engine = float(np.mean([engine_seconds(each, way, gpu) for each in decodes]))
    if host_share is None:
        by_nvdec = share_of_nvdec(nvdec=engines * taken / engine, host=own, feed=timings.feed, cores=cores, most=taken)
        host_share = 1 - by_nvdec / taken
    return Rates(
        cores=alone,
        nvdec=clips_per_second(engines, engine, clips),
        feeding=clips_per_second(cores, fed, clips),
        nvdec_limit=clips_per_second(engines, (1 - host_share) * engine, clips),
        cores_limit=clips_per_second(cores, core_seconds(decodes, way, timings, host_share=host_share), clips),
        host_share=host_share,
    )


def limits(rates: Rates, *, is_auto: bool, knows_cores: bool) -> dict[str, float]:
    """Maps engine or engines to the clips/s that they supply. is_auto: NVDEC and the cores share the work."""
    if rates.nvdec is None:
        return {CORES: rates.cores}
    if not knows_cores:
        return {NVDEC: rates.nvdec_limit}
    return {BOTH: rates.together} if is_auto else {NVDEC: rates.nvdec_limit, CORES: rates.cores_limit}


def network_demand(multiply_adds: float, gpu: Gpu, gpus: int, *, passes: int = 3) -> float:
    """Clips/s that training consumes, with `passes` forward passes per clip and two operations per multiply-add."""
    return gpus * gpu.tflops * 1e12 * UTILISATION / (passes * 2 * multiply_adds)


def tightest(limits: dict[str, float]) -> str:
    """The name of the lowest limit."""
    return min(limits, key=lambda name: limits[name])


def judge(demand: float, limits: dict[str, float]) -> tuple[str, float]:
    """The bottleneck ("network" or a name in `limits`), and how many times faster the other side is. `demand` and
    `limits` are in clips/s."""
    name = tightest(limits)
    if limits[name] >= demand:
        return "network", limits[name] / demand
    return name, demand / limits[name]
