"""The data of a run: its manifests, classes and loaders, and how a step's clips are shared out."""

import math
from typing import NamedTuple

from dali_pipelines import ClipLoader, InputError
from training.config import Config, clip_settings
from training.distributed import Process
from training.labels import check_labels, class_names, read_manifest
from training.weights import Weights, load_weights


class Sharing(NamedTuple):
    """global batch = ranks x batch_size x micro_steps."""

    batch_size: int
    """Clips a process takes at once."""
    micro_steps: int
    """Batches a process takes for one optimizer step."""


def share_out(config: Config, world_size: int) -> Sharing:
    """Raises `InputError` with the nearest combinations that are possible."""
    total = config.optim.global_batch_size
    if total % world_size:
        below = total // world_size * world_size
        nearest = [value for value in (below, below + world_size) if value]
        raise InputError(
            f"optim.global_batch_size is {total}, which {world_size} processes cannot share evenly; "
            f"the nearest that can: {', '.join(map(str, nearest))}"
        )
    share = total // world_size
    batch_size = config.data.batch_size or share
    if share % batch_size:
        fitting = [size for size in range(1, share + 1) if share % size == 0]
        nearest = sorted(sorted(fitting, key=lambda size: abs(size - batch_size))[:2])
        step = math.prod((world_size, batch_size))
        totals = [value for value in (total // step * step, total // step * step + step) if value]
        raise InputError(
            f"data.batch_size is {batch_size}, but each of {world_size} processes has {share} clips a step "
            f"(optim.global_batch_size {total}); the nearest that divide it: {', '.join(map(str, nearest))}; or the "
            f"nearest global batches for {batch_size}: {', '.join(map(str, totals))}"
        )
    return Sharing(batch_size, share // batch_size)


def read_teacher(config: Config) -> Weights | None:
    """`distill.teacher`, if its clips are cut as ours are."""
    path, data = config.distill.teacher, config.data
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


class Data(NamedTuple):
    train: ClipLoader
    val: ClipLoader
    classes: tuple[str, ...]


def make_data(config: Config, process: Process, sharing: Sharing, teacher: Weights | None) -> Data:
    """The loaders of training and validation; with a teacher, training clips have as many frames as it takes, within
    the window of ours."""
    data = config.data
    train, val = (read_manifest(getattr(data, name), key=f"data.{name}") for name in ("train", "val"))
    classes = class_names(data.labels, train)
    for path, manifest in ((data.train, train), (data.val, val)):
        check_labels(manifest, classes, name=path, renamed=data.labels is not None)
    step_entries = config.optim.global_batch_size
    if len(train) * data.views_per_decode < step_entries:
        raise InputError(
            f"{data.train}: {len(train)} videos, fewer than one step takes; optim.global_batch_size is {step_entries}"
        )
    if teacher is not None and teacher.classes != classes:
        raise InputError(
            f"distill.teacher {config.distill.teacher} knows {len(teacher.classes)} classes "
            f"({teacher.classes[0]}, ...); expected the {len(classes)} here ({classes[0]}, ...)"
        )
    shared = {
        "batch_size": sharing.batch_size,
        "device": process.device,
        "seed": config.seed,
        "rank": process.rank,
        "world_size": process.world_size,
        "workers": process.cores if data.workers is None else data.workers,
    }
    clips = clip_settings(data, "train")
    frames = 1 if teacher is None else teacher.preprocessing["num_frames"] // data.num_frames
    clips["num_frames"] *= frames
    clips["stride"] = data.stride and data.stride / frames
    return Data(
        ClipLoader(train, **clips, step_entries=step_entries, **shared),
        ClipLoader(val, **clip_settings(data, "validate"), **shared),
        classes,
    )
