"""Decoding as a stage of its own, between the workers and the graph:

    workers (DALI)  ──►  decode (threads, torchcodec)  ──►  graph (DALI, on the device)
    plan, packets        NVDEC; or what the workers          one resize from each rectangle,
    and remux            have decoded, onto the device       normalise

DALI's own decoder creates a hardware decoder for every clip, and maps every decoded frame (docs/benchmarks.md).
"""

import contextlib
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from nvidia.dali import Pipeline

from dali_pipelines.batches import Outcome, to_torch
from dali_pipelines.clip_source import Sample
from dali_pipelines.graph import Cut, cut_pipeline
from dali_pipelines.manifest import Manifest, coded_size
from dali_pipelines.nvdec import Decoded, DecodePool, Task
from dali_pipelines.plan import PADDING
from dali_pipelines.workers import PREFETCH, Workers

_AHEAD = 2
"""Samples in the pool per thread, so that no thread is idle while the last sample of a batch is decoded."""
_AHEAD_BYTES = 1 << 30
"""Bytes of decoded frames in the pool above which no further batch is started."""


class _Batch(NamedTuple):
    tasks: list[Task]
    decoded_bytes: int
    """At most."""


@dataclass
class _Running:
    pipeline: Pipeline
    feed: "_Feed"
    place: int | None
    """Place of the next entry that `run` returns; None if unknown."""


class DecodeStage:
    """Runs workers, pool and graph so that all stay busy: workers and pool are as many batches ahead as the pool can
    use, the graph is `PREFETCH` ahead.

    `workers` must run a `source_pipeline`. Everything starts at the first `run`.
    """

    def __init__(
        self,
        workers: Workers,
        cut: Cut,
        *,
        manifest: Manifest,
        device: torch.device,
        batch_size: int,
        threads: int,
        timeout_s: float,
    ):
        self._workers, self._cut, self._manifest, self._device = workers, cut, manifest, device
        self._batch_size, self._threads, self._timeout_s = batch_size, threads, timeout_s
        self._running: _Running | None = None
        # DALI's pipelines are reference cycles that hold the feed: ending workers and threads cannot be left to the
        # garbage collector.
        self._closers: list[Callable[[], None]] = [workers.close]
        weakref.finalize(self, _call, self._closers).atexit = False

    def run(self, place: int) -> tuple[torch.Tensor, list[Outcome]]:
        """See `Stage.run`."""
        running = self._running
        if running is None or running.place != place:
            running = self._start(place)
        running.place = None  # unknown if this is interrupted
        # DALI takes its input on torch's current stream, of the current device.
        with torch.cuda.device(self._device) if self._device.type == "cuda" else contextlib.nullcontext():
            (clips,) = running.pipeline.run()
        running.place = place + self._batch_size
        return to_torch(clips, running.pipeline, self._device), list(map(_outcome, running.feed.take()))

    def close(self) -> None:
        """Stops the workers and the threads; the next `run` starts them again."""
        self._running = None
        _call(self._closers)
        del self._closers[1:]

    def _start(self, place: int) -> _Running:
        self.close()
        pool = DecodePool(
            self._device,
            threads=self._threads,
            timeout_s=self._timeout_s,
            largest=int(self._manifest.areas.max()),
        )
        self._closers.append(pool.close)
        feed = _Feed(
            self._workers,
            pool,
            place=place,
            batch_size=self._batch_size,
            batches_ahead=1 + -(-_AHEAD * self._threads // self._batch_size),
            manifest=self._manifest,
            on_gpu=self._device.type == "cuda",
        )
        pipeline = cut_pipeline(
            feed.frames,
            feed.rest,
            self._cut,
            batch_size=self._batch_size,
            device_id=self._device.index,
            threads=self._threads,
            prefetch=PREFETCH,
        )
        pipeline.build()
        self._running = _Running(pipeline, feed, place)
        return self._running


class _Feed:
    """Feeds the graph with batches that the workers have prepared and the pool has decoded."""

    def __init__(
        self,
        workers: Workers,
        pool: DecodePool,
        *,
        place: int,
        batch_size: int,
        batches_ahead: int,
        manifest: Manifest,
        on_gpu: bool,
    ):
        self._workers, self._pool, self._manifest, self._on_gpu = workers, pool, manifest, on_gpu
        self._place = place  # of the next entry to request from the workers
        self._batch_size, self._batches_ahead = batch_size, batches_ahead
        self._under_way: deque[_Batch] = deque()  # in the pool
        self._in_graph: deque[list[tuple[Sample, Decoded]]] = deque()  # frames stay alive until the graph is done
        self._taken = 0  # batches that have left the graph

    def take(self) -> list[tuple[Sample, Decoded]]:
        """Each sample of the batch that has just left the graph, with its result."""
        self._taken += 1
        return self._in_graph.popleft()

    def frames(self, iteration: int) -> Sequence[torch.Tensor | np.ndarray]:
        """For the graph: the frames of each sample of a batch."""
        frames = [decoded.frames for _, decoded in self._batch(iteration)]
        # As arrays on the CPU: for tensors, DALI would ask torch for a CUDA stream.
        return frames if self._on_gpu else [each.numpy() for each in frames]

    def rest(self, iteration: int) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
        """For the graph: `picks`, `rectangles` and `transpose` of the same samples."""
        batch = self._batch(iteration)
        return (
            [sample.picks for sample, _ in batch],
            [decoded.rectangles for _, decoded in batch],
            [sample.transpose for sample, _ in batch],
        )

    def _batch(self, iteration: int) -> list[tuple[Sample, Decoded]]:
        """The graph's batch number `iteration`, once all of it is decoded. DALI calls `frames` and `rest` in any
        order."""
        while len(self._in_graph) <= iteration - self._taken:
            while not self._under_way or (
                len(self._under_way) < self._batches_ahead
                and sum(batch.decoded_bytes for batch in self._under_way) < _AHEAD_BYTES
            ):
                self._under_way.append(self._submit())
            batch = self._under_way.popleft()
            self._in_graph.append([(task.sample, self._pool.result(task)) for task in batch.tasks])
        return self._in_graph[iteration - self._taken]

    def _submit(self) -> _Batch:
        fields = self._workers.run(self._place)
        self._place += self._batch_size
        # Copies: the next run of the workers' pipeline may overwrite the output of this one.
        samples = [Sample(*(np.array(field.at(index)) for field in fields)) for index in range(self._batch_size)]
        tasks = [self._pool.submit(sample, self._size(sample)) for sample in samples]
        return _Batch(tasks, sum(map(_decoded_bytes, tasks)))

    def _size(self, sample: Sample) -> tuple[int, int]:
        return (1, 1) if sample.sample_id == PADDING else coded_size(self._manifest[int(sample.sample_id)])


def _call(functions: list[Callable[[], None]]) -> None:
    for function in functions:
        function()


def _outcome(result: tuple[Sample, Decoded]) -> Outcome:
    sample, decoded = result
    read, kept = sample.packets.tolist()
    return Outcome(int(sample.sample_id), decoded.engine, (read, kept), decoded.fault, decoded.fallback)


def _decoded_bytes(task: Task) -> int:
    height, width = task.size
    return task.sample.frames.nbytes if task.sample.is_host else 3 * len(task.sample.positions) * height * width
