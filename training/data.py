"""The data of a run: manifests, classes and loaders, and how a global batch is split."""

import hashlib
import math
from typing import NamedTuple

import numpy as np

from common.agreement import check_agreement, shared_facts, weights_checksum
from common.config import Config, clip_settings
from common.distributed import DistributedContext
from common.labels import check_labels, class_names, read_manifest
from common.precision import resolve_precision
from common.weights import Weights, load_weights
from dali_pipelines import ClipLoader, InputError, Manifest

_MIN_STEPS = 4  # an epoch, in the proposal for a small data set


class BatchPlan(NamedTuple):
    """global batch = ranks x batch_size x micro_steps."""

    batch_size: int
    """Clips per micro-batch of a process."""
    micro_steps: int
    """Micro-batches of a process per optimizer step."""


def split_global_batch(config: Config, world_size: int, num_clips: int) -> BatchPlan:
    """Split a global batch over `world_size` processes, in epochs of `num_clips` clips.

    Raises `InputError` with the closest valid combinations.
    """
    total, batch_size, views = config.optim.global_batch_size, config.data.batch_size, config.data.views_per_decode
    if batch_size is not None and batch_size % views:
        raise InputError(
            f"data.batch_size is {batch_size}; expected a multiple of data.views_per_decode, {views}: "
            f"{_nearest(batch_size, views)}"
        )
    unit = world_size * (batch_size or views)
    fitting = [size for size in range(views, total // world_size + 1, views) if total % (world_size * size) == 0]
    sizes = sorted(fitting, key=lambda size: abs(size - (batch_size or size)))[:2]
    problem = f"optim.global_batch_size is {total}"
    if total > num_clips:
        problem += f", but an epoch has {num_clips} clips, fewer than one step takes"
    elif total % unit:
        of = f"batches of {batch_size}" if batch_size else f"a multiple of {views}" if views > 1 else "a whole number"
        problem += f", which {world_size} processes cannot share evenly, {of} each"
    else:
        share = total // world_size
        return BatchPlan(batch_size or share, share // (batch_size or share))
    remedies = []
    if total > num_clips and unit <= num_clips:
        size = unit
        while 2 * size * _MIN_STEPS <= num_clips:
            size *= 2
        steps = f"{num_clips // size} steps" if num_clips // size > 1 else "1 step"
        remedies.append(f"try -o optim.global_batch_size={size} ({steps} an epoch)")
    if nearest := _nearest(min(total, num_clips), unit, most=num_clips):
        remedies.append(f"the nearest that work: {nearest}")
    if sizes and batch_size and total <= num_clips:
        remedies.append(f"or data.batch_size {', '.join(map(str, sorted(sizes)))}")
    raise InputError("; ".join([problem, *remedies]))


def _nearest(number: int, unit: int, *, most: float = math.inf) -> str:
    """The multiples of `unit` closest to `number`, up to `most`."""
    below = number // unit * unit
    return ", ".join(str(value) for value in (below, below + unit) if 0 < value <= most)


def read_teacher(config: Config) -> Weights | None:
    """The weights of `distill.teacher`; None without one. Raises `InputError` if its clips differ from the run's."""
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


def balanced(manifest: Manifest) -> Manifest:
    """The manifest with the videos of rarer classes repeated: a class with a fifth of the rows of the most frequent one
    has each of its rows five times. Each of them is a clip of its own, with other random draws."""
    counts = np.bincount(manifest.labels)
    times = np.rint(counts.max() / np.maximum(counts, 1)).astype(np.int64)
    repeated = [video for video in manifest for _ in range(times[video.label])]
    result = Manifest(repeated, root=manifest.root, classes=manifest.classes)
    result.index, result.made_by = manifest.index, manifest.made_by
    return result


class Data(NamedTuple):
    """The loaders of a run."""

    train: ClipLoader
    val: ClipLoader
    classes: tuple[str, ...]
    plan: BatchPlan
    repeated: int
    """Rows that `data.balance_classes` has added to the training manifest."""


def make_data(config: Config, process: DistributedContext, teacher: Weights | None) -> Data:
    """The loaders for training and validation. Raises `InputError` if manifests, classes and settings do not fit, or
    differ between processes.

    With a teacher, training clips have as many frames as the teacher takes, within the same time window.
    """
    data = config.data
    train, val = (read_manifest(getattr(data, name), key=f"data.{name}") for name in ("train", "val"))
    train_name, val_name = str(data.train), str(data.val)
    classes = class_names(data.labels, train)
    if process.world_size > 1:
        names = hashlib.sha256("\0".join(classes).encode(errors="surrogateescape")).hexdigest()
        facts = {
            "the checksum of the classes": names[:12],
            "data.train": train.summary(),
            "data.val": val.summary(),
            "train.precision": resolve_precision(config.train.precision, process.device),
            "distill.teacher": teacher and weights_checksum(teacher.state)[:12],
        }
        check_agreement(process, shared_facts(config) | facts)
    renamed = data.labels is not None
    check_labels(train, classes, name=train_name, of=data.labels or train_name, renamed=renamed)
    check_labels(val, classes, name=val_name, of=data.labels or train_name, renamed=renamed)
    if renamed and train.classes:  # the file may have other names than the two manifests
        check_labels(val, train.classes, name=val_name, of=train_name, renamed=True)
    num_videos = len(train)
    if data.balance_classes:
        train = balanced(train)
    plan = split_global_batch(config, process.world_size, len(train) * data.views_per_decode)
    if teacher is not None and teacher.classes != classes:
        raise InputError(
            f"distill.teacher {config.distill.teacher} knows {len(teacher.classes)} classes "
            f"({teacher.classes[0]}, ...); expected the {len(classes)} here ({classes[0]}, ...)"
        )
    shared = {
        "batch_size": plan.batch_size,
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
        ClipLoader(train, **clips, step_entries=config.optim.global_batch_size, **shared),
        ClipLoader(val, **clip_settings(data, "validate"), **shared),
        classes,
        plan,
        len(train) - num_videos,
    )
