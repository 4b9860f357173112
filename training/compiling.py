"""Whether a run compiles its network, and how: `train.compile` and `train.cuda_graphs`."""

import torch

from dali_pipelines.errors import InputError
from model import TimeSformer
from training.config import TrainConfig
from training.distributed import Process

WORTH_IT = 1000
"""Forward passes of a run in training. At 8 clips a GPU a compiled step takes about 35 ms less (docs/benchmarks.md),
and compiling takes up to half a minute."""

_VARIANTS = 32  # of a block: of the first, those between and the last, in training and not, of a teacher, ...


def decide(train: TrainConfig, process: Process, *, passes: int, before: bool | None) -> tuple[bool, str]:
    """Whether to compile, the same on all processes, and why in words.

    passes: forward passes in training over the whole run. before: what the run did that is resumed, if one is: it goes
    on as it began. Raises `InputError` where what is forced cannot be had.
    """
    if train.cuda_graphs and process.device.type != "cuda":
        raise InputError(f"train.cuda_graphs is true, and the device is {process.device}; expected a GPU")
    if train.compile is False and train.cuda_graphs:
        raise InputError("train.cuda_graphs is true, and needs train.compile, which is false")
    if train.compile is False:
        return False, "eager, as train.compile says"
    is_forced = train.compile is True or train.cuda_graphs
    if not is_forced:
        if process.device.type != "cuda":
            return False, "eager: train.compile=auto compiles on a GPU"
        if before is False:
            return False, "eager, as the run began; train.compile=true would compile it"
        if before is None and passes < WORTH_IT:
            return False, f"eager: {passes} forward passes; train.compile=auto compiles from {WORTH_IT} on"
    missing = next(filter(None, process.gather(compiler_missing(process.device))), "")
    if missing and is_forced:
        raise InputError(f"train.compile is true, and {missing}; install it, or set train.compile=auto")
    if missing:
        return False, f"eager: {missing}"
    return True, "compiled" + ", launched as CUDA graphs" * train.cuda_graphs


def compiler_missing(device: torch.device) -> str:
    """What keeps torch.compile from working, in words; nothing where it works. Compiles a line, to see."""

    def two_operators(x: torch.Tensor) -> torch.Tensor:
        return x.sin() + 1

    try:
        torch.compile(two_operators, dynamic=False)(torch.ones(8, device=device))
    except Exception as error:  # of the compiler, of Triton, of what it has to write
        lines = [line for line in str(error).splitlines() if line and not line.startswith("backend=")]
        return f"torch.compile does not work on {device} ({lines[0] if lines else type(error).__name__})"
    return ""


def compile_network(network: TimeSformer, *, cuda_graphs: bool = False) -> None:
    """In place; each kind of block becomes one graph, in training and in evaluation, for one batch size.

    Block by block: the compiler's time does not grow with the depth, DDP reduces the gradients of one block while the
    next is computed, and activation checkpointing stays outside. With `cuda_graphs` the network is one graph, launched
    as one, whose result is overwritten by that of the next call.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _VARIANTS)
    torch._dynamo.config.optimize_ddp = False  # would split the graphs once more
    # Kernels are chosen without timing them, so that a resumed run has those of an unbroken one.
    options = {"deterministic": True}
    if cuda_graphs:
        network.compile(fullgraph=True, dynamic=False, options=options | {"triton.cudagraphs": True})
        return
    for block in network.blocks:
        block.compile(fullgraph=True, dynamic=False, options=options)
