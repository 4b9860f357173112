"""Builds TensorRT engines with onnxruntime's TensorRT provider."""

from pathlib import Path

from common.weights import Weights
from dali_pipelines.errors import InputError
from serving import triton
from serving.exported import Precision
from serving.onnx_format import open_onnx, require_onnx, runner
from serving.verification import Clips, MismatchError, compare_with_original


def require_tensorrt() -> None:
    """Raises `InputError` if onnxruntime has no TensorRT provider."""
    require_onnx()
    import onnxruntime

    available = onnxruntime.get_available_providers()
    if "TensorrtExecutionProvider" not in available:
        raise InputError(
            f"--tensorrt: onnxruntime {onnxruntime.__version__} here has {', '.join(available)}, but not "
            "TensorrtExecutionProvider, which needs onnxruntime-gpu and TensorRT"
        )


def build_tensorrt(path: Path, weights: Weights, clips: Clips, *, views: int, precision: Precision) -> str:
    """Builds an engine for 1 to 8 clips from an .onnx file, in a folder beside it, and compares it; returns the result
    to print. TensorRT computes float32 in TF32, so the limits are those of float16. Raises `MismatchError`."""
    import onnxruntime

    exported = open_onnx(path)
    folder = path.with_suffix(".tensorrt")
    shape = "x".join(map(str, exported.input_shape))
    options = {
        "trt_engine_cache_enable": True,
        "trt_engine_cache_path": str(folder),
        "trt_fp16_enable": precision == "float16",
        "trt_profile_min_shapes": f"clips:1x{shape}",
        "trt_profile_opt_shapes": f"clips:{triton.MAX_BATCH}x{shape}",
        "trt_profile_max_shapes": f"clips:{triton.MAX_BATCH}x{shape}",
    }
    folder.mkdir(exist_ok=True)
    providers = [("TensorrtExecutionProvider", options), "CUDAExecutionProvider", "CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(str(path), providers=providers)
    if "TensorrtExecutionProvider" not in session.get_providers():
        raise InputError(f"{path}: onnxruntime could not start TensorrtExecutionProvider; its messages are above")

    try:
        result = compare_with_original(
            weights, runner(session), clips, views=views, precision="float16", runtime="TensorRT"
        )
    except MismatchError as error:
        raise MismatchError(f"{error}. The engine is kept in {folder}") from None
    return f"{result}\nengine in {folder}"
