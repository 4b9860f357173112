"""`benchmark.py model --fit`: how many clips fit into a GPU's memory in training, with and without checkpointing.

On a GPU, the peak memory of a compiled optimizer step (bf16, SGD) at two batch sizes gives the memory per run and per
clip. (Small batches would not: at their peak, gradients and momentum are larger than activations.) Then 8 clips
of 16 frames with checkpointing are tried in 24 GiB. On the CPU, the same is computed from weights, gradients, momentum,
and the tensors that a step of the GPU's kernels keeps for the backward pass, but without kernel workspace.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.machine import machine
from benchmarks.networks import PATCH_SIZE, NetworkWork
from benchmarks.reporting import Report, command, listed, progress, write_and_print
from dali_pipelines.errors import InputError
from model import TimeSformer, timesformer
from model.kernels import GpuKernels
from training.compiling import compile_network

GIB = 2**30
CARDS = (24, 40, 80)
_RESERVED = 2.0  # GiB: CUDA's context, DALI's pools and NVDEC's frames
_FRAMES = (8, 16)
_FEW = 8  # clips of 8 frames in the smaller batch on a GPU
_TRIED = (24, 16, 8)  # GiB, frames, clips


def benchmark_fit(*, size: str, image_size: int, device: str, out: Path) -> None:
    """Measures or computes, prints the table and writes fit.json into `out`. Raises `InputError`."""
    rows = []
    for num_frames in _FRAMES:
        for checkpointing in (False, True):
            work = NetworkWork(size, 1, num_frames, image_size, device)
            progress(f"{num_frames} frames, checkpointing {checkpointing}")
            few = 1 if device == "cpu" else _FEW * (4 if checkpointing else 1) * _FRAMES[0] // num_frames
            try:
                one, two = (step_bytes(work._replace(batch_size=count), checkpointing) for count in (few, 2 * few))
            except ValueError as error:
                raise InputError(str(error)) from None
            except torch.OutOfMemoryError:
                raise InputError(
                    f"{2 * few} clips of {num_frames} frames do not fit in this GPU; use a larger one"
                ) from None
            a_clip, once = (two - one) / few, 2 * one - two
            rows.append(
                {
                    "num_frames": num_frames,
                    "checkpointing": checkpointing,
                    "once_gib": once / GIB,
                    "a_clip_gib": a_clip / GIB,
                    "clips": {card: min(clips(card, once, a_clip), most_clips(work)) for card in CARDS},
                }
            )
    report: Report = {
        "command": command(),
        "machine": machine(),
        "settings": {"size": size, "image_size": image_size, "device": device},
        "rows": rows,
        "tried": _try(size, image_size) if device == "cuda" else None,
    }
    out.mkdir(parents=True, exist_ok=True)
    write_and_print(report, out / "fit.json", table(report))


def clips(card_gib: float, once: float, a_clip: float) -> int:
    """Number of clips that fit in a GPU of `card_gib` GiB; `once` and `a_clip` are in bytes."""
    return max(int(((card_gib - _RESERVED) * GIB - once) // a_clip), 0)


def most_clips(work: NetworkWork) -> int:
    """The largest batch that CUDA's kernels accept for attention over time: 65,535 sequences."""
    return 65_535 // (work.image_size // PATCH_SIZE) ** 2


def step_bytes(work: NetworkWork, checkpointing: bool) -> int:
    """Peak memory of a training step in bytes: weights, gradients, momentum, and the tensors kept for backward."""
    if work.device == "cuda":
        return _peak_bytes(work, checkpointing)
    network = _network(work, False)
    state = 3 * sum(value.nbytes for value in network.parameters())
    with mock.patch.object(timesformer, "kernels_for", _for_a_gpu):
        kept = _kept_bytes(network, work)
        if checkpointing:  # the input of each block, and all tensors of one block at a time
            kept = kept // len(network.blocks) + _kept_bytes(_network(work, True), work)
    return state + kept


def _for_a_gpu(x: torch.Tensor) -> type[GpuKernels]:
    return GpuKernels


def _network(work: NetworkWork, checkpointing: bool) -> TimeSformer:
    network = work.network()
    network.activation_checkpointing = checkpointing
    return network.to(work.device)


def _peak_bytes(work: NetworkWork, checkpointing: bool) -> int:
    torch.cuda.empty_cache()
    torch.compiler.reset()
    network = _network(work, checkpointing)
    compile_network(network)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9, nesterov=True, fused=True)
    clips = work.clips().to(work.device)
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        with torch.autocast(work.device, torch.bfloat16):
            logits = network(clips)
        logits.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def _kept_bytes(network: TimeSformer, work: NetworkWork) -> int:
    """Bytes that a compiled step keeps for its backward pass. Blocks are compiled as in training, but only to
    operators."""
    torch.compiler.reset()
    for block in network.blocks:
        block.compile(fullgraph=True, dynamic=False, backend="aot_eager_decomp_partition")
    storages: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16),
    ):
        logits = network(work.clips())
    for value in network.parameters():
        storages.pop(value.untyped_storage().data_ptr(), None)
    del logits
    return sum(storages.values())


def _try(size: str, image_size: int) -> dict[str, Any]:
    """Tries a step of 8 clips of 16 frames with checkpointing in 24 GiB, less the reserved memory."""
    card, num_frames, count = _TRIED
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min((card - _RESERVED) * GIB / total, 1.0))
    peak: float | None = None
    try:
        peak = step_bytes(NetworkWork(size, count, num_frames, image_size, "cuda"), True) / GIB
    except torch.OutOfMemoryError:
        pass
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    return {"card_gib": card, "num_frames": num_frames, "clips": count, "peak_gib": peak}


def table(report: Report) -> str:
    """The report as text."""
    return "\n".join(_lines(report))


def _lines(report: Report) -> Iterator[str]:
    is_measured = report["settings"]["device"] == "cuda"
    yield f"{report['machine']['gpu']}: measured" if is_measured else "computed on a CPU, not measured on a GPU"
    yield listed(report["settings"])
    yield f"bf16, SGD, compiled; clips per GPU, with {_RESERVED:g} GiB reserved for CUDA, DALI and NVDEC"
    yield f"{'frames':>6}  checkpointing  once GiB  a clip GiB" + "".join(f"{card:>5} GiB" for card in CARDS)
    for row in report["rows"]:
        fits = "".join(f"{row['clips'][card]:>9}" for card in CARDS)
        yield (
            f"{row['num_frames']:>6}  {'yes' if row['checkpointing'] else 'no':>13}  {row['once_gib']:8.2f}  "
            f"{row['a_clip_gib']:10.3f}{fits}"
        )
    if report["tried"]:
        tried = report["tried"]
        peak = tried["peak_gib"]
        yield (
            f"tried: {tried['num_frames']} frames x {tried['clips']} clips with checkpointing in {tried['card_gib']} "
            "GiB: " + ("does not fit" if peak is None else f"fits, {peak:.1f} GiB")
        )
