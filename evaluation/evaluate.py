"""The test of PaddleVideo and the TimeSformer paper, three crops a video, and its relatives: see `results.Protocol`."""

import dataclasses
import datetime
import hashlib
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import torch
from nvidia.dali import __version__ as dali_version
from torch import Tensor
from tqdm import tqdm

from common.agreement import check_agreement, shared_facts, weights_checksum
from common.config import Config, clip_settings
from common.distributed import DistributedContext
from common.labels import check_labels, read_manifest
from common.metrics import top_k_counts
from common.precision import autocast, resolve_precision
from common.weights import Weights
from dali_pipelines import ClipLoader, InputError, Manifest
from dali_pipelines.batches import Fault
from dali_pipelines.files import absolute, join
from evaluation.results import Protocol, Results, make_results
from model import TimeSformer


@dataclass(frozen=True)
class Result:
    """Rows in the order of the manifest."""

    probabilities: Tensor
    """float32 [N, K]; zeros for a video that could not be evaluated."""
    labels: Tensor
    """int64 [N]"""
    valid: Tensor
    """bool [N]: False for a video that could not be evaluated, which counts as wrong."""
    faults: list[Fault]
    members: Tensor
    """float64 [M, 2]: how many videos each of the M weights has right by itself, first and among its first five."""


def check_members(members: Sequence[Weights], names: Sequence[str]) -> None:
    """`InputError` where weights that are to be evaluated together have other classes, or other clips."""
    for weights, name in zip(members[1:], names[1:], strict=True):
        if weights.classes != members[0].classes:
            raise InputError(
                f"{name}: its classes are not those of {names[0]}; an ensemble needs the same, in one order"
            )
        for key, value in members[0].preprocessing.items():
            if weights.preprocessing[key] != value:
                raise InputError(
                    f"{name}: trained with data.{key}={weights.preprocessing[key]}, {names[0]} with {value}; the "
                    "members of an ensemble see the same clips"
                )


def manifest_for(config: Config, weights: Weights) -> Manifest:
    """The manifest to evaluate: `data.test`, else `data.val`."""
    path = config.data.test or config.data.val
    manifest = read_manifest(path, key="data.test")
    check_labels(manifest, weights.classes, name=path, of="the weights")
    return manifest


def evaluate(
    config: Config,
    members: Sequence[Weights],
    manifest: Manifest,
    process: DistributedContext,
    *,
    protocol: Protocol | None = None,
    progress: bool = False,
) -> Result:
    """Every video of the manifest once, shared among the processes; the whole result on each of them. Several weights
    are an ensemble: one decode for all, and the mean over them."""
    protocol = protocol or Protocol()
    if process.world_size > 1:
        facts = shared_facts(config) | {"protocol": protocol.name, "the manifest": manifest.summary()}
        facts |= {f"weights {n + 1}": weights_checksum(each.state)[:12] for n, each in enumerate(members)}
        check_agreement(process, facts)
    share = -(-len(manifest) // process.world_size)
    batch_size = min(config.data.batch_size or max(8 // protocol.windows, 1), share)
    loader = ClipLoader(
        manifest,
        **clip_settings(config.data, "test" if protocol.crops == 3 else "validate"),
        num_windows=protocol.windows,
        batch_size=batch_size,
        device=process.device,
        rank=process.rank,
        world_size=process.world_size,
        workers=process.workers(config.data.workers, share),
    )
    if progress and loader.decode_note:
        tqdm.write(loader.decode_note, file=sys.stderr)
    networks = [weights.build(process.device) for weights in members]
    precision = resolve_precision(config.train.precision, process.device)
    ids, rows, counts = [], [], torch.zeros(len(members), 2, dtype=torch.float64)
    for batch in tqdm(loader, unit="batch", dynamic_ncols=True, disable=not progress):
        views = batch.clips if protocol.crops == 3 else batch.clips[:, None]
        answers = torch.stack(
            [predict_views(network, views, precision, average=protocol.average).cpu() for network in networks]
        )
        mean = answers.mean(0)
        if protocol.average == "score":  # an infinite logit is no answer: its probability is NaN
            answers, mean = answers.softmax(2), mean.softmax(1)
        ids.append(batch.sample_ids[batch.valid])
        rows.append(mean[batch.valid])
        labels = torch.where(batch.valid, batch.labels, -1)
        counts += torch.stack([top_k_counts(answer, labels) for answer in answers])
    result = Result(
        probabilities=torch.zeros(len(manifest), len(members[0].classes)),
        labels=torch.from_numpy(manifest.labels.copy()),
        valid=torch.zeros(len(manifest), dtype=torch.bool),
        faults=[],
        members=torch.zeros_like(counts),
    )
    gathered = process.gather((torch.cat(ids), torch.cat(rows), counts, loader.stats.faults))
    for their_ids, their_rows, their_counts, their_faults in gathered:
        result.probabilities[their_ids] = their_rows
        result.valid[their_ids] = True
        result.members.add_(their_counts)
        result.faults.extend(their_faults)
    reason = f"the network's answer is not finite in {precision}; try -o train.precision=float32"
    for row in (~result.probabilities.isfinite().all(1)).nonzero()[:, 0].tolist():
        result.faults.append(Fault(0, row, manifest.file(row), reason))
        result.valid[row], result.probabilities[row] = False, 0
    result.faults.sort(key=lambda fault: fault.sample_id)
    return result


@torch.inference_mode()
def predict_views(network: TimeSformer, clips: Tensor, precision: str, *, average: str = "prob") -> Tensor:
    """Views [B, V, 3, T, S, S] -> the mean of their probabilities (average "prob") or of their logits ("score"),
    float32 [B, K]. Three views at a time: many windows take no more memory than one."""
    answers = []
    for views in clips.split(3, dim=1):
        with autocast(clips.device, precision):
            logits = network(views.flatten(0, 1))
        answers.append(logits.float().unflatten(0, views.shape[:2]))
    answers = torch.cat(answers, 1)
    return (answers.softmax(2) if average == "prob" else answers).mean(1)


def build_results(
    result: Result,
    config: Config,
    members: Sequence[Weights],
    names: Sequence[str],
    manifest: Manifest,
    process: DistributedContext,
    *,
    protocol: Protocol,
    started: float,
) -> Results:
    """`result` with all that results.json says besides; `started` by `time.monotonic()`."""
    path = config.data.test or config.data.val
    settings = dataclasses.asdict(config)
    settings["device"] = str(process.device)
    settings["train"]["precision"] = resolve_precision(config.train.precision, process.device)
    count = len(manifest)
    facts = {
        "protocol": protocol.name,
        **dataclasses.asdict(protocol),
        "weights": [
            {"path": name, "sha256": _checksum(name, weights), "top1": right / count, "top5": right5 / count}
            for name, weights, (right, right5) in zip(names, members, result.members.tolist(), strict=True)
        ],
        "config": settings,
        "manifest": {
            "path": path,
            "sha256": hashlib.sha256(Path(path).read_bytes()).hexdigest(),
            "root": absolute(manifest.root),
            "listed": manifest.listed,
            "kept": count,
            "left_out": manifest.rejected,
        },
        "classes": list(members[0].classes),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - started, 3),
        "versions": {
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "dali": dali_version,
            "av": av.__version__,
            "numpy": np.__version__,
        },
    }
    return make_results(
        facts,
        paths=[manifest[row].path for row in range(count)],
        labels=result.labels.numpy(),
        probabilities=result.probabilities.numpy(),
        valid=result.valid.numpy(),
        reasons={fault.sample_id: fault.reason for fault in result.faults},
    )


def _checksum(name: str, weights: Weights) -> str:
    """SHA-256 of the file; of the tensors, where the weights are a folder or a name on the Hub."""
    if Path(name).is_file():
        with open(name, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    return weights_checksum(weights.state)


def report(results: Results) -> str:
    """The results in a few lines for a terminal."""
    summary, classes = results.summary, results.classes
    root = summary["manifest"]["root"]
    lines = [f"{join(root, fault['path'])}: {fault['reason']}; counted as wrong" for fault in summary["faults"]]
    videos = np.bincount(results.labels, minlength=len(classes)).tolist()
    right = np.bincount(results.labels[results.right], minlength=len(classes)).tolist()
    present = [label for label, count in enumerate(videos) if count]
    if len(classes) <= 20:
        lines += [f"  {classes[label]:<24} {right[label]}/{videos[label]}" for label in present]
    worst = min(present, key=lambda label: right[label] / videos[label])
    share = right[worst] / videos[worst]
    lines.append(f"lowest recall: {classes[worst]} {share:.4f} ({right[worst]} of {videos[worst]})")
    manifest, name = summary["manifest"], summary["protocol"]
    lines.append(
        f"{summary['expected']} videos evaluated, {summary['failed']} unreadable; the manifest left out "
        f"{manifest['left_out']} of {manifest['listed']} listed"
    )
    if len(summary["weights"]) > 1:
        lines += [
            f"  {each['path']} alone: {name} {each['top1']:.4f}, top-5 {each['top5']:.4f}"
            for each in summary["weights"]
        ]
    (low, high), (low5, high5) = summary["top1_interval"], summary["top5_interval"]
    lines.append(
        f"{name} {summary['top1']:.4f}, top-5 {summary['top5']:.4f} "
        f"(95 % intervals {low:.4f} to {high:.4f}, {low5:.4f} to {high5:.4f})"
    )
    return "\n".join(lines)
