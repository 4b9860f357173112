"""Finds the checkpoint to resume from, and checks whether a run can resume with its current settings and data."""

import contextlib
import dataclasses
import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from common.agreement import versions
from common.config import Config, flat
from common.distributed import DistributedContext
from dali_pipelines.errors import InputError
from training.checkpoints import Checkpoint, load_checkpoint, load_newest_checkpoint
from training.compiling import Mode
from training.validation import Best

FORMAT = 2
"""Version of the checkpoint format."""

_LAUNCH = "launch"  # a file beside the checkpoints

_FIXED = (
    "model",
    "data.num_frames",
    "data.crop_size",
    "data.mean",
    "data.std",
    "data.balance_classes",
    "data.views_per_decode",
    "optim.name",
    "optim.global_batch_size",
    "optim.layer_decay",
    "optim.head_lr_factor",
    "train.freeze_blocks",
    "seed",
)
"""Sections and keys that decide the network, the meaning of its inputs, the optimizer's state or the order of clips."""

_MAY_CHANGE = ("model.drop_path", "model.embed_init_std")  # only matter in training, or when it starts

_BEST = "train.best_metric"

_SILENT = ("name", "output", "device", "data.train", "data.val", "data.test", "data.labels")
"""Keys whose change is not reported: their contents are compared instead, or do not matter."""


def find_checkpoint(output: Path, *, resume: bool) -> Checkpoint | None:
    """The checkpoint in the folder `output` to resume from, if `resume` is set or torchrun has restarted the run.

    None for a new run. Raises `InputError` if that would overwrite the results of an earlier run.
    """
    folder = output / "checkpoints"
    resume = resume or _is_restarted(folder)
    if resume and (newest := load_newest_checkpoint(folder)):
        return newest
    found = ["checkpoints"] if list(folder.glob("step_*")) else []
    if resume and folder.exists() and not found:
        return None  # the run ended before its first checkpoint was written
    found += [name for name in ("best.safetensors", "last.safetensors") if (output / name).exists()]
    if not found:
        return None
    if resume:
        raise InputError(
            f"{output} holds the {found[0]} of an earlier run, but no checkpoint that can be read: "
            "to start a new run, name another folder with -o output=DIR"
        )
    raise InputError(
        f"{output} holds the {found[0]} of an earlier run: continue that with --resume (in Python resume=True), or "
        "name another folder with -o output=DIR"
    )


def share_checkpoint(process: DistributedContext, found: Checkpoint | None) -> Checkpoint | None:
    """The checkpoint `found` by the main process, loaded by all processes. Every process must call it.

    Raises `InputError` if another process cannot read it.
    """
    path = process.gather(found and found.path)[0]
    if path is None or found is not None:
        return found
    try:
        return Checkpoint(path, load_checkpoint(path))
    except InputError as error:
        raise InputError(f"{error}, though rank 0 can; `output` must be a folder that all machines share") from None


def write_launch_id(folder: Path) -> None:
    """Note in `folder` which launch of torchrun this run belongs to, if any: a restarted run resumes by itself."""
    (folder / _LAUNCH).unlink(missing_ok=True)
    if name := _launch_id():
        (folder / _LAUNCH).write_text(name)


def _is_restarted(folder: Path) -> bool:
    name = _launch_id()
    with contextlib.suppress(OSError):
        return name is not None and (folder / _LAUNCH).read_text() == name
    return False


def _launch_id() -> str | None:
    """An id of this launch of torchrun that survives a restart: its run id, or its process if it has none. None without
    torchrun."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    if name != "none":
        return name
    start_time = Path(f"/proc/{os.getppid()}/stat").read_text().rpartition(")")[2].split()[19]
    return f"{socket.gethostname()} {os.getppid()} {start_time}"


def check_values(path: Path, state: Mapping[str, Any]) -> None:
    """Raises `InputError` if numbers in the checkpoint at `path` with this `state` are none that a run can have, and
    KeyError or TypeError if they are missing. Each alone would train on, to other weights or a late traceback."""
    position = state["loader"]
    counts = {key: state[key] for key in ("step", "failed", "fault_bytes", "log_bytes")}
    counts |= {f"loader.{key}": position[key] for key in ("epoch", "entries", "rows", "step_entries")}
    wrong = [key for key, value in counts.items() if type(value) is not int or not 0 <= value < 1 << 62]
    wrong += [] if type(state["is_validated"]) is bool else ["is_validated"]
    try:
        Best.from_state(dict(state))
    except (ValueError, TypeError):
        wrong += ["best" if "best" in state else "best_top1"]
    wrong += [] if all(type(step) is int for step in state["left_out"]) else ["left_out"]
    wrong += [] if state.get("mode") in (None, *get_args(Mode)) else ["mode"]
    if not wrong:
        clips_a_step = position["step_entries"]
        steps_per_epoch = position["rows"] * position["views_per_decode"] // clips_a_step
        steps = position["epoch"] * steps_per_epoch + position["entries"] // clips_a_step
        wrong += [] if state["step"] == steps else ["step"]
    if wrong:
        value = str(counts.get(wrong[0], state.get(wrong[0])))[:80]
        raise InputError(f"{path}: not a checkpoint of this run ({wrong[0]} is {value})")


def check_resumable(
    path: Path,
    state: Mapping[str, Any],
    config: Config,
    *,
    classes: Sequence[str],
    num_videos: int,
    checksums: Mapping[str, str],
) -> list[str]:
    """Notes on permitted changes since the checkpoint at `path` with this `state`.

    num_videos: videos in `data.train`. checksums: `Manifest.checksum` of `data.train` ("train") and `data.val` ("val").
    Raises `InputError`, in one line that names the key, for any other change.
    """
    if state.get("format") != FORMAT:
        raise InputError(f"{path}: written by another version of this program; name another folder with -o output=DIR")
    last = Path(config.output) / "last.safetensors"
    weights = last if last.exists() else path
    remedy = f"or start a new run from these weights: -o train.pretrained={weights} output=DIR"
    now = flat(dataclasses.asdict(config))
    before = flat(dataclasses.asdict(Config())) | flat(state["config"])  # older checkpoints lack newer keys
    changed = [key for key in now if before[key] != now[key] and key not in _SILENT]
    for key in changed:
        if key not in _MAY_CHANGE and (key in _FIXED or key.split(".")[0] in _FIXED):
            raise InputError(
                f"{path}: {key} was {before[key]} and is {now[key]} now; resume with its old value, {remedy}"
            )
    _check_classes(path, state["classes"], classes, "data.labels" if config.data.labels else "data.train", remedy)
    _check_videos(path, state, f"data.train {config.data.train}", num_videos, checksums["train"], remedy)
    average = state["average"]
    average_from = config.train.epochs - config.train.swa_epochs if config.train.swa_epochs else None
    if state.get("average_kind") == "ema":  # may end, not change into the other kind
        if average["n_averaged"] and config.train.swa_epochs:
            raise InputError(
                f"{path}: has a moving average of the weights; resume with train.swa_epochs=0, and with the old "
                "train.ema_decay to continue it, or name another folder with -o output=DIR"
            )
    elif average and average["n_averaged"] and state["average_from"] != average_from:
        raise InputError(
            f"{path}: weights have been averaged since epoch {state['average_from'] + 1}; resume with the old "
            "train.epochs and train.swa_epochs, or name another folder with -o output=DIR"
        )
    notes = []
    changes = [f"{key} was {before[key]} in the checkpoint, and is {now[key]} now" for key in changed if key != _BEST]
    old_versions = state.get("versions", versions())  # older checkpoints have none
    changes += [
        f"{name} was {old_versions.get(name)} in the checkpoint, and is {version} now"
        for name, version in versions().items()
        if old_versions.get(name) != version
    ]
    notes += [f"note: {change}" for change in changes]
    best = Best.from_state(dict(state))
    if _BEST in changed:
        notes.append(
            f"note: best.safetensors holds the weights of {best.place}, chosen by their {before[_BEST]}; "
            f"from now on weights with a better {now[_BEST]} replace them ({_BEST})"
        )
    if state.get("manifests", checksums)["val"] != checksums["val"]:
        notes.append(
            f"note: data.val {config.data.val} has other videos or labels than before; the best top-1 so far, "
            f"{best.accuracy.top1:.4f}, was measured on the old ones"
        )
    return notes


def _check_videos(
    path: Path, state: Mapping[str, Any], manifest: str, num_videos: int, checksum: str, remedy: str
) -> None:
    old_num_videos = state["loader"]["rows"]
    if num_videos != old_num_videos:
        change = f"it has {num_videos} videos, and had {old_num_videos}"
    elif state.get("manifests", {"train": checksum})["train"] != checksum:  # older checkpoints have no checksum
        change = "its videos, their labels or their order are different"
    else:
        return
    raise InputError(f"{path}: {manifest} has changed: {change}; resume with the old manifest, {remedy}")


def _check_classes(path: Path, before: Sequence[str], now: Sequence[str], key: str, remedy: str) -> None:
    if list(before) == list(now):
        return
    if len(before) != len(now):
        change = f"there were {len(before)} classes, and there are {len(now)} now"
    else:
        label = next(label for label, (old, new) in enumerate(zip(before, now)) if old != new)
        change = f"class {label} was {before[label]!r} and is {now[label]!r} now"
    raise InputError(f"{path}: {key}: {change}; resume with the old labels, {remedy}")
