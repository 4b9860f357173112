"""One process, or the processes that torchrun started."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from dali_pipelines.errors import InputError


@dataclass(frozen=True)
class Process:
    """This process among all: `rank` of `world_size`, `local_rank` of `local_world_size` on this machine."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def cores(self) -> int:
        """This process's share of the CPU cores that it may use, at least one."""
        return max(len(os.sched_getaffinity(0)) // self.local_world_size, 1)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """`values` on this process's device, summed over all processes."""
        values = values.to(self.device)
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def gather(self, value: object) -> list:
        """`value` of every process, in the order of ranks; on every process."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()


@contextlib.contextmanager
def start_process(device: str) -> Iterator[Process]:
    """Joins the processes that torchrun started, if it did; `device` is auto, cpu, cuda or cuda:N."""
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
    rank, world_size, local_rank, local_world_size = (
        int(os.environ.get(name, default))
        for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1))
    )
    if wanted.type == "cuda":
        wanted = torch.device("cuda", local_rank if wanted.index is None else wanted.index)
        torch.cuda.set_device(wanted)
    if world_size > 1:
        dist.init_process_group("nccl" if wanted.type == "cuda" else "gloo")
    try:
        yield Process(rank, world_size, local_rank, local_world_size, wanted)
    finally:
        if world_size > 1:
            dist.destroy_process_group()
