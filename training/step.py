"""One optimizer step, with the network, optimizer and data that it needs."""

import contextlib
import math
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from common.config import Config, preprocessing
from common.distributed import WAITING, DistributedContext
from common.metrics import top_k_counts
from common.precision import LossScale, autocast, gradient_factor, make_deterministic, resolve_precision
from common.preemption import Preemption
from common.weights import build_network
from dali_pipelines.batches import Batch
from training.augmentation import augment_clips
from training.averaging import make_average
from training.compiling import check_compile, compile_network, decide_compile
from training.data import make_data, read_teacher
from training.losses import summed_cross_entropy, summed_distillation
from training.mixing import Mixed, mix_clips
from training.monitor import NullMonitor
from training.optimizer import (
    learning_rate,
    make_multi_tensor,
    make_optimizer,
    resolve_implementation,
    set_learning_rate,
)
from training.profiling import record_function
from training.recovery import Recovery
from training.run_state import RunState
from training.step_metrics import StepResult


class StepTrainer:
    """Everything that one step of a run needs. `Trainer` adds the loop and the output folder.

    Raises `InputError` for settings and data that cannot work.
    """

    def __init__(self, config: Config, process: DistributedContext, preemption: Preemption):
        self.config, self.process, self.preemption = config, process, preemption
        self.precision = resolve_precision(config.train.precision, process.device)
        self.implementation = resolve_implementation(config.optim, process.device)
        check_compile(config.train, process)
        make_deterministic(process.device)
        teacher = read_teacher(config)
        self.teacher_frames = 1 if teacher is None else teacher.preprocessing["num_frames"] // config.data.num_frames
        """Frames in a training clip per frame that the network takes."""
        self.data = make_data(config, process, teacher)
        self.train_loader, self.val_loader, self.classes, plan, _ = self.data
        self.batch_size, self.micro_steps = plan
        self.steps_per_epoch = len(self.train_loader) // self.micro_steps
        total_steps = config.train.epochs * self.steps_per_epoch
        self.last_step = min(total_steps, config.train.max_steps or total_steps)

        self.teacher = None if teacher is None else teacher.build(process.device).requires_grad_(False)
        torch.manual_seed(config.seed)  # equal initial weights on every process
        self.network = build_network(config.model, preprocessing(config.data), len(self.classes))
        self.network.activation_checkpointing = config.train.activation_checkpointing
        self.network.to(process.device)
        if config.train.freeze_blocks:
            self.network.freeze(config.train.freeze_blocks)
        self.average = make_average(self.network, config.train)
        self.model: nn.Module = self.network
        if process.world_size > 1:
            # The gradient buckets hold the sums of a step's micro-batches; `train_step` divides.
            ids = [process.device] if process.device.type == "cuda" else None
            self.model = DistributedDataParallel(self.network, device_ids=ids, gradient_as_bucket_view=True)
        self.optimizer = make_optimizer(self.network, config.optim, self.implementation)
        self.multi_tensor = make_multi_tensor(self.implementation, process.device)
        self.loss_scale = LossScale(enabled=self.precision == "fp16")

        self.state = RunState(
            config,
            self.network,
            self.optimizer,
            self.loss_scale,
            self.average,
            self.train_loader,
            classes=self.classes,
            checksums={"train": self.train_loader.manifest.checksum(), "val": self.val_loader.manifest.checksum()},
        )
        self.recovery = Recovery(config, process, self.train_loader.manifest, self.state)
        self.monitor = NullMonitor()
        self.must_end = False
        """Whether any process had received a signal by the last step."""

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.state.step

    def compile(self) -> str:
        """Compile the network and the teacher according to the settings and to how a resumed run started; returns a
        description.

        Call it once the state is restored.
        """
        began_as = self.state.mode
        passes = self.last_step * self.micro_steps
        mode, how = decide_compile(self.config.train, self.process, passes=passes, before=began_as)
        self.state.mode = mode
        if began_as not in (None, mode):
            how += f"; it started as {began_as}, so rounding and the draws of drop path differ from now on"
        if mode != "eager":
            compile_network(self.network, cuda_graphs=mode == "CUDA graphs")
            if self.teacher is not None:
                compile_network(self.teacher)
        return how

    def train_step(self, batches: Iterable[Batch]) -> StepResult:
        """Run one optimizer step on this process's micro-batches."""
        optim, epochs = self.config.optim, self.config.train.epochs
        lr = learning_rate(self.step, optim, steps_per_epoch=self.steps_per_epoch, epochs=epochs)
        if self.step in self.state.left_out:
            return self._leave_out(batches, lr)
        set_learning_rate(self.optimizer, lr)
        self.model.train()
        self.recovery.begin_step()
        if self.state.mode == "CUDA graphs":
            torch.compiler.cudagraph_mark_step_begin()
        sums = torch.zeros(4, dtype=torch.float64, device=self.process.device)
        for index, batch in enumerate(batches):
            sums = sums + self.forward_backward(batch, index, is_last=index == self.micro_steps - 1)
        gradients = [value.grad for value in self.network.parameters() if value.grad is not None]
        asked_to_end = torch.full_like(sums[:1], self.preemption.signal is not None)
        sums = self.process.sum(torch.cat([sums, asked_to_end]))
        norm = self.multi_tensor.norm(gradients).double()
        # The step's only synchronisation with the device.
        loss, top1, top5, valid, asked, norm = torch.cat([sums, norm[None]]).tolist()
        self.must_end = asked > 0
        loss /= max(valid, 1)
        # Gradients are sums over clips divided by the nominal batch, which DDP has averaged over processes, not summed.
        mean = optim.global_batch_size * self.process.world_size / max(valid, 1) / self.loss_scale.value
        grad_norm, factor = gradient_factor(norm, clip_norm=optim.clip_norm, mean=mean)
        is_finite = math.isfinite(loss) and math.isfinite(grad_norm)
        result = StepResult(loss, top1, top5, valid, lr, grad_norm, self.loss_scale.value, skipped=not is_finite)
        if not is_finite:
            self.monitor.print(self.recovery.explain(result, self.loss_scale))
        self._commit_step(gradients, factor, result)
        return result

    def forward_backward(self, batch: Batch, micro_step: int, *, is_last: bool) -> Tensor:
        """Add the gradients of the batch's summed loss; returns float64 [4]: that loss, and the numbers of clips with
        their label first and among the first five, and of valid clips."""
        self.process.heartbeat.update("computing")
        labels, valid = (value.to(self.process.device, non_blocking=True) for value in (batch.labels, batch.valid))
        # Augmentation and drop path draw from (seed, step, rank, micro-step), so a resumed run draws the same.
        config = self.config
        key = np.random.SeedSequence([config.seed, self.step, self.process.rank, micro_step])
        torch.manual_seed(int(key.generate_state(1, np.uint64)[0]))
        mixing, augmenting = map(np.random.default_rng, key.spawn(2))
        with self._reducing_gradients(is_last):
            with record_function("forward"):
                clips = augment_clips(
                    batch.clips, config.augment, augmenting, mean=config.data.mean, std=config.data.std
                )
                mixed = mix_clips(clips, batch.valid, config.mix, mixing)
                clips = mixed.clips[:, :, :: self.teacher_frames]
                with autocast(self.process.device, self.precision):
                    logits = self.model(clips)
                loss = self.loss(logits, mixed, labels, valid)
            if is_last and self.process.world_size > 1:
                self.process.heartbeat.update(WAITING)
            with record_function("backward"):
                # In fp16 a step's sum would overflow sooner than its mean; `train_step` corrects the divisor.
                (loss * (self.loss_scale.value / config.optim.global_batch_size)).backward()
        if micro_step == 0 and self.step % self.steps_per_epoch == 0:
            self.monitor.log_clips(self.step + 1, clips, mean=config.data.mean, std=config.data.std)
        scores = logits.detach().float()
        if self.state.mode == "CUDA graphs":  # the next micro-step overwrites them
            scores = scores.clone()
        self.recovery.observe(batch, scores)
        counts = torch.zeros(2, dtype=torch.float64, device=scores.device)
        for share, each in mixed.label_shares(labels):
            counts = counts + share * top_k_counts(scores, torch.where(valid, each, -1))
        return torch.cat([loss.detach().double()[None], counts, valid.sum()[None]])

    def loss(self, logits: Tensor, mixed: Mixed, labels: Tensor, valid: Tensor) -> Tensor:
        """The loss of logits [B, K], summed over valid clips [B]: of the labels [B] by their shares, and of the
        teacher."""
        distill, label_smoothing = self.config.distill, self.config.train.label_smoothing
        losses = [
            share * summed_cross_entropy(logits, each, valid, label_smoothing=label_smoothing)
            for share, each in mixed.label_shares(labels)
        ]
        loss = torch.stack(losses).sum()
        if self.teacher is None:
            return loss
        with torch.no_grad(), autocast(self.process.device, self.precision):
            teacher_logits = self.teacher(mixed.clips)
        soft = summed_distillation(logits, teacher_logits, valid, temperature=distill.temperature)
        return torch.lerp(loss, soft, distill.weight)

    def batches(self) -> Iterator[Batch]:
        """The batches of this epoch, each with its time in the trace."""
        batches = iter(self.train_loader)
        while True:
            self.process.heartbeat.update("waiting for data", self.step)
            with record_function("data"):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    def _reducing_gradients(self, is_last: bool) -> contextlib.AbstractContextManager[None]:
        """Gradients are summed over processes only in the backward pass of a step's last micro-batch."""
        if isinstance(self.model, DistributedDataParallel) and not is_last:
            return self.model.no_sync()
        return contextlib.nullcontext()

    def _commit_step(self, gradients: list[Tensor], factor: float, result: StepResult) -> None:
        """Update the weights with `gradients` times `factor`, and count the step."""
        self.process.heartbeat.update("updating the weights")
        with record_function("optimizer"), self.state.committing():
            if result.valid and not result.skipped:  # without clips, momentum and decay would move the weights
                self.multi_tensor.scale_(gradients, factor)
                self.optimizer.step()
                if self.average is not None and self.average.is_per_step:
                    self.average.update(self.network)
                self.recovery.note_good_step()
            self.loss_scale.update(overflow=result.skipped)
            self.network.zero_grad(set_to_none=True)
            self.state.advance(result, num_failed=self.config.optim.global_batch_size - round(result.valid))

    def _leave_out(self, batches: Iterable[Batch], lr: float) -> StepResult:
        """Read the clips of a step that a rollback has shown to be bad, and discard them."""
        for _ in batches:
            pass
        self.must_end = False
        result = StepResult(0.0, 0.0, 0.0, 0.0, lr, 0.0, self.loss_scale.value, skipped=True)
        with self.state.committing():
            self.state.advance(result, num_failed=0)
        return result
