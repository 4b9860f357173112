"""The test of PaddleVideo and the TimeSformer paper: three crops a video, mean of their probabilities."""

from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from dali_pipelines import ClipLoader, Manifest
from dali_pipelines.loader import Fault
from model import TimeSformer
from training.config import Config, clip_settings
from training.distributed import Process
from training.labels import check_labels, read_manifest
from training.metrics import top_k_counts
from training.precision import autocast, resolve_precision
from training.weights import Weights

PROTOCOL = "test/top1_1x3_prob"
"""One window, three crops, mean of probabilities."""


@dataclass(frozen=True)
class Result:
    """Rows in the order of the manifest."""

    probabilities: Tensor
    """float32 [N, K], mean over the three crops; zeros for an unreadable video."""
    labels: Tensor
    """int64 [N]"""
    valid: Tensor
    """bool [N]: False for an unreadable video, which counts as wrong."""
    faults: list[Fault]

    @property
    def top1(self) -> float:
        return self._share(0)

    @property
    def top5(self) -> float:
        return self._share(1)

    def _share(self, index: int) -> float:
        counts = top_k_counts(self.probabilities, torch.where(self.valid, self.labels, -1))
        return counts[index].item() / len(self.labels)

    def recall(self) -> dict[int, tuple[int, int]]:
        """Label -> (videos of that class that were found, videos of that class)."""
        found = (self.probabilities.argmax(1) == self.labels) & self.valid
        return {
            int(label): (int(found[self.labels == label].sum()), int((self.labels == label).sum()))
            for label in self.labels.unique()
        }


def manifest_for(config: Config, weights: Weights) -> Manifest:
    """The manifest to evaluate: `data.test`, else `data.val`."""
    path = config.data.test or config.data.val
    manifest = read_manifest(path, key="data.test")
    check_labels(manifest, weights.classes, name=path)
    return manifest


def evaluate(
    config: Config, weights: Weights, manifest: Manifest, process: Process, *, progress: bool = False
) -> Result:
    """Every video of the manifest once, shared among the processes; the whole result on each of them."""
    share = -(-len(manifest) // process.world_size)
    batch_size = min(config.data.batch_size or 8, share)
    loader = ClipLoader(
        manifest,
        **clip_settings(config.data, "test"),
        batch_size=batch_size,
        device=process.device,
        rank=process.rank,
        world_size=process.world_size,
        workers=min(process.cores if config.data.workers is None else config.data.workers, share),
    )
    network = weights.build(process.device)
    precision = resolve_precision(config.train.precision, process.device)
    ids, rows = [], []
    for batch in tqdm(loader, unit="batch", dynamic_ncols=True, disable=not progress):
        probabilities = predict_views(network, batch.clips, precision).cpu()
        ids.append(batch.sample_ids[batch.valid])
        rows.append(probabilities[batch.valid])
    result = Result(
        probabilities=torch.zeros(len(manifest), len(weights.classes)),
        labels=torch.from_numpy(manifest.labels.copy()),
        valid=torch.zeros(len(manifest), dtype=torch.bool),
        faults=[],
    )
    for their_ids, their_rows, their_faults in process.gather((torch.cat(ids), torch.cat(rows), loader.stats.faults)):
        result.probabilities[their_ids] = their_rows
        result.valid[their_ids] = True
        result.faults.extend(their_faults)
    result.faults.sort(key=lambda fault: fault.sample_id)
    return result


@torch.inference_mode()
def predict_views(network: TimeSformer, clips: Tensor, precision: str) -> Tensor:
    """Views [B, V, 3, T, S, S] -> mean of their probabilities, float32 [B, K]."""
    with autocast(clips.device, precision):
        logits = network(clips.flatten(0, 1))
    return logits.float().softmax(1).unflatten(0, clips.shape[:2]).mean(1)


def report(result: Result, classes: tuple[str, ...], manifest: Manifest) -> str:
    """The result in a few lines for a terminal."""
    lines = [f"{fault.path}: {fault.reason}; counted as wrong" for fault in result.faults]
    recalls = sorted(result.recall().items(), key=lambda item: item[1][0] / item[1][1])
    if len(classes) <= 20:
        lines += [f"  {classes[label]:<24} {found}/{count}" for label, (found, count) in sorted(recalls)]
    label, (found, count) = recalls[0]
    lines.append(f"lowest recall: {classes[label]} {found / count:.4f} ({found} of {count})")
    unreadable = len(result.faults)
    lines.append(
        f"{len(result.labels)} videos evaluated, {unreadable} unreadable; the manifest left out {manifest.rejected} of "
        f"{manifest.listed} listed"
    )
    lines.append(f"{PROTOCOL} {result.top1:.4f}, top-5 {result.top5:.4f}")
    return "\n".join(lines)
