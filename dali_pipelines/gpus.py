"""NVIDIA GPUs: their video decoders (NVDEC), decoding rates and peak FLOPS.

Rates at 1080p are published. The time of a small frame was measured on an H200 (docs/benchmarks.md): 22,000 frames/s of
340x256 on its seven engines, fed only the packets that training needs, without most B frames.

Sources, looked up in November 2026:

[1] "NVDEC Application Note", Video Codec SDK 13.0,
    https://docs.nvidia.com/video-technologies/video-codec-sdk/13.0/nvdec-application-note/index.html
    Frames/s of one engine at 1920x1080, 8-bit 4:2:0, for each generation, with the video clock of the measurement.
    They scale with the video clock; GA100 (A100) and Hopper have Turing's engines. Volta has no row.
[2] "Video Decode GPU Requirements", NVIDIA Dynamo 1.6,
    https://docs.nvidia.com/dynamo/v1.6.0/multimodal/video-decode-gpu-requirements.md
    Engines: A100 5, H100 7, L4 4, L40S 3. Only L4 and L40S decode AV1.
[3] Engines of T4 (2): an answer in NVIDIA's forum,
    https://forums.developer.nvidia.com/t/sample-appdecmultifiles-in-videocodec-sdk-does-not-improve-the-performance/108627
    NVIDIA's page of T4 says 38 full-HD streams, 1,140 frames/s at 30 each; the numbers here give 1,219.
[4] Highest video clocks, from `nvidia-smi -q` in logs that users published: V100 NVIDIA/nvidia-docker#1076,
    T4 NVIDIA/nvidia-docker#1446, A100 NVIDIA/DCGM#152 (GitHub issues); H100 and L4 in users' notes on GitHub.
[5] Dense bf16 (V100, T4: fp16) of the SXM modules and cards, NVIDIA's data sheets. Those of H100 and L4 give twice the
    number, "with sparsity".
"""

import re
from dataclasses import dataclass, field

from dali_pipelines.errors import InputError

HD = 1920 * 1080
"""Pixels of the frames for which rates are published."""

RATES_FROM = "NVIDIA's NVDEC Application Note, SDK 13.0"

FIXED_SHARE = 0.17
"""A frame of any size takes at least this share of the time of a 1080p frame: see the module's docstring."""


@dataclass(frozen=True)
class Generation:
    """NVDEC engines of one design; see [1]."""

    mhz: float
    """Video clock at which the rates were measured."""
    rates: dict[str, float]
    """Codec (FFmpeg's name) -> frames/s of one engine in HD."""
    decodes_av1: bool = False


@dataclass(frozen=True)
class Gpu:
    """A GPU and the decoding rates of its NVDEC engines."""

    name: str
    engines: int
    """Video decoders."""
    generation: Generation
    video_mhz: float
    """Highest video clock."""
    tflops: float
    """Dense bf16 peak, or fp16 without bf16, in 1e12 operations/s."""
    unconfirmed: list[str] = field(default_factory=list)
    """The numbers without a source."""

    def frames_per_second(self, codec: str, area: float) -> float | None:
        """Frames of `area` pixels that one engine decodes per second; None if it does not take the codec."""
        if codec == "av1" and not self.generation.decodes_av1:
            return None
        rate = self.generation.rates.get(codec, self.generation.rates["h264"])
        return rate * self.video_mhz / self.generation.mhz / (FIXED_SHARE + (1 - FIXED_SHARE) * area / HD)

    def is_published(self, codec: str) -> bool:
        """Whether the codec has a rate of its own; others count as H.264."""
        return codec in self.generation.rates


_PASCAL = Generation(1544, {"h264": 694, "vp9": 846, "hevc": 810})
_TURING = Generation(1860, {"h264": 771, "vp9": 932, "hevc": 1316})
_ADA = Generation(2160, {"h264": 903, "vp9": 1290, "hevc": 1641, "av1": 1018}, decodes_av1=True)

GPUS = {
    "v100": Gpu("V100", 1, _PASCAL, 1372, 125, ["its 1 NVDEC engine", "decode rates of Volta: Pascal's are taken"]),
    "t4": Gpu("T4", 2, _TURING, 1470, 65, ["its 2 NVDEC engines (a forum says so, NVIDIA's tables were not found)"]),
    "a100": Gpu("A100", 5, _TURING, 1290, 312),
    "h100": Gpu("H100", 7, _TURING, 1545, 989),
    "h200": Gpu("H200", 7, _TURING, 1545, 989),
    "l4": Gpu("L4", 4, _ADA, 1770, 121),
    "l40s": Gpu("L40S", 3, _ADA, 2160, 362, ["its video clock: that of NVIDIA's measurements is taken"]),
}


def find_gpu(name: str | None) -> Gpu | None:
    """The GPU of that name, ignoring case. Raises `InputError` with the known names for any other."""
    if name is not None and name.lower() not in GPUS:
        raise InputError(f"--gpu {name}: not known; expected one of {', '.join(GPUS)}")
    return GPUS[name.lower()] if name else None


def gpu_of_device(name: str) -> Gpu | None:
    """The GPU that CUDA and NVML call `name`, such as "NVIDIA H100 80GB HBM3"; None if it is not in `GPUS`."""
    return next((GPUS[word] for word in re.split(r"[\s-]+", name.lower()) if word in GPUS), None)


def unknown_gpu(name: str, engines: int) -> Gpu:
    """A GPU that is not in `GPUS`, with Turing's rates and the number of engines that the driver reports."""
    return Gpu(name, engines, _TURING, _TURING.mhz, 0, [f"decode rates of {name}: Turing's are taken"])
