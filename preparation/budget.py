"""Will decoding starve a training, and what would help?

    preparation/gpus.py   what GPUs can do, as published
    arithmetic            frames, seconds and clips/s from numbers alone
    survey, timings       what is read from files and measured here
    budget, table         all of it as one report

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

from dali_pipelines.clip_source import _NVDEC_SIDES, DALI_GPU_CODECS, _bounds, _check_nvdec
from dali_pipelines.errors import InputError
from dali_pipelines.files import open_video
from dali_pipelines.host_decoder import decode_frames
from dali_pipelines.loader import _short_sides
from dali_pipelines.manifest import Manifest, coded_size
from dali_pipelines.packets import PacketReader, UncertainError, remux, video_stream
from dali_pipelines.plan import SamplePlan, View, plan_sample
from model import TimeSformer, timesformer
from preparation.gpus import HD, RATES_FROM, SMALL_GAIN, Gpu
from training.config import Config, clip_settings
from training.labels import class_names, read_manifest
from training.precision import autocast, resolve_precision

WINDOWS = 4  # training windows a video: those of the first epochs
UTILISATION = 0.4
"""Share of a GPU's peak that training reaches; an estimate, not measured."""
GOP, B_PICTURES, SHORT_SIDE = 16, 3, 256
"""What `prepare.py transcode --short-side 256 --gop 16` writes."""
_MEASURE_S = 3.0
_NEAR, _NEAR_NVDEC = 1.25, 2.0  # ratios that measurements here, and numbers of GPUs, are no better than
_SHOWN = 5  # files that are named
_WIDTH = 118  # of printed lines

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
    """Pixels of a picture as coded."""
    transcoded_area: int
    """The same, after transcoding."""
    on_gpu: bool
    """NVDEC decodes it; otherwise the workers do."""
    transcoded_on_gpu: bool
    frames: dict[str, int]
    """Way -> pictures decoded."""
    packets_read: int
    fallback: str = ""
    """Why everything from the start is decoded; "" where only some packets are."""


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


def transcoded_size(height: int, width: int) -> tuple[int, int]:
    """Of pictures whose short side becomes `SHORT_SIDE`; smaller ones stay as they are."""
    scale = min(1, SHORT_SIDE / min(height, width))
    return round(height * scale), round(width * scale)


def engine_seconds(decode: Decode, way: str, gpu: Gpu) -> float:
    """Of one NVDEC engine; 0 where the workers decode."""
    is_new = way == TRANSCODED
    if not (decode.transcoded_on_gpu if is_new else decode.on_gpu):
        return 0.0
    codec, area = ("h264", decode.transcoded_area) if is_new else (decode.codec, decode.area)
    return decode.frames[way] / gpu.frames_per_second(codec, area)


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
    """All that they do for one that NVDEC decodes."""


def core_seconds(decodes: Sequence[Decode], way: str, timings: Timings, *, on_gpu: bool) -> float:
    """Mean of a clip's decode in a worker; on_gpu: in a worker that feeds NVDEC. Measured for `SELECTED`; for other
    ways what follows the headers is scaled with the pixels that are decoded."""
    fed = [on_gpu and (each.transcoded_on_gpu if way == TRANSCODED else each.on_gpu) for each in decodes]
    share = np.mean(fed)
    scale = sum(pixels(each, way) for each in decodes) / sum(pixels(each, SELECTED) for each in decodes)
    host = timings.headers + (timings.decode - timings.headers) * scale
    return float(share * timings.feed + (1 - share) * host)


def clips_per_second(units: float, seconds: float, clips: int = 1) -> float:
    """Of `units` engines or cores of which each decode takes `seconds` and gives `clips`."""
    return units * clips / seconds if seconds else float("inf")


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
    rows: list[int]
    decodes: list[Decode]
    unreadable: dict[int, str]
    """Row -> why."""
    headers_s: float
    feed_s: float
    """Processor time of a decode, means."""


def survey(manifest: Manifest, config: Config, samples: int, nvdec: Gpu | None) -> Survey:
    """Reads packets and headers of `samples` videos; decodes nothing. Raises `InputError` where none can be read."""
    rows = np.random.default_rng(0).permutation(len(manifest))[:samples].tolist()
    found = Survey(manifest, _view(config), config.seed, rows, [], {}, 0.0, 0.0)
    headers, feeds = [], []
    for row in rows:
        try:
            for epoch in range(WINDOWS):
                start = time.process_time()
                decode = _look(found, row, epoch, nvdec, feeds)
                headers.append(time.process_time() - start - (feeds[-1] if decode.on_gpu else 0))
                found.decodes.append(decode)
        except InputError as error:
            found.unreadable[row] = str(error)
        except av.error.FFmpegError as error:
            found.unreadable[row] = error.strerror.lower()
    if not found.decodes:
        row, reason = next(iter(found.unreadable.items()))
        raise InputError(f"{manifest.file(row)}: {reason}; none of {len(rows)} sampled videos can be read")
    found.headers_s = float(np.mean(headers)) / 2  # read twice: for the windows as they are, and with twice as many
    found.feed_s = float(np.mean(feeds)) if feeds else 0.0
    return found


def _look(survey: Survey, row: int, epoch: int, nvdec: Gpu | None, feeds: list[float]) -> Decode:
    """One decode; what NVDEC is fed is made as training makes it, and its time appended to `feeds`."""
    video = survey.manifest[row]
    height, width = coded_size(video)
    plan = _plan(survey, row, epoch)
    everything = int(plan.positions[-1]) + 1
    frames = dict.fromkeys((START, SEEK, SELECTED), everything) | {
        TRANSCODED: transcoded_frames(plan.positions.tolist(), video.frames)
    }
    on_gpu, read, fallback = False, everything, ""
    if nvdec and video.codec in DALI_GPU_CODECS and nvdec.frames_per_second(video.codec, height * width):
        start = time.process_time()
        try:
            with open_video(survey.manifest.source(row)) as container:
                _check_nvdec(video_stream(container).codec_context)
                file = remux(container, plan.positions)
            on_gpu, read = True, file.packets_read
            frames[SELECTED] = file.packets_kept
            feeds.append(time.process_time() - start)
        except UncertainError:
            pass  # for the workers
    try:
        reader, selection = _select(survey, row, plan.positions, in_one_go=on_gpu)
        wanted = [selection.shown[position] for position in plan.positions.tolist()]
        starts = [number for number, picture in enumerate(reader.pictures) if picture.starts_group]
        leading = frozenset(number for number in wanted if reader.pictures[number].is_leading)
        frames[START], frames[SEEK] = max(wanted) + 1, seeking_frames(starts, wanted, leading)
        if not on_gpu:
            frames[SELECTED], read = sum(map(len, selection.runs)), len(reader.packets)
    except UncertainError as error:
        fallback = str(error)
    twice = _plan(survey, row, epoch, views=2 * survey.view.per_decode).positions
    try:
        frames[VIEWS] = sum(map(len, _select(survey, row, twice, in_one_go=on_gpu)[1].runs))
    except UncertainError:
        frames[VIEWS] = int(twice[-1]) + 1
    new = transcoded_size(height, width)
    new_on_gpu = nvdec is not None and all(side in _NVDEC_SIDES for side in new)
    return Decode(video.codec, height * width, new[0] * new[1], on_gpu, new_on_gpu, frames, read, fallback)


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
            region = _bounds(plan.rectangles, size)
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
    view = survey.view if views is None else replace(survey.view, per_decode=views)
    return plan_sample(survey.manifest[row], view, seed=survey.seed, epoch=epoch, sample_id=row)


def _view(config: Config) -> View:
    settings = clip_settings(config.data, "train")
    names = ("mode", "num_frames", "crop_size", "stride", "target_fps", "past_end", "flip")
    return View(
        **{name: settings[name] for name in names},
        short_sides=_short_sides("train", settings["crop_size"], settings["short_side"]),
        per_decode=settings["views_per_decode"],
    )


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
    nvdec = None if config.data.decode == "host" else gpu
    found = survey(manifest, config, samples, nvdec)
    decode_s, measured = time_decoding(found, _MEASURE_S)
    timings = Timings(decode_s, min(found.headers_s, decode_s), found.feed_s)
    demand, network = _demand(config, classes, gpu, gpus, network_clips)
    here = len(os.sched_getaffinity(0))
    views = found.view.per_decode
    ways = {}
    for way in WAYS:
        clips = views * (2 if way == VIEWS else 1)
        engine = np.mean([engine_seconds(each, way, nvdec) for each in found.decodes]) if nvdec else 0
        own, fed = (core_seconds(found.decodes, way, timings, on_gpu=on_gpu) for on_gpu in (False, True))
        ways[way] = {
            "frames_per_clip": float(np.mean([each.frames[way] for each in found.decodes])) / clips,
            "megapixels_per_clip": float(np.mean([pixels(each, way) for each in found.decodes])) / clips / 1e6,
            "nvdec_clips_per_second": clips_per_second(nvdec.engines * gpus, engine, clips) if engine else None,
            "cores_clips_per_second": clips_per_second(cores or here, own, clips),
            "feeding_clips_per_second": clips_per_second(cores or here, fed, clips) if engine else None,
        }
    selected = ways[SELECTED]
    by_nvdec = selected["nvdec_clips_per_second"] is not None
    limits = {"NVDEC": selected["nvdec_clips_per_second"]} if by_nvdec else {}
    if not by_nvdec or cores or torch.cuda.is_available():  # otherwise those that will feed NVDEC are not known
        limits["CPU cores"] = selected["feeding_clips_per_second" if by_nvdec else "cores_clips_per_second"]
    bound_by, ratio = judge(demand, limits)
    report = {
        "manifest": manifest_file,
        "videos": len(manifest),
        "sampled_videos": len(found.rows),
        "windows": len(found.decodes),
        "views_per_decode": views,
        "unreadable": {"count": len(found.unreadable), "files": _named(found)[:_SHOWN]},
        "fallbacks": dict(Counter(each.fallback for each in found.decodes if each.fallback)),
        "codecs": dict(Counter(each.codec for each in found.decodes)),
        "decoded_by_nvdec": float(np.mean([each.on_gpu for each in found.decodes])),
        "picture_pixels": float(np.mean([each.area for each in found.decodes])),
        "packets_read_per_clip": float(np.mean([each.packets_read for each in found.decodes])) / views,
        "ways": ways,
        "gpu": gpu and {"name": gpu.name, "gpus": gpus, "engines": gpu.engines * gpus},
        "cores": cores or here,
        "core_ms_per_clip": {name: 1000 * each / views for name, each in asdict(timings).items()},
        "measured_windows": measured,
        "network": {"clips_per_second": demand} | network,
        "limits": limits,
        "bound_by": bound_by,
        "times": ratio,
    }
    report["verdict"] = verdict(report)
    report["remedies"] = remedies(report)
    report["assumptions"] = _assumptions(report, config, gpu, cores)
    return report


def _labels(config: Config) -> str | None:
    """The file of class names, where it is here: the count hardly matters."""
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
    """Who bounds, in words."""
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
    if ratio < (_NEAR_NVDEC if "NVDEC" in report["limits"] else _NEAR):
        said += ". That is too near to call by estimates; `benchmark.py train` on that machine measures it"
    if report["network"].get("device") == "cpu":
        together = 1 / (1 / demand + 1 / report["ways"][SELECTED]["cores_clips_per_second"])
        said += f". Both need the same cores: together about {_number(together)} clips/s"
    return said[0].upper() + said[1:] + "."


def _noun(name: str, report: dict[str, Any]) -> str:
    what, count = ("NVDEC", report["gpu"]["engines"]) if name == "NVDEC" else ("the CPU", report["cores"])
    return f"{what} ({count} {'engine' if name == 'NVDEC' else 'core'}{'s' * (count != 1)})"


def remedies(report: dict[str, Any]) -> list[str]:
    """What transcoding and more clips out of a decode would bring to whoever decodes."""
    demand, now = report["network"]["clips_per_second"], report["ways"][SELECTED]
    before, _ = _decoder(now)
    said = []
    for way, what in (
        (TRANSCODED, f"`prepare.py transcode --short-side {SHORT_SIDE} --gop {GOP}`"),
        (VIEWS, f"data.views_per_decode={2 * report['views_per_decode']} (clips of a video side by side in a batch)"),
    ):
        then = report["ways"][way]
        after, who = _decoder(then)
        if after < 1.05 * before:
            said.append(f"{what}: nothing to gain")
            continue
        said.append(
            f"{what}: {_number(then['frames_per_clip'])} frames a clip instead of {_number(now['frames_per_clip'])}; "
            f"{who} would supply {_number(after)} clips/s, {after / before:.1f} times as many, "
            f"{'enough' if after >= demand else 'not enough'} for this network"
        )
    return said


def _decoder(row: dict[str, float]) -> tuple[float, str]:
    """Clips/s of the one who decodes, and its name."""
    if row["nvdec_clips_per_second"] is not None:
        return row["nvdec_clips_per_second"], "NVDEC"
    return row["cores_clips_per_second"], "the CPU"


def _assumptions(report: dict[str, Any], config: Config, gpu: Gpu | None, cores: int | None) -> list[str]:
    said = [
        f"{report['sampled_videos']} of {report['videos']} videos, drawn at random, the same every time; "
        f"the training windows of their first {WINDOWS} epochs",
        f"the CPU: processor time of {report['measured_windows']} decodes here, one thread, times {report['cores']} "
        f"cores{'' if cores else ' (those here; --cores N for others)'}: an extrapolation. Waiting for storage and "
        "DALI's resize are not in it. Only the row `as training does` is measured; the others are scaled with the "
        "pixels decoded, which is too good for transcoded files, whose keyframes take longer",
        f"transcode: the frame count stays, closed groups of {GOP}, {B_PICTURES} B pictures between two references",
    ]
    if gpu:
        said.append(
            f"NVDEC: {gpu.engines} engines a GPU, {gpu.frames_per_second('h264', HD):.0f} frames/s each of H.264 at "
            f"1080p ({RATES_FROM}, at {gpu.video_mhz:g} MHz), more for smaller pictures in proportion to their "
            "pixels; always busy, and no cost for each new file: an upper bound"
        )
        codecs = [codec for codec in report["codecs"] if not gpu.is_published(codec)]
        said += [f"unconfirmed: {each}" for each in gpu.unconfirmed]
        said.append(f"unconfirmed: pictures below 640x360 decode {SMALL_GAIN:g} times as fast as 1080p, no faster")
        if report["decoded_by_nvdec"] and codecs:
            said.append(f"unconfirmed: no rate is published for {', '.join(codecs)}: that of H.264 is taken")
        if report["decoded_by_nvdec"] < 1:
            said.append(f"{1 - report['decoded_by_nvdec']:.0%} of the clips are decoded by the workers, not by NVDEC")
        if not report["network"].get("device") and config.train.precision == "float32":
            said.append("the network is taken to train in bf16 or fp16; train.precision=float32 is far slower")
    if config.distill.teacher:
        said.append("the teacher of distill.teacher, and frames that only it takes, are not counted")
    return said


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def table(report: dict[str, Any]) -> str:
    """The report as text."""
    gpu, network = report["gpu"], report["network"]
    nvdec = f"{gpu['gpus']} x {gpu['name']} NVDEC" if gpu else ""
    cores = f"{report['cores']} CPU cores"
    lines = [
        f"{report['manifest']}: {', '.join(report['codecs'])}, {report['picture_pixels'] / 1e3:.0f} thousand pixels a "
        f"picture; {report['packets_read_per_clip']:.0f} packets read a clip",
        "",
        f"{'decoded of a video':36} {'frames/clip':>11} {nvdec:>18} {cores:>20}",
    ]
    for way, row in report["ways"].items():
        by_nvdec = "" if row["nvdec_clips_per_second"] is None else f"{_number(row['nvdec_clips_per_second'])} clips/s"
        by_cores = f"{_number(row['cores_clips_per_second'])} clips/s"
        lines.append(f"{_TITLES[way]:36} {row['frames_per_clip']:11.1f} {by_nvdec:>18} {by_cores:>20}")
    lines += ["", f"The network takes {_number(network['clips_per_second'])} clips/s ({network['how']})."]
    if feeding := report["ways"][SELECTED]["feeding_clips_per_second"]:
        needed = network["clips_per_second"] * report["cores"] / feeding
        rest = 1 - report["decoded_by_nvdec"]
        what = f"feed NVDEC, and to decode the {rest:.0%} that it does not take," if rest else "feed NVDEC"
        lines.append(f"To {what} for that, the workers need {_number(needed)} CPU cores like these.")
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
