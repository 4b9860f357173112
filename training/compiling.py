"""Compiles the network: `train.compile` and `train.cuda_graphs`."""

from typing import Literal

import torch

from common.config import TrainConfig
from common.distributed import DistributedContext
from dali_pipelines.errors import InputError
from model import TimeSformer

Mode = Literal["eager", "compiled", "CUDA graphs"]

WORTH_IT = 1000
"""Number of training forward passes from which compiling pays off, as a rule of thumb: with 8 clips per GPU a compiled
step of ViT-B took about 35 ms less than an eager one (docs/benchmarks.md), and compiling takes half a minute. Both grow
with the number of blocks."""

_VARIANTS = 32  # graphs of a block: first, middle and last, in training and in evaluation, of a student and a teacher


def check_compile(train: TrainConfig, process: DistributedContext) -> None:
    """Raises `InputError` if the settings require something this machine cannot do. Every process must call it."""
    if train.cuda_graphs and process.device.type != "cuda":
        raise InputError(f"train.cuda_graphs is true, and the device is {process.device}; expected a GPU")
    if train.cuda_graphs and _wanted(train) == "false":
        raise InputError("train.cuda_graphs is true and train.compile is false; expected train.compile=auto or true")
    if train.cuda_graphs or _wanted(train) == "true":
        missing = _missing_anywhere(process)
        if missing:
            key, other = ("cuda_graphs", "false") if train.cuda_graphs else ("compile", "auto")
            raise InputError(f"train.{key} is true, and {missing}; install it, or set train.{key}={other}")


def decide_compile(
    train: TrainConfig, process: DistributedContext, *, passes: int, before: Mode | None
) -> tuple[Mode, str]:
    """How to run the network, the same on all processes, and a description, with the reason if it is not compiled.

    passes: training forward passes over the whole run. before: the mode in which a resumed run started, which `auto`
    keeps; None for a new run. Call `check_compile` first.
    """
    if train.cuda_graphs:
        return "CUDA graphs", "compiled, launched as CUDA graphs"
    if _wanted(train) != "auto":
        return ("compiled", "compiled") if _wanted(train) == "true" else ("eager", "eager, as train.compile says")
    if process.device.type != "cuda":
        return "eager", "eager: train.compile=auto compiles on a GPU"
    if before == "eager":
        return "eager", "eager, as the run started; train.compile=true would compile it"
    if before is None and passes < WORTH_IT:
        return "eager", f"eager: {passes} forward passes; train.compile=auto compiles from {WORTH_IT} on"
    missing = _missing_anywhere(process)
    return ("eager", f"eager: {missing}") if missing else ("compiled", "compiled")


def _wanted(train: TrainConfig) -> str:
    """auto, true or false, which YAML reads as bools or strings."""
    return str(train.compile).lower()


def _missing_anywhere(process: DistributedContext) -> str:
    return next(filter(None, process.gather(compiler_missing(process.device))), "")


def compiler_missing(device: torch.device) -> str:
    """Why torch.compile does not work, in words; "" if it works. Compiles one line to find out."""

    def two_operators(x: torch.Tensor) -> torch.Tensor:
        return x.sin() + 1

    try:
        torch.compile(two_operators, dynamic=False)(torch.ones(8, device=device))
    except Exception as error:  # from the compiler, Triton, or their cache folder
        lines = [line for line in str(error).splitlines() if line and not line.startswith("backend=")]
        return f"torch.compile does not work on {device} ({lines[0] if lines else type(error).__name__})"
    return ""


def compile_network(network: TimeSformer, *, cuda_graphs: bool = False) -> None:
    """Compile the network in place: each kind of block becomes one graph, in training and in evaluation, for each batch
    size.

    This way compile time does not grow with the depth, DDP reduces the gradients of one block while the next one is
    computed, and activation checkpointing stays outside the graphs. With `cuda_graphs` the whole network is one graph
    with a single launch, and each call overwrites the result of the last one.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _VARIANTS)
    torch._dynamo.config.optimize_ddp = False  # it would split the graphs further
    # Kernels are chosen without timing them, so that a resumed run uses the same ones.
    options: dict[str, str | int | bool] = {"deterministic": True}
    if cuda_graphs:
        network.compile(fullgraph=True, dynamic=False, options=options | {"triton.cudagraphs": True})
        return
    for block in network.blocks:
        block.compile(fullgraph=True, dynamic=False, options=options)


def cuda_graphs_skipped() -> bool:
    """Whether the compiler failed to use CUDA graphs, which it only logs."""
    from torch._dynamo.utils import counters  # takes a second to import

    return counters["inductor"]["cudagraph_skips"] > 0
