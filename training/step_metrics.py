"""The result of an optimizer step, and means over the steps between two lines of the log."""

import dataclasses
import time
from collections.abc import Sequence

import torch

from common.metrics import Metric
from common.system_metrics import gpu_metrics, host_memory_gib
from dali_pipelines import ClipLoader


@dataclasses.dataclass(frozen=True)
class StepResult:
    """The result of one optimizer step, over all processes."""

    loss: float
    """Mean over the valid clips; may be non-finite in a step that fp16 skipped."""
    top1: float
    """Number of clips, like `top5` and `valid`."""
    top5: float
    valid: float
    lr: float
    grad_norm: float
    """Before clipping."""
    loss_scale: float
    skipped: bool


class Interval:
    """Means over the steps between two lines of the log.

    before: steps of this interval from before the run was resumed. They count for the means, not for the speed.
    """

    def __init__(self, loader: ClipLoader, device: torch.device, *, before: Sequence[StepResult] = ()):
        self._stats, self._device = loader.stats, device
        self._stats_before = dataclasses.replace(loader.stats)
        self._started = time.perf_counter()
        self._results = list(before)
        self._num_before = len(before)

    def add(self, result: StepResult) -> None:
        """Adds the result of a step."""
        self._results.append(result)

    @property
    def mean_loss(self) -> float:
        """Loss per valid clip; 0 if there is none."""
        done = [result for result in self._results if not result.skipped]
        return sum(result.loss * result.valid for result in done) / max(sum(result.valid for result in done), 1)

    @property
    def clips_per_second(self) -> float:
        """Valid clips per second, over all processes."""
        clips = sum(result.valid for result in self._results[self._num_before :])
        return clips / (time.perf_counter() - self._started)

    @property
    def data_wait_share(self) -> float:
        """Share of the time, 0 to 1, that this process has spent waiting for the loader."""
        return self._wait_seconds / (time.perf_counter() - self._started)

    @property
    def _wait_seconds(self) -> float:
        return self._stats.wait_seconds - self._stats_before.wait_seconds

    def learning_metrics(self) -> dict[str, float]:
        """Loss, accuracies, gradient norm and schedule, by name."""
        last, steps = self._results[-1], len(self._results)
        learned = {}
        if done := [result for result in self._results if not result.skipped]:
            clips = max(sum(result.valid for result in done), 1)
            learned = {
                Metric.LOSS: self.mean_loss,
                Metric.TOP1: sum(result.top1 for result in done) / clips,
                Metric.TOP5: sum(result.top5 for result in done) / clips,
                Metric.GRAD_NORM: done[-1].grad_norm,
            }
        return {
            **learned,
            Metric.LEARNING_RATE: last.lr,
            Metric.LOSS_SCALE: last.loss_scale,
            Metric.SKIPPED_STEPS: steps - len(done),
        }

    def metrics(self) -> dict[str, float]:
        """All metrics by name. Clips are counted over all processes; waiting and packets only in this one."""
        steps = len(self._results) - self._num_before
        return {
            **self.learning_metrics(),
            Metric.CLIPS_PER_SECOND: self.clips_per_second,
            Metric.STEP_MS: 1000 * (time.perf_counter() - self._started) / steps,
            Metric.DATA_WAIT_MS: 1000 * self._wait_seconds / steps,
            Metric.DATA_WAIT_SHARE: self.data_wait_share,
            Metric.PACKETS_READ: self._stats.packets_read - self._stats_before.packets_read,
            Metric.PACKETS_KEPT: self._stats.packets_kept - self._stats_before.packets_kept,
            Metric.HOST_MEMORY_GIB: host_memory_gib(),
            **gpu_metrics(self._device),
        }
