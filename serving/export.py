"""Weights as files that run without our code: written, opened again, compared with the network, then put in place."""

import contextlib
import json
import logging
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from common.config import Config, clip_settings, read_run_config
from common.distributed import DistributedContext
from common.labels import read_manifest
from common.weights import Weights, atomic_rename, atomic_write, to_metadata
from dali_pipelines import ClipLoader, InputError, Manifest
from dali_pipelines.manifest import Video
from dali_pipelines.probe import probe
from serving.exported import METADATA_FILE, ONNX_FORMAT, TORCH_FORMAT, open_exported, runner

Precision = Literal["float32", "float16", "int8"]

OPSET = 20
"""The first with GELU as one operator."""
TRITON_MAX_BATCH = 8
_MOST_VIDEOS = 16
"""Of a manifest; three views of each are compared."""
_LARGEST_ONNX = 1536 * 2**20  # bytes: from here on torch writes a second file, as one of more than 2 GiB cannot be


class MismatchError(Exception):
    """The exported network says something else than the network: on which clip, how far, and where the file is."""


# -- clips to compare on --


@dataclass(frozen=True)
class Clips:
    views: Tensor
    """[N, 3, 3, T, S, S], three views of each video, normalised."""
    names: list[str]
    said: str
    """Where they are from, for people."""


def clips_to_compare(
    weights: Weights, config: Config, videos: Sequence[str], process: DistributedContext, *, beside: Path
) -> Clips:
    """Three views of each of `videos` (files, or a manifest), or of the run's own validation videos, or made up.

    beside: the weights file; a run's config.yaml there names the manifest, where `config` names none.
    """
    manifest, said = _videos(config, videos, beside)
    if manifest is None:
        made = f"{said}compared on synthetic clips; name real ones with --videos"
        return Clips(_synthetic(weights), [f"synthetic clip {number}" for number in range(4)], made)
    loader = ClipLoader(
        manifest,
        **clip_settings(config.data, "test"),
        batch_size=min(4, len(manifest)),
        device="cpu",
        workers=process.workers(config.data.workers, len(manifest)),
    )
    views, names = [], []
    for batch in loader:
        views.append(batch.clips[batch.valid].clone())
        names += [manifest[number].path for number in batch.sample_ids[batch.valid].tolist()]
    if not names:
        fault = loader.stats.faults[0]
        raise InputError(f"{fault.path}: {fault.reason}; and so for all of {said}: name others with --videos")
    unreadable = f" ({len(manifest) - len(names)} of them unreadable)" if len(names) < len(manifest) else ""
    return Clips(torch.cat(views), names, f"compared on {said}{unreadable}")


def _videos(config: Config, videos: Sequence[str], beside: Path) -> tuple[Manifest | None, str]:
    if videos and not videos[0].endswith(".csv"):
        return Manifest([_probe(path) for path in videos]), f"{len(videos)} video{'s' * (len(videos) > 1)}"
    if len(videos) > 1:
        raise InputError(f"--videos {' '.join(videos)}: expected files of videos, or one manifest")
    path = videos[0] if videos else config.data.test or config.data.val
    if path is None and (run := beside.with_name("config.yaml")).is_file():
        try:
            path = read_run_config(run).data.val
        except InputError as error:
            return None, f"{error}; "
        if path is not None and not Path(path).is_file():  # the run was elsewhere, or its data has gone
            return None, f"{run} names {path}, which is not there; "
    if path is None:
        return None, ""
    manifest = read_manifest(path, key="--videos")
    count = min(len(manifest), _MOST_VIDEOS)
    # Spread over the manifest, which is often sorted by class.
    chosen = [manifest[number * len(manifest) // count] for number in range(count)]
    return Manifest(chosen, root=manifest.root), f"{count} of the {len(manifest)} videos in {path}"


def _probe(path: str) -> Video:
    try:
        return probe(path)
    except InputError as error:
        raise InputError(f"--videos {path}: {error}") from None


def _synthetic(weights: Weights) -> Tensor:
    """Four smooth random videos [4, 3, 3, T, S, S], always the same."""
    frames, side = weights.preprocessing["num_frames"], weights.preprocessing["crop_size"]
    coarse = torch.rand(4 * 3 * 3, frames, 8, 8, generator=torch.Generator().manual_seed(0))
    pictures = interpolate(coarse, (side, side), mode="bilinear").view(4, 3, 3, frames, side, side)
    mean, std = (torch.tensor(weights.preprocessing[key]).view(3, 1, 1, 1) for key in ("mean", "std"))
    return (pictures - mean) / std


# -- comparing --


def compare(
    reference: Callable[[Tensor], Tensor],
    exported: Callable[[Tensor], Tensor],
    clips: Clips,
    *,
    views: int,
    precision: Precision,
) -> str:
    """Both on all clips, first one alone, then three at once; what was found, in words, or `MismatchError`.

    float32: no value differs by more than 1e-3; float16: by more than a hundredth of the clip's largest logit, or of 1
    where that is more; int8: anything but the top-1 may differ. The top-1 must be the same in all of them.
    """
    inputs = clips.views if views > 1 else clips.views.flatten(0, 1)
    unit = "probability" if views > 1 else "logit"
    count, largest, wrong = len(inputs), 0.0, {}
    for batch in [[0], *([(start + k) % count for k in range(3)] for start in range(0, count, 3))]:
        expected, found = reference(inputs[batch]), exported(inputs[batch])
        if found.shape != expected.shape or found.dtype != torch.float32:
            raise MismatchError(f"it gives {found.dtype} {tuple(found.shape)}; expected {tuple(expected.shape)}")
        for number, ours, theirs in zip(batch, expected, found, strict=True):
            difference, limit = (ours - theirs).abs().max().item(), _limit(precision, ours)
            largest = max(largest, difference)
            if not difference <= limit:  # NaN is not
                wrong.setdefault(number, f"a {unit} differs by {difference:.2g}, more than {limit:.2g}")
            elif ours.argmax() != theirs.argmax():
                top = f"the top-1 is class {theirs.argmax()}, that of the network is {ours.argmax()}"
                wrong.setdefault(number, f"{top}; a {unit} differs by {difference:.2g}")
    if wrong:
        number, what = next(iter(wrong.items()))
        name = clips.names[number] if views > 1 else f"{clips.names[number // 3]}, view {number % 3 + 1} of 3"
        raise MismatchError(f"{name}: {what} ({precision}; so or alike for {len(wrong)} of {count})")
    return f"largest difference of a {unit} {largest:.2g}, same top-1 for all {count}"


def _limit(precision: Precision, expected: Tensor) -> float:
    if precision == "float32":
        return 1e-3
    return 1e-2 * max(1.0, expected.abs().max().item()) if precision == "float16" else float("inf")


def measure(runs: Sequence[Callable[[Tensor], Tensor]], inputs: Tensor) -> list[float]:
    """Milliseconds that each of `runs` takes for one of `inputs`, all at once: the best of three after one to warm up.
    In turn, so that what else the machine does slows all of them."""
    times = [[] for _ in runs]
    for _ in range(4):
        for run, its_times in zip(runs, times, strict=True):
            begin = time.perf_counter()
            run(inputs)
            its_times.append(time.perf_counter() - begin)
    return [min(its_times[1:]) * 1e3 / len(inputs) for its_times in times]


def check(
    weights: Weights,
    run: Callable[[Tensor], Tensor],
    clips: Clips,
    *,
    views: int = 1,
    precision: Precision = "float32",
    runtime: str,
) -> str:
    """`compare` with the network of `weights` in float32, and how fast both are; `MismatchError`."""
    network = Classifier(weights, views=views, precision="float32")

    def reference(inputs: Tensor) -> Tensor:
        with torch.inference_mode():
            return network(inputs)

    found = compare(reference, run, clips, views=views, precision=precision)
    inputs = (clips.views if views > 1 else clips.views.flatten(0, 1))[:3]
    before, after = measure([reference, run], inputs)
    return (
        f"{clips.said}: {found}\n"
        f"{'a video of 3 views' if views > 1 else 'a clip'}: {before:.4g} ms in torch (float32), {after:.4g} ms in "
        f"{runtime} ({precision}), {before / after:.2f} times as fast; batches of {len(inputs)}, "
        f"{torch.get_num_threads()} CPU threads"
    )


@contextlib.contextmanager
def verified(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to: what is there gets the name `path` when the block ends, NAME.mismatch when it
    raises `MismatchError`, and is deleted when it raises anything else. What was at `path` stays until then."""
    unverified, mismatch = (path.with_name(f"{path.stem}.{what}{path.suffix}") for what in ("unverified", "mismatch"))
    _delete(unverified)
    try:
        yield unverified
    except MismatchError as error:
        _delete(mismatch)
        unverified.rename(mismatch)
        kept = f"; {path} is what it was" if path.is_file() else ""
        raise MismatchError(f"{error}. What was written is kept as {mismatch}{kept}") from None
    except BaseException:
        _delete(unverified)
        raise
    atomic_rename(unverified, path)


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# -- writing --


class Classifier(nn.Module):
    """What is exported. views 1: clips [B, 3, T, S, S] -> logits [B, K]; 3: views [B, 3, 3, T, S, S] -> mean of their
    probabilities [B, K]. float32 in and out; with float16, all between them but the head is in float16."""

    def __init__(self, weights: Weights, *, views: int, precision: Precision):
        super().__init__()
        self.dtype = torch.float16 if precision == "float16" else torch.float32
        self.views = views
        self.network = weights.build().to(self.dtype)
        self.network.head.float()  # logits in float16 would tie
        self.requires_grad_(False).eval()

    def forward(self, clips: Tensor) -> Tensor:
        if self.views > 1:
            clips = clips.flatten(0, 1)
        logits = self.network.head(self.network.forward_features(clips.to(self.dtype)).float())
        return logits.softmax(1).unflatten(0, (-1, self.views)).mean(1) if self.views > 1 else logits


def metadata(weights: Weights, *, format: str, views: int, precision: Precision) -> dict[str, str]:
    return to_metadata(weights, format) | {"views": str(views), "precision": precision}


def export_onnx(path: Path, weights: Weights, clips: Clips, *, views: int = 1, precision: Precision = "float32") -> str:
    """Writes an .onnx file and compares it in onnxruntime; what was found, in words. Raises `MismatchError`."""
    _require_onnx()
    with verified(path) as unverified:
        with _quiet():
            _write_onnx(unverified, weights, views, precision)
        found = check(
            weights, open_exported(unverified).run, clips, views=views, precision=precision, runtime="onnxruntime"
        )
    return f"{found}\nsaved to {path}: {path.stat().st_size / 2**20:.1f} MiB, opset {OPSET}"


def _write_onnx(path: Path, weights: Weights, views: int, precision: Precision) -> None:
    import onnx

    network = Classifier(weights, views=views, precision=precision)
    if sum(value.nbytes for value in network.state_dict().values()) > _LARGEST_ONNX:
        raise InputError(
            f"{path}: more than 1.5 GiB, too large for one ONNX file; take --format torch, or --precision float16"
        )
    program = torch.onnx.export(
        network,
        (_example(weights, views),),
        dynamo=True,
        input_names=["clips"],
        output_names=["probabilities" if views > 1 else "logits"],
        dynamic_shapes=_any_batch(),
        opset_version=OPSET,
        verbose=False,
    )
    for node in program.model.graph:
        node.metadata_props.clear()  # file names and source lines of this machine, half of a small file
    described = metadata(weights, format=ONNX_FORMAT, views=views, precision=precision)
    program.model.metadata_props.update(described)
    program.save(path)
    if precision == "int8":
        _quantize(path, described)
    onnx.checker.check_model(path, full_check=True)


def _quantize(path: Path, described: dict[str, str]) -> None:
    """Products with weights in int8, their other factor quantized as it comes; attention and the head stay float32."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    # It folds the split of the qkv weights, which are no constants to the quantizer otherwise.
    quant_pre_process(path, path, skip_symbolic_shape=True)
    # 7 bits: with 8, CPUs without VNNI saturate. One scale for each column of a weight.
    quantize_dynamic(
        path, path, op_types_to_quantize=["MatMul"], per_channel=True, reduce_range=True, weight_type=QuantType.QInt8
    )
    model = onnx.load(path)
    onnx.helper.set_model_props(model, described)
    onnx.save(model, path)


def export_torch(
    path: Path, weights: Weights, clips: Clips, *, views: int = 1, precision: Precision = "float32"
) -> str:
    """Writes a .pt2 file and compares it, loaded again; what was found, in words. Raises `MismatchError`."""
    if precision == "int8":
        raise InputError("--precision int8 is for --format onnx; expected float32 or float16")
    network = Classifier(weights, views=views, precision=precision)
    described = metadata(weights, format=TORCH_FORMAT, views=views, precision=precision)
    with verified(path) as unverified:
        with _quiet():
            program = torch.export.export(network, (_example(weights, views),), dynamic_shapes=_any_batch())
            program.example_inputs = None  # they would be in the file, as a pickle
            for node in program.graph.nodes:
                node.meta.pop("stack_trace", None)  # file names and source lines of this machine
            torch.export.save(program, unverified, extra_files={METADATA_FILE: json.dumps(described)})
            exported = open_exported(unverified)
        found = check(weights, exported.run, clips, views=views, precision=precision, runtime="torch.export")
    return f"{found}\nsaved to {path}: {path.stat().st_size / 2**20:.1f} MiB"


def _example(weights: Weights, views: int) -> Tensor:
    """Two of what the network takes: of one, export would take the batch for a constant."""
    return _synthetic(weights)[:2] if views > 1 else _synthetic(weights)[:2, 0]


def _any_batch() -> tuple[dict[int, torch.export.Dim]]:
    return ({0: torch.export.Dim("batch", min=1)},)


def _require_onnx() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise InputError(f"--format onnx needs {error.name}: pip install onnx onnxscript onnxruntime") from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' advice to their developers."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


# -- servers --


def triton_name(config: Config, *, beside: Path) -> str:
    """The name that the config gives, else the one of the run whose config.yaml lies beside the weights."""
    if config.name == Config.name and (run := beside.with_name("config.yaml")).is_file():
        with contextlib.suppress(InputError):
            config = read_run_config(run)
    if Path(config.name).name != config.name or config.name == "..":
        raise InputError(f"name is {config.name!r}, which is to be a folder of --triton; expected no / in it")
    return config.name


def write_triton(folder: Path, onnx_file: Path, weights: Weights, *, name: str, views: int) -> None:
    """A model repository of Triton's ONNX Runtime backend: config.pbtxt, labels.txt, and `onnx_file` as version 1."""
    model = folder / name
    (model / "1").mkdir(parents=True, exist_ok=True)
    frames, side = weights.preprocessing["num_frames"], weights.preprocessing["crop_size"]
    dims = ", ".join(map(str, (*([views] if views > 1 else []), 3, frames, side, side)))
    config = f"""\
name: {json.dumps(name, ensure_ascii=False)}
platform: "onnxruntime_onnx"
max_batch_size: {TRITON_MAX_BATCH}
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
    labels = "".join(f"{' '.join(each.split())}\n" for each in weights.classes)  # a line each, whatever is in them
    for path, text in ((model / "labels.txt", labels), (model / "config.pbtxt", config)):
        with atomic_write(path) as file:
            file.write(text.encode(errors="backslashreplace"))
    if (model / "1" / "model.onnx").resolve() != onnx_file.resolve():
        with atomic_write(model / "1" / "model.onnx") as file, open(onnx_file, "rb") as source:
            shutil.copyfileobj(source, file)


def require_tensorrt() -> None:
    _require_onnx()
    import onnxruntime

    available = onnxruntime.get_available_providers()
    if "TensorrtExecutionProvider" not in available:
        raise InputError(
            f"--tensorrt: onnxruntime {onnxruntime.__version__} here has {', '.join(available)}, and not "
            "TensorrtExecutionProvider; it comes with onnxruntime-gpu, and TensorRT beside it"
        )


def build_tensorrt(path: Path, weights: Weights, clips: Clips, *, views: int, precision: Precision) -> str:
    """Has onnxruntime's TensorRT provider build an engine of an .onnx file, for 1 to 8 clips, into a folder beside it,
    and compares it. TensorRT takes TF32 for float32, therefore float16's limits. Raises `MismatchError`."""
    import onnxruntime

    exported = open_exported(path)
    folder = path.with_suffix(".tensorrt")
    shape = "x".join(map(str, exported.input_shape))
    options = {
        "trt_engine_cache_enable": True,
        "trt_engine_cache_path": str(folder),
        "trt_fp16_enable": precision == "float16",
        "trt_profile_min_shapes": f"clips:1x{shape}",
        "trt_profile_opt_shapes": f"clips:{TRITON_MAX_BATCH}x{shape}",
        "trt_profile_max_shapes": f"clips:{TRITON_MAX_BATCH}x{shape}",
    }
    folder.mkdir(exist_ok=True)
    providers = [("TensorrtExecutionProvider", options), "CUDAExecutionProvider", "CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(str(path), providers=providers)
    if "TensorrtExecutionProvider" not in session.get_providers():
        raise InputError(f"{path}: onnxruntime could not start TensorrtExecutionProvider; what it said stands above")

    try:
        found = check(weights, runner(session), clips, views=views, precision="float16", runtime="TensorRT")
    except MismatchError as error:
        raise MismatchError(f"{error}. The engine is kept in {folder}") from None
    return f"{found}\nengine in {folder}"
