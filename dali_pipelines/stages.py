"""Stages turn the workers' samples into clips. There are three:

HostStage      the workers decode, and torch cuts on the CPU
GraphStage     the workers' pipeline does everything: DALI decodes what the workers have not, and cuts
DecodeStage    NVDEC decodes between the workers and DALI's cut (`decode_stage`)
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from dali_pipelines.batches import Outcome, to_torch
from dali_pipelines.clip_source import Sample
from dali_pipelines.cpu_cut import BatchMemory, cut_clips
from dali_pipelines.graph import Cut
from dali_pipelines.host_decoder import size_mismatch
from dali_pipelines.manifest import Manifest, coded_size
from dali_pipelines.workers import Workers


class Stage(Protocol):
    """Turns the workers' samples into batches of clips."""

    def run(self, place: int) -> tuple[torch.Tensor, list[Outcome]]:
        """The clips [B, C, T, H, W], or [B, V, C, T, H, W] if there are several per sample, and the results of the
        batch whose first entry is at `place`. Raises `InputError`."""

    def close(self) -> None:
        """Stops the workers; the next `run` starts them again."""


class HostStage:
    """The workers decode, and torch cuts. `workers` must run a `source_pipeline` that decodes every sample."""

    def __init__(self, workers: Workers, cut: Cut, *, num_frames: int, batch_size: int):
        self._workers, self._cut, self._batch_size = workers, cut, batch_size
        shape = (batch_size, cut.clips, 3, num_frames, cut.crop_size, cut.crop_size)
        self._memory = BatchMemory(shape, np.float16 if cut.half else np.float32)

    def run(self, place: int) -> tuple[torch.Tensor, list[Outcome]]:
        """See `Stage.run`."""
        fields = Sample(*self._workers.run(place))
        cut, clips, outcomes = self._cut, self._memory.take(), []
        for index in range(self._batch_size):
            sample = Sample(*(np.asarray(field[index]) for field in fields))
            cut_clips(sample.frames, sample.picks, sample.rectangles, bool(sample.transpose), cut, clips[index])
            read, kept = sample.packets.tolist()
            fault, fallback = (text.tobytes().decode() for text in (sample.fault, sample.fallback))
            outcomes.append(Outcome(int(sample.sample_id), "host", (read, kept), fault, fallback))
        return clips.squeeze(1) if cut.clips == 1 else clips, outcomes

    def close(self) -> None:
        """Ends the workers."""
        self._workers.close()


class GraphStage:
    """The workers' pipeline does everything. `workers` must run a `clip_pipeline`."""

    def __init__(
        self,
        workers: Workers,
        *,
        manifest: Manifest,
        device: torch.device,
        mean: Sequence[float],
        std: Sequence[float],
    ):
        self._workers, self._manifest, self._device = workers, manifest, device
        self._black = -(torch.tensor(mean) / torch.tensor(std)).view(3, 1, 1, 1)

    def run(self, place: int) -> tuple[torch.Tensor, list[Outcome]]:
        """See `Stage.run`."""
        outputs, sample_ids, packets, faults, fallbacks, is_host, shapes, *_ = self._workers.run(place)
        clips = to_torch(outputs, self._workers.pipeline, self._device)
        outcomes = []
        for index, sample_id in enumerate(np.array(sample_ids.as_tensor()).tolist()):
            fault, fallback = (np.array(each.at(index)).tobytes().decode() for each in (faults, fallbacks))
            engine = "host" if np.array(is_host.at(index)) else "dali"
            if engine == "dali":
                height, width = np.array(shapes.at(index))[1:3].tolist()
                fault = size_mismatch((height, width), coded_size(self._manifest[sample_id]))
                if fault:
                    clips[index] = self._black.to(clips.device)
            read, kept = np.array(packets.at(index)).tolist()
            outcomes.append(Outcome(sample_id, engine, (read, kept), fault, fallback))
        return clips, outcomes

    def close(self) -> None:
        """Ends the workers."""
        self._workers.close()
