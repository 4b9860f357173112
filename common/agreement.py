"""Checks that all processes of a job use the same code, settings, data and weights."""

import dataclasses
import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from nvidia.dali import __version__ as dali_version

from common.config import Config, flat
from common.distributed import DistributedContext
from dali_pipelines.errors import InputError

_OWN = (
    "device",
    "data.train",
    "data.val",
    "data.test",
    "data.labels",
    "data.workers",
    "data.decode_threads",
    "data.cache",
    "train.pretrained",
    "distill.teacher",
)
"""Keys that may differ between processes: paths whose contents are compared instead, and resources of a machine."""

_PACKAGES = ("common", "dali_pipelines", "model", "training")


@functools.cache
def versions() -> dict[str, str]:
    """Everything that affects a run's numbers: a checksum of this program, and the versions of its libraries."""
    root = Path(__file__).parents[1]
    code = hashlib.sha256()
    for path in sorted(path for name in _PACKAGES for path in (root / name).rglob("*.py")):
        code.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    libraries = {"torch": torch.__version__, "DALI": dali_version, "numpy": np.__version__, "PyAV": av.__version__}
    return {"code": code.hexdigest()[:12]} | {name: str(version) for name, version in libraries.items()}


def shared_facts(config: Config) -> dict[str, Any]:
    """The versions and settings that must be equal on all processes, by name."""
    settings = {key: value for key, value in flat(dataclasses.asdict(config)).items() if key not in _OWN}
    return {f"version of {name}": version for name, version in versions().items()} | settings


def weights_checksum(state: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of the tensors and their names, in hexadecimal."""
    digest = hashlib.sha256()
    for key in sorted(state):
        value = state[key].detach().cpu().contiguous()
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        if value.numel():
            digest.update(value.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_agreement(process: DistributedContext, facts: Mapping[str, Any]) -> None:
    """Raises `InputError` on all processes unless `facts` are equal on all of them; the message gives the first rank
    that differs from rank 0, and the values. Every process must call it."""
    everywhere = process.gather(dict(facts))
    for rank, theirs in enumerate(everywhere):
        if different := _different(everywhere[0], theirs):
            what = ", ".join(
                f"{key} is {everywhere[0].get(key)} on rank 0 and {theirs.get(key)} on rank {rank}" for key in different
            )
            raise InputError(f"{what}; start all processes with the same code, settings, manifests and weights")


def _different(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    return [key for key in {**one, **other} if key not in one or key not in other or one[key] != other[key]]
