"""Writes a model repository for NVIDIA Triton."""

import contextlib
import json
import shutil
from pathlib import Path

from common.config import Config, read_run_config
from common.weights import Weights, atomic_write
from dali_pipelines.errors import InputError
from serving.onnx_format import MAX_BATCH


def triton_name(config: Config, *, beside: Path) -> str:
    """The model's name: from the config, otherwise from the config.yaml beside the weights."""
    if config.name == Config.name and (run := beside.with_name("config.yaml")).is_file():
        with contextlib.suppress(InputError):
            config = read_run_config(run)
    if Path(config.name).name != config.name or config.name == "..":
        raise InputError(f"name is {config.name!r}, which becomes a folder in --triton; expected no / in it")
    return config.name


def write_triton(folder: Path, onnx_file: Path, weights: Weights, *, name: str, views: int) -> None:
    """Writes a model repository for Triton's ONNX Runtime backend: config.pbtxt, labels.txt, and `onnx_file` as version
    1."""
    model = folder / name
    (model / "1").mkdir(parents=True, exist_ok=True)
    frames, side = weights.preprocessing["num_frames"], weights.preprocessing["crop_size"]
    dims = ", ".join(map(str, (*([views] if views > 1 else []), 3, frames, side, side)))
    config = f"""\
name: {json.dumps(name, ensure_ascii=False)}
platform: "onnxruntime_onnx"
max_batch_size: {MAX_BATCH}
input [
  {{
    name: "clips"
    data_type: TYPE_FP32
    dims: [ {dims} ]
  }}
]
output [
  {{
    name: "{"probabilities" if views > 1 else "logits"}"
    data_type: TYPE_FP32
    dims: [ {len(weights.classes)} ]
    label_filename: "labels.txt"
  }}
]
dynamic_batching {{ }}
"""
    labels = "".join(f"{' '.join(each.split())}\n" for each in weights.classes)  # one line each
    for path, text in ((model / "labels.txt", labels), (model / "config.pbtxt", config)):
        with atomic_write(path) as file:
            file.write(text.encode(errors="backslashreplace"))
    if (model / "1" / "model.onnx").resolve() != onnx_file.resolve():
        with atomic_write(model / "1" / "model.onnx") as file, open(onnx_file, "rb") as source:
            shutil.copyfileobj(source, file)
