"""The training loop: epochs of steps, with validation and a checkpoint after each epoch."""

import contextlib
import itertools
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from common.agreement import check_agreement, weights_checksum
from common.command_line import sibling_command
from common.config import Config, to_yaml
from common.distributed import DistributedContext, HangWatch, start_process
from common.metrics import METRIC_NAMES, Metric
from common.preemption import REQUEUE, Preemption
from dali_pipelines import ClipLoader, Manifest
from training.checkpoints import Checkpoint
from training.compiling import cuda_graphs_skipped
from training.emergency import EmergencySaver
from training.faults import FaultLog, UnreadableError
from training.monitor import Monitor
from training.optimizer import optimizer_summary
from training.profiling import StepProfiler
from training.recovery import NonFiniteError
from training.resuming import find_checkpoint, share_checkpoint
from training.run_state import LogPosition, log_entries
from training.saving import Saver
from training.startup import load_pretrained_weights, startup_lines
from training.step import StepTrainer
from training.step_metrics import Interval, StepResult
from training.validation import Accuracy, Best, validate


@dataclass(frozen=True)
class EpochResult:
    """The result of an epoch."""

    epoch: int
    """From 1."""
    step: int
    """Optimizer steps done."""
    accuracy: Accuracy | None
    """Of the network on the validation videos; None if the epoch was not validated (`train.validate_every`)."""
    averaged: Accuracy | None
    """The same for the averaged weights; None before averaging starts."""
    is_best: bool
    """Whether the epoch's weights became best.safetensors."""
    clips_per_second: float
    """Training clips per second over the epoch, without its validation; 0 if a resumed run only had to validate."""


@dataclass(frozen=True)
class TrainingResult:
    """The result of a run."""

    best: Best
    """The weights in best.safetensors: their accuracy, epoch and source."""
    accuracy: Accuracy | None
    """The network's accuracy in the last validation; None if there was nothing left to train."""
    step: int
    """Optimizer steps done, with those from before the run was resumed."""
    stopped_early: bool
    """Whether `train.early_stopping` ended the run."""
    num_faults: int
    """Videos that could not be read, counted each time, since the run was started or resumed."""
    weights: dict[str, Path]
    """The weights files by name: best, last and, if weights were averaged, swa or ema."""


class Trainer(StepTrainer):
    """One training run: `train` runs it, or the rest of it; `epochs` does the same, and yields a result per epoch.

        result = Trainer(config).train()

        for epoch in Trainer(config).epochs():
            print(epoch.epoch, epoch.accuracy)

    process: from `start_process`; default: this process, or those of torchrun. resume: continue from the newest
    checkpoint in `config.output`, if there is one. verbose: print the lines of the log on stdout.

    Writes below `config.output`: best.safetensors, last.safetensors, checkpoints/, tensorboard/, metrics.jsonl and
    config.yaml; on demand swa.safetensors or ema.safetensors, and profile/; faults.csv if videos cannot be read. Raises
    `InputError` for settings and data that cannot work, such as more unreadable videos than `data.max_fault_fraction`,
    and `SystemExit` with `REQUEUE` if `preemption` asked the run to end. If a run ends early for any other reason, its
    last finished step is saved, unless the process is killed. A trainer that is not trained has to be closed (`close`).
    """

    def __init__(
        self,
        config: Config,
        process: DistributedContext | None = None,
        *,
        resume: bool = False,
        preemption: Preemption | None = None,
        profile: bool = False,
        verbose: bool = True,
    ):
        self._processes = contextlib.ExitStack()
        if process is None:
            timeout_s = 2 * config.train.hang_timeout_s
            process = self._processes.enter_context(start_process(config.device, timeout_s=timeout_s))
        super().__init__(config, process, preemption or Preemption())
        self.output = Path(config.output)
        self.saver = Saver(self.output, self.state.weights)
        self.faults = FaultLog(self.output / "faults.csv", process)
        self.emergency = EmergencySaver(
            process, self.state, self.saver, self.faults, self.preemption, steps_per_epoch=self.steps_per_epoch
        )
        if process.is_main:
            self.monitor = Monitor(self.output, total_steps=self.last_step, verbose=verbose)
        self.profiler: StepProfiler | None = None
        if profile and process.is_main:
            self.profiler = StepProfiler(self.output / "profile", self.monitor.print)
        self._epoch_clips_per_second = 0.0
        self._accuracy: Accuracy | None = None  # of the last validation
        try:
            self._start(resume=resume)
        except BaseException:
            self._close_files()
            raise

    def _start(self, *, resume: bool) -> None:
        """Lock the output folder, restore a checkpoint, open the logs, and print the first lines."""
        config, process = self.config, self.process
        lock_note = self.saver.lock() if process.is_main else ""
        found = find_checkpoint(self.output, resume=resume) if process.is_main else None
        checkpoint = share_checkpoint(process, found)
        changes = self._restore(checkpoint) if checkpoint else []
        loaded = "" if checkpoint else load_pretrained_weights(self.network, config, self.classes)
        if process.is_main:
            self.saver.begin()  # everything that may be wrong with the input is known by now
            (self.output / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
        self._open_logs()
        how = self.compile()
        if process.world_size > 1:
            check_agreement(process, {"the weights' checksum": weights_checksum(self.network.state_dict())[:12]})
        lines = startup_lines(
            config,
            process,
            self.data,
            steps_per_epoch=self.steps_per_epoch,
            network=how,
            arithmetic=f"precision {self.precision}, optimizer {optimizer_summary(self.optimizer, self.implementation)}"
            f", gradients by {self.multi_tensor.name}",
            resumed=f", resumed from {checkpoint.path.name} at step {self.step}" if checkpoint else "",
            changes=changes,
        )
        is_done = self.step >= self.last_step and not self.is_epoch_over
        done = f"all {self.last_step} steps are done already" if is_done else self._early_stop_note()
        for line in filter(None, [*lines, lock_note, done, loaded]):
            self.monitor.print(line)

    # -- the loop --

    def train(self) -> TrainingResult:
        """Train to the last step, with validation and a checkpoint after each epoch."""
        for _ in self.epochs():
            pass
        return self.result()

    def epochs(self) -> Iterator[EpochResult]:
        """Train like `train`; yields the result of each epoch after it is validated.

        If the caller stops iterating, the run ends like one that was asked to: everything is saved, and `resume=True`
        continues. With several processes, each has to call it, and to stop after the same epoch.
        """
        with self._processes:
            yield from self._epochs()

    def _epochs(self) -> Iterator[EpochResult]:
        self.preemption.save = self.emergency.save
        if self.profiler:
            self.profiler.start()
        try:
            with HangWatch(self.process, self.config.train.hang_timeout_s, self.emergency.save):
                self._log_resumed_interval()
                while self.is_epoch_over or (self.step < self.last_step and not self.has_stopped_early):
                    try:
                        if not self.is_epoch_over:
                            self.train_epoch()
                        result = self.finish_epoch()
                    except NonFiniteError as error:
                        self._recover(error)
                    else:
                        yield result
            self._collect_writes(is_last=True)
            for line in self._last_lines():
                self.monitor.print(line)
        except (SystemExit, NonFiniteError):  # already saved, or not worth saving
            raise
        except UnreadableError:
            if self.saver.saved[0]:  # without a checkpoint, the run starts over with another manifest
                self._save_in_emergency()
            raise
        except BaseException:
            self._save_in_emergency()
            raise
        finally:
            if self.profiler:
                self.profiler.stop()
            self._close_files()

    def close(self) -> None:
        """End the workers, close the logs, and unlock the output folder. `train` and `epochs` do it themselves."""
        self._close_files()
        self._processes.close()

    def _close_files(self) -> None:
        self.train_loader.close()
        self.monitor.close(is_complete=self.step == self.last_step or self.has_stopped_early)
        self.saver.close()

    def result(self) -> TrainingResult:
        """The result of the run so far."""
        files = ["best", "last", *([self.average.name] if self.average is not None and self.average.count else [])]
        return TrainingResult(
            best=self.state.best,
            accuracy=self._accuracy,
            step=self.step,
            stopped_early=self.has_stopped_early,
            num_faults=self.faults.count,
            weights={name: self.output / f"{name}.safetensors" for name in files},
        )

    def train_epoch(self) -> None:
        """Train to the end of the current epoch, or to the last step."""
        epoch = self.step // self.steps_per_epoch
        every = self.config.train.checkpoint_every_steps
        interval, whole_epoch = self._new_interval(), Interval(self.train_loader, self.process.device)
        batches = self.batches()
        while not self.is_epoch_over:
            result = self.train_step(itertools.islice(batches, self.micro_steps))
            interval.add(result)
            whole_epoch.add(result)
            self.monitor.advance(interval, epoch=epoch + 1)
            if self.profiler:
                self.profiler.step()
            self._check_faults(epoch)
            if self._is_log_due:
                self._log(interval)
                interval = self._new_interval()
            if self.must_end:
                self._end_for_signal(epoch)
            if every and self.step % every == 0 and not self.is_epoch_over:
                self._report_faults(self.train_loader, epoch, mode="train")
                self._save()
        self._epoch_clips_per_second = whole_epoch.clips_per_second

    def finish_epoch(self) -> EpochResult:
        """Validate after an epoch or the last step if that is due, and save weights and a checkpoint."""
        epoch = (self.step - 1) // self.steps_per_epoch
        self._report_faults(self.train_loader, epoch, mode="train")
        is_whole = self.step % self.steps_per_epoch == 0
        average = self._update_average(epoch)
        files = {"last": False, self.average.name: True} if average and self.average else {"last": False}
        candidates: list[tuple[str, Accuracy]] = []
        num_unreadable = 0
        if (epoch + 1) % self.config.train.validate_every == 0 or self.step == self.last_step:
            accuracies, num_unreadable = self.validate(self.network, *average)
            self._report_faults(self.val_loader, epoch, mode="validate")
            candidates = list(zip(["network", self.average.summary() if self.average else ""], accuracies))
            self._accuracy = accuracies[0]
        if not self._is_finite(candidates):
            last = self.step - 1
            raise NonFiniteError(
                f"step {last}: the weights are not finite after it, or the validation loss is not", last
            )
        best = self.state.best
        if candidates:
            best = best.after(candidates, metric=self.config.train.best_metric, epoch=epoch + 1)
            metrics = dict(zip(Metric.VALIDATION, candidates[0][1]))
            if self.average and len(candidates) > 1:
                _, averaged = candidates[1]
                metrics |= dict(zip(Metric.averaged_validation(self.average.name), averaged))
            self.monitor.log(self.step, metrics)
        is_best = best.accuracy != self.state.best.accuracy
        if is_best:
            files["best"] = best.source != "network"
        lines = self._epoch_lines(epoch, candidates, best, is_best=is_best, num_unreadable=num_unreadable)
        self._collect_writes()
        self._commit_epoch(best, files, num_failed=0 if is_whole else self.state.num_failed)
        for line in lines:
            self.monitor.print(line)
        averages = [accuracy for _, accuracy in candidates[1:]]
        return EpochResult(
            epoch=epoch + 1,
            step=self.step,
            accuracy=candidates[0][1] if candidates else None,
            averaged=averages[0] if averages else None,
            is_best=is_best,
            clips_per_second=self._epoch_clips_per_second,
        )

    def validate(self, *networks: nn.Module) -> tuple[list[Accuracy], int]:
        """The accuracy of each network on the validation videos, and the number of unreadable ones."""
        return validate(networks, self.val_loader, self.process, self.precision, num_classes=len(self.classes))

    def _is_finite(self, candidates: list[tuple[str, Accuracy]]) -> bool:
        """Whether the network's validation loss is finite, or without a validation, its weights are."""
        if candidates:
            return math.isfinite(candidates[0][1].loss)
        return all(bool(value.isfinite().all()) for value in self.network.state_dict().values())

    @property
    def has_stopped_early(self) -> bool:
        """Whether `train.early_stopping` has ended the run before its last step."""
        patience = self.config.train.early_stopping
        is_stale = patience is not None and self.state.best.num_stale >= patience
        return is_stale and self.state.is_validated and self.step < self.last_step

    @property
    def is_epoch_over(self) -> bool:
        """Whether `finish_epoch` is next, after an epoch or the last step."""
        ends = self.step == self.last_step or self.step % self.steps_per_epoch == 0
        return ends and self.step > 0 and not self.state.is_validated

    # -- the log --

    @property
    def _is_log_due(self) -> bool:
        return self.is_epoch_over or self.step % self.config.train.log_every_steps == 0

    def _new_interval(self) -> Interval:
        """An interval that starts after the last line of the log, even if the run has been resumed since."""
        return Interval(self.train_loader, self.process.device, before=self.state.logs.unlogged)

    def _log(self, interval: Interval) -> None:
        self.monitor.log_interval(self.step, self._progress() | interval.metrics())
        self.state.logs = self._log_position()
        is_first = self.step <= self.config.train.log_every_steps
        if self.state.mode == "CUDA graphs" and is_first and cuda_graphs_skipped():
            self.monitor.print("train.cuda_graphs: the compiler does not use them; TORCH_LOGS=cudagraphs says why")

    def _log_resumed_interval(self) -> None:
        """Write the line of the last step if the run ended between that step and its line."""
        if self.state.logs.unlogged and self._is_log_due:
            self.monitor.log(self.step, self._progress() | self._new_interval().learning_metrics())
            self.state.logs = self._log_position()

    def _progress(self) -> dict[str, float]:
        return {Metric.EPOCH: self.step / self.steps_per_epoch, Metric.FAULTS: self.state.num_failed}

    def _log_position(self, unlogged: tuple[StepResult, ...] = ()) -> LogPosition:
        return LogPosition(self.faults.size(), self.monitor.size, unlogged)

    def _open_logs(self) -> None:
        """Open the logs at the position of the state: entries after its step are removed."""
        if self.process.is_main:
            self.faults.cut(self.state.logs.fault_bytes)
        self.monitor.open(self.config, step=self.step, size=self.state.logs.log_bytes)

    def _epoch_lines(
        self, epoch: int, candidates: list[tuple[str, Accuracy]], best: Best, *, is_best: bool, num_unreadable: int
    ) -> list[str]:
        """The line of an epoch, and one for the averaged weights."""
        notes = [f"{self._epoch_clips_per_second:.1f} training clips/s"] if self._epoch_clips_per_second else []
        notes += [f"{num_unreadable} unreadable videos counted as wrong"] if num_unreadable else []
        note = f" ({', '.join(notes)})" if notes else ""
        if not candidates:
            return [f"epoch {epoch + 1}: not validated, train.validate_every={self.config.train.validate_every}{note}"]
        lines = []
        for source, accuracy in candidates:
            is_network = source == "network"
            line = f"epoch {epoch + 1}: val " if is_network else f"{source}: val "
            line += accuracy.text(self.classes)
            line += "" if is_network or not self.average else f", in {self.output}/{self.average.name}.safetensors"
            if is_best and source == best.source:
                line += f", best so far: {self.output}/best.safetensors"
            elif not is_best and is_network:
                line += f", best {self._best_value(best)} in {best.place}"
            lines.append(line + note if is_network else line)
        return lines

    def _best_value(self, best: Best) -> str:
        metric = self.config.train.best_metric
        return f"{METRIC_NAMES[metric]} {getattr(best.accuracy, metric):.4f}"

    def _early_stop_note(self) -> str:
        if not self.has_stopped_early:
            return ""
        patience, value = self.config.train.early_stopping, self._best_value(self.state.best)
        return (
            f"stopped after epoch {self.step // self.steps_per_epoch}: no better than {value} for {patience} "
            "validations (train.early_stopping); a larger value and --resume continue"
        )

    def _last_lines(self) -> Iterator[str]:
        """Which weights are in which file, and the next command to type."""
        if note := self._early_stop_note():
            yield note
        epoch, best = -(-self.step // self.steps_per_epoch), self.state.best
        source = "" if best.source == "network" else f"{best.source}, "
        value = self._best_value(best)
        result = self.result()
        yield f"best: {source}{best.place}, val {value}: {result.weights['best']}"
        yield f"last: epoch {epoch}: {result.weights['last']}"
        if self.average and self.average.name in result.weights:
            name = self.average.name
            yield f"{name}: {self.average.summary()}: {result.weights[name]}"
        weights = str(result.weights["best"])
        yield "next: " + sibling_command("evaluate", "-w", weights)
        yield "      " + sibling_command("predict", "-w", weights, to_predict(self.val_loader.manifest, self.config))

    # -- videos that cannot be read --

    def _report_faults(self, loader: ClipLoader, epoch: int, *, mode: str) -> None:
        """List and print the videos that `loader` could not read since the last call, on all processes."""
        faults = self.faults.take(loader, epoch=epoch, mode=mode)
        if mode == "train":
            self.state.num_faults, self.state.logs = 0, self._log_position(self.state.logs.unlogged)
        for line in self.faults.messages(faults, mode=mode):
            self.monitor.print(line)

    def _check_faults(self, epoch: int) -> None:
        num_clips = self.steps_per_epoch * self.config.optim.global_batch_size
        self.faults.check(
            self.train_loader,
            self.config.data,
            epoch=epoch,
            num_failed=self.state.num_failed,
            num_seen=self.step * self.config.optim.global_batch_size - epoch * num_clips,
            num_clips=num_clips,
            is_last=self.is_epoch_over,
        )

    # -- saving and restoring --

    def _update_average(self, epoch: int) -> list[nn.Module]:
        """The averaged network, including the weights of this epoch; empty before averaging starts."""
        average = self.average
        if average is not None and average.is_per_step:
            return [average.network] if average.count else []
        is_whole = self.step % self.steps_per_epoch == 0
        if average is None or epoch < average.first_epoch or not is_whole:
            return []
        if average.count == epoch - average.first_epoch:  # otherwise done by a run that ended here
            with self.state.committing():
                average.update(self.network)
        return [average.network]

    def _commit_epoch(self, best: Best, files: dict[str, bool], *, num_failed: int) -> None:
        """Make the end of an epoch part of the state, and save it with the weights `files` (`Saver.enqueue`)."""
        logs = self._log_position(self.state.logs.unlogged)
        state = None
        if self.process.is_main:
            entries = {"best": best.state_dict(), "is_validated": True, "failed": num_failed, **log_entries(logs)}
            state = self.state.state_dict() | entries
        with self.state.committing():
            self.state.best, self.state.is_validated = best, True
            self.state.num_failed, self.state.logs = num_failed, logs
            if state:
                self.saver.enqueue(files, state)
        self._save(state)

    def _save(self, state: dict[str, Any] | None = None) -> None:
        """Save a checkpoint in the background. Training waits for the copy to host memory, and for the last write."""
        if self.process.is_main:
            self._collect_writes()
            self.saver.submit(state or self.state.state_dict())

    def _collect_writes(self, *, is_last: bool = False) -> None:
        self.process.heartbeat.update("saving")
        self.saver.collect(self.monitor.print, is_last=is_last)

    def _save_in_emergency(self) -> None:
        message = self.emergency.save()
        if message.startswith("saved"):
            self.monitor.print(message)

    def _restore(self, checkpoint: Checkpoint) -> list[str]:
        """Load a checkpoint; returns notes on changes since then. Raises `InputError` if the run cannot resume."""
        changes = self.state.load(*checkpoint)
        self.saver.saved = self.state.position
        return changes

    def _recover(self, error: NonFiniteError) -> None:
        """Roll back to the newest checkpoint, or raise `error` if rollback is off or does not help."""
        if self.config.train.on_nan != "rollback":
            raise error
        self._collect_writes()
        checkpoint = self.recovery.recover(error, self.saver.folder)
        self._restore(checkpoint)
        self.network.zero_grad(set_to_none=True)
        self.train_loader.stats.faults.clear()
        self.saver.discard_pending()
        self._open_logs()
        self.monitor.print(
            f"{error}; rolled back to {checkpoint.path.name}, and leaving out step {error.step} this time"
        )

    def _end_for_signal(self, epoch: int) -> None:
        """Save, and end this process; all processes do so after this step."""
        self.preemption.handle()
        self._report_faults(self.train_loader, epoch, mode="train")
        try:
            self._save()
            self._collect_writes(is_last=True)
        finally:
            self.process.barrier()  # torchrun gives the others half a minute once the first has ended
        if self.process.is_main:
            name = self.preemption.signal or "a signal to another process"
            is_saved = self.saver.saved[0] == self.step
            result = (
                f"saved step {self.step}" if is_saved else f"step {self.step} is not saved: its weights are not finite"
            )
            print(f"train.py: {name}: {result}; resume with --resume", file=sys.stderr, flush=True)
        raise SystemExit(REQUEUE)


def to_predict(manifest: Manifest, config: Config) -> str:
    """A path that predict.py takes: the first validation video, or the manifest if that is within a larger file."""
    return str(config.data.val) if manifest[0].shard else manifest.file(0)
