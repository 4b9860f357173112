"""Kills and mistreats runs of train.py, and compares what comes of them with unbroken runs, bit by bit.

    python -m tests.torture                        # 200 kills and every attack: `make torture`
    python -m tests.torture --kills 0 --only links --out /tmp/torture

Exits with 1 if anything is not as promised; the folders of those runs are kept.
"""

import argparse
import datetime
import os
import platform
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path

import torch
from tqdm import tqdm

from tests.torture.attacks import ATTACKS, attack
from tests.torture.kills import KINDS, PHASES, WHO, Chain, kill_chain, unbroken
from tests.torture.runs import damage_data, isolate, make_data

_KILLS_A_CHAIN = 10
_TURNS = ("one", "two", "slow", "one", "changing", "damaged")
_REPORT_S = 0.1 if sys.stderr.isatty() else 60
_COVERED_FROM = 150  # kills; fewer need not hit every phase


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.torture", description="Torture runs of train.py.")
    parser.add_argument("--kills", type=int, default=200, help="default 200")
    parser.add_argument("--only", default="", metavar="TEXT", help="attacks with this in their name; default: all")
    parser.add_argument("--kind", choices=KINDS, help="kill runs of this kind only")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the lots; default: the clock")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="default: one a core")
    parser.add_argument("--out", type=Path, help="folder of the runs; default: one in the temporary folder")
    arguments = parser.parse_args()
    root = (arguments.out or Path(tempfile.mkdtemp(prefix="torture_"))).resolve()
    names = [name for name in ATTACKS if arguments.only in name]
    data = {"good": make_data(root / "good")}
    data["damaged"] = damage_data(data["good"], root / "damaged")
    started = time.monotonic()
    spawned = {"mp_context": get_context("spawn"), "initializer": isolate}
    with ProcessPoolExecutor(arguments.jobs, **spawned) as pool:
        references = {name: root / f"unbroken_{name}" for name in ("one", "two", "damaged", "changing")}
        for job in [pool.submit(unbroken, name, folder, data) for name, folder in references.items()]:
            job.result()
        jobs = [
            pool.submit(attack, name, root / f"attack_{n}", data, references, arguments.seed + n)
            for n, name in enumerate(names)
        ]
        chains = list(_kill(pool, arguments, root, data, references))
        outcomes = {name: job.result() for name, job in zip(names, tqdm(jobs, "attacks", mininterval=_REPORT_S))}
    minutes = (time.monotonic() - started) / 60
    problems = _report(chains, outcomes, arguments, minutes)
    if problems:
        print(f"\nmake torture: {len(problems)} of these are not as promised; see {root}", *problems, sep="\n  ")
        return 1
    if arguments.out is None:
        shutil.rmtree(root, ignore_errors=True)
    print("\nmake torture: passed")
    return 0


def _kill(pool: ProcessPoolExecutor, arguments, root: Path, data, references) -> Iterator[Chain]:
    """Starts chains until there are enough kills; running chains count with their share of the missing ones."""
    under_way: dict[Future, int] = {}
    count = number = 0
    with tqdm(total=arguments.kills, unit="kill", mininterval=_REPORT_S) as bar:
        while count < arguments.kills or under_way:
            most = min(arguments.kills - count - sum(under_way.values()), _KILLS_A_CHAIN)
            if len(under_way) < arguments.jobs and most > 0:
                kind = arguments.kind or _TURNS[number % len(_TURNS)]
                task = kind, root / f"chain_{number}", data, references, arguments.seed + number, most
                under_way[pool.submit(kill_chain, *task)] = most
                number += 1
                continue
            for job in wait(under_way, return_when=FIRST_COMPLETED).done:
                del under_way[job]
                chain = job.result()
                count += len(chain.kills)
                bar.update(len(chain.kills))
                if not _problem(chain):
                    shutil.rmtree(chain.folder, ignore_errors=True)
                yield chain
                if chain.failure and not chain.kills:  # it would run forever
                    count = arguments.kills


def _problem(chain: Chain) -> str:
    """What is wrong with it, "" if nothing."""
    wrong = [chain.failure] * bool(chain.failure) + [f"left behind: {each}" for each in chain.leftovers[:3]]
    wrong += [f"not equal: {each}" for each in chain.differences[:3]]
    kills = ", ".join(f"{kill.who} in {kill.phase}" for kill in chain.kills)
    return f"{KINDS[chain.kind].title}: {'; '.join(wrong)} (after {kills}; {chain.folder})" if wrong else ""


def _report(chains: list[Chain], outcomes: dict[str, tuple[str, bool]], arguments, minutes: float) -> list[str]:
    """Prints the tables; what is not as promised."""
    problems = [problem for chain in chains if (problem := _problem(chain))]
    problems += [f"{name}: {outcome}" for name, (outcome, is_good) in outcomes.items() if not is_good]
    kills = [kill for chain in chains for kill in chain.kills]
    equal = sum(len(chain.kills) for chain in chains if not _problem(chain))
    print(
        f"\n{datetime.date.today()}, seed {arguments.seed}, {minutes:.0f} minutes, {arguments.jobs} runs at a time, "
        f"{os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}"
    )
    if chains:
        print(f"{equal} of {len(kills)} kills, in {len(chains)} runs, end equal to an unbroken run and leave nothing")
        left = sum(chain.left_for_next_start for chain in chains)
        print(f"after {left} of them, semaphores had names until the next start\n")
        counts = Counter((kill.who, kill.phase) for kill in kills)
        _print_table(
            ["killed", *PHASES, "all"],
            [
                [WHO[who], *(counts[who, phase] or "" for phase in PHASES), sum(counts[who, phase] for phase in PHASES)]
                for who in WHO
            ],
        )
        rows = []
        for kind, (title, *_) in KINDS.items():
            mine = [chain for chain in chains if chain.kind == kind]
            good = [chain for chain in mine if not _problem(chain)]
            rows.append([title, len(mine), *(sum(len(each.kills) for each in some) for some in (mine, good))])
        _print_table(["runs", "number", "kills", "of which end equal"], rows)
        if len(kills) >= _COVERED_FROM:
            missing = set(PHASES) - {kill.phase for kill in kills} | set(WHO) - {kill.who for kill in kills}
            problems += [f"never killed: {each}" for each in sorted(missing)]
    if outcomes:
        _print_table(
            ["attack", "as promised", "what happens"],
            [[name, "yes" if is_good else "NO", outcome] for name, (outcome, is_good) in outcomes.items()],
        )
    return problems


def _print_table(header: list[str], rows: list[list]) -> None:
    for row in (header, ["---"] * len(header), *rows):
        print("|", " | ".join(str(cell).replace("|", "/") for cell in row), "|")
    print(flush=True)


if __name__ == "__main__":
    sys.exit(main())
