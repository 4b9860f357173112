"""Chooses what decodes a video: NVDEC (through torchcodec or DALI), DALI's decoders on the CPU, or the host (PyAV).

The table of codecs (`bitstream.codecs`) says which engines take a codec. The driver reports NVDEC's limits for it
(`nvdec.driver_limits`), which the workers get as `Limits`. Nothing here imports torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import av
import numpy as np

from dali_pipelines.bitstream.codecs import CODECS
from dali_pipelines.bitstream.parser import UncertainError
from dali_pipelines.frame_names import CODECS as FRAME_CODECS
from dali_pipelines.gpus import Gpu
from dali_pipelines.hardware_check import check_hardware, matrix_of
from dali_pipelines.manifest import Manifest, Video, coded_size
from dali_pipelines.packets import Remuxed
from dali_pipelines.plan import View, engine_draw, plan_sample

Decode = Literal["auto", "nvdec", "dali", "host"]
DECODES = get_args(Decode)
Engine = Literal["nvdec", "dali", "host"]


DEPTHS = {"yuv420p": 8, "yuvj420p": 8, "yuv420p10le": 10, "yuv420p12le": 12}
"""FFmpeg pixel formats that hardware decodes to NV12 -> bits per sample. All are 4:2:0."""


class Limits(NamedTuple):
    """What NVDEC takes of one codec at one bit depth."""

    min_width: int
    min_height: int
    max_width: int
    max_height: int
    max_macroblocks: int
    engines: int = 1
    """Number of the GPU's NVDEC engines that take it."""
    block: int = 1
    """Both sides of coded frames must be multiples of this many pixels."""

    def takes(self, height: int, width: int) -> bool:
        """Whether the engine decodes frames of this size, in pixels."""
        return (
            self.min_width <= width <= self.max_width
            and self.min_height <= height <= self.max_height
            and width * height <= 256 * self.max_macroblocks
        )

    def is_whole(self, size: tuple[int, int]) -> bool:
        """Whether both sides of the size are multiples of the block."""
        return not any(side % self.block for side in size)


LimitsByFormat = Mapping[tuple[str, int], Limits]
"""(codec, bits per sample) -> limits; NVDEC takes nothing else."""


def cpu_limits() -> LimitsByFormat:
    """Limits of torchcodec's CPU decoder in place of NVDEC: 8 bits, as it rounds deeper ones differently from PyAV."""
    limits = Limits(1, 1, 1 << 16, 1 << 16, 1 << 24)
    return {(name, 8): limits for name, codec in CODECS.items() if codec.nvdec is not None}


def general_limits(*, decodes_av1: bool) -> LimitsByFormat:
    """What every generation of NVDEC takes (Video Codec SDK, decode support matrix), for use without a driver."""
    return {
        (name, 8): Limits(144, 144, 4096, 4096, 65536, block=codec.nvdec_block)
        for name, codec in CODECS.items()
        if codec.nvdec and (name != "av1" or decodes_av1)
    }


@dataclass(frozen=True, kw_only=True)
class Routing:
    """Which engine decodes a video: all that the workers need to know of `decode`."""

    engine: Engine
    """Decodes what it takes; the host decodes everything else."""
    on_gpu: bool
    limits: LimitsByFormat | None = None
    """None if there are none, as for the host, and for DALI on the CPU."""
    host_share: float = 0.0
    """With "nvdec": share of the videos NVDEC could decode that the host decodes instead."""
    seed: int = 0

    def engine_for(self, video: Video, sample_id: int) -> Engine:
        """The engine for a video, judged by the manifest alone; `check` knows more once the file is open.

        For frames that are images, "nvdec" stands for DALI's image decoder in the same stage: nvJPEG on a GPU.
        """
        if video.codec in FRAME_CODECS:
            return "nvdec" if self.engine == "nvdec" else "host"
        codec = CODECS.get(video.codec)
        if codec is None or self.engine == "host":
            return "host"
        if self.engine == "dali":
            return "dali" if (codec.dali_gpu if self.on_gpu else codec.dali_cpu) else "host"
        if codec.nvdec is None or engine_draw(self.seed, sample_id) < self.host_share:
            return "host"
        return "nvdec"

    def refusal(self, codec: str, pixel_format: str, size: tuple[int, int]) -> str:
        """Why the engine does not take frames of (height, width) `size`; "" if it does. An unknown `pixel_format`, "",
        counts as 8 bits."""
        if self.limits is None:
            return ""
        limits = self._limits(codec, pixel_format)
        known = CODECS.get(codec)
        if limits is None or known is None or (self.engine == "dali" and DEPTHS.get(pixel_format, 8) > 8):
            return f"NVDEC here does not take {codec} in {pixel_format or 'yuv420p'}"
        if not limits.takes(*size):
            return "NVDEC here does not take frames of this size"
        if self.engine == "nvdec" and not known.uncrops and not limits.is_whole(size):
            return _NO_WHOLE_BLOCKS
        if self.engine == "nvdec" and (size[0] % 2 or size[1] % 2):  # fails with NVDEC; wrong chroma on the CPU
            return "torchcodec does not convert frames with odd sides as FFmpeg does"
        return ""

    def _limits(self, codec: str, pixel_format: str | None) -> Limits | None:
        depth = DEPTHS.get(pixel_format or "yuv420p")
        return self.limits.get((codec, depth)) if self.limits is not None and depth is not None else None

    def check(self, file: Remuxed, context: av.VideoCodecContext) -> None:
        """Raises `UncertainError` if the engine does not take this stream, or may give other frames than FFmpeg."""
        if self.engine == "dali" and not self.on_gpu:
            if matrix_of(context) != "BT.601":
                raise UncertainError("DALI converts all colours as BT.601 on the CPU")
            return
        check_hardware(file, context)
        codec = context.codec.canonical_name
        if reason := self.refusal(codec, context.pix_fmt or "", (context.height, context.width)):
            raise UncertainError(reason)
        limits = self._limits(codec, context.pix_fmt)
        if self.engine == "nvdec" and limits is not None and not limits.is_whole(file.size):
            raise UncertainError(_NO_WHOLE_BLOCKS)
        matrix = matrix_of(context)
        is_known = matrix == "BT.601" or (matrix == "BT.709" and CODECS[codec].has_h273_matrix)
        if self.engine == "nvdec" and self.on_gpu and not is_known:
            raise UncertainError(f"torchcodec may convert {matrix} differently from {codec} by NVDEC")

    def takes_codec(self, codec: str) -> bool:
        """Whether the engine takes some videos of this codec."""
        known = CODECS.get(codec)
        if known is None:
            return False
        if self.engine == "dali":
            return known.dali_gpu if self.on_gpu else known.dali_cpu
        has_limits = self.limits is None or any(name == codec for name, _ in self.limits)
        return self.engine == "nvdec" and known.nvdec is not None and has_limits

    def takes(self, video: Video) -> bool:
        """Whether the engine decodes the video, as far as the manifest can tell."""
        return self.takes_codec(video.codec) and not self.refusal(video.codec, video.pixel_format, coded_size(video))


_NO_WHOLE_BLOCKS = "torchcodec may mix up frames of NVDEC whose sides are not whole blocks"


# -- the host's share --

_SURVEYED = 64  # videos, spread evenly over the manifest
# Measured on 16 virtual cores of an H200 machine (docs/benchmarks.md).
_HOST_CLIP_S, _HOST_PIXEL_S = 11e-3, 11.9e-9
"""CPU seconds to decode a clip on the host: for the clip itself, and for each pixel of the frames fed."""
_FEED_CLIP_S, _FEED_FRAME_S = 14e-3, 0.1e-3
"""CPU seconds for a clip that NVDEC decodes: for the clip (read, select, remux, open), and for each frame fed."""


class Estimate(NamedTuple):
    """Clips/s, estimated from the manifest and measured costs; only the first digit is reliable."""

    nvdec: float
    """Clips/s of the NVDEC engines if nothing else holds them up."""
    together: float
    """Clips/s of NVDEC and the host, which gets the cores not busy feeding NVDEC."""
    host_share: float
    """Share of the videos NVDEC could decode that the host decodes instead."""


def estimate(manifest: Manifest, view: View, routing: Routing, *, gpu: Gpu, cores: float) -> Estimate:
    """Estimates how many training or evaluation clips NVDEC and `cores` decode, and the host's share that keeps
    both busy. Depends only on its arguments."""
    rows = np.linspace(0, len(manifest) - 1, min(len(manifest), _SURVEYED)).astype(int).tolist()
    host_s: list[float] = []
    feed_s: list[float] = []
    engine_s: list[float] = []
    taken: list[bool] = []
    for row in rows:
        video = manifest[row]
        plan = plan_sample(video, view, seed=routing.seed, epoch=0, sample_id=row)
        frames, area = _frames_fed(video, plan.positions.tolist()), video.width * video.height
        host_s.append(_HOST_CLIP_S + _HOST_PIXEL_S * frames * area)
        feed_s.append(_FEED_CLIP_S + _FEED_FRAME_S * frames)
        rate = gpu.frames_per_second(video.codec, area)
        is_taken = rate is not None and routing.takes(video)
        taken.append(is_taken)
        engine_s.append(frames / rate / gpu.engines if rate is not None and is_taken else 0.0)
    share = float(np.mean(taken))  # of the clips: those that NVDEC takes
    if not share:
        return Estimate(0.0, cores / float(np.mean(host_s)), 0.0)
    host, feed, engine = float(np.mean(host_s)), _mean(feed_s, taken), _mean(engine_s, taken)
    nvdec = 1 / engine
    x = share_of_nvdec(nvdec=nvdec, host=host, feed=feed, cores=cores, most=share)
    together = min(nvdec / x if x else np.inf, cores / ((1 - x) * host + x * feed))
    return Estimate(nvdec, together, round(1 - x / share, 2))


def share_of_nvdec(*, nvdec: float, host: float, feed: float, cores: float, most: float) -> float:
    """Share of all clips to give to NVDEC, at most `most`, so that it and the cores are both busy.

    nvdec: clips/s of its engines; host, feed: core seconds to decode a clip on the host, and to feed one to NVDEC;
    most: share of the clips that NVDEC takes. 0 if decoding a clip costs the cores less than feeding it.
    """
    if feed >= host:
        return 0.0
    # With a share of x, both are busy if nvdec / x * ((1 - x) * host + x * feed) = cores.
    spare = cores - nvdec * feed
    return min(nvdec * host / (spare + nvdec * host), most) if spare > 0 else most


def _mean(values: Sequence[float], taken: Sequence[bool]) -> float:
    return float(np.mean([value for value, is_taken in zip(values, taken, strict=True) if is_taken]))


def _frames_fed(video: Video, positions: Sequence[int]) -> float:
    """Frames fed to a decoder for those at `positions`, if all groups are as long as the longest."""
    gop = video.gop or video.frames
    last = {position // gop: position % gop for position in positions}  # ascending: the last one stays
    codec = CODECS.get(video.codec)
    return max(sum(place + 1 for place in last.values()) * (codec.fed_share if codec else 1), len(positions))
