"""An exported network, with one interface for all runtimes: clips in, probabilities out."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from common.weights import Weights, from_metadata, to_metadata
from dali_pipelines.errors import InputError
from evaluation.results import Protocol

Precision = Literal["float32", "float16", "int8"]


@dataclass(frozen=True)
class ExportHeader:
    """The metadata of an exported file."""

    model: dict[str, Any]
    """Arguments of `TimeSformer`."""
    preprocessing: dict[str, Any]
    """Preprocessing of clips: keys of the `data` section of a config."""
    classes: tuple[str, ...]
    views: int
    """1: clips in, logits out; 3: three views of a video in, the mean of their probabilities out."""
    precision: str

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Input shape without the batch: (3, T, S, S), or (views, 3, T, S, S) if the file takes several views."""
        frames, side = self.preprocessing["num_frames"], self.preprocessing["crop_size"]
        return (*([self.views] if self.views > 1 else []), 3, frames, side, side)


@dataclass(frozen=True)
class Exported(ExportHeader):
    """A network that runs without our code, with its metadata."""

    run: Callable[[Tensor], Tensor]
    """Clips [B, 3, T, S, S] -> logits [B, K]; views [B, 3, 3, T, S, S] -> probabilities [B, K]. float32, CPU."""

    runtime: str
    """What runs it, such as "onnxruntime: CPUExecutionProvider"."""
    state: Mapping[str, Tensor] = field(default_factory=dict)
    """Empty: the runtime holds the weights. `Weights` has its tensors here."""

    def build(self, device: torch.device | str = "cpu") -> Callable[[Tensor], Tensor]:
        """The network as `Weights.build` returns it: clips [B, 3, T, S, S] -> scores [B, K] on the CPU. `device` is
        ignored.

        A file that takes several views gets them from consecutive clips, and B must be a multiple of their number. The
        softmax of each of their scores is the mean of their probabilities.
        """

        def network(clips: Tensor) -> Tensor:
            clips = clips.float().cpu()
            if self.views == 1:
                return self.run(clips)
            return self.run(clips.unflatten(0, (-1, self.views))).log().repeat_interleave(self.views, 0)

        return network

    def __call__(self, clips: Tensor) -> Tensor:
        """Views [B, V, 3, T, S, S], normalised -> mean of their probabilities, float32 [B, K], on the CPU."""
        shape = self.input_shape
        if clips.ndim != 6 or clips.shape[-len(shape) :] != shape:
            views = "V" if self.views == 1 else str(self.views)
            raise InputError(
                f"clips are {tuple(clips.shape)}; this file takes [B, {views}, {', '.join(map(str, shape[-4:]))}]"
            )
        clips = clips.float().cpu()
        if self.views > 1:
            return self.run(clips)
        return self.run(clips.flatten(0, 1)).softmax(1).unflatten(0, clips.shape[:2]).mean(1)


def check_protocol(exported: Exported, path: str, protocol: Protocol) -> None:
    """Raises `InputError` if an export that averages three views itself cannot follow `protocol`."""
    if exported.views > 1 and (protocol.crops, protocol.average) != (exported.views, "prob"):
        raise InputError(
            f"{path}: averages the probabilities of {exported.views} crops itself; that needs --crops "
            f"{exported.views} --average prob. For other protocols, export with --views 1"
        )


def write_header(weights: Weights, *, format: str, views: int, precision: Precision) -> dict[str, str]:
    """The metadata of a file in `format`, for `read_header`."""
    return to_metadata(weights, format) | {"views": str(views), "precision": precision}


def read_header(path: Path, metadata: Mapping[str, str], *, format: str) -> ExportHeader:
    """Checks the metadata of the file at `path`; raises `InputError` if export.py did not write it."""
    if not isinstance(metadata, Mapping) or metadata.get("format") != format:
        raise InputError(f"{path}: not a file that export.py wrote; its metadata lacks the format {format!r}")
    try:
        model, preprocessing, classes = from_metadata(metadata)
        header = ExportHeader(model, preprocessing, classes, int(metadata["views"]), metadata["precision"])
        if header.views not in (1, 3):
            raise ValueError(f"views is {header.views}")
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: its metadata is invalid ({error})") from None
    return header


def first_line(error: Exception) -> str:
    """The first line of a runtime's error, for our own message."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
