"""Steps whose loss, gradient or weights are not finite: skipped by fp16, otherwise the run stops or rolls back."""

import contextlib
import itertools
from pathlib import Path

from torch import Tensor

from common.config import Config
from common.distributed import DistributedContext
from common.precision import LossScale
from dali_pipelines import InputError, Manifest
from dali_pipelines.batches import Batch
from dali_pipelines.text import csv_writer
from training.checkpoints import Checkpoint, load_newest_checkpoint
from training.resuming import share_checkpoint
from training.run_state import RunState
from training.step_metrics import StepResult

_MAX_SHOWN = 5  # clips in a message
_MAX_ROLLBACKS = 3  # without a good step between them


class NonFiniteError(InputError):
    """A step with a non-finite loss or gradient, or with non-finite weights after it."""

    def __init__(self, message: str, step: int):
        super().__init__(message)
        self.step = step


class Recovery:
    """Names the clips of a step that is not finite, and finds the checkpoint to roll back to."""

    def __init__(self, config: Config, process: DistributedContext, manifest: Manifest, state: RunState):
        self._config, self._process, self._manifest, self._state = config, process, manifest, state
        self._rollbacks = 0  # since the last good step
        self._scored: list[tuple[Tensor, Tensor, Tensor]] = []  # of this step: sample ids, valid, logits

    def begin_step(self) -> None:
        """Forgets the scores of the previous step."""
        self._scored.clear()

    def observe(self, batch: Batch, scores: Tensor) -> None:
        """Remember the scores [B, K] of one micro-batch of this step."""
        self._scored.append((batch.sample_ids, batch.valid, scores))

    def note_good_step(self) -> None:
        """Note that this step updates the weights. The count of rollbacks restarts after the last step left out."""
        if self._state.step > max(self._state.left_out, default=-1):
            self._rollbacks = 0

    def explain(self, result: StepResult, loss_scale: LossScale) -> str:
        """The message for a step that fp16 skips. Raises `NonFiniteError` if the loss scale cannot fall any further.

        Every process must call it.
        """
        step, clips = self._state.step, self._suspects()
        named = ", ".join(clips[:_MAX_SHOWN])
        more = f" and {len(clips) - _MAX_SHOWN} more" if len(clips) > _MAX_SHOWN else ""
        problem = (
            f"step {step}: the loss is {result.loss:g} and the gradient norm {result.grad_norm:g} at a learning "
            f"rate of {result.lr:g}; clips: {named}{more}"
        )
        if loss_scale.enabled and loss_scale.value > 1:
            return f"{problem}; skipped, and the loss scale of {loss_scale.value:g} is halved"
        if more:
            problem += f", in {self._list_clips(clips)}"
        raise NonFiniteError(
            f"{problem}; try a lower optim.lr, a longer optim.warmup_epochs, train.precision=float32 or "
            "train.on_nan=rollback",
            step,
        )

    def _list_clips(self, clips: list[str]) -> Path:
        """Append a row (step, path) per clip to nonfinite.csv."""
        path = Path(self._config.output) / "nonfinite.csv"
        if self._process.is_main:
            with (
                contextlib.suppress(OSError),
                open(path, "a", newline="", encoding="utf-8", errors="surrogateescape") as file,
            ):
                csv_writer(file).writerows([self._state.step, clip] for clip in clips)
        return path

    def _suspects(self) -> list[str]:
        """Paths of the step's clips whose logits are not finite, on all processes; all its clips if there are none."""
        mine = []
        for ids, valid, scores in self._scored:
            finite = scores.isfinite().all(1).cpu()
            mine += [(self._manifest.file(i), bool(f)) for i, v, f in zip(ids.tolist(), valid, finite) if v]
        clips = sorted(itertools.chain(*self._process.gather(mine)))
        return [path for path, is_finite in clips if not is_finite] or [path for path, _ in clips]

    def recover(self, error: NonFiniteError, folder: Path) -> Checkpoint:
        """The newest checkpoint in `folder`, to roll back to; from now on the failed step is left out.

        Raises `NonFiniteError` if there is none, or if rolling back has not helped. Every process must call it.
        """
        newest = share_checkpoint(self._process, load_newest_checkpoint(folder) if self._process.is_main else None)
        if newest is None:
            raise NonFiniteError(f"{error}; there is no checkpoint to roll back to", error.step)
        if self._rollbacks == _MAX_ROLLBACKS:
            raise NonFiniteError(f"{error}; {_MAX_ROLLBACKS} rollbacks have not helped", error.step)
        self._rollbacks += 1
        self._state.left_out.add(error.step)
        return newest
