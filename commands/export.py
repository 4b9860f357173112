"""Writes weights as files that other software runs, and compares them with the network before they get their name.

python export.py -w best.safetensors --format onnx --out best.onnx
python export.py -w best.safetensors --format onnx --views 3 --precision float16 --out best.onnx --videos *.mp4
python export.py -w best.safetensors --format onnx --triton models
python export.py -w best.safetensors --format torch --out best.pt2
python export.py -w best.safetensors --format huggingface --out my_model

Exits with 1 where what was written says something else than the network; it is kept as NAME.mismatch then.
"""

import argparse
import sys
from pathlib import Path

from dali_pipelines.errors import InputError


def main() -> int:
    parser = argparse.ArgumentParser(description="Export weights, and compare what was written with the network.")
    parser.add_argument("-w", "--weights", required=True, help="a run's best.safetensors; with -c also those of others")
    parser.add_argument("-c", "--config", help="YAML file; default: what the weights file says")
    parser.add_argument(
        "-o", "--override", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="over the config's values"
    )
    parser.add_argument("--format", required=True, choices=("onnx", "torch", "huggingface"))
    parser.add_argument(
        "--out", type=Path, metavar="PATH", help="a file (.onnx, .pt2), or for huggingface a new folder"
    )
    parser.add_argument("--precision", choices=("float32", "float16", "int8"), default="float32")
    parser.add_argument(
        "--views", type=int, choices=(1, 3), default=1, help="3: the mean over a video's three crops is in the file"
    )
    parser.add_argument(
        "--videos",
        nargs="+",
        default=[],
        metavar="VIDEO",
        help="to compare on: files, or a manifest (default: the run's)",
    )
    parser.add_argument("--triton", type=Path, metavar="DIR", help="also, or only, write a model repository for Triton")
    parser.add_argument("--tensorrt", action="store_true", help="also build an engine, through onnxruntime's provider")
    arguments = parser.parse_args()
    _check(arguments)

    import torch

    from common.distributed import start_process
    from common.weights import open_weights
    from serving.export import (
        MismatchError,
        build_tensorrt,
        clips_to_compare,
        export_onnx,
        export_torch,
        require_tensorrt,
        triton_name,
        write_triton,
    )
    from serving.hugging_face import export_hugging_face

    if arguments.tensorrt:
        require_tensorrt()
    weights, config, adapted = open_weights(arguments.weights, arguments.config, arguments.override)
    if adapted:
        print(adapted, flush=True)
    source = Path(arguments.weights)
    settings = {"views": arguments.views, "precision": arguments.precision}
    with start_process("cpu") as process:
        torch.set_num_threads(process.cores)
        clips = clips_to_compare(weights, config, arguments.videos, process, beside=source)
        try:
            if arguments.format == "huggingface":
                print(
                    export_hugging_face(arguments.out, weights, clips, results=source.with_name("results.json")),
                    flush=True,
                )
            elif arguments.format == "torch":
                print(export_torch(arguments.out, weights, clips, **settings), flush=True)
            else:
                name = triton_name(config, beside=source)
                out = arguments.out or arguments.triton / name / "1" / "model.onnx"
                if arguments.out is None:
                    out.parent.mkdir(parents=True, exist_ok=True)
                print(export_onnx(out, weights, clips, **settings), flush=True)
                if arguments.triton is not None:
                    write_triton(arguments.triton, out, weights, name=name, views=arguments.views)
                    print(f"model repository for Triton in {arguments.triton}: {name}", flush=True)
                if arguments.tensorrt:
                    print(build_tensorrt(out, weights, clips, **settings), flush=True)
        except MismatchError as error:
            print(f"export.py: exit status 1: {error}", file=sys.stderr)
            return 1
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """What can be told before anything is loaded."""
    if arguments.format != "onnx":
        for name in ("triton", "tensorrt"):
            if getattr(arguments, name):
                raise InputError(f"--{name} is for --format onnx; here it is {arguments.format}")
        if arguments.precision == "int8":
            raise InputError("--precision int8 is for --format onnx; expected float32 or float16")
    if arguments.format == "huggingface" and (arguments.views, arguments.precision) != (1, "float32"):
        raise InputError("--format huggingface takes no --views and no --precision: transformers' own code runs it")
    if arguments.tensorrt and arguments.precision == "int8":
        raise InputError("--tensorrt takes float32 or float16: TensorRT does not read dynamic int8")
    if arguments.out is None and arguments.triton is None:
        raise InputError("--out is missing: name a file to write (.onnx, .pt2), or for huggingface a new folder")
    if arguments.out is not None:
        suffix = {"onnx": ".onnx", "torch": ".pt2"}.get(arguments.format)
        if suffix and arguments.out.suffix != suffix:
            raise InputError(f"--out {arguments.out}: expected a name that ends in {suffix}")
        if not arguments.out.parent.is_dir():
            raise InputError(f"--out {arguments.out}: no such folder; make {arguments.out.parent} first")
        if suffix and arguments.out.is_dir():
            raise InputError(f"--out {arguments.out}: a folder; expected the name of a file")
