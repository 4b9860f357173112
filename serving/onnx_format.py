"""Writes and quantizes ONNX files, and opens them in onnxruntime."""

import mmap
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from common.weights import Weights
from dali_pipelines.errors import InputError
from serving.exported import Exported, ExportHeader, Precision, first_line, read_header, write_header
from serving.verification import (
    Classifier,
    Clips,
    any_batch_size,
    compare_with_original,
    example_input,
    quiet,
    verified,
)

if TYPE_CHECKING:
    import onnxruntime

FORMAT = "dali-timesformer onnx 1"
OPSET = 20
"""The first opset with GELU as one operator."""
_LARGEST = 1536 * 2**20  # bytes: above this torch writes a second file, as one file cannot exceed 2 GiB


def export_onnx(path: Path, weights: Weights, clips: Clips, *, views: int = 1, precision: Precision = "float32") -> str:
    """Writes an .onnx file and compares it in onnxruntime; returns the result to print. Raises `MismatchError`."""
    require_onnx()
    with verified(path) as unverified:
        with quiet():
            _write(unverified, weights, views, precision)
        run = open_onnx(unverified).run
        result = compare_with_original(weights, run, clips, views=views, precision=precision, runtime="onnxruntime")
    # TensorRT would use the engines of an older file: it does not notice that the weights are different.
    shutil.rmtree(engine_folder(path), ignore_errors=True)
    return f"{result}\nsaved to {path}: {path.stat().st_size / 2**20:.1f} MiB, opset {OPSET}"


def require_onnx() -> None:
    """Raises `InputError` if a package for writing or running ONNX files is missing."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise InputError(f"--format onnx needs {error.name}: pip install onnx onnxscript onnxruntime") from None


def _write(path: Path, weights: Weights, views: int, precision: Precision) -> None:
    import onnx

    network = Classifier(weights, views=views, precision=precision)
    if sum(value.nbytes for value in network.state_dict().values()) > _LARGEST:
        raise InputError(
            f"{path}: more than 1.5 GiB, too large for one ONNX file; use --format torch, or --precision float16"
        )
    program = torch.onnx.export(
        network,
        (example_input(weights, views),),
        dynamo=True,
        input_names=["clips"],
        output_names=["probabilities" if views > 1 else "logits"],
        dynamic_shapes=any_batch_size(),
        opset_version=OPSET,
        verbose=False,
    )
    assert program is not None  # with dynamo=True
    for node in program.model.graph:
        node.metadata_props.clear()  # file names and source lines of this machine, half of a small file
    metadata = write_header(weights, format=FORMAT, views=views, precision=precision)
    program.model.metadata_props.update(metadata)
    program.save(path)
    if precision == "int8":
        _quantize(path, metadata)
    onnx.checker.check_model(path, full_check=True)


def _quantize(path: Path, metadata: dict[str, str]) -> None:
    """Quantizes products with weights to int8, with dynamically quantized activations; attention and the head stay
    float32."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    # Folds the split of the qkv weights, which the quantizer would not recognise as constants.
    quant_pre_process(path, path, skip_symbolic_shape=True)
    # 7 bits: with 8, CPUs without VNNI saturate. Each column of a weight has its own scale.
    quantize_dynamic(
        path, path, op_types_to_quantize=["MatMul"], per_channel=True, reduce_range=True, weight_type=QuantType.QInt8
    )
    model = onnx.load(path)
    onnx.helper.set_model_props(model, metadata)
    onnx.save(model, path)


# -- opening --


def open_onnx(path: Path, provider: str = "cpu") -> Exported:
    """Opens an ONNX file in onnxruntime. `provider`: see `start_session`. Raises `InputError` for other or damaged
    files, and if the provider does not start."""
    try:
        import onnxruntime
    except ImportError:
        raise InputError(f"{path}: cannot be opened without onnxruntime: pip install onnxruntime") from None
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            may_loop = _may_loop(content)
    except (ValueError, IndexError):  # an empty file, or not a protocol buffer
        raise InputError(f"{path}: not an ONNX file, or a damaged one") from None
    if may_loop:
        raise InputError(f"{path}: refused, because export.py never writes loops or functions")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # only errors, which are also raised
    try:
        session = onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors have no common base
        raise InputError(f"{path}: not an ONNX file, or a damaged one ({first_line(error)})") from None
    header = read_header(path, session.get_modelmeta().custom_metadata_map, format=FORMAT)
    inputs, outputs = session.get_inputs(), session.get_outputs()
    found = [[each.name for each in inputs], *(each.shape[1:] for each in (*inputs, *outputs))]
    if found != [["clips"], list(header.input_shape), [len(header.classes)]]:
        raise InputError(f"{path}: damaged: its network does not match its metadata")
    if provider != "cpu":
        session = start_session(path, header, provider, options)
    used = session.get_providers()[0]
    # The profile of TensorRT's engines ends there.
    most = MAX_BATCH if used == TENSORRT else None
    return Exported(**vars(header), run=runner(session, most=most), runtime=f"onnxruntime: {used}")


CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
MAX_BATCH = 8
"""Largest batch of TensorRT's engines, and of Triton."""


def start_session(
    path: Path,
    header: ExportHeader,
    provider: str,
    options: "onnxruntime.SessionOptions | None" = None,
    engines: Path | None = None,
) -> "onnxruntime.InferenceSession":
    """Starts onnxruntime with `provider`: cpu, cuda, tensorrt or the name of another one that is installed, such as
    openvino; "auto" is the best of the first three that starts (tensorrt only if `export.py --tensorrt` has built its
    engines: otherwise that would take minutes). Operators that a provider does not have run on CUDA or the CPU.
    engines: folder of TensorRT's engines; default: `engine_folder`.

    onnxruntime itself falls back to the CPU without an error. This raises `InputError` with what to install.
    """
    import onnxruntime

    available = onnxruntime.get_available_providers()
    names = {name.removesuffix("ExecutionProvider").lower(): name for name in available}
    if provider == "auto":
        wanted = [TENSORRT] if engine_folder(path).is_dir() else []
        wanted = [name for name in (*wanted, CUDA, CPU) if name in available]
    else:
        wanted = [names.get(provider.lower().removesuffix("executionprovider"), "")]
    if not all(wanted):
        packages = {"cuda": "onnxruntime-gpu", "tensorrt": "onnxruntime-gpu and tensorrt"}
        package = packages.get(provider, f"a build of onnxruntime with it, such as onnxruntime-{provider}")
        raise InputError(
            f"--provider {provider}: onnxruntime {onnxruntime.__version__} here has {', '.join(names)}; install "
            f"{package} in place of onnxruntime"
        )
    settings = {TENSORRT: tensorrt_options(engines or engine_folder(path), header), CUDA: {"use_tf32": "0"}}
    problem = ""
    for name in wanted:
        providers = [name, *(each for each in (CUDA, CPU) if each in available and each != name)]
        if name == CPU:
            providers = [CPU]
        try:
            session = onnxruntime.InferenceSession(
                os.fspath(path), options, providers=[(each, settings.get(each, {})) for each in providers]
            )
        except Exception as error:  # onnxruntime's errors have no common base
            problem = f" ({first_line(error)})"
            continue
        if session.get_providers()[0] == name:
            return session
    raise InputError(
        f"--provider {provider}: onnxruntime could not start {wanted[-1]}{problem}; is its driver installed?"
    )


def engine_folder(path: Path) -> Path:
    """The folder of TensorRT's engines for the ONNX file `path`."""
    return path.with_suffix(".tensorrt")


def tensorrt_options(engines: Path, header: ExportHeader) -> dict[str, object]:
    """Options of onnxruntime's TensorRT provider: engines for 1 to 8 clips, kept in the folder `engines`."""
    shape = "x".join(map(str, header.input_shape))
    return {
        "trt_engine_cache_enable": True,
        "trt_engine_cache_path": str(engines),
        "trt_fp16_enable": header.precision == "float16",
        "trt_profile_min_shapes": f"clips:1x{shape}",
        "trt_profile_opt_shapes": f"clips:{MAX_BATCH}x{shape}",
        "trt_profile_max_shapes": f"clips:{MAX_BATCH}x{shape}",
    }


def runner(session: "onnxruntime.InferenceSession", *, most: int | None = None) -> Callable[[Tensor], Tensor]:
    """Returns `Exported.run` for an onnxruntime session, which gets at most `most` inputs at a time."""

    def run(clips: Tensor) -> Tensor:
        try:
            parts = clips.split(most) if most else [clips]
            return torch.cat([torch.from_numpy(session.run(None, {"clips": part.numpy()})[0]) for part in parts])
        except Exception as error:  # onnxruntime's errors have no common base
            raise InputError(f"the exported network cannot be run ({first_line(error)})") from None

    return run


_MODEL_GRAPH, _MODEL_FUNCTIONS, _GRAPH_NODE, _NODE_ATTRIBUTE = 7, 25, 1, 5
_ATTRIBUTE_GRAPHS = (6, 11)
"""Field numbers in onnx.proto."""


def _may_loop(model: mmap.mmap) -> bool:
    """Whether a serialized ModelProto has nodes with graphs of their own (Loop, If, Scan), or functions."""
    for field, start, end in _messages(model, 0, len(model)):
        if field == _MODEL_FUNCTIONS:
            return True
        if field != _MODEL_GRAPH:
            continue
        nodes = [span for number, *span in _messages(model, start, end) if number == _GRAPH_NODE]
        attributes = [span for node in nodes for number, *span in _messages(model, *node) if number == _NODE_ATTRIBUTE]
        if any(number in _ATTRIBUTE_GRAPHS for span in attributes for number, *_ in _messages(model, *span)):
            return True
    return False


def _messages(data: mmap.mmap, place: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yields (field number, start, end) of each length-delimited field of the protocol buffer message data[place:end].
    Raises ValueError and IndexError if it is not one."""

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
        raise ValueError("a field is longer than its message")
