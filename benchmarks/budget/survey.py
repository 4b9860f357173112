"""Reads the headers of a manifest's videos, and times decoding and training on this machine."""

import itertools
import time
from dataclasses import asdict, dataclass, replace

import av
import numpy as np
import torch

from benchmarks.budget.rates import (
    GOP,
    SEEK,
    SELECTED,
    SHORT_SIDE,
    START,
    TRANSCODED,
    VIEWS,
    Decode,
    seeking_frames,
    transcoded_frames,
)
from common.config import Config, clip_settings
from common.precision import autocast, resolve_precision
from dali_pipelines.bitstream.parser import UncertainError
from dali_pipelines.clip_source import bounds
from dali_pipelines.engines import Engine, Routing, general_limits
from dali_pipelines.errors import InputError
from dali_pipelines.files import open_video
from dali_pipelines.frame_names import is_frames
from dali_pipelines.gpus import Gpu
from dali_pipelines.host_decoder import decode_frames
from dali_pipelines.manifest import Manifest, coded_size
from dali_pipelines.packets import PacketReader, Remuxed, Selection, remux, video_stream
from dali_pipelines.plan import SamplePlan, View, ViewSettings, plan_sample
from model import TimeSformer, timesformer
from preparation.transcode import copy_size

WINDOWS = 4  # training windows per video: those of the first epochs


@dataclass
class Survey:
    """Randomly sampled videos of a manifest, and the decodes of their training windows."""

    manifest: Manifest
    view: View
    seed: int
    routing: Routing
    rows: list[int]
    decodes: list[Decode]
    unreadable: dict[int, str]
    """Row -> the reason that it cannot be read."""
    headers_s: float
    """Mean CPU seconds of a decode to open the file, read packets and select them."""
    feed_s: float
    """Mean CPU seconds of a decode to make the stream for NVDEC."""


def survey(manifest: Manifest, config: Config, samples: int, nvdec: Gpu | None) -> Survey:
    """Reads packets and headers of `samples` videos, without decoding. Raises `InputError` if none can be read."""
    rows = np.random.default_rng(0).permutation(len(manifest))[:samples].tolist()
    routing = _routing(config, nvdec)
    found = Survey(manifest, _view(config), config.seed, routing, rows, [], {}, 0.0, 0.0)
    headers: list[float] = []
    feeds: list[float] = []
    for row in rows:
        try:
            for epoch in range(WINDOWS):
                start = time.process_time()
                decode, remux_s = _inspect(found, row, epoch)
                headers.append(time.process_time() - start - remux_s)
                if decode.on_gpu:
                    feeds.append(remux_s)
                found.decodes.append(decode)
        except InputError as error:
            found.unreadable[row] = str(error)
        except av.error.FFmpegError as error:
            found.unreadable[row] = str(error.strerror).lower()
    if not found.decodes:
        row, reason = next(iter(found.unreadable.items()))
        raise InputError(f"{manifest.file(row)}: {reason}; none of {len(rows)} sampled videos can be read")
    found.headers_s = float(np.mean(headers)) / 2  # read twice: with views_per_decode, and with twice that
    found.feed_s = float(np.mean(feeds)) if feeds else found.headers_s  # a lower bound if nothing was remuxed
    return found


def _routing(config: Config, nvdec: Gpu | None) -> Routing:
    """The loader's rules for a GPU whose driver cannot be queried here."""
    if nvdec is None:
        return Routing(engine="host", on_gpu=False)
    engine: Engine = "dali" if config.data.decode == "dali" else "nvdec"
    takes = general_limits(decodes_av1=nvdec.generation.decodes_av1)
    return Routing(engine=engine, on_gpu=True, limits=takes, seed=config.seed)


def _inspect(survey: Survey, row: int, epoch: int) -> tuple[Decode, float]:
    """One decode, and the CPU seconds to make the stream for NVDEC, as training makes it."""
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
    if file is not None:
        frames[SELECTED], read = file.packets_kept, file.packets_read
    twice = _plan(survey, row, epoch, views=2 * survey.view.views_per_decode).positions
    if is_frames(video.path):  # each is decoded alone
        read = len(plan.positions)
        frames |= dict.fromkeys((START, SEEK, SELECTED), read) | {VIEWS: len(twice)}
    else:
        try:
            reader, selection = _select(survey, row, plan.positions, in_one_go=on_gpu)
            wanted = [selection.shown[position] for position in plan.positions.tolist()]
            starts = [number for number, packet in enumerate(reader.headers) if packet.starts_group]
            leading = frozenset(number for number in wanted if reader.headers[number].is_leading)
            frames[START], frames[SEEK] = max(wanted) + 1, seeking_frames(starts, wanted, leading)
            if not on_gpu:
                frames[SELECTED], read = sum(map(len, selection.runs)), len(reader.packets)
        except UncertainError as error:
            fallback = str(error)
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
    """The stream for NVDEC; None if NVDEC does not support the video by the loader's rules."""
    if not survey.routing.takes(survey.manifest[row]):
        return None
    try:
        with open_video(survey.manifest.source(row)) as container:
            file = remux(container, positions)
            survey.routing.check(file, video_stream(container).codec_context)
            return file
    except UncertainError:
        return None


def _select(survey: Survey, row: int, positions: np.ndarray, *, in_one_go: bool) -> tuple[PacketReader, Selection]:
    with open_video(survey.manifest.source(row)) as container:
        reader = PacketReader(container)
        return reader, reader.select(positions, in_one_go=in_one_go)


def time_decoding(survey: Survey, seconds: float) -> tuple[float, int]:
    """(CPU seconds of a decode by `decode_frames`, number of decodes timed). One thread decodes a window of each video,
    then the next window of each, for `seconds`. Videos that cannot be decoded are added to `survey.unreadable`. Raises
    `InputError` if none can be decoded."""
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
            raise InputError(f"{failures(survey)[0]}; none of {len(survey.rows)} sampled videos can be decoded")
    raise AssertionError


def time_network(config: Config, classes: int) -> tuple[float, str, str]:
    """(clips/s, device, precision) of training steps on random clips on this machine: forward and backward passes, no
    optimizer."""
    is_gpu = config.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if is_gpu else "cpu")
    precision = resolve_precision(config.train.precision, device)
    trained = network(config, classes).to(device).train()
    trained.activation_checkpointing = config.train.activation_checkpointing
    batch = 8 if is_gpu else int(np.clip(3e11 // (6 * multiply_adds(config, classes)), 1, 8))
    clips = torch.rand(batch, *_clip_shape(config), device=device)
    spent: list[float] = []
    while len(spent) < 2 or (len(spent) < 4 and sum(spent) < 5):
        start = time.perf_counter()
        with autocast(device, precision):
            logits = trained(clips)
        logits.float().square().sum().backward()
        if is_gpu:
            torch.cuda.synchronize()
        spent.append(time.perf_counter() - start)
    return batch / min(spent[1:]), device.type, precision  # the first step includes one-time work


def _plan(survey: Survey, row: int, epoch: int, views: int | None = None) -> SamplePlan:
    view = survey.view if views is None else replace(survey.view, views_per_decode=views)
    return plan_sample(survey.manifest[row], view, seed=survey.seed, epoch=epoch, sample_id=row)


def _view(config: Config) -> View:
    settings = clip_settings(config.data, "train")
    return View(**{name: settings[name] for name in ViewSettings.__annotations__ if name in settings})


def _clip_shape(config: Config) -> tuple[int, ...]:
    return 3, config.data.num_frames, config.data.crop_size, config.data.crop_size


def network(config: Config, classes: int) -> TimeSformer:
    """The network of a config."""
    _, frames, side, _ = _clip_shape(config)
    return TimeSformer(num_frames=frames, image_size=side, num_classes=classes, **asdict(config.model))


def failures(survey: Survey) -> list[str]:
    """ "FILE: REASON" for each video that cannot be read."""
    return [f"{survey.manifest.file(row)}: {reason}" for row, reason in survey.unreadable.items()]


def multiply_adds(config: Config, classes: int) -> int:
    """Multiply-adds of one clip's forward pass, including the products of attention."""
    return timesformer.multiply_adds(lambda: network(config, classes))
