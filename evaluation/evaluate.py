"""Predicts every video of a manifest with three crops per video, as PaddleVideo and the TimeSformer paper do, or with
another `results.Protocol`."""

import dataclasses
import datetime
import hashlib
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from typing import Protocol as Interface

import av
import numpy as np
import torch
from nvidia.dali import __version__ as dali_version
from torch import Tensor
from tqdm import tqdm

from common.agreement import check_agreement, shared_facts, weights_checksum
from common.config import Config, clip_settings, read_run_config
from common.distributed import DistributedContext
from common.labels import check_labels, read_manifest, shows_top5
from common.metrics import top_k_counts
from common.precision import autocast, resolve_precision
from dali_pipelines import ClipLoader, InputError, Manifest
from dali_pipelines.batches import Fault
from dali_pipelines.files import absolute, join
from evaluation.results import Protocol, Results, make_results


class Model(Interface):
    """What `evaluate` needs of `common.weights.Weights`, and of a network that export.py wrote."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of their labels."""

    @property
    def preprocessing(self) -> dict[str, Any]:
        """How clips are cut: keys in the section `data` of a config."""

    @property
    def state(self) -> Mapping[str, Tensor]:
        """The tensors, if they are known."""

    def build(self, device: torch.device | str = "cpu") -> Callable[[Tensor], Tensor]:
        """The network: clips [B, 3, T, S, S] -> scores [B, K]."""


@dataclass(frozen=True)
class Predictions:
    """The predictions of `evaluate` for N videos and K classes; rows are in the order of the manifest."""

    probabilities: Tensor
    """float32 [N, K]; zeros for a video that could not be evaluated."""
    labels: Tensor
    """int64 [N]"""
    valid: Tensor
    """bool [N]: False for a video that could not be evaluated, which counts as wrong."""
    faults: list[Fault]
    members: Tensor
    """float64 [M, 2]: for each of the M weights alone, the number of videos whose label is its most likely class, and
    is among its five most likely."""


def check_members(members: Sequence[Model], names: Sequence[str]) -> None:
    """Raises `InputError` if the weights of an ensemble differ in classes or preprocessing."""
    for weights, name in zip(members[1:], names[1:], strict=True):
        if weights.classes != members[0].classes:
            raise InputError(
                f"{name}: its classes differ from those of {names[0]}; the members of an ensemble need the same "
                "classes in the same order"
            )
        for key, value in members[0].preprocessing.items():
            if weights.preprocessing[key] != value:
                raise InputError(
                    f"{name}: trained with data.{key}={weights.preprocessing[key]}, {names[0]} with {value}; the "
                    "members of an ensemble need the same clips"
                )


def with_videos_of_run(config: Config, weights: str) -> Config:
    """`config` with the `data.test` and `data.val` of the config.yaml beside the file `weights`, unless it sets one of
    them. Raises `InputError` with what to name if that file, or what it names, does not exist."""
    if config.data.test or config.data.val:
        return config
    remedy = "name a manifest with -o data.test=FILE, or a config with -c"
    run = Path(weights).with_name("config.yaml")
    if not run.is_file():
        raise InputError(f"data.test is not set, and there is no config.yaml beside {weights}: {remedy}")
    data = read_run_config(run).data
    path = data.test or data.val
    if path is None or not Path(path).exists():
        found = "names no data.test or data.val" if path is None else f"names {path}, which does not exist"
        raise InputError(f"{run} {found}: {remedy}")
    return dataclasses.replace(config, data=dataclasses.replace(config.data, test=data.test, val=data.val))


def manifest_path(config: Config) -> str:
    """Returns the manifest to evaluate: `data.test`, else `data.val`. Raises `InputError` if neither is set."""
    path = config.data.test or config.data.val
    if path is None:
        raise InputError("data.test is not set: name a manifest with -o data.test=FILE; prepare.py makes one")
    return path


def manifest_for(config: Config, weights: Model) -> Manifest:
    """Reads the manifest to evaluate. Raises `InputError` if its classes differ from those of the weights."""
    path = manifest_path(config)
    manifest = read_manifest(path, key="data.test")
    check_labels(manifest, weights.classes, name=path, of="the weights")
    return manifest


def evaluate(
    config: Config,
    members: Sequence[Model],
    manifest: Manifest,
    process: DistributedContext,
    *,
    protocol: Protocol | None = None,
    progress: bool = False,
) -> Predictions:
    """Predicts every video of the manifest once, split among the processes; each process returns all predictions.
    Several weights form an ensemble: each clip is decoded once, and the predictions are averaged."""
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
        predicted = torch.stack(
            [predict_views(network, views, precision, average=protocol.average).cpu() for network in networks]
        )  # [M, B, K]
        mean = predicted.mean(0)
        if protocol.average == "score":  # an infinite logit becomes NaN, so it counts as no prediction
            predicted, mean = predicted.softmax(2), mean.softmax(1)
        ids.append(batch.sample_ids[batch.valid])
        rows.append(mean[batch.valid])
        labels = torch.where(batch.valid, batch.labels, -1)
        counts += torch.stack([top_k_counts(each, labels) for each in predicted])
    predictions = Predictions(
        probabilities=torch.zeros(len(manifest), len(members[0].classes)),
        labels=torch.from_numpy(manifest.labels.copy()),
        valid=torch.zeros(len(manifest), dtype=torch.bool),
        faults=[],
        members=torch.zeros_like(counts),
    )
    gathered = process.gather((torch.cat(ids), torch.cat(rows), counts, loader.stats.faults))
    for their_ids, their_rows, their_counts, their_faults in gathered:
        predictions.probabilities[their_ids] = their_rows
        predictions.valid[their_ids] = True
        predictions.members.add_(their_counts)
        predictions.faults.extend(their_faults)
    reason = f"the network's output is not finite in {precision}; try -o train.precision=float32"
    for row in (~predictions.probabilities.isfinite().all(1)).nonzero()[:, 0].tolist():
        predictions.faults.append(Fault(0, row, manifest.file(row), reason))
        predictions.valid[row], predictions.probabilities[row] = False, 0
    predictions.faults.sort(key=lambda fault: fault.sample_id)
    return predictions


@torch.inference_mode()
def predict_views(
    network: Callable[[Tensor], Tensor], clips: Tensor, precision: str, *, average: str = "prob"
) -> Tensor:
    """Averages the predictions for views [B, V, 3, T, S, S]: their probabilities (average "prob") or their logits
    ("score"), float32 [B, K]. Runs three views at a time, so many windows take no more memory than one."""
    parts = []
    for views in clips.split(3, dim=1):
        with autocast(clips.device, precision):
            logits = network(views.flatten(0, 1))
        parts.append(logits.float().unflatten(0, views.shape[:2]))
    all_logits = torch.cat(parts, 1)
    return (all_logits.softmax(2) if average == "prob" else all_logits).mean(1)


def build_results(
    predictions: Predictions,
    config: Config,
    members: Sequence[Model],
    names: Sequence[str],
    manifest: Manifest,
    process: DistributedContext,
    *,
    protocol: Protocol,
    started: float,
) -> Results:
    """Adds the facts of results.json to the predictions; `started` is the `time.monotonic()` when the command began."""
    path = manifest_path(config)
    settings = dataclasses.asdict(config)
    settings["device"] = str(process.device)
    settings["train"]["precision"] = resolve_precision(config.train.precision, process.device)
    count = len(manifest)
    facts = {
        "protocol": protocol.name,
        **dataclasses.asdict(protocol),
        "weights": [
            {"path": name, "sha256": weights_sha256(name, weights), "top1": right / count, "top5": right5 / count}
            for name, weights, (right, right5) in zip(names, members, predictions.members.tolist(), strict=True)
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
        labels=predictions.labels.numpy(),
        probabilities=predictions.probabilities.numpy(),
        valid=predictions.valid.numpy(),
        reasons={fault.sample_id: fault.reason for fault in predictions.faults},
    )


def weights_sha256(name: str, weights: Model) -> str:
    """SHA-256 of the file `name`, or of the tensors if that is a folder or a name on the Hugging Face Hub."""
    if Path(name).is_file():
        with open(name, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    return weights_checksum(weights.state)


def results_text(results: Results) -> str:
    """Summarises the results for a terminal."""
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
        for each in summary["weights"]:
            top5 = f", top-5 {each['top5']:.4f}" if shows_top5(classes) else ""
            lines.append(f"  {each['path']} alone: {name} {each['top1']:.4f}{top5}")
    lines.append(f"mean class accuracy {summary['mean_class_accuracy']:.4f}, macro F1 {results.macro_f1:.4f}")
    (low, high), (low5, high5) = summary["top1_interval"], summary["top5_interval"]
    if shows_top5(classes):
        lines.append(
            f"{name} {summary['top1']:.4f}, top-5 {summary['top5']:.4f} "
            f"(95% intervals {low:.4f} to {high:.4f}, {low5:.4f} to {high5:.4f})"
        )
    else:
        lines.append(f"{name} {summary['top1']:.4f} (95% interval {low:.4f} to {high:.4f})")
    return "\n".join(lines)
