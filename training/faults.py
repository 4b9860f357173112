"""faults.csv of a run: the videos that could not be read, by all processes."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

from common.distributed import DistributedContext
from dali_pipelines import ClipLoader
from dali_pipelines.batches import Fault
from dali_pipelines.text import csv_writer


class FaultLog:
    """A row for every time that a video could not be read: epoch (from 1), mode (train or validate), sample_id (row of
    that manifest, from 0), path, reason. No file where there is none. The main process writes it."""

    def __init__(self, path: Path, process: DistributedContext):
        self.path = path
        self._process = process

    def size(self) -> int:
        """Bytes."""
        return self.path.stat().st_size if self.path.exists() else 0

    def cut(self, size: int) -> None:
        """Removes what was written after the file had `size` bytes: a run that goes on from there meets it again."""
        if self.size() > size:
            with open(self.path, "r+b") as file:
                file.truncate(size)

    def take(self, loader: ClipLoader, *, epoch: int, mode: str) -> list[Fault]:
        """Moves the faults in the statistics of all processes' loaders to the file; returns them, in the manifest's
        order. Every process must call it."""
        mine = list(loader.stats.faults)
        loader.stats.faults.clear()  # else it grows for the life of the run
        faults = sorted(fault for theirs in self._process.gather(mine) for fault in theirs)
        if self._process.is_main:
            self.write(faults, epoch=epoch, mode=mode)
        return faults

    def write(self, faults: Sequence[Fault], *, epoch: int, mode: str) -> None:
        """A disk that is full costs the rows, not the run."""
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
                self.cut(size)  # no half rows
            print(f"{self.path}: {len(faults)} rows cannot be written ({error.strerror})", flush=True)
