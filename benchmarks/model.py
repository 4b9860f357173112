"""`benchmark.py model`: forward passes and training steps of this network and its peers, against the machine's peak.

Why the comparison is fair:

- All contestants have the same weights and clips; before timing, float32 logits must agree to 1e-4.
- All run in this process with the same threads. They take turns in each round, and a different one starts each
  round. Ratios are taken within a round, then their median. A warm-up round is not counted.
- The peers run at their best: Hugging Face's network also with PyTorch's fused attention, which it does not use itself.
- bf16 is autocast, with weights and gradients in float32; a training step is forward and backward, without optimizer.
- Memory: each contestant and precision has its own process. After one step, which leaves the gradients and all one-time
  allocations, freed memory is returned. The result is the peak of the next step minus the resident memory before it
  (VmHWM - VmRSS): activations and workspace.

gpu_model.py measures on GPUs.
"""

import ctypes
import gc
import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import machine, matmul_flops
from benchmarks.networks import (
    COMPILED,
    CONTESTANTS,
    OURS,
    PRECISIONS,
    NetworkContestant,
    NetworkWork,
    peer_versions,
)
from benchmarks.reporting import (
    Report,
    command,
    listed,
    progress,
    spread,
    write_and_print,
)
from dali_pipelines.errors import InputError
from dali_pipelines.processes import end_with_parent
from model.timesformer import multiply_adds

FORWARD, TRAINING = TASKS = ("forward", "training")
_LARGEST_DIFFERENCE = 1e-4
_MATMUL_SIZE = 4096
_START_S = 8.0  # to start a process that measures memory


def benchmark_model(
    *, size: str, batch_size: int, num_frames: int, image_size: int, rounds: int, compile: bool, out: Path
) -> None:
    """Measures on the CPU, prints the table and writes model.json into `out`. Raises `InputError`."""
    work = NetworkWork(size, batch_size, num_frames, image_size, "cpu")
    try:
        forward = 2 * batch_size * multiply_adds(work.network)
    except ValueError as error:
        raise InputError(str(error)) from None
    flops = {FORWARD: forward, TRAINING: 3 * forward}
    out.mkdir(parents=True, exist_ok=True)

    made: dict[str, NetworkContestant] = {}
    failures: dict[str, str] = {}
    expected: torch.Tensor | None = None
    for name, make in CONTESTANTS.items():
        if name == COMPILED and not compile:
            continue
        try:
            made[name] = make(work)
            logits = made[name].logits()
        except Exception as error:  # not installed, or broken: still measure the others
            failures[name] = (str(error).strip() or type(error).__name__).splitlines()[-1]
            made.pop(name, None)
            continue
        expected = logits if expected is None else expected
        difference = (logits - expected).abs().max().item()
        if not difference <= _LARGEST_DIFFERENCE:
            raise InputError(f"{name}: its logits differ from ours by {difference:.1e}, so it computes something else")
    if OURS not in made:
        raise InputError(f"{OURS}: {failures[OURS]}")

    progress(_forecast(made, rounds))
    seconds: dict[tuple[str, str, str], list[float]] = {}
    mib: dict[tuple[str, str], float | None] = {}
    for precision in PRECISIONS:
        able = {name: contestant for name, contestant in made.items() if precision in contestant.precisions}
        for task in TASKS:
            turns = take_turns(able, task, precision, rounds)
            seconds |= {(name, task, precision): values for name, values in turns.items()}
        for name in able:
            progress(f"{precision} memory: {name}")
            mib[name, precision] = _in_new_process(training_mib, name, work, precision)
    report: Report = {
        "command": command(),
        "machine": machine() | {"threads": torch.get_num_threads(), "peers": peer_versions()},
        "settings": work._asdict() | {"rounds": rounds},
        "forward_gmac_per_clip": forward / 2e9 / batch_size,
        "matmul_gflops": {
            precision: matmul_flops(_MATMUL_SIZE, dtype, "cpu") / 1e9 for precision, dtype in PRECISIONS.items()
        },
        "not_measured": failures,
        "contestants": {
            name: {
                precision: {task: _summary(name, task, precision, seconds, flops) for task in TASKS}
                | {"training_mib": mib[name, precision]}
                for precision in contestant.precisions
            }
            for name, contestant in made.items()
        },
    }
    write_and_print(report, out / "model.json", table(report))


def _forecast(made: Mapping[str, NetworkContestant], rounds: int) -> str:
    """Says how long the measurement will take, from the second forward pass of our network in each precision."""
    passes = 0.0
    for precision in PRECISIONS:
        for _ in range(2):  # the first includes one-time work
            start = time.perf_counter()
            made[OURS].forward(precision)
            spent = time.perf_counter() - start
        # A training step takes three forward passes: one step a round, and two to measure memory.
        passes += spent * ((rounds + 1) * (1 + 3) + 2 * 3)
    minutes = len(made) * (passes + len(PRECISIONS) * _START_S) / 60
    return (
        f"about {max(round(minutes), 1)} min: {len(made)} networks, {rounds} rounds, float32 and bf16; estimated from "
        "forward passes of our network"
    )


def take_turns(made: Mapping[str, NetworkContestant], task: str, precision: str, rounds: int) -> dict[str, list[float]]:
    """Returns the seconds of each contestant in each round."""
    seconds: dict[str, list[float]] = {name: [] for name in made}
    for number in range(-1, rounds):  # the first is not counted
        progress(f"{precision} {task}: round {number + 1} of {rounds}")
        first = number % len(made)  # rotate, because each contestant affects the memory that the next one finds
        for name in [*made, *made][first : first + len(made)]:
            start = time.perf_counter()
            if task == FORWARD:
                made[name].forward(precision)
            else:
                made[name].training(precision)
            if number >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def training_mib(name: str, work: NetworkWork, precision: str) -> float:
    """Peak memory of a training step in MiB, minus the resident memory before it; see the module docstring."""
    contestant = CONTESTANTS[name](work)
    contestant.training(precision)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _resident_mib("VmRSS")
    contestant.training(precision)
    return _resident_mib("VmHWM") - before


def _resident_mib(field: str) -> float:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields[field].removesuffix("kB")) / 1024


def _in_new_process(function: Callable, *arguments: Any) -> float | None:
    """Calls `function` in a new process. None if the process is killed, for example when it runs out of memory, or
    may not read its memory usage."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=end_with_parent) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except (BrokenProcessPool, OSError):
            return None


# -- the report --


def _summary(
    name: str, task: str, precision: str, seconds: Mapping[tuple[str, str, str], list[float]], flops: Mapping[str, int]
) -> dict[str, Any]:
    """Seconds, GFLOP/s, and how many times as fast ours is: median, lowest and highest of the rounds."""
    turns = seconds[name, task, precision]
    ratios = [other / ours for other, ours in zip(turns, seconds[OURS, task, precision])]
    return {
        "seconds": statistics.median(turns),
        "gflops": flops[task] / statistics.median(turns) / 1e9,
        "ours_is": spread(ratios),
    }


def table(report: dict[str, Any]) -> str:
    """The report as text."""
    lines = [f"{report['machine']['cpu']}, {report['machine']['threads']} threads; GPU: {report['machine']['gpu']}"]
    versions = {"torch": report["machine"]["versions"]["torch"]} | report["machine"]["peers"]
    lines += [listed(versions), listed(report["settings"])]
    lines.append(f"{report['forward_gmac_per_clip']:.4g} GMAC per clip")
    for precision, peak in report["matmul_gflops"].items():
        lines += ["", f"{precision}; a large matrix product: {peak:.0f} GFLOP/s"]
        lines.append(
            " " * 20 + "".join(f"{task:>10} s  ours is  (rounds)        GFLOP/s     " for task in TASKS) + "MiB"
        )
        for name, result in report["contestants"].items():
            if precision not in result:
                lines.append(f"{name:20}  none on this device")
                continue
            cells = ""
            for task in TASKS:
                one = result[precision][task]
                low, middle, high = (one["ours_is"][key] for key in ("low", "median", "high"))
                cells += f"{one['seconds']:12.3f}  x {middle:5.2f}  {low:5.2f} .. {high:5.2f}"
                cells += f"  {one['gflops']:6.0f} {one['gflops'] / peak:4.0%}"
            mib = result[precision]["training_mib"]
            lines.append(f"{name:20}{cells}  {'failed' if mib is None else format(mib, '.0f'):>7}")
    lines.append("")
    lines += [f"{name}: not measured: {reason}" for name, reason in report["not_measured"].items()]
    return "\n".join(lines).rstrip()
