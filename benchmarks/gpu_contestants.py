"""The loaders timed on a GPU: ours with each engine, peers with a CUDA decoder, and NVDEC alone."""

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.contestants import cut, endless_clips, make_loader, to_float
from benchmarks.work import Clip, Work
from dali_pipelines.batches import LoaderStats
from dali_pipelines.bitstream.parser import UncertainError
from dali_pipelines.files import open_video
from dali_pipelines.nvdec import decode_file, load_torchcodec, nvdec_backend
from dali_pipelines.packets import remux

AUTO, NVDEC, HOST, DALI, FLOOR = "auto", "nvdec", "host", "dali", "nvdec floor"
PEER = "torchcodec"
_FLOOR_CLIPS = 96  # distinct clips for the floor

Batches = Iterator[torch.Tensor | None]
"""float32 [B, 3, T, S, S] in 0..1; None if a contestant only decodes."""


@dataclass(frozen=True, kw_only=True)
class GpuWork(Work):
    """Work for loaders on a GPU."""

    threads: int
    """Number of decoding threads, for contestants with threads."""
    device: str = "cuda"
    """Tests use "cpu"."""


class Contestant(NamedTuple):
    """A loader and how to start it."""

    what: str
    """Description for the report."""
    batches: Callable[[GpuWork], tuple[Batches, LoaderStats | None]]
    """Starts the loader; peers have no `LoaderStats`."""
    package: str = "torchcodec"
    """Package that must be installed."""
    only_untouched: bool = False
    """Whether it runs only on the original videos."""


def _ours(work: GpuWork, *, decode: str) -> tuple[Batches, LoaderStats]:
    loader = make_loader(work, device=work.device, decode=decode, decode_threads=work.threads)
    return endless_clips(loader), loader.stats


def _in_threads(work: GpuWork, function: Callable[[int], Any]) -> Iterator[Any]:
    """Yields `function(0)`, `function(1)`, ... in order, computed by `threads` threads that each have a CUDA stream and
    work as far ahead as ours."""

    def use_own_stream() -> None:
        if work.device != "cpu":
            torch.cuda.set_stream(torch.cuda.Stream(work.device))

    places = itertools.count()
    ahead: deque[Future] = deque()
    with ThreadPoolExecutor(work.threads, initializer=use_own_stream) as pool:
        while True:
            while len(ahead) < 2 * work.threads + work.batch_size:
                ahead.append(pool.submit(function, next(places)))
            yield ahead.popleft().result()


def _peer(work: GpuWork, *, decode: Callable[[Clip, str], torch.Tensor]) -> tuple[Batches, None]:
    """Batches of clips that `decode` decodes, cropped and resized as torch's transforms do."""

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
        torch.cuda.current_stream().synchronize()  # before another thread reuses its hardware decoder
    return frames


def _pynvvideocodec(clip: Clip, device: str) -> torch.Tensor:
    import PyNvVideoCodec

    decoder = PyNvVideoCodec.SimpleDecoder(
        clip.source.path, use_device_memory=True, output_color_type=PyNvVideoCodec.OutputColorType.RGB
    )
    frames = decoder.get_batch_frames_by_index(clip.positions.tolist())
    return torch.stack([torch.from_dlpack(frame) for frame in frames])


def _floor(work: GpuWork) -> tuple[Batches, None]:
    """Decodes the streams that our workers make, one session per thread, and drops the frames."""
    files = []
    for place in range(_FLOOR_CLIPS):
        clip = work.clip(place)
        with open_video(clip.source) as container:
            try:
                files.append(remux(container, np.unique(clip.positions), uncropped=True))
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
