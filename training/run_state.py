"""The content of a checkpoint, which includes each step or validation completely or not at all."""

import contextlib
import dataclasses
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from common.agreement import versions
from common.config import Config, preprocessing
from common.precision import LossScale
from common.weights import Weights
from dali_pipelines import ClipLoader
from dali_pipelines.batches import Fault
from dali_pipelines.errors import InputError
from model import TimeSformer
from training.averaging import WeightAverage, averaged_weights
from training.checkpoints import host_copy
from training.compiling import Mode
from training.optimizer import load_optimizer_state
from training.resuming import FORMAT, check_resumable, check_values
from training.step_metrics import StepResult
from training.validation import Best


class LogPosition(NamedTuple):
    """The end of the logs in this state: a run that resumes from it removes later entries."""

    fault_bytes: int = 0
    """Size of faults.csv in bytes."""
    log_bytes: int = 0
    """Size of metrics.jsonl in bytes."""
    unlogged: tuple[StepResult, ...] = ()
    """The steps since the last line of metrics.jsonl."""


class RunState:
    """Network, optimizer, averaged weights and the position in the data, with the counters that belong to them.

    Related changes are made together within `committing`; another thread reads them within `reading`.
    """

    def __init__(
        self,
        config: Config,
        network: TimeSformer,
        optimizer: torch.optim.Optimizer,
        loss_scale: LossScale,
        average: WeightAverage | None,
        loader: ClipLoader,
        *,
        classes: Sequence[str],
        checksums: Mapping[str, str],
    ):
        """checksums: `Manifest.checksum` of the manifests "train" and "val"."""
        self.step = 0
        """Optimizer steps done."""
        self.is_validated = False
        """Whether the epoch that ends with this step is finished: validated if that was due, and its weights saved."""
        self.best = Best()
        self.num_failed = 0
        """Training clips of this epoch that could not be read, over all processes."""
        self.left_out: set[int] = set()
        """Steps left out of training, because a rollback has shown their clips to be bad."""
        self.mode: Mode | None = None
        """How the network is compiled; None until decided."""
        self.logs = LogPosition()
        self.num_faults = 0
        """Faults in the loader's statistics that belong to finished steps."""
        self._config, self._network, self._optimizer = config, network, optimizer
        self._loss_scale, self._average, self._loader = loss_scale, average, loader
        self._classes, self._checksums = tuple(classes), dict(checksums)
        self._loader_position = loader.state_dict()
        self._commit_lock = threading.Lock()
        self._is_consistent = True
        self._device = next(network.parameters()).device
        self._last_commit = torch.cuda.Event() if self._device.type == "cuda" else None

    @property
    def position(self) -> tuple[int, bool]:
        """(step, is_validated), which identifies a checkpoint."""
        return self.step, self.is_validated

    @contextlib.contextmanager
    def committing(self) -> Iterator[None]:
        """A context for changes that take effect together: if an exception interrupts them, this state is never saved
        again."""
        with self._commit_lock:
            self._is_consistent = False
            yield
            if self._last_commit is not None:
                self._last_commit.record()
            self._is_consistent = True

    @contextlib.contextmanager
    def reading(self, *, timeout_s: float) -> Iterator[bool]:
        """A context that blocks `committing`, for any thread; yields whether the state is consistent: not if an update
        was interrupted, or does not finish within `timeout_s`.

        On a GPU, copies made within it only wait for the last commit, not for the running step, which may wait forever
        for a process that has ended.
        """
        if not self._commit_lock.acquire(timeout=timeout_s):
            yield False
            return
        try:
            if self._last_commit is None or not self._is_consistent:
                yield self._is_consistent
                return
            stream = torch.cuda.Stream(self._device)
            with torch.cuda.stream(stream):
                stream.wait_event(self._last_commit)
                yield True
        finally:
            self._commit_lock.release()

    def advance(self, result: StepResult, *, num_failed: int) -> None:
        """Count a finished step with `num_failed` unreadable clips. Call it within `committing`."""
        self.step += 1
        self.is_validated = False
        self.num_failed += num_failed
        self._loader_position = self._loader.state_dict()
        self.num_faults = len(self._loader.stats.faults)
        self.logs = self.logs._replace(unlogged=(*self.logs.unlogged, result))

    def finished_faults(self) -> list[Fault]:
        """This process's faults in finished steps that are not in faults.csv yet."""
        return self._loader.stats.faults[: self.num_faults]

    def state_dict(self) -> dict[str, Any]:
        """The content of a checkpoint, in host memory. Another thread calls it within `reading`."""
        return host_copy(
            {
                "format": FORMAT,
                "step": self.step,
                "is_validated": self.is_validated,
                "best": self.best.state_dict(),
                "network": self._network.state_dict(),
                "optimizer": self._optimizer.state_dict(),
                "loss_scale": self._loss_scale.state_dict(),
                "average": None if self._average is None else self._average.state_dict(),
                "average_from": None if self._average is None else self._average.first_epoch,
                "average_kind": None if self._average is None else self._average.name,
                "loader": self._loader_position,
                "failed": self.num_failed,
                "left_out": sorted(self.left_out),
                "mode": self.mode,
                **log_entries(self.logs),
                "config": dataclasses.asdict(self._config),
                "classes": list(self._classes),
                "manifests": self._checksums,
                "versions": versions(),
            }
        )

    def load(self, path: Path, state: dict[str, Any]) -> list[str]:
        """Load the `state` of the checkpoint at `path`; returns notes on changes of settings and data since then.

        Raises `InputError` if the run cannot resume from it.
        """
        try:
            with self.committing():
                changes = check_resumable(
                    path,
                    state,
                    self._config,
                    classes=self._classes,
                    num_videos=len(self._loader.manifest),
                    checksums=self._checksums,
                )
                check_values(path, state)
                self._load_state_dict(state)
        except InputError:
            raise
        except (KeyError, TypeError, ValueError, ArithmeticError, AttributeError, IndexError, RuntimeError) as error:
            # The checksum is right, so another program wrote it.
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            raise InputError(f"{path}: not a checkpoint of this run ({reason})") from None
        return changes

    def _load_state_dict(self, state: dict[str, Any]) -> None:
        if state["average"] and self._average is not None:
            self._average.load_state_dict(state["average"])
        self._loader.load_state_dict(state["loader"])
        self._network.load_state_dict(state["network"])
        load_optimizer_state(self._optimizer, state["optimizer"])
        self._loss_scale.load_state_dict(state["loss_scale"])
        self._loader_position, self.num_faults = state["loader"], 0
        unlogged = [StepResult(*row) for row in state.get("unlogged", [])]  # older checkpoints have none
        self.logs = LogPosition(state["fault_bytes"], state["log_bytes"], tuple(unlogged))
        self.left_out.update(state["left_out"])
        if self.mode is None:
            self.mode = state.get("mode", "compiled" if state["config"]["train"]["compile"] is True else "eager")
        self.step, self.is_validated = state["step"], state["is_validated"]
        self.best, self.num_failed = Best.from_state(state), state["failed"]

    def weights(self, state: dict[str, Any], *, averaged: bool) -> Weights:
        """The content of a weights file for a `state_dict`: the network's weights, or the averaged ones."""
        return Weights(
            model=dataclasses.asdict(self._config.model),
            preprocessing=preprocessing(self._config.data),
            classes=self._classes,
            state=averaged_weights(state["average"]) if averaged else state["network"],
        )


def log_entries(logs: LogPosition) -> dict[str, Any]:
    """`logs` for a checkpoint: numbers and lists, which torch loads without running code."""
    return logs._asdict() | {"unlogged": [dataclasses.astuple(result) for result in logs.unlogged]}
