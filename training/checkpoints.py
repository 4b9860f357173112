"""Weights files, which tell all that is needed to use them, and checkpoints, which tell where training stood."""

import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import safetensors.torch
import torch

from dali_pipelines.errors import InputError
from model import TimeSformer
from training.config import ModelConfig

_FORMAT = "dali-timesformer 1"
_KEPT = 2  # checkpoints: the newest, and the one before it


@dataclass(frozen=True)
class Weights:
    """What a weights file holds: enough to predict without a config."""

    model: dict[str, Any]
    """Arguments of `TimeSformer`, as in the section `model` of a config."""
    preprocessing: dict[str, Any]
    """How clips were cut: keys of the section `data`."""
    classes: tuple[str, ...]
    state: dict[str, torch.Tensor]

    def config(self) -> dict[str, Any]:
        """What the weights say of a config, for `load_config(defaults=...)`."""
        return {"model": self.model, "data": self.preprocessing}

    def build(self, device: torch.device | str = "cpu") -> TimeSformer:
        """The network with these weights, ready to predict."""
        network = build_network(self.model, self.preprocessing, len(self.classes))
        network.load_state_dict(self.state)
        return network.to(device).eval()


def build_network(model: dict[str, Any] | ModelConfig, preprocessing: dict[str, Any], num_classes: int) -> TimeSformer:
    settings = dataclasses.asdict(model) if isinstance(model, ModelConfig) else model
    return TimeSformer(
        **settings,
        num_frames=preprocessing["num_frames"],
        image_size=preprocessing["crop_size"],
        num_classes=num_classes,
    )


def save_weights(path: str | os.PathLike, weights: Weights) -> None:
    """Writes a safetensors file, whole or not at all."""
    metadata = {
        "format": _FORMAT,
        "model": json.dumps(weights.model),
        "preprocessing": json.dumps(weights.preprocessing),
        "classes": json.dumps(weights.classes, ensure_ascii=False),
    }
    state = {name: value.detach().cpu().contiguous() for name, value in weights.state.items()}
    with _whole_file(Path(path)) as file:
        file.write(safetensors.torch.save(state, metadata))


@contextlib.contextmanager
def _whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file that appears at `path` once it is complete and on disk, and not at all otherwise."""
    unfinished = path.with_name(path.name + ".part")
    try:
        with open(unfinished, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        unfinished.unlink(missing_ok=True)
        raise InputError(f"{path}: cannot be written: {error}") from None
    unfinished.replace(path)


def load_weights(path: str | os.PathLike) -> Weights:
    """Reads what `save_weights` wrote; `InputError` says what is wrong with another file."""
    if not Path(path).is_file():
        raise InputError(f"{path}: no such weights file; train.py writes best.safetensors and last.safetensors")
    try:
        with safetensors.safe_open(os.fspath(path), framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a safetensors file, or a damaged one ({error})") from None
    if metadata.get("format") != _FORMAT:
        raise InputError(f"{path}: holds tensors, but not the weights that train.py writes")
    model, preprocessing, classes = (json.loads(metadata[key]) for key in ("model", "preprocessing", "classes"))
    return Weights(model, preprocessing, tuple(classes), state)


def save_checkpoint(folder: str | os.PathLike, step: int, state: dict[str, Any]) -> Path:
    """Writes folder/step_00000123.pt, whole or not at all, and removes all but the newest two."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_{step:08d}.pt"
    with _whole_file(path) as file:
        torch.save(state, file)
    for old in list_checkpoints(folder)[:-_KEPT]:
        old.unlink()
    return path


def list_checkpoints(folder: str | os.PathLike) -> list[Path]:
    """Oldest first."""
    return sorted(path for path in Path(folder).glob("step_*.pt") if re.fullmatch(r"step_\d{8}\.pt", path.name))


def load_newest_checkpoint(folder: str | os.PathLike) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that can be read, and its path; None where there is none."""
    for path in reversed(list_checkpoints(folder)):
        try:
            return path, torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises a dozen kinds for a damaged file; the one before it may be whole
            print(f"{path}: cannot be read ({type(error).__name__}); looking for an older one")
    return None
