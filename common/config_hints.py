"""What to type instead of an unknown key: misspelt, another name for a setting, or of PaddleVideo or mmaction2."""

import difflib
import fnmatch
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

_SYNONYMS = {
    "accumulate_grad_batches": "optim.global_batch_size",
    "accumulative_counts": "optim.global_batch_size",
    "amp": "train.precision",
    "attention_type": "model.attention",
    "augment": "augment.randaugment_ops",
    "base_lr": "optim.lr",
    "bf16": "train.precision",
    "batch": "optim.global_batch_size",
    "class_names": "data.labels",
    "clip_len": "data.num_frames",
    "class_weights": "data.balance_classes",
    "early_stop": "train.early_stopping",
    "ema": "train.ema_decay",
    "embed_dims": "model.embed_dim",
    "fp16": "train.precision",
    "fps": "data.target_fps",
    "flip_ratio": "data.flip",
    "frame_interval": "data.stride",
    "frames": "data.num_frames",
    "freeze": "train.freeze_blocks",
    "freeze_backbone": "train.freeze_blocks",
    "grad_clip": "optim.clip_norm",
    "image_size": "data.crop_size",
    "img_size": "data.crop_size",
    "learning_rate": "optim.lr",
    "load_from": "train.pretrained",
    "log_interval": "train.log_every_steps",
    "logger": "train.loggers",
    "max_epochs": "train.epochs",
    "max_norm": "optim.clip_norm",
    "milestones": "optim.decay_epochs",
    "mixup": "mix.mixup_alpha",
    "cutmix": "mix.cutmix_prob",
    "mixed_precision": "train.precision",
    "model_name": "name",
    "mlflow": "train.loggers",
    "num_epochs": "train.epochs",
    "num_segments": "data.num_frames",
    "num_workers": "data.workers",
    "optimizer": "optim.name",
    "output_dir": "output",
    "oversample": "data.balance_classes",
    "patience": "train.early_stopping",
    "randaugment": "augment.randaugment_ops",
    "random_erasing": "augment.erasing_prob",
    "resize": "data.short_side",
    "save_every": "train.checkpoint_every_steps",
    "sampling_rate": "data.stride",
    "scale": "data.short_side",
    "scale_range": "data.short_side",
    "size": "data.crop_size",
    "swa": "train.swa_epochs",
    "teacher": "distill.teacher",
    "tensorboard": "train.loggers",
    "total_epochs": "train.epochs",
    "val_interval": "train.validate_every",
    "videos_per_gpu": "data.batch_size",
    "wandb": "train.loggers",
    "warmup": "optim.warmup_epochs",
    "weights": "train.pretrained",
    "work_dir": "output",
    "workers_per_gpu": "data.workers",
}
"""Other names -> key."""

_LISTS = "data.train, data.val and data.test name manifests, made of lists by prepare.py index --list FILE --root DIR"
_CHECKPOINTS = "a checkpoint is saved after every epoch; train.checkpoint_every_steps adds more"
_NESTEROV = "optim.name=sgd is always Nesterov"
_SCHEDULE = "a cosine, or a tenth of the rate after each of optim.decay_epochs"
_ELSEWHERE = {
    "ann_file*": _LISTS,
    "average_clips": "evaluate.py --average prob|score",
    "auto_scale_lr": "optim.lr is for optim.global_batch_size, on any number of GPUs",
    "checkpoint": _CHECKPOINTS,
    "data_prefix": _LISTS,
    "data_root*": _LISTS,
    "gamma": _SCHEDULE,
    "interval": "train.log_every_steps, train.validate_every and train.checkpoint_every_steps",
    "nesterov": _NESTEROV,
    "num_classes": "it follows from the class names: data.labels, or those of the manifest",
    "num_clips": "evaluate.py --windows N",
    "resume*": "train.py --resume, from the newest checkpoint",
    "save_interval": _CHECKPOINTS,
}
"""fnmatch patterns of names that correspond to no single key here -> what there is instead."""

_PADDLE_SECTIONS = (
    "MODEL",
    "DATASET",
    "PIPELINE",
    "OPTIMIZER",
    "GRADIENT_ACCUMULATION",
    "MIX",
    "METRIC",
    "INFERENCE",
)

_PADDLE_KEYS = {
    "MODEL.backbone.pretrained": "train.pretrained",
    "MODEL.backbone.img_size": "data.crop_size",
    "MODEL.backbone.patch_size": "model.patch_size",
    "MODEL.backbone.embed_dim": "model.embed_dim",
    "MODEL.backbone.depth": "model.depth",
    "MODEL.backbone.num_heads": "model.num_heads",
    "MODEL.backbone.qkv_bias": "model.qkv_bias",
    "MODEL.backbone.drop_path_rate": "model.drop_path",
    "MODEL.backbone.num_seg": "data.num_frames",
    "MODEL.backbone.attention_type": "model.attention",
    "MODEL.head.ls_eps": "train.label_smoothing",
    "MODEL.runtime_cfg.test.num_seg": "data.num_frames",
    "DATASET.batch_size": "data.batch_size",
    "DATASET.num_workers": "data.workers",
    "DATASET.train.file_path": "data.train",
    "DATASET.valid.file_path": "data.val",
    "DATASET.test.file_path": "data.test",
    "PIPELINE.*.decode.num_seg": "data.num_frames",
    "PIPELINE.*.sample.num_seg": "data.num_frames",
    "PIPELINE.*.transform.*Normalization.mean": "data.mean",
    "PIPELINE.*.transform.*Normalization.std": "data.std",
    "PIPELINE.*.transform.*Crop.target_size": "data.crop_size",
    "OPTIMIZER.name": "optim.name",
    "OPTIMIZER.momentum": "optim.momentum",
    "OPTIMIZER.learning_rate.max_epoch": "train.epochs",
    "OPTIMIZER.learning_rate.warmup_epochs": "optim.warmup_epochs",
    "OPTIMIZER.learning_rate.warmup_start_lr": "optim.warmup_start_lr",
    "OPTIMIZER.learning_rate.cosine_base_lr": "optim.lr",
    "OPTIMIZER.learning_rate.learning_rate": "optim.lr",
    "OPTIMIZER.learning_rate.milestones": "optim.decay_epochs",
    "OPTIMIZER.weight_decay.value": "optim.weight_decay",
    "OPTIMIZER.grad_clip.value": "optim.clip_norm",
    "GRADIENT_ACCUMULATION.global_batch_size": "optim.global_batch_size",
    "MIX.cutmix_prob": "mix.cutmix_prob",
    "MIX.cutmix_alpha": "mix.cutmix_alpha",
    "MIX.mixup_alpha": "mix.mixup_alpha",
    "INFERENCE.num_seg": "data.num_frames",
    "INFERENCE.target_size": "data.crop_size",
    "INFERENCE.mean": "data.mean",
    "INFERENCE.std": "data.std",
    "model_name": "name",
    "output_dir": "output",
    "epochs": "train.epochs",
    "log_interval": "train.log_every_steps",
    "val_interval": "train.validate_every",
}
"""Keys of PaddleVideo configs/recognition/{pptimesformer,timesformer}/*.yaml, with fnmatch patterns -> our keys. An
index may precede the name of a transform: `transform.0.Normalization.mean`."""

_PADDLE_ELSEWHERE = {
    "MODEL.head.num_classes": "the number of classes follows from the class names (data.labels)",
    "MODEL.runtime_cfg.test.avg_type": "evaluate.py --average prob|score",
    "MODEL.framework": "the only network is TimeSformer",
    "MODEL.*.name": "the only network is TimeSformer",
    "MODEL.*": "fixed at PaddleVideo's value",  # mlp_ratio, epsilon, in_channels, std
    "DATASET.test_batch_size": "the batch of a test never changes its result; data.batch_size sets it",
    "DATASET.*.data_prefix": "prepare.py index --root",
    "DATASET.*.format": "prepare.py index --list for videos, prepare.py frames --list for frame folders",
    "DATASET.*.suffix": "prepare.py index and prepare.py frames find it",
    "PIPELINE.*.transform.*JitterScale.*": "data.short_side=[low,high]",
    "PIPELINE.*.transform.*RandomFlip*": "data.flip",
    "PIPELINE.*.decode.backend": "data.decode",
    "PIPELINE.*.sample.*": "always linspace over a window, whose length data.stride sets; null: the whole video",
    "OPTIMIZER.learning_rate.*": _SCHEDULE,
    "OPTIMIZER.use_nesterov": _NESTEROV,
    "METRIC.*": "train.py and evaluate.py always compute it",
    "INFERENCE.*": "exported files contain it",
}
"""The same for keys that correspond to no single key here -> where the setting is."""

_PADDLE_OPTIMIZERS = {"Momentum": "sgd", "AdamW": "adamw", "Adam": "adamw", "Lamb": "lamb"}


def hint_for(section: str, key: str, value: Any, known: Sequence[str]) -> str:
    """What to set instead of the unknown `key`, for the end of an error message.

    section: the part of the key that is known, such as "optim.", or "". value: a value, or the dict of a section.
    known: all keys there are, such as "optim.lr".
    """
    if not section and key in _PADDLE_SECTIONS:
        return f", {_paddle_hint({key: value})}"
    if key in known:
        parent, _, leaf = key.rpartition(".")
        return f"; in a file, write it as {parent}: {{{leaf}: {value}}}"
    leaves = [each for each, _ in _leaves({key: value})]
    for name in reversed(leaves[0].split(".")) if len(leaves) == 1 else [key]:  # many: a section of something else
        if where := _matching(_ELSEWHERE, name):
            return f"; here: {where}"
        if near := nearest(section, name, known):
            return f"; did you mean {near}?"
    inside = [each for each in known if each.startswith(section)]
    names = inside if section else dict.fromkeys(each.partition(".")[0] for each in inside)
    return f"; known: {', '.join(names)}"


def is_paddle_config(content: Mapping[Any, Any]) -> bool:
    """Whether a YAML file has the sections of PaddleVideo."""
    return any(section in content for section in _PADDLE_SECTIONS)


def about_paddle_config(content: Mapping[Any, Any]) -> str:
    """What to type instead of `-c` with a config of PaddleVideo."""
    values = dict(_leaves(content))
    backbone = str(values.get("MODEL.backbone.name") or values.get("MODEL.framework") or "VisionTransformer_tweaks")
    if not backbone.startswith("VisionTransformer"):
        return f"a config of PaddleVideo for {backbone}; the only network here is TimeSformer"
    ours = "timesformer_k400.yaml" if backbone == "VisionTransformer" else "pptimesformer_k400.yaml"
    labels = "" if values.get("MODEL.head.num_classes", 400) == 400 else " data.labels=null"  # those of the manifest
    average = values.get("MODEL.runtime_cfg.test.avg_type", "prob")
    return (
        f"a config of PaddleVideo. Take -c {ours}; this file's settings here are: -o {_settings(content)}{labels} "
        f"(docs/migrate.md; prepare.py index makes manifests of lists; it tests with evaluate.py --average {average})"
    )


def _settings(content: Mapping[Any, Any]) -> str:
    """Our settings for a config of PaddleVideo, as they would follow `-o`."""
    return " ".join(f"{key}={value}" for key, value in _translated(content).items())


def _paddle_hint(content: Mapping[Any, Any]) -> str:
    if settings := _settings(content):
        return f"a section of PaddleVideo; here it is {settings} (docs/migrate.md)"
    for key, _ in _leaves(content):
        if where := _matching(_PADDLE_ELSEWHERE, key):
            return f"a section of PaddleVideo; here: {where} (docs/migrate.md)"
    return "a section of PaddleVideo; docs/migrate.md says what is different here"


def _translated(content: Mapping[Any, Any]) -> dict[str, str]:
    """Our keys and values; the first value of a key wins, as PaddleVideo's training comes before its test."""
    settings: dict[str, str] = {}
    sides: dict[str, Any] = {}
    for key, value in _leaves(content):
        if (ours := _matching(_PADDLE_KEYS, key)) and value not in (None, ""):
            is_optimizer = ours == "optim.name"
            settings.setdefault(ours, _typed(_PADDLE_OPTIMIZERS.get(value, value) if is_optimizer else value))
        if fnmatch.fnmatchcase(key, "PIPELINE.train.transform.JitterScale.*_size"):
            sides[key.rpartition(".")[2]] = value
    if len(sides) == 2:
        settings["data.short_side"] = _typed([sides["min_size"], sides["max_size"]])
    return settings


def _matching(patterns: Mapping[str, str], name: str) -> str | None:
    """The value of the first fnmatch pattern that fits."""
    return next((value for pattern, value in patterns.items() if fnmatch.fnmatchcase(name, pattern)), None)


def _typed(value: Any) -> str:
    """A value as it would be typed after `-o KEY=`."""
    if isinstance(value, str):
        return shlex.quote(value)
    return str(value).lower() if isinstance(value, bool) else str(value).replace(" ", "")


def _leaves(content: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of a nested dict by their dotted keys; a list of sections counts as one section."""
    if isinstance(content, list) and any(isinstance(each, dict) for each in content):
        for each in content:
            yield from _leaves(each, prefix)
    elif isinstance(content, dict) and content:
        for key, value in content.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, content


def nearest(section: str, leaf: str, known: Iterable[str]) -> str | None:
    """The key that is meant by the name `leaf`, or None if none is near."""
    known = list(known)
    inside = [each for each in known if each.startswith(section)]
    for candidates in (inside, known):
        if found := [each for each in candidates if each.rpartition(".")[2] == leaf]:
            return found[0]
    if (ours := _SYNONYMS.get(leaf.lower())) in known:
        return ours
    for candidates in (inside, known):
        close = difflib.get_close_matches(leaf, [each.rpartition(".")[2] for each in candidates], n=1, cutoff=0.8)
        if close:
            return next(each for each in candidates if each.rpartition(".")[2] == close[0])
    close = difflib.get_close_matches(leaf.lower(), _SYNONYMS, n=1, cutoff=0.85)
    return _SYNONYMS[close[0]] if close and _SYNONYMS[close[0]] in known else None
