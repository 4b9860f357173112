"""The values that each setting may have."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from dali_pipelines.engines import DECODES
from dali_pipelines.errors import InputError
from dali_pipelines.sampling import STRATEGIES
from model.attention_types import ATTENTION_TYPES


class Rule(NamedTuple):
    """Which values of a key are allowed."""

    is_good: Callable[[Any], bool]
    expected: str
    """The allowed values, in words."""


def _one_of(*allowed: str) -> Rule:
    return Rule(lambda value: value in allowed, f"{'one of ' if len(allowed) > 1 else ''}{', '.join(allowed)}")


def _optional(rule: Rule) -> Rule:
    return Rule(lambda value: value is None or rule.is_good(value), f"{rule.expected}, or null")


def _up_to(most: int) -> Rule:
    return Rule(lambda value: 1 <= value <= most, f"1 or more, at most {most}")


_COUNT = Rule(lambda value: value >= 1, "1 or more")
_POSITIVE = Rule(lambda value: 0 < value < math.inf, "more than 0")
_NOT_NEGATIVE = Rule(lambda value: 0 <= value < math.inf, "0 or more")
_SHARE = Rule(lambda value: 0 <= value < 1, "0 or more, less than 1")
_FRACTION = Rule(lambda value: 0 <= value <= 1, "0 to 1")

RULES = {
    "seed": Rule(lambda value: 0 <= value < 2**64, "0 or more, less than 2**64"),
    "model.patch_size": _up_to(1024),
    "model.embed_dim": _up_to(65_536),
    "model.depth": _up_to(1000),
    "model.num_heads": _up_to(1024),
    "model.attention": _one_of(*ATTENTION_TYPES),
    "model.drop_path": _SHARE,
    "model.embed_init_std": _NOT_NEGATIVE,
    "data.num_frames": _up_to(4096),
    "data.crop_size": _up_to(8192),
    "data.short_side": Rule(
        lambda value: value is None or (len(value) == 2 and all(1 <= side <= 65_536 for side in value)),
        "[low, high], or null",
    ),
    "data.stride": _optional(Rule(lambda value: 0 < value <= 1e6, "more than 0, at most 1e6")),
    "data.target_fps": Rule(lambda value: 1e-3 <= value <= 1e6, "0.001 to 1e6"),
    "data.past_end": _one_of(*STRATEGIES),
    "data.mean": Rule(
        lambda value: len(value) == 3 and all(-1 <= v <= 1 for v in value),
        "three numbers, for pixels from 0 to 1: 127.5 of 255 is 0.5",
    ),
    "data.std": Rule(
        lambda value: len(value) == 3 and all(0 < v <= 10 for v in value),
        "three numbers above 0, for pixels from 0 to 1: 127.5 of 255 is 0.5",
    ),
    "data.batch_size": _optional(_COUNT),
    "data.workers": _optional(_NOT_NEGATIVE),
    "data.decode": _one_of(*DECODES),
    "data.host_share": _optional(_FRACTION),
    "data.decode_threads": _optional(_COUNT),
    "data.views_per_decode": _COUNT,
    "data.timeout_s": _POSITIVE,
    "data.max_pixels": _COUNT,
    "data.max_fault_fraction": _FRACTION,
    "optim.name": _one_of("sgd", "adamw", "lamb"),
    "optim.implementation": _one_of("auto", "apex", "fused", "foreach"),
    "optim.lr": _POSITIVE,
    "optim.warmup_start_lr": _NOT_NEGATIVE,
    "optim.warmup_epochs": _NOT_NEGATIVE,
    "optim.final_lr": _NOT_NEGATIVE,
    "optim.decay_epochs": Rule(lambda value: value == sorted(value) and min(value, default=1) > 0, "rising, above 0"),
    "optim.momentum": _SHARE,
    "optim.betas": Rule(
        lambda value: len(value) == 2 and all(0 <= v < 1 for v in value),
        "two numbers, 0 or more, below 1",
    ),
    "optim.weight_decay": _NOT_NEGATIVE,
    "optim.layer_decay": Rule(lambda value: 0 < value <= 1, "more than 0, at most 1"),
    "optim.head_lr_factor": _POSITIVE,
    "optim.clip_norm": _optional(_POSITIVE),
    "optim.global_batch_size": _COUNT,
    "augment.randaugment_ops": _NOT_NEGATIVE,
    "augment.randaugment_magnitude": Rule(lambda value: 0 <= value <= 10, "0 to 10"),
    "augment.erasing_prob": _FRACTION,
    "mix.cutmix_prob": _FRACTION,
    "mix.cutmix_alpha": _POSITIVE,
    "mix.mixup_alpha": _NOT_NEGATIVE,
    "mix.cutmix_box": _one_of("space", "reference"),
    "distill.temperature": _POSITIVE,
    "distill.weight": _FRACTION,
    "train.epochs": _COUNT,
    "train.max_steps": _optional(_COUNT),
    "train.precision": _one_of("auto", "amp", "float32", "bf16", "fp16"),
    "train.label_smoothing": _SHARE,
    "train.freeze_blocks": _NOT_NEGATIVE,
    "train.ema_decay": _optional(_SHARE),
    "train.swa_epochs": _NOT_NEGATIVE,
    "train.compile": Rule(lambda value: str(value).lower() in ("auto", "true", "false"), "auto, true or false"),
    "train.checkpoint_every_steps": _optional(_COUNT),
    "train.log_every_steps": _COUNT,
    "train.loggers": Rule(
        lambda value: set(value) <= {"tensorboard", "wandb", "mlflow"}, "a list of tensorboard, wandb, mlflow"
    ),
    "train.validate_every": _COUNT,
    "train.best_metric": _one_of("top1", "mean_class_accuracy", "macro_f1", "loss"),
    "train.early_stopping": _optional(_COUNT),
    "train.on_nan": _one_of("stop", "rollback"),
    "train.hang_timeout_s": _POSITIVE,
}
"""Section and key, such as data.stride -> the rule for its values, beyond their type."""


def check_value(key: str, value: Any) -> None:
    """Raises `InputError` if `key` may not have this value, which has the right type."""
    if key in RULES and not RULES[key].is_good(value):
        raise InputError(f"{key} is {value}; expected {RULES[key].expected}")
