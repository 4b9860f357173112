"""The processes of a torchrun job, and how to notice that one of them hangs."""

import contextlib
import datetime
import json
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

import torch
import torch.distributed as dist

from common.preemption import end
from dali_pipelines.errors import InputError

T = TypeVar("T")

WAITING = "waiting for the others"
_GRACE_S = 3  # for torchrun to end this process after another one failed first


@dataclass
class Heartbeat:
    """What this process is doing, for the processes that wait for it."""

    step: int = 0
    activity: str = "starting"
    count: int = 0
    """Grows with every update."""

    def update(self, activity: str, step: int | None = None) -> None:
        """Records progress: what the process does now, and at which step."""
        self.step = self.step if step is None else step
        self.activity = activity
        self.count += 1


@dataclass(frozen=True)
class DistributedContext:
    """This process: rank `rank` of `world_size`, and `local_rank` of `local_world_size` on this machine."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device
    store: dist.Store = field(default_factory=dist.HashStore)
    """Keys and values that all processes can read and write."""
    heartbeat: Heartbeat = field(default_factory=Heartbeat)

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    @property
    def cores(self) -> int:
        """This process's share of the CPU cores that it may use, at least one."""
        return max(len(os.sched_getaffinity(0)) // self.local_world_size, 1)

    def workers(self, wanted: int | None, most: int) -> int:
        """Number of workers for `data.workers`=`wanted` (None: one per core), at most `most`, the number of videos."""
        return min(self.cores if wanted is None else wanted, most)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of `values` over all processes, on this process's device."""
        values = values.to(self.device)
        if self.world_size > 1:
            with self._waiting():
                dist.all_reduce(values)
        return values

    def gather(self, value: T) -> list[T]:
        """The `value` of every process, in the order of ranks, on every process."""
        if self.world_size == 1:
            return [value]
        values: list[T] = [value] * self.world_size
        with self._waiting():
            dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Waits until all processes have called it."""
        if self.world_size > 1:
            with self._waiting():
                dist.barrier()

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        before = self.heartbeat.activity
        self.heartbeat.update(WAITING)
        yield
        self.heartbeat.update(before)


@contextlib.contextmanager
def start_process(device: str, *, timeout_s: float = 1800) -> Iterator[DistributedContext]:
    """Join the processes that torchrun has started, if any; `device` is auto, cpu, cuda or cuda:N.

    timeout_s: seconds after which a collective operation fails. Raises `InputError` if the device is missing, if the
    processes cannot find each other, or if another process ends: then torchrun first gets a moment to end this one too,
    and the message points to the other's error.
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
        raise InputError(f"one of {', '.join(defaults)} is not a number ({error}); start with torchrun") from None
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
    except (RuntimeError, ValueError) as error:  # torch raises these for a port in use, and for a missing variable
        place = ":".join(os.environ.get(name, f"({name} is not set)") for name in ("MASTER_ADDR", "MASTER_PORT"))
        raise InputError(
            f"the {world_size} processes do not find each other at {place}: {str(error).splitlines()[0][:300]}; if the "
            "port is in use, name another one to torchrun, with --master-port or --rdzv-endpoint"
        ) from None
    try:
        yield DistributedContext(
            rank, world_size, local_rank, local_world_size, wanted, dist.PrefixStore("heartbeat", store)
        )
    except RuntimeError as error:
        if not is_lost_connection(error):
            raise
        time.sleep(_GRACE_S)
        raise InputError("another process has ended; its own error, or torchrun's report, says why") from None
    # Not in a `finally`: if this process fails, the others must not notice before it has reported the reason.
    dist.destroy_process_group()


def _agree_on_name(store: dist.Store, rank: int, world_size: int, timeout_s: float) -> str:
    """A name for the store that only these processes know. When torchrun (torch 2.13) restarts processes, it keeps the
    store, with the addresses of the old ones in it."""
    mine = uuid.uuid4().hex
    if rank == 0:
        store.set("root", mine)
        members = [store.get(f"{mine}/{other}").decode() for other in range(1, world_size)]
        store.set(f"{mine}/members", " ".join(members))
        return mine
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        root = store.get("root").decode()  # if it is left from the old processes, this one is not among its members
        store.set(f"{root}/{rank}", mine)
        if store.check([f"{root}/members"]) and mine in store.get(f"{root}/members").decode():
            return root
        time.sleep(0.05)
    raise RuntimeError(f"rank 0 has not counted this process in within {timeout_s:g} s")


def is_lost_connection(error: BaseException) -> bool:
    """Whether `error` says that a collective operation has failed because of another process."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in ("gloo", "NCCL", "Connection closed"))
    )


class HangWatch:
    """Ends this process if it makes no progress for `timeout_s`, and reports which process hangs, and where. torchrun
    then ends the others.

    A process that hangs in its own work reports that, with the stacks of its threads. A process that waits for others
    gives them a quarter more time, and then names those furthest behind, which may be unable to report anything
    themselves. Each process checks its own heartbeat, and counts checks instead of seconds: a job that was suspended as
    a whole is not taken for hanging. `save` is called before the end, and returns a message.
    """

    def __init__(self, process: DistributedContext, timeout_s: float, save: Callable[[], str]):
        self._process, self._timeout_s, self._save = process, timeout_s, save
        self._tick = min(timeout_s / 10, 5)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="hang watch", daemon=True)

    def __enter__(self) -> "HangWatch":
        if self._process.world_size > 1:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        heartbeat, num_checks, last = self._process.heartbeat, 0, -1
        while True:
            num_checks = num_checks + 1 if heartbeat.count == last else 0
            last = heartbeat.count
            with contextlib.suppress(dist.DistError, RuntimeError):
                self._process.store.set(str(self._process.rank), json.dumps([heartbeat.step, heartbeat.activity]))
            is_waiting = heartbeat.activity == WAITING
            if num_checks * self._tick >= self._timeout_s * (1.25 if is_waiting else 1):
                self._give_up(is_waiting=is_waiting)
            if self._stop.wait(self._tick):
                return

    def _give_up(self, *, is_waiting: bool) -> None:
        heartbeat = self._process.heartbeat
        if is_waiting:
            complaint = f"waited {1.25 * self._timeout_s:g} s at step {heartbeat.step} for {self._ranks_behind()}"
        else:
            complaint = f"no progress for {self._timeout_s:g} s at step {heartbeat.step}, {heartbeat.activity}"
        end(f"error: {complaint} (train.hang_timeout_s)", 1, stacks=not is_waiting, save=self._save)

    def _ranks_behind(self) -> str:
        places = {rank: (-1, "not heard of") for rank in range(self._process.world_size) if rank != self._process.rank}
        with contextlib.suppress(dist.DistError, RuntimeError):
            for rank in places:
                if self._process.store.check([str(rank)]):
                    places[rank] = json.loads(self._process.store.get(str(rank)))
        # Ranks that are waiting too are not to blame.
        late = {rank: place for rank, place in places.items() if place[1] != WAITING} or places
        step = min(place[0] for place in late.values())
        return ", ".join(
            f"rank {rank} ({activity if at < 0 else f'last seen at step {at}, {activity}'})"
            for rank, (at, activity) in late.items()
            if at == step
        )
