"""Self-contained weights files, and loading of pretrained weights in other formats."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import safetensors.torch
import torch
from torch.optim.swa_utils import AveragedModel

from common.config import PREPROCESSING, Config, ModelConfig, check_header, load_config, preprocessing
from common.labels import read_labels
from dali_pipelines.errors import InputError
from dali_pipelines.files import is_url, unfinished
from model import LoadReport, TimeSformer, WeightsError, load_pretrained
from model.pretrained_files import SUFFIXES, no_such_file, read_safetensors

_FORMAT = "dali-timesformer 1"


@dataclass(frozen=True)
class Weights:
    """The content of a weights file: enough to predict without a config."""

    model: dict[str, Any]
    """Arguments of `TimeSformer`, as in the section `model` of a config."""
    preprocessing: dict[str, Any]
    """How clips were cut: keys in the section `data` of a config."""
    classes: tuple[str, ...]
    state: dict[str, torch.Tensor]

    def config(self) -> dict[str, Any]:
        """The settings that follow from the weights, for `load_config(defaults=...)`."""
        return {"model": self.model, "data": self.preprocessing}

    def build(self, device: torch.device | str = "cpu") -> TimeSformer:
        """The network with these weights, in evaluation mode."""
        network = build_network(self.model, self.preprocessing, len(self.classes))
        network.load_state_dict(self.state)
        return network.to(device).eval()


def build_network(model: dict[str, Any] | ModelConfig, preprocessing: dict[str, Any], num_classes: int) -> TimeSformer:
    """A new TimeSformer for these settings, with random weights."""
    settings = dataclasses.asdict(model) if isinstance(model, ModelConfig) else model
    return TimeSformer(
        **settings,
        num_frames=preprocessing["num_frames"],
        image_size=preprocessing["crop_size"],
        num_classes=num_classes,
    )


def save_weights(path: str | os.PathLike, weights: Weights) -> None:
    """Write a safetensors file atomically. Raises `InputError` if it cannot be written."""
    metadata = to_metadata(weights, _FORMAT)
    state = {name: value.detach().cpu().contiguous() for name, value in weights.state.items()}
    with atomic_write(Path(path)) as file:
        file.write(safetensors.torch.save(state, metadata))


def to_metadata(weights: Weights, format: str) -> dict[str, str]:
    """The metadata of a file in `format` (safetensors, ONNX or .pt2): everything but the tensors, as strings."""
    return {
        "format": format,
        "model": json.dumps(weights.model),
        "preprocessing": json.dumps(weights.preprocessing),
        "classes": json.dumps(weights.classes),  # ASCII, as folder names need not be UTF-8
    }


def from_metadata(metadata: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, Any], tuple[str, ...]]:
    """(model, preprocessing, classes) from the output of `to_metadata`, checked. Raises KeyError, TypeError,
    ValueError, RecursionError or `InputError` for anything else."""
    model, preprocessing, classes = (json.loads(metadata[key]) for key in ("model", "preprocessing", "classes"))
    check_header(model, preprocessing)
    if not (isinstance(classes, list) and classes and all(isinstance(name, str) for name in classes)):
        raise InputError("classes is not a list of names")
    return model, preprocessing, tuple(classes)


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which appears at `path` only once it is complete and on disk. Raises `InputError` if it
    cannot be written."""
    part = unfinished(path)
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        atomic_rename(part, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise InputError(f"{path}: cannot be written: {error.strerror}") from error


def atomic_rename(file: Path, path: Path) -> None:
    """Rename `file` within its folder, and wait until the new name is on disk."""
    file.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def has_weights_header(path: str | os.PathLike) -> bool:
    """Whether a file's header says that `save_weights` wrote it."""
    try:
        with safetensors.safe_open(os.fspath(path), framework="pt") as file:
            return (file.metadata() or {}).get("format") == _FORMAT
    except (OSError, safetensors.SafetensorError, UnicodeDecodeError):
        return False


def load_weights(path: str | os.PathLike) -> Weights:
    """Read a file that `save_weights` wrote. Raises `InputError` for any other file."""
    if not Path(path).is_file():
        raise InputError(f"{no_such_file(path)}; train.py writes best.safetensors and last.safetensors")
    try:
        state, metadata = read_safetensors(path)
    except WeightsError as error:
        raise InputError(str(error)) from None
    if metadata.get("format") != _FORMAT:
        raise InputError(f"{path}: not weights written by train.py; for other weights, give a config with -c")
    try:
        model, preprocessing, classes = from_metadata(metadata)
        with torch.device("meta"):
            expected = build_network(model, preprocessing, len(classes)).state_dict()
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: its header is not what train.py writes ({error})") from None
    wrong = expected.keys() ^ state.keys() or [name for name in state if state[name].shape != expected[name].shape]
    wrong = wrong or [name for name in state if not state[name].isfinite().all()]
    if wrong:
        raise InputError(f"{path}: damaged: {min(wrong)} is not what its header says, or not finite")
    return Weights(model, preprocessing, classes, state)


def open_weights(path: str, config_path: str | None, overrides: Sequence[str] = ()) -> tuple[Weights, Config, str]:
    """Weights to evaluate or predict with, their config, and a report of how they were adapted ("" if they were not).

    A file written by train.py needs no config; one that is given may not contradict the file, except for
    `data.num_frames`, to which the time embedding is resized. Other formats that `model.load_pretrained` reads need a
    config with `data.labels`. Raises `InputError` if the weights cannot be used.
    """
    check_not_swapped(path, config_path)
    _check_not_run(path)
    if path.endswith((".pdmodel", ".pdiparams")):
        raise InputError(f"{path}: exported by Paddle; expected the .pdparams that it was exported from")
    is_other_file = os.path.isfile(path) and not path.endswith(SUFFIXES)
    if has_weights_header(path):
        weights = load_weights(path)
        config = agreeing_config(weights, config_path, overrides)
        if config.data.num_frames == weights.preprocessing["num_frames"]:
            return weights, config, ""
        model, classes = weights.model, weights.classes
    elif config_path is None or is_other_file:
        if path.endswith(".safetensors") or is_other_file:
            load_weights(path)  # raises an error that says what is wrong with it
        if path.endswith(SUFFIXES) and not os.path.exists(path):
            raise InputError(no_such_file(path))
        raise InputError(f"{path}: does not say how clips are cut, or what the classes are; give a config with -c")
    else:
        config = load_config(config_path, overrides)
        if config.data.labels is None:
            raise InputError(f"{path}: has no class names; give a file with one per line: -o data.labels=FILE")
        model, classes = dataclasses.asdict(config.model), read_labels(config.data.labels)
    network = build_network(model, preprocessing(config.data), len(classes))
    report = load_into(network, path, classes=classes)
    for key, theirs in report.preprocessing.items():
        if theirs != getattr(config.data, key):
            raise InputError(f"{path}: trained with data.{key}={theirs}; here it is {getattr(config.data, key)}")
    new_head = report.initial.get("head.weight", "")
    if "classes" in new_head and "image" not in new_head:
        raise InputError(
            f"{path}: its classes are not the {len(classes)} in {config.data.labels}: "
            f"{new_head.removeprefix('a new head: ')}. Name the file of its own class names: -o data.labels=FILE; for "
            f"other classes, train first: -o train.pretrained={path}"
        )
    if report.initial or not all(how.startswith("resized") for how in report.adapted.values()):
        raise InputError(f"{path}: not trained for these classes of videos: {report}")
    return Weights(model, preprocessing(config.data), tuple(classes), network.state_dict()), config, str(report)


def _check_not_run(path: str) -> None:
    if (best := Path(path, "best.safetensors")).is_file():
        raise InputError(f"{path}: the folder of a run; expected a file of weights in it, such as {best}")


def check_not_swapped(path: str, config_path: str | None) -> None:
    """Raises `InputError` if the weights are named as the config, or the other way round, or by a URL."""
    if is_url(path):
        raise InputError(f"-w {no_such_file(path)}")
    if path.endswith((".yaml", ".yml")):
        raise InputError(f"-w {path}: a config, not weights; give it with -c, and the weights with -w")
    if config_path is not None and config_path.endswith((*SUFFIXES, ".onnx", ".pt2")):
        raise InputError(f"-c {config_path}: weights, not a config; give them with -w")


def agreeing_config(weights: Weights, path: str | None, overrides: Sequence[str]) -> Config:
    """The settings of the weights, overridden by the config at `path` and by overrides. Raises `InputError` if they
    disagree."""
    config = load_config(path, overrides, defaults=weights.config())
    theirs = load_config(None, defaults=weights.config())
    keys = [("data", key) for key in PREPROCESSING] + [("model", key) for key in weights.model]
    for section, key in keys:
        given, expected = (getattr(getattr(each, section), key) for each in (config, theirs))
        # Drop path and the initial standard deviation only matter in training.
        if given != expected and key not in ("num_frames", "drop_path", "embed_init_std"):
            raise InputError(f"{section}.{key} is {given}, but these weights were trained with {expected}")
    return config


def load_into(network: TimeSformer, source: str, *, classes: Sequence[str]) -> LoadReport:
    """Call `model.load_pretrained`. Raises `InputError` if it cannot load `source`."""
    _check_not_run(source)
    try:
        return load_pretrained(network, source, classes=classes)
    except WeightsError as error:
        raise InputError(str(error)) from None


def average_weights(paths: Sequence[str]) -> Weights:
    """The mean of weights files of the same network, such as those of the last epochs (SWA, Izmailov et al. 2018).

    Raises `InputError` for fewer than two files, or files of different networks.
    """
    if len(paths) < 2:
        raise InputError(f"{paths[0]}: one file cannot be averaged; give several")
    first = load_weights(paths[0])
    average = AveragedModel(first.build())
    for path in paths:
        weights = load_weights(path)
        for what in ("model", "preprocessing", "classes"):
            if getattr(weights, what) != getattr(first, what):
                raise InputError(
                    f"{path}: its {what} differs from {paths[0]}; only weights of one network can be averaged"
                )
        average.update_parameters(weights.build())
    return dataclasses.replace(first, state=average.module.state_dict())
