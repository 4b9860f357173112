"""Loads weights from PaddleVideo, timm, facebookresearch/TimeSformer, Hugging Face, mmaction2 and train.py.

Every tensor of the file and the network is reported as loaded, adapted, not loaded or left out, with the reason;
anything unexplained raises `WeightsError`, and leaves the network unchanged.
"""

import collections
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from model.pretrained_files import (
    AVERAGED_COUNT,
    WRAPPER,
    WeightsError,
    WeightsFile,
    network_prefixes,
    read_weights_file,
)
from model.timesformer import TimeSformer


@dataclass
class LoadReport:
    """The result of `load_pretrained`; `str()` of it is a few lines to print."""

    source: str
    origin: str
    """The software that wrote the file, such as "Hugging Face"."""
    loaded: list[str] = field(default_factory=list)
    """Parameters loaded unchanged."""
    adapted: dict[str, str] = field(default_factory=dict)
    """Parameter -> how it was derived from the file."""
    initial: dict[str, str] = field(default_factory=dict)
    """Parameter that was not loaded -> why."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Tensor of the file that the network does not have -> why."""
    preprocessing: Mapping[str, list[float]] = field(default_factory=dict)
    """mean and std of the clips that the weights were trained on, for values 0 to 1, if the file has them."""

    def __str__(self) -> str:
        lines = [f"{self.source} ({self.origin}): {len(self.loaded)} tensors loaded unchanged"]
        for verb, entries in (("adapted", self.adapted), ("not loaded", self.initial), ("left out", self.left_out)):
            by_reason: dict[str, dict[str, None]] = {}  # ordered, without duplicates: blocks.*.x means all blocks
            for name, reason in entries.items():
                by_reason.setdefault(reason, {})[re.sub(r"\.\d+\.", ".*.", name)] = None
            lines += [f"  {verb}: {', '.join(names)}: {reason}" for reason, names in by_reason.items()]
        return "\n".join(lines)


def load_pretrained(
    model: TimeSformer, source: str | os.PathLike[str], *, classes: Sequence[str] | None = None
) -> LoadReport:
    """Loads a file, a folder of Hugging Face's `save_pretrained`, or a repository on the Hugging Face Hub into `model`.

    source: a file (.pdparams, .safetensors; .pth, .pyth, .pt, .bin by `torch.load(weights_only=True)`), a folder, or a
        name such as "timm/vit_base_patch16_224_miil.in21k" or "facebook/timesformer-base-finetuned-k400".
    classes: names of the model's classes. The head of a file with other names is not loaded, even if it has as many.

    These differences are adapted: another number of frames or patches (embeddings are resized), another number of
    classes, and weights without attention over time, such as those of an image ViT. Attention over time then starts as
    a copy of the attention over space followed by a zero `temporal_fc`, so that at first the network applies the image
    network to each frame (PaddleVideo save_load.py, pretrain_vit_param_trans; vit_tweaks.py, init_weights). Raises
    `WeightsError` for any other difference.
    """
    file = read_weights_file(os.fspath(source))
    origin, tensors, is_image = _our_names(file)
    report = LoadReport(os.fspath(source), origin, preprocessing=file.preprocessing)
    expected = model.state_dict()
    if file.num_heads not in (None, model.num_heads):
        raise WeightsError(
            f"{file.path}: has {file.num_heads} attention heads, the network {model.num_heads}; set model.num_heads"
        )
    if tensors.pop(AVERAGED_COUNT, None) is not None:
        report.left_out[AVERAGED_COUNT] = "counts the networks that were averaged"
    if is_image:
        for name in [name for name in tensors if name.startswith("pre_logits.")]:
            report.left_out[name] = "part of the image classifier"
            del tensors[name]
    _adapt_head(report, tensors, expected, file.classes, classes, is_image)
    _resize_embeddings(report, tensors, expected)
    _initialise_time(report, tensors, expected)
    _check_complete(report, tensors, expected)
    report.loaded = [name for name in tensors if name not in report.adapted]
    model.load_state_dict(expected | tensors)
    return report


# -- from the names in the file to ours --

_HUGGING_FACE_NAMES = {
    "timesformer.": "",
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.time_embeddings": "time_embed",
    "embeddings.patch_embeddings.projection.": "patch_embed.proj.",
    "encoder.layer.": "blocks.",
    "temporal_attention.attention.": "temporal_attn.",
    "temporal_attention.output.dense.": "temporal_attn.proj.",
    "temporal_layernorm.": "temporal_norm1.",
    "temporal_dense.": "temporal_fc.",
    "attention.attention.": "attn.",
    "attention.output.dense.": "attn.proj.",
    "layernorm_before.": "norm1.",
    "layernorm_after.": "norm2.",
    "layernorm.": "norm.",
    "intermediate.dense.": "mlp.fc1.",
    "output.dense.": "mlp.fc2.",
    "classifier.": "head.",
}
"""Parts of names in transformers' TimeSformer -> ours, to replace in this order."""


def _our_names(file: WeightsFile) -> tuple[str, dict[str, Tensor], bool]:
    """(software that wrote the file, tensors by our names, whether they are from an image classifier)."""
    tensors, prefix = _unwrapped(file)
    is_image = False
    rename: Callable[[str], str]
    if any("encoder.layer." in name for name in tensors):
        origin, rename = "Hugging Face", from_hugging_face
    elif any("transformer_layers.layers." in name for name in tensors):
        is_image = not any(name.startswith("cls_head.") for name in tensors)
        origin, rename = "an image ViT of mmaction2" if is_image else "mmaction2", from_mmaction
        if not any("attentions.1." in name for name in tensors):
            tensors = {name.replace(".attentions.0.", ".attentions.1."): value for name, value in tensors.items()}
    elif prefix.endswith("backbone."):
        origin, rename = "PaddleVideo", lambda name: re.sub(r"^head\.fc\.", "head.", name)
    else:
        is_image = not file.is_ours and not any("time_embed" in name or "temporal" in name for name in tensors)
        origin, rename = "train.py" if file.is_ours else "an image ViT" if is_image else "a TimeSformer", str
        if prefix.endswith("model."):
            origin, is_image = "facebookresearch/TimeSformer", False
    tensors = _renamed(file.path, tensors, rename)
    if "blocks.0.attn.qkv.weight" not in tensors:
        some = ", ".join(sorted(file.tensors)[:3])[:200] or "nothing"
        raise WeightsError(f"{file.path}: not weights of a known vision transformer; it contains {some}, ...")
    return origin, tensors, is_image


_MMACTION_NAMES = {
    "transformer_layers.layers.": "blocks.",
    "patch_embed.projection.": "patch_embed.proj.",
    "attentions.0.norm.": "temporal_norm1.",
    "attentions.0.temporal_fc.": "temporal_fc.",
    "attentions.0.attn.": "temporal_attn.",
    "attentions.1.norm.": "norm1.",
    "attentions.1.attn.": "attn.",
    "ffns.0.norm.": "norm2.",
    "norms.0.": "norm1.",
    "norms.1.": "norm2.",
    "attn.in_proj_": "attn.qkv.",
    "attn.out_proj.": "attn.proj.",
    "ffns.0.layers.0.0.": "mlp.fc1.",
    "ffns.0.layers.1.": "mlp.fc2.",
    "cls_head.fc_cls.": "head.",
}
"""Parts of names in mmaction2's TimeSformer (mmaction/models/backbones/timesformer.py) -> ours, to replace in this
order. Its first attention is the one over time only if there are two."""


def _unwrapped(file: WeightsFile) -> tuple[dict[str, Tensor], str]:
    """(tensors without the network's prefix, that prefix); the head may be outside the network."""
    tensors = _renamed(file.path, file.tensors, lambda name: WRAPPER.sub("", name))
    prefixes = network_prefixes(tensors)
    if len(prefixes) > 1:
        raise WeightsError(
            f"{file.path}: contains several networks, whose names begin with {', '.join(map(repr, prefixes))}; keep one"
        )
    prefix = prefixes[0] if prefixes else ""

    def shorten(name: str) -> str:
        parts, outer = name.split("."), prefix.split(".")[:-1]
        same = 0
        while same < len(outer) and parts[same : same + 1] == outer[same : same + 1]:
            same += 1
        return ".".join(parts[same:])

    return _renamed(file.path, tensors, shorten), prefix


def _renamed(path: str, tensors: dict[str, Tensor], rename: Callable[[str], str]) -> dict[str, Tensor]:
    renamed = {rename(name): value for name, value in tensors.items()}
    if len(renamed) < len(tensors):
        first = next(name for name, count in collections.Counter(map(rename, tensors)).items() if count > 1)
        raise WeightsError(f"{path}: contains several tensors for {first}")
    return renamed


def from_hugging_face(name: str) -> str:
    """timesformer.encoder.layer.3.attention.attention.qkv.weight -> blocks.3.attn.qkv.weight"""
    for their_part, our_part in _HUGGING_FACE_NAMES.items():
        name = name.replace(their_part, our_part)
    return name


def from_mmaction(name: str) -> str:
    """transformer_layers.layers.3.attentions.1.attn.in_proj_weight -> blocks.3.attn.qkv.weight"""
    for their_part, our_part in _MMACTION_NAMES.items():
        name = name.replace(their_part, our_part)
    return name


def to_hugging_face(name: str) -> str:
    """blocks.3.attn.qkv.weight -> timesformer.encoder.layer.3.attention.attention.qkv.weight"""
    for their_part, our_part in reversed(_HUGGING_FACE_NAMES.items()):
        if our_part:  # only whole parts of the name: norm1. is also the end of temporal_norm1.
            name = re.sub(rf"(?<!\w){re.escape(our_part)}", their_part, name)
    return name if name.startswith("classifier.") else f"timesformer.{name}"


# -- differences that are adapted --


def _adapt_head(
    report: LoadReport,
    tensors: dict[str, Tensor],
    expected: dict[str, Tensor],
    their_classes: Sequence[str] | None,
    classes: Sequence[str] | None,
    is_image: bool,
) -> None:
    head = [name for name in expected if name.startswith("head.")]
    if not any(name.startswith("head.") for name in tensors):
        for name in head:
            report.initial[name] = "a new head: the file has none"
        return
    number = len(tensors["head.weight"]) if "head.weight" in tensors and tensors["head.weight"].ndim == 2 else 0
    if not number:
        return  # half a head: `_check_complete` reports it
    if is_image:
        reason = f"the file's {number} classes are image classes"
    elif number != len(expected["head.weight"]):
        reason = f"{number} classes in the file, {len(expected['head.weight'])} here"
    elif classes is not None and their_classes is not None and not _same_names(classes, their_classes):
        reason = f"the file's {number} classes have other names"
    else:
        return
    for name in head:
        report.initial[name] = f"a new head: {reason}"
        tensors.pop(name, None)


def _same_names(one: Sequence[str], other: Sequence[str]) -> bool:
    """Whether names are equal except for spelling: "playing_guitar" equals "Playing guitar"."""
    plain = [[re.sub(r"[\W_]+", "", name).casefold() for name in names] for names in (one, other)]
    return plain[0] == plain[1]


def _resize_embeddings(report: LoadReport, tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Resizes the position embedding by bilinear interpolation with aligned corners, and the time embedding by nearest
    neighbour, as all origins do. (For positions, PaddleVideo uses scipy.ndimage.zoom of order 1, which for some sizes
    writes zeros into the last row and column; this does not.)"""
    pos, target = tensors.get("pos_embed"), expected["pos_embed"]
    if pos is not None and _may_resize(pos, target):
        side, new_side = (math.isqrt(value.shape[1] - 1) for value in (pos, target))
        if side and side**2 + 1 == pos.shape[1]:
            grid = torch.unflatten(pos[:, 1:].double().transpose(1, 2), 2, (side, side))
            grid = interpolate(grid, (new_side, new_side), mode="bilinear", align_corners=True)
            tensors["pos_embed"] = torch.cat([pos[:, :1], grid.flatten(2).transpose(1, 2).to(pos.dtype)], 1)
            report.adapted["pos_embed"] = f"resized from {side} x {side} to {new_side} x {new_side} patches"
    time, time_target = tensors.get("time_embed"), expected.get("time_embed")
    if time is not None and time_target is not None and _may_resize(time, time_target):
        tensors["time_embed"] = interpolate(time.float().transpose(1, 2), time_target.shape[1]).transpose(1, 2)
        report.adapted["time_embed"] = f"resized from {time.shape[1]} to {time_target.shape[1]} frames, to the nearest"


def _may_resize(value: Tensor, target: Tensor) -> bool:
    """Whether two embeddings differ only in their length."""
    are_alike = value.ndim == 3 and value.shape[::2] == target.shape[::2] and min(value.numel(), target.numel()) > 0
    return are_alike and value.shape[1] != target.shape[1]


def _initialise_time(report: LoadReport, tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Initialises attention over time for weights without it, so that at first it has no effect."""
    if any("temporal" in name for name in tensors):
        return
    for name, value in expected.items():
        if "temporal_fc" in name and name.replace("temporal_fc", "attn.proj") in tensors:
            tensors[name] = torch.zeros_like(value)
            report.adapted[name] = "zero: at first, other frames have no influence"
        elif "temporal" in name and (spatial := name.replace("temporal_", "")) in tensors:
            tensors[name] = tensors[spatial].clone()
            report.adapted[name] = "copied from the attention over space and its norm"
    if "time_embed" in expected and "time_embed" not in tensors:
        tensors["time_embed"] = torch.zeros_like(expected["time_embed"])
        report.adapted["time_embed"] = "zero: not in the file"


# -- differences that are errors --

_BLOCK = re.compile(r"blocks\.(\d+)\.")


def _check_complete(report: LoadReport, tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Raises `WeightsError`, with hints, unless every tensor of the file and of the network is explained."""
    missing = [name for name in expected if name not in tensors and name not in report.initial]
    unknown = [name for name in tensors if name not in expected]
    problems = [
        f"{what} {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
        for what, names in (("it lacks", missing), ("the network has no", unknown))
        if names
    ]
    problems += [
        f"{name} is {_shape(tensors[name])} there, {_shape(expected[name])} here"
        for name in expected
        if name in tensors and tensors[name].shape != expected[name].shape
    ][:3]
    if not problems:
        return
    has_bias, wants_bias = (any(name.endswith("attn.qkv.bias") for name in names) for names in (tensors, expected))
    hints = []
    if has_bias != wants_bias:
        kind = "a" if has_bias else "no"
        hints.append(f"its queries, keys and values have {kind} bias: set model.qkv_bias={str(has_bias).lower()}")
    if any("temporal" in name for name in unknown) and not any("temporal" in name for name in expected):
        hints.append("it attends over time and space in turn: set model.attention=divided_space_time")
    depth, expected_depth = (
        len({found[1] for found in map(_BLOCK.match, names) if found}) for names in (tensors, expected)
    )
    if depth != expected_depth:
        hints.append(f"it has {depth} blocks, the network {expected_depth}: set model.depth={depth}")
    projection, expected_projection = (each.get("patch_embed.proj.weight") for each in (tensors, expected))
    if projection is not None and expected_projection is not None and projection.ndim == 4:
        for axis, key in ((0, "embed_dim"), (2, "patch_size")):
            theirs, ours = projection.shape[axis], expected_projection.shape[axis]
            if theirs != ours:
                hints.append(f"its {key} is {theirs}, the network's {ours}: set model.{key}={theirs}")
    raise WeightsError(f"{report.source} ({report.origin}) does not fit the network: {'; '.join(problems + hints)}")


def _shape(value: Tensor) -> str:
    return " x ".join(map(str, value.shape))
