"""Starts and watches the loader's worker processes, and restarts them if they die or hang.

They run a `ClipSource` in a DALI pipeline, which passes on their samples. Each notes its current sample, so a sample at
which a worker hangs, or dies twice, is given up. DALI's own decoder does not report which sample of a batch it failed
on: then the workers decode all videos of the batches in flight.
"""

import contextlib
import mmap
import os
import shutil
import signal
import sys
import threading
import types
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from typing import Any
from unittest import mock

import numpy as np
from nvidia.dali import Pipeline
from nvidia.dali._multiproc.shared_mem import SharedMem

from dali_pipelines.clip_source import MOST_BYTES, ClipSource
from dali_pipelines.engines import Routing
from dali_pipelines.errors import InputError, check
from dali_pipelines.manifest import Manifest
from dali_pipelines.plan import PADDING, EntrySampler, View
from dali_pipelines.processes import semaphores_named_after
from dali_pipelines.watch import Watchdog

PREFETCH = 2  # batches that DALI works ahead
_SURVEYED = 256  # videos, spread evenly over the manifest
_RESTARTS = 3  # without a batch between them, before giving up
_not_ours: list[Pipeline | None] = []  # pipelines that a fork must not end


class Workers:
    """Runs the pipeline that `make_pipeline` builds around a source, batch by batch.

    source: the arguments of `ClipSource` that stay the same: table, root, index, cache, view, sampler, max_pixels.
    count: number of processes; 0 runs the source in this one.
    count_fallback: called with a reason and a number of samples.
    """

    def __init__(
        self,
        make_pipeline: Callable[[ClipSource], Pipeline],
        source: dict[str, Any],
        *,
        manifest: Manifest,
        routing: Routing,
        batch_size: int,
        count: int,
        timeout_s: float,
        count_fallback: Callable[[str, int], None],
    ):
        self.routing = routing
        self.pipeline: Pipeline | None = None
        self._make_pipeline = make_pipeline
        self._source = source
        self._manifest = manifest
        self._view: View = source["view"]
        self._sampler: EntrySampler = source["sampler"]
        self._batch_size = batch_size
        self._count = count
        self._timeout_s = timeout_s
        self._count_fallback = count_fallback
        self._watchdog: Watchdog | None = None
        self._process = os.getpid()
        self._place: int | None = None  # of the next entry that the pipeline returns; None: unknown
        self._host_ids: frozenset[int] = frozenset()
        self._bad_ids: set[int] = set()
        self._deaths: dict[int, int] = {}  # sample id -> number of workers that died at it
        self._given_up: dict[int, str] = {}  # sample id -> why it is not tried again

    def run(self, place: int) -> tuple[Any, ...]:
        """The pipeline's outputs for the batch whose first entry is at `place`. Raises `InputError`."""
        restarts = 0
        while True:
            try:
                pipeline = self.pipeline
                if pipeline is None or self._place != place:
                    pipeline = self._start(place)
                self._place = None  # an interrupt within `run` leaves it unknown
                with self._watched():
                    outputs = pipeline.run()
                break
            except InputError:
                raise
            except (RuntimeError, AssertionError, ValueError, OSError, EOFError, MemoryError) as error:
                # The first comes from DALI; the others from its queues, if a worker died while using them.
                # The pipeline is lost. If a sample was at fault, the next pipeline handles it differently.
                have_ended = self._watchdog is not None and self._watchdog.have_ended
                have_ended = have_ended or "Workers initialization failed" in str(error)
                restarts = 0 if self._recover(place, error) else restarts + 1
                self.close()
                if restarts > _RESTARTS:
                    what = f"{self._count} workers, batches of {self._batch_size} videos"
                    check(
                        not have_ended,
                        f"the loader's processes keep ending: out of memory? {what}; /dev/shm has "
                        f"{_free_shared_memory() >> 20} MB free",
                    )
                    check(
                        not isinstance(error, MemoryError),
                        f"out of memory for a batch of clips ({what}): use a smaller batch, or fewer workers",
                    )
                    raise
        self._place = place + self._batch_size
        return outputs

    def note(self, sample_id: int, *, is_bad: bool) -> None:
        """Notes that a sample has arrived: it killed no worker, and whether it can be read is known."""
        self._deaths.pop(sample_id, None)
        if is_bad:
            self._bad_ids.add(sample_id)

    def close(self) -> None:
        """Stops the workers; the next `run` starts them again. Does nothing in a fork of this process: the workers are
        not its children, and DALI would wait for threads that a fork does not have."""
        if self._process != os.getpid():
            _not_ours.append(self.pipeline)
            return
        if self._watchdog is not None:
            self._watchdog.is_waited_for = True  # a worker that hangs would not end by itself
        pipeline, self.pipeline, self._place = self.pipeline, None, None
        if pipeline is not None and pipeline._py_pool is not None:
            pipeline._py_pool.close()  # others may still hold the pipeline
        if self._watchdog is not None:
            self._watchdog.stop()
            self._watchdog = None

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        if self._watchdog is None:
            yield
            return
        self._watchdog.is_waited_for = True
        try:
            yield
        finally:
            self._watchdog.is_waited_for = False

    def _start(self, place: int) -> Pipeline:
        self.close()
        pipeline = self.pipeline = self._make_pipeline(
            ClipSource(
                **self._source,
                start=place,
                end=None if self._sampler.training else self._end_of_epoch(place),
                routing=self.routing,
                host_ids=self._host_ids,
                given_up=self._given_up,
            )
        )
        if self._count:
            self._check_shared_memory()
            names = semaphores_named_after(self._source["table"])
            with _hidden_main(), _blocked_interrupt(), names, _reserved_shared_memory():
                pipeline.start_py_workers()
            self._watchdog = Watchdog(self._source["table"], pipeline._py_pool, self._timeout_s)
        with self._watched():
            pipeline.build()
        self._place = place
        return pipeline

    def _end_of_epoch(self, place: int) -> int:
        """The place of the first entry of the next epoch, where evaluation stops its workers."""
        return (place // self._sampler.rank_entries + 1) * self._sampler.rank_entries

    def _check_shared_memory(self) -> None:
        """Raises `InputError` if /dev/shm is too small for the frames that workers pass in it: they die silently if it
        is full."""
        free = _free_shared_memory()
        rows = np.linspace(0, len(self._manifest) - 1, min(len(self._manifest), _SURVEYED)).astype(int).tolist()
        share = float(np.mean([self._is_decoded_here(row) for row in rows]))
        pixels = share * float(np.median(self._manifest.areas))
        # About half of each frame of the batches in flight.
        windows = self._view.windows_per_entry if self._view.mode == "test" else 1
        clip = min(3 * pixels / 2 * self._view.num_frames * windows, MOST_BYTES)
        needed = clip * self._batch_size * (PREFETCH + 2)
        check(
            free > needed,
            f"/dev/shm has {free / 2**20:.0f} MB free, and batches of {self._batch_size} videos need about "
            f"{needed / 2**20:.0f} MB: use a smaller batch, or a larger /dev/shm (in Docker: --shm-size 8g, or --ipc "
            "host)",
        )

    def _is_decoded_here(self, row: int) -> bool:
        video = self._manifest[row]
        return self.routing.engine_for(video, row) == "host" or not self.routing.takes(video)

    def _recover(self, place: int, error: Exception) -> bool:
        """Finds out why the pipeline failed at `place`. Returns whether the next one will do something differently."""
        if "decoders.video" in str(error):
            # DALI's decoder cannot name the video that it failed on: the workers decode the batches in flight. Videos
            # that they can decode go back to DALI afterwards.
            ahead = range(place, place + self._batch_size * (PREFETCH + 2))
            entries = {self._sampler.sample(entry)[1] for entry in ahead} - {PADDING}
            under_way = {entry // self._view.entries_per_video for entry in entries}
            by_dali = {row for row in under_way if self.routing.engine_for(self._manifest[row], row) == "dali"}
            suspects = by_dali - self._host_ids
            self._host_ids = frozenset(suspects | (self._host_ids & (self._bad_ids | under_way)))
            self._count_fallback("DALI's decoder failed on a batch", len(suspects))
            return bool(suspects)
        if self._watchdog is None or not self._watchdog.have_ended:
            return False
        known = len(self._given_up)
        for sample_id in self._watchdog.stuck:
            self._given_up[sample_id] = f"not decoded within timeout_s = {self._timeout_s:g} seconds"
        if self._watchdog.has_killed:
            self._count_fallback("a worker process hung", 1)
        else:
            self._count_fallback("a worker process died", 1)
            for status, sample_id in self._watchdog.dead():
                self._deaths[sample_id] = self._deaths.get(sample_id, 0) + 1
                if self._deaths[sample_id] > 1:
                    end = f"signal {-status}" if status < 0 else f"status {status}"
                    self._given_up[sample_id] = f"the process that decodes it ended with {end}, twice"
        self._watchdog.kill()  # DALI would wait for workers that cannot end
        return len(self._given_up) > known


def _free_shared_memory() -> int:
    """Free space in /dev/shm, in bytes."""
    return shutil.disk_usage("/dev/shm").free


@contextlib.contextmanager
def _reserved_shared_memory() -> Iterator[None]:
    """A context in which DALI's allocations in /dev/shm reserve the first page, which this process writes to: if it is
    full, that raises OSError instead of a SIGBUS, which would end the process without a message."""

    def reserve(cls: type[SharedMem], size: int) -> SharedMem:
        made = cls(None, size)
        os.posix_fallocate(made.handle, 0, min(size, mmap.PAGESIZE))
        return made

    with mock.patch.object(SharedMem, "allocate", classmethod(reserve)):
        yield


@contextlib.contextmanager
def _blocked_interrupt() -> Iterator[None]:
    """A context in which new processes never see Ctrl-C: this one handles it, and they would only print tracebacks."""
    resource_tracker.ensure_running()  # starting it within the first spawn would unblock the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    # The signal may come to another thread. Python then runs the handler in this one, and an exception between the
    # start of a process and the end of its input is a traceback there.
    handler, came = signal.getsignal(signal.SIGINT), threading.Event()
    is_ours = handler is not None and threading.current_thread() is threading.main_thread()
    if is_ours:
        signal.signal(signal.SIGINT, lambda *_: came.set())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if is_ours:
            signal.signal(signal.SIGINT, handler)
        if came.is_set():
            signal.raise_signal(signal.SIGINT)


@contextlib.contextmanager
def _hidden_main() -> Iterator[None]:
    """Hides the user's script from spawn, which would import it in every worker, and torch with it, or run it again if
    it has no main guard."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
