"""What a loader returns: batches, and statistics of the loading."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from nvidia.dali.plugin.pytorch.torch_utils import to_torch_tensor


class Batch(NamedTuple):
    """One batch. Clips are on the loader's device, everything else is in host memory.

    Every batch has B rows on every rank. In validation and test, the last step is rarely full: it is padded with rows
    whose label and sample id are -1, and whose `valid` is False. With 7 videos and batches of 4, the second batch has

        sample_ids   [ 4,  5,  6, -1]
        valid        [ True,  True,  True, False]

    A video that cannot be read keeps its label and sample id, but is not valid either. Leave out the rows that are not
    valid when you count or average: `batch.clips[batch.valid]`. Training has no padding: it drops a step that is not
    full.
    """

    clips: torch.Tensor
    """[B, C, T, H, W]; mode "test": [B, V, C, T, H, W], V = 3 crops of each window. float32 or float16,
    (value / 255 - mean) / std."""
    labels: torch.Tensor
    """int64 [B]; -1 if the entry is padding."""
    sample_ids: torch.Tensor
    """int64 [B]: row in the manifest; -1 if the entry is padding."""
    valid: torch.Tensor
    """bool [B]: False for padding (sample id -1) and for videos that cannot be read; those clips are black."""
    engines: tuple[str, ...] = ()
    """What decoded each clip: "nvdec" (torchcodec), "dali", or "host" (the workers: PyAV, or DALI for frames that are
    images); "" if it is not valid."""


class Outcome(NamedTuple):
    """The result for one sample."""

    sample_id: int
    engine: str
    packets: tuple[int, int]
    """Packets read, and packets kept."""
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
    """What a loader has done since it was created."""

    clips: int = 0
    seconds: float = 0.0
    """Seconds from the first request of each epoch to its last batch, including the consumer's own time."""
    wait_seconds: float = 0.0
    """Part of `seconds` spent waiting for a batch."""
    packets_read: int = 0
    packets_kept: int = 0
    """Packets fed to a decoder, out of `packets_read`."""
    fallbacks: dict[str, int] = field(default_factory=dict)
    """Reason -> number of samples that used a fallback: the whole file decoded instead of some packets, decoding on the
    host instead of the GPU or DALI, workers restarted, a cache that cannot be written."""
    engines: dict[str, int] = field(default_factory=dict)
    """Engine ("nvdec", "dali", "host") -> number of readable samples it has decoded."""
    faults: list[Fault] = field(default_factory=list)

    def count_fallback(self, reason: str, count: int = 1) -> None:
        """Counts samples that used a fallback, by reason."""
        self.fallbacks[reason] = self.fallbacks.get(reason, 0) + count

    def count(self, outcome: Outcome, *, epoch: int, path: str, is_valid: bool) -> None:
        """Counts one sample of `epoch`, whose video is at `path`."""
        read, kept = outcome.packets
        self.packets_read += read
        self.packets_kept += kept
        if outcome.fallback:
            self.count_fallback(outcome.fallback)
        if outcome.fault:
            self.faults.append(Fault(epoch, outcome.sample_id, path, outcome.fault))
        if is_valid:
            self.engines[outcome.engine] = self.engines.get(outcome.engine, 0) + 1

    @property
    def clips_per_second(self) -> float:
        """Clips per second while the loader was being iterated."""
        return self.clips / self.seconds if self.seconds else 0.0


def to_torch(clips: Any, pipeline: Any, device: torch.device) -> torch.Tensor:
    """An output of a DALI pipeline as a tensor: it shares DALI's memory on the CPU; on a GPU it is a copy, so that
    nobody has to know about DALI's streams."""
    made: torch.Tensor = to_torch_tensor(clips.as_tensor(), copy=device.type != "cpu" or not pipeline.exec_dynamic)
    return made
