"""How every command starts, ends and reports errors."""

import argparse
import io
import itertools
import os
import re
import shlex
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from dali_pipelines.errors import InputError
from dali_pipelines.text import ForPeople

_OTHER_NAMES = {
    "--amp_level": "--amp",
    "--auto-scale-lr": "not needed: optim.lr is for optim.global_batch_size, on any number of GPUs",
    "--cfg-options": "-o KEY=VALUE",
    "--deterministic": "-o seed=N, which decides all random draws",
    "--device": "-o device=NAME",
    "--dump": "always on: evaluate.py writes predictions.csv and results.json",
    "--fleet": "torchrun --nproc-per-node N",
    "--gpus": "torchrun --nproc-per-node N, and CUDA_VISIBLE_DEVICES=0,1 chooses GPUs",
    "--input_file": "predict.py -w best.onnx VIDEO",
    "--label-file": "part of the weights; for third-party weights -o data.labels=FILE",
    "--launcher": "torchrun --nproc-per-node N",
    "--local-rank": "set by torchrun, which replaces torch.distributed.launch",
    "--local_rank": "set by torchrun, which replaces torch.distributed.launch",
    "--log_dir": "torchrun --log-dir DIR --tee 3",
    "--max_iters": "-o train.max_steps=N",
    "--model_file": "-w best.onnx",
    "--no-validate": "-o train.validate_every=N: the last epoch is always validated",
    "--out-filename": "predict.py --overlay FILE.mp4",
    "--params_file": "part of best.onnx",
    "--pred-out-file": "predict.py --json",
    "--profiler_options": "train.py --profile",
    "--rec": "-c FILE",
    "--rec-weights": "-w FILE",
    "--seed": "-o seed=N",
    "--test": "always on in evaluate.py",
    "--train_dali": "always on",
    "--use_gpu": "--provider cuda",
    "--use_tensorrt": "--provider tensorrt",
    "--vid-out-dir": "predict.py --overlay FILE.mp4",
    "--work-dir": "-o output=DIR, or evaluate.py --out DIR",
    "-i": "predict.py -w best.onnx VIDEO",
    "-p": "-w FILE (and -o PATH of tools/export_model.py is --out PATH)",
}
"""Options of PaddleVideo and mmaction2 -> what they are here."""
_POSITIONAL = {(".py", ".yaml", ".yml"): "-c", (".pth", ".pdparams", ".safetensors"): "-w"}
"""Files that mmaction2's tools take without an option: train.py CONFIG, test.py CONFIG CHECKPOINT."""


class Parser(argparse.ArgumentParser):
    """Parses a command's arguments. Its errors say what options of other programs are called here."""

    def error(self, message: str) -> NoReturn:
        """Prints the usage and `message`, and exits with 2."""
        hints = list(dict.fromkeys(filter(None, itertools.starmap(_meant, itertools.pairwise(sys.argv)))))
        page = " (docs/migrate.md)" if hints else ""
        if "unrecognized" in message and "-o" in self._option_string_actions:
            typed = dict.fromkeys(argument.partition("=")[0] for argument in sys.argv[1:])
            hints += [hint for name in typed if name in message and (hint := _setting(name))]
        super().error(f"{message}\nhere, {'; '.join(hints)}{page}" if hints else message)


def _setting(name: str) -> str:
    """What an unknown argument is here: a setting (--epochs), or a file for --csv; "" for anything else."""
    from common.config import key_like  # loads OmegaConf

    if name.startswith("--") and name not in _OTHER_NAMES and (key := key_like(name.strip("-").replace("-", "_"))):
        return f"{name} is -o {key}=VALUE"
    if name.endswith(".csv") and "--csv" in sys.argv:
        return f"--csv takes no file: --csv > {name}"
    return ""


def _meant(before: str, argument: str) -> str | None:
    """What an argument of PaddleVideo or mmaction2 is here, from it and the one before it; None for others."""
    name = argument.partition("=")[0]
    if name in _OTHER_NAMES:
        return f"{name} is {_OTHER_NAMES[name]}"
    if before == "--resume" and not argument.startswith("-"):
        return "--resume takes no file: it continues from the newest checkpoint of the output folder"
    for suffixes, option in _POSITIONAL.items():
        if name == argument and name.endswith(suffixes) and not before.startswith("-"):
            return f"{name} is {option} {name}"
    return None


def add_override_argument(parser: argparse.ArgumentParser) -> None:
    """Adds `-o KEY=VALUE ...`, which may be repeated, as `override`."""
    parser.add_argument(
        "-o", "--override", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="override config values"
    )


def add_provider_argument(parser: argparse.ArgumentParser) -> None:
    """Adds `--provider` for .onnx files."""
    parser.add_argument(
        "--provider",
        default="auto",
        metavar="NAME",
        help="what runs an .onnx file: auto, cpu, cuda, tensorrt, or another execution provider of onnxruntime "
        "(default auto: the best that starts)",
    )


def run_command(main: Callable[[], int | None]) -> None:
    """Run a command's `main` and exit with its result or 0, with 2 for bad input, or 130 for Ctrl-C.

    An `InputError` or an operating-system error (no such file, disk full) is printed as one line on stderr. Anything
    else is a bug in this program and keeps its traceback.
    """
    # Idle torch threads then yield their core to the loader's processes: docs/quickstart.md shows the gain.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # file names need not be UTF-8
    if not isinstance(sys.stdout, ForPeople):
        sys.stdout, sys.stderr = ForPeople(sys.stdout), ForPeople(sys.stderr)
    rank = os.environ.get("RANK")
    command = os.path.basename(sys.argv[0]) + (f" (rank {rank})" if rank else "")
    try:
        sys.exit(main() or 0)
    except InputError as error:
        message = str(error)
    except BrokenPipeError:  # `predict.py ... | head` is not a failure
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except IsADirectoryError as error:
        message = f"{error.filename}: a folder; expected a file"
    except OSError as error:
        message = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    except (Exception, KeyboardInterrupt) as error:
        if not _is_ctrl_c(error):
            raise
        _silence_threads()
        print(f"{command}: stopped by Ctrl-C", file=sys.stderr)
        sys.exit(130)
    _silence_threads()
    print(f"{command}: error: {' '.join(_as_typed(message).split())}", file=sys.stderr)
    sys.exit(2)


def sibling_command(name: str, *arguments: str) -> str:
    """The command line that starts the command `name` (evaluate, predict, ...) in the way in which this one was
    started, ready to paste into the same shell."""
    started, python = sys.argv[0], sys.executable
    if shutil.which("python") == python:
        python = "python"
    if started.startswith("dali-timesformer"):  # set by commands/__main__.py
        script = Path(sys.executable).with_name("dali-timesformer")
        if shutil.which("dali-timesformer") == str(script):
            command = ["dali-timesformer", name]
        elif script.exists():
            command = [_from_here(str(script)), name]
        else:
            command = [_from_here(python), "-m", "commands", name]
    else:
        project = str(Path(__file__).parents[1])
        folder = os.path.dirname(started)
        if os.path.realpath(folder) != os.path.realpath(project):  # a notebook, or a program of the user's
            folder = project
        script = Path(folder) / f"{name}.py"
        command = [_from_here(python), *([_from_here(str(script))] if script.exists() else ["-m", "commands", name])]
    return shlex.join([*command, *arguments])


def _as_typed(message: str) -> str:
    """The message with the commands that it names (prepare.py) as `dali-timesformer prepare` if that is what runs."""
    if not sys.argv[0].startswith("dali-timesformer"):
        return message
    names = "train|evaluate|predict|export|prepare|weights|benchmark"
    return re.sub(rf"(?:\bpython )?(?<![\w./-])({names})\.py\b", r"dali-timesformer \1", message)


def _from_here(path: str) -> str:
    """The path relative to the working directory if it is below it."""
    relative = os.path.relpath(path) if os.path.isabs(path) else path
    return path if relative.startswith(os.pardir) else relative


def _silence_threads() -> None:
    """Silence errors in other threads caused by exiting: a thread of DALI sees the workers that it watches end."""
    threading.excepthook = lambda _: None


def _is_ctrl_c(error: BaseException | None) -> bool:
    """Whether Ctrl-C caused `error`: if it comes while a graph is being defined, DALI's own clean-up fails."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None
