"""Exports weights to formats that other software runs, and checks each export before it is saved.

python export.py -w best.safetensors --format onnx --out best.onnx
python export.py -w best.safetensors --format onnx --views 3 --precision float16 --out best.onnx --videos *.mp4
python export.py -w best.safetensors --format onnx --triton models
python export.py -w best.safetensors --format torch --out best.pt2
python export.py -w best.safetensors --format huggingface --out my_model
python export.py -w best.safetensors --format huggingface --out my_model --push-to-hub me/my_model --licence apache-2.0

Exits with 1 if the export differs from the network; it is kept as NAME.mismatch.
"""

import argparse
import itertools
import sys
from pathlib import Path

from common.command_line import Parser, add_override_argument
from dali_pipelines.errors import InputError
from serving.export_formats import FORMATS, ExportRequest


def main() -> int:
    """Runs export.py; returns its exit status."""
    parser = Parser(description="Export weights, and check the export against the network.")
    parser.add_argument(
        "-w", "--weights", required=True, help="best.safetensors of a run, or with -c third-party weights"
    )
    parser.add_argument("-c", "--config", help="YAML file (default: the settings in the weights file)")
    add_override_argument(parser)
    parser.add_argument("--format", required=True, choices=tuple(FORMATS))
    parser.add_argument("--out", type=Path, metavar="PATH", help=_outputs())
    precisions = dict.fromkeys(itertools.chain.from_iterable(each.precisions for each in FORMATS.values()))
    parser.add_argument("--precision", choices=tuple(precisions), default="float32")
    parser.add_argument(
        "--views", type=int, choices=(1, 3), default=1, help="3: the export averages the three crops of a video"
    )
    parser.add_argument(
        "--videos",
        nargs="+",
        default=[],
        metavar="VIDEO",
        help="files or a manifest to compare on (default: the run's validation videos)",
    )
    parser.add_argument(
        "--triton", type=Path, metavar="DIR", help="write a Triton model repository; --out is then optional"
    )
    parser.add_argument("--tensorrt", action="store_true", help="also build an engine, with onnxruntime's provider")
    parser.add_argument(
        "--push-to-hub",
        metavar="NAME",
        help="upload the folder to this repository on the Hugging Face Hub, private if it is new; log in with "
        "`hf auth login`",
    )
    parser.add_argument(
        "--licence",
        "--license",
        metavar="NAME",
        help="licence for the model card, by the Hub's name, such as apache-2.0 (default: the card names none)",
    )
    arguments = parser.parse_args()
    _check_arguments(arguments)

    import torch

    from common.distributed import start_process
    from common.weights import open_weights
    from serving.hugging_face import push_to_hub, require_hub
    from serving.tensorrt import build_tensorrt, require_tensorrt
    from serving.triton import triton_name, write_triton
    from serving.verification import MismatchError, clips_to_compare

    if arguments.tensorrt:
        require_tensorrt()
    if arguments.push_to_hub:
        require_hub(arguments.push_to_hub)
    weights, config, adapted = open_weights(arguments.weights, arguments.config, arguments.override)
    if adapted:
        print(adapted, flush=True)
    source, views, precision = Path(arguments.weights), arguments.views, arguments.precision
    with start_process("cpu") as process:
        torch.set_num_threads(process.cores)
        clips = clips_to_compare(weights, config, arguments.videos, process, beside=source)
        out, name = arguments.out, ""
        if arguments.triton is not None:
            name = triton_name(config, beside=source)
            if out is None:
                out = arguments.triton / name / "1" / "model.onnx"
                out.parent.mkdir(parents=True, exist_ok=True)
        try:
            request = ExportRequest(
                out, arguments.weights, weights, clips, views, precision, arguments.push_to_hub, arguments.licence
            )
            print(FORMATS[arguments.format].write(request), flush=True)
            if arguments.push_to_hub:
                print(push_to_hub(out, arguments.push_to_hub), flush=True)
            if arguments.triton is not None:
                write_triton(arguments.triton, out, weights, name=name, views=views)
                print(f"model repository for Triton in {arguments.triton}: {name}", flush=True)
            if arguments.tensorrt:
                print(build_tensorrt(out, weights, clips, views=views, precision=precision), flush=True)
        except MismatchError as error:
            print(f"export.py: exit status 1: {error}", file=sys.stderr)
            return 1
    return 0


def _outputs() -> str:
    """Says what --out names for each format."""
    return "; ".join(
        f"{name}: {each.description}" + (f" ({each.suffix})" if each.suffix else "") for name, each in FORMATS.items()
    )


def _check_arguments(arguments: argparse.Namespace) -> None:
    """Checks the arguments before weights are loaded. Raises `InputError`."""
    chosen = FORMATS[arguments.format]
    for name in ("triton", "tensorrt"):
        if arguments.format != "onnx" and getattr(arguments, name):
            raise InputError(f"--{name} needs --format onnx, not {arguments.format}")
    for option, value in (("--push-to-hub", arguments.push_to_hub), ("--licence", arguments.licence)):
        if arguments.format != "huggingface" and value:
            raise InputError(f"{option} needs --format huggingface, not {arguments.format}")
    if arguments.precision not in chosen.precisions:
        formats = [name for name, each in FORMATS.items() if arguments.precision in each.precisions]
        raise InputError(
            f"--precision {arguments.precision} needs --format {' or '.join(formats)}; {arguments.format} supports "
            f"only {' and '.join(chosen.precisions)}"
        )
    if arguments.views not in chosen.views:
        formats = [name for name, each in FORMATS.items() if arguments.views in each.views]
        raise InputError(f"--views {arguments.views} needs --format {' or '.join(formats)}")
    if arguments.tensorrt and arguments.precision == "int8":
        raise InputError("--tensorrt needs --precision float32 or float16: TensorRT cannot read dynamic int8")
    if arguments.out is None and arguments.triton is None:
        raise InputError(f"--out is missing: name the output. {_outputs()}")
    if arguments.out is None:
        return
    if chosen.suffix and arguments.out.suffix != chosen.suffix:
        raise InputError(f"--out {arguments.out}: expected a name that ends in {chosen.suffix}")
    if not arguments.out.parent.is_dir():
        raise InputError(f"--out {arguments.out}: no such folder; make {arguments.out.parent} first")
    if chosen.suffix and arguments.out.is_dir():
        raise InputError(f"--out {arguments.out}: a folder; expected the name of a file")
