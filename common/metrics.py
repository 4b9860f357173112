"""The names of the metrics that a run logs, counts of correct predictions, and averages over classes."""

import torch
from torch import Tensor


class Metric:
    """Names of the scalars in TensorBoard and metrics.jsonl, and of the one image. Shares are 0 to 1."""

    LOSS = "train/loss"
    """Mean over the readable clips of the steps since the last line, without steps that fp16 skipped."""
    TOP1 = "train/top1"
    """Share of the training clips, mixed and augmented, whose label has the highest score."""
    TOP5 = "train/top5"
    GRAD_NORM = "train/grad_norm"
    """Gradient norm of the last step, before clipping."""
    LEARNING_RATE = "train/lr"
    LOSS_SCALE = "train/loss_scale"
    SKIPPED_STEPS = "train/skipped_steps"
    EPOCH = "train/epoch"
    """Number of epochs done, including the fraction of the current one."""
    FAULTS = "train/faults"
    """Unreadable training clips in this epoch so far."""
    CLIPS = "train/clips"
    """An image: some clips of each epoch's first batch, as the network sees them."""

    CLIPS_PER_SECOND = "speed/clips_per_second"
    STEP_MS = "speed/step_ms"
    DATA_WAIT_MS = "speed/data_wait_ms"
    """Time per step that the main process waits for clips."""
    DATA_WAIT_SHARE = "speed/data_wait_share"

    PACKETS_READ = "data/packets_read"
    PACKETS_KEPT = "data/packets_kept"
    """Share of the packets read that were decoded."""

    HOST_MEMORY_GIB = "host/memory_gib"
    """Memory (PSS) of the main process and its workers."""
    GPU_TORCH_MEMORY_GIB = "gpu/torch_memory_gib"
    """Peak memory allocated by torch since the last line."""
    GPU_MEMORY_GIB = "gpu/memory_gib"
    """Memory in use on the GPU, including DALI's."""
    GPU_DECODER_SHARE = "gpu/decoder_share"
    """Utilisation of NVDEC."""
    GPU_COMPUTE_SHARE = "gpu/compute_share"

    VALIDATION = ("val/top1", "val/top5", "val/loss", "val/mean_class_accuracy", "val/macro_f1")

    @classmethod
    def averaged_validation(cls, average: str) -> tuple[str, ...]:
        """The same for averaged weights: `average` is swa or ema."""
        return tuple(key.replace("val/", f"{average}/") for key in cls.VALIDATION)


METRIC_NAMES = {
    "top1": "top-1",
    "top5": "top-5",
    "mean_class_accuracy": "mean class accuracy",
    "macro_f1": "macro F1",
    "loss": "loss",
}
"""The metrics of a validation in words, in the order in which they are printed."""


def top_k_counts(scores: Tensor, labels: Tensor, *, ks: tuple[int, ...] = (1, 5)) -> Tensor:
    """For each k, count the rows of scores [B, K] whose label [B] is among the k highest; float64 [len(ks)].

    Rows without a label (-1) and rows whose score for the label is NaN are not counted.
    """
    index = labels.clamp(min=0)[:, None]
    target = scores.gather(1, index)
    # Among equal scores the lower class comes first, as in argmax.
    before = (scores > target) | ((scores == target) & (torch.arange(scores.shape[1], device=scores.device) < index))
    rank = before.sum(1)
    counts = (labels >= 0) & ~target.isnan()[:, 0]
    return torch.stack([((rank < k) & counts).sum() for k in ks]).double()


def class_averages(predicted: Tensor, correct: Tensor, videos: Tensor) -> tuple[float, float]:
    """Mean class accuracy (the mean of the recalls) and macro F1 (the mean of F1 = 2 TP / (2 TP + FP + FN)), 0 to 1.

    predicted, correct, videos: for each of K classes, the number of videos that were taken for it, that were rightly
    taken for it, and that belong to it. Classes without a video are left out of both means.
    """
    present = videos > 0
    correct, videos = correct[present].double(), videos[present]
    recall, f1 = correct / videos, 2 * correct / (videos + predicted[present])
    return recall.mean().item(), f1.mean().item()
