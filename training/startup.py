"""The report of a run at its start, and loading of its pretrained weights."""

import os
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from nvidia.dali import __version__ as dali_version

from common.config import Config
from common.distributed import DistributedContext
from common.weights import load_into
from dali_pipelines import InputError, Manifest
from model import TimeSformer
from training.data import Data

_FEW_VIDEOS = 5  # for validation, per class on average
_MAX_NAMED = 5  # classes in a note


def load_pretrained_weights(network: TimeSformer, config: Config, classes: tuple[str, ...]) -> str:
    """Load `train.pretrained` into the network if it is set; returns the report."""
    source, data = config.train.pretrained, config.data
    if source is None:
        return "random weights: train.pretrained is not set"
    try:
        report = load_into(network, source, classes=classes)
    except InputError as error:
        remedy = "; or train from random weights: -o train.pretrained=null" if not os.path.exists(source) else ""
        raise InputError(f"train.pretrained: {error}{remedy}") from None
    notes = [
        f"  note: trained with data.{key}={theirs}, which is {getattr(data, key)} here"
        for key, theirs in report.preprocessing.items()
        if theirs != getattr(data, key)
    ]
    return "\n".join([str(report), *notes])


def startup_lines(
    config: Config,
    process: DistributedContext,
    data: Data,
    *,
    steps_per_epoch: int,
    network: str,
    arithmetic: str,
    resumed: str,
    changes: Sequence[str],
) -> Iterator[str]:
    """The first lines of a run: device, network, arithmetic, data, decoders, batch and output.

    network: how the network runs, such as "compiled". arithmetic: precision and optimizer. resumed: "" for a new run.
    changes: notes on settings and data that have changed since the checkpoint.
    """
    name = f" {torch.cuda.get_device_name(process.device)}" if process.device.type == "cuda" else ""
    yield (
        f"device {process.device}{name}, {process.world_size} ranks, {process.local_world_size} on this machine; "
        f"torch {torch.__version__}, DALI {dali_version}"
    )
    yield f"network {network}"
    yield arithmetic
    num_videos = len(data.train.manifest) - data.repeated
    yield f"{num_videos} training and {len(data.val.manifest)} validation videos, {len(data.classes)} classes"
    if data.repeated:
        yield f"data.balance_classes: rarer classes are repeated, {len(data.train.manifest)} training videos per epoch"
    note = f"; {data.train.decode_note}" if data.train.decode_note else ""
    yield "decoders: " + ", ".join(f"{codec} {engine}" for codec, engine in data.train.decoders.items()) + note
    total, epochs = config.optim.global_batch_size, config.train.epochs
    num_unused = len(data.train.manifest) * config.data.views_per_decode - steps_per_epoch * total
    yield (
        f"global batch {total} = {process.world_size} ranks x {data.plan.batch_size} clips x "
        f"{data.plan.micro_steps} micro-steps; {steps_per_epoch} steps per epoch ({num_unused} clips left over), "
        f"{epochs * steps_per_epoch} in {epochs} epochs"
    )
    yield f"output {config.output}{resumed}"
    yield from changes
    for path, loader in ((config.data.train, data.train), (config.data.val, data.val)):
        if loader.manifest.hint:
            yield f"{path}: {loader.manifest.hint}"
    yield from _missing_classes(
        str(config.data.train), data.train.manifest, data.classes, "the network cannot learn them"
    )
    yield from _validation_notes(str(config.data.val), data.val.manifest, data.classes)


def _validation_notes(path: str, manifest: Manifest, classes: tuple[str, ...]) -> Iterator[str]:
    """Notes on a validation manifest with few videos, or without any of some class."""
    if len(manifest) < _FEW_VIDEOS * len(classes):
        yield (
            f"{path}: {len(manifest)} videos for {len(classes)} classes: the validation accuracy moves in "
            f"steps of {100 / len(manifest):.1f} %, and small differences mean nothing"
        )
    yield from _missing_classes(path, manifest, classes, "mean class accuracy and macro F1 leave them out")


def _missing_classes(path: str, manifest: Manifest, classes: tuple[str, ...], consequence: str) -> Iterator[str]:
    """A note on the classes without a video in a manifest."""
    videos = np.bincount(manifest.labels, minlength=len(classes))
    if missing := [name for name, count in zip(classes, videos.tolist(), strict=True) if not count]:
        named = ", ".join(missing[:_MAX_NAMED])
        more = f" and {len(missing) - _MAX_NAMED} more" if len(missing) > _MAX_NAMED else ""
        yield f"{path}: no video of {named}{more}: {consequence}"
