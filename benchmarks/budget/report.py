"""Makes the report of `prepare.py budget`: clips/s of decoding and of the network, and which is slower."""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from benchmarks.budget.cost import run_cost
from benchmarks.budget.rates import (
    BOTH,
    CORES,
    NVDEC,
    SELECTED,
    UTILISATION,
    VIEWS,
    WAYS,
    Decode,
    Rates,
    Timings,
    clip_rates,
    core_seconds,
    judge,
    limits,
    network_demand,
    pixels,
)
from benchmarks.budget.survey import failures, multiply_adds, survey, time_decoding, time_network
from benchmarks.budget.text import assumptions, remedies, verdict
from common.config import Config
from common.labels import class_names, read_manifest
from dali_pipelines.engines import estimate
from dali_pipelines.errors import InputError
from dali_pipelines.files import size_of
from dali_pipelines.gpus import Gpu

_MEASURE_S = 3.0  # to time decoding
_LISTED_FILES = 5  # unreadable files to list


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
    """Makes the report that --json prints. Raises `InputError`.

    samples: number of videos to read.
    gpu, gpus: the GPUs that train; None: measure the network on this machine.
    cores: CPU cores of the training machine; None: those of this machine.
    network_clips: clips/s that training consumes on one GPU; None: estimated for `gpu`, measured without it.
    """
    manifest = read_manifest(manifest_file, key="-m")
    if gpus > 1 and not (gpu or network_clips or torch.cuda.is_available()):
        raise InputError(f"--gpus {gpus}: there is no GPU here to measure the network on; name one with --gpu")
    classes = len(class_names(_labels(config), manifest))
    nvdec = None if _host_share(config) == 1 else gpu
    found = survey(manifest, config, samples, nvdec)
    decode_s, measured = time_decoding(found, _MEASURE_S)
    timings = Timings(decode_s, min(found.headers_s, decode_s), found.feed_s)
    demand, network = _demand(config, classes, gpu, gpus, network_clips)
    knows_cores = bool(cores) or torch.cuda.is_available()  # of the training machine
    cores = cores or len(os.sched_getaffinity(0))
    host_share = _host_share(config)
    knows_share = host_share is not None or knows_cores
    views = found.view.views_per_decode
    ways: dict[str, dict[str, Any]] = {}
    rates: dict[str, Rates] = {}
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
    report: dict[str, Any] = {
        "manifest": manifest_file,
        "videos": len(manifest),
        "sampled_videos": len(found.rows),
        "windows": len(found.decodes),
        "views_per_decode": views,
        "unreadable": {"count": len(found.unreadable), "files": failures(found)[:_LISTED_FILES]},
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
    if nvdec and host_share is None and BOTH in report["limits"]:
        workers = cores // gpus if config.data.workers is None else config.data.workers
        share = estimate(manifest, found.view, found.routing, gpu=nvdec, cores=max(workers, 1)).host_share
        by_default = clip_rates(
            found.decodes, SELECTED, timings, gpu=nvdec, gpus=gpus, cores=cores, clips=views, host_share=share
        )
        report["supply"] |= {"default_host_share": share, "default_clips_per_second": by_default.together}
    report["needed"] = _needed(report, found.decodes, timings, host_share)
    report["verdict"] = verdict(report)
    report["remedies"] = remedies(report)
    report["assumptions"] = assumptions(report, config, gpu)
    if gpu:
        sizes = [size_of(manifest.source(row)) for row in found.rows if row not in found.unreadable]
        report["run"] = run_cost(
            config,
            videos=len(manifest),
            classes=classes,
            gpus=gpus,
            gpu=gpu,
            network_clips=network_clips,
            decode_clips=report["supply"]["clips_per_second"],
            video_bytes=float(np.mean(sizes)),
        )
    return report


def _host_share(config: Config) -> float | None:
    """Share of the NVDEC-compatible videos that the cores decode; None for the share that keeps both busy."""
    shares = {"auto": config.data.host_share, "nvdec": config.data.host_share or 0.0, "dali": 0.0, "host": 1.0}
    return shares[config.data.decode]


def _supply(report: dict[str, Any], rates: Rates, *, knows_share: bool) -> dict[str, Any]:
    """Clips/s with `data.decode` as configured, in all and of each engine, and the share of the NVDEC-compatible
    videos that the cores decode: None without such videos, or if it depends on an unknown number of cores."""
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
    """Number of cores needed to decode the clips that the network consumes, and the share of these clips that the cores
    decode. None without NVDEC. host_share None: the cores decode only the surplus of NVDEC."""
    demand, nvdec = report["network"]["clips_per_second"], report["ways"][SELECTED]["nvdec_clips_per_second"]
    if nvdec is None:
        return None
    if host_share is None:
        host_share = max(1 - nvdec / demand, 0.0)
    seconds = core_seconds(decodes, SELECTED, timings, host_share=host_share) / report["views_per_decode"]
    return {"cores": demand * seconds, "decoded_by_cores": 1 - report["taken_by_nvdec"] * (1 - host_share)}


def _labels(config: Config) -> str | None:
    """The file of class names, if it exists here: the number of classes hardly matters."""
    path = config.data.labels
    return path if path and os.path.exists(path) else None


def _demand(
    config: Config, classes: int, gpu: Gpu | None, gpus: int, network_clips: float | None
) -> tuple[float, dict[str, Any]]:
    """Clips/s that the network consumes, and how they were determined."""
    if network_clips:
        return gpus * network_clips, {"how": f"{network_clips:g} clips/s per GPU, as given"}
    work = multiply_adds(config, classes)
    if gpu:
        passes = 4 if config.train.activation_checkpointing else 3
        how = (
            f"{work / 1e9:.4g} GMAC per clip, {passes} forward passes, {UTILISATION:.0%} of {gpu.tflops:g} TFLOP/s: "
            "an estimate, not measured"
        )
        return network_demand(work, gpu, gpus, passes=passes), {"how": how, "gmac_per_clip": work / 1e9}
    speed, device, precision = time_network(config, classes)
    how = f"measured here: forward and backward in {precision} on {'a GPU' if device == 'cuda' else 'all CPU cores'}"
    return gpus * speed, {"how": how, "gmac_per_clip": work / 1e9, "device": device}
