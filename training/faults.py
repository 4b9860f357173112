"""Videos that could not be read: their list, faults.csv, and the check for too many of them."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from common.config import DataConfig
from common.distributed import DistributedContext
from dali_pipelines import ClipLoader, InputError
from dali_pipelines.batches import Fault
from dali_pipelines.text import csv_writer

_MAX_SHOWN = 5  # faults in a message
_BLIND_CLIPS = 16  # a run stops if it cannot read any of its first clips, at least this many


class UnreadableError(InputError):
    """More videos cannot be read than `data.max_fault_fraction` allows."""


class FaultLog:
    """faults.csv of a run, with a row for every failed read of a video: epoch (from 1), mode (train or validate),
    sample_id (row of that manifest, from 0), path, reason.

    The main process writes it, for all processes. Without faults the file does not exist.
    """

    def __init__(self, path: Path, process: DistributedContext):
        self.path = path
        self.count = 0
        """Number of faults taken since the run was started or resumed, over all processes."""
        self._process = process

    def size(self) -> int:
        """Size of the file in bytes."""
        return self.path.stat().st_size if self.path.exists() else 0

    def cut(self, size: int) -> None:
        """Remove everything after `size` bytes: a run that resumes from there will find those faults again."""
        if self.size() > size:
            with open(self.path, "r+b") as file:
                file.truncate(size)

    def take(self, loader: ClipLoader, *, epoch: int, mode: str) -> list[Fault]:
        """Move the faults from the statistics of all processes' loaders to the file; returns them, in the manifest's
        order. Every process must call it."""
        mine = list(loader.stats.faults)
        loader.stats.faults.clear()  # otherwise it would grow for the life of the run
        faults = sorted(fault for theirs in self._process.gather(mine) for fault in theirs)
        self.count += len(faults)
        if self._process.is_main:
            self.write(faults, epoch=epoch, mode=mode)
        return faults

    def write(self, faults: Sequence[Fault], *, epoch: int, mode: str) -> None:
        """Append rows. If the disk is full, they are lost and a message says so, but the run continues."""
        if not faults:
            return
        size = self.size()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", newline="", encoding="utf-8", errors="surrogateescape") as file:
                writer = csv_writer(file)
                if not file.tell():
                    writer.writerow(["epoch", "mode", "sample_id", "path", "reason"])
                writer.writerows([epoch + 1, mode, fault.sample_id, fault.path, fault.reason] for fault in faults)
        except OSError as error:
            with contextlib.suppress(OSError):
                self.cut(size)  # no partial rows
            print(f"{self.path}: {len(faults)} rows cannot be written ({error.strerror})", flush=True)

    def messages(self, faults: Sequence[Fault], *, mode: str) -> Iterator[str]:
        """One line for each of the first faults, and one for the rest."""
        treatment = "left out" if mode == "train" else "counted as wrong"
        for fault in faults[:_MAX_SHOWN]:
            yield f"{fault.path}: {fault.reason}; {treatment}"
        if len(faults) > _MAX_SHOWN:
            yield f"... and {len(faults) - _MAX_SHOWN} more, in {self.path}"

    def check(
        self,
        loader: ClipLoader,
        data: DataConfig,
        *,
        epoch: int,
        num_failed: int,
        num_seen: int,
        num_clips: int,
        is_last: bool,
    ) -> None:
        """Raises `UnreadableError` if too many of an epoch's clips, or all of the first ones, cannot be read.

        num_failed, num_seen: clips of this epoch so far, over all processes, which therefore stop together.
        num_clips: clips of the whole epoch. is_last: whether no other step follows in it.
        """
        too_many = num_failed / num_clips > data.max_fault_fraction
        none_read = num_failed == num_seen and (num_seen >= _BLIND_CLIPS or is_last)
        if not (too_many or none_read):
            return
        faults = self.take(loader, epoch=epoch, mode="train")
        self._process.barrier()  # torchrun ends the others with the first process: wait until everything is written
        named = "; ".join(f"{fault.path}: {fault.reason}" for fault in faults[:_MAX_SHOWN])
        limit = ""
        if too_many:
            limit = f", more than data.max_fault_fraction={data.max_fault_fraction:g} allows of the epoch's {num_clips}"
        root = f"; is the line `# root:` in {data.train} right?" if num_failed == num_seen else ""
        raise UnreadableError(
            f"epoch {epoch + 1}: {num_failed} of the first {num_seen} videos cannot be read{limit}: {named}; all are "
            f"in {self.path}{root}; repair them, or make a new manifest without them (prepare.py)"
            + (", or raise data.max_fault_fraction" if too_many else "")
        )
