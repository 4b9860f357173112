"""What a loader gives its user: batches, and what was counted while they were made."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from nvidia.dali.plugin.pytorch.torch_utils import to_torch_tensor


class Batch(NamedTuple):
    """Clips are on the loader's device, the rest in host memory."""

    clips: torch.Tensor
    """[B, C, T, H, W]; mode "test": [B, V, C, T, H, W], V = 3 crops of each window. float32 or float16,
    (value / 255 - mean) / std."""
    labels: torch.Tensor
    """int64 [B]; -1 if the entry is padding."""
    sample_ids: torch.Tensor
    """int64 [B]: row in the manifest; -1 if the entry is padding."""
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
    """Reason -> how many samples used a fallback: all of a file decoded instead of some packets, host decoding instead
    of a GPU's or DALI's, workers started again, a cache that cannot be written."""
    engines: dict[str, int] = field(default_factory=dict)
    """Engine ("nvdec", "dali", "host") -> how many readable samples it has decoded."""
    faults: list[Fault] = field(default_factory=list)

    def count_fallback(self, reason: str, count: int = 1) -> None:
        """Counts samples that used a fallback, by its reason."""
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
        """Clips per second of the time that the loader was iterated."""
        return self.clips / self.seconds if self.seconds else 0.0


def to_torch(clips: Any, pipeline: Any, device: torch.device) -> torch.Tensor:
    """An output of a DALI pipeline. On the CPU it keeps DALI's memory; on a GPU, a copy spares it from knowing DALI's
    streams."""
    made: torch.Tensor = to_torch_tensor(clips.as_tensor(), copy=device.type != "cpu" or not pipeline.exec_dynamic)
    return made
