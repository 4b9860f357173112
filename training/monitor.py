"""The output of a run: its loggers, metrics.jsonl, a progress bar, and lines on stdout."""

import contextlib
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from common.clip_images import clip_grid
from common.config import Config
from common.metrics import Metric
from training.loggers import Logger, make_loggers
from training.step_metrics import Interval


class NullMonitor:
    """A monitor that shows nothing."""

    size = 0

    def open(self, config: Config, *, step: int, size: int) -> None:
        """Opens the logs at `step`, cutting metrics.jsonl to `size` bytes."""

    def print(self, text: str) -> None:
        """Prints a line."""

    def advance(self, interval: Interval, *, epoch: int) -> None:
        """Advances the progress bar, with the results of an interval."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Writes values at a step."""

    def log_interval(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the values of an interval that ends at a step."""

    def log_clips(self, step: int, clips: Tensor, *, mean: Sequence[float], std: Sequence[float]) -> None:
        """Draws the first clips [B, 3, T, S, S] of a step."""

    def close(self, *, is_complete: bool = True) -> None:
        """Closes the logs. is_complete: whether the run has reached its end; one that has not may be resumed."""


class Monitor(NullMonitor):
    """Writes metrics.jsonl below `folder`, drives the loggers (`train.loggers`), and prints lines on stdout.

    Only the main process has one. If the disk is full, or a service does not answer, log entries are lost, but the run
    continues.
    """

    def __init__(self, folder: Path, *, total_steps: int, verbose: bool = True):
        """verbose: show the lines and the progress bar."""
        self.size = 0
        """Size of metrics.jsonl in bytes."""
        self._folder, self._total_steps, self._verbose = folder, total_steps, verbose
        self._lines = folder / "metrics.jsonl"
        self._bar = tqdm(disable=True)
        self._has_complained = False
        self._loggers: list[Logger] = []
        self._failed: set[Logger] = set()
        _silence_writer_threads()

    def open(self, config: Config, *, step: int, size: int) -> None:
        """Start at `step`, when metrics.jsonl had `size` bytes, and remove later entries. Also called after a
        rollback."""
        self.close()
        self.size = 0
        self._loggers = self._loggers or make_loggers(config, self.print)
        self._tell(lambda logger: logger.begin(config, step=step))
        if self._lines.exists():
            self.size = min(size, self._lines.stat().st_size)
            os.truncate(self._lines, self.size)
        self._bar = tqdm(
            total=self._total_steps,
            initial=step,
            unit="step",
            dynamic_ncols=True,
            disable=not (self._verbose and sys.stderr.isatty()),
        )

    def print(self, text: str) -> None:
        """Print a line on stdout, above the progress bar."""
        if self._verbose:
            self._bar.write(text, file=sys.stdout)
            sys.stdout.flush()

    def advance(self, interval: Interval, *, epoch: int) -> None:
        """Advance the progress bar by a step of `epoch` (from 1)."""
        self._bar.update()
        if not self._bar.disable:
            self._bar.set_postfix(
                {
                    "epoch": epoch,
                    "loss": f"{interval.mean_loss:.3f}",
                    "clips/s": f"{interval.clips_per_second:.1f}",
                    "data wait": f"{interval.data_wait_share:.0%}",
                },
                refresh=False,
            )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log values by name (`Metric`) at an optimizer step: to the loggers, and as a line of metrics.jsonl."""
        self._tell(lambda logger: logger.log(step, values))
        self._write_line({"step": step, **values})

    def log_interval(self, step: int, values: Mapping[str, float]) -> None:
        """`log` the values of an `Interval`, and print a line if there is no progress bar."""
        self.log(step, values)
        if self._bar.disable:
            seconds = (self._total_steps - step) * values[Metric.STEP_MS] / 1000
            self.print(
                f"step {step}/{self._total_steps}, epoch {values[Metric.EPOCH]:.2f}: "
                f"loss {values.get(Metric.LOSS, math.nan):.4f}, lr {values[Metric.LEARNING_RATE]:.3g}, "
                f"{values[Metric.CLIPS_PER_SECOND]:.1f} clips/s, data wait {values[Metric.DATA_WAIT_SHARE]:.0%}, "
                f"ETA {tqdm.format_interval(seconds)}"
            )

    def log_clips(self, step: int, clips: Tensor, *, mean: Sequence[float], std: Sequence[float]) -> None:
        """Log the first four clips [B, 3, T, S, S] as an image: a row per clip, a column per frame."""
        image = clip_grid(clips[:4], mean=mean, std=std)
        self._tell(lambda logger: logger.log_image(step, image))

    def _tell(self, call: Callable[[Logger], None]) -> None:
        """Call all loggers. Whatever one of them raises, training continues, and a line says so once."""
        for logger in self._loggers:
            if logger in self._failed and not logger.keeps_trying:
                continue
            try:
                call(logger)
            except Exception as error:  # services raise all kinds
                reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}".splitlines()[0][:300]
                if logger not in self._failed:
                    self.print(f"{logger.name}: cannot be written ({reason}); training continues without it")
                self._failed.add(logger)

    def _write_line(self, values: Mapping[str, float]) -> None:
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}  # JSON has no NaN
        line = (json.dumps({"time": round(time.time(), 3), **finite}, allow_nan=False) + "\n").encode()
        try:
            with open(self._lines, "ab") as file:
                file.write(line)
            self.size += len(line)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.truncate(self._lines, self.size)  # no partial lines
            self._complain("metrics.jsonl", error)

    def _complain(self, name: str, error: OSError) -> None:
        if not self._has_complained:
            self.print(f"{self._folder / name}: cannot be written ({error.strerror}); training continues without it")
        self._has_complained = True

    def close(self, *, is_complete: bool = True) -> None:
        """See `NullMonitor.close`."""
        self._bar.close()
        self._tell(lambda logger: logger.close(is_complete=is_complete))


def _silence_writer_threads() -> None:
    """Silence TensorBoard's thread, which prints a traceback if the disk is full; its writer raises the same error."""
    previous = threading.excepthook

    def hook(arguments: threading.ExceptHookArgs) -> None:
        if not (isinstance(arguments.exc_value, OSError) and "AsyncWriter" in type(arguments.thread).__name__):
            previous(arguments)

    threading.excepthook = hook
