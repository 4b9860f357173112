"""Hours, GPU memory and disk of a whole run, from measured rates as far as there are any.

Rates of the network: `benchmark.py model` on an H200, 2026-11-27 (docs/benchmarks.md), ViT-B, 8 frames of 224 pixels,
bf16: 184 clips/s at 8 clips a step, compiled, and 209 at 32, eager. Other GPUs and networks get the same share of
their peak. Rates of NVDEC: 159 clips/s of Kinetics-like files, and 797 of copies with a keyframe every 16 frames, on
the same H200; other GPUs are scaled by their engines and clocks. Memory: computed by `benchmark.py model --fit`.
"""

import textwrap
from typing import Any

import torch

from benchmarks.budget.rates import MEASURED_GPU, MEASURED_SIZE, frames_per_second
from benchmarks.budget.survey import multiply_adds, network
from common.config import Config
from dali_pipelines.gpus import GPUS, Gpu

KINETICS_400 = 240_258
"""Training videos of Kinetics-400 that CVDF serves."""
GIB = 2**30
_VIDEO_BYTES = 134e9 / KINETICS_400  # with a short side of 256 pixels: docs/datasets.md
_MEASURED_GMAC = 186
_MEASURED_CLIPS = {8: 184, 32: 209}  # clips a step -> clips/s, forward and backward
_NVDEC_CLIPS = {"original": 159, "transcoded": 797}
_CARD_GB = {"V100": 16, "T4": 16, "A100": 40, "H100": 80, "H200": 141, "L4": 24, "L40S": 48}  # the smallest sold
_RESERVED_GIB = 2.0  # CUDA's context, DALI's pools and NVDEC's frames
_CLIP_GIB = {False: 0.55, True: 0.10}  # without and with activation checkpointing; ViT-B, 8 frames of 224 pixels
_CLIP_SIZE = 8 * 14**2 * 12 * 768  # its patches x blocks x channels, with which activations grow
_PARAMETER_BYTES = {"sgd": 12, "adamw": 16}  # float32 weight, gradient and one or two moments
_CHECKPOINTS, _WEIGHT_FILES = 2, 3  # kept: the newest two; best, last and averaged weights


def run_cost(
    config: Config,
    *,
    videos: int,
    classes: int,
    gpus: int,
    gpu: Gpu | None = None,
    network_clips: float | None = None,
    decode_clips: float | None = None,
    video_bytes: float | None = None,
) -> dict[str, Any]:
    """The cost of a run on `gpus` of each GPU, or of `gpu` alone.

    network_clips: measured clips/s of training on one GPU; None: from the measurements above.
    decode_clips: clips/s that all decoders supply for these videos; None: from the measurements above.
    video_bytes: mean size of a video; None: that of Kinetics-400 with a short side of 256 pixels.
    """
    with torch.device("meta"):
        parameters = sum(each.numel() for each in network(config, classes).parameters())
    work = multiply_adds(config, classes)
    per_gpu = max(config.optim.global_batch_size // gpus, 1)
    batch = min(per_gpu, config.data.batch_size or per_gpu)
    clips = config.train.epochs * videos * config.data.views_per_decode
    rows = []
    for each in [gpu] if gpu else GPUS.values():
        speed = gpus * (network_clips or _network_clips(each, work, batch, config.train.activation_checkpointing))
        decoding = {"these videos": decode_clips} if decode_clips else _nvdec_clips(each, gpus, config)
        is_measured = bool(network_clips) or (each.name == MEASURED_GPU and abs(work / 1e9 - _MEASURED_GMAC) < 2)
        rows.append(
            {
                "gpu": each.name,
                "network_clips_per_second": speed,
                "network_hours": clips / speed / 3600,
                "network_is_measured": is_measured,
                "decoding_hours": {name: clips / rate / 3600 for name, rate in decoding.items()},
                "card_gb": _CARD_GB.get(each.name),
            }
        )
    return {
        "gpus": gpus,
        "epochs": config.train.epochs,
        "videos": videos,
        "clips_per_step_and_gpu": batch,
        "gmac_per_clip": work / 1e9,
        "parameters": parameters,
        "gpu_gib": _gpu_gib(config, parameters, batch),
        "videos_gb": videos * (video_bytes or _VIDEO_BYTES) / 1e9,
        "videos_are_sampled": video_bytes is not None,
        "output_gb": _output_gb(config, parameters),
        "decoding_is_of_these_videos": decode_clips is not None,
        "rows": rows,
    }


def _network_clips(gpu: Gpu, work: float, batch: int, checkpointing: bool) -> float:
    """Clips/s of one GPU: the share of its peak that the H200 reached with the measured batch that is nearest."""
    measured = _MEASURED_CLIPS[min(_MEASURED_CLIPS, key=lambda size: abs(size - batch))]
    share = measured * _MEASURED_GMAC / GPUS[MEASURED_GPU.lower()].tflops
    return share * gpu.tflops / (work / 1e9) * (3 / 4 if checkpointing else 1)


def _nvdec_clips(gpu: Gpu, gpus: int, config: Config) -> dict[str, float]:
    height, width = MEASURED_SIZE
    one, measured = (
        each.engines * frames_per_second(each, "h264", height * width) for each in (gpu, GPUS[MEASURED_GPU.lower()])
    )
    scale = gpus * one / measured * 8 / config.data.num_frames * config.data.views_per_decode
    return {name: scale * clips for name, clips in _NVDEC_CLIPS.items()}


def _gpu_gib(config: Config, parameters: int, batch: int) -> float:
    patches = (config.data.crop_size // config.model.patch_size) ** 2
    size = config.data.num_frames * patches * config.model.depth * config.model.embed_dim
    clip = _CLIP_GIB[config.train.activation_checkpointing] * size / _CLIP_SIZE
    return _RESERVED_GIB + parameters * _bytes_per_parameter(config) / GIB + batch * clip


def _output_gb(config: Config, parameters: int) -> float:
    state = _bytes_per_parameter(config) - 4  # without the gradient
    return parameters * (_CHECKPOINTS * state + _WEIGHT_FILES * 4) / 1e9


def _bytes_per_parameter(config: Config) -> int:
    is_averaged = config.train.swa_epochs > 0 or config.train.ema_decay is not None
    return _PARAMETER_BYTES.get(config.optim.name, 16) + 4 * is_averaged


def _hours(hours: float) -> str:
    return f"{hours:.1f}" if hours >= 0.05 else "<0.1"


def cost_table(cost: dict[str, Any]) -> str:
    """The cost as text."""
    names = list(cost["rows"][0]["decoding_hours"])
    lines = [
        f"The run: {cost['epochs']} epochs of {cost['videos']:,} videos on {cost['gpus']} "
        f"{'GPU' if cost['gpus'] == 1 else 'GPUs'}, "
        f"{cost['clips_per_step_and_gpu']} clips a step and GPU; {cost['parameters'] / 1e6:.1f} M parameters, "
        f"{cost['gmac_per_clip']:.4g} GMAC per clip",
        "",
        f"{'GPU':>10} {'network, h':>12} " + " ".join(f"{f'NVDEC, {name}, h':>22}" for name in names) + "  memory",
    ]
    if cost["decoding_is_of_these_videos"]:
        lines[-1] = f"{'GPU':>10} {'network, h':>12} {'decoding, h':>22}  memory"
    for row in cost["rows"]:
        hours = f"{_hours(row['network_hours'])}{'' if row['network_is_measured'] else '*'}"
        memory = f"{cost['gpu_gib']:.1f} GiB"
        if row["card_gb"]:
            memory += f" of {row['card_gb']} GB"
            if cost["gpu_gib"] * GIB > row["card_gb"] * 1e9:
                memory += ": too much; use more GPUs, a smaller data.batch_size, or train.activation_checkpointing"
        lines.append(
            f"{row['gpu']:>10} {hours:>12} "
            + " ".join(f"{_hours(row['decoding_hours'][name]):>22}" for name in names)
            + f"  {memory}"
        )
    source = "sampled" if cost["videos_are_sampled"] else "Kinetics-400 with a short side of 256 pixels"
    lines.append("")
    notes = [
        f"Disk: {cost['videos_gb']:,.3g} GB for the videos ({source}), {cost['output_gb']:.2g} GB for checkpoints and "
        "weights.",
        "The run takes the longer of network and decoding; CPU cores that also decode shorten the second. Validation "
        "is not counted.",
        f"Not measured: * is scaled from an {MEASURED_GPU} by peak bf16, and that one ran an earlier version of the "
        "network, without the optimizer. Memory is computed (benchmark.py model --fit). Several GPUs are assumed to "
        "be that many times as fast as one.",
    ]
    if not cost["decoding_is_of_these_videos"]:
        notes.append(
            f"NVDEC: measured on one {MEASURED_GPU} with files like those of Kinetics, original and transcoded "
            "(prepare.py transcode); others are scaled by engines and clock. -m MANIFEST samples your videos instead."
        )
    for note in notes:
        lines += textwrap.wrap(note, 110)
    return "\n".join(lines)
