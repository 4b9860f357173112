"""Writes files of torch.export (.pt2), and opens them if nothing in them could run code."""

import json
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.weights import Weights
from dali_pipelines.errors import InputError
from model.pretrained_files import memory_for
from serving.exported import Exported, Precision, first_line, read_header, write_header
from serving.verification import (
    Classifier,
    Clips,
    any_batch_size,
    compare_with_original,
    example_input,
    quiet,
    verified,
)

FORMAT = "dali-timesformer torch 1"
METADATA_FILE = "dali-timesformer.json"
"""The name in the folder `extra` of a .pt2 file, which is a zip archive."""


def export_torch(
    path: Path, weights: Weights, clips: Clips, *, views: int = 1, precision: Precision = "float32"
) -> str:
    """Writes a .pt2 file, loads it and compares it; returns the result to print. Raises `MismatchError`."""
    if precision == "int8":
        raise InputError("--precision int8 needs --format onnx; expected float32 or float16")
    network = Classifier(weights, views=views, precision=precision)
    metadata = write_header(weights, format=FORMAT, views=views, precision=precision)
    with verified(path) as unverified:
        with quiet():
            program = torch.export.export(network, (example_input(weights, views),), dynamic_shapes=any_batch_size())
            program.example_inputs = None  # they would be pickled into the file
            for node in program.graph.nodes:
                node.meta.pop("stack_trace", None)  # file names and source lines of this machine
            torch.export.save(program, unverified, extra_files={METADATA_FILE: json.dumps(metadata)})
            run = open_torch(unverified).run
        result = compare_with_original(weights, run, clips, views=views, precision=precision, runtime="torch.export")
    return f"{result}\nsaved to {path}: {path.stat().st_size / 2**20:.1f} MiB"


# -- opening --


def open_torch(path: Path) -> Exported:
    """Opens the file in torch, on the CPU. Raises `InputError` for other or damaged files.

    torch unpickles and evaluates much of a .pt2 file, so a file with such content is refused first: docs/deploy.md.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if _is_compressed(archive, path.stat().st_size):  # before anything is unpacked
                raise InputError(f"{path}: refused, because export.py never writes compressed members")
            names = [name for name in archive.namelist() if name.endswith(f"/extra/{METADATA_FILE}")]
            metadata = json.loads(archive.read(names[0])) if names else {}
            # Check before torch opens it; torch never opens a file that export.py did not write.
            header = read_header(path, metadata, format=FORMAT)
            if problem := _forbidden_content(archive):
                raise InputError(f"{path}: refused, because export.py never writes {problem}")
            if (damaged := archive.testzip()) is not None:
                raise InputError(f"{path}: damaged: the checksum of {damaged} in it is wrong")
    except InputError:
        raise
    except Exception as error:  # from zipfile, zlib or json
        raise InputError(f"{path}: not a .pt2 file, or a damaged one ({first_line(error)})") from None
    try:
        with memory_for(path):
            network = torch.export.load(path).module()
    except Exception as error:  # usually a file of another torch version; torch raises a dozen types
        raise InputError(f"{path}: torch {torch.__version__} cannot open it ({first_line(error)})") from None

    def run(clips: Tensor) -> Tensor:
        try:
            with torch.inference_mode():
                return network(clips)
        except Exception as error:  # of any operator
            raise InputError(f"{path}: the exported network cannot be run ({first_line(error)})") from None

    return Exported(**vars(header), run=run, runtime="torch.export: cpu")


_MEMBERS = re.compile(
    r"[^/]+/(data/(weights/weight_\d+|constants/tensor_\d+|(weights|constants)/model_\w+_config\.json)"
    r"|data/sample_inputs/model\.pt|models/model\.json|archive_format|archive_version|byteorder"
    rf"|\.data/(version|serialization_id)|extra/{re.escape(METADATA_FILE)})"
)
_SYMBOLS = r"Symbol\('[su]\d+'(, \w+=True)*\)|Integer\(-?\d+\)|(Mul|Add|Mod|FloorDiv|Max|Min)\(|[ ,)]"
_SPECIFICATION = r'(\w|[][{}:, ]|"(type|context|children_spec|null|\[\]|builtins\.(tuple|list|dict))")*'
_TEXTS = {  # patterns for the values of these keys, at any depth; other values are words
    "target": r"torch\.ops\.aten\.(?!from_file)\w+\.\w+|_operator\.(add|sub|mul|neg|mod|floordiv|eq|ne|ge|le|gt|lt)",
    "expr_str": f"({_SYMBOLS})*",
    "nn_module_stack": r"[\w.,;@]*",
    "torch_fn": r"[\w.;]*",
    "in_spec": _SPECIFICATION,
    "out_spec": _SPECIFICATION,
    "guards_code": r"(?!)",
}
_WORD = r"[\w.+-]*"


def _is_compressed(archive: zipfile.ZipFile, size: int) -> bool:
    """Whether members of a file of `size` bytes are compressed, or share their bytes."""
    members = archive.infolist()
    return any(member.compress_type for member in members) or sum(member.file_size for member in members) > size


def _forbidden_content(archive: zipfile.ZipFile) -> str:
    """Names the content of a .pt2 file that could make torch 2.13 run code, or returns "". torch unpickles entries
    marked as pickles, looks up functions by name, generates Python from the names of values, and evaluates expressions
    and guards."""
    members = archive.infolist()
    names = [member.filename.lower() for member in members]  # as torch looks them up
    if len(set(names)) < len(names) or len({name.partition("/")[0] for name in names}) > 1:
        return "a member twice, or several folders"
    for member in members:
        if not _MEMBERS.fullmatch(member.filename):
            return repr(member.filename)
        if member.filename.endswith(".pt") and member.file_size:
            return f"{member.filename}, a pickle"
        if re.search(r"/(model|\w+_config)\.json$", member.filename):
            content = json.loads(archive.read(member))
            if any(entry["use_pickle"] is not False for entry in content.get("config", {}).values()):
                return f"pickles ({member.filename})"
            if text := _suspicious_text(content):
                return text
    return ""


def _suspicious_text(value: Any, key: str = "") -> str:
    """Returns the first string in `value`, or key, that may be more than a name; "" if there is none."""
    if isinstance(value, str):
        return "" if re.fullmatch(_TEXTS.get(key, _WORD), value) else f"{key or 'a key'} {value[:80]!r}"
    if isinstance(value, dict):
        pairs = [("", name) for name in value] + list(value.items())
    else:
        pairs = [(key, each) for each in value] if isinstance(value, list) else []
    return next(filter(None, (_suspicious_text(each, name) for name, each in pairs)), "")
