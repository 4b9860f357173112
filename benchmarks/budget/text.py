"""Formats the report of `prepare.py budget`."""

import textwrap
from typing import Any

import torch

from benchmarks.budget.rates import (
    B_FRAMES,
    BOTH,
    CORES,
    GOP,
    MEASURED_FPS,
    MEASURED_GOP_16_FPS,
    MEASURED_GPU,
    MEASURED_HOW,
    MEASURED_SIZE,
    NVDEC,
    SEEK,
    SELECTED,
    SHORT_SIDE,
    START,
    TRANSCODED,
    VIEWS,
    frames_per_second,
    tightest,
)
from benchmarks.budget.survey import WINDOWS
from common.config import Config
from dali_pipelines.gpus import HD, RATES_FROM, Gpu

_UNCERTAIN, _UNCERTAIN_NVDEC = 1.25, 2.0  # smaller ratios are within the error of timings here, and of GPU figures
_WIDTH = 118  # characters per line
_TITLES = {
    START: "everything from the file's start",
    SEEK: "from the keyframe before each frame",
    SELECTED: "selected packets, as training does",
    TRANSCODED: "... of transcoded files",
    VIEWS: "... with views_per_decode doubled",
}


def verdict(report: dict[str, Any]) -> str:
    """Names the bottleneck and its margin."""
    demand, ratio = report["network"]["clips_per_second"], report["times"]
    if report["bound_by"] == "network":
        name = tightest(report["limits"])
        text = (
            f"the network is the bottleneck: it consumes {_number(demand)} clips/s, and {_noun(name, report)} can "
            f"supply {_number(report['limits'][name])}, {ratio:.1f} times as many"
        )
    else:
        name = report["bound_by"]
        supply = report["limits"][name]
        text = (
            f"decoding is the bottleneck: {_noun(name, report)} can supply {_number(supply)} clips/s, and the network "
            f"could consume {_number(demand)}, {ratio:.1f} times as many; it would wait {1 - 1 / ratio:.0%} of the time"
        )
    if report["bound_by"] == "network" and report["supply"].get("default_clips_per_second", demand) < demand:
        text += f", with data.host_share={report['supply']['host_share']:g}; the loader's default is too slow"
    if ratio < (_UNCERTAIN if set(report["limits"]) == {CORES} else _UNCERTAIN_NVDEC):
        text += ". That is too close to call from estimates; measure it with `benchmark.py train` on that machine"
    if report["decode"] == "auto" and set(report["limits"]) == {NVDEC}:
        text += ". The CPU of that machine decodes as well; give `--cores N` to include it"
    if report["network"].get("device") == "cpu":
        together = 1 / (1 / demand + 1 / report["ways"][SELECTED]["cores_clips_per_second"])
        text += f". Both need the same cores: together about {_number(together)} clips/s"
    return text[0].upper() + text[1:] + "."


def _noun(name: str, report: dict[str, Any]) -> str:
    nvdec = f"NVDEC ({_count(report['gpu']['engines'], 'engine')})" if report["gpu"] else ""
    cores = f"the CPU ({_count(report['cores'], 'core')})"
    return {NVDEC: nvdec, CORES: cores, BOTH: f"{nvdec} and {cores} together"}[name]


def _count(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


def remedies(report: dict[str, Any]) -> list[str]:
    """What transcoding, more clips per decode and another `data.host_share` would gain."""
    demand, now = report["network"]["clips_per_second"], report["ways"][SELECTED]
    before = min(now["limits"].values())
    lines = []
    for way, what in (
        (TRANSCODED, f"`prepare.py transcode --short-side {SHORT_SIDE} --gop {GOP}`"),
        (VIEWS, f"data.views_per_decode={2 * report['views_per_decode']} (adjacent clips of a video in a batch)"),
    ):
        then = report["ways"][way]
        after = min(then["limits"].values())
        if after < 1.05 * before:
            lines.append(f"{what}: nothing to gain")
            continue
        lines.append(
            f"{what}: {_number(then['frames_per_clip'])} frames per clip instead of {_number(now['frames_per_clip'])}; "
            f"{_decoder(then['limits'])} would supply {_number(after)} clips/s, {after / before:.1f} times as many, "
            f"{'enough' if after >= demand else 'not enough'} for this network"
        )
    by_default = report["supply"].get("default_clips_per_second", before)
    if before >= 1.05 * by_default:
        lines.append(
            f"data.host_share={report['supply']['host_share']:g}: {_number(before)} clips/s instead of "
            f"{_number(by_default)} with the loader's default, on cores like these"
        )
    return lines


def _decoder(limits: dict[str, float]) -> str:
    """The decoder, and what slows it down if it is not itself the limit."""
    if BOTH in limits:
        return "NVDEC and the CPU"
    if NVDEC not in limits:
        return "the CPU"
    return "NVDEC" if tightest(limits) == NVDEC else "NVDEC, slowed down by the CPU,"


def assumptions(report: dict[str, Any], config: Config, gpu: Gpu | None) -> list[str]:
    """States the basis of the numbers, and what they omit."""
    lines = [
        f"{report['sampled_videos']} of {report['videos']} videos, drawn at random, the same every time; "
        f"the training windows of their first {WINDOWS} epochs",
        f"the CPU: processor time of {report['measured_windows']} decodes here, one thread, times {report['cores']} "
        f"cores{'' if report['knows_cores'] else ' (those here; --cores N for others)'}: an extrapolation without "
        "storage latency and DALI's resize. Only the row `as training does` is measured; the others are scaled by the "
        "decoded pixels, which is optimistic for transcoded files, whose keyframes take longer",
        f"transcode: same frame count, closed GOPs of {GOP}, {B_FRAMES} B-frames between two reference frames",
    ]
    if gpu:
        lines += _nvdec_assumptions(report, gpu)
        if not report["network"].get("device") and config.train.precision == "float32":
            lines.append("the network is assumed to train in bf16 or fp16; train.precision=float32 is far slower")
    elif report["decode"] != "host" and torch.cuda.is_available():
        lines.append("NVDEC is not counted; give --gpu NAME to count it")
    if config.distill.teacher:
        lines.append("the teacher of distill.teacher, and frames that only it uses, are not counted")
    return lines


def _nvdec_assumptions(report: dict[str, Any], gpu: Gpu) -> list[str]:
    if report["decode"] == "host":
        return ["decode=host: NVDEC is idle"]
    height, width = MEASURED_SIZE
    small, full = (frames_per_second(gpu, "h264", area) for area in (height * width, HD))
    lines = [
        f"NVDEC, measured: {MEASURED_FPS:,} frames/s of {width}x{height}, H.264 without B-frames, and "
        f"{MEASURED_GOP_16_FPS:,} at GOP {GOP}; {MEASURED_HOW}",
        f"NVDEC, derived: {gpu.engines * small:,.0f} frames/s of that size on the {gpu.engines} engines of one "
        f"{gpu.name}, and {full:.0f} frames/s per engine at 1080p, at {gpu.video_mhz:g} MHz ({RATES_FROM}); other "
        "sizes are interpolated. NVDEC is always busy: an upper bound",
        "feeding NVDEC: reading, selecting and remuxing packets, measured here, without torchcodec's own CPU time of "
        "13 to 30 ms per clip on that machine, so the cores' share of the decoding is also an upper bound",
    ]
    if gpu.name != MEASURED_GPU:
        lines.append(
            f"unconfirmed: the {gpu.name} was not measured; its rates are those of the {MEASURED_GPU}, scaled by the "
            "published rate of an engine, the number of engines and the video clock"
        )
    lines += [f"unconfirmed: {each}" for each in gpu.unconfirmed]
    codecs = [codec for codec in report["codecs"] if not gpu.is_published(codec)]
    if report["taken_by_nvdec"] and codecs:
        lines.append(f"unconfirmed: no rate is published for {', '.join(codecs)}: the rate of H.264 is assumed")
    if report["taken_by_nvdec"] < 1:
        lines.append(f"{1 - report['taken_by_nvdec']:.0%} of the clips are decoded by the workers, not by NVDEC")
    if report["decode"] == "dali":
        lines.append(
            "decode=dali: the rates are those of torchcodec. DALI's own decoder is far slower: 11 clips/s in the "
            f"loader, on that {MEASURED_GPU}, transcoded or not"
        )
    if "default_host_share" in report["supply"]:
        lines.append(
            "host_share: from the timings of the cores here. Without data.host_share the loader uses timings of the "
            f"machine with the {MEASURED_GPU}"
        )
    return lines


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def table(report: dict[str, Any]) -> str:
    """The report as text."""
    gpu, network = report["gpu"], report["network"]
    nvdec = f"{gpu['gpus']} x {gpu['name']} NVDEC" if gpu and report["decode"] != "host" else ""
    cores = f"{report['cores']} CPU cores"
    together = "together" if BOTH in report["limits"] else ""
    lines = [
        f"{report['manifest']}: {', '.join(report['codecs'])}, {report['picture_pixels'] / 1e3:.0f} thousand pixels "
        f"per frame; {report['packets_read_per_clip']:.0f} packets read per clip",
        "",
        f"{'decoded from a video':36} {'frames/clip':>11} {nvdec:>18} {cores:>20} {together:>18}".rstrip(),
    ]
    for way, row in report["ways"].items():
        by_nvdec, by_cores, by_both = (
            "" if row[f"{name}_clips_per_second"] is None else f"{_number(row[f'{name}_clips_per_second'])} clips/s"
            for name in ("nvdec", "cores", "together")
        )
        line = f"{_TITLES[way]:36} {row['frames_per_clip']:11.1f} {by_nvdec:>18} {by_cores:>20} {by_both:>18}"
        lines.append(line.rstrip())
    lines += ["", *textwrap.wrap(_supply_text(report), _WIDTH)]
    lines.append(f"The network consumes {_number(network['clips_per_second'])} clips/s ({network['how']}).")
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
    for title, key in (("What would speed up decoding", "remedies"), ("Assumptions", "assumptions")):
        lines += ["", f"{title}:"]
        for each in report[key]:
            lines += textwrap.wrap(each, _WIDTH, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False)
    return "\n".join(lines)


def _supply_text(report: dict[str, Any]) -> str:
    """Says how much each engine decodes, with `data.decode` as configured."""
    supply, names = report["supply"], {NVDEC: "NVDEC", CORES: "the CPU"}
    parts = [f"{names[name]} decodes {_number(each)} clips/s" for name, each in supply["by_engine"].items()]
    text = f"decode={report['decode']}: {' and '.join(parts)}"
    if len(parts) > 1:
        text += f", together {_number(supply['clips_per_second'])}"
    if supply["host_share"] is not None and BOTH in report["limits"]:
        text += f", with data.host_share={supply['host_share']:g}"
    if "default_host_share" in supply:
        text += (
            f", which keeps both busy on cores like these. The loader's default is {supply['default_host_share']:g}: "
            f"{_number(supply['default_clips_per_second'])} clips/s"
        )
    return text + "."
