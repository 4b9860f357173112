"""Opening what export.py wrote: one call from clips to probabilities, whichever runtime is behind it."""

import json
import mmap
import os
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.weights import from_metadata
from dali_pipelines.errors import InputError

ONNX_FORMAT = "dali-timesformer onnx 1"
TORCH_FORMAT = "dali-timesformer torch 1"
METADATA_FILE = "dali-timesformer.json"
"""Inside a .pt2 file, which is a zip archive: under its folder `extra`."""


@dataclass(frozen=True)
class Exported:
    """A network that runs without our code, and what its file says of it."""

    model: dict[str, Any]
    """Arguments of `TimeSformer`."""
    preprocessing: dict[str, Any]
    """How clips are cut: keys of the section `data` of a config."""
    classes: tuple[str, ...]
    views: int
    """1: clips in, logits out; 3: three views of a video in, the mean of their probabilities out."""
    precision: str
    run: Callable[[Tensor], Tensor]
    """Clips [B, 3, T, S, S] -> logits [B, K]; views [B, 3, 3, T, S, S] -> probabilities [B, K]. float32, CPU."""

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Without the batch: 3, T, S, S, and the views before them where it takes several."""
        frames, side = self.preprocessing["num_frames"], self.preprocessing["crop_size"]
        return (*([self.views] if self.views > 1 else []), 3, frames, side, side)

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


def open_exported(path: str | os.PathLike) -> Exported:
    """Opens an .onnx (in onnxruntime) or .pt2 file (in torch) of export.py, on the CPU.

    Raises `InputError` for any other file, a damaged one and a missing onnxruntime. torch unpickles and evaluates much
    of a .pt2 file; one that holds anything of that kind is refused first: docs/export.md.
    """
    path = Path(path)
    if path.suffix not in (".onnx", ".pt2"):
        raise InputError(f"{path}: expected an .onnx or .pt2 file of export.py")
    if not path.is_file():
        raise InputError(f"{path}: no such file; export.py writes .onnx and .pt2 files")
    return _open_onnx(path) if path.suffix == ".onnx" else _open_torch(path)


def _open_onnx(path: Path) -> Exported:
    try:
        import onnxruntime
    except ImportError:
        raise InputError(f"{path}: to open it: pip install onnxruntime") from None
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            may_loop = _may_loop(content)
    except (ValueError, IndexError):  # an empty file, or no protocol buffer
        raise InputError(f"{path}: not an ONNX file, or a damaged one") from None
    if may_loop:
        raise InputError(f"{path}: not opened, as it holds what export.py does not write: loops or functions")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors, which are raised besides
    try:
        session = onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's kinds have no common base
        raise InputError(f"{path}: not an ONNX file, or a damaged one ({_first_line(error)})") from None
    exported = _described(path, session.get_modelmeta().custom_metadata_map, ONNX_FORMAT, runner(session))
    inputs, outputs = session.get_inputs(), session.get_outputs()
    given = [[each.name for each in inputs], *(each.shape[1:] for each in (*inputs, *outputs))]
    if given != [["clips"], list(exported.input_shape), [len(exported.classes)]]:
        raise InputError(f"{path}: damaged: its network is not the one that its metadata speaks of")
    return exported


def runner(session) -> Callable[[Tensor], Tensor]:
    """`Exported.run` by an onnxruntime session."""

    def run(clips: Tensor) -> Tensor:
        try:
            return torch.from_numpy(session.run(None, {"clips": clips.numpy()})[0])
        except Exception as error:  # onnxruntime's kinds have no common base
            raise InputError(f"the exported network cannot be run ({_first_line(error)})") from None

    return run


def _may_loop(model: mmap.mmap) -> bool:
    """Whether a serialized ModelProto has nodes with graphs of their own (Loop, If, Scan), or functions."""
    for number, start, end in _messages(model, 0, len(model)):
        if number == 25:  # functions
            return True
        nodes = [each for each in _messages(model, start, end) if each[0] == 1] if number == 7 else []  # graph.node
        attributes = [each for node in nodes for each in _messages(model, *node[1:]) if each[0] == 5]
        if any(
            each[0] in (6, 11) for attribute in attributes for each in _messages(model, *attribute[1:])
        ):  # g, graphs
            return True
    return False


def _messages(data: mmap.mmap, place: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(field, start, end) of each field with a length in a protocol buffer. Raises ValueError and IndexError."""

    def varint() -> int:
        nonlocal place
        value = shift = 0
        while True:
            byte = data[place]
            place += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
            if shift > 63:
                raise ValueError("a number of more than 64 bits")

    while place < end:
        field, wire = divmod(varint(), 8)
        if wire == 2:
            size = varint()
            yield field, place, place + size
            place += size
        elif wire == 0:
            varint()
        elif wire in (1, 5):
            place += 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire}")
    if place > end:
        raise ValueError("a field is longer than what it is in")


def _open_torch(path: Path) -> Exported:
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith(f"/extra/{METADATA_FILE}")]
            metadata = json.loads(archive.read(names[0])) if names else {}
            # Before torch opens it: what is no file of ours is not opened at all.
            exported = _described(path, metadata, TORCH_FORMAT, run=None)
            if problem := _problem(archive, path.stat().st_size):
                raise InputError(f"{path}: not opened, as it holds what export.py does not write: {problem}")
            if (damaged := archive.testzip()) is not None:
                raise InputError(f"{path}: damaged: the checksum of {damaged} in it is wrong")
    except InputError:
        raise
    except Exception as error:  # zipfile's, zlib's and json's
        raise InputError(f"{path}: not a .pt2 file, or a damaged one ({_first_line(error)})") from None
    try:
        network = torch.export.load(path).module()
    except Exception as error:  # of another version of torch, most likely; torch raises a dozen kinds
        raise InputError(f"{path}: torch {torch.__version__} cannot open it ({_first_line(error)})") from None

    def run(clips: Tensor) -> Tensor:
        with torch.inference_mode():
            return network(clips)

    return Exported(**vars(exported) | {"run": run})


_MEMBERS = re.compile(
    r"[^/]+/(data/(weights/weight_\d+|constants/tensor_\d+|(weights|constants)/model_\w+_config\.json)"
    r"|data/sample_inputs/model\.pt|models/model\.json|archive_format|archive_version|byteorder"
    rf"|\.data/(version|serialization_id)|extra/{re.escape(METADATA_FILE)})"
)
_SYMBOLS = r"Symbol\('[su]\d+'(, \w+=True)*\)|Integer\(-?\d+\)|(Mul|Add|Mod|FloorDiv|Max|Min)\(|[ ,)]"
_SPECIFICATION = r'(\w|[][{}:, ]|"(type|context|children_spec|null|\[\]|builtins\.(tuple|list|dict))")*'
_TEXTS = {  # the values of these keys, wherever they are; others are words
    "target": r"torch\.ops\.aten\.(?!from_file)\w+\.\w+|_operator\.(add|sub|mul|neg|mod|floordiv|eq|ne|ge|le|gt|lt)",
    "expr_str": f"({_SYMBOLS})*",
    "nn_module_stack": r"[\w.,;@]*",
    "torch_fn": r"[\w.;]*",
    "in_spec": _SPECIFICATION,
    "out_spec": _SPECIFICATION,
    "guards_code": r"(?!)",
}
_WORD = r"[\w.+-]*"


def _problem(archive: zipfile.ZipFile, size: int) -> str:
    """What in a .pt2 file of `size` bytes could make torch 2.13 run code, or fill the memory; "" for nothing. torch
    unpickles what is marked so, looks functions up by name, makes Python of the names of values, and evaluates
    expressions and guards."""
    members = archive.infolist()
    names = [member.filename.lower() for member in members]  # as torch looks them up
    if len(set(names)) < len(names) or len({name.partition("/")[0] for name in names}) > 1:
        return "a member twice, or several folders"
    if any(member.compress_type for member in members) or sum(member.file_size for member in members) > size:
        return "compressed members"
    for member in members:
        if not _MEMBERS.fullmatch(member.filename):
            return repr(member.filename)
        if member.filename.endswith(".pt") and member.file_size:
            return f"{member.filename}, a pickle"
        if re.search(r"/(model|\w+_config)\.json$", member.filename):
            content = json.loads(archive.read(member))
            if any(entry["use_pickle"] is not False for entry in content.get("config", {}).values()):
                return f"pickles, says {member.filename}"
            if text := _odd_text(content):
                return text
    return ""


def _odd_text(value: Any, key: str = "") -> str:
    """The first text in `value`, or key of it, that may be more than a name; "" for none."""
    if isinstance(value, str):
        return "" if re.fullmatch(_TEXTS.get(key, _WORD), value) else f"{key or 'a key'} {value[:80]!r}"
    if isinstance(value, dict):
        pairs = [("", name) for name in value] + list(value.items())
    else:
        pairs = [(key, each) for each in value] if isinstance(value, list) else []
    return next(filter(None, (_odd_text(each, name) for name, each in pairs)), "")


def _described(
    path: Path, metadata: Mapping[str, str], expected: str, run: Callable[[Tensor], Tensor] | None
) -> Exported:
    if not isinstance(metadata, Mapping) or metadata.get("format") != expected:
        raise InputError(f"{path}: not a file that export.py wrote; its metadata lacks the format {expected!r}")
    try:
        model, preprocessing, classes = from_metadata(metadata)
        exported = Exported(model, preprocessing, classes, int(metadata["views"]), metadata["precision"], run)
        if exported.views not in (1, 3):
            raise ValueError(f"views is {exported.views}")
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: its metadata is not what export.py writes ({error})") from None
    return exported


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
