"""`benchmark.py train`: a run's loader alone, its network alone, and both together, as in training.

Why the comparison is fair:

- All three use the run's own ClipLoader, `Trainer` and training step (forward, backward, optimizer, micro-steps,
  precision, mixing, DDP). Nothing is validated, logged or saved.
- The network alone trains on random clips on the device, with the loader's shape; the loader's workers are stopped.
- They take turns in one process, and a different one starts each round. Each turn has a warm-up of more batches than
  the loader prefetches, so when the clock starts, the queued batches are consumed or the queue is full. Within a round,
  the loader alone and both together are timed on the same clips. Ratios are taken within a round, then their median.
- If loader and network need the same cores, they cannot reach the speed of the slower one alone. Two bounds are given:
  the free cores divided by the CPU time that a clip costs both, and 1 / (1 / a + 1 / b), as if they took turns.
"""

import contextlib
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import cpu_seconds, gpu_matmul_tflops, machine
from benchmarks.reporting import Report, command, listed, progress, spread, write_and_print
from common.config import load_config, preprocessing
from common.distributed import DistributedContext, start_process
from common.weights import build_network
from dali_pipelines.batches import Batch
from dali_pipelines.errors import InputError
from model.timesformer import multiply_adds
from training.engine import Trainer
from training.monitor import NullMonitor

LOADER, NETWORK, TOGETHER = CONTESTANTS = ("loader alone", "network alone", "together")
_ENOUGH = 0.95  # of the slower one alone: the cores hardly limit the two together
_AHEAD = 6  # batches; more than the loader prepares ahead
_TICKS = os.sysconf("SC_CLK_TCK")  # per second, of the clocks in /proc
_QUIET = 0.9  # of the cores; if fewer are free, other programs are running


@dataclass(frozen=True)
class Turn:
    """One turn of one contestant, over all processes."""

    clips_per_second: float
    step_ms: float
    wait_ms: float
    """Time per step until the loader gives its batches, in the process that waits longest."""
    cpu_ms_per_clip: float
    """CPU time of all processes and workers."""
    free_cores: float
    """Cores that it used or that were idle; other programs used the rest."""


def benchmark_train(
    config: str, override: Sequence[str], *, steps: int, rounds: int, split_cores: bool, out: Path
) -> None:
    """Measures; the main process prints the table and writes train.json into `out`. Raises `InputError`.

    split_cores: give half of the CPU cores to the loader and half to the network, so that they do not compete.
    """
    settings = load_config(config, list(override))
    settings.data.val = settings.data.train  # nothing is validated
    settings.train.pretrained = None  # does not change the speed
    with start_process(settings.device) as process, tempfile.TemporaryDirectory() as settings.output:
        settings.output = process.gather(settings.output)[0]  # all processes use the folder of the main process
        everything = os.sched_getaffinity(0)
        cores = sum(process.gather(len(everything) / process.local_world_size))
        of_loader, of_network = halves(process) if split_cores else (everything, everything)
        if split_cores and settings.data.workers is None:
            settings.data.workers = len(of_loader)
        torch.set_num_threads(len(of_network) if split_cores else process.cores)
        os.sched_setaffinity(0, of_network)
        with contextlib.redirect_stdout(sys.stderr):
            trainer = Trainer(settings, process, resume=False)
        try:
            turns = Contest(trainer, steps, cores, of_loader, of_network).turns(rounds)
            tips = hints(trainer)
            gib = torch.cuda.max_memory_allocated() / 2**30 if process.device.type == "cuda" else None
        finally:
            trainer.train_loader.close()
            trainer.saver.close()
            os.sched_setaffinity(0, everything)
        unreadable = sum(process.gather(len(trainer.train_loader.stats.faults)))
    if not process.is_main:
        return
    verdict = judge(turns, cores, tips)
    report: Report = {
        "command": command(),
        "machine": machine() | {"cores": cores, "threads": torch.get_num_threads()},
        "settings": {
            "config": config,
            "override": " ".join(override),
            "device": str(process.device),
            "processes": process.world_size,
            "batch_size": trainer.batch_size,
            "micro_steps": trainer.micro_steps,
            "precision": trainer.precision,
            "compiled": trainer.state.mode != "eager",
            "split_cores": split_cores,
            "steps": steps,
            "rounds": rounds,
        },
        "unreadable_clips": unreadable,
        "turns": {name: [asdict(turn) for turn in each] for name, each in turns.items()},
        "gpu": None if gib is None else gpu_figures(trainer, verdict["medians"], gib),
        **verdict,
    }
    out.mkdir(parents=True, exist_ok=True)
    write_and_print(report, out / "train.json", table(report))


def gpu_figures(trainer: Trainer, medians: dict[str, dict[str, float]], gib: float) -> dict[str, float]:
    """Utilisation of one GPU: `gib` of memory, and operations/s (three forward passes per step), compared with a
    large matrix product."""
    config, classes = trainer.config, len(trainer.classes)
    a_clip = multiply_adds(lambda: build_network(config.model, preprocessing(config.data), classes))
    flops = 6 * a_clip / trainer.process.world_size
    peak = gpu_matmul_tflops("cuda")
    found = {f"{name}, TFLOP/s": flops * medians[name]["clips_per_second"] / 1e12 for name in (NETWORK, TOGETHER)}
    shares = {f"{name}, % of a matrix product": 100 * found[f"{name}, TFLOP/s"] / peak for name in (NETWORK, TOGETHER)}
    return found | {"matrix product, TFLOP/s": peak} | shares | {"GiB": gib}


def halves(process: DistributedContext) -> tuple[set[int], set[int]]:
    """Splits the cores of this process into (loader's, network's). Raises `InputError`."""
    mine = sorted(os.sched_getaffinity(0))[process.local_rank :: process.local_world_size]
    if process.device.type != "cpu" or len(mine) < 2:
        raise InputError(
            "--split-cores needs the CPU as the device, and two cores or more per process; the device is "
            f"{process.device}, with {len(mine)} for this process"
        )
    return set(mine[: len(mine) // 2]), set(mine[len(mine) // 2 :])


class Contest:
    """Runs the loader and the network of a trainer, separately or together."""

    def __init__(self, trainer: Trainer, steps: int, cores: float, of_loader: set[int], of_network: set[int]):
        trainer.monitor.close()
        trainer.monitor = NullMonitor()
        self._trainer, self._steps, self._cores = trainer, steps, cores
        self._of_loader, self._of_network = of_loader, of_network
        self._warm_up = -(-_AHEAD // trainer.micro_steps)
        self._batches = self._endless()
        *_, real = itertools.islice(self._batches, trainer.micro_steps)
        self._synthetic = real._replace(clips=torch.rand_like(real.clips), valid=torch.ones_like(real.valid))
        trainer.train_loader.close()

    def turns(self, rounds: int) -> dict[str, list[Turn]]:
        """Runs one turn of each contestant per round."""
        found: dict[str, list[Turn]] = {name: [] for name in CONTESTANTS}
        for number in range(rounds):
            first = number % len(CONTESTANTS)
            for name in (*CONTESTANTS[first:], *CONTESTANTS[:first]):
                if self._trainer.process.is_main:
                    progress(f"round {number + 1} of {rounds}: {name}")
                found[name].append(self._turn(name, epoch=number))
        return found

    def _turn(self, name: str, epoch: int) -> Turn:
        process, loader = self._trainer.process, self._trainer.train_loader
        if name == NETWORK:
            loader.close()
        else:
            loader.set_epoch(epoch)
            os.sched_setaffinity(0, self._of_loader)  # new workers and threads inherit it
            self._step(LOADER)
            os.sched_setaffinity(0, self._of_network)
        for _ in range(self._warm_up):
            self._step(name)
        self._wait()
        process.barrier()
        before = self._clocks()
        for _ in range(self._steps):
            self._step(name)
        self._wait()
        mine = [end - start for start, end in zip(before, self._clocks())]
        seconds, waited, cpu_seconds, idle_seconds = zip(*process.gather(mine))
        cpu = max(sum(cpu_seconds), 1 / _TICKS)  # a turn can be shorter than a tick of the clock
        clips = self._steps * self._trainer.config.optim.global_batch_size
        return Turn(
            clips_per_second=clips / max(seconds),
            step_ms=1000 * max(seconds) / self._steps,
            wait_ms=1000 * max(waited) / self._steps,
            cpu_ms_per_clip=1000 * cpu / clips,
            free_cores=min((cpu + sum(idle_seconds)) / max(seconds), self._cores),
        )

    def _endless(self) -> Iterator[Batch]:
        while True:
            yield from self._trainer.batches()

    def _step(self, name: str) -> None:
        count = self._trainer.micro_steps
        mine = itertools.repeat(self._synthetic, count) if name == NETWORK else itertools.islice(self._batches, count)
        if name != LOADER:
            self._trainer.train_step(mine)
            return
        for _ in mine:
            self._wait()

    def _wait(self) -> None:
        """Waits for this CUDA stream; DALI continues to work ahead in others."""
        if self._trainer.process.device.type == "cuda":
            torch.cuda.current_stream(self._trainer.process.device).synchronize()

    def _clocks(self) -> tuple[float, ...]:
        """Seconds of wall clock, waiting for the loader, CPU time and idle time (counted by one process per
        machine)."""
        idle = sum(map(int, Path("/proc/stat").read_text().split()[4:6])) / _TICKS
        is_first = self._trainer.process.local_rank == 0
        return time.perf_counter(), self._trainer.train_loader.stats.wait_seconds, cpu_seconds(), idle * is_first


# -- the report --


def judge(turns: dict[str, list[Turn]], cores: float, hints: dict[str, list[str]]) -> dict[str, Any]:
    """Computes medians, bounds and the ratio of both together to the bounds; names the bottleneck and remedies.

    cores: CPU cores of all machines.
    hints: changes that would make "data" and "network" faster.
    """
    medians = {name: _median(each) for name, each in turns.items()}
    limits = bounds(medians[LOADER], medians[NETWORK])
    rounds = list(zip(turns[TOGETHER], map(bounds, turns[LOADER], turns[NETWORK])))
    ratios = {name: spread([both.clips_per_second / each[name] for both, each in rounds]) for name in limits}
    a, b = (medians[name].clips_per_second for name in (LOADER, NETWORK))
    if limits["cores"] < _ENOUGH * limits["slower"]:
        bound_by, tips = "cores", ["more cores", *hints["data"], *hints["network"]]
        verdict = (
            f"loader and network compete for the cores, which allow {limits['cores']:.1f} clips/s together, and "
            f"{limits['turns']:.1f} if the two take turns"
        )
    elif a < b:
        bound_by, tips = "data", hints["data"]
        verdict = f"bound by data: the loader supplies {a:.1f} clips/s, and the network could consume {b:.1f}"
    else:
        bound_by, tips = "network", hints["network"]
        verdict = f"bound by the network: it consumes {b:.1f} clips/s, and the loader could supply {a:.1f}"
    free = min(turn.free_cores for turn in medians.values())
    busy = (
        f"\nother programs were running: only {free:.1f} of {cores:g} cores were free" if free < _QUIET * cores else ""
    )
    return {
        "medians": {name: asdict(turn) for name, turn in medians.items()},
        "bounds": limits,
        "together_over": ratios,
        "data_wait_share": medians[TOGETHER].wait_ms / medians[TOGETHER].step_ms,
        "bound_by": bound_by,
        "verdict": f"{verdict}\ntry {'; '.join(tips)}{busy}",
    }


def bounds(loader: Turn, network: Turn) -> dict[str, float]:
    """Upper bounds of both together in clips/s: the slower one alone ("slower"), both on the cores that it had
    ("cores"), and both in turns ("turns")."""
    slower = min(loader, network, key=lambda turn: turn.clips_per_second)
    return {
        "slower": slower.clips_per_second,
        "cores": 1000 * slower.free_cores / (loader.cpu_ms_per_clip + network.cpu_ms_per_clip),
        "turns": 1 / (1 / loader.clips_per_second + 1 / network.clips_per_second),
    }


def hints(trainer: Trainer) -> dict[str, list[str]]:
    """Changes in settings that would make "data" and "network" faster."""
    data, train, process = trainer.config.data, trainer.config.train, trainer.process
    few_workers = data.workers is not None and data.workers < process.cores
    found = {
        "data": {
            f"data.workers={process.cores}": few_workers,
            "data.decode=auto, which uses NVDEC": process.device.type == "cuda" and data.decode == "host",
            "data.views_per_decode=2, two clips out of one decode": data.views_per_decode == 1,
            "smaller videos, or more keyframes in them": True,
        },
        "network": {
            "train.precision=bf16": trainer.precision == "float32",
            "train.compile=true": trainer.state.mode == "eager",
            "train.activation_checkpointing=false": train.activation_checkpointing,
            f"data.batch_size over {trainer.batch_size}": trainer.micro_steps > 1,
            "more processes": True,
        },
    }
    return {name: [hint for hint, is_open in each.items() if is_open] for name, each in found.items()}


def table(report: Report) -> str:
    """The report as text."""
    machine = report["machine"]
    lines = [f"{machine['cpu']}, {machine['cores']:g} cores, {machine['threads']} threads; GPU: {machine['gpu']}"]
    lines += [listed(machine["versions"]), listed(report["settings"])]
    if report["unreadable_clips"]:
        lines.append(f"{report['unreadable_clips']} clips could not be read; they still count")
    if report["gpu"]:
        lines.append(", ".join(f"{name} {value:.1f}" for name, value in report["gpu"].items()))
    lines += ["", f"{'':14} clips/s             (rounds)   ms/step  waiting  CPU ms/clip  cores at work, free"]
    for name, one in report["medians"].items():
        speeds = [turn["clips_per_second"] for turn in report["turns"][name]]
        busy = one["cpu_ms_per_clip"] * one["clips_per_second"] / 1000
        lines.append(
            f"{name:14} {one['clips_per_second']:7.1f}  {min(speeds):7.1f} .. {max(speeds):7.1f} {one['step_ms']:9.1f} "
            f"{one['wait_ms']:8.1f} {one['cpu_ms_per_clip']:12.1f} {busy:14.2f} {one['free_cores']:5.2f}"
        )
    whats = {"slower": "the slower one alone", "cores": "what the cores allow", "turns": "taking turns"}
    lines.append("")
    for name, what in whats.items():
        if name == "slower" or report["bound_by"] == "cores":
            ratio, bound = report["together_over"][name], report["bounds"][name]
            spread = f"{ratio['median']:.2f} ({ratio['low']:.2f} .. {ratio['high']:.2f})"
            lines.append(f"together / {what} ({bound:.1f} clips/s): {spread}")
    lines.append(f"a step waits for data {report['data_wait_share']:.0%} of its time")
    return "\n".join([*lines, "", report["verdict"]])


def _median(turns: list[Turn]) -> Turn:
    return Turn(*(statistics.median(values) for values in zip(*(asdict(turn).values() for turn in turns))))
