"""ClipLoader: a DALI pipeline as an iterable of batches of torch tensors, epoch by epoch."""

import os
import time
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from nvidia.dali.plugin.pytorch.torch_utils import to_torch_tensor

from dali_pipelines import crops
from dali_pipelines.clip_source import Sample
from dali_pipelines.cpu_cut import BatchMemory, cut_clips
from dali_pipelines.decode_stage import DecodeStage
from dali_pipelines.engines import DECODES, Decode
from dali_pipelines.errors import InputError, check
from dali_pipelines.files import absolute, check_reachable
from dali_pipelines.graph import Cut, clip_pipeline, source_pipeline
from dali_pipelines.host_decoder import MAX_PIXELS, size_mismatch
from dali_pipelines.manifest import Manifest, coded_size
from dali_pipelines.plan import MODES, PADDING, Mode, Order, View, windows_of_test
from dali_pipelines.processes import TemporaryFolder
from dali_pipelines.routing import choose_routing
from dali_pipelines.sampling import PAST_END
from dali_pipelines.workers import PREFETCH, Workers

_THREADS = 16  # that decode on a GPU: the best of 1 to 32 on an H200 with 16 cores (docs/benchmarks.md)


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
    engines: tuple[str, ...] = ()
    """What decoded each clip: "nvdec" (torchcodec), "dali" or "host" (PyAV); "" if it is not valid."""


class Outcome(NamedTuple):
    """The result for one sample."""

    sample_id: int
    engine: str
    packets: tuple[int, int]
    """Read, and kept."""
    fault: str
    fallback: str


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
    were to do, host decoding where a GPU or DALI was to decode, workers started again, a cache that cannot be
    written."""
    engines: dict[str, int] = field(default_factory=dict)
    """Engine ("nvdec", "dali", "host") -> how many readable samples it has decoded."""
    faults: list[Fault] = field(default_factory=list)

    def count_fallback(self, reason: str, count: int = 1) -> None:
        self.fallbacks[reason] = self.fallbacks.get(reason, 0) + count

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
    workers: processes that read files, and decode what the GPU does not; 0 does it in this one; None: one a CPU core.
    step_entries: clips an optimizer step over all ranks and micro-batches; default batch_size * world_size.
    decode: who decodes.
        "auto": on a GPU, NVDEC and the workers side by side, each its share of the videos; on the CPU, the workers.
        "nvdec": NVDEC, through torchcodec, what it takes. On the CPU, torchcodec's CPU decoder (for tests).
        "dali": DALI's own decoder; on a GPU NVDEC, slowly; on the CPU VP8, VP9 and MJPEG.
        "host": the workers, with PyAV.
        What an engine does not take goes to the workers, and is counted in `stats.fallbacks`.
    host_share: share of the videos that NVDEC takes, 0 to 1, which the workers decode instead; the same videos in every
        epoch. Default: with "auto" what keeps both busy, by the manifest, the GPU and the number of workers; otherwise
        0. It is part of the position, so that a resumed run sees the same pixels.
    decode_threads: threads that feed NVDEC, also those of DALI's decoder; default: one a worker, 4 to 16.
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
    cache: folder on a local disk that keeps what is read from URLs (`Manifest.root`) if it is what the manifest says,
        for the next epochs; any number of loaders may share it. None: everything is read anew.
    max_pixels: pixels that a frame of a video may have; one with more is a fault.

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
        host_share: float | None = None,
        decode_threads: int | None = None,
        views_per_decode: int = 1,
        num_windows: int = 1,
        windows_at_once: int | None = None,
        timeout_s: float = 60,
        cache: str | os.PathLike | None = None,
        max_pixels: int = MAX_PIXELS,
    ):
        step_entries = step_entries or batch_size * world_size
        check(mode in MODES, f"mode is {mode!r}; expected one of {', '.join(MODES)}")
        check(past_end in PAST_END, f"past_end is {past_end!r}; expected one of {', '.join(PAST_END)}")
        check(batch_size >= 1, f"batch_size is {batch_size}; expected 1 or more")
        check(num_frames >= 1, f"num_frames is {num_frames}; expected 1 or more")
        check(crop_size >= 1, f"crop_size is {crop_size}; expected 1 or more pixels")
        check(stride is None or stride > 0, f"stride is {stride}; expected more than 0, or None for whole videos")
        check(target_fps > 0, f"target_fps is {target_fps}; expected more than 0")
        check(len(mean) == len(std) == 3, f"mean {mean} and std {std} must have three numbers each")
        check(all(value > 0 for value in std), f"std is {std}; expected more than 0")
        check(dtype in (torch.float32, torch.float16), f"dtype is {dtype}; expected torch.float32 or torch.float16")
        check(0 <= seed < 2**64, f"seed is {seed}; expected 0 or more, less than 2**64")
        check(world_size >= 1, f"world_size is {world_size}; expected 1 or more")
        check(0 <= rank < world_size, f"rank is {rank}; expected 0 to {world_size - 1}")
        check(workers is None or workers >= 0, f"workers is {workers}; expected 0 or more")
        check(
            step_entries % (batch_size * world_size) == 0,
            f"step_entries is {step_entries}; expected a multiple of {batch_size} clips x {world_size} ranks",
        )
        check(decode in DECODES, f"decode is {decode!r}; expected one of {', '.join(DECODES)}")
        check(host_share is None or 0 <= host_share <= 1, f"host_share is {host_share}; expected 0 to 1")
        check(decode_threads is None or decode_threads >= 1, f"decode_threads is {decode_threads}; expected 1 or more")
        check(timeout_s > 0, f"timeout_s is {timeout_s}; expected more than 0 seconds")
        check(max_pixels >= 1, f"max_pixels is {max_pixels}; expected 1 or more")
        check(views_per_decode >= 1, f"views_per_decode is {views_per_decode}; expected 1 or more")
        views_per_decode = views_per_decode if mode == "train" else 1
        check(
            batch_size % views_per_decode == 0,
            f"batch_size is {batch_size}; expected a multiple of the {views_per_decode} views_per_decode",
        )
        check(len(manifest) > 0, "the manifest has no videos")
        if mode == "train":
            check(
                len(manifest) * views_per_decode >= step_entries,
                f"the manifest has {len(manifest)} videos, fewer than the {step_entries // views_per_decode} of one "
                "training step; use a smaller batch",
            )
        self._cache = None if cache is None else os.path.abspath(cache)
        check_reachable(manifest.source(0), self._cache, timeout_s=timeout_s)
        self.manifest = manifest
        self.device = _device(device)
        self.stats = LoaderStats()
        self._batch_size = batch_size // views_per_decode  # in videos, as is the order
        self._black = -(torch.tensor(mean) / torch.tensor(std)).view(3, 1, 1, 1)
        check(num_windows >= 1, f"num_windows is {num_windows}; expected 1 or more")
        check(
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
        count = len(os.sched_getaffinity(0)) if workers is None else workers
        self._host_share_is_given = host_share is not None
        routing, self.decode_note = choose_routing(
            decode, self.device, manifest, self._view, seed=seed, host_share=host_share, cores=max(count, 1)
        )
        self._labels = torch.from_numpy(np.append(manifest.labels, -1))  # the last one is padding's
        self._epoch = 0
        self._batches = 0  # consumed in this epoch
        self._iterator: object | None = None  # the one that is on its way through the epoch, or was left early
        self._table = TemporaryFolder()
        try:
            manifest.save_arrays(self._table.name)
        except OSError as error:
            reason = f"cannot be written ({error.strerror})"
            raise InputError(f"{self._table.name}: {reason}; TMPDIR=DIR names another temporary folder") from None
        cut = Cut(
            crop_size=crop_size,
            clips=self._view.count,
            windows=self._view.windows,
            mean=mean,
            std=std,
            half=dtype == torch.float16,
        )
        self._cut = cut
        is_staged = routing.engine == "nvdec"
        # Nothing is left to the graph but cutting, and on a CPU torch does that faster.
        self._is_cut_here = routing.engine == "host" and self.device.type == "cpu"
        self._memory = BatchMemory(
            (self._batch_size, cut.clips, 3, num_frames, crop_size, crop_size), np.float16 if cut.half else np.float32
        )
        threads = decode_threads or min(max(count, 4), _THREADS)
        shared = {"batch_size": self._batch_size, "workers": count, "prefetch": PREFETCH}
        if is_staged or self._is_cut_here:
            make_pipeline = partial(source_pipeline, **shared)
        else:
            own = threads if self.device.type == "cuda" else max(count, 1)
            make_pipeline = partial(clip_pipeline, cut=cut, device_id=self.device.index, threads=own, **shared)
        self._workers = Workers(
            make_pipeline,
            {
                "table": self._table.name,
                "root": absolute(manifest.root),
                "index": None if manifest.index is None else os.path.abspath(manifest.index),
                "cache": self._cache,
                "view": self._view,
                "order": self._order,
                "max_pixels": max_pixels,
            },
            manifest=manifest,
            routing=routing,
            batch_size=self._batch_size,
            count=count,
            timeout_s=timeout_s,
            count_fallback=self.stats.count_fallback,
        )
        weakref.finalize(self, self._workers.close)
        self._stage = None
        if is_staged:
            self._stage = DecodeStage(
                self._workers,
                cut,
                manifest=manifest,
                device=self.device,
                batch_size=self._batch_size,
                threads=threads,
                timeout_s=timeout_s,
            )

    def __len__(self) -> int:
        """Batches an epoch, the same on every rank."""
        return self._order.rank_entries // self._batch_size

    def window_seconds(self, sample_id: int) -> np.ndarray:
        """When each window of the test starts and ends, float64 [num_windows, 2]; by the frame rate, in seconds."""
        video = self.manifest[sample_id]
        positions = windows_of_test(video, self._view)
        return np.stack([positions[:, 0], positions[:, -1] + 1], axis=1) / video.fps

    @property
    def host_share(self) -> float:
        """Share of the videos that NVDEC takes which the workers decode."""
        return self._workers.routing.host_share

    @property
    def decoders(self) -> dict[str, str]:
        """Codec -> what decodes it here: "NVDEC", "NVDEC and host (31%)", "NVDEC by DALI", "torchcodec", "DALI" or
        "host"; single files may differ (`stats.fallbacks`)."""
        routing = self._workers.routing
        share = f" and host ({routing.host_share:.0%})" if routing.host_share else ""
        if routing.engine == "dali":
            name = "NVDEC by DALI" if routing.on_gpu else "DALI"
        else:
            name = ("NVDEC" if routing.on_gpu else "torchcodec") + share
        return {codec: name if routing.takes_codec(codec) else "host" for codec in self.manifest.codecs}

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
            position = {"epoch": self._epoch + 1, "entries": 0}
        else:
            position = {"epoch": self._epoch, "entries": self._batches * self._clips_a_batch}
        return position | self._identity() | ({} if self._stage is None else {"host_share": self.host_share})

    @property
    def _clips_a_batch(self) -> int:
        """Over all ranks."""
        return self._batch_size * self._view.per_decode * self._order.world_size

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to a position, without decoding what is skipped; other batch sizes, workers and ranks are fine.

        The share of the host becomes that of the position, unless this loader was given one.
        """
        for key, value in self._identity().items():
            check(
                state.get(key) == value,
                f"the saved position has {key} {state.get(key)}, this loader {value}: the order would be another",
            )
        batches, rest = divmod(state["entries"], self._clips_a_batch)
        check(
            not rest,
            f"the saved position, {state['entries']} clips, is within a batch of "
            f"{self._clips_a_batch // self._order.world_size} clips x {self._order.world_size} ranks",
        )
        share = state.get("host_share")
        if self._stage is not None and share is not None and not self._host_share_is_given:
            self.close()
            self._workers.routing = replace(self._workers.routing, host_share=share)
            self.decode_note = f"host_share {share:g}, from the checkpoint"
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
        if self._stage is not None:
            self._stage.close()
        self._workers.close()

    def _next_batch(self) -> Batch:
        place = self._epoch * self._order.rank_entries + self._batches * self._batch_size
        if self._stage is not None:
            return self._from_stage(*self._stage.run(place))
        outputs = self._workers.run(place)
        return self._from_workers(Sample(*outputs)) if self._is_cut_here else self._from_graph(*outputs[:-1])

    def _from_workers(self, fields: Sample) -> Batch:
        cut, clips, outcomes = self._cut, self._memory.take(), []
        for index in range(self._batch_size):
            sample = Sample(*(np.asarray(field[index]) for field in fields))
            cut_clips(sample.pictures, sample.picks, sample.rectangles, bool(sample.transpose), cut, clips[index])
            fault, fallback = (text.tobytes().decode() for text in (sample.fault, sample.fallback))
            outcomes.append(Outcome(int(sample.sample_id), "host", tuple(sample.packets.tolist()), fault, fallback))
        return self._receive(clips.squeeze(1) if cut.clips == 1 else clips, outcomes)

    def _from_stage(self, clips, decoded: list) -> Batch:
        outcomes = [
            Outcome(int(sample.sample_id), each.engine, tuple(sample.packets.tolist()), each.fault, each.fallback)
            for sample, each in decoded
        ]
        return self._receive(self._to_torch(clips, self._stage.pipeline), outcomes)

    def _from_graph(self, clips, sample_ids, packets, faults, fallbacks, is_host, shapes) -> Batch:
        clips = self._to_torch(clips, self._workers.pipeline)
        outcomes = []
        for index, sample_id in enumerate(np.array(sample_ids.as_tensor()).tolist()):
            fault, fallback = (np.array(each.at(index)).tobytes().decode() for each in (faults, fallbacks))
            engine = "host" if np.array(is_host.at(index)) else "dali"
            if engine == "dali":
                height, width = np.array(shapes.at(index))[1:3].tolist()
                fault = size_mismatch((height, width), coded_size(self.manifest[sample_id]))
                if fault:
                    clips[index] = self._black.to(clips.device)
            read_and_kept = tuple(np.array(packets.at(index)).tolist())
            outcomes.append(Outcome(sample_id, engine, read_and_kept, fault, fallback))
        return self._receive(clips, outcomes)

    def _to_torch(self, clips, pipeline) -> torch.Tensor:
        # On the CPU the batch keeps DALI's memory; on a GPU, a copy spares it from knowing DALI's streams.
        return to_torch_tensor(clips.as_tensor(), copy=self.device.type != "cpu" or not pipeline.exec_dynamic)

    def _receive(self, clips: torch.Tensor, outcomes: list[Outcome]) -> Batch:
        stats, views = self.stats, self._view.per_decode
        sample_ids, valid, engines = [], [], []
        for sample_id, engine, (read, kept), fault, fallback in outcomes:
            self._workers.note(sample_id, is_bad=bool(fault))
            is_valid = sample_id != PADDING and not fault
            stats.packets_read += read
            stats.packets_kept += kept
            if fallback:
                stats.count_fallback(fallback)
            if fault:
                stats.faults.append(Fault(self._epoch, sample_id, self.manifest.file(sample_id), fault))
            if is_valid:
                stats.engines[engine] = stats.engines.get(engine, 0) + 1
            sample_ids += [sample_id] * views
            valid += [is_valid] * views
            engines += [engine if is_valid else ""] * views
        if views > 1:
            clips = clips.flatten(0, 1)
        sample_ids = torch.tensor(sample_ids)
        return Batch(clips, self._labels[sample_ids], sample_ids, torch.tensor(valid), tuple(engines))


def _short_sides(mode: Mode, crop_size: int, short_side: float | tuple[float, float] | None) -> tuple[float, float]:
    if short_side is None:
        low, high = {
            "train": crops.JITTER,
            "validate": (crops.VALIDATION_SCALE, crops.VALIDATION_SCALE),
            "test": (1, 1),
        }[mode]
        return low * crop_size, high * crop_size
    low, high = short_side if isinstance(short_side, Sequence) else (short_side, short_side)
    check(
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
    check(device.type in ("cpu", "cuda"), f"device is {name!r}; expected cpu, cuda or cuda:N")
    if device.type == "cpu":
        return torch.device("cpu")
    check(torch.cuda.is_available(), f"device is {name!r}, but torch finds no GPU here")
    return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
