"""ClipLoader: a DALI pipeline as an iterable of batches of torch tensors, epoch by epoch."""

import contextlib
import os
import shutil
import signal
import sys
import tempfile
import time
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from nvidia.dali.plugin.pytorch.torch_utils import to_torch_tensor

from dali_pipelines import crops
from dali_pipelines.clip_source import DALI_CPU_CODECS, DALI_GPU_CODECS, DECODES, ClipSource, Decode
from dali_pipelines.errors import InputError
from dali_pipelines.files import absolute, check_reachable
from dali_pipelines.graph import clip_pipeline
from dali_pipelines.manifest import Manifest, coded_size, size_mismatch
from dali_pipelines.plan import MODES, PADDING, Mode, Order, View, windows_of_test
from dali_pipelines.sampling import PAST_END
from dali_pipelines.watch import Watchdog

_PREFETCH = 2  # batches that DALI works ahead
_RESTARTS = 3  # without a batch between them, before the loader gives up


class Batch(NamedTuple):
    """Clips are on the loader's device, the rest in host memory."""

    clips: torch.Tensor
    """[B, C, T, H, W]; mode "test": [B, V, C, T, H, W], V = 3 crops of each window. float32 or float16,
    (value / 255 - mean) / std."""
    labels: torch.Tensor
    """int64 [B]; -1 where the entry is padding."""
    sample_ids: torch.Tensor
    """int64 [B]: row in the manifest; -1 where the entry is padding."""
    valid: torch.Tensor
    """bool [B]: False for padding and for videos that cannot be read; those clips are black."""


class Fault(NamedTuple):
    """A video that could not be read."""

    epoch: int
    sample_id: int
    path: str
    reason: str


@dataclass
class LoaderStats:
    """What a loader has done since it was made."""

    clips: int = 0
    seconds: float = 0.0
    """Between the first request of each epoch and its last batch, the consumer's own time included."""
    wait_seconds: float = 0.0
    """Of these, spent waiting for a batch."""
    packets_read: int = 0
    packets_kept: int = 0
    """Fed to a decoder, of those read."""
    fallbacks: dict[str, int] = field(default_factory=dict)
    """Reason -> how many samples did not go the way that was meant for them: all of a file decoded where some packets
    were to do, host decoding where DALI was to decode, workers started again, a cache that cannot be written."""
    faults: list[Fault] = field(default_factory=list)

    @property
    def clips_per_second(self) -> float:
        return self.clips / self.seconds if self.seconds else 0.0


class ClipLoader:
    """Batches of clips from the videos of a manifest, decoded, cropped and normalised by DALI.

        loader = ClipLoader(manifest, mode="train", batch_size=8, num_frames=8, crop_size=224)
        for batch in loader:                # one epoch
            batch.clips                     # [8, 3, 8, 224, 224]

    `iter(loader)` starts the next epoch, or goes on where `load_state_dict` put it; a `for` that was left early
    counts as that epoch's end. Every clip is a pure function of (seed, epoch, sample id).

    mode: "train" (shuffled, random windows and crops, the tail that fills no step dropped), "validate" (in order,
        centre crop) or "test" (in order, three crops along the long side). Both evaluations pad the last step.
    batch_size: clips a batch on this rank.
    num_frames, stride, target_fps, past_end: see `sampling.frame_positions`. stride None: the whole video.
    crop_size: pixels a side of the square crop.
    short_side: pixels of the short side before the crop; a number, or (low, high) for training to draw from.
        Default: 8/7 to 10/7 of the crop in training, 8/7 in validation, 1 in the test.
    flip: training mirrors every second clip; False where left and right differ in meaning.
    mean, std: three numbers each, of values in 0..1.
    dtype: torch.float32 or torch.float16.
    device: "cpu", or a CUDA device: decode (NVDEC), resize and normalise happen there.
    workers: processes that read files and decode what DALI does not; 0 does it in this one; None: one a CPU core.
    step_entries: clips an optimizer step over all ranks and micro-batches; default batch_size * world_size.
    decode: "dali" (NVDEC on a GPU; VP8, VP9 and MJPEG on the CPU), "host" (the workers decode, with PyAV), or "auto":
        DALI for what NVDEC takes, the workers for everything else. Codecs that DALI does not decode go to the workers.
    views_per_decode: clips that training cuts out of one decode of a video, each with a window, crop and flip of its
        own; neighbours in a batch, with one sample id. It divides batch_size; an epoch has so many times more clips.
    num_windows: temporal windows of the test, evenly from the start of a video to its end, three crops of each; the
        views of a batch are V = 3 * num_windows, the crops of the first window first. With stride None, each window is
        an equal share of the video.
    windows_at_once: so many of these windows are one entry of a batch, for long videos, whose frames would not all fit
        into memory: V = 3 * windows_at_once, and a video is ceil(num_windows / windows_at_once) entries with one sample
        id, one after the other. The last repeats the last window where it has room. Default: all.
    timeout_s: seconds that a worker may take for one sample. Then the workers are started again, and the sample is a
        fault. Not with workers=0.
    cache: folder on a local disk that keeps what is read from URLs (`Manifest.root`), for the next epochs; any number
        of loaders may share it. None: everything is read anew.

    Raises `InputError` for settings that cannot work.
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        mode: Mode,
        batch_size: int,
        num_frames: int,
        crop_size: int,
        stride: float | None = 32,
        target_fps: float = 30,
        past_end: Literal["fit", "hold"] = "fit",
        short_side: float | tuple[float, float] | None = None,
        flip: bool = True,
        mean: Sequence[float] = (0.0, 0.0, 0.0),
        std: Sequence[float] = (1.0, 1.0, 1.0),
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        workers: int | None = None,
        step_entries: int | None = None,
        decode: Decode = "auto",
        views_per_decode: int = 1,
        num_windows: int = 1,
        windows_at_once: int | None = None,
        timeout_s: float = 60,
        cache: str | os.PathLike | None = None,
    ):
        step_entries = step_entries or batch_size * world_size
        _check(mode in MODES, f"mode is {mode!r}; expected one of {', '.join(MODES)}")
        _check(past_end in PAST_END, f"past_end is {past_end!r}; expected one of {', '.join(PAST_END)}")
        _check(batch_size >= 1, f"batch_size is {batch_size}; expected 1 or more")
        _check(num_frames >= 1, f"num_frames is {num_frames}; expected 1 or more")
        _check(crop_size >= 1, f"crop_size is {crop_size}; expected 1 or more pixels")
        _check(stride is None or stride > 0, f"stride is {stride}; expected more than 0, or None for whole videos")
        _check(target_fps > 0, f"target_fps is {target_fps}; expected more than 0")
        _check(len(mean) == len(std) == 3, f"mean {mean} and std {std} must have three numbers each")
        _check(all(value > 0 for value in std), f"std is {std}; expected more than 0")
        _check(dtype in (torch.float32, torch.float16), f"dtype is {dtype}; expected torch.float32 or torch.float16")
        _check(0 <= seed < 2**64, f"seed is {seed}; expected 0 or more, less than 2**64")
        _check(world_size >= 1, f"world_size is {world_size}; expected 1 or more")
        _check(0 <= rank < world_size, f"rank is {rank}; expected 0 to {world_size - 1}")
        _check(workers is None or workers >= 0, f"workers is {workers}; expected 0 or more")
        _check(
            step_entries % (batch_size * world_size) == 0,
            f"step_entries is {step_entries}; expected a multiple of {batch_size} clips x {world_size} ranks",
        )
        _check(decode in DECODES, f"decode is {decode!r}; expected one of {', '.join(DECODES)}")
        _check(timeout_s > 0, f"timeout_s is {timeout_s}; expected more than 0 seconds")
        _check(views_per_decode >= 1, f"views_per_decode is {views_per_decode}; expected 1 or more")
        views_per_decode = views_per_decode if mode == "train" else 1
        _check(
            batch_size % views_per_decode == 0,
            f"batch_size is {batch_size}; expected a multiple of the {views_per_decode} views_per_decode",
        )
        _check(len(manifest) > 0, "the manifest has no videos")
        if mode == "train":
            _check(
                len(manifest) * views_per_decode >= step_entries,
                f"the manifest has {len(manifest)} videos, fewer than the {step_entries // views_per_decode} of one "
                "training step; use a smaller batch",
            )
        self._cache = None if cache is None else os.path.abspath(cache)
        check_reachable(manifest.source(0), self._cache)
        self.manifest = manifest
        self.device = _device(device)
        self.stats = LoaderStats()
        self._batch_size = batch_size // views_per_decode  # in videos, as is the order
        self._mean, self._std, self._dtype = mean, std, dtype
        self._black = -(torch.tensor(mean) / torch.tensor(std)).view(3, 1, 1, 1).to(self.device)
        _check(num_windows >= 1, f"num_windows is {num_windows}; expected 1 or more")
        _check(
            windows_at_once is None or 1 <= windows_at_once <= num_windows,
            f"windows_at_once is {windows_at_once}; expected 1 to the {num_windows} num_windows",
        )
        self._view = View(
            mode=mode,
            num_frames=num_frames,
            crop_size=crop_size,
            stride=stride,
            target_fps=target_fps,
            past_end=past_end,
            short_sides=_short_sides(mode, crop_size, short_side),
            flip=flip,
            per_decode=views_per_decode,
            num_windows=num_windows if mode == "test" else 1,
            windows_at_once=windows_at_once if mode == "test" else None,
        )
        self._order = Order(
            rows=len(manifest) * self._view.parts,
            training=mode == "train",
            seed=seed,
            step_entries=step_entries // views_per_decode,
            rank=rank,
            world_size=world_size,
        )
        self._workers = len(os.sched_getaffinity(0)) if workers is None else workers
        self._timeout_s = timeout_s
        on_gpu = self.device.type == "cuda"
        # On the CPU the workers are as fast, and can say which video is bad: docs/data.md has the figures.
        by_dali = decode == "dali" or (decode == "auto" and on_gpu)
        self._dali_codecs = (DALI_GPU_CODECS if on_gpu else DALI_CPU_CODECS) if by_dali else frozenset()
        self._labels = torch.from_numpy(np.append(manifest.labels, -1))  # the last one is padding's
        self._epoch = 0
        self._batches = 0  # consumed in this epoch
        self._iterator: object | None = None  # the one that is on its way through the epoch, or was left early
        self._pipeline = None
        self._watchdog: Watchdog | None = None
        self._place: int | None = None  # of the next entry that the pipeline gives; None: not known
        self._host_ids: frozenset[int] = frozenset()
        self._bad_ids: set[int] = set()
        self._deaths: dict[int, int] = {}  # sample id -> how many workers have died at it
        self._given_up: dict[int, str] = {}  # sample id -> why it is not tried again
        self._table = tempfile.TemporaryDirectory(prefix="clip_loader_")
        manifest.save_arrays(self._table.name)

    def __len__(self) -> int:
        """Batches an epoch, the same on every rank."""
        return self._order.rank_entries // self._batch_size

    def window_seconds(self, sample_id: int) -> np.ndarray:
        """When each window of the test starts and ends, float64 [num_windows, 2]; by the frame rate, in seconds."""
        video = self.manifest[sample_id]
        positions = windows_of_test(video, self._view)
        return np.stack([positions[:, 0], positions[:, -1] + 1], axis=1) / video.fps

    @property
    def decoders(self) -> dict[str, str]:
        """Codec -> what decodes it here: "DALI", "NVDEC" (by DALI) or "host"."""
        dali = "NVDEC" if self.device.type == "cuda" else "DALI"
        return {codec: dali if codec in self._dali_codecs else "host" for codec in self.manifest.codecs}

    def __iter__(self) -> Iterator[Batch]:
        if self._iterator is not None:
            self._go_to(self._epoch + 1)
        self._iterator = object()
        return self._iterate(self._iterator)

    def _iterate(self, iterator: object) -> Iterator[Batch]:
        try:
            yield from self._rest_of_epoch(iterator)
        finally:
            if self._iterator is iterator and self._view.mode != "train":
                self.close()
        if self._iterator is iterator:
            self._go_to(self._epoch + 1)

    def _rest_of_epoch(self, iterator: object) -> Iterator[Batch]:
        started = time.perf_counter()
        while self._iterator is iterator and self._batches < len(self):
            asked = time.perf_counter()
            batch = self._next_batch()
            now = time.perf_counter()
            self._batches += 1
            self.stats.clips += int((batch.sample_ids != PADDING).sum())
            self.stats.wait_seconds += now - asked
            self.stats.seconds += now - started
            started = now
            yield batch

    def _go_to(self, epoch: int, batches: int = 0) -> None:
        """The next `iter` starts here; iterators that are on their way end."""
        self._epoch, self._batches, self._iterator = epoch, batches, None

    def set_epoch(self, epoch: int) -> None:
        """The next `iter` starts this epoch, from its beginning."""
        self._go_to(epoch)

    def state_dict(self) -> dict[str, Any]:
        """The position: entries that the caller has received, over all ranks; never those decoded ahead."""
        if self._batches == len(self):  # the same place as the next epoch's start
            return {"epoch": self._epoch + 1, "entries": 0, **self._identity()}
        return {"epoch": self._epoch, "entries": self._batches * self._clips_a_batch, **self._identity()}

    @property
    def _clips_a_batch(self) -> int:
        """Over all ranks."""
        return self._batch_size * self._view.per_decode * self._order.world_size

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to a position, without decoding what is skipped; other batch sizes, workers and ranks are fine."""
        for key, value in self._identity().items():
            _check(
                state.get(key) == value,
                f"the saved position has {key} {state.get(key)}, this loader {value}: the order would be another",
            )
        batches, rest = divmod(state["entries"], self._clips_a_batch)
        _check(
            not rest,
            f"the saved position, {state['entries']} clips, is within a batch of "
            f"{self._clips_a_batch // self._order.world_size} clips x {self._order.world_size} ranks",
        )
        self._go_to(state["epoch"], batches)

    def _identity(self) -> dict[str, int | str]:
        order = self._order
        return {
            "mode": self._view.mode,
            "seed": order.seed,
            "rows": order.rows,
            "step_entries": order.step_entries * self._view.per_decode,
            "views_per_decode": self._view.per_decode,
        }

    def close(self) -> None:
        """Stops the workers; the next `iter` starts them again."""
        if self._watchdog is not None:
            self._watchdog.is_waited_for = True  # a worker that hangs would not end either
        self._pipeline = self._place = None
        if self._watchdog is not None:
            self._watchdog.stop()
            self._watchdog = None

    def _next_batch(self) -> Batch:
        place = self._epoch * self._order.rank_entries + self._batches * self._batch_size
        restarts = 0
        while True:
            try:
                if self._pipeline is None or self._place != place:
                    self._start(place)
                self._place = None  # an interrupt within `run` leaves it unknown
                with self._watched():
                    outputs = self._pipeline.run()
                break
            except InputError:
                raise
            except (RuntimeError, AssertionError, ValueError, OSError, EOFError) as error:
                # The first from DALI; the others from its queues, where a worker died in the midst of using them.
                # The pipeline is gone. Where it was a sample's fault, that sample goes another way in the next.
                have_ended = self._watchdog is not None and self._watchdog.have_ended
                have_ended = have_ended or "Workers initialization failed" in str(error)
                restarts = 0 if self._blame(place, error) else restarts + 1
                self.close()
                if restarts > _RESTARTS:
                    _check(
                        not have_ended,
                        f"the loader's processes end again and again: out of memory? {self._workers} workers, batches "
                        f"of {self._batch_size} videos; /dev/shm has {_free_shared_memory() >> 20} MB free",
                    )
                    raise
        self._place = place + self._batch_size
        return self._receive(*outputs)

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

    def _start(self, place: int) -> None:
        self.close()
        source = ClipSource(
            table=self._table.name,
            root=absolute(self.manifest.root),
            cache=self._cache,
            view=self._view,
            order=self._order,
            start=place,
            dali_codecs=self._dali_codecs,
            on_gpu=self.device.type == "cuda",
            host_ids=self._host_ids,
            given_up=self._given_up,
        )
        self._pipeline = clip_pipeline(
            source,
            batch_size=self._batch_size,
            crop_size=self._view.crop_size,
            clips=self._view.count,
            windows=self._view.windows,
            mean=self._mean,
            std=self._std,
            half=self._dtype == torch.float16,
            device_id=self.device.index,
            workers=self._workers,
            prefetch=_PREFETCH,
        )
        if self._workers:
            self._check_shared_memory()
            with _hidden_main(), _blocked_interrupt():
                self._pipeline.start_py_workers()
            self._watchdog = Watchdog(self._table.name, self._pipeline._py_pool, self._timeout_s)
        with self._watched():
            self._pipeline.build()
        self._place = place

    def _check_shared_memory(self) -> None:
        """The workers hand over pictures in /dev/shm, and die without a word where it is full."""
        free = _free_shared_memory()
        pixels = float(np.median(self.manifest.areas))
        # About half of a picture, of as many as there are in the batches under way.
        pictures = self._view.num_frames * (self._view.windows if self._view.mode == "test" else 1) * self._batch_size
        needed = 3 * pixels / 2 * pictures * (_PREFETCH + 2)
        _check(
            self._dali_codecs or free > needed,
            f"/dev/shm has {free / 2**20:.0f} MB free, and batches of {self._batch_size} videos need about "
            f"{needed / 2**20:.0f} MB: use a smaller batch, or more of it (in Docker: --shm-size 8g, or --ipc host)",
        )

    def _blame(self, place: int, error: Exception) -> bool:
        """Finds out why the pipeline failed at `place`; whether something will go another way in the next one."""
        if "decoders.video" in str(error):
            # DALI's decoder cannot name the video that it failed on: the workers decode what was under way. Those that
            # they could decode before go back to DALI.
            ahead = range(place, place + self._batch_size * (_PREFETCH + 2))
            entries = {self._order.sample(entry)[1] for entry in ahead} - {PADDING}
            under_way = {entry // self._view.parts for entry in entries}
            suspects = {row for row in under_way if self.manifest[row].codec in self._dali_codecs} - self._host_ids
            self._host_ids = suspects | (self._host_ids & (self._bad_ids | under_way))
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
                    self._given_up[sample_id] = f"the process that decodes it ends with {end}, twice"
        self._watchdog.kill()  # DALI would wait for those that cannot end
        return len(self._given_up) > known

    def _count_fallback(self, reason: str, count: int) -> None:
        self.stats.fallbacks[reason] = self.stats.fallbacks.get(reason, 0) + count

    def _receive(self, clips, sample_ids, packets, faults, fallbacks, is_host, shapes) -> Batch:
        sample_ids = torch.from_numpy(np.array(sample_ids.as_tensor()))
        valid = sample_ids != PADDING
        # On the CPU the batch keeps DALI's memory; on a GPU, a copy spares it from knowing DALI's streams.
        clips = to_torch_tensor(clips.as_tensor(), copy=self.device.type != "cpu" or not self._pipeline.exec_dynamic)
        for index, sample_id in enumerate(sample_ids.tolist()):
            self._deaths.pop(sample_id, None)
            reason = np.array(faults.at(index)).tobytes().decode()
            if fallback := np.array(fallbacks.at(index)).tobytes().decode():
                self._count_fallback(fallback, 1)
            if not np.array(is_host.at(index)):
                height, width = np.array(shapes.at(index))[1:3].tolist()
                reason = size_mismatch((height, width), coded_size(self.manifest[sample_id]))
                if reason:
                    clips[index] = self._black
            if reason:
                valid[index] = False
                self._bad_ids.add(sample_id)
                self.stats.faults.append(Fault(self._epoch, sample_id, self.manifest.file(sample_id), reason))
        read, kept = np.array(packets.as_tensor()).sum(axis=0)
        self.stats.packets_read += int(read)
        self.stats.packets_kept += int(kept)
        if self._view.per_decode > 1:
            clips = clips.flatten(0, 1)
            sample_ids, valid = (each.repeat_interleave(self._view.per_decode) for each in (sample_ids, valid))
        return Batch(clips, self._labels[sample_ids], sample_ids, valid)


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise InputError(message)


def _free_shared_memory() -> int:
    """Bytes."""
    return shutil.disk_usage("/dev/shm").free


def _short_sides(mode: Mode, crop_size: int, short_side: float | tuple[float, float] | None) -> tuple[float, float]:
    if short_side is None:
        low, high = {
            "train": crops.JITTER,
            "validate": (crops.VALIDATION_SCALE, crops.VALIDATION_SCALE),
            "test": (1, 1),
        }[mode]
        return low * crop_size, high * crop_size
    low, high = short_side if isinstance(short_side, Sequence) else (short_side, short_side)
    _check(
        crop_size <= low <= high,
        f"short_side is {short_side}; expected at least the crop of {crop_size} pixels, and low <= high",
    )
    return low, high


def _device(name: str | torch.device) -> torch.device:
    """The device, with its number where it is a GPU."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"device is {name!r}; expected cpu, cuda or cuda:N") from None
    _check(device.type in ("cpu", "cuda"), f"device is {name!r}; expected cpu, cuda or cuda:N")
    if device.type == "cpu":
        return torch.device("cpu")
    _check(torch.cuda.is_available(), f"device is {name!r}, but torch finds no GPU here")
    return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)


@contextlib.contextmanager
def _blocked_interrupt() -> Iterator[None]:
    """Processes that start within never see Ctrl-C: it is for this one to handle, and theirs would be tracebacks."""
    resource_tracker.ensure_running()  # its own start, within the first spawn, would lift the block
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _hidden_main() -> Iterator[None]:
    """Hides the user's script from spawn, which would import it in every worker: torch with it, or all of it again
    where the script has no main guard."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
