"""Whether a run can go on from a checkpoint with the settings and data of now, and what of them has changed since."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.agreement import versions
from common.config import Config, flat
from dali_pipelines.errors import InputError

FORMAT = 2  # of checkpoints

_FIXED = (
    "model",
    "data.num_frames",
    "data.crop_size",
    "data.mean",
    "data.std",
    "data.views_per_decode",
    "optim.name",
    "optim.global_batch_size",
    "seed",
)
"""Sections and keys on which the network, what its inputs mean, or the order of clips depends."""

_MAY_CHANGE = ("model.drop_path", "model.embed_init_std")  # they matter in training only, or at its start

_SILENT = ("name", "output", "device", "data.train", "data.val", "data.test", "data.labels")
"""Keys whose change is no news: what they name is compared itself, or does not matter."""


def check_resumable(
    path: Path,
    state: Mapping[str, Any],
    config: Config,
    *,
    classes: Sequence[str],
    rows: int,
    checksums: Mapping[str, str],
) -> list[str]:
    """What has changed since the `state` of the checkpoint at `path`, and may, in words.

    rows, checksums: videos of `data.train`, and `Manifest.checksum` of `data.train` and `data.val`, of now. Raises
    `InputError`, in one line that names the key, for what may not change.
    """
    if state.get("format") != FORMAT:
        raise InputError(f"{path}: written by another version of this program; name another folder with -o output=DIR")
    last = Path(config.output) / "last.safetensors"
    weights = last if last.exists() else path
    remedy = f"or begin a new run from these weights: -o train.pretrained={weights} output=DIR"
    before, now = flat(state["config"]), flat(dataclasses.asdict(config))
    changed = [key for key in now if key in before and before[key] != now[key] and key not in _SILENT]
    for key in changed:
        if key not in _MAY_CHANGE and (key in _FIXED or key.split(".")[0] in _FIXED):
            raise InputError(
                f"{path}: {key} was {before[key]} and is {now[key]} now; resume with what it was, {remedy}"
            )
    _check_classes(path, state["classes"], classes, "data.labels" if config.data.labels else "data.train", remedy)
    _check_videos(path, state, config.data.train, rows, checksums["train"], remedy)
    average = state["average"]
    average_from = config.train.epochs - config.train.swa_epochs if config.train.swa_epochs else None
    if average and average["n_averaged"] and state["average_from"] != average_from:
        raise InputError(
            f"{path}: weights have been averaged since epoch {state['average_from'] + 1}; resume with the "
            "train.epochs and train.swa_epochs of then, or name another folder with -o output=DIR"
        )
    notes = []
    changes = [f"{key} was {before[key]} and is {now[key]} now" for key in changed]
    theirs = state.get("versions", versions())  # checkpoints of earlier versions do not tell
    changes += [
        f"{name} was {theirs.get(name)} and is {own} now" for name, own in versions().items() if theirs.get(name) != own
    ]
    if changes:
        notes.append(f"note: changed since the checkpoint: {', '.join(changes)}")
    if state.get("manifests", checksums)["val"] != checksums["val"]:
        notes.append(
            f"note: data.val {config.data.val} has other videos or labels than before; the best top-1 so far, "
            f"{state['best_top1']:.4f}, is that of the old ones"
        )
    return notes


def _check_videos(path: Path, state: Mapping[str, Any], name: str, rows: int, checksum: str, remedy: str) -> None:
    """Checkpoints of earlier versions tell the number of videos only."""
    if rows != state["loader"]["rows"]:
        what = f"it has {rows} videos, and had {state['loader']['rows']}"
    elif state.get("manifests", {"train": checksum})["train"] != checksum:
        what = "its videos, their labels or their order are not those of before"
    else:
        return
    raise InputError(f"{path}: data.train {name} has changed: {what}; resume with the manifest of before, {remedy}")


def _check_classes(path: Path, before: Sequence[str], now: Sequence[str], key: str, remedy: str) -> None:
    if list(before) == list(now):
        return
    if len(before) != len(now):
        what = f"{len(before)} classes were in use, and {len(now)} are now"
    else:
        label = next(label for label, (old, new) in enumerate(zip(before, now)) if old != new)
        what = f"class {label} was {before[label]!r} and is {now[label]!r} now"
    raise InputError(f"{path}: {key}: {what}; resume with the labels of before, {remedy}")
