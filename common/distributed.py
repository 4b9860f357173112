"""One process, or the processes that torchrun started."""

import contextlib
import datetime
import json
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from common.preemption import end
from dali_pipelines.errors import InputError

WAITING = "waiting for the others"
_GRACE_S = 3  # for torchrun to end this process because of the one that failed first


@dataclass
class Whereabouts:
    """What this process is doing, for those that wait for it."""

    step: int = 0
    doing: str = "starting"
    count: int = 0
    """Grows with every change."""

    def at(self, doing: str, step: int | None = None) -> None:
        self.step = self.step if step is None else step
        self.doing = doing
        self.count += 1


@dataclass(frozen=True)
class DistributedContext:
    """This process among all: `rank` of `world_size`, `local_rank` of `local_world_size` on this machine."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device
    store: dist.Store | None = None
    """What all processes can read and write; None where there is one."""
    whereabouts: Whereabouts = field(default_factory=Whereabouts)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def cores(self) -> int:
        """This process's share of the CPU cores that it may use, at least one."""
        return max(len(os.sched_getaffinity(0)) // self.local_world_size, 1)

    def workers(self, wanted: int | None, most: int) -> int:
        """Processes of a loader that has `most` videos for them: `data.workers`, or one a core where that is None."""
        return min(self.cores if wanted is None else wanted, most)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """`values` on this process's device, summed over all processes."""
        values = values.to(self.device)
        if self.world_size > 1:
            with self._waiting():
                dist.all_reduce(values)
        return values

    def gather(self, value: object) -> list:
        """`value` of every process, in the order of ranks; on every process."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        with self._waiting():
            dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        if self.world_size > 1:
            with self._waiting():
                dist.barrier()

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        before = self.whereabouts.doing
        self.whereabouts.at(WAITING)
        yield
        self.whereabouts.at(before)


@contextlib.contextmanager
def start_process(device: str, *, timeout_s: float = 1800) -> Iterator[DistributedContext]:
    """Joins the processes that torchrun started, if it did; `device` is auto, cpu, cuda or cuda:N.

    `timeout_s`: seconds after which a collective operation fails. Where another process has ended, this one waits a
    moment for torchrun to end it too, and raises `InputError`: what went wrong stands in the other's error.
    """
    try:
        automatic = "cuda" if torch.cuda.is_available() else "cpu"
        wanted = torch.device(automatic if device == "auto" else device)
        known = wanted.type in ("cpu", "cuda")
    except RuntimeError:
        known = False
    if not known:
        raise InputError(f"device is {device!r}; expected auto, cpu, cuda or cuda:N")
    if wanted.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device is {device!r}, but torch finds no GPU here")
    defaults = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    try:
        rank, world_size, local_rank, local_world_size = (int(os.environ.get(*each)) for each in defaults.items())
    except ValueError as error:
        raise InputError(f"one of {', '.join(defaults)} is no number ({error}); start with torchrun") from None
    if wanted.type == "cuda":
        wanted = torch.device("cuda", local_rank if wanted.index is None else wanted.index)
        if wanted.index >= torch.cuda.device_count():
            raise InputError(
                f"process {local_rank} of {local_world_size} on this machine needs GPU {wanted.index}, and there are "
                f"{torch.cuda.device_count()}: start torchrun with --nproc-per-node {torch.cuda.device_count()}"
            )
        torch.cuda.set_device(wanted)
    if world_size == 1:
        yield DistributedContext(rank, world_size, local_rank, local_world_size, wanted)
        return
    timeout = datetime.timedelta(seconds=timeout_s)
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
        store = dist.PrefixStore(_agree_on_name(store, rank, world_size, timeout_s), store)
        dist.init_process_group(
            "nccl" if wanted.type == "cuda" else "gloo",
            store=dist.PrefixStore("group", store),
            rank=rank,
            world_size=world_size,
            timeout=timeout,
            device_id=wanted if wanted.type == "cuda" else None,
        )
    except (RuntimeError, ValueError) as error:  # torch's for a port in use, and for a variable that is missing
        place = ":".join(os.environ.get(name, f"({name} is not set)") for name in ("MASTER_ADDR", "MASTER_PORT"))
        raise InputError(
            f"the {world_size} processes do not find each other at {place}: {str(error).splitlines()[0][:300]}; if the "
            "port is in use, name another one to torchrun, with --master-port or --rdzv-endpoint"
        ) from None
    try:
        yield DistributedContext(
            rank, world_size, local_rank, local_world_size, wanted, dist.PrefixStore("whereabouts", store)
        )
    except RuntimeError as error:
        if not is_lost_connection(error):
            raise
        time.sleep(_GRACE_S)
        raise InputError("another process has ended; its own error, or torchrun's report, says why") from None
    # Only here: where this process fails, the others shall not notice before it has said why.
    dist.destroy_process_group()


def _agree_on_name(store: dist.Store, rank: int, world_size: int, timeout_s: float) -> str:
    """A name that these processes have agreed on, and none before them. torchrun (torch 2.13) keeps its store when it
    starts processes again, with the addresses in it of those that are gone."""
    mine = uuid.uuid4().hex
    if rank == 0:
        store.set("root", mine)
        members = [store.get(f"{mine}/{other}").decode() for other in range(1, world_size)]
        store.set(f"{mine}/members", " ".join(members))
        return mine
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        root = store.get("root").decode()  # of those before, maybe: then this process is not among its members
        store.set(f"{root}/{rank}", mine)
        if store.check([f"{root}/members"]) and mine in store.get(f"{root}/members").decode():
            return root
        time.sleep(0.05)
    raise RuntimeError(f"rank 0 has not counted this process in within {timeout_s:g} s")


def is_lost_connection(error: BaseException) -> bool:
    """Whether a collective operation has failed because of another process."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in ("gloo", "NCCL", "Connection closed"))
    )


class HangWatch:
    """Ends this process where it makes no progress for `timeout_s`, with a line that says which process hangs and
    where. torchrun then ends the others.

    A process that hangs while it does something itself says so, with the stacks of its threads. One that waits for
    the others gives them a quarter more time, and then names those that are furthest behind: they may not be able to
    say anything. Each looks at its own whereabouts, counting looks and not the clock, so that a job that was stopped
    as a whole has not hung. `last_words` is called before the end, and may save what there is.
    """

    def __init__(self, process: DistributedContext, timeout_s: float, last_words: Callable[[], str]):
        self._process, self._timeout_s, self._last_words = process, timeout_s, last_words
        self._tick = min(timeout_s / 10, 5)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="hang watch", daemon=True)

    def __enter__(self) -> "HangWatch":
        if self._process.world_size > 1:
            self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        here, looks, last = self._process.whereabouts, 0, -1
        while True:
            looks = looks + 1 if here.count == last else 0
            last = here.count
            with contextlib.suppress(dist.DistError, RuntimeError):
                self._process.store.set(str(self._process.rank), json.dumps([here.step, here.doing]))
            waits = here.doing == WAITING
            if looks * self._tick >= self._timeout_s * (1.25 if waits else 1):
                self._give_up(waits=waits)
            if self._stop.wait(self._tick):
                return

    def _give_up(self, *, waits: bool) -> None:
        here = self._process.whereabouts
        if waits:
            complaint = f"waited {1.25 * self._timeout_s:g} s at step {here.step} for {self._who_is_behind()}"
        else:
            complaint = f"no progress for {self._timeout_s:g} s at step {here.step}, {here.doing}"
        end(f"error: {complaint} (train.hang_timeout_s)", 1, stacks=not waits, save=self._last_words)

    def _who_is_behind(self) -> str:
        places = {rank: (-1, "not heard of") for rank in range(self._process.world_size) if rank != self._process.rank}
        with contextlib.suppress(dist.DistError, RuntimeError):
            for rank in places:
                if self._process.store.check([str(rank)]):
                    places[rank] = json.loads(self._process.store.get(str(rank)))
        # Those that wait as well are not the ones that are waited for.
        late = {rank: place for rank, place in places.items() if place[1] != WAITING} or places
        step = min(place[0] for place in late.values())
        return ", ".join(
            f"rank {rank} ({doing if at < 0 else f'last seen at step {at}, {doing}'})"
            for rank, (at, doing) in late.items()
            if at == step
        )
