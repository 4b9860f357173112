"""What a run shows: TensorBoard, one JSON line an interval, a progress bar, and a line an epoch."""

import contextlib
import dataclasses
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from tqdm import tqdm

from common.clip_images import clip_grid
from common.config import Config, preprocessing, to_yaml
from common.system_metrics import gpu_gauges, host_memory_gib
from dali_pipelines import ClipLoader
from dali_pipelines.text import split_lines

_FINAL = {"val/top1": 0.0, "val/top5": 0.0, "val/loss": 0.0}  # HParams shows the last value of each


@dataclasses.dataclass(frozen=True)
class StepResult:
    """Of one optimizer step, over all processes."""

    loss: float
    """Mean over valid clips; not finite where an fp16 step was skipped for it."""
    top1: float
    top5: float
    valid: float
    """Clips, as are top1 and top5."""
    lr: float
    grad_norm: float
    """Before clipping."""
    loss_scale: float
    skipped: bool


class Interval:
    """Means over the steps between two log lines. `before`: of these, the steps that the run did before it was
    resumed; how fast they were is not known."""

    def __init__(self, loader: ClipLoader, device: torch.device, *, before: Sequence[StepResult] = ()):
        self._stats, self._device = loader.stats, device
        self._before = dataclasses.replace(loader.stats)
        self._started = time.perf_counter()
        self._results = list(before)
        self._count_before = len(before)

    def add(self, result: StepResult) -> None:
        self._results.append(result)

    @property
    def mean_loss(self) -> float:
        done = [result for result in self._results if not result.skipped]
        return sum(result.loss * result.valid for result in done) / max(sum(result.valid for result in done), 1)

    @property
    def clips_per_second(self) -> float:
        return self._clips / (time.perf_counter() - self._started)

    @property
    def data_wait_share(self) -> float:
        """Of the time."""
        return self._waited / (time.perf_counter() - self._started)

    @property
    def _waited(self) -> float:
        """Seconds, by the loader's clock around each batch."""
        return self._stats.wait_seconds - self._before.wait_seconds

    @property
    def _clips(self) -> float:
        return sum(result.valid for result in self._results[self._count_before :])

    def training(self) -> dict[str, float]:
        """Loss, accuracies, gradient norm and schedule, by name."""
        last, steps = self._results[-1], len(self._results)
        learned = {}
        if done := [result for result in self._results if not result.skipped]:
            clips = max(sum(result.valid for result in done), 1)
            learned = {
                "train/loss": self.mean_loss,
                "train/top1": sum(result.top1 for result in done) / clips,
                "train/top5": sum(result.top5 for result in done) / clips,
                "train/grad_norm": done[-1].grad_norm,
            }
        return {
            **learned,
            "train/lr": last.lr,
            "train/loss_scale": last.loss_scale,
            "train/skipped_steps": steps - len(done),
        }

    def summary(self) -> dict[str, float]:
        """All of it by name; clips are those of all processes, waiting and packets this one's."""
        steps = len(self._results) - self._count_before
        return {
            **self.training(),
            "speed/clips_per_second": self.clips_per_second,
            "speed/step_ms": 1000 * (time.perf_counter() - self._started) / steps,
            "speed/data_wait_ms": 1000 * self._waited / steps,
            "speed/data_wait_share": self.data_wait_share,
            "data/packets_read": self._stats.packets_read - self._before.packets_read,
            "data/packets_kept": self._stats.packets_kept - self._before.packets_kept,
            "host/memory_gib": host_memory_gib(),
            **gpu_gauges(self._device),
        }


class Monitor:
    """Writes tensorboard/ and metrics.jsonl below `folder`, from `step` on: what stands there of later steps goes.

    A disk that is full costs what would have been written, never the run. The main process has a `Monitor`, the
    others have `NullMonitor`.
    """

    def __init__(self, folder: Path, *, total_steps: int):
        self._folder, self._total_steps = folder, total_steps
        self._bar = tqdm(disable=True)
        self._writer: SummaryWriter | None = None
        self._purge_step: int | None = None
        self._has_complained = False
        self._config: Config | None = None
        _silence_writer_threads()

    def open(self, config: Config, *, step: int, size: int) -> None:
        """Begins, or begins again after going back, at `step`, when metrics.jsonl had `size` bytes."""
        self.close()
        self._config, self._purge_step, self._size = config, step + 1, 0
        self._lines = self._folder / "metrics.jsonl"
        if self._lines.exists():
            self._size = min(size, self._lines.stat().st_size)
            os.truncate(self._lines, self._size)
        self._bar = tqdm(
            total=self._total_steps,
            initial=step,
            unit="step",
            dynamic_ncols=True,
            disable=not sys.stderr.isatty(),
        )

    @property
    def size(self) -> int:
        """Bytes of metrics.jsonl."""
        return self._size

    def say(self, text: str) -> None:
        """One line on stdout, above the progress bar."""
        self._bar.write(text, file=sys.stdout)
        sys.stdout.flush()

    def advance(self, interval: Interval, *, epoch: int) -> None:
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

    def log(self, step: int, values: dict[str, float]) -> None:
        """Scalars such as {"train/loss": 1.2} at an optimizer step, also as a line of metrics.jsonl."""
        self._show(lambda writer: [writer.add_scalar(name, value, step) for name, value in values.items()])
        self._line({"step": step, **values})

    def log_interval(self, step: int, values: dict[str, float]) -> None:
        """The same for an `Interval.summary`; where there is no progress bar, also as a line on stdout."""
        self.log(step, values)
        if self._bar.disable:
            seconds = (self._total_steps - step) * values["speed/step_ms"] / 1000
            loss = values.get("train/loss", math.nan)
            self.say(
                f"step {step}/{self._total_steps}, epoch {values['train/epoch']:.2f}: loss {loss:.4f}, "
                f"lr {values['train/lr']:.3g}, {values['speed/clips_per_second']:.1f} clips/s, "
                f"data wait {values['speed/data_wait_share']:.0%}, ETA {tqdm.format_interval(seconds)}"
            )

    def log_clips(self, step: int, clips: Tensor, *, mean: list[float], std: list[float]) -> None:
        """A picture of some clips [B, 3, T, S, S] as the network sees them: a row a clip, a column a frame."""
        picture = clip_grid(clips[:4], mean=mean, std=std)
        self._show(lambda writer: writer.add_image("train/clips", picture, step, dataformats="HWC"))

    def _show(self, write: Callable[[SummaryWriter], Any]) -> None:
        try:
            if self._writer is None:
                self._writer = self._open_tensorboard()
            write(self._writer)
            self._writer.flush()
        except OSError as error:
            self._writer = None
            self._complain("tensorboard", error)

    def _open_tensorboard(self) -> SummaryWriter:
        writer = SummaryWriter(self._folder / "tensorboard", purge_step=self._purge_step)
        text = to_yaml(self._config)
        writer.add_text("config", "".join(f"    {line}\n" for line in split_lines(text)))
        experiment, start, _ = hparams(_hyperparameters(self._config), _FINAL)
        for summary in (experiment, start):
            writer.file_writer.add_summary(summary)
        self._purge_step = None  # where it has to be opened again, what stands is of this run
        return writer

    def _line(self, values: dict[str, Any]) -> None:
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}  # JSON has no NaN
        line = (json.dumps({"time": round(time.time(), 3), **finite}, allow_nan=False) + "\n").encode()
        try:
            with open(self._lines, "ab") as file:
                file.write(line)
            self._size += len(line)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.truncate(self._lines, self._size)  # no half lines
            self._complain("metrics.jsonl", error)

    def _complain(self, name: str, error: OSError) -> None:
        if not self._has_complained:
            self.say(f"{self._folder / name}: cannot be written ({error.strerror}); training goes on without")
        self._has_complained = True

    def close(self) -> None:
        self._bar.close()
        if self._writer is not None:
            try:
                _, _, end = hparams(_hyperparameters(self._config), _FINAL)
                self._writer.file_writer.add_summary(end)
                self._writer.close()
            except OSError as error:
                self._complain("tensorboard", error)
            self._writer = None


class NullMonitor:
    """A monitor that shows nothing."""

    size = 0

    def open(self, config: Config, *, step: int, size: int) -> None: ...

    def say(self, text: str) -> None: ...

    def advance(self, interval: Interval, *, epoch: int) -> None: ...

    def log(self, step: int, values: dict[str, float]) -> None: ...

    def log_interval(self, step: int, values: dict[str, float]) -> None: ...

    def log_clips(self, step: int, clips: Tensor, *, mean: list[float], std: list[float]) -> None: ...

    def close(self) -> None: ...


def _hyperparameters(config: Config) -> dict[str, Any]:
    """What may change the result, as {"optim.lr": 0.1}, in the types that HParams takes."""
    sections = dataclasses.asdict(config) | {"data": preprocessing(config.data)}
    return {
        f"{name}.{key}": value if isinstance(value, (bool, int, float, str)) else str(value)
        for name, section in sections.items()
        if isinstance(section, dict)
        for key, value in section.items()
    } | {"seed": config.seed}


def _silence_writer_threads() -> None:
    """TensorBoard's thread, which prints a traceback where the disk is full; its writer raises the same error."""
    before = threading.excepthook

    def hook(arguments: threading.ExceptHookArgs) -> None:
        if not (isinstance(arguments.exc_value, OSError) and "AsyncWriter" in type(arguments.thread).__name__):
            before(arguments)

    threading.excepthook = hook
