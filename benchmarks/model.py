"""`benchmark.py model`: forward and training of this network and of its peers, against what the machine can do.

Why it is fair:

- Everybody has the same weights and gets the same clips; before the clock, float32 logits must agree to 1e-4.
- Everybody runs in this process with the same threads. In each round everybody has a turn, the next one first; ratios
  are taken within a round, then their median; a round before the first is not counted.
- The peers get their best: Hugging Face's network also with PyTorch's fused attention, which it does not have itself.
- bf16 is autocast, weights and gradients stay float32; a training step is forward and backward, without an optimizer.
- Memory: one contestant and precision in a process of its own. After one step, which leaves the gradients and whatever
  is made once, freed memory is given back; the number is how far the next step's high-water mark is above what is
  resident then (VmHWM over VmRSS): activations and workspace.

What a GPU does is in gpu_model.py.
"""

import contextlib
import ctypes
import gc
import importlib.metadata
import json
import multiprocessing
import os
import re
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.loader import machine
from dali_pipelines.errors import InputError
from dali_pipelines.processes import end_with_parent
from model import TimeSformer
from model.pretrained import from_hugging_face
from model.timesformer import multiply_adds
from model.torchvision import let_torchvision_load

SIZES = {  # channels, blocks, heads
    "base": (768, 12, 12),
    "small": (384, 12, 6),
    "tiny": (48, 2, 3),
}
OURS = "ours"
COMPILED = "ours compiled"
PEERS = ("huggingface eager", "huggingface sdpa")
PRECISIONS = {"float32": torch.float32, "bf16": torch.bfloat16}
TASKS = ("forward", "training")
_CLASSES = 400
_LARGEST_DIFFERENCE = 1e-4
_MATMUL_SIZE = 4096


class Work(NamedTuple):
    """Clips [batch_size, 3, num_frames, image_size, image_size] for a network of `size`."""

    size: str
    batch_size: int
    num_frames: int
    image_size: int
    device: str

    def network(self) -> TimeSformer:
        """The same weights in every process; no drop path, which is drawn anew in every step."""
        dim, depth, heads = SIZES[self.size]
        torch.manual_seed(0)
        return TimeSformer(
            num_frames=self.num_frames,
            image_size=self.image_size,
            num_classes=_CLASSES,
            embed_dim=dim,
            depth=depth,
            num_heads=heads,
            drop_path=0.0,
        ).train()

    def clips(self) -> Tensor:
        shape = (self.batch_size, 3, self.num_frames, self.image_size, self.image_size)
        return torch.randn(shape, generator=torch.Generator().manual_seed(1))


class TorchContestant:
    """A module that maps `clips` to logits."""

    precisions = tuple(PRECISIONS)

    def __init__(self, module: nn.Module, clips: Tensor, work: Work):
        self.module, self.clips, self.device = module.to(work.device), clips.to(work.device), work.device

    def logits(self) -> Tensor:
        with torch.no_grad():
            return self._run().float().cpu()

    def forward(self, precision: str) -> None:
        with torch.no_grad():
            self._run(precision)

    def training(self, precision: str) -> None:
        self.module.zero_grad(set_to_none=False)
        self._run(precision).float().square().sum().backward()

    def _run(self, precision: str = "float32") -> Tensor:
        with torch.autocast(self.device, PRECISIONS[precision], enabled=precision != "float32"):
            result = self.module(self.clips)
        return getattr(result, "logits", result)


def ours(work: Work, *, compiled: bool = False, checkpointing: bool = False) -> TorchContestant:
    network = work.network()
    network.activation_checkpointing = checkpointing
    return TorchContestant(torch.compile(network, fullgraph=True) if compiled else network, work.clips(), work)


def hugging_face(work: Work, *, fused: bool) -> TorchContestant:
    let_torchvision_load()
    from transformers import TimesformerConfig, TimesformerForVideoClassification

    dim, depth, heads = SIZES[work.size]
    config = TimesformerConfig(
        image_size=work.image_size,
        num_frames=work.num_frames,
        hidden_size=dim,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=4 * dim,
        qkv_bias=False,
        num_labels=_CLASSES,
    )
    network = TimesformerForVideoClassification(config).train()
    ours = work.network().state_dict()
    network.load_state_dict({name: ours[from_hugging_face(name)] for name in network.state_dict()})
    if fused:
        for layer in network.timesformer.encoder.layer:
            for attention in (layer.attention.attention, layer.temporal_attention.attention):
                attention.forward = partial(_fused_attention, attention)
    return TorchContestant(network, work.clips().transpose(1, 2).contiguous(), work)  # [B, T, 3, S, S]


def _fused_attention(module: nn.Module, hidden_states: Tensor, output_attentions: bool = False) -> tuple[Tensor]:
    q, k, v = module.qkv(hidden_states).unflatten(2, (3, module.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind()
    return (scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2),)


class PaddleContestant:
    """PaddleVideo's formulation (vit_tweaks.py) in Paddle: tokens [B, 1+N*T, D], brought into the order of each
    attention by copies; softmax attention as two products."""

    precisions = ("float32",)  # Paddle's auto_cast does nothing on a CPU

    def __init__(self, work: Work):
        os.environ.setdefault("FLAGS_paddle_num_threads", str(torch.get_num_threads()))
        import paddle

        self.paddle, self.work = paddle, work
        paddle.set_device("cpu")
        self.heads = SIZES[work.size][2]
        self.clips = paddle.to_tensor(work.clips().numpy())
        self.weights = {}
        for name, value in work.network().state_dict().items():
            value = value.T if value.ndim == 2 else value  # Paddle's Linear is [in, out]
            self.weights[name] = paddle.to_tensor(value.contiguous().numpy(), stop_gradient=False)

    def logits(self) -> Tensor:
        with self.paddle.no_grad():
            return torch.from_numpy(self._run().numpy())

    def forward(self, precision: str) -> None:
        with self.paddle.no_grad():
            self._run().numpy()

    def training(self, precision: str) -> None:
        for weight in self.weights.values():
            weight.clear_gradient(True)
        self._run().square().sum().backward()

    def _linear(self, x, name: str):
        return self.paddle.nn.functional.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def _norm(self, x, name: str):
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return self.paddle.nn.functional.layer_norm(x, weight.shape, weight, bias, 1e-6)

    def _attention(self, x, name: str):
        length, dim = x.shape[1:]
        qkv = self._linear(x, f"{name}.qkv").reshape([-1, length, 3, self.heads, dim // self.heads])
        q, k, v = qkv.transpose([2, 0, 3, 1, 4]).unbind(0)
        weights = self.paddle.nn.functional.softmax(q.matmul(k, transpose_y=True) * (dim // self.heads) ** -0.5)
        return self._linear(weights.matmul(v).transpose([0, 2, 1, 3]).reshape([-1, length, dim]), f"{name}.proj")

    def _run(self):
        concat, weights = self.paddle.concat, self.weights
        num_clips, _, frames, side, _ = self.clips.shape
        pixels = self.clips.transpose([0, 2, 1, 3, 4]).reshape([-1, 3, side, side])
        kernel, bias = weights["patch_embed.proj.weight"], weights["patch_embed.proj.bias"]
        x = self.paddle.nn.functional.conv2d(pixels, kernel, bias, stride=kernel.shape[-1])
        x = x.flatten(2).transpose([0, 2, 1])  # [B*T, N, D]
        patches, dim = x.shape[1:]
        x = x.reshape([num_clips, frames, patches, dim]).transpose([0, 2, 1, 3])
        x = x + weights["pos_embed"][:, 1:].unsqueeze(2) + weights["time_embed"].unsqueeze(1)
        cls = (weights["cls_token"] + weights["pos_embed"][:, :1]).expand([num_clips, 1, dim])
        x = concat([cls, x.reshape([num_clips, -1, dim])], 1)
        for n in range(SIZES[self.work.size][1]):
            block = f"blocks.{n}."
            over_time = self._norm(x[:, 1:].reshape([-1, frames, dim]), block + "temporal_norm1")
            over_time = self._attention(over_time, block + "temporal_attn").reshape([num_clips, -1, dim])
            cls, tokens = x[:, :1], x[:, 1:] + self._linear(over_time, block + "temporal_fc")
            copies = cls.tile([1, frames, 1]).reshape([-1, 1, dim])
            places = tokens.reshape([num_clips, patches, frames, dim]).transpose([0, 2, 1, 3])
            sequence = concat([copies, places.reshape([-1, patches, dim])], 1)  # [B*T, 1+N, D]
            change = self._attention(self._norm(sequence, block + "norm1"), block + "attn")
            cls_change = change[:, 0].reshape([num_clips, frames, dim]).mean(1, keepdim=True)
            change = change[:, 1:].reshape([num_clips, frames, patches, dim]).transpose([0, 2, 1, 3])
            x = concat([cls, tokens], 1) + concat([cls_change, change.reshape([num_clips, -1, dim])], 1)
            hidden = self.paddle.nn.functional.gelu(self._linear(self._norm(x, block + "norm2"), block + "mlp.fc1"))
            x = x + self._linear(hidden, block + "mlp.fc2")
        return self._linear(self._norm(x, "norm")[:, 0], "head")


CONTESTANTS: dict[str, Callable[[Work], Any]] = {
    OURS: ours,
    COMPILED: partial(ours, compiled=True),
    "ours checkpointed": partial(ours, checkpointing=True),
    PEERS[0]: partial(hugging_face, fused=False),
    PEERS[1]: partial(hugging_face, fused=True),
    "paddle": PaddleContestant,
}


def benchmark_model(
    *, size: str, batch_size: int, num_frames: int, image_size: int, rounds: int, compile: bool, out: Path
) -> None:
    """Measures on the CPU, prints the table and writes model.json into `out`. Raises `InputError`."""
    work = Work(size, batch_size, num_frames, image_size, "cpu")
    try:
        flops = {"forward": 2 * batch_size * multiply_adds(work.network)}
    except ValueError as error:
        raise InputError(str(error)) from None
    flops["training"] = 3 * flops["forward"]
    out.mkdir(parents=True, exist_ok=True)

    made, failures, expected = {}, {}, None
    for name, make in CONTESTANTS.items():
        if name == COMPILED and not compile:
            continue
        try:
            made[name] = make(work)
            logits = made[name].logits()
        except Exception as error:  # not installed, or installed and broken: the others are measured
            failures[name] = (str(error).strip() or type(error).__name__).splitlines()[-1]
            made.pop(name, None)
            continue
        expected = logits if expected is None else expected
        difference = (logits - expected).abs().max().item()
        if not difference <= _LARGEST_DIFFERENCE:
            raise InputError(f"{name}: its logits are {difference:.1e} from ours, so it computes something else")
    if OURS not in made:
        raise InputError(f"{OURS}: {failures[OURS]}")

    seconds, mib = {}, {}
    for precision in PRECISIONS:
        able = {name: contestant for name, contestant in made.items() if precision in contestant.precisions}
        for task in TASKS:
            turns = take_turns(able, task, precision, rounds)
            seconds |= {(name, task, precision): values for name, values in turns.items()}
        for name in able:
            print(f"{precision} memory: {name}", file=sys.stderr, flush=True)
            mib[name, precision] = _in_new_process(training_mib, name, work, precision)
    report = {
        "command": " ".join(sys.argv),
        "machine": machine() | {"threads": torch.get_num_threads(), "peers": peer_versions()},
        "settings": work._asdict() | {"rounds": rounds},
        "forward_gmac_per_clip": flops["forward"] / 2e9 / batch_size,
        "matmul_gflops": {precision: matmul_gflops(dtype) for precision, dtype in PRECISIONS.items()},
        "not_measured": failures,
        "contestants": {
            name: {
                precision: {task: _summary(name, task, precision, seconds, flops) for task in TASKS}
                | {"training_mib": mib[name, precision]}
                for precision in contestant.precisions
            }
            for name, contestant in made.items()
        },
    }
    report["targets"] = targets(report["contestants"])
    (out / "model.json").write_text(json.dumps(report, indent=2) + "\n")
    print(table(report))
    print(f"\n{out / 'model.json'}")


def peer_versions() -> dict[str, str]:
    found = {}
    for package in ("transformers", "paddlepaddle"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def take_turns(made: dict[str, Any], task: str, precision: str, rounds: int) -> dict[str, list[float]]:
    """Seconds of each contestant in each round."""
    seconds = {name: [] for name in made}
    for number in range(-1, rounds):  # the first is not counted
        print(f"{precision} {task}: round {number + 1} of {rounds}", file=sys.stderr, flush=True)
        first = number % len(made)  # everybody comes after everybody: memory is in the state that the one before left
        for name in [*made, *made][first : first + len(made)]:
            start = time.perf_counter()
            getattr(made[name], task)(precision)
            if number >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def training_mib(name: str, work: Work, precision: str) -> float:
    """Peak memory of a training step over what stands before it; see the top of this file."""
    contestant = CONTESTANTS[name](work)
    contestant.training(precision)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
    before = _resident_mib("VmRSS")
    contestant.training(precision)
    return _resident_mib("VmHWM") - before


def _resident_mib(field: str) -> float:
    return int(re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)[1]) / 1024


def _in_new_process(function: Callable, *arguments: Any) -> float | None:
    """None where the process ends by itself, for want of memory say, or may not read its memory."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=end_with_parent) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except (BrokenProcessPool, OSError):
            return None


def matmul_gflops(dtype: torch.dtype) -> float:
    """The best of several products of large square matrices."""
    a, b = torch.randn(2, _MATMUL_SIZE, _MATMUL_SIZE).to(dtype)
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return 2 * _MATMUL_SIZE**3 / best / 1e9


# -- what is reported --


def _summary(name: str, task: str, precision: str, seconds: dict, flops: dict[str, float]) -> dict[str, float]:
    """Seconds, GFLOP/s, and how many times faster than this ours is: median, lowest and highest of the rounds."""
    turns = seconds[name, task, precision]
    ratios = [other / ours for other, ours in zip(turns, seconds[OURS, task, precision])]
    return {
        "seconds": statistics.median(turns),
        "gflops": flops[task] / statistics.median(turns) / 1e9,
        "ours_is": {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios)},
    }


def targets(contestants: dict[str, Any]) -> list[dict[str, Any]]:
    """Ours against Hugging Face's: not slower in float32, 1.2 times as fast in bf16 training, 0.8 of the memory."""
    found = []
    for peer in contestants:
        if peer not in PEERS:
            continue
        for precision, task, wanted in (
            ("float32", "forward", 1.0),
            ("float32", "training", 1.0),
            ("bf16", "training", 1.2),
        ):
            value = contestants[peer][precision][task]["ours_is"]["median"]
            what = f"speed of {precision} {task} over {peer}"
            found.append({"what": what, "value": value, "at_least": wanted, "met": value >= wanted})
        for precision in PRECISIONS:
            mine, other = (contestants[name][precision]["training_mib"] for name in (OURS, peer))
            if mine is not None and other is not None:
                what = f"memory of {precision} training over {peer}"
                found.append({"what": what, "value": mine / other, "at_most": 0.8, "met": mine <= 0.8 * other})
    return found


def table(report: dict[str, Any]) -> str:
    """The report as text."""
    lines = [f"{report['machine']['cpu']}, {report['machine']['threads']} threads; GPU: {report['machine']['gpu']}"]
    versions = {"torch": report["machine"]["versions"]["torch"]} | report["machine"]["peers"]
    lines += [", ".join(f"{name} {value}" for name, value in each.items()) for each in (versions, report["settings"])]
    lines.append(f"{report['forward_gmac_per_clip']:.4g} GMAC a clip")
    for precision, peak in report["matmul_gflops"].items():
        lines += ["", f"{precision}; a large matrix product: {peak:.0f} GFLOP/s"]
        lines.append(
            " " * 20 + "".join(f"{task:>10} s  ours is  (rounds)        GFLOP/s     " for task in TASKS) + "MiB"
        )
        for name, result in report["contestants"].items():
            if precision not in result:
                lines.append(f"{name:20}  none on this device")
                continue
            cells = ""
            for task in TASKS:
                one = result[precision][task]
                low, middle, high = (one["ours_is"][key] for key in ("low", "median", "high"))
                cells += f"{one['seconds']:12.3f}  x {middle:5.2f}  {low:5.2f} .. {high:5.2f}"
                cells += f"  {one['gflops']:6.0f} {one['gflops'] / peak:4.0%}"
            mib = result[precision]["training_mib"]
            lines.append(f"{name:20}{cells}  {'failed' if mib is None else format(mib, '.0f'):>7}")
    lines.append("")
    lines += [f"{name}: not measured: {reason}" for name, reason in report["not_measured"].items()]
    for target in report["targets"]:
        bound = f"at least {target['at_least']}" if "at_least" in target else f"at most {target['at_most']}"
        lines.append(f"{target['what']}: {target['value']:.2f}, target {bound}: {'met' if target['met'] else 'missed'}")
    return "\n".join(lines)
