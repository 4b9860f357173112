"""Reads third-party weights: files of PaddleVideo, timm, facebookresearch/TimeSformer, Hugging Face and train.py.

Nothing in a file is executed or trusted: tensors are checked before they are used.
"""

import argparse
import contextlib
import json
import os
import re
import resource
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
from torch import Tensor

from model.pdparams import read_pdparams


class WeightsError(ValueError):
    """A file that cannot be read or does not fit the network; the message says which file, and what would fit."""


class WeightsFile(NamedTuple):
    """The content of a file, with the file's own tensor names."""

    path: str
    tensors: dict[str, Tensor]
    classes: tuple[str, ...] | None = None
    """The class names, if the file has them."""
    preprocessing: Mapping[str, list[float]] = {}
    """mean and std of the clips, for values 0 to 1, if the file has them."""
    num_heads: int | None = None
    is_ours: bool = False
    """Whether train.py wrote it."""


SUFFIXES = (".pdparams", ".safetensors", ".pth", ".pyth", ".pt", ".bin")
_REPOSITORY_FILES = ("model.safetensors", "pytorch_model.bin")


def read_weights_file(source: str) -> WeightsFile:
    """Reads a file, a folder or a repository on the Hugging Face Hub: see `model.load_pretrained`. Raises
    `WeightsError`."""
    path = Path(source)
    if os.path.isdir(source):
        found = [path / name for name in _REPOSITORY_FILES if (path / name).is_file()]
        if not found:
            raise WeightsError(
                f"{source}: a folder without {' or '.join(_REPOSITORY_FILES)}; weights in several parts are not read"
            )
        return _read_repository(found[0], lambda name: path / name)
    if os.path.isfile(source):
        if path.suffix not in SUFFIXES:
            raise WeightsError(f"{source}: not a weights file; expected a name that ends in {', '.join(SUFFIXES)}")
        if path.name in _REPOSITORY_FILES:
            return _read_repository(path, path.with_name)
        return _read_file(path)
    if re.fullmatch(r"[\w-]+/[\w.-]+", source) and not source.endswith(SUFFIXES):
        weights = _download(source, *_REPOSITORY_FILES)
        if weights is None:
            raise WeightsError(f"{source}: has none of {', '.join(_REPOSITORY_FILES)}")
        return _read_repository(weights, lambda name: _download(source, name, is_optional=True))
    raise WeightsError(no_such_file(source))


def no_such_file(source: str | os.PathLike[str]) -> str:
    """The message for weights that are not there."""
    if "://" in str(source):
        return f"{source}: a URL; download it, and name the file, or a repository on the Hub as USER/NAME"
    return f"{source}: no such weights file"


def _read_file(path: Path) -> WeightsFile:
    if path.suffix == ".safetensors":
        file = _read_safetensors(path)
    elif path.suffix == ".pdparams":
        try:
            file = WeightsFile(str(path), read_pdparams(path))
        except ValueError as error:
            raise WeightsError(str(error)) from None
    else:
        file = WeightsFile(str(path), _read_torch(path))
    for name, value in file.tensors.items():
        if name.rpartition(".")[2] == AVERAGED_COUNT and value.numel() == 1:
            continue
        is_plain = value.layout == torch.strided and value.device.type == "cpu" and not value.is_quantized
        if not is_plain or value.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise WeightsError(f"{path}: {name} is not a tensor of floating-point numbers ({value.dtype})")
        if value.untyped_storage().nbytes() < value.nbytes:
            raise WeightsError(f"{path}: {name} is larger than its data in the file")
    if sum(value.nbytes for value in file.tensors.values()) > _MOST_SHARED * path.stat().st_size:
        raise WeightsError(f"{path}: its tensors are larger than the file: many names for the same data")
    for name, value in file.tensors.items():
        if not value.float().isfinite().all():
            raise WeightsError(f"{path}: {name} has values that are not finite; the file is damaged")
    return file


def _read_repository(weights: Path, locate: Callable[[str], Path | None]) -> WeightsFile:
    """Reads a folder or repository of timm or transformers; `locate` finds its other files."""
    file = _read_file(weights)
    config, processor = (_read_json(locate(name)) for name in ("config.json", "preprocessor_config.json"))
    for key, expected in (("hidden_act", "gelu"), ("layer_norm_eps", 1e-6), ("global_pool", "token")):
        if config.get(key, expected) != expected:
            raise WeightsError(f"{weights.parent}: its config.json has {key} {config[key]!r}; expected {expected!r}")
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


def _three_numbers(value: Any, what: str) -> list[float] | None:
    """One number per colour channel, from a list or a single number; None for None."""
    if value is None:
        return None
    values = value if isinstance(value, list | tuple) else [value] * 3
    if len(values) != 3 or not all(type(each) in (int, float) and abs(each) < 1e9 for each in values):
        raise WeightsError(f"{what} is not a list of three numbers")
    return [float(each) for each in values]


def _class_names(names: object) -> tuple[str, ...] | None:
    """The names in transformers' id2label; None if they are just the defaults."""
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


def _download(repository: str, *names: str, is_optional: bool = False) -> Path | None:
    """The first of the files that exists in the repository, from the cache or the Hub; None if there is none."""
    try:
        from huggingface_hub import hf_hub_download, logging
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    except ImportError:
        raise WeightsError(
            f"{repository}: no such file or folder; to fetch it from the Hugging Face Hub: pip install huggingface_hub"
        ) from None
    logging.set_verbosity_error()  # otherwise it reports every attempt
    for name in names:
        try:
            return Path(hf_hub_download(repository, name))
        except LocalEntryNotFoundError as error:  # offline and not in the cache
            if not is_optional:
                raise WeightsError(f"{repository}: {name} cannot be fetched ({error}); give a local file") from None
            return None
        except EntryNotFoundError:
            continue
        except Exception as error:  # of the Hub and the network, from several libraries
            raise WeightsError(f"{repository}: cannot be fetched from the Hugging Face Hub: {error}") from None
    return None


def read_safetensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file, and the metadata of its header. Raises `WeightsError` if it is not a safetensors file."""
    try:
        with safetensors.safe_open(os.fspath(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (safetensors.SafetensorError, UnicodeDecodeError) as error:
        raise WeightsError(f"{path}: not a safetensors file, or a damaged one ({error})") from None


def _read_safetensors(path: Path) -> WeightsFile:
    tensors, metadata = read_safetensors(path)
    if "preprocessing" not in metadata:
        return WeightsFile(str(path), tensors)
    try:
        settings, preprocessing, classes = (json.loads(metadata[key]) for key in ("model", "preprocessing", "classes"))
        normalisation = {key: _three_numbers(preprocessing[key], f"{path}: {key}") or [] for key in ("mean", "std")}
        return WeightsFile(
            str(path), tensors, tuple(map(str, classes)), normalisation, settings["num_heads"], is_ours=True
        )
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise WeightsError(f"{path}: its header is not what train.py writes ({error})") from None


_MOST_SHARED = 8
"""Tensors may share data, as tied layers do: bytes of all tensors at most, in multiples of the size of the file."""
_ROOM = 1 << 30  # bytes that loading may need beside the tensors


@contextlib.contextmanager
def memory_for(path: str | os.PathLike[str]) -> Iterator[None]:
    """Within, this process gets no more memory than loading an honest file at `path` takes: what asks for more raises
    MemoryError. A pickle of 100 bytes can ask torch.load for terabytes, even with `weights_only`."""
    before = resource.getrlimit(resource.RLIMIT_DATA)
    used = re.search(r"^VmData:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    limits = [int(used[1]) * 1024 + 3 * os.path.getsize(path) + _ROOM] if used else []
    limits += [limit for limit in before if limit != resource.RLIM_INFINITY]
    if limits:
        resource.setrlimit(resource.RLIMIT_DATA, (min(limits), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def is_compressed(path: Path) -> bool:
    """Whether a zip file is compressed. torch.save does not compress, but torch.load would unpack any size."""
    try:
        with zipfile.ZipFile(path) as archive:
            return sum(member.file_size for member in archive.infolist()) > path.stat().st_size
    except zipfile.BadZipFile:  # torch's old format, or a damaged file, which torch will report
        return False


def _read_torch(path: Path) -> dict[str, Tensor]:
    if is_compressed(path):
        raise WeightsError(f"{path}: compressed inside, which torch.save does not do; save it again")
    try:
        # Checkpoints of timm, DeiT and MAE contain their command line: attributes only, which run nothing.
        with torch.serialization.safe_globals([argparse.Namespace]), memory_for(path):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds of errors, with advice to trust the file
        if found_global := re.search(r"\bGLOBAL (\S+)", str(error)):
            raise WeightsError(
                f"{path}: contains pickled objects, which are refused ({found_global[1]}); if the file is yours, keep "
                "its tensors, with the libraries that wrote it: torch.save(torch.load(FILE, weights_only=False)"
                "['state_dict'], 'weights.pth')"
            ) from None
        raise WeightsError(
            f"{path}: not a file of torch.save, damaged, or contains pickled objects, which are refused "
            f"({type(error).__name__})"
        ) from None
    if isinstance(content, dict) and {"network", "loader"} <= content.keys():  # a checkpoint of train.py
        content = content["network"]
    found = _state_dicts(content)
    networks = {where: state for where, state in found.items() if network_prefixes(state)}
    if len(networks) > 1:
        names = list(networks)
        keys = "".join(f"[{key!r}]" for key in names[-1].split("/"))
        raise WeightsError(
            f"{path}: contains several networks: {', '.join(name or 'the file itself' for name in names)}; keep one, "
            f"such as: torch.save(torch.load(FILE, weights_only=True){keys}, 'one.pth')"
        )
    if not found:
        raise WeightsError(
            f"{path}: expected a dictionary of tensors, or one inside others, such as under 'state_dict'"
        )
    state = next(iter(networks.values())) if networks else max(found.values(), key=len)
    if any(isinstance(value, Tensor) and not isinstance(name, str) for name, value in state.items()):
        raise WeightsError(f"{path}: expected a dictionary of tensors, with strings as their names")
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def _state_dicts(content: object) -> dict[str, dict[Any, Any]]:
    """The dictionaries in `content`, at any depth, that contain named tensors: keys joined by "/" -> dictionary."""
    found: dict[str, dict[Any, Any]] = {}
    pending, seen = [("", content)], set()
    while pending:
        where, value = pending.pop()
        if not isinstance(value, dict) or id(value) in seen:
            continue
        seen.add(id(value))
        if any(isinstance(name, str) and isinstance(each, Tensor) for name, each in value.items()):
            found[where] = value
        pending += [(f"{where}/{key}".lstrip("/"), each) for key, each in value.items() if isinstance(key, str)][::-1]
    return found


WRAPPER = re.compile(r"(?<![^.])(?:module|_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")
"""Parts of names that torch adds: DataParallel and AveragedModel, torch.compile, checkpointing, FSDP."""

_FIRST_BLOCK = re.compile(
    r"((?:.*\.)?)(?:(?:blocks\.0\.attn|encoder\.layer\.0\.attention\.attention)\.qkv\.weight"
    r"|transformer_layers\.layers\.0\.attentions\.0\.attn\.in_proj_weight)"
)

AVERAGED_COUNT = "n_averaged"
"""A tensor of torch's AveragedModel, beside its network."""


def network_prefixes(names: Iterable[object]) -> list[str]:
    """The prefix of each network whose tensors are among `names`."""
    plain = [WRAPPER.sub("", name) for name in names if isinstance(name, str)]
    return sorted({found[1] for found in map(_FIRST_BLOCK.fullmatch, plain) if found})
