"""The training loop: epochs of steps, a step of micro-batches, validation and checkpoints after each epoch."""

import contextlib
import dataclasses
import itertools
import math
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nvidia.dali import __version__ as dali_version
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from common.agreement import check_agreement, versions, weights_checksum
from common.config import Config, preprocessing, to_yaml
from common.distributed import WAITING, DistributedContext, HangWatch
from common.metrics import top_k_counts
from common.precision import LossScale, autocast, gradient_factor, make_deterministic, resolve_precision
from common.preemption import REQUEUE, Preemption
from common.weights import Weights, build_network, load_into
from dali_pipelines import ClipLoader, InputError
from dali_pipelines.loader import Batch
from dali_pipelines.text import csv_writer
from model import TimeSformer
from training import checkpoints
from training.compiling import Mode, check_compile, compile_network, cuda_graphs_skipped, decide_compile
from training.data import make_data, read_teacher
from training.faults import FaultLog
from training.losses import summed_cross_entropy, summed_distillation
from training.mixing import Mixed, mix_clips
from training.monitor import Interval, Monitor, NullMonitor, StepResult
from training.optimizer import (
    describe,
    learning_rate,
    load_optimizer_state,
    make_multi_tensor,
    make_optimizer,
    resolve_implementation,
)
from training.profiling import StepProfiler, record_function
from training.resuming import FORMAT, check_resumable
from training.saving import Saver, find_checkpoint

_SHOWN = 5  # faults, or clips, in a message
_BLIND_CLIPS = 16  # a run that can read none of so many stops
_ROLLBACKS = 3  # without a good step between them


class NonFiniteError(InputError):
    """A step whose loss or gradient is not finite, or after which the weights are not; the message says what is known
    of it."""

    def __init__(self, message: str, step: int):
        super().__init__(message)
        self.step = step


class UnreadableError(InputError):
    """More videos than are allowed cannot be read."""


class Trainer:
    """Everything of one run; `train` goes from where it stands to the end.

        with start_process(config.device) as process:
            Trainer(config, process, resume=False).train()

    Writes below `config.output`: best.safetensors, last.safetensors, checkpoints/, tensorboard/, metrics.jsonl,
    config.yaml and, where asked for, swa.safetensors and profile/, where videos cannot be read, faults.csv. Raises
    `InputError` for settings and data that cannot work, such as more unreadable videos than `data.max_fault_fraction`,
    and `SystemExit` with `REQUEUE` where `preemption` has asked it to end. Where a run ends early in any other way,
    its last whole step is saved, unless the process is killed.
    """

    def __init__(
        self,
        config: Config,
        process: DistributedContext,
        *,
        resume: bool,
        preemption: Preemption | None = None,
        profile: bool = False,
    ):
        self.config = config
        self.process = process
        self.preemption = preemption or Preemption()
        self.precision = resolve_precision(config.train.precision, process.device)
        self.implementation = resolve_implementation(config.optim, process.device)
        check_compile(config.train, process)
        make_deterministic(process.device)
        self.output = Path(config.output)
        teacher = read_teacher(config)
        self.teacher_frames = 1 if teacher is None else teacher.preprocessing["num_frames"] // config.data.num_frames
        """Frames of the training clips for each one that the network takes."""
        self.train_loader, self.val_loader, self.classes, sharing = make_data(config, process, teacher)
        self.batch_size, self.micro_steps = sharing
        self._checksums = {"train": self.train_loader.manifest.checksum(), "val": self.val_loader.manifest.checksum()}
        self.teacher = None if teacher is None else teacher.build(process.device).requires_grad_(False)

        torch.manual_seed(config.seed)  # equal initial weights on every process
        self.network = build_network(config.model, preprocessing(config.data), len(self.classes))
        self.network.activation_checkpointing = config.train.activation_checkpointing
        self.network.to(process.device)
        self.average = AveragedModel(self.network) if config.train.swa_epochs else None
        # The first epoch of those averaged.
        self.average_from = None if self.average is None else config.train.epochs - config.train.swa_epochs
        self.model = self.network
        if process.world_size > 1:
            # The gradient buckets hold sums of a step's micro-batches; `_train_step` divides.
            ids = [process.device.index] if process.device.type == "cuda" else None
            self.model = DistributedDataParallel(self.network, device_ids=ids, gradient_as_bucket_view=True)
        self.optimizer = make_optimizer(self.network, config.optim, self.implementation)
        self.multi_tensor = make_multi_tensor(self.implementation, process.device)
        self.loss_scale = LossScale(enabled=self.precision == "fp16")

        self.steps_per_epoch = len(self.train_loader) // self.micro_steps
        self.total_steps = config.train.epochs * self.steps_per_epoch
        self.last_step = min(self.total_steps, config.train.max_steps or self.total_steps)
        self.step = 0  # optimizer steps done
        self.is_validated = False  # at this step
        self.best_top1 = -1.0
        self.failed = 0  # training clips of this epoch that could not be read, on all processes
        self.faults = FaultLog(self.output / "faults.csv", process)
        self.left_out: set[int] = set()  # steps that a rollback has shown to be bad
        self._rollbacks = 0  # since the last good step
        self._loader_state = self.train_loader.state_dict()
        self._fault_count = 0  # in the loader's statistics, of whole steps
        # Of what is whole: how far the logs have come, and the results (as tuples) of the steps since the last line.
        self._logged: dict[str, Any] = {"fault_bytes": 0, "log_bytes": 0, "unlogged": []}
        self._seen: list[tuple[Tensor, Tensor, Tensor]] = []  # of this step: sample ids, valid, logits
        self._whole = threading.Lock()  # held while something takes effect; what is saved is never half a step
        self._is_whole = True
        self._effect = torch.cuda.Event() if process.device.type == "cuda" else None  # the last one is done there
        self._must_end = False
        self._epoch_speed = 0.0  # clips/s
        self.saver = Saver(self.output, self._weights)
        self.monitor: Monitor | NullMonitor = NullMonitor()

        self.mode: Mode | None = None  # not decided yet
        self._changes: list[str] = []  # of the settings and data since the checkpoint
        self._lock_note = ""

        resumed_from = self._open_output(resume)
        passes, before = self.last_step * self.micro_steps, self.mode
        self.mode, how = decide_compile(config.train, process, passes=passes, before=before)
        if before not in (None, self.mode):
            how += f"; it began as {before}, so it goes on with other rounding and other draws of drop path"
        if self.mode != "eager":
            compile_network(self.network, cuda_graphs=self.mode == "CUDA graphs")
            if self.teacher is not None:
                compile_network(self.teacher)
        loaded = "" if resumed_from else self._load_pretrained()
        if process.world_size > 1:
            check_agreement(process, {"the weights' checksum": weights_checksum(self.network.state_dict())[:12]})
        self._say_what_runs(resumed_from, how)
        if loaded:
            self.monitor.say(loaded)
        self.profiler = StepProfiler(self.output / "profile", self.monitor.say) if profile and process.is_main else None

    def _load_pretrained(self) -> str:
        """What there is to say of it."""
        source, data = self.config.train.pretrained, self.config.data
        if source is None:
            return ""
        report = load_into(self.network, source, classes=self.classes)
        notes = [
            f"  note: trained with data.{key}={theirs}, which is {getattr(data, key)} here"
            for key, theirs in report.preprocessing.items()
            if theirs != getattr(data, key)
        ]
        return "\n".join([str(report), *notes])

    # -- the loop, one screen a level --

    def train(self) -> None:
        self.preemption.save = self._save_from_outside
        if self.profiler:
            self.profiler.start()
        try:
            with HangWatch(self.process, self.config.train.hang_timeout_s, self._save_from_outside):
                self._log_what_was_left()
                while self._is_due or self.step < self.last_step:
                    try:
                        self._finish_epoch() if self._is_due else self._train_epoch()
                    except NonFiniteError as error:
                        self._roll_back(error)
            self._collect_writes(is_last=True)
        except (SystemExit, NonFiniteError):  # all is saved, or better forgotten
            raise
        except UnreadableError:
            if self.saver.saved[0]:  # a run that has not come far is begun anew, with another manifest
                self._rescue()
            raise
        except BaseException:
            self._rescue()
            raise
        finally:
            if self.profiler:
                self.profiler.stop()
            self.train_loader.close()
            self.monitor.close()
            self.saver.close()

    @property
    def _is_due(self) -> bool:
        """Whether validation, weights and a checkpoint follow now, after an epoch or the last step."""
        ends = self.step == self.last_step or self.step % self.steps_per_epoch == 0
        return ends and self.step > 0 and not self.is_validated

    def _train_epoch(self) -> None:
        """Steps, to the end of the epoch that stands open, or to the last."""
        epoch = self.step // self.steps_per_epoch
        every = self.config.train.checkpoint_every_steps
        interval = self._next_interval()
        epoch_interval = Interval(self.train_loader, self.process.device)
        batches = self._batches()
        while not self._is_due:
            result = self._train_step(itertools.islice(batches, self.micro_steps))
            interval.add(result)
            epoch_interval.add(result)
            self.monitor.advance(interval, epoch=epoch + 1)
            if self.profiler:
                self.profiler.step()
            self._check_faults(epoch)
            if self._ends_interval:
                self.monitor.log_interval(self.step, self._progress() | interval.summary())
                self._logged = self._log_sizes() | {"unlogged": []}
                if (
                    self.mode == "CUDA graphs"
                    and self.step <= self.config.train.log_every_steps
                    and cuda_graphs_skipped()
                ):
                    self.monitor.say(
                        "train.cuda_graphs: the compiler has left them out; TORCH_LOGS=cudagraphs says why"
                    )
                interval = self._next_interval()
            if self._must_end:
                self._end_for_signal(epoch)
            if every and self.step % every == 0 and not self._is_due:
                self._say_faults(self.train_loader, epoch, mode="train")
                self._save()
        self._epoch_speed = epoch_interval.clips_per_second

    @property
    def _ends_interval(self) -> bool:
        """Whether a line of the log follows this step."""
        return self._is_due or self.step % self.config.train.log_every_steps == 0

    def _next_interval(self) -> Interval:
        """From the last line of the log on, though a run was resumed in between."""
        before = [StepResult(*row) for row in self._logged["unlogged"]]
        return Interval(self.train_loader, self.process.device, before=before)

    def _progress(self) -> dict[str, float]:
        return {"train/epoch": self.step / self.steps_per_epoch, "train/faults": self.failed}

    def _log_what_was_left(self) -> None:
        """The line of the last step, if this run was resumed between that step and its line."""
        if self._logged["unlogged"] and self._ends_interval:
            self.monitor.log(self.step, self._progress() | self._next_interval().training())
            self._logged = self._log_sizes() | {"unlogged": []}

    def _batches(self) -> Iterable[Batch]:
        """Of the epoch, each with its time in the trace."""
        batches = iter(self.train_loader)
        while True:
            self.process.whereabouts.at("waiting for data", self.step)
            with record_function("data"):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    def _train_step(self, batches: Iterable[Batch]) -> StepResult:
        """One optimizer step from this process's micro-batches of it."""
        optim, epochs = self.config.optim, self.config.train.epochs
        lr = learning_rate(self.step, optim, steps_per_epoch=self.steps_per_epoch, epochs=epochs)
        if self.step in self.left_out:
            return self._leave_out(batches, lr)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.model.train()
        self._seen.clear()
        if self.mode == "CUDA graphs":
            torch.compiler.cudagraph_mark_step_begin()
        sums = sum(
            self._forward_backward(batch, index, is_last=index == self.micro_steps - 1)
            for index, batch in enumerate(batches)
        )
        gradients = [value.grad for value in self.network.parameters() if value.grad is not None]
        asked_to_end = torch.full_like(sums[:1], self.preemption.signal is not None)
        sums = self.process.sum(torch.cat([sums, asked_to_end]))
        norm = self.multi_tensor.norm(gradients).double()
        # The step's one synchronisation with the device.
        loss, top1, top5, valid, asked, norm = torch.cat([sums, norm[None]]).tolist()
        self._must_end = asked > 0
        loss /= max(valid, 1)
        # DDP has averaged over processes what is to be summed; the sum over clips was divided by the nominal number.
        mean = optim.global_batch_size * self.process.world_size / max(valid, 1) / self.loss_scale.value
        grad_norm, factor = gradient_factor(norm, clip_norm=optim.clip_norm, mean=mean)
        is_finite = math.isfinite(loss) and math.isfinite(grad_norm)
        result = StepResult(loss, top1, top5, valid, lr, grad_norm, self.loss_scale.value, skipped=not is_finite)
        if not is_finite:
            self._judge_non_finite(result)
        self._take_effect(gradients, factor, result)
        return result

    @contextlib.contextmanager
    def _taking_effect(self) -> Iterator[None]:
        """What is done within is saved whole or not at all, whatever interrupts it."""
        with self._whole:
            self._is_whole = False
            yield
            if self._effect is not None:
                self._effect.record()
            self._is_whole = True

    def _take_effect(self, gradients: list[Tensor], factor: float, result: StepResult) -> None:
        self.process.whereabouts.at("updating the weights")
        with record_function("optimizer"), self._taking_effect():
            if result.valid and not result.skipped:  # momentum and decay would move the weights without any
                self.multi_tensor.scale_(gradients, factor)
                self.optimizer.step()
                if self.step > max(self.left_out, default=-1):
                    self._rollbacks = 0
            self.loss_scale.update(overflow=result.skipped)
            self.network.zero_grad(set_to_none=True)
            self._advance(result.valid)
            self._keep_for_log(result)

    def _keep_for_log(self, result: StepResult) -> None:
        self._logged = self._logged | {"unlogged": [*self._logged["unlogged"], dataclasses.astuple(result)]}

    def _advance(self, valid: float) -> None:
        self.step += 1
        self.is_validated = False
        self.failed += self.config.optim.global_batch_size - round(valid)
        self._loader_state = self.train_loader.state_dict()
        self._fault_count = len(self.train_loader.stats.faults)

    def _forward_backward(self, batch: Batch, micro_step: int, *, is_last: bool) -> Tensor:
        """Adds the gradients of the batch's summed loss; returns that, top-1, top-5 and valid clips: float64 [4]."""
        self.process.whereabouts.at("computing")
        labels, valid = (value.to(self.process.device, non_blocking=True) for value in (batch.labels, batch.valid))
        # Mixing and drop path draw from (seed, step, rank, micro-step): a resumed run draws what an unbroken one does.
        key = np.random.SeedSequence([self.config.seed, self.step, self.process.rank, micro_step])
        torch.manual_seed(int(key.generate_state(1, np.uint64)[0]))
        # Gradients are reduced over processes in the last micro-step's backward pass only.
        alone = not is_last and self.model is not self.network
        with self.model.no_sync() if alone else contextlib.nullcontext():
            with record_function("forward"):
                mixed = mix_clips(batch.clips, batch.valid, self.config.mix, np.random.default_rng(key.spawn(1)[0]))
                clips = mixed.clips[:, :, :: self.teacher_frames]
                with autocast(self.process.device, self.precision):
                    logits = self.model(clips)
                loss = self._loss(logits, mixed, labels, valid)
            if is_last and self.process.world_size > 1:
                self.process.whereabouts.at(WAITING)
            with record_function("backward"):
                # The sum over a whole step overflows fp16 sooner than its mean; `_train_step` knows the true count.
                (loss * (self.loss_scale.value / self.config.optim.global_batch_size)).backward()
        if self.step % self.steps_per_epoch == micro_step == 0:
            self.monitor.log_clips(self.step + 1, clips, mean=self.config.data.mean, std=self.config.data.std)
        scores = logits.detach().float()
        if self.mode == "CUDA graphs":  # the next micro-step overwrites them
            scores = scores.clone()
        self._seen.append((batch.sample_ids, batch.valid, scores))
        counts = sum(
            share * top_k_counts(scores, torch.where(valid, each, -1)) for share, each in _shares(mixed, labels)
        )
        return torch.cat([loss.detach().double()[None], counts, valid.sum()[None]])

    def _loss(self, logits: Tensor, mixed: Mixed, labels: Tensor, valid: Tensor) -> Tensor:
        """Of the labels, each with its share, and of the teacher; summed over valid clips."""
        smoothing, distill = self.config.train.label_smoothing, self.config.distill
        loss = sum(
            share * summed_cross_entropy(logits, each, valid, label_smoothing=smoothing)
            for share, each in _shares(mixed, labels)
        )
        if self.teacher is None:
            return loss
        with torch.no_grad(), autocast(self.process.device, self.precision):
            teacher_logits = self.teacher(mixed.clips)
        soft = summed_distillation(logits, teacher_logits, valid, temperature=distill.temperature)
        return torch.lerp(loss, soft, distill.weight)

    # -- what goes wrong --

    def _judge_non_finite(self, result: StepResult) -> None:
        """Says which step it is and, but for fp16's overflows, raises `NonFiniteError`. On all processes at once."""
        clips = self._suspects()
        named = ", ".join(clips[:_SHOWN])
        more = f" and {len(clips) - _SHOWN} more" if len(clips) > _SHOWN else ""
        what = (
            f"step {self.step}: the loss is {result.loss:g} and the gradient norm {result.grad_norm:g} at a learning "
            f"rate of {result.lr:g}; clips: {named}{more}"
        )
        if self.loss_scale.enabled and self.loss_scale.value > 1:
            self.monitor.say(f"{what}; skipped, and the loss scale of {self.loss_scale.value:g} is halved")
            return
        if more:
            what += f", in {self._list_clips(clips)}"
        raise NonFiniteError(
            f"{what}; try a lower optim.lr, a longer optim.warmup_epochs, train.precision=float32 or "
            "train.on_nan=rollback",
            self.step,
        )

    def _list_clips(self, clips: list[str]) -> Path:
        """Adds a row (step, path) for each to a file."""
        path = self.output / "nonfinite.csv"
        if self.process.is_main:
            with (
                contextlib.suppress(OSError),
                open(path, "a", newline="", encoding="utf-8", errors="surrogateescape") as file,
            ):
                csv_writer(file).writerows([self.step, clip] for clip in clips)
        return path

    def _suspects(self) -> list[str]:
        """Paths of the step's clips whose logits are not finite, on all processes; of all its clips where all are."""
        mine = []
        for ids, valid, scores in self._seen:
            finite = scores.isfinite().all(1).cpu()
            mine += [(self.train_loader.manifest.file(i), bool(f)) for i, v, f in zip(ids.tolist(), valid, finite) if v]
        everything = sorted(itertools.chain(*self.process.gather(mine)))
        return [path for path, finite in everything if not finite] or [path for path, _ in everything]

    def _roll_back(self, error: NonFiniteError) -> None:
        """To the newest checkpoint; the step that failed will be left out. Raises `error` where that is not wanted, or
        has not helped."""
        if self.config.train.on_nan != "rollback":
            raise error
        self._collect_writes()
        newest = checkpoints.load_newest_checkpoint(self.saver.folder) if self.process.is_main else None
        path = self._agree_on(newest)
        if path is None or self._rollbacks == _ROLLBACKS:
            why = "there is no checkpoint to go back to" if path is None else f"the step after {_ROLLBACKS} others"
            raise NonFiniteError(f"{error}; {why}", error.step)
        self._rollbacks += 1
        self.left_out.add(error.step)
        state = newest[1] if newest else self._load_shared(path)
        with self._taking_effect():
            self._load_state(path, state)
        self.network.zero_grad(set_to_none=True)
        self.train_loader.stats.faults.clear()
        self.saver.forget()
        if self.process.is_main:
            self.faults.cut(state["fault_bytes"])
        self.monitor.open(self.config, step=self.step, size=state["log_bytes"])
        self.monitor.say(f"{error}; back to {path.name}, and without step {error.step} this time")

    def _leave_out(self, batches: Iterable[Batch], lr: float) -> StepResult:
        for _ in batches:
            pass
        self._must_end = False
        result = StepResult(0.0, 0.0, 0.0, 0.0, lr, 0.0, self.loss_scale.value, skipped=True)
        with self._taking_effect():
            self._advance(self.config.optim.global_batch_size)
            self._keep_for_log(result)
        return result

    def _check_faults(self, epoch: int) -> None:
        """Stops a run that cannot read too much of its data. All processes know the same sums, so all stop here."""
        in_epoch = self.steps_per_epoch * self.config.optim.global_batch_size
        seen = self.step * self.config.optim.global_batch_size - epoch * in_epoch
        allowed = self.config.data.max_fault_fraction
        too_many = self.failed / in_epoch > allowed
        none_read = self.failed == seen and (seen >= _BLIND_CLIPS or self._is_due)
        if not (too_many or none_read):
            return
        faults = self.faults.take(self.train_loader, epoch=epoch, mode="train")
        self.process.barrier()  # torchrun ends the others with the first: not before all is written
        named = "; ".join(f"{fault.path}: {fault.reason}" for fault in faults[:_SHOWN])
        limit = f", more than data.max_fault_fraction={allowed:g} allows of the epoch's {in_epoch}" if too_many else ""
        root = f"; is the line `# root:` in {self.config.data.train} right?" if self.failed == seen else ""
        raise UnreadableError(
            f"epoch {epoch + 1}: {self.failed} of the first {seen} videos cannot be read{limit}: {named}; all are in "
            f"{self.faults.path}{root}; repair them, make the manifest anew without them (prepare.py)"
            + (", or raise data.max_fault_fraction" if too_many else "")
        )

    def _end_for_signal(self, epoch: int) -> None:
        """Saves and ends, as all processes do after this step."""
        self.preemption.handle()
        self._say_faults(self.train_loader, epoch, mode="train")
        try:
            self._save()
            self._collect_writes(is_last=True)
        finally:
            self.process.barrier()  # torchrun gives the others half a minute once the first has ended
        if self.process.is_main:
            name = self.preemption.signal or "a signal to another process"
            is_saved = self.saver.saved[0] == self.step
            what = (
                f"saved step {self.step}" if is_saved else f"step {self.step} is not saved: its weights are not finite"
            )
            print(f"train.py: {name}: {what}; go on with --resume", file=sys.stderr, flush=True)
        raise SystemExit(REQUEUE)

    # -- what follows an epoch --

    def _finish_epoch(self) -> None:
        epoch = (self.step - 1) // self.steps_per_epoch
        self._say_faults(self.train_loader, epoch, mode="train")
        networks = [self.network]
        is_whole = self.step % self.steps_per_epoch == 0
        if is_whole and self.average is not None and epoch >= self.average_from:
            if int(self.average.n_averaged) == epoch - self.average_from:  # not yet, by a run that ended here
                with self._taking_effect():
                    self.average.update_parameters(self.network)
            networks.append(self.average.module)
        (result, *averaged), unreadable = self.validate(*networks)
        self._say_faults(self.val_loader, epoch, mode="validate")
        if not math.isfinite(result["loss"]):
            last = self.step - 1
            raise NonFiniteError(
                f"step {last}: the weights are not finite after it, or the validation loss is not", last
            )
        top1, top5 = result["top1"], result["top5"]
        is_best = top1 > self.best_top1
        best_top1 = max(top1, self.best_top1)
        verdict = f"best so far: {self.output}/best.safetensors" if is_best else f"best {best_top1:.4f}"
        notes = [f"{self._epoch_speed:.1f} training clips/s"] if self._epoch_speed else []
        notes += [f"{unreadable} unreadable videos counted as wrong"] if unreadable else []
        lines = [
            f"epoch {epoch + 1}: val top-1 {top1:.4f}, top-5 {top5:.4f}, {verdict}"
            + f" ({', '.join(notes)})" * bool(notes)
        ]
        files = ["last", "best"] if is_best else ["last"]
        scalars = {f"val/{name}": value for name, value in result.items()}
        if averaged:
            files.append("swa")
            scalars |= {f"swa/{name}": value for name, value in averaged[0].items()}
            lines.append(
                f"average of {int(self.average.n_averaged)} epochs: val top-1 {averaged[0]['top1']:.4f}, "
                f"top-5 {averaged[0]['top5']:.4f}: {self.output}/swa.safetensors"
            )
        self.monitor.log(self.step, scalars)
        self._collect_writes()
        failed = 0 if is_whole else self.failed
        logged = self._logged | self._log_sizes()
        changes = {"best_top1": best_top1, "is_validated": True, "failed": failed, **logged}
        state = self._state() | changes if self.process.is_main else {}
        with self._taking_effect():
            self.best_top1, self.is_validated, self.failed, self._logged = best_top1, True, failed, logged
            if self.process.is_main:
                self.saver.owe(files, state)
        self._save(state)
        for line in lines:
            self.monitor.say(line)

    def _say_faults(self, loader: ClipLoader, epoch: int, *, mode: str) -> None:
        """Writes down and names what `loader` could not read since the last call, on all processes."""
        faults = self.faults.take(loader, epoch=epoch, mode=mode)
        if mode == "train":
            self._fault_count, self._logged = 0, self._logged | self._log_sizes()
        for fault in faults[:_SHOWN]:
            treatment = "left out" if mode == "train" else "counted as wrong"
            self.monitor.say(f"{fault.path}: {fault.reason}; {treatment}")
        if len(faults) > _SHOWN:
            self.monitor.say(f"... and {len(faults) - _SHOWN} more, in {self.faults.path}")

    @torch.no_grad()
    def validate(self, *networks: TimeSformer) -> tuple[list[dict[str, float]], int]:
        """For each network: top1 and top5 over all videos (unreadable ones are wrong), mean loss of the readable ones;
        and how many are unreadable."""
        sums = torch.zeros(len(networks), 3, dtype=torch.float64)  # top-1, top-5, loss
        counts = torch.zeros(1, 3, dtype=torch.float64)
        self.process.whereabouts.at("validating")
        for batch in self.val_loader:
            for row, network in zip(sums, networks, strict=True):
                with autocast(self.process.device, self.precision):
                    logits = network.eval()(batch.clips)
                logits = logits.float().cpu()
                loss = summed_cross_entropy(logits, batch.labels, batch.valid, label_smoothing=0)
                row += torch.cat([top_k_counts(logits, torch.where(batch.valid, batch.labels, -1)), loss[None]])
            counts[0, :2] += torch.stack([batch.valid.sum(), (batch.sample_ids >= 0).sum()])
            self.process.whereabouts.at("validating")
        *rows, (valid, everything, _) = self.process.sum(torch.cat([sums, counts])).tolist()
        results = [
            {"top1": top1 / everything, "top5": top5 / everything, "loss": loss / max(valid, 1)}
            for top1, top5, loss in rows
        ]
        return results, round(everything - valid)

    # -- where the run stands --

    def _state(self) -> dict[str, Any]:
        """Of a checkpoint, in host memory. With the lock, where another thread asks."""
        return checkpoints.host_copy(
            {
                "format": FORMAT,
                "step": self.step,
                "is_validated": self.is_validated,
                "best_top1": self.best_top1,
                "network": self.network.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "loss_scale": self.loss_scale.state_dict(),
                "average": None if self.average is None else self.average.state_dict(),
                "average_from": self.average_from,
                "loader": self._loader_state,
                "failed": self.failed,
                "left_out": sorted(self.left_out),
                "mode": self.mode,
                **self._logged,
                "config": dataclasses.asdict(self.config),
                "classes": list(self.classes),
                "manifests": self._checksums,
                "versions": versions(),
            }
        )

    def _log_sizes(self) -> dict[str, int]:
        """How far the logs have come: what stands there beyond goes, where a run goes on from a checkpoint."""
        return {"fault_bytes": self.faults.size(), "log_bytes": self.monitor.size}

    def _save(self, state: dict[str, Any] | None = None) -> None:
        """A checkpoint. Training waits for the copy to host memory, and for the writes before."""
        if self.process.is_main:
            self._collect_writes()
            self.saver.submit(state or self._state())

    def _collect_writes(self, *, is_last: bool = False) -> None:
        self.process.whereabouts.at("saving")
        self.saver.collect(self.monitor.say, is_last=is_last)

    def _weights(self, state: dict[str, Any], name: str) -> Weights:
        """Those for the file last, best or swa, in the `state` of a checkpoint."""
        prefix = "module."  # of `AveragedModel`, beside its own count
        average = state["average"] or {}
        averaged = {key.removeprefix(prefix): each for key, each in average.items() if key.startswith(prefix)}
        return Weights(
            model=dataclasses.asdict(self.config.model),
            preprocessing=preprocessing(self.config.data),
            classes=self.classes,
            state=averaged if name == "swa" else state["network"],
        )

    def _rescue(self) -> None:
        """Saves the last whole step of a run that ends early, for whatever reason."""
        said = self._save_from_outside()
        if said.startswith("saved"):
            self.monitor.say(said)

    def _save_from_outside(self) -> str:
        """Saves the last whole step, from any thread, when this process is about to end; what to say of it."""
        if not self.process.is_main:
            return "rank 0 saves"
        # Not where the update itself was interrupted, or another thread is in the midst of it for ever.
        if not self._whole.acquire(timeout=5):
            return "the newest checkpoint stands"
        try:
            if not self._is_whole:
                return "the newest checkpoint stands"
            self.preemption.handle()
            self.saver.wait()
            if self.saver.saved == (self.step, self.is_validated) and not self.saver.owes:
                return f"step {self.step} is saved already" if self.step else "nothing to save yet"
            if self._fault_count:
                epoch = (self.step - 1) // self.steps_per_epoch
                self.faults.write(self.train_loader.stats.faults[: self._fault_count], epoch=epoch, mode="train")
                self._logged = self._logged | {"fault_bytes": self.faults.size()}
            with self._beside_the_step():
                state = self._state()
            self.saver.write(state)
            if self.saver.saved != (self.step, self.is_validated):
                return f"step {self.step} is not saved: its weights are not finite"
            return f"saved step {self.step}; go on with --resume"
        except Exception as error:  # there is an end to come to, with an error of its own
            return f"nothing could be saved ({error})"
        finally:
            self._whole.release()

    @contextlib.contextmanager
    def _beside_the_step(self) -> Iterator[None]:
        """On a GPU: what is copied within does not wait for the step under way, which may wait for a process that is
        gone, but for the last that took effect."""
        if self._effect is None:
            yield
            return
        stream = torch.cuda.Stream(self.process.device)
        with torch.cuda.stream(stream):
            stream.wait_event(self._effect)
            yield

    def _open_output(self, resume: bool) -> Path | None:
        """Goes on from what is in the output folder, or sees that nothing is; the checkpoint that was loaded."""
        newest = None
        if self.process.is_main:
            self._lock_note = self.saver.lock()
            newest = find_checkpoint(self.output, resume=resume)
        path = self._agree_on(newest)
        state = {"log_bytes": 0, "fault_bytes": 0}
        if path is not None:
            state = newest[1] if newest else self._load_shared(path)
            self._load_state(path, state)
        if self.process.is_main:
            self.saver.begin()
            (self.output / "config.yaml").write_text(to_yaml(self.config), encoding="utf-8")
            self.faults.cut(state["fault_bytes"])
            self.monitor = Monitor(self.output, total_steps=self.last_step)
            self.monitor.open(self.config, step=self.step, size=state["log_bytes"])
        return path

    def _agree_on(self, newest: tuple[Path, dict[str, Any]] | None) -> Path | None:
        """The path that the main process has found, on all."""
        return self.process.gather(newest and newest[0])[0]

    def _load_shared(self, path: Path) -> dict[str, Any]:
        try:
            return checkpoints.load_checkpoint(path)
        except InputError as error:
            raise InputError(f"{error}, though rank 0 can; `output` must be a folder that all machines share") from None

    def _load_state(self, path: Path, state: dict[str, Any]) -> None:
        """`state` of a checkpoint; raises `InputError` if the run cannot go on from it."""
        data = {"rows": len(self.train_loader.manifest), "checksums": self._checksums}
        try:
            self._changes = check_resumable(path, state, self.config, classes=self.classes, **data)
            self._take_state(state)
        except InputError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
            # Its checksum is right: somebody has made it.
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            raise InputError(f"{path}: not a checkpoint of this run ({reason})") from None

    def _take_state(self, state: dict[str, Any]) -> None:
        if state["average"] and self.average is not None:
            self.average.load_state_dict(state["average"])
        self.train_loader.load_state_dict(state["loader"])
        self.network.load_state_dict(state["network"])
        load_optimizer_state(self.optimizer, state["optimizer"])
        self.loss_scale.load_state_dict(state["loss_scale"])
        self._loader_state, self._fault_count = state["loader"], 0
        unlogged = [dataclasses.astuple(StepResult(*row)) for row in state.get("unlogged", [])]  # not in older ones
        self._logged = {"fault_bytes": state["fault_bytes"], "log_bytes": state["log_bytes"], "unlogged": unlogged}
        self.left_out.update(state["left_out"])
        if self.mode is None:
            self.mode = state.get("mode", "compiled" if state["config"]["train"]["compile"] is True else "eager")
        self.step, self.is_validated = state["step"], state["is_validated"]
        self.best_top1, self.failed = state["best_top1"], state["failed"]
        self.saver.saved = (self.step, self.is_validated)

    def _say_what_runs(self, resumed_from: Path | None, how: str) -> None:
        process, optim, train = self.process, self.config.optim, self.train_loader
        ranks = f"{process.world_size} ranks, {process.local_world_size} on this machine"
        name = f" {torch.cuda.get_device_name(process.device)}" if process.device.type == "cuda" else ""
        left = len(train.manifest) * self.config.data.views_per_decode - self.steps_per_epoch * optim.global_batch_size
        for line in (
            f"device {process.device}{name}, {ranks}; torch {torch.__version__}, DALI {dali_version}",
            f"network {how}",
            f"precision {self.precision}, optimizer {describe(self.optimizer, self.implementation)}, gradients by "
            f"{self.multi_tensor.name}",
            f"{len(train.manifest)} training and {len(self.val_loader.manifest)} validation videos, "
            f"{len(self.classes)} classes",
            "decoders: "
            + ", ".join(f"{codec} {by}" for codec, by in train.decoders.items())
            + (f"; {train.decode_note}" if train.decode_note else ""),
            f"global batch {optim.global_batch_size} = {process.world_size} ranks x {self.batch_size} clips x "
            f"{self.micro_steps} micro-steps; {self.steps_per_epoch} steps an epoch ({left} clips left over), "
            f"{self.total_steps} in {self.config.train.epochs} epochs",
            f"output {self.output}"
            + (f", resumed from {resumed_from.name} at step {self.step}" if resumed_from else ""),
        ):
            self.monitor.say(line)
        named = ((self.config.data.train, train.manifest), (self.config.data.val, self.val_loader.manifest))
        hints = [f"{path}: {manifest.hint}" for path, manifest in named if manifest.hint]
        for note in filter(None, [*self._changes, self._lock_note, *hints]):
            self.monitor.say(note)
        if self.step >= self.last_step and not self._is_due:
            self.monitor.say(f"all {self.last_step} steps are done already")


def _shares(mixed: Mixed, labels: Tensor) -> list[tuple[float, Tensor]]:
    """What each clip is made of: shares, and labels [B]."""
    if mixed.share == 1:
        return [(1.0, labels)]
    return [(mixed.share, labels), (1 - mixed.share, labels[mixed.partners])]
