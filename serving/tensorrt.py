"""Builds TensorRT engines with onnxruntime's TensorRT provider."""

from pathlib import Path

from common.weights import Weights
from dali_pipelines.errors import InputError
from serving.exported import Precision
from serving.onnx_format import (
    MAX_BATCH,
    TENSORRT,
    engine_folder,
    open_onnx,
    require_onnx,
    runner,
    start_session,
)
from serving.verification import Clips, compare_with_original, verified


def require_tensorrt() -> None:
    """Raises `InputError` if onnxruntime has no TensorRT provider."""
    require_onnx()
    import onnxruntime

    available = onnxruntime.get_available_providers()
    if TENSORRT not in available:
        raise InputError(
            f"--tensorrt: onnxruntime {onnxruntime.__version__} here has {', '.join(available)}, but not "
            "TensorrtExecutionProvider, which needs onnxruntime-gpu and TensorRT"
        )


def build_tensorrt(path: Path, weights: Weights, clips: Clips, *, views: int, precision: Precision) -> str:
    """Builds an engine for 1 to 8 clips from an .onnx file, in a folder beside it, and compares it; returns the result
    to print. TensorRT computes float32 in TF32, so the limits are those of float16. Raises `MismatchError`."""
    exported = open_onnx(path)
    folder = engine_folder(path)
    with verified(folder) as unverified:
        unverified.mkdir()
        run = runner(start_session(path, exported, "tensorrt", engines=unverified), most=MAX_BATCH)
        result = compare_with_original(weights, run, clips, views=views, precision="float16", runtime="TensorRT")
    return f"{result}\nengine in {folder}: predict.py -w {path} uses it"
