"""Chains of kills: one run that is killed and resumed again and again until it is finished."""

import contextlib
import os
import random
import signal
import time
from pathlib import Path
from typing import NamedTuple

import psutil

from tests.torture.runs import (
    BrokenPromiseError,
    Run,
    Settings,
    compare_runs,
    find_leftovers,
    living_children,
    shared_leftovers,
)

PHASES = ("starting", "resume", "training", "end of epoch", "validation", "SWA", "saving")
WHO = {
    "main process": "SIGKILL of the main process",
    "all processes": "SIGKILL of all processes at once",
    "rank": "SIGKILL of one rank of two",
    "worker": "SIGKILL of a loader's worker",
    "SIGTERM": "SIGTERM",
    "SIGTERM, SIGKILL": "SIGTERM, and SIGKILL before it has ended",
    "Ctrl-C": "Ctrl-C",
}
_START_S = 5.0  # about as long as a start takes; a kill in it comes at any moment
_TARGETS = {"starting": 2, "training": 4, "end of epoch": 2, "validation": 3, "saving": 3, "SWA": 1}  # weights
_MOST_STARTS = 40
_STEPS_BETWEEN = 4  # kills of workers: two deaths at one sample are the sample's fault


class Kind(NamedTuple):
    """A kind of run. `reference`: the unbroken run that it must equal."""

    title: str
    reference: str
    data: str = "good"
    ranks: tuple[int, ...] = (1,)
    overrides: tuple[str, ...] = ()
    slow_s: float = 0.0
    within: float = 0.0


_NOT_DRAWN = ("model.drop_path=0", "mix.cutmix_prob=0", "mix.mixup_alpha=0")
_SGD = ("optim.name=sgd", "optim.lr=0.05", "optim.warmup_start_lr=0.01")

KINDS = {
    "one": Kind("one process", "one"),
    "two": Kind("two ranks", "two", ranks=(2,)),
    "slow": Kind("one process, slow disk", "one", slow_s=0.05),
    "damaged": Kind("one process, 10 % damaged files", "damaged", data="damaged"),
    "changing": Kind("1 and 2 ranks in turn", "changing", ranks=(1, 2), overrides=_NOT_DRAWN + _SGD, within=1e-4),
}


class Kill(NamedTuple):
    kind: str
    who: str
    phase: str
    ranks: int


class Chain(NamedTuple):
    """What came of one."""

    kind: str
    kills: list[Kill]
    differences: list[str]
    leftovers: list[str]
    left_for_next_start: int
    """Kills after which semaphores had names until the next start."""
    failure: str
    folder: str


def unbroken(name: str, folder: Path, data: dict[str, Path]) -> None:
    """The run that nothing happens to."""
    kind = KINDS[name]
    settings = Settings(folder, data[kind.data] / "config.yaml", kind.overrides)
    with Run(settings, ranks=kind.ranks[0], resume=False) as run:
        if status := run.wait():
            raise BrokenPromiseError(f"the unbroken run ends with {status}: {run.last_words()}")


def kill_chain(name: str, folder: Path, data: dict[str, Path], references: dict[str, Path], seed: int, most: int):
    """Kills a run of the kind `name` up to `most` times, lets it finish, and compares it with the unbroken one."""
    kind, draw = KINDS[name], random.Random(seed)
    settings = Settings(folder, data[kind.data] / "config.yaml", kind.overrides, slow_s=kind.slow_s)
    reference = settings._replace(folder=references[kind.reference])
    kills: list[Kill] = []
    differences, leftovers, left, failure = [], [], 0, ""
    shared = set(os.listdir("/dev/shm"))
    try:
        for _ in range(_MOST_STARTS):
            with Run(settings, ranks=draw.choice(kind.ranks)) as run:
                is_done = _torture(run, name, draw, kills, most)
                leftovers += [each for each in find_leftovers(settings.temporary) if each.startswith("process")]
            left += bool(shared_leftovers(shared)) and not is_done
            if is_done:
                break
        else:
            raise BrokenPromiseError(f"the run is not finished after {_MOST_STARTS} starts")
        leftovers += find_leftovers(settings.temporary, shared_before=shared)
        differences = compare_runs(settings, reference, within=kind.within)
    except Exception as error:  # a result like any other: the report names it
        failure = f"{type(error).__name__}: {error}"
    return Chain(name, kills, differences, leftovers, left, failure, str(folder))


def _torture(run: Run, name: str, draw: random.Random, kills: list[Kill], most: int) -> bool:
    """Kills what the lots say, until the run has ended. Returns whether it is finished."""
    while len(kills) < most:
        who = draw.choice(
            ["main process"] * 3 + ["all processes"] * 2 + ["worker"] * 2 + ["SIGTERM", "SIGTERM, SIGKILL", "Ctrl-C"]
        )
        if run.ranks > 1:
            who = draw.choice(["rank"] * 4 + ["all processes", "worker", "SIGTERM"])
        rank = draw.randrange(run.ranks)
        if not _await_moment(run, who, rank, draw):
            break
        phase = _strike(run, who, rank, draw)
        if phase is None:
            break
        kills.append(Kill(name, who, phase, run.ranks))
        if who != "worker":
            return False
        run.wait_for_batches(_STEPS_BETWEEN * run.ranks)
    if status := run.wait():
        raise BrokenPromiseError(f"exit status {status} without a kill; {run.last_words()}")
    return True


def _await_moment(run: Run, who: str, rank: int, draw: random.Random) -> bool:
    """Waits for a phase that the lots choose, and a random time more. Returns False if the run ends before."""
    phase = draw.choices(list(_TARGETS), _TARGETS.values())[0]
    if phase == "starting":
        if who == "worker":
            return run.wait_until(lambda: run.workers(rank), poll_s=0.02) and _pause(draw.uniform(0, 0.5))
        return _pause(max(draw.uniform(0, _START_S * run.ranks) - (time.monotonic() - run.started), 0))
    if phase == "training":
        return run.wait_for_batches(draw.randrange(1, 8) * run.ranks) and _pause(draw.uniform(0, 0.05))
    longest = {"end of epoch": 0.001, "validation": 0.5, "SWA": 0.5, "saving": 0.01 + 10 * run.settings.slow_s}[phase]
    watched = 0 if phase == "saving" else rank  # rank 0 saves
    return run.wait_until(lambda: run.phase(watched) == phase) and _pause(draw.uniform(0, longest))


def _pause(seconds: float) -> bool:
    time.sleep(seconds)
    return True


def _strike(run: Run, who: str, rank: int, draw: random.Random) -> str | None:
    """Kills, and sees that it was that which ended the process; the phase in which it died. None if the run had ended
    before. Raises `BrokenPromiseError` if it ends in a way that is not promised."""
    if who == "worker":
        return _kill_worker(run, rank, draw)
    if run.is_over:
        return None
    phase = run.phase(rank)
    if who == "SIGTERM":
        run.process.send_signal(signal.SIGTERM)
        return _expect(run, {75, -signal.SIGTERM} if run.ranks == 1 else None, phase)
    if who == "SIGTERM, SIGKILL":
        run.process.send_signal(signal.SIGTERM)
        _pause(draw.uniform(0, 0.2))
        run.process.kill()
        return _expect(run, {-signal.SIGKILL, 75, -signal.SIGTERM}, run.phase(rank))
    if who == "Ctrl-C":
        os.killpg(run.process.pid, signal.SIGINT)
        return _expect(run, {130, -signal.SIGINT}, phase)
    if who == "rank":
        if not run.wait_until(lambda: run.rank_process(rank), poll_s=0.02):
            return None
        process = run.rank_process(rank)
    else:
        process = psutil.Process(run.process.pid)
    with contextlib.suppress(psutil.NoSuchProcess):
        process.kill()
    if who == "all processes":
        while processes := living_children():
            for each in processes:
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.kill()
    status = run.wait()
    if status == 0:
        return None
    if who == "rank":
        if f"(SIGKILL) received by PID {process.pid}" not in run.said:
            raise BrokenPromiseError(f"exit status {status}, though rank {rank} was killed; {run.last_words()}")
    elif status != -signal.SIGKILL:
        raise BrokenPromiseError(f"exit status {status} after SIGKILL; {run.last_words()}")
    return run.phase(rank)  # the board is as it was when the process died


def _kill_worker(run: Run, rank: int, draw: random.Random) -> str | None:
    while not run.is_over:
        phase, workers = run.phase(rank), run.workers(rank)
        for worker in draw.sample(workers, len(workers)):
            with contextlib.suppress(psutil.NoSuchProcess):
                worker.kill()
                return phase
        time.sleep(0.01)
    return None


def _expect(run: Run, statuses: set[int] | None, phase: str) -> str | None:
    """The phase, if the run ends with one of these; None if it had ended by itself. None: any but 0."""
    status = run.wait()
    if status == 0:
        return None
    if statuses is not None and status not in statuses:
        raise BrokenPromiseError(f"exit status {status}, expected {sorted(statuses)}; {run.last_words()}")
    if statuses and status in (-signal.SIGTERM, -signal.SIGINT) and run.has_begun:
        raise BrokenPromiseError(f"ended by the signal itself, though it had begun; {run.last_words()}")
    return phase
