"""ClipLoader: batches of clips as torch tensors, epoch by epoch, from a position that can be saved."""

import os
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Unpack

import numpy as np
import torch
from nvidia.dali import Pipeline

from dali_pipelines.batches import Batch, LoaderStats, Outcome
from dali_pipelines.clip_source import ClipSource
from dali_pipelines.decode_stage import DecodeStage
from dali_pipelines.engines import DECODES, Decode
from dali_pipelines.errors import InputError, check
from dali_pipelines.files import absolute, check_reachable
from dali_pipelines.frame_names import CODECS as FRAME_CODECS
from dali_pipelines.graph import Cut, clip_pipeline, source_pipeline
from dali_pipelines.host_decoder import MAX_PIXELS
from dali_pipelines.manifest import Manifest
from dali_pipelines.plan import PADDING, EntrySampler, View, ViewSettings, windows_of_test
from dali_pipelines.processes import TemporaryFolder
from dali_pipelines.routing import choose_routing
from dali_pipelines.stages import GraphStage, HostStage, Stage
from dali_pipelines.workers import PREFETCH, Workers

_THREADS = 16  # for decoding on a GPU: the best of 1 to 32 on an H200 with 16 cores (docs/benchmarks.md)


class ClipLoader:
    """Batches of clips from the videos of a manifest, decoded, cropped and normalised by DALI.

        loader = ClipLoader(manifest, mode="train", batch_size=8, num_frames=8, crop_size=224)
        for batch in loader:                # one epoch
            batch.clips                     # [8, 3, 8, 224, 224]

    `iter(loader)` starts the next epoch, or resumes at the position that `load_state_dict` set; leaving a `for` early
    ends that epoch. Every clip is a pure function of (seed, epoch, sample id).

    mode, num_frames, crop_size, stride, target_fps, past_end, short_side, flip, views_per_decode, num_windows,
        windows_at_once: how clips are cut out of a video, see `View`. "train" shuffles and drops the tail that does not
        fill a step; "validate" and "test" read in order and pad the last step. views_per_decode, which must divide
        batch_size, multiplies the clips of an epoch; those of a video are neighbours in a batch and share a sample id.
        In the test, each entry has V = 3 * num_windows (or 3 * windows_at_once) views, the crops of the first window
        first; the entries of a video are consecutive and share a sample id.
    batch_size: clips per batch on this rank.
    mean, std: three numbers each, for values in 0..1.
    dtype: torch.float32 or torch.float16.
    device: "cpu", or a CUDA device: decode (NVDEC), resize and normalise happen there.
    workers: processes that read files, and decode what the GPU does not; 0: in this process; None: one per CPU core.
    step_entries: clips per optimizer step over all ranks and micro-batches; default batch_size * world_size.
    decode: what decodes.
        "auto": on a GPU, NVDEC and the workers side by side, each its share of the videos; on the CPU, the workers.
        "nvdec": NVDEC, through torchcodec, for all that it takes. On the CPU, torchcodec's CPU decoder (for tests).
            With both, DALI decodes frames that are JPEGs on the GPU, by nvJPEG; otherwise the workers do, by DALI.
        "dali": DALI's own decoder; on a GPU NVDEC, slowly; on the CPU VP8, VP9 and MJPEG.
        "host": the workers, with PyAV.
        Videos that an engine does not take go to the workers, and are counted in `stats.fallbacks`.
    host_share: share, 0 to 1, of the videos NVDEC could decode that the workers decode instead; the same videos in
        every epoch. Default: with "auto", the share that keeps both busy, given the manifest, the GPU and the number of
        workers; otherwise 0. It is part of the position, so that a resumed run sees the same pixels.
    decode_threads: threads that feed NVDEC, or DALI's decoder; default: one per worker, 4 to 16.
    timeout_s: seconds that a worker may take for one sample; after that the workers are restarted, and the sample is a
        fault. Has no effect with workers=0.
    cache: folder on a local disk that keeps videos read from URLs (`Manifest.root`) for later epochs, if they match the
        manifest; any number of loaders may share it. None: every epoch reads them again.
    max_pixels: the most pixels that a frame may have; a video with larger frames is a fault.

    Raises `InputError` for settings that cannot work.
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        batch_size: int,
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
        timeout_s: float = 60,
        cache: str | os.PathLike[str] | None = None,
        max_pixels: int = MAX_PIXELS,
        **view: Unpack[ViewSettings],
    ):
        step_entries = step_entries or batch_size * world_size
        check(batch_size >= 1, f"batch_size is {batch_size}; expected 1 or more")
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
        self._view = View(**view)
        views_per_decode = self._view.views_per_decode
        check(
            batch_size % views_per_decode == 0,
            f"batch_size is {batch_size}; expected a multiple of the {views_per_decode} views_per_decode",
        )
        check(len(manifest) > 0, "the manifest has no videos")
        if self._view.mode == "train":
            check(
                len(manifest) * views_per_decode >= step_entries,
                f"the manifest has {len(manifest)} videos, fewer than the {step_entries // views_per_decode} of one "
                "training step; use a smaller batch",
            )
        cache = None if cache is None else os.path.abspath(cache)
        check_reachable(manifest.source(0), cache, timeout_s=timeout_s)
        self.manifest = manifest
        self.device = _device(device)
        self.stats = LoaderStats()
        self._batch_size = batch_size // views_per_decode  # in entries, as is the sampler
        self._sampler = EntrySampler(
            rows=len(manifest) * self._view.entries_per_video,
            training=self._view.mode == "train",
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
        self._labels = torch.from_numpy(np.append(manifest.labels, -1))  # the last one is for padding
        self._epoch = 0
        self._batches = 0  # consumed in this epoch
        self._iterator: object | None = None  # the current one, which may have been left early
        self._table = TemporaryFolder()
        try:
            manifest.save_arrays(self._table.name)
        except OSError as error:
            reason = f"cannot be written ({error.strerror})"
            raise InputError(f"{self._table.name}: {reason}; TMPDIR=DIR sets another temporary folder") from None
        cut = Cut(
            crop_size=self._view.crop_size,
            clips=self._view.clips_per_entry,
            windows=self._view.windows_per_entry,
            mean=mean,
            std=std,
            half=dtype == torch.float16,
        )
        threads = decode_threads or min(max(count, 4), _THREADS)
        # The graph would only have to cut, and on a CPU torch does that faster.
        is_cut_by_torch = routing.engine == "host" and self.device.type == "cpu"
        make_pipeline: Callable[[ClipSource], Pipeline]
        if routing.engine == "nvdec" or is_cut_by_torch:
            make_pipeline = partial(source_pipeline, batch_size=self._batch_size, workers=count, prefetch=PREFETCH)
        else:
            make_pipeline = partial(
                clip_pipeline,
                cut=cut,
                batch_size=self._batch_size,
                device_id=self.device.index,
                workers=count,
                threads=threads if self.device.type == "cuda" else max(count, 1),
                prefetch=PREFETCH,
            )
        self._workers = Workers(
            make_pipeline,
            {
                "table": self._table.name,
                "root": absolute(manifest.root),
                "index": None if manifest.index is None else os.path.abspath(manifest.index),
                "cache": cache,
                "view": self._view,
                "sampler": self._sampler,
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
        self._stage: Stage
        if routing.engine == "nvdec":
            self._stage = DecodeStage(
                self._workers,
                cut,
                manifest=manifest,
                device=self.device,
                batch_size=self._batch_size,
                threads=threads,
                timeout_s=timeout_s,
            )
        elif is_cut_by_torch:
            frames = self._view.num_frames
            self._stage = HostStage(self._workers, cut, num_frames=frames, batch_size=self._batch_size)
        else:
            self._stage = GraphStage(self._workers, manifest=manifest, device=self.device, mean=mean, std=std)

    def __len__(self) -> int:
        """Batches per epoch, the same on every rank."""
        return self._sampler.rank_entries // self._batch_size

    def window_seconds(self, sample_id: int) -> np.ndarray:
        """Start and end of each test window in seconds, float64 [num_windows, 2], computed from the frame rate."""
        video = self.manifest[sample_id]
        positions = windows_of_test(video, self._view)
        seconds: np.ndarray = np.stack([positions[:, 0], positions[:, -1] + 1], axis=1) / video.fps
        return seconds

    @property
    def host_share(self) -> float:
        """Share of the videos NVDEC could decode that the workers decode."""
        return self._workers.routing.host_share

    @property
    def decoders(self) -> dict[str, str]:
        """Codec -> what decodes it here: "NVDEC", "NVDEC and host (31%)", "NVDEC by DALI", "torchcodec", "DALI",
        "nvJPEG" (frames that are JPEGs, by DALI) or "host"; single files may differ (`stats.fallbacks`)."""
        routing = self._workers.routing
        share = f" and host ({routing.host_share:.0%})" if routing.host_share else ""
        if routing.engine == "dali":
            name = "NVDEC by DALI" if routing.on_gpu else "DALI"
        else:
            name = ("NVDEC" if routing.on_gpu else "torchcodec") + share
        images = "nvJPEG" if routing.engine == "nvdec" and routing.on_gpu else "DALI"
        return {
            codec: images if codec in FRAME_CODECS else name if routing.takes_codec(codec) else "host"
            for codec in self.manifest.codecs
        }

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
            place = self._epoch * self._sampler.rank_entries + self._batches * self._batch_size
            batch = self._receive(*self._stage.run(place))
            now = time.perf_counter()
            self._batches += 1
            self.stats.clips += int((batch.sample_ids != PADDING).sum())
            self.stats.wait_seconds += now - asked
            self.stats.seconds += now - started
            started = now
            yield batch

    def _receive(self, clips: torch.Tensor, outcomes: list[Outcome]) -> Batch:
        """Counts the results of a batch, and adds labels, sample ids and engines to its clips."""
        views = self._view.views_per_decode
        sample_ids: list[int] = []
        valid: list[bool] = []
        engines: list[str] = []
        for outcome in outcomes:
            sample_id, is_bad = outcome.sample_id, bool(outcome.fault)
            is_valid = sample_id != PADDING and not is_bad
            self._workers.note(sample_id, is_bad=is_bad)
            path = self.manifest.file(sample_id) if is_bad else ""
            self.stats.count(outcome, epoch=self._epoch, path=path, is_valid=is_valid)
            sample_ids += [sample_id] * views
            valid += [is_valid] * views
            engines += [outcome.engine if is_valid else ""] * views
        if views > 1:
            clips = clips.flatten(0, 1)
        rows = torch.tensor(sample_ids)
        return Batch(clips, self._labels[rows], rows, torch.tensor(valid), tuple(engines))

    def _go_to(self, epoch: int, batches: int = 0) -> None:
        """The next `iter` starts here; running iterators end."""
        self._epoch, self._batches, self._iterator = epoch, batches, None

    def set_epoch(self, epoch: int) -> None:
        """The next `iter` starts at the beginning of this epoch."""
        self._go_to(epoch)

    def state_dict(self) -> dict[str, Any]:
        """The position: the entries that the caller has received, over all ranks, without those decoded ahead."""
        if self._batches == len(self):  # the same place as the next epoch's start
            position = {"epoch": self._epoch + 1, "entries": 0}
        else:
            position = {"epoch": self._epoch, "entries": self._batches * self._clips_a_batch}
        return position | self._identity() | ({"host_share": self.host_share} if self._is_shared else {})

    @property
    def _is_shared(self) -> bool:
        """Whether NVDEC and the workers share the decoding."""
        return self._workers.routing.engine == "nvdec"

    @property
    def _clips_a_batch(self) -> int:
        """Clips per batch over all ranks."""
        return self._batch_size * self._view.views_per_decode * self._sampler.world_size

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to a position without decoding the skipped clips; batch size, workers and ranks may differ.

        The host's share is taken from the position, unless this loader was given one. Raises `InputError` if the
        position belongs to another order of clips.
        """
        for key, value in self._identity().items():
            check(
                state.get(key) == value,
                f"the saved position has {_IDENTITY.get(key, key)} {state.get(key)}, this loader {value}: the order of "
                "clips would differ",
            )
        batches, rest = divmod(state["entries"], self._clips_a_batch)
        world_size = self._sampler.world_size
        check(
            not rest,
            f"the saved position, {state['entries']} clips, is within a batch of "
            f"{self._clips_a_batch // world_size} clips x {world_size} ranks",
        )
        share = state.get("host_share")
        if self._is_shared and share is not None and not self._host_share_is_given:
            self.close()
            self._workers.routing = replace(self._workers.routing, host_share=share)
            self.decode_note = f"host_share {share:g}, from the checkpoint"
        self._go_to(state["epoch"], batches)

    def _identity(self) -> dict[str, Any]:
        """The settings that decide the clips of an epoch and their order."""
        views_per_decode = self._view.views_per_decode
        return {
            "mode": self._view.mode,
            "seed": self._sampler.seed,
            "rows": self._sampler.rows,
            "step_entries": self._sampler.step_entries * views_per_decode,
            "views_per_decode": views_per_decode,
        }

    def close(self) -> None:
        """Stops the workers; the next `iter` starts them again."""
        self._stage.close()


_IDENTITY = {
    "rows": "videos in the manifest:",
    "step_entries": "clips per step (step_entries, optim.global_batch_size):",
}
"""Keys of `ClipLoader.state_dict` in words, for errors."""


def _device(name: str | torch.device) -> torch.device:
    """The device, with its number if it is a GPU."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"device is {name!r}; expected cpu, cuda or cuda:N") from None
    check(device.type in ("cpu", "cuda"), f"device is {name!r}; expected cpu, cuda or cuda:N")
    if device.type == "cpu":
        return torch.device("cpu")
    check(torch.cuda.is_available(), f"device is {name!r}, but torch finds no GPU here")
    return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
