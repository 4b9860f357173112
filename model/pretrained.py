"""Weights in: files of PaddleVideo, timm, facebookresearch/TimeSformer, Hugging Face and our own, into a `TimeSformer`.

Every tensor of the file and of the network is accounted for: loaded, adapted, left at its initialisation or left out,
each with its reason; anything else is a `WeightsError` and leaves the network as it was. Nothing in a file is executed.
"""

import argparse
import collections
import json
import math
import os
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from model.pdparams import read_pdparams
from model.timesformer import TimeSformer


class WeightsError(ValueError):
    """A file that cannot be read, or that does not fit the network: says which, and what would."""


@dataclass
class LoadReport:
    """What `load_pretrained` did; `str()` of it is a few lines for people."""

    source: str
    origin: str
    """Whose file it is, such as "Hugging Face"."""
    loaded: list[str] = field(default_factory=list)
    """Parameters that are as in the file."""
    adapted: dict[str, str] = field(default_factory=dict)
    """Parameter -> how it was made from the file."""
    initial: dict[str, str] = field(default_factory=dict)
    """Parameter that was left as it was -> why."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Tensor of the file that has no place in the network -> why."""
    preprocessing: dict[str, list[float]] = field(default_factory=dict)
    """mean and std of the clips these weights were trained on (values 0..1), where the file says it."""

    def __str__(self) -> str:
        lines = [f"{self.source} ({self.origin}): {len(self.loaded)} tensors loaded as they are"]
        for verb, entries in (("adapted", self.adapted), ("not loaded", self.initial), ("left out", self.left_out)):
            by_reason = collections.defaultdict(dict)  # a dict for its order: blocks.0.x and blocks.1.x say it once
            for name, reason in entries.items():
                by_reason[reason][re.sub(r"\.\d+\.", ".*.", name)] = None
            lines += [f"  {verb}: {', '.join(names)}: {reason}" for reason, names in by_reason.items()]
        return "\n".join(lines)


def load_pretrained(
    model: TimeSformer, source: str | os.PathLike, *, classes: Sequence[str] | None = None
) -> LoadReport:
    """Fills `model` from a file, a folder of Hugging Face's `save_pretrained`, or a repository on the Hugging Face Hub.

    source: a file (.pdparams, .safetensors; .pth, .pyth, .pt, .bin by `torch.load(weights_only=True)`), a folder, or a
        name such as "timm/vit_base_patch16_224_miil.in21k" or "facebook/timesformer-base-finetuned-k400".
    classes: names of the model's classes. A file that names others gets no say in the head, however many they are.

    What differs and can be adapted is: another number of frames or patches (embeddings are resized), another number of
    classes, and weights without attention over time, such as an image ViT's. That starts then as a copy of the
    attention over space behind a zero `temporal_fc`: the network begins as the image network applied to every frame
    (PaddleVideo save_load.py, pretrain_vit_param_trans; vit_tweaks.py, init_weights). Raises `WeightsError`.
    """
    file = _read(os.fspath(source))
    origin, theirs, is_image = _our_names(file)
    report = LoadReport(os.fspath(source), origin, preprocessing=file.preprocessing)
    ours = model.state_dict()
    _check_settings(file, model)
    if theirs.pop(_COUNT, None) is not None:
        report.left_out[_COUNT] = "counts the networks that were averaged"
    if is_image:
        for name in [name for name in theirs if name.startswith("pre_logits.")]:
            report.left_out[name] = "part of the image classifier"
            del theirs[name]
    _adapt_head(report, theirs, ours, file.classes, classes, is_image)
    _resize_embeddings(report, theirs, ours)
    _begin_time(report, theirs, ours)
    _check_explained(report, theirs, ours)
    report.loaded = [name for name in theirs if name not in report.adapted]
    model.load_state_dict(ours | theirs)
    return report


# -- from a file to tensors --


class _File(NamedTuple):
    path: str
    tensors: dict[str, Tensor]
    classes: tuple[str, ...] | None = None
    """Names, where the file tells them."""
    preprocessing: Mapping[str, list[float]] = {}
    num_heads: int | None = None
    is_ours: bool = False


SUFFIXES = (".pdparams", ".safetensors", ".pth", ".pyth", ".pt", ".bin")
_REPOSITORY_FILES = ("model.safetensors", "pytorch_model.bin")


def _read(source: str) -> _File:
    path = Path(source)
    if os.path.isdir(source):
        found = [path / name for name in _REPOSITORY_FILES if (path / name).is_file()]
        if not found:
            raise WeightsError(f"{source}: a folder without {' or '.join(_REPOSITORY_FILES)}, whole and not in parts")
        return _read_repository(found[0], lambda name: path / name)
    if os.path.isfile(source):
        if path.suffix not in SUFFIXES:
            raise WeightsError(f"{source}: not a weights file; expected a name that ends in {', '.join(SUFFIXES)}")
        if path.name in _REPOSITORY_FILES:
            return _read_repository(path, path.with_name)
        return _read_file(path)
    if re.fullmatch(r"[\w-]+/[\w.-]+", source) and not source.endswith(SUFFIXES):
        weights = _download(source, *_REPOSITORY_FILES)
        return _read_repository(weights, lambda name: _download(source, name, optional=True))
    raise WeightsError(f"{source}: no such weights file")


def _read_file(path: Path) -> _File:
    if path.suffix == ".safetensors":
        file = _read_safetensors(path)
    elif path.suffix == ".pdparams":
        try:
            file = _File(str(path), read_pdparams(path))
        except ValueError as error:
            raise WeightsError(str(error)) from None
    else:
        file = _File(str(path), _read_torch(path))
    for name, value in file.tensors.items():
        if name.rpartition(".")[2] == _COUNT and value.numel() == 1:
            continue
        is_plain = value.layout == torch.strided and value.device.type == "cpu" and not value.is_quantized
        if not is_plain or value.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise WeightsError(f"{path}: {name} is no array of numbers as weights are ({value.dtype})")
        if value.untyped_storage().nbytes() < value.nbytes:
            raise WeightsError(f"{path}: {name} is larger than what the file holds of it")
        if not value.float().isfinite().all():
            raise WeightsError(f"{path}: {name} holds values that are not finite; the file is damaged")
    return file


def _read_repository(weights: Path, locate: Callable[[str], Path | None]) -> _File:
    """A folder or repository of Hugging Face: timm's, or of transformers."""
    file = _read_file(weights)
    config, processor = (_read_json(locate(name)) for name in ("config.json", "preprocessor_config.json"))
    for key, expected in (("hidden_act", "gelu"), ("layer_norm_eps", 1e-6), ("global_pool", "token")):
        if config.get(key, expected) != expected:
            raise WeightsError(f"{weights.parent}: its config.json has {key} {config[key]!r}; here it is {expected!r}")
    timm = config.get("pretrained_cfg")
    timm = timm if isinstance(timm, dict) else {}
    mean, std = (
        _three_numbers(processor.get(f"image_{name}", timm.get(name)), f"{weights.parent}: {name} in its JSON files")
        for name in ("mean", "std")
    )
    return file._replace(
        classes=file.classes or _class_names(config.get("id2label")),
        preprocessing={"mean": mean, "std": std} if mean and std else file.preprocessing,
        num_heads=file.num_heads or config.get("num_attention_heads"),
    )


def _three_numbers(value: object, what: str) -> list[float] | None:
    """One for each colour; a single one is for all."""
    if value is None:
        return None
    values = value if isinstance(value, list | tuple) else [value] * 3
    if len(values) != 3 or not all(type(each) in (int, float) and abs(each) < 1e9 for each in values):
        raise WeightsError(f"{what} is no list of three numbers")
    return [float(each) for each in values]


def _class_names(names: object) -> tuple[str, ...] | None:
    """From transformers' id2label, where somebody has given names."""
    if not isinstance(names, dict) or not names or all(str(name).startswith("LABEL_") for name in names.values()):
        return None
    return tuple(str(names.get(str(label))) for label in range(len(names)))


def _read_json(path: Path | None) -> dict[str, Any]:
    if path is None or not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path}: not JSON: {error}") from None
    return content if isinstance(content, dict) else {}


def _download(repository: str, *names: str, optional: bool = False) -> Path | None:
    """The first of the files that the repository has, from the cache or the Hub."""
    try:
        from huggingface_hub import hf_hub_download, logging
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    except ImportError:
        raise WeightsError(
            f"{repository}: no such file or folder; to fetch it from the Hugging Face Hub: pip install huggingface_hub"
        ) from None
    logging.set_verbosity_error()  # it would tell of every attempt
    for name in names:
        try:
            return Path(hf_hub_download(repository, name))
        except LocalEntryNotFoundError as error:  # offline and not in the cache
            if not optional:
                raise WeightsError(f"{repository}: {name} cannot be fetched ({error}); name a file of it") from None
            return None
        except EntryNotFoundError:
            continue
        except Exception as error:  # the Hub's and the network's, of several libraries
            raise WeightsError(f"{repository}: cannot be fetched from the Hugging Face Hub: {error}") from None
    if not optional:
        raise WeightsError(f"{repository}: has none of {', '.join(names)}")
    return None


def read_safetensors(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file and what its header says besides; `WeightsError` where it is none."""
    try:
        with safetensors.safe_open(os.fspath(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (safetensors.SafetensorError, UnicodeDecodeError) as error:
        raise WeightsError(f"{path}: not a safetensors file, or a damaged one ({error})") from None


def _read_safetensors(path: Path) -> _File:
    tensors, metadata = read_safetensors(path)
    if "preprocessing" not in metadata:
        return _File(str(path), tensors)
    try:
        settings, preprocessing, classes = (json.loads(metadata[key]) for key in ("model", "preprocessing", "classes"))
        normalisation = {key: _three_numbers(preprocessing[key], f"{path}: {key}") for key in ("mean", "std")}
        return _File(str(path), tensors, tuple(map(str, classes)), normalisation, settings["num_heads"], is_ours=True)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise WeightsError(f"{path}: its header is not what train.py writes ({error})") from None


def _is_compressed(path: Path) -> bool:
    """Whether a zip file holds more bytes than it has. torch.save stores them as they are; torch.load would unpack."""
    try:
        with zipfile.ZipFile(path) as archive:
            return sum(member.file_size for member in archive.infolist()) > path.stat().st_size
    except zipfile.BadZipFile:  # torch's old format is none; torch judges a damaged one
        return False


def _read_torch(path: Path) -> dict[str, Tensor]:
    if _is_compressed(path):
        raise WeightsError(f"{path}: compressed inside, which torch.save does not do; save it anew")
    try:
        # Checkpoints of timm, DeiT and MAE hold their command line: attributes, which run nothing.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen kinds, whose text suggests to trust the file
        raise WeightsError(
            f"{path}: no file of torch.save, damaged, or with more in it than tensors, which would have to be run "
            f"({type(error).__name__})"
        ) from None
    if isinstance(content, dict) and {"network", "loader"} <= content.keys():  # a checkpoint of ours
        content = content["network"]
    found = _state_dicts(content)
    networks = {where: state for where, state in found.items() if _prefixes(state)}
    if len(networks) > 1:
        names = list(networks)
        keys = "".join(f"[{key!r}]" for key in names[-1].split("/"))
        raise WeightsError(
            f"{path}: holds several networks: {', '.join(name or 'the file itself' for name in names)}; keep one, such "
            f"as: torch.save(torch.load(FILE, weights_only=True){keys}, 'one.pth')"
        )
    if not found:
        raise WeightsError(f"{path}: expected a dictionary of tensors, or one in others, such as under 'state_dict'")
    state = next(iter(networks.values())) if networks else max(found.values(), key=len)
    if any(isinstance(value, Tensor) and not isinstance(name, str) for name, value in state.items()):
        raise WeightsError(f"{path}: expected a dictionary of tensors, with texts as their names")
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def _state_dicts(content: object) -> dict[str, dict]:
    """The dictionaries in `content`, however deep, that hold named tensors: keys joined by "/" -> dictionary."""
    found, pending, seen = {}, [("", content)], set()
    while pending:
        where, value = pending.pop()
        if not isinstance(value, dict) or id(value) in seen:
            continue
        seen.add(id(value))
        if any(isinstance(name, str) and isinstance(each, Tensor) for name, each in value.items()):
            found[where] = value
        pending += [(f"{where}/{key}".lstrip("/"), each) for key, each in value.items() if isinstance(key, str)][::-1]
    return found


# -- from their names to ours --

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
"""Parts of names in transformers' TimeSformer -> ours, replaced in this order."""


def _our_names(file: _File) -> tuple[str, dict[str, Tensor], bool]:
    """(whose file it is, its tensors under our names, whether they are an image classifier's)."""
    tensors, prefix = _unwrapped(file)
    is_image = False
    if any("encoder.layer." in name for name in tensors):
        origin, rename = "Hugging Face", from_hugging_face
    elif prefix.endswith("backbone."):
        origin, rename = "PaddleVideo", lambda name: re.sub(r"^head\.fc\.", "head.", name)
    else:
        is_image = not file.is_ours and not any("time_embed" in name or "temporal" in name for name in tensors)
        origin, rename = "ours" if file.is_ours else "an image ViT" if is_image else "a TimeSformer", str
        if prefix.endswith("model."):
            origin, is_image = "facebookresearch/TimeSformer", False
    tensors = _renamed(file.path, tensors, rename)
    if "blocks.0.attn.qkv.weight" not in tensors:
        some = ", ".join(sorted(file.tensors)[:3])[:200] or "nothing"
        raise WeightsError(
            f"{file.path}: not weights of a vision transformer that are known here; it holds {some}, ..."
        )
    return origin, tensors, is_image


_WRAPPER = re.compile(r"(?<![^.])(?:module|_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")
"""What torch puts into names: of DataParallel and AveragedModel, torch.compile, checkpointing, FSDP."""

_FIRST_BLOCK = re.compile(r"((?:.*\.)?)(?:blocks\.0\.attn|encoder\.layer\.0\.attention\.attention)\.qkv\.weight")

_COUNT = "n_averaged"
"""Of torch's AveragedModel, beside its network."""


def _prefixes(names: Iterable[object]) -> list[str]:
    """What stands before the names of each network among `names`."""
    plain = [_WRAPPER.sub("", name) for name in names if isinstance(name, str)]
    return sorted({found[1] for found in map(_FIRST_BLOCK.fullmatch, plain) if found})


def _unwrapped(file: _File) -> tuple[dict[str, Tensor], str]:
    """The tensors without what is put before the names of the network, and that; a head may be beside the network."""
    tensors = _renamed(file.path, file.tensors, lambda name: _WRAPPER.sub("", name))
    prefixes = _prefixes(tensors)
    if len(prefixes) > 1:
        raise WeightsError(
            f"{file.path}: holds several networks, whose names begin with {', '.join(map(repr, prefixes))}; keep one"
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
        raise WeightsError(f"{path}: holds several tensors for {first}")
    return renamed


def from_hugging_face(name: str) -> str:
    """timesformer.encoder.layer.3.attention.attention.qkv.weight -> blocks.3.attn.qkv.weight"""
    for theirs, ours in _HUGGING_FACE_NAMES.items():
        name = name.replace(theirs, ours)
    return name


def to_hugging_face(name: str) -> str:
    """blocks.3.attn.qkv.weight -> timesformer.encoder.layer.3.attention.attention.qkv.weight"""
    for theirs, ours in reversed(_HUGGING_FACE_NAMES.items()):
        if ours:  # from the start of a part of the name: norm1. also ends temporal_norm1.
            name = re.sub(rf"(?<!\w){re.escape(ours)}", theirs, name)
    return name if name.startswith("classifier.") else f"timesformer.{name}"


# -- what differs, and can be adapted --


def _adapt_head(
    report: LoadReport,
    theirs: dict[str, Tensor],
    ours: dict[str, Tensor],
    their_classes: Sequence[str] | None,
    classes: Sequence[str] | None,
    is_image: bool,
) -> None:
    head = [name for name in ours if name.startswith("head.")]
    if not any(name.startswith("head.") for name in theirs):
        for name in head:
            report.initial[name] = "a new head: none in the file"
        return
    number = len(theirs["head.weight"]) if "head.weight" in theirs and theirs["head.weight"].ndim == 2 else 0
    if not number:
        return  # half a head, which nothing explains
    if is_image:
        reason = f"the file's {number} classes are of images"
    elif number != len(ours["head.weight"]):
        reason = f"{number} classes in the file, {len(ours['head.weight'])} here"
    elif classes is not None and their_classes is not None and not _same_names(classes, their_classes):
        reason = f"the file's {number} classes have other names"
    else:
        return
    for name in head:
        report.initial[name] = f"a new head: {reason}"
        theirs.pop(name, None)


def _same_names(one: Sequence[str], other: Sequence[str]) -> bool:
    """But for how they are written: "playing_guitar" is "Playing guitar"."""
    plain = [[re.sub(r"[\W_]+", "", name).casefold() for name in names] for names in (one, other)]
    return plain[0] == plain[1]


def _resize_embeddings(report: LoadReport, theirs: dict[str, Tensor], ours: dict[str, Tensor]) -> None:
    """Position by bilinear interpolation with corners aligned (PaddleVideo, by scipy.ndimage.zoom of order 1, which for
    some sizes writes zeros into the last row and column; not here), time by the nearest (as all of them do)."""
    pos, target = theirs.get("pos_embed"), ours["pos_embed"]
    if pos is not None and _may_resize(pos, target):
        side, new_side = (math.isqrt(value.shape[1] - 1) for value in (pos, target))
        if side and side**2 + 1 == pos.shape[1]:
            grid = pos[:, 1:].double().transpose(1, 2).unflatten(2, (side, side))
            grid = interpolate(grid, (new_side, new_side), mode="bilinear", align_corners=True)
            theirs["pos_embed"] = torch.cat([pos[:, :1], grid.flatten(2).transpose(1, 2).to(pos.dtype)], 1)
            report.adapted["pos_embed"] = f"resized from {side} x {side} to {new_side} x {new_side} patches"
    time, target = theirs.get("time_embed"), ours.get("time_embed")
    if time is not None and target is not None and _may_resize(time, target):
        theirs["time_embed"] = interpolate(time.float().transpose(1, 2), target.shape[1]).transpose(1, 2)
        report.adapted["time_embed"] = f"resized from {time.shape[1]} to {target.shape[1]} frames, to the nearest"


def _may_resize(value: Tensor, target: Tensor) -> bool:
    is_one = value.ndim == 3 and value.shape[::2] == target.shape[::2] and min(value.numel(), target.numel()) > 0
    return is_one and value.shape[1] != target.shape[1]


def _begin_time(report: LoadReport, theirs: dict[str, Tensor], ours: dict[str, Tensor]) -> None:
    """What weights without time need to begin as they are."""
    if any("temporal" in name for name in theirs):
        return
    for name, value in ours.items():
        if "temporal_fc" in name:
            theirs[name] = torch.zeros_like(value)
            report.adapted[name] = "zero: at first, other frames change nothing"
        elif "temporal" in name and (spatial := name.replace("temporal_", "")) in theirs:
            theirs[name] = theirs[spatial].clone()
            report.adapted[name] = "started from the attention over space and its norm"
    if "time_embed" in ours and "time_embed" not in theirs:
        theirs["time_embed"] = torch.zeros_like(ours["time_embed"])
        report.adapted["time_embed"] = "zero: not in the file"


# -- what differs, and cannot --


def _check_settings(file: _File, model: TimeSformer) -> None:
    num_heads = model.blocks[0].attn.num_heads
    if file.num_heads not in (None, num_heads):
        raise WeightsError(f"{file.path}: has {file.num_heads} attention heads, the network {num_heads}; set num_heads")


_BLOCK = re.compile(r"blocks\.(\d+)\.")


def _check_explained(report: LoadReport, theirs: dict[str, Tensor], ours: dict[str, Tensor]) -> None:
    missing = [name for name in ours if name not in theirs and name not in report.initial]
    unknown = [name for name in theirs if name not in ours]
    problems = [
        f"{what} {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
        for what, names in (("it lacks", missing), ("the network has no", unknown))
        if names
    ]
    problems += [
        f"{name} is {_shape(theirs[name])} there, {_shape(ours[name])} here"
        for name in ours
        if name in theirs and theirs[name].shape != ours[name].shape
    ][:3]
    if not problems:
        return
    hints = [
        f"its queries, keys and values have {'a' if bias else 'no'} bias: set qkv_bias to {str(bias).lower()}"
        for names, bias in ((unknown, True), (missing, False))
        if any(name.endswith("attn.qkv.bias") for name in names)
    ]
    if any("temporal" in name for name in unknown) and not any("temporal" in name for name in ours):
        hints.append("it attends over time and space in turn: set attention to divided_space_time")
    depth, our_depth = (len({found[1] for found in map(_BLOCK.match, names) if found}) for names in (theirs, ours))
    if depth != our_depth:
        hints.append(f"it has {depth} blocks, the network {our_depth}: set depth")
    raise WeightsError(f"{report.source} ({report.origin}) does not fit the network: {'; '.join(problems + hints)}")


def _shape(value: Tensor) -> str:
    return " x ".join(map(str, value.shape))
