"""The loaders timed on a CPU: endless iterators of the same batches, float32 [B, 3, T, S, S] in 0..1.

Peers are configured for throughput as their documentation advises: one decoding thread per worker, frames cropped
before resizing, uint8 until the batch is in the main process.
"""

import importlib.util
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.functional import grid_sample, interpolate

from benchmarks.attempt import CannotReadError
from benchmarks.floor import decode_floor
from benchmarks.work import Clip, Work, needed_packets
from dali_pipelines import ClipLoader
from dali_pipelines.files import open_video
from dali_pipelines.nvdec import load_torchcodec

Decode = Callable[[Clip], torch.Tensor]
"""Decodes the frames of a clip: uint8 [T, H, W, 3] RGB."""

_FLOOR_TASKS = 64  # distinct clips for the floor


class Contestant(NamedTuple):
    """A loader and how to start it."""

    what: str
    """Description for the report."""
    batches: Callable[[Work], Iterator[torch.Tensor | None]]
    """Starts the loader, which yields None instead of batches if it only decodes."""
    package: str = "av"
    """Package that must be installed."""
    is_peer: bool = False


def make_loader(work: Work, **settings: Any) -> ClipLoader:
    """Makes our loader for the clips of `work`."""
    view = work.view
    return ClipLoader(
        work.manifest,
        mode="train",
        batch_size=work.batch_size,
        num_frames=view.num_frames,
        crop_size=view.crop_size,
        stride=view.stride,
        target_fps=view.target_fps,
        past_end=view.past_end,
        short_side=view.short_sides,
        flip=view.flip,
        seed=work.seed,
        workers=work.workers,
        **settings,
    )


def endless_clips(loader: ClipLoader) -> Iterator[torch.Tensor]:
    """Yields clips for ever, epoch after epoch. Raises `CannotReadError`."""
    while True:
        for batch in loader:
            if not batch.valid.all():
                fault = loader.stats.faults[-1]
                raise CannotReadError(f"cannot read {fault.path}: {fault.reason}")
            yield batch.clips


def _data_loader(work: Work, *, decode: Decode) -> Iterator[torch.Tensor]:
    batches = torch.utils.data.DataLoader(
        _Clips(work, decode),
        batch_size=work.batch_size,
        num_workers=work.workers,
        prefetch_factor=2,
    )
    return map(to_float, batches)


def _spdl_pipeline(work: Work) -> Iterator[torch.Tensor]:
    from spdl.pipeline import PipelineBuilder

    clips = _Clips(work, _spdl)
    clips[0]  # fail here, as errors within the pipeline are hard to read
    pipeline = (
        PipelineBuilder()
        .add_source(itertools.count())
        .pipe(clips.__getitem__, concurrency=work.workers, output_order="input")
        .aggregate(work.batch_size)
        .pipe(torch.stack)
        .add_sink(2)
        .build(num_threads=work.workers, max_failures=0)
    )
    with pipeline.auto_stop():
        yield from map(to_float, pipeline)


def _floor(work: Work) -> Iterator[None]:
    tasks = [needed_packets(work.clip(place)) for place in range(_FLOOR_TASKS)]
    return decode_floor(tasks, workers=work.workers, batch_size=work.batch_size)


class _Clips(torch.utils.data.Dataset):
    """An endless list of clips, decoded by `decode`, cropped and resized: uint8 [T, S, S, 3]."""

    def __init__(self, work: Work, decode: Decode):
        self._work = work
        self._decode = decode

    def __len__(self) -> int:
        return 2**31

    def __getitem__(self, place: int) -> torch.Tensor:
        clip = self._work.clip(place)
        try:
            frames = self._decode(clip)
        except Exception as error:
            reason = str(error).strip().partition("\n")[0]
            raise CannotReadError(f"cannot read {clip.source.path}: {reason or type(error).__name__}") from None
        return cut(frames, clip.rectangle, self._work.view.crop_size)


def cut(frames: torch.Tensor, rectangle: np.ndarray, size: int) -> torch.Tensor:
    """Crops (to whole pixels, as torch's transforms do), resizes and flips: uint8 [T, H, W, 3] -> [T, S, S, 3]."""
    y0, x0, y1, x1 = rectangle.round().astype(int).tolist()
    frames = frames[:, y0:y1, min(x0, x1) : max(x0, x1)]
    if x0 > x1:
        frames = frames.flip(2)
    resized = interpolate(frames.permute(0, 3, 1, 2), size=(size, size), mode="bilinear")  # fastest for uint8
    return resized.permute(0, 2, 3, 1)


def cut_exactly(frames: torch.Tensor, rectangle: np.ndarray, size: int) -> torch.Tensor:
    """Like `cut`, but does not round the rectangle; slow, only for comparison."""
    steps = (torch.arange(size) + 0.5) / size
    y, x = (
        (low + steps * (high - low)) / side * 2 - 1
        for low, high, side in zip(rectangle[:2].tolist(), rectangle[2:].tolist(), frames.shape[1:3])
    )
    grid = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], dim=-1).expand(len(frames), -1, -1, -1)
    channels_first = frames.permute(0, 3, 1, 2).to(torch.float32)
    return grid_sample(channels_first, grid, padding_mode="border", align_corners=False).permute(0, 2, 3, 1)


def to_float(batch: torch.Tensor) -> torch.Tensor:
    """[B, T, S, S, 3] in 0..255 -> float32 [B, 3, T, S, S] in 0..1."""
    return batch.permute(0, 4, 1, 2, 3).contiguous().to(torch.float32).div_(255)


def _decord(clip: Clip) -> torch.Tensor:
    import decord

    return torch.from_numpy(decord.VideoReader(clip.source.path, num_threads=1).get_batch(clip.positions).asnumpy())


def _torchcodec(clip: Clip) -> torch.Tensor:
    decoder = load_torchcodec().decoders.VideoDecoder(
        clip.source.path, dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="exact"
    )
    return decoder.get_frames_at(clip.positions.tolist()).data


def _spdl(clip: Clip) -> torch.Tensor:
    import spdl.io

    distinct, repeats = np.unique(clip.positions, return_inverse=True)
    packets = spdl.io.demux_video(clip.source.path)
    decoded = spdl.io.sample_decode_video(packets, distinct.tolist())
    frames = spdl.io.to_torch(spdl.io.convert_frames(decoded))
    return frames if len(repeats) == len(distinct) else frames[repeats]


def _pyav_every_frame(clip: Clip) -> torch.Tensor:
    frames = []
    with open_video(clip.source) as container:
        container.streams.video[0].codec_context.thread_count = 1
        first, last = clip.positions[[0, -1]].tolist()
        for frame in itertools.islice(container.decode(video=0), first, last + 1):
            frames.append(frame.to_ndarray(format="rgb24"))
    return torch.from_numpy(np.stack([frames[position - first] for position in clip.positions]))


OURS = "ours"
REFERENCE = "reference"
FLOOR = "floor"
CONTESTANTS = {
    OURS: Contestant("this loader", lambda work: endless_clips(make_loader(work))),
    "decord": Contestant("decord, DataLoader", partial(_data_loader, decode=_decord), "decord", is_peer=True),
    "torchcodec": Contestant(
        "torchcodec, DataLoader", partial(_data_loader, decode=_torchcodec), "torchcodec", is_peer=True
    ),
    "spdl": Contestant("SPDL, threads", _spdl_pipeline, "spdl", is_peer=True),
    REFERENCE: Contestant(
        "PyAV, all frames of the window, DataLoader", partial(_data_loader, decode=_pyav_every_frame)
    ),
    FLOOR: Contestant("decoding of the needed packets, nothing else", _floor),
}


def is_installed(contestant: Contestant) -> bool:
    """Whether the package of a contestant is installed."""
    return importlib.util.find_spec(contestant.package) is not None
