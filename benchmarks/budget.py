"""Will decoding starve a training, and what would help?

    dali_pipelines/gpus.py      what GPUs can do, published and measured
    dali_pipelines/engines.py   what NVDEC takes, and how `auto` shares the clips between it and the cores
    arithmetic                  frames, seconds and clips/s from numbers alone
    survey, timings             what is read from files and measured here
    budget, table               all of it as one report

A decode is one training sample as `plan` decides it: `data.views_per_decode` clips of one video. Frames are counted by
their packets: those that a decoder is fed.
"""

import itertools
import os
import textwrap
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import av
import numpy as np
import torch

from common.config import Config, clip_settings
from common.labels import class_names, read_manifest
from common.precision import autocast, resolve_precision
from dali_pipelines.bitstream.parser import UncertainError
from dali_pipelines.clip_source import bounds
from dali_pipelines.engines import Routing, estimate, general_limits, share_of_nvdec
from dali_pipelines.errors import InputError
from dali_pipelines.files import open_video
from dali_pipelines.gpus import HD, RATES_FROM, Gpu
from dali_pipelines.host_decoder import decode_frames
from dali_pipelines.manifest import Manifest, coded_size
from dali_pipelines.packets import PacketReader, Remuxed, remux, video_stream
from dali_pipelines.plan import SamplePlan, View, ViewSettings, plan_sample
from model import TimeSformer, timesformer
from preparation.transcode import copy_size

WINDOWS = 4  # training windows a video: those of the first epochs
UTILISATION = 0.4
"""Share of a GPU's peak that training reaches; an estimate, not measured."""
GOP, B_PICTURES, SHORT_SIDE = 16, 3, 256
"""What `prepare.py transcode --short-side 256 --gop 16` writes."""
MEASURED_GPU = "H200"
"""The GPU on which decoding was measured (docs/benchmarks.md)."""
MEASURED_SIZE = 256, 340
MEASURED_FPS, MEASURED_GOP_16_FPS = 22_000, 25_000
"""Frames/s of that size and H.264 on all its engines: with B frames left out; and of groups of `GOP` frames. `Gpu`
models the first."""
MEASURED_HOW = f"one {MEASURED_GPU}, 2026-11-27, torchcodec's CUDA decoder, 16 threads"
_MEASURE_S = 3.0
_NEAR, _NEAR_NVDEC = 1.25, 2.0  # ratios that measurements here, and numbers of GPUs, are no better than
_SHOWN = 5  # files that are named
_WIDTH = 118  # of printed lines
NVDEC, CORES, BOTH = "NVDEC", "CPU cores", "NVDEC and CPU cores"

START, SEEK, SELECTED, TRANSCODED, VIEWS = WAYS = "start", "seek", "selected", "transcoded", "views"
_TITLES = {
    START: "everything from the file's start",
    SEEK: "from the keyframe before each frame",
    SELECTED: "selected packets, as training does",
    TRANSCODED: "... of transcoded files",
    VIEWS: "... with twice views_per_decode",
}


# -- arithmetic --


class Decode(NamedTuple):
    """What one decode takes."""

    codec: str
    area: int
    """Pixels of a frame as coded."""
    transcoded_area: int
    """The same, after transcoding."""
    on_gpu: bool
    """NVDEC takes it; otherwise the workers decode it."""
    transcoded_on_gpu: bool
    frames: dict[str, int]
    """Way -> frames decoded."""
    packets_read: int
    fallback: str = ""
    """Why everything from the start is decoded; "" if only some packets are."""
    has_short_groups: bool = False
    """Its groups of pictures are no longer than `GOP`."""


def seeking_frames(starts: Sequence[int], wanted: Iterable[int], leading: frozenset[int] = frozenset()) -> int:
    """Pictures that a decoder walks through which goes to the keyframe before each wanted picture, unless it is past
    that already, as decoders with an index of the file do. All are numbers of packets; `starts` are those
    of keyframes, and pictures in `leading` need the keyframe before their own."""
    count = done = 0
    for number in sorted(wanted):
        place = int(np.searchsorted(starts, number, side="right")) - 1 - (number in leading)
        count += number + 1 - max(starts[max(place, 0)], done)
        done = number + 1
    return count


def transcoded_frames(positions: Sequence[int], frames: int) -> int:
    """Pictures fed for those at `positions` of a video of `frames`, once it is transcoded: closed groups of `GOP`, in
    them a reference after every `B_PICTURES` pictures that no other refers to, and one at the end:

        I b b b P b b b P b b b P b b P | I b b b ...
    """
    count = 0
    for start in {position // GOP * GOP for position in positions}:
        last = min(GOP, frames - start) - 1
        places = {position - start for position in positions if start <= position < start + GOP}
        is_b = [place for place in places if place % (B_PICTURES + 1) and place != last]
        references = -(-max(places) // (B_PICTURES + 1)) + 1  # a B picture needs the reference that follows it
        count += references + len(is_b)
    return count


def is_taken(decode: Decode, way: str) -> bool:
    """Whether NVDEC takes it."""
    return decode.transcoded_on_gpu if way == TRANSCODED else decode.on_gpu


def engine_seconds(decode: Decode, way: str, gpu: Gpu) -> float:
    """Time of one NVDEC engine; 0 if NVDEC does not take the video."""
    if not is_taken(decode, way):
        return 0.0
    is_new = way == TRANSCODED
    codec, area = ("h264", decode.transcoded_area) if is_new else (decode.codec, decode.area)
    gain = MEASURED_GOP_16_FPS / MEASURED_FPS if is_new or decode.has_short_groups else 1
    return decode.frames[way] / (gain * gpu.frames_per_second(codec, area))


def pixels(decode: Decode, way: str) -> float:
    return decode.frames[way] * (decode.transcoded_area if way == TRANSCODED else decode.area)


@dataclass(frozen=True)
class Timings:
    """Processor time of one decode in seconds, measured here."""

    decode: float
    """All that the workers do for one that they decode themselves."""
    headers: float
    """Of that: opening, reading packets and choosing them."""
    feed: float
    """All that they do for one that NVDEC decodes; torchcodec's own time is not in it."""


def core_seconds(decodes: Sequence[Decode], way: str, timings: Timings, *, host_share: float) -> float:
    """Mean of a decode in a worker, which feeds NVDEC what it takes but for `host_share` of that, and decodes the rest.
    Measured for `SELECTED`; for other ways, what follows the headers is scaled with the pixels that are decoded."""
    fed = (1 - host_share) * float(np.mean([is_taken(each, way) for each in decodes]))
    scale = sum(pixels(each, way) for each in decodes) / sum(pixels(each, SELECTED) for each in decodes)
    host = timings.headers + (timings.decode - timings.headers) * scale
    return fed * timings.feed + (1 - fed) * host


def clips_per_second(units: float, seconds: float, clips: int = 1) -> float:
    """Of `units` engines or cores of which each decode takes `seconds` and gives `clips`."""
    return units * clips / seconds if seconds else float("inf")


class Rates(NamedTuple):
    """Clips/s, of all clips together."""

    cores: float
    """The cores alone decode."""
    nvdec: float | None = None
    """NVDEC alone decodes what it takes, always busy; None if it takes nothing."""
    feeding: float | None = None
    """The cores feed NVDEC, and decode only what it does not take."""
    nvdec_limit: float = float("inf")
    """NVDEC leaves `host_share` to the cores."""
    cores_limit: float = float("inf")
    """The cores feed NVDEC, and decode the rest, with that same `host_share`."""
    host_share: float = 1.0
    """Of what NVDEC takes."""

    @property
    def together(self) -> float:
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
    """What `gpus` NVDECs and `cores` decode. gpu: None without NVDEC. clips: of a decode. host_share: None for the
    share that keeps NVDEC and the cores both busy."""
    own, fed = (core_seconds(decodes, way, timings, host_share=each) for each in (1.0, 0.0))
    alone = clips_per_second(cores, own, clips)
    taken = float(np.mean([is_taken(each, way) for each in decodes]))
    if gpu is None or not taken:
        return Rates(alone, cores_limit=alone)
    engines = gpu.engines * gpus
    engine = float(np.mean([engine_seconds(each, way, gpu) for each in decodes]))
    if host_share is None:
        x = share_of_nvdec(nvdec=engines * taken / engine, host=own, feed=timings.feed, cores=cores, most=taken)
        host_share = 1 - x / taken
    return Rates(
        cores=alone,
        nvdec=clips_per_second(engines, engine, clips),
        feeding=clips_per_second(cores, fed, clips),
        nvdec_limit=clips_per_second(engines, (1 - host_share) * engine, clips),
        cores_limit=clips_per_second(cores, core_seconds(decodes, way, timings, host_share=host_share), clips),
        host_share=host_share,
    )


def limits(rates: Rates, *, is_auto: bool, knows_cores: bool) -> dict[str, float]:
    """Engine or engines -> clips/s that training can have of them. is_auto: NVDEC and the cores share the work."""
    if rates.nvdec is None:
        return {CORES: rates.cores}
    if not knows_cores:
        return {NVDEC: rates.nvdec_limit}
    return {BOTH: rates.together} if is_auto else {NVDEC: rates.nvdec_limit, CORES: rates.cores_limit}


def network_demand(multiply_adds: float, gpu: Gpu, gpus: int, *, passes: int = 3) -> float:
    """Clips/s that training takes: `passes` forward passes a clip, two operations a multiply-add."""
    return gpus * gpu.tflops * 1e12 * UTILISATION / (passes * 2 * multiply_adds)


def judge(demand: float, limits: dict[str, float]) -> tuple[str, float]:
    """Who bounds ("network" or a name in `limits`), and how many times more the others could do. All in clips/s."""
    name = min(limits, key=limits.get)
    if limits[name] >= demand:
        return "network", limits[name] / demand
    return name, demand / limits[name]


def multiply_adds(config: Config, classes: int) -> int:
    """Of one clip's forward pass, with the products of attention."""
    return timesformer.multiply_adds(lambda: _network(config, classes))


# -- what files say, and what is measured --


@dataclass
class Survey:
    """Random videos of a manifest, and what their training windows take."""

    manifest: Manifest
    view: View
    seed: int
    routing: Routing
    rows: list[int]
    decodes: list[Decode]
    unreadable: dict[int, str]
    """Row -> why."""
    headers_s: float
    feed_s: float
    """Processor time of a decode, means."""


def survey(manifest: Manifest, config: Config, samples: int, nvdec: Gpu | None) -> Survey:
    """Reads packets and headers of `samples` videos; decodes nothing. Raises `InputError` if none can be read."""
    rows = np.random.default_rng(0).permutation(len(manifest))[:samples].tolist()
    routing = _routing(config, nvdec)
    found = Survey(manifest, _view(config), config.seed, routing, rows, [], {}, 0.0, 0.0)
    headers, feeds = [], []
    for row in rows:
        try:
            for epoch in range(WINDOWS):
                start = time.process_time()
                decode, remux_s = _look(found, row, epoch)
                headers.append(time.process_time() - start - remux_s)
                feeds += [remux_s] * decode.on_gpu
                found.decodes.append(decode)
        except InputError as error:
            found.unreadable[row] = str(error)
        except av.error.FFmpegError as error:
            found.unreadable[row] = error.strerror.lower()
    if not found.decodes:
        row, reason = next(iter(found.unreadable.items()))
        raise InputError(f"{manifest.file(row)}: {reason}; none of {len(rows)} sampled videos can be read")
    found.headers_s = float(np.mean(headers)) / 2  # read twice: for the windows as they are, and with twice as many
    found.feed_s = float(np.mean(feeds)) if feeds else found.headers_s  # nothing was remuxed: at least that
    return found


def _routing(config: Config, nvdec: Gpu | None) -> Routing:
    """The loader's rules for that GPU, whose driver cannot be asked."""
    if nvdec is None:
        return Routing(engine="host", on_gpu=False)
    engine = "dali" if config.data.decode == "dali" else "nvdec"
    takes = general_limits(decodes_av1=nvdec.generation.decodes_av1)
    return Routing(engine=engine, on_gpu=True, limits=takes, seed=config.seed)


def _look(survey: Survey, row: int, epoch: int) -> tuple[Decode, float]:
    """One decode, and the processor seconds that it takes to make what NVDEC is fed, as training makes it."""
    video = survey.manifest[row]
    height, width = coded_size(video)
    plan = _plan(survey, row, epoch)
    everything = int(plan.positions[-1]) + 1
    frames = dict.fromkeys((START, SEEK, SELECTED), everything) | {
        TRANSCODED: transcoded_frames(plan.positions.tolist(), video.frames)
    }
    read, fallback = everything, ""
    start = time.process_time()
    file = _remux(survey, row, plan.positions)
    remux_s = time.process_time() - start
    on_gpu = file is not None
    if on_gpu:
        frames[SELECTED], read = file.packets_kept, file.packets_read
    try:
        reader, selection = _select(survey, row, plan.positions, in_one_go=on_gpu)
        wanted = [selection.shown[position] for position in plan.positions.tolist()]
        starts = [number for number, header in enumerate(reader.headers) if header.starts_group]
        leading = frozenset(number for number in wanted if reader.headers[number].is_leading)
        frames[START], frames[SEEK] = max(wanted) + 1, seeking_frames(starts, wanted, leading)
        if not on_gpu:
            frames[SELECTED], read = sum(map(len, selection.runs)), len(reader.packets)
    except UncertainError as error:
        fallback = str(error)
    twice = _plan(survey, row, epoch, views=2 * survey.view.views_per_decode).positions
    try:
        frames[VIEWS] = sum(map(len, _select(survey, row, twice, in_one_go=on_gpu)[1].runs))
    except UncertainError:
        frames[VIEWS] = int(twice[-1]) + 1
    new_height, new_width = copy_size(video, SHORT_SIDE)
    copy = video._replace(
        codec="h264", pixel_format="yuv420p", height=new_height, width=new_width, rotation=0, mirrored=0
    )
    decode = Decode(
        codec=video.codec,
        area=height * width,
        transcoded_area=new_height * new_width,
        on_gpu=on_gpu,
        transcoded_on_gpu=survey.routing.takes(copy),
        frames=frames,
        packets_read=read,
        fallback=fallback,
        has_short_groups=0 < video.gop <= GOP,
    )
    return decode, remux_s


def _remux(survey: Survey, row: int, positions: np.ndarray) -> Remuxed | None:
    """What NVDEC is fed; None if it does not take the video, by the loader's rules."""
    if not survey.routing.takes(survey.manifest[row]):
        return None
    try:
        with open_video(survey.manifest.source(row)) as container:
            file = remux(container, positions)
            survey.routing.check(file, video_stream(container).codec_context)
            return file
    except UncertainError:
        return None


def _select(survey: Survey, row: int, positions: np.ndarray, *, in_one_go: bool):
    with open_video(survey.manifest.source(row)) as container:
        reader = PacketReader(container)
        return reader, reader.select(positions, in_one_go=in_one_go)


def time_decoding(survey: Survey, seconds: float) -> tuple[float, int]:
    """(processor seconds of a decode by `decode_frames`, decodes measured): one thread, one window of each video, then
    the next of each, until the time is up. What cannot be decoded joins `survey.unreadable`; `InputError` where
    nothing can."""
    spent, count, until = 0.0, 0, time.monotonic() + seconds
    for epoch in itertools.count():
        for row in survey.rows:
            if row in survey.unreadable:
                continue
            plan, size = _plan(survey, row, epoch), coded_size(survey.manifest[row])
            region = bounds(plan.rectangles, size)
            start = time.process_time()
            try:
                decode_frames(survey.manifest.source(row), plan.positions, size=size, region=region)
            except (InputError, UncertainError) as error:
                survey.unreadable[row] = str(error)
                continue
            spent += time.process_time() - start
            count += 1
            if time.monotonic() > until:
                return spent / count, count
        if len(survey.unreadable) == len(survey.rows):
            raise InputError(f"{_named(survey)[0]}; none of {len(survey.rows)} sampled videos can be decoded")
    raise AssertionError


def time_network(config: Config, classes: int) -> tuple[float, str, str]:
    """(clips/s of training steps on random clips here, device, precision): forward and backward, no optimizer."""
    is_gpu = config.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if is_gpu else "cpu")
    precision = resolve_precision(config.train.precision, device)
    network = _network(config, classes).to(device).train()
    network.activation_checkpointing = config.train.activation_checkpointing
    batch = 8 if is_gpu else int(np.clip(3e11 // (6 * multiply_adds(config, classes)), 1, 8))
    clips = torch.rand(batch, *_clip_shape(config), device=device)
    spent = []
    while len(spent) < 2 or (len(spent) < 4 and sum(spent) < 5):
        start = time.perf_counter()
        with autocast(device, precision):
            logits = network(clips)
        logits.float().square().sum().backward()
        if is_gpu:
            torch.cuda.synchronize()
        spent.append(time.perf_counter() - start)
    return batch / min(spent[1:]), device.type, precision  # the first step also makes what is made once


def _plan(survey: Survey, row: int, epoch: int, views: int | None = None) -> SamplePlan:
    view = survey.view if views is None else replace(survey.view, views_per_decode=views)
    return plan_sample(survey.manifest[row], view, seed=survey.seed, epoch=epoch, sample_id=row)


def _view(config: Config) -> View:
    settings = clip_settings(config.data, "train")
    return View(**{name: settings[name] for name in ViewSettings.__annotations__ if name in settings})


def _clip_shape(config: Config) -> tuple[int, ...]:
    return 3, config.data.num_frames, config.data.crop_size, config.data.crop_size


def _network(config: Config, classes: int) -> TimeSformer:
    _, frames, side, _ = _clip_shape(config)
    return TimeSformer(num_frames=frames, image_size=side, num_classes=classes, **asdict(config.model))


def _named(survey: Survey) -> list[str]:
    return [f"{survey.manifest.file(row)}: {reason}" for row, reason in survey.unreadable.items()]


# -- the report --


def budget(
    manifest_file: str,
    config: Config,
    *,
    samples: int,
    gpu: Gpu | None,
    gpus: int,
    cores: int | None,
    network_clips: float | None,
) -> dict[str, Any]:
    """The report, as it is printed with --json. `cores`: of the machine that trains, None: those here;
    `network_clips`: clips/s that training takes on one GPU, None: estimated for `gpu`, measured here without one.
    Raises `InputError`."""
    manifest = read_manifest(manifest_file, key="-m")
    if gpus > 1 and not (gpu or network_clips or torch.cuda.is_available()):
        raise InputError(f"--gpus {gpus}: there is no GPU here to measure the network on; name one with --gpu")
    classes = len(class_names(_labels(config), manifest))
    nvdec = None if _host_share(config) == 1 else gpu
    found = survey(manifest, config, samples, nvdec)
    decode_s, measured = time_decoding(found, _MEASURE_S)
    timings = Timings(decode_s, min(found.headers_s, decode_s), found.feed_s)
    demand, network = _demand(config, classes, gpu, gpus, network_clips)
    knows_cores = bool(cores) or torch.cuda.is_available()  # those of the machine that trains
    cores = cores or len(os.sched_getaffinity(0))
    host_share = _host_share(config)
    knows_share = host_share is not None or knows_cores
    views = found.view.views_per_decode
    ways, rates = {}, {}
    for way in WAYS:
        clips = views * (2 if way == VIEWS else 1)
        rates[way] = each = clip_rates(
            found.decodes,
            way,
            timings,
            gpu=nvdec,
            gpus=gpus,
            cores=cores,
            clips=clips,
            host_share=host_share if knows_share else 0.0,
        )
        way_limits = limits(each, is_auto=config.data.decode == "auto", knows_cores=knows_cores)
        ways[way] = {
            "frames_per_clip": float(np.mean([decode.frames[way] for decode in found.decodes])) / clips,
            "megapixels_per_clip": float(np.mean([pixels(decode, way) for decode in found.decodes])) / clips / 1e6,
            "nvdec_clips_per_second": each.nvdec,
            "cores_clips_per_second": each.cores,
            "feeding_clips_per_second": each.feeding,
            "together_clips_per_second": way_limits.get(BOTH),
            "limits": way_limits,
        }
    bound_by, ratio = judge(demand, ways[SELECTED]["limits"])
    report = {
        "manifest": manifest_file,
        "videos": len(manifest),
        "sampled_videos": len(found.rows),
        "windows": len(found.decodes),
        "views_per_decode": views,
        "unreadable": {"count": len(found.unreadable), "files": _named(found)[:_SHOWN]},
        "fallbacks": dict(Counter(each.fallback for each in found.decodes if each.fallback)),
        "codecs": dict(Counter(each.codec for each in found.decodes)),
        "taken_by_nvdec": float(np.mean([each.on_gpu for each in found.decodes])),
        "picture_pixels": float(np.mean([each.area for each in found.decodes])),
        "packets_read_per_clip": float(np.mean([each.packets_read for each in found.decodes])) / views,
        "ways": ways,
        "gpu": gpu and {"name": gpu.name, "gpus": gpus, "engines": gpu.engines * gpus},
        "cores": cores,
        "knows_cores": knows_cores,
        "core_ms_per_clip": {name: 1000 * each / views for name, each in asdict(timings).items()},
        "measured_windows": measured,
        "network": {"clips_per_second": demand} | network,
        "decode": config.data.decode,
        "limits": ways[SELECTED]["limits"],
        "bound_by": bound_by,
        "times": ratio,
    }
    report["supply"] = _supply(report, rates[SELECTED], knows_share=knows_share)
    if host_share is None and BOTH in report["limits"]:
        workers = cores // gpus if config.data.workers is None else config.data.workers
        share = estimate(manifest, found.view, found.routing, gpu=nvdec, cores=max(workers, 1)).host_share
        by_default = clip_rates(
            found.decodes, SELECTED, timings, gpu=nvdec, gpus=gpus, cores=cores, clips=views, host_share=share
        )
        report["supply"] |= {"default_host_share": share, "default_clips_per_second": by_default.together}
    report["needed"] = _needed(report, found.decodes, timings, host_share)
    report["verdict"] = verdict(report)
    report["remedies"] = remedies(report)
    report["assumptions"] = _assumptions(report, config, gpu)
    return report


def _host_share(config: Config) -> float | None:
    """Share of what NVDEC takes that the cores decode; None for what keeps both busy."""
    shares = {"auto": config.data.host_share, "nvdec": config.data.host_share or 0.0, "dali": 0.0, "host": 1.0}
    return shares[config.data.decode]


def _supply(report: dict[str, Any], rates: Rates, *, knows_share: bool) -> dict[str, Any]:
    """Clips/s with `data.decode` as configured, how many of them each engine decodes, and the share of the cores in
    what NVDEC takes: None if it takes nothing, or if only the number of cores would tell."""
    clips = min(report["limits"].values())
    by_nvdec = clips * report["taken_by_nvdec"] * (1 - rates.host_share)
    by_engine = {NVDEC: by_nvdec, CORES: clips - by_nvdec}
    return {
        "clips_per_second": clips,
        "by_engine": {name: each for name, each in by_engine.items() if each},
        "host_share": round(rates.host_share, 2) if rates.nvdec is not None and knows_share else None,
    }


def _needed(
    report: dict[str, Any], decodes: Sequence[Decode], timings: Timings, host_share: float | None
) -> dict[str, float] | None:
    """Cores with which the clips that the network takes are decoded, and the share of them that the cores decode. None
    without NVDEC. host_share None: the cores decode what is too much for NVDEC."""
    demand, nvdec = report["network"]["clips_per_second"], report["ways"][SELECTED]["nvdec_clips_per_second"]
    if nvdec is None:
        return None
    if host_share is None:
        host_share = max(1 - nvdec / demand, 0.0)
    seconds = core_seconds(decodes, SELECTED, timings, host_share=host_share) / report["views_per_decode"]
    return {"cores": demand * seconds, "decoded_by_cores": 1 - report["taken_by_nvdec"] * (1 - host_share)}


def _labels(config: Config) -> str | None:
    """The file of class names, if it is here: the count hardly matters."""
    path = config.data.labels
    return path if path and os.path.exists(path) else None


def _demand(
    config: Config, classes: int, gpu: Gpu | None, gpus: int, network_clips: float | None
) -> tuple[float, dict[str, Any]]:
    """Clips/s, and where they come from."""
    if network_clips:
        return gpus * network_clips, {"how": f"{network_clips:g} clips/s a GPU, as given"}
    work = multiply_adds(config, classes)
    if gpu:
        passes = 4 if config.train.activation_checkpointing else 3
        how = (
            f"{work / 1e9:.4g} GMAC a clip, {passes} forward passes, {UTILISATION:.0%} of {gpu.tflops:g} TFLOP/s: "
            "an estimate, not measured"
        )
        return network_demand(work, gpu, gpus, passes=passes), {"how": how, "gmac_per_clip": work / 1e9}
    speed, device, precision = time_network(config, classes)
    how = f"measured here: forward and backward in {precision} on {'a GPU' if device == 'cuda' else 'all CPU cores'}"
    return gpus * speed, {"how": how, "gmac_per_clip": work / 1e9, "device": device}


def verdict(report: dict[str, Any]) -> str:
    """What bounds, in words."""
    demand, ratio = report["network"]["clips_per_second"], report["times"]
    if report["bound_by"] == "network":
        name = min(report["limits"], key=report["limits"].get)
        said = (
            f"the network bounds: it takes {_number(demand)} clips/s, and {_noun(name, report)} can supply "
            f"{_number(report['limits'][name])}, {ratio:.1f} times as many"
        )
    else:
        name = report["bound_by"]
        supply = report["limits"][name]
        said = (
            f"decoding bounds: {_noun(name, report)} can supply {_number(supply)} clips/s, and the network could take "
            f"{_number(demand)}, {ratio:.1f} times as many; it would wait for {1 - 1 / ratio:.0%} of the time"
        )
    if report["bound_by"] == "network" and report["supply"].get("default_clips_per_second", demand) < demand:
        said += f", with data.host_share={report['supply']['host_share']:g}; the loader's default is too slow"
    if ratio < (_NEAR if set(report["limits"]) == {CORES} else _NEAR_NVDEC):
        said += ". That is too near to call by estimates; `benchmark.py train` on that machine measures it"
    if report["decode"] == "auto" and set(report["limits"]) == {NVDEC}:
        said += ". The CPU of that machine decodes as well; `--cores N` says how much"
    if report["network"].get("device") == "cpu":
        together = 1 / (1 / demand + 1 / report["ways"][SELECTED]["cores_clips_per_second"])
        said += f". Both need the same cores: together about {_number(together)} clips/s"
    return said[0].upper() + said[1:] + "."


def _noun(name: str, report: dict[str, Any]) -> str:
    nvdec = f"NVDEC ({_count(report['gpu']['engines'], 'engine')})" if report["gpu"] else ""
    cores = f"the CPU ({_count(report['cores'], 'core')})"
    return {NVDEC: nvdec, CORES: cores, BOTH: f"{nvdec} and {cores} together"}[name]


def _count(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


def remedies(report: dict[str, Any]) -> list[str]:
    """What transcoding, more clips out of a decode and another share of the cores would bring."""
    demand, now = report["network"]["clips_per_second"], report["ways"][SELECTED]
    before = min(now["limits"].values())
    said = []
    for way, what in (
        (TRANSCODED, f"`prepare.py transcode --short-side {SHORT_SIDE} --gop {GOP}`"),
        (VIEWS, f"data.views_per_decode={2 * report['views_per_decode']} (clips of a video side by side in a batch)"),
    ):
        then = report["ways"][way]
        after = min(then["limits"].values())
        if after < 1.05 * before:
            said.append(f"{what}: nothing to gain")
            continue
        said.append(
            f"{what}: {_number(then['frames_per_clip'])} frames a clip instead of {_number(now['frames_per_clip'])}; "
            f"{_decoder(then['limits'])} would supply {_number(after)} clips/s, {after / before:.1f} times as many, "
            f"{'enough' if after >= demand else 'not enough'} for this network"
        )
    by_default = report["supply"].get("default_clips_per_second", before)
    if before >= 1.05 * by_default:
        said.append(
            f"data.host_share={report['supply']['host_share']:g}: {_number(before)} clips/s instead of "
            f"{_number(by_default)} with the loader's default, on cores like these"
        )
    return said


def _decoder(limits: dict[str, float]) -> str:
    """What decodes, and what holds it up if that is something else."""
    if BOTH in limits:
        return "NVDEC and the CPU"
    if NVDEC not in limits:
        return "the CPU"
    return "NVDEC" if min(limits, key=limits.get) == NVDEC else "NVDEC, held up by the CPU,"


def _assumptions(report: dict[str, Any], config: Config, gpu: Gpu | None) -> list[str]:
    said = [
        f"{report['sampled_videos']} of {report['videos']} videos, drawn at random, the same every time; "
        f"the training windows of their first {WINDOWS} epochs",
        f"the CPU: processor time of {report['measured_windows']} decodes here, one thread, times {report['cores']} "
        f"cores{'' if report['knows_cores'] else ' (those here; --cores N for others)'}: an extrapolation. Waiting for "
        "storage and DALI's resize are not in it. Only the row `as training does` is measured; the others are scaled "
        "with the pixels decoded, which is too good for transcoded files, whose keyframes take longer",
        f"transcode: the frame count stays, closed groups of {GOP}, {B_PICTURES} B frames between two references",
    ]
    if gpu:
        said += _nvdec_assumptions(report, gpu)
        if not report["network"].get("device") and config.train.precision == "float32":
            said.append("the network is taken to train in bf16 or fp16; train.precision=float32 is far slower")
    elif report["decode"] != "host" and torch.cuda.is_available():
        said.append("NVDEC is not counted; --gpu NAME counts it")
    if config.distill.teacher:
        said.append("the teacher of distill.teacher, and frames that only it takes, are not counted")
    return said


def _nvdec_assumptions(report: dict[str, Any], gpu: Gpu) -> list[str]:
    if report["decode"] == "host":
        return ["decode=host: NVDEC is idle"]
    height, width = MEASURED_SIZE
    small, full = (gpu.frames_per_second("h264", area) for area in (height * width, HD))
    said = [
        f"NVDEC, measured: {MEASURED_FPS:,} frames/s of {width}x{height}, H.264 with B frames left out, and "
        f"{MEASURED_GOP_16_FPS:,} in groups of {GOP}; {MEASURED_HOW}",
        f"NVDEC, derived: {gpu.engines * small:,.0f} frames/s of that size on the {gpu.engines} engines of one "
        f"{gpu.name}, and {full:.0f} frames/s an engine at 1080p, at {gpu.video_mhz:g} MHz ({RATES_FROM}); other sizes "
        "are interpolated. NVDEC is always busy: an upper bound",
        "feeding NVDEC: reading, choosing and remuxing packets, measured here. torchcodec's own CPU time is not in it, "
        "13 to 30 ms a clip on that machine; so what the cores decode beside NVDEC is an upper bound, too",
    ]
    if gpu.name != MEASURED_GPU:
        said.append(
            f"unconfirmed: the {gpu.name} was not measured; its rates are those of the {MEASURED_GPU}, scaled by the "
            "published rate of an engine, the number of engines and the video clock"
        )
    said += [f"unconfirmed: {each}" for each in gpu.unconfirmed]
    codecs = [codec for codec in report["codecs"] if not gpu.is_published(codec)]
    if report["taken_by_nvdec"] and codecs:
        said.append(f"unconfirmed: no rate is published for {', '.join(codecs)}: that of H.264 is taken")
    if report["taken_by_nvdec"] < 1:
        said.append(f"{1 - report['taken_by_nvdec']:.0%} of the clips are decoded by the workers, not by NVDEC")
    if report["decode"] == "dali":
        said.append(
            "decode=dali: the rates are those of torchcodec. DALI's own decoder is far slower: 11 clips/s in the "
            f"loader, on that {MEASURED_GPU}, transcoded or not"
        )
    if "default_host_share" in report["supply"]:
        said.append(
            "host_share: by the times of the cores here. Without data.host_share the loader goes by times that were "
            f"measured on the machine of the {MEASURED_GPU}"
        )
    return said


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def table(report: dict[str, Any]) -> str:
    """The report as text."""
    gpu, network = report["gpu"], report["network"]
    nvdec = f"{gpu['gpus']} x {gpu['name']} NVDEC" if gpu and report["decode"] != "host" else ""
    cores = f"{report['cores']} CPU cores"
    together = "together" if BOTH in report["limits"] else ""
    lines = [
        f"{report['manifest']}: {', '.join(report['codecs'])}, {report['picture_pixels'] / 1e3:.0f} thousand pixels a "
        f"frame; {report['packets_read_per_clip']:.0f} packets read a clip",
        "",
        f"{'decoded of a video':36} {'frames/clip':>11} {nvdec:>18} {cores:>20} {together:>18}".rstrip(),
    ]
    for way, row in report["ways"].items():
        by_nvdec, by_cores, by_both = (
            "" if row[f"{name}_clips_per_second"] is None else f"{_number(row[f'{name}_clips_per_second'])} clips/s"
            for name in ("nvdec", "cores", "together")
        )
        line = f"{_TITLES[way]:36} {row['frames_per_clip']:11.1f} {by_nvdec:>18} {by_cores:>20} {by_both:>18}"
        lines.append(line.rstrip())
    lines += ["", *textwrap.wrap(_supply_text(report), _WIDTH)]
    lines.append(f"The network takes {_number(network['clips_per_second'])} clips/s ({network['how']}).")
    if needed := report["needed"]:
        rest = needed["decoded_by_cores"]
        what = f"to feed NVDEC and to decode {rest:.0%} of the clips" if rest else "to feed NVDEC"
        lines.append(f"For that, the workers need {_number(needed['cores'])} CPU cores like these, {what}.")
    for reason, count in report["fallbacks"].items():
        lines.append(f"{count} of {report['windows']} windows are decoded from the file's start: {reason}.")
    if report["unreadable"]["count"]:
        lines.append(f"{report['unreadable']['count']} of {report['sampled_videos']} sampled videos cannot be read:")
        lines += [f"    {each}" for each in report["unreadable"]["files"]]
    lines += ["", *textwrap.wrap(report["verdict"], _WIDTH)]
    for title, key in (("What would help the decoding", "remedies"), ("Assumptions", "assumptions")):
        lines += ["", f"{title}:"]
        for each in report[key]:
            lines += textwrap.wrap(each, _WIDTH, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False)
    return "\n".join(lines)


def _supply_text(report: dict[str, Any]) -> str:
    """Which engine decodes how much, with `data.decode` as configured."""
    supply, names = report["supply"], {NVDEC: "NVDEC", CORES: "the CPU"}
    parts = [f"{names[name]} decodes {_number(each)} clips/s" for name, each in supply["by_engine"].items()]
    said = f"decode={report['decode']}: {' and '.join(parts)}"
    if len(parts) > 1:
        said += f", together {_number(supply['clips_per_second'])}"
    if supply["host_share"] is not None and BOTH in report["limits"]:
        said += f", with data.host_share={supply['host_share']:g}"
    if "default_host_share" in supply:
        said += (
            f", which keeps both busy on cores like these. The loader's default is {supply['default_host_share']:g}: "
            f"{_number(supply['default_clips_per_second'])} clips/s"
        )
    return said + "."
