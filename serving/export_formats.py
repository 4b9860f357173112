"""The formats of export.py. To add one, write a module that writes it (and opens it, if predict.py supports it), and
add an entry to `FORMATS`. Imports torch only when a format is used."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dali_pipelines.errors import InputError

if TYPE_CHECKING:
    from common.weights import Weights
    from serving.exported import Exported, Precision
    from serving.verification import Clips


@dataclass(frozen=True)
class ExportRequest:
    """One export to write."""

    out: Path
    """The file or folder to write."""
    source: str
    """The weights as named on the command line: a file, or a repository on the Hugging Face Hub."""
    weights: Weights
    clips: Clips
    """Clips to compare on."""
    views: int
    """1: clips in, logits out; 3: three views of a video in, the mean of their probabilities out."""
    precision: Precision
    repository: str | None = None
    """Name on the Hugging Face Hub, for the model card."""
    licence: str | None = None
    """Licence for the model card."""


@dataclass(frozen=True)
class ExportFormat:
    """A format of export.py."""

    description: str
    suffix: str
    """Suffix of the file; "" if the format is a folder."""
    write: Callable[[ExportRequest], str]
    """Writes the export and compares it; returns the result to print. Raises `MismatchError` and `InputError`."""
    open: Callable[[Path, str], Exported] | None = None
    """Opens an exported file in an execution provider. Raises `InputError` for other or damaged files."""
    precisions: tuple[Precision, ...] = ("float32",)
    views: tuple[int, ...] = (1,)


def _write_onnx(request: ExportRequest) -> str:
    from serving.onnx_format import export_onnx

    given = request.out, request.weights, request.clips
    return export_onnx(*given, views=request.views, precision=request.precision)


def _open_onnx(path: Path, provider: str) -> Exported:
    from serving.onnx_format import open_onnx

    return open_onnx(path, provider)


def _write_torch(request: ExportRequest) -> str:
    from serving.torch_format import export_torch

    given = request.out, request.weights, request.clips
    return export_torch(*given, views=request.views, precision=request.precision)


def _open_torch(path: Path, provider: str) -> Exported:
    from serving.torch_format import open_torch

    if provider not in ("auto", "cpu"):
        raise InputError(f"--provider {provider} is for .onnx files; {path} runs in torch, on the CPU")
    return open_torch(path)


def _write_hugging_face(request: ExportRequest) -> str:
    from serving.hugging_face import export_hugging_face
    from serving.model_card import evaluation_of

    evaluation = evaluation_of(request.source, request.weights)
    return export_hugging_face(
        request.out,
        request.weights,
        request.clips,
        evaluation=evaluation,
        name=request.repository,
        licence=request.licence,
    )


FORMATS = {
    "onnx": ExportFormat(
        "a file for ONNX Runtime",
        suffix=".onnx",
        write=_write_onnx,
        open=_open_onnx,
        precisions=("float32", "float16", "int8"),
        views=(1, 3),
    ),
    "torch": ExportFormat(
        "a file of torch.export",
        suffix=".pt2",
        write=_write_torch,
        open=_open_torch,
        precisions=("float32", "float16"),
        views=(1, 3),
    ),
    "huggingface": ExportFormat(
        "a new folder for transformers, with a model card", suffix="", write=_write_hugging_face
    ),
}


def is_exported(path: str) -> bool:
    """Whether `path` is for `open_exported`, by its suffix."""
    return path.endswith((".engine", ".plan", *(each.suffix for each in FORMATS.values() if each.open)))


def open_exported(path: str | Path, provider: str = "cpu") -> Exported:
    """Opens a file that export.py wrote. `provider` is for .onnx files: see `onnx_format.start_session`.

    Raises `InputError` for any other file, a damaged one, or if its runtime is not installed. Files that could run code
    are refused: docs/deploy.md.
    """
    path = Path(path)
    if path.suffix in (".engine", ".plan"):
        raise InputError(
            f"{path}: a TensorRT engine, which has no class names; name the .onnx file that it was built from, with "
            "--provider tensorrt, which uses the engines in the folder NAME.tensorrt beside it"
        )
    openers = {each.suffix: each.open for each in FORMATS.values() if each.open}
    if path.suffix not in openers:
        raise InputError(f"{path}: expected an {' or '.join(openers)} file of export.py")
    if not path.is_file():
        kind = "a folder; expected a file" if path.is_dir() else "no such file"
        raise InputError(f"{path}: {kind}; export.py writes {' and '.join(openers)} files")
    return openers[path.suffix](path, provider)
