"""Checkpoints, which tell where training stood."""

import os
import re
from pathlib import Path
from typing import Any

import torch

from training.weights import whole_file

_KEPT = 2  # checkpoints: the newest, and the one before it


def save_checkpoint(folder: str | os.PathLike, step: int, state: dict[str, Any]) -> Path:
    """Writes folder/step_00000123.pt, whole or not at all, and removes all but the newest two."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_{step:08d}.pt"
    with whole_file(path) as file:
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
