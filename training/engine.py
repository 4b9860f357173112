"""The training loop: epochs of steps, a step of micro-batches, validation and checkpoints after each epoch."""

import contextlib
import dataclasses
import itertools
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from dali_pipelines import ClipLoader, InputError
from dali_pipelines.loader import Batch
from model import TimeSformer
from training import checkpoints
from training.config import Config, clip_settings, preprocessing, to_yaml
from training.distributed import Process
from training.faults import FaultLog
from training.labels import check_labels, class_names, read_manifest
from training.losses import summed_cross_entropy, summed_distillation
from training.metrics import top_k_counts
from training.mixing import Mixed, mix_clips
from training.monitor import Monitor, Silent
from training.optimizer import learning_rate, make_optimizer
from training.weights import Weights, build_network, load_into, load_weights, save_weights

_FAULTS_SHOWN = 5
_BLIND_CLIPS = 16  # a run that can read none of so many stops
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Trainer:
    """Everything of one run; `train` goes from where it stands to the end.

        with start_process(config.device) as process:
            Trainer(config, process, resume=False).train()

    Writes below `config.output`: best.safetensors, last.safetensors, checkpoints/, tensorboard/, metrics.jsonl,
    config.yaml and, where asked for, swa.safetensors, where videos cannot be read, faults.csv. Raises `InputError` for
    settings and data that cannot work, such as more unreadable videos than `data.max_fault_fraction`.
    """

    def __init__(self, config: Config, process: Process, *, resume: bool):
        self.config = config
        self.process = process
        self.precision = resolve_precision(config.train.precision, process.device)
        self.output = Path(config.output)
        self.micro_steps, self.batch_size = _micro_batches(config, process)
        teacher = self._read_teacher()
        self.teacher_frames = 1 if teacher is None else teacher.preprocessing["num_frames"] // config.data.num_frames
        """Frames of the training clips for each one that the network takes."""
        self.train_loader, self.val_loader = self._make_loaders(teacher)
        self.teacher = None if teacher is None else teacher.build(process.device).requires_grad_(False)

        torch.manual_seed(config.seed)  # equal initial weights on every process
        self.network = build_network(config.model, preprocessing(config.data), len(self.classes))
        self.network.activation_checkpointing = config.train.activation_checkpointing
        self.network.to(process.device)
        self.average = AveragedModel(self.network) if config.train.swa_epochs else None
        # The first epoch of those averaged.
        self.average_from = None if self.average is None else config.train.epochs - config.train.swa_epochs
        if config.train.compile:
            self.network.compile()
        self.model = self.network
        if process.world_size > 1:
            # The gradient buckets hold sums of a step's micro-batches; `_finish_gradients` divides.
            ids = [process.device.index] if process.device.type == "cuda" else None
            self.model = DistributedDataParallel(self.network, device_ids=ids, gradient_as_bucket_view=True)
        self.optimizer = make_optimizer(self.network, config.optim)
        self.scaler = torch.amp.GradScaler(process.device.type, enabled=self.precision == "fp16")

        self.steps_per_epoch = len(self.train_loader) // self.micro_steps
        self.total_steps = config.train.epochs * self.steps_per_epoch
        self.last_step = min(self.total_steps, config.train.max_steps or self.total_steps)
        self.step = 0  # optimizer steps done
        self.best_top1 = -1.0
        self.failed = 0  # training clips of this epoch that could not be read, on all processes
        self.faults = FaultLog(self.output / "faults.csv", process)
        self._fault_bytes = 0  # of faults.csv that stand
        resumed_from = self._open_output(resume)
        loaded = "" if resumed_from else self._load_pretrained()
        process.barrier()  # nobody looks for an earlier run once the first has begun to write
        self.monitor: Monitor | Silent = Silent()
        if process.is_main:
            self.output.mkdir(parents=True, exist_ok=True)
            (self.output / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
            self.faults.cut(self._fault_bytes)
            self.monitor = Monitor(self.output, total_steps=self.last_step, step=self.step)
        self.monitor.log_config(to_yaml(config))
        self._say_what_runs(resumed_from)
        if loaded:
            self.monitor.say(loaded)

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

    def _read_teacher(self) -> Weights | None:
        path, data = self.config.distill.teacher, self.config.data
        if path is None:
            return None
        weights = load_weights(path)
        theirs = weights.preprocessing
        for key in ("crop_size", "mean", "std"):
            if theirs[key] != getattr(data, key):
                raise InputError(
                    f"distill.teacher {path} was trained with data.{key}={theirs[key]}; here it is {getattr(data, key)}"
                )
        if theirs["num_frames"] % data.num_frames:
            raise InputError(
                f"distill.teacher {path} takes {theirs['num_frames']} frames; expected data.num_frames, "
                f"{data.num_frames}, or a multiple of it"
            )
        return weights

    def _make_loaders(self, teacher: Weights | None) -> tuple[ClipLoader, ClipLoader]:
        """Training and validation; sets the names of the classes."""
        data, process = self.config.data, self.process
        train, val = (read_manifest(getattr(data, name), key=f"data.{name}") for name in ("train", "val"))
        self.classes = class_names(data.labels, train)
        for path, manifest in ((data.train, train), (data.val, val)):
            check_labels(manifest, self.classes, name=path, renamed=data.labels is not None)
        step_entries = self.config.optim.global_batch_size
        if len(train) * data.views_per_decode < step_entries:
            raise InputError(
                f"{data.train}: {len(train)} videos, fewer than one step takes; "
                f"optim.global_batch_size is {step_entries}"
            )
        shared = {
            "batch_size": self.batch_size,
            "device": process.device,
            "seed": self.config.seed,
            "rank": process.rank,
            "world_size": process.world_size,
            "workers": process.cores if data.workers is None else data.workers,
        }
        if teacher is not None and teacher.classes != self.classes:
            raise InputError(
                f"distill.teacher {self.config.distill.teacher} knows {len(teacher.classes)} classes "
                f"({teacher.classes[0]}, ...); expected the {len(self.classes)} here ({self.classes[0]}, ...)"
            )
        clips = clip_settings(data, "train")
        clips["num_frames"] *= self.teacher_frames  # the frames of the teacher, within the window of ours
        clips["stride"] = data.stride and data.stride / self.teacher_frames
        return (
            ClipLoader(train, **clips, step_entries=step_entries, **shared),
            ClipLoader(val, **clip_settings(data, "validate"), **shared),
        )

    # -- the loop, one screen a level --

    def train(self) -> None:
        try:
            while self.step < self.last_step:
                self._train_epoch()
        finally:
            self.train_loader.close()
            self.monitor.close()

    def _train_epoch(self) -> None:
        """To the end of the epoch that stands open, or to the last step; then validation, weights and a checkpoint."""
        epoch = self.step // self.steps_per_epoch
        started, clips = time.perf_counter(), 0.0
        window = _Window(self.train_loader)
        micro_batches = iter(self.train_loader)
        while micro_step_batches := list(itertools.islice(micro_batches, self.micro_steps)):
            result = self._train_step(micro_step_batches)
            window.add(result)
            clips += result.valid
            self.failed += self.config.optim.global_batch_size - round(result.valid)
            self.step += 1
            self.monitor.advance(loss=f"{window.mean_loss:.3f}", epoch=str(epoch + 1))
            is_last = self.step == self.last_step or self.step % self.steps_per_epoch == 0
            self._check_faults(epoch, is_last=is_last)
            if is_last or self.step % self.config.train.log_every_steps == 0:
                progress = {"train/epoch": self.step / self.steps_per_epoch, "train/faults": self.failed}
                self.monitor.log(self.step, progress | window.summary())
                window = _Window(self.train_loader)
            if self.step == self.last_step:
                break
            every = self.config.train.checkpoint_every_steps
            if every and self.step % every == 0 and not is_last:
                self._save_checkpoint(epoch)
        self._finish_epoch(epoch, clips / (time.perf_counter() - started))

    def _train_step(self, batches: list[Batch]) -> "_StepResult":
        """One optimizer step from this process's micro-batches of it."""
        epochs = self.config.train.epochs
        lr = learning_rate(self.step, self.config.optim, steps_per_epoch=self.steps_per_epoch, epochs=epochs)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.model.train()
        sums = self.process.sum(
            sum(
                self._forward_backward(batch, index, is_last=index == len(batches) - 1)
                for index, batch in enumerate(batches)
            )
        )
        norm = self._finish_gradients(sums[3])
        loss_sum, top1, top5, valid, grad_norm = [*sums.tolist(), norm.item()]  # waits for the device
        loss = loss_sum / max(valid, 1)
        if not math.isfinite(loss) or (not math.isfinite(grad_norm) and self.precision != "fp16"):
            raise InputError(
                f"step {self.step}: the loss is {loss} and the gradient norm {grad_norm} at a learning rate of {lr:g}; "
                "try a lower optim.lr, a longer optim.warmup_epochs or train.precision=float32"
            )
        if valid:  # momentum and weight decay would move the weights without any
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return _StepResult(loss, top1, top5, valid, lr, grad_norm)

    def _forward_backward(self, batch: Batch, micro_step: int, *, is_last: bool) -> Tensor:
        """Adds the gradients of the batch's summed loss; returns that, top-1, top-5 and valid clips: float64 [4]."""
        labels, valid = (value.to(self.process.device, non_blocking=True) for value in (batch.labels, batch.valid))
        # Mixing and drop path draw from (seed, step, rank, micro-step): a resumed run draws what an unbroken one does.
        key = np.random.SeedSequence([self.config.seed, self.step, self.process.rank, micro_step])
        torch.manual_seed(int(key.generate_state(1, np.uint64)[0]))
        mixed = mix_clips(batch.clips, batch.valid, self.config.mix, np.random.default_rng(key.spawn(1)[0]))
        clips = mixed.clips[:, :, :: self.teacher_frames]
        if self.step == micro_step == 0:
            self.monitor.log_clips(0, clips, mean=self.config.data.mean, std=self.config.data.std)
        gradients_wait = contextlib.nullcontext() if is_last or self.model is self.network else self.model.no_sync()
        with gradients_wait:
            with autocast(self.process.device, self.precision):
                logits = self.model(clips)
            loss = self._loss(logits, mixed, labels, valid)
            # The sum over a whole step overflows fp16 sooner than its mean; `_finish_gradients` knows the true count.
            self.scaler.scale(loss / self.config.optim.global_batch_size).backward()
        scores = logits.detach().float()
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

    def _finish_gradients(self, valid: Tensor) -> Tensor:
        """Makes the gradients those of the mean loss over all valid clips of the step, and clips them; their norm."""
        self.scaler.unscale_(self.optimizer)
        gradients = [value.grad for value in self.network.parameters() if value.grad is not None]
        # DDP has averaged over processes what is to be summed.
        nominal = self.config.optim.global_batch_size * self.process.world_size
        torch._foreach_mul_(gradients, (nominal / valid.clamp(min=1)).to(gradients[0].dtype))
        norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
        clip_norm = self.config.optim.clip_norm
        if clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.network.parameters(), clip_norm, norm, foreach=True)
        return norm

    def _check_faults(self, epoch: int, *, is_last: bool) -> None:
        """Stops a run that cannot read too much of its data. All processes know the same sums, so all stop here."""
        in_epoch = self.steps_per_epoch * self.config.optim.global_batch_size
        seen = self.step * self.config.optim.global_batch_size - epoch * in_epoch
        allowed = self.config.data.max_fault_fraction
        too_many = self.failed / in_epoch > allowed
        none_read = self.failed == seen and (seen >= _BLIND_CLIPS or is_last)
        if not (too_many or none_read):
            return
        faults = self.faults.take(self.train_loader, epoch=epoch, mode="train")
        self.process.barrier()  # torchrun ends the others with the first: not before all is written
        named = "; ".join(f"{fault.path}: {fault.reason}" for fault in faults[:_FAULTS_SHOWN])
        limit = f", more than data.max_fault_fraction={allowed:g} allows of the epoch's {in_epoch}" if too_many else ""
        root = f"; is the line `# root:` in {self.config.data.train} right?" if self.failed == seen else ""
        raise InputError(
            f"epoch {epoch + 1}: {self.failed} of the first {seen} videos cannot be read{limit}: {named}; all are in "
            f"{self.faults.path}{root}; repair them, make the manifest anew without them (prepare.py)"
            + (", or raise data.max_fault_fraction" if too_many else "")
        )

    # -- what follows an epoch --

    def _finish_epoch(self, epoch: int, clips_per_second: float) -> None:
        self._say_faults(self.train_loader, epoch, mode="train")
        networks = [self.network]
        is_whole = self.step % self.steps_per_epoch == 0
        if is_whole and self.average is not None and epoch >= self.average_from:
            self.average.update_parameters(self.network)
            networks.append(self.average.module)
        (result, *averaged), unreadable = self.validate(*networks)
        self._say_faults(self.val_loader, epoch, mode="validate")
        top1, top5 = result["top1"], result["top5"]
        is_best = top1 > self.best_top1
        self.best_top1 = max(top1, self.best_top1)
        verdict = f"best so far, saved to {self.output}/best.safetensors" if is_best else f"best {self.best_top1:.4f}"
        bad = f", {unreadable} unreadable videos counted as wrong" if unreadable else ""
        speed = f"{clips_per_second:.1f} training clips/s"
        lines = [f"epoch {epoch + 1}: val top-1 {top1:.4f}, top-5 {top5:.4f}, {verdict} ({speed}{bad})"]
        files = {"last": self.network} | ({"best": self.network} if is_best else {})
        scalars = {f"val/{name}": value for name, value in result.items()}
        if averaged:
            files["swa"] = self.average.module
            scalars |= {f"swa/{name}": value for name, value in averaged[0].items()}
            lines.append(
                f"average of {int(self.average.n_averaged)} epochs: val top-1 {averaged[0]['top1']:.4f}, "
                f"top-5 {averaged[0]['top5']:.4f}, saved to {self.output}/swa.safetensors"
            )
        self.monitor.log(self.step, scalars)
        if self.process.is_main:
            self.output.mkdir(parents=True, exist_ok=True)
            for name, network in files.items():
                save_weights(self.output / f"{name}.safetensors", self.weights(network))
        if is_whole:
            self.failed = 0
        self._save_checkpoint(epoch)
        for line in lines:
            self.monitor.say(line)

    def _say_faults(self, loader: ClipLoader, epoch: int, *, mode: str) -> None:
        """Writes down and names what `loader` could not read since the last call, on all processes."""
        faults = self.faults.take(loader, epoch=epoch, mode=mode)
        for fault in faults[:_FAULTS_SHOWN]:
            treatment = "left out" if mode == "train" else "counted as wrong"
            self.monitor.say(f"{fault.path}: {fault.reason}; {treatment}")
        if len(faults) > _FAULTS_SHOWN:
            self.monitor.say(f"... and {len(faults) - _FAULTS_SHOWN} more, in {self.faults.path}")

    @torch.no_grad()
    def validate(self, *networks: TimeSformer) -> tuple[list[dict[str, float]], int]:
        """For each network: top1 and top5 over all videos (unreadable ones are wrong), mean loss of the readable ones;
        and how many are unreadable."""
        sums = torch.zeros(len(networks), 3, dtype=torch.float64)  # top-1, top-5, loss
        counts = torch.zeros(1, 3, dtype=torch.float64)
        for batch in self.val_loader:
            for row, network in zip(sums, networks, strict=True):
                with autocast(self.process.device, self.precision):
                    logits = network.eval()(batch.clips)
                logits = logits.float().cpu()
                loss = summed_cross_entropy(logits, batch.labels, batch.valid, label_smoothing=0)
                row += torch.cat([top_k_counts(logits, torch.where(batch.valid, batch.labels, -1)), loss[None]])
            counts[0, :2] += torch.stack([batch.valid.sum(), (batch.sample_ids >= 0).sum()])
        *rows, (valid, everything, _) = self.process.sum(torch.cat([sums, counts])).tolist()
        results = [
            {"top1": top1 / everything, "top5": top5 / everything, "loss": loss / max(valid, 1)}
            for top1, top5, loss in rows
        ]
        return results, round(everything - valid)

    def weights(self, network: TimeSformer) -> Weights:
        return Weights(
            model=dataclasses.asdict(self.config.model),
            preprocessing=preprocessing(self.config.data),
            classes=self.classes,
            state=network.state_dict(),
        )

    # -- where the run stands --

    def _save_checkpoint(self, epoch: int) -> None:
        self._say_faults(self.train_loader, epoch, mode="train")
        if self.process.is_main:
            state = {
                "step": self.step,
                "best_top1": self.best_top1,
                "network": self.network.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "average": None if self.average is None else self.average.state_dict(),
                "average_from": self.average_from,
                "loader": self.train_loader.state_dict(),
                "failed": self.failed,
                "fault_bytes": self.faults.size(),
                "config": dataclasses.asdict(self.config),
                "classes": list(self.classes),
            }
            checkpoints.save_checkpoint(self.output / "checkpoints", self.step, state)

    def _open_output(self, resume: bool) -> Path | None:
        """Goes on from what is in the output folder, or sees that nothing is; the checkpoint that was loaded."""
        if resume and (newest := checkpoints.load_newest_checkpoint(self.output / "checkpoints")):
            self._load_state(*newest)
            return newest[0]
        results = ("checkpoints", "best.safetensors", "last.safetensors")
        taken = [name for name in results if (self.output / name).exists()]
        if taken and resume:
            raise InputError(
                f"{self.output} holds the {taken[0]} of an earlier run, but no checkpoint that can be read: "
                "to begin anew, name another folder with -o output=DIR"
            )
        if taken:
            raise InputError(
                f"{self.output} holds the {taken[0]} of an earlier run: continue that with --resume, "
                "or name another folder with -o output=DIR"
            )
        return None

    def _load_state(self, path: Path, state: dict[str, Any]) -> None:
        """`state` of a checkpoint; what the config says of the optimizer beyond its kind may have changed since."""
        for section, keys in (("model", None), ("optim", ("name",))):
            saved, wanted = state["config"][section], dataclasses.asdict(getattr(self.config, section))
            for key in keys or wanted:
                if saved[key] != wanted[key]:
                    raise InputError(
                        f"{path}: {section}.{key} was {saved[key]} and is {wanted[key]} now; "
                        "resume with what it was, or name another folder with -o output=DIR"
                    )
        if state["classes"] != list(self.classes):
            raise InputError(
                f"{path} was trained on {len(state['classes'])} classes that are not the {len(self.classes)} of now"
            )
        self.network.load_state_dict(state["network"])
        settings = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, wanted in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(wanted)
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        if state.get("average") and state["average"]["n_averaged"]:
            if state["average_from"] != self.average_from:
                raise InputError(
                    f"{path}: weights have been averaged since epoch {state['average_from'] + 1}; resume with the "
                    "train.epochs and train.swa_epochs of then, or name another folder with -o output=DIR"
                )
            self.average.load_state_dict(state["average"])
        self.train_loader.load_state_dict(state["loader"])
        self.step, self.best_top1 = state["step"], state["best_top1"]
        self.failed, self._fault_bytes = state.get("failed", 0), state.get("fault_bytes", 0)

    def _say_what_runs(self, resumed_from: Path | None) -> None:
        process, optim = self.process, self.config.optim
        implementation = "fused" if process.device.type == "cuda" else "foreach"
        videos = (len(loader.manifest) for loader in (self.train_loader, self.val_loader))
        for line in (
            f"device {process.device}, precision {self.precision}, {optim.name} (torch {implementation})",
            "{} training and {} validation videos, {} classes".format(*videos, len(self.classes)),
            "decoders: " + ", ".join(f"{codec} {by}" for codec, by in self.train_loader.decoders.items()),
            f"global batch {optim.global_batch_size} = {process.world_size} processes x {self.batch_size} clips x "
            f"{self.micro_steps} micro-steps; {self.steps_per_epoch} steps an epoch, {self.total_steps} in all",
            f"output {self.output}" + (f", resumed from {resumed_from.name}" if resumed_from else ""),
        ):
            self.monitor.say(line)
        if self.step >= self.last_step:
            self.monitor.say(f"all {self.last_step} steps are done already")


def _shares(mixed: Mixed, labels: Tensor) -> list[tuple[float, Tensor]]:
    """What each clip is made of: shares, and labels [B]."""
    if mixed.share == 1:
        return [(1.0, labels)]
    return [(mixed.share, labels), (1 - mixed.share, labels[mixed.partners])]


@dataclasses.dataclass(frozen=True)
class _StepResult:
    loss: float
    top1: float
    top5: float
    valid: float
    lr: float
    grad_norm: float


class _Window:
    """Means over the steps between two log lines."""

    def __init__(self, loader: ClipLoader):
        self._loader = loader
        self._waited = loader.stats.wait_seconds
        self._started = time.perf_counter()
        self._results: list[_StepResult] = []

    def add(self, result: _StepResult) -> None:
        self._results.append(result)

    @property
    def mean_loss(self) -> float:
        return sum(result.loss * result.valid for result in self._results) / max(self._clips, 1)

    @property
    def _clips(self) -> float:
        return sum(result.valid for result in self._results)

    def summary(self) -> dict[str, float]:
        seconds = time.perf_counter() - self._started
        return {
            "train/loss": self.mean_loss,
            "train/top1": sum(result.top1 for result in self._results) / max(self._clips, 1),
            "train/top5": sum(result.top5 for result in self._results) / max(self._clips, 1),
            "train/lr": self._results[-1].lr,
            "train/grad_norm": self._results[-1].grad_norm,
            "train/clips_per_second": self._clips / seconds,
            "train/data_wait_share": (self._loader.stats.wait_seconds - self._waited) / seconds,
        }


def resolve_precision(name: str, device: torch.device) -> str:
    """float32, bf16 or fp16 for a `train.precision`."""
    has_bf16 = device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
    if name == "auto":
        return "bf16" if device.type == "cuda" and has_bf16 else "float32"
    if name == "amp":
        return "bf16" if has_bf16 else "fp16"
    return name


def autocast(device: torch.device, precision: str) -> torch.autocast:
    return torch.autocast(device.type, _DTYPES.get(precision), enabled=precision in _DTYPES)


def _micro_batches(config: Config, process: Process) -> tuple[int, int]:
    """(micro-steps a step, clips a process takes at once)."""
    total, ranks = config.optim.global_batch_size, process.world_size
    if total % ranks:
        raise InputError(
            f"optim.global_batch_size is {total}, which {ranks} processes cannot share evenly; "
            f"the nearest that can: {', '.join(map(str, _nearest_multiples(total, ranks)))}"
        )
    share = total // ranks
    batch_size = config.data.batch_size or share
    if share % batch_size:
        fitting = [size for size in range(1, share + 1) if share % size == 0]
        nearest = sorted(sorted(fitting, key=lambda size: abs(size - batch_size))[:2])
        raise InputError(
            f"data.batch_size is {batch_size}, but each of {ranks} processes has {share} clips a step "
            f"(optim.global_batch_size {total}); the nearest that divide it: {', '.join(map(str, nearest))}"
        )
    return share // batch_size, batch_size


def _nearest_multiples(number: int, of: int) -> list[int]:
    below = number // of * of
    return [value for value in (below, below + of) if value]
