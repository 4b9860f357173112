"""The data of a run: its manifests, classes and loaders, and how a step's clips are shared out."""

import hashlib
import math
from typing import NamedTuple

from common.agreement import check_agreement, shared_facts, weights_checksum
from common.config import Config, clip_settings
from common.distributed import DistributedContext
from common.labels import check_labels, class_names, read_manifest
from common.precision import resolve_precision
from common.weights import Weights, load_weights
from dali_pipelines import ClipLoader, InputError


class Sharing(NamedTuple):
    """global batch = ranks x batch_size x micro_steps."""

    batch_size: int
    """Clips a process takes at once."""
    micro_steps: int
    """Batches a process takes for one optimizer step."""


def share_out(config: Config, world_size: int, clips: int) -> Sharing:
    """How `world_size` processes make a global batch, of the `clips` of an epoch. Raises `InputError` with the nearest
    combinations that are possible."""
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
    if total > clips:
        problem += f", but an epoch has {clips} clips, fewer than one step takes"
    elif total % unit:
        of = f"batches of {batch_size}" if batch_size else f"a multiple of {views}" if views > 1 else "a whole number"
        problem += f", which {world_size} processes cannot share evenly, {of} each"
    else:
        share = total // world_size
        return Sharing(batch_size or share, share // (batch_size or share))
    nearest = _nearest(min(total, clips), unit, most=clips)
    remedies = [f"the nearest that they can: {nearest}"] * bool(nearest)
    if sizes and batch_size and total <= clips:
        remedies.append(f"or data.batch_size {', '.join(map(str, sorted(sizes)))}")
    raise InputError("; ".join([problem, *remedies]))


def _nearest(number: int, unit: int, *, most: float = math.inf) -> str:
    """The multiples of `unit` around `number`, up to `most`."""
    below = number // unit * unit
    return ", ".join(str(value) for value in (below, below + unit) if 0 < value <= most)


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
    sharing: Sharing


def make_data(config: Config, process: DistributedContext, teacher: Weights | None) -> Data:
    """The loaders of training and validation; with a teacher, training clips have as many frames as it takes, within
    the window of ours."""
    data = config.data
    train, val = (read_manifest(getattr(data, name), key=f"data.{name}") for name in ("train", "val"))
    classes = class_names(data.labels, train)
    if process.world_size > 1:
        names = hashlib.sha256("\0".join(classes).encode(errors="surrogateescape")).hexdigest()
        facts = {"the checksum of the classes": names[:12], "data.train": train.summary(), "data.val": val.summary()}
        facts["train.precision"] = resolve_precision(config.train.precision, process.device)
        facts["distill.teacher"] = teacher and weights_checksum(teacher.state)[:12]
        check_agreement(process, shared_facts(config) | facts)
    renamed = data.labels is not None
    check_labels(train, classes, name=data.train, of=str(data.labels), renamed=renamed)
    check_labels(val, classes, name=data.val, of=data.labels or data.train, renamed=renamed)
    if renamed and train.classes:  # names of neither may be in the file
        check_labels(val, train.classes, name=data.val, of=data.train, renamed=True)
    sharing = share_out(config, process.world_size, len(train) * data.views_per_decode)
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
        ClipLoader(train, **clips, step_entries=config.optim.global_batch_size, **shared),
        ClipLoader(val, **clip_settings(data, "validate"), **shared),
        classes,
        sharing,
    )
