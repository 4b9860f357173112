"""`benchmark.py model --device cuda`: training steps of this network and of Hugging Face's on a GPU.

Why it is fair:

- Everybody has the same weights, clips and autocast (bf16); a step is forward and backward, without an optimizer. In
  float32, before it is compiled, a network's logits must agree with ours to 1e-3; in bf16, as it is timed, to 5 %.
- Ours has deterministic algorithms, as in training; Hugging Face's network has PyTorch's default, which may be faster.
- Everybody has a process of its own. All prepare side by side (compiling takes a core, not the GPU); then they take
  turns on a GPU that nobody else uses, the next one first in each round. Ratios are of medians.
- Hugging Face's network is also measured with PyTorch's fused attention, which it does not have itself, and compiled.
- TFLOP/s count the multiply-adds that our network does for a clip, three forward passes a step, for everybody.
- Memory: torch.cuda.max_memory_allocated of a step, with weights and gradients; of CUDA graphs, what they reserve.
"""

import contextlib
import json
import multiprocessing
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.loader import machine
from benchmarks.model import Work, hugging_face, ours, peer_versions
from common.precision import make_deterministic
from dali_pipelines.errors import InputError
from dali_pipelines.processes import end_with_parent
from model.timesformer import multiply_adds
from training.compiling import compile_network, cuda_graphs_skipped

BATCH_SIZES = (8, 32)  # the published recipe's, and one that fills the GPU
OURS, COMPILED, GRAPHS = "ours", "ours compiled", "ours, CUDA graphs"
PEERS = ("huggingface eager", "huggingface sdpa", "huggingface compiled")
_LARGEST_DIFFERENCE = 1e-3
_LARGEST_SHARE = 0.05  # in bf16: norm of the difference, of the norm
_MATMUL_SIZE = 8192
_PREPARE_S = 100  # to import, build, compile and warm up
_ATTEMPTS = 10  # to get memory that the others have just now
_COMPILE_THREADS = "3"  # of each contestant


class Contestant:
    """Training steps in bf16; `logits` of one clip in float32, to compare."""

    def __init__(
        self, work: Work, make: Callable[[Work], Any], prepare: Callable[[Any], None], *, graphs: bool = False
    ):
        self.work, self.graphs = work, graphs
        if make is ours and work.device == "cuda":
            make_deterministic(torch.device("cuda"))
        made = make(work._replace(batch_size=1))
        self.logits = made.logits()
        self.module = made.module
        self._transposed = made.clips.shape[1] != 3  # Hugging Face's are [B, T, 3, S, S]
        prepare(self.module)
        self.clips: Tensor | None = None
        self.timed_logits: Tensor | None = None

    def load(self, batch_size: int) -> None:
        clips = self.work._replace(batch_size=batch_size).clips()
        self.clips = (clips.transpose(1, 2).contiguous() if self._transposed else clips).to(self.work.device)

    def step(self) -> None:
        if self.graphs:
            torch.compiler.cudagraph_mark_step_begin()
        self.module.zero_grad(set_to_none=True)
        with torch.autocast(self.work.device, torch.bfloat16):
            result = self.module(self.clips)
        logits = getattr(result, "logits", result)
        self.timed_logits = logits.detach()
        logits.float().square().sum().backward()


def _compile(module: torch.nn.Module) -> None:
    module.compile(dynamic=False)


CONTESTANTS: dict[str, Callable[[Work], Contestant]] = {
    OURS: partial(Contestant, make=ours, prepare=lambda module: None),
    COMPILED: partial(Contestant, make=ours, prepare=compile_network),
    GRAPHS: partial(Contestant, make=ours, prepare=partial(compile_network, cuda_graphs=True), graphs=True),
    PEERS[0]: partial(Contestant, make=partial(hugging_face, fused=False), prepare=lambda module: None),
    PEERS[1]: partial(Contestant, make=partial(hugging_face, fused=True), prepare=lambda module: None),
    PEERS[2]: partial(Contestant, make=partial(hugging_face, fused=True), prepare=_compile),
}


def serve(name: str, work: Work, pipe: Connection) -> None:
    """In a process of its own: ("load", batch size) -> {"prepare_s", "gib", "logits", "timed_logits"}; ("run", seconds)
    -> clips/s; and ("stop", None). What goes wrong comes back as a text."""
    end_with_parent()
    torch.set_num_threads(1 if work.device == "cuda" else torch.get_num_threads())
    began, contestant = time.perf_counter(), None
    while True:
        what, value = pipe.recv()
        if what == "stop":
            return
        try:
            if what == "load":
                contestant = contestant or CONTESTANTS[name](work)
                contestant.load(value)
                _warm_up(contestant)
                found = {"prepare_s": time.perf_counter() - began, "gib": _peak_gib(contestant)}
                logits = {"logits": contestant.logits, "timed_logits": contestant.timed_logits[0].float().cpu()}
                pipe.send(found | logits)
            else:
                pipe.send(_clips_per_second(contestant, seconds=value))
        except Exception as error:  # out of memory, not installed, a compiler that fails: the others are measured
            pipe.send((str(error).strip() or type(error).__name__).splitlines()[0])
        began = time.perf_counter()


def _warm_up(contestant: Contestant) -> None:
    """Runs three steps; the first one compiles. All contestants do this at once, so one may have to wait for memory."""
    for attempt in range(_ATTEMPTS):
        try:
            for _ in range(3):
                contestant.step()
            _wait(contestant.work.device)
            if contestant.graphs and cuda_graphs_skipped():
                raise RuntimeError("the compiler has left the CUDA graphs out")
            return
        except torch.OutOfMemoryError:
            if attempt == _ATTEMPTS - 1:
                raise
        # Not within the handler: the traceback there holds the memory of the step.
        contestant.timed_logits = None
        contestant.module.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        time.sleep(random.uniform(1, 4))


def _clips_per_second(contestant: Contestant, *, seconds: float) -> float:
    for _ in range(2):
        contestant.step()
    _wait(contestant.work.device)
    steps, start = 0, time.perf_counter()
    while True:
        for _ in range(4):
            contestant.step()
        steps += 4
        _wait(contestant.work.device)
        took = time.perf_counter() - start
        if took > seconds:
            break
    if contestant.work.device == "cuda":
        torch.cuda.empty_cache()  # for the next one
    return steps * len(contestant.clips) / took


def _peak_gib(contestant: Contestant) -> float | None:
    """Of a step. The memory that is not in use afterwards is given back, for the others."""
    if contestant.work.device != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    contestant.step()
    _wait("cuda")
    torch.cuda.empty_cache()
    peak = torch.cuda.max_memory_allocated()
    if contestant.graphs:  # their replay allocates nothing
        peak = max(peak, torch.cuda.memory_reserved())
    return peak / 2**30


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


@dataclass
class Runner:
    """A contestant's process."""

    name: str
    work: Work
    failure: str = ""
    prepared: dict[str, Any] = field(default_factory=dict)
    turns: list[float] = field(default_factory=list)

    def __post_init__(self):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(self.name, self.work, theirs))
        self._process.start()
        theirs.close()

    def send(self, what: str, value: Any = None) -> None:
        with contextlib.suppress(OSError):  # it has ended; `receive` says so
            self.pipe.send((what, value))

    def receive(self, deadline: float) -> Any:
        """None if there is no answer; `failure` says why."""
        answer = f"no answer within {_PREPARE_S} s"
        try:
            if self.pipe.poll(max(deadline - time.monotonic(), 0)):
                answer = self.pipe.recv()
        except (EOFError, OSError):
            self._process.join(timeout=5)
            answer = f"its process ended with exit code {self._process.exitcode}"
        if not isinstance(answer, str):
            return answer
        self.failure = answer
        self.stop()
        return None

    def stop(self) -> None:
        self.send("stop")
        self._process.join(timeout=5)
        self._process.kill()
        self._process.join()
        self.pipe.close()


def benchmark_gpu_model(
    *,
    size: str,
    num_frames: int,
    image_size: int,
    batch_sizes: Sequence[int],
    rounds: int,
    seconds: float,
    out: Path,
    device: str = "cuda",
    contestants: Sequence[str] = tuple(CONTESTANTS),
) -> None:
    """Measures, prints the table and writes model.json into `out`. Raises `InputError`."""
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", _COMPILE_THREADS)
    work = Work(size, 1, num_frames, image_size, device)
    try:
        gmac = multiply_adds(work.network) / 1e9
    except ValueError as error:
        raise InputError(str(error)) from None
    out.mkdir(parents=True, exist_ok=True)
    runners = [Runner(name, work) for name in contestants]
    try:
        measured = {batch_size: _measure(runners, batch_size, rounds, seconds) for batch_size in batch_sizes}
    finally:
        for runner in runners:
            runner.stop()
    report = {
        "command": " ".join(sys.argv),
        "machine": machine() | {"peers": peer_versions()},
        "settings": {"size": size, "num_frames": num_frames, "image_size": image_size, "rounds": rounds},
        "forward_gmac_per_clip": gmac,
        "matmul_tflops": matmul_tflops(device),
        "batches": measured,
        "attention_over_time_ms": {
            batch_size: attention_over_time(work, batch_size, device) for batch_size in batch_sizes
        },
    }
    report["targets"] = targets(report)
    (out / "model.json").write_text(json.dumps(report, indent=2) + "\n")
    print(table(report))
    print(f"\n{out / 'model.json'}")


def _measure(runners: list[Runner], batch_size: int, rounds: int, seconds: float) -> dict[str, Any]:
    """Results by name; {"failure": reason} for a contestant that failed."""
    print(f"batch {batch_size}: preparing {len(runners)} networks", file=sys.stderr, flush=True)
    alive = [runner for runner in runners if not runner.failure]
    deadline = time.monotonic() + _PREPARE_S
    for runner in alive:
        runner.turns = []
        runner.send("load", batch_size)
    for runner in alive:
        runner.prepared = runner.receive(deadline)
    alive = [runner for runner in alive if not runner.failure]
    for runner in alive:
        _compare(runner, alive[0])
    for number in range(rounds):
        print(f"batch {batch_size}: round {number + 1} of {rounds}", file=sys.stderr, flush=True)
        first = number % max(len(alive), 1)
        for runner in (*alive[first:], *alive[:first]):
            if runner.failure:
                continue
            runner.send("run", seconds)
            speed = runner.receive(time.monotonic() + _PREPARE_S)
            runner.turns += [speed] if speed else []
    return {
        runner.name: {"failure": runner.failure}
        if runner.failure
        else {
            "clips_per_second": runner.turns,
            "gib": runner.prepared["gib"],
            "prepare_s": runner.prepared["prepare_s"],
        }
        for runner in runners
    }


def _compare(runner: Runner, with_one: Runner) -> None:
    """Raises `InputError` if two networks compute something else."""
    mine, others = runner.prepared, with_one.prepared
    difference = (mine["logits"] - others["logits"]).abs().max().item()
    share = ((mine["timed_logits"] - others["timed_logits"]).norm() / others["timed_logits"].norm()).item()
    if not (difference <= _LARGEST_DIFFERENCE and share <= _LARGEST_SHARE):
        raise InputError(
            f"{runner.name} computes something else than {with_one.name}: its logits are {difference:.1e} away, and "
            f"{share:.1%} in bf16, as it is timed"
        )


def matmul_tflops(device: str) -> float:
    """In bf16: the best of several products of large square matrices."""
    size = _MATMUL_SIZE if device == "cuda" else 512
    a, b = torch.randn(2, size, size, device=device).bfloat16()
    best = float("inf")
    for _ in range(8):
        start = time.perf_counter()
        a @ b
        _wait(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e12


# -- attention over time, three ways --


def _by_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(2, 3) * q.shape[3] ** -0.5).softmax(3) @ v


def _packed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As many sequences in a row as make 64 tokens, which do not see each other's."""
    batch, heads, length, dim = q.shape
    together = max(64 // length, 1)
    of = torch.arange(together * length, device=q.device) // length
    mask = torch.zeros(len(of), len(of), device=q.device, dtype=q.dtype).masked_fill_(of[:, None] != of, -torch.inf)
    q, k, v = (
        each.transpose(1, 2).reshape(batch // together, together * length, heads, dim).transpose(1, 2)
        for each in (q, k, v)
    )
    found = scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return found.transpose(1, 2).reshape(batch, length, heads, dim).transpose(1, 2)


def attention_over_time(work: Work, batch_size: int, device: str) -> dict[str, float]:
    """Milliseconds, forward and backward, of one block's attention over time in bf16: as the network does it ("sdpa"),
    as two products and a softmax, and packed."""
    with torch.device("meta"):
        network = work.network()
    heads, dim = network.blocks[0].attn.num_heads, network.norm.normalized_shape[0]
    patches = batch_size * (work.image_size // network.patch_embed.patch_size) ** 2 // 8 * 8
    shape = (patches, work.num_frames, 3, heads, dim // heads)
    qkv = torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True)
    found = {}
    for name, attend in (("sdpa", scaled_dot_product_attention), ("products", _by_products), ("packed", _packed)):

        def step(attend=attend) -> None:
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
            torch.autograd.grad(attend(q, k, v).transpose(1, 2).flatten(2).sum(), qkv)

        times = []
        for _ in range(20 if device == "cuda" else 2):
            _wait(device)
            start = time.perf_counter()
            step()
            _wait(device)
            times.append(1000 * (time.perf_counter() - start))
        found[name] = statistics.median(times)
    return found


# -- the report --


def _speed(batches: dict[int, Any], batch_size: int, name: str) -> float | None:
    turns = batches.get(batch_size, {}).get(name, {}).get("clips_per_second")
    return statistics.median(turns) if turns else None


def targets(report: dict[str, Any]) -> list[dict[str, Any]]:
    """What this project wants of a step on an H100 or H200, as far as it was measured."""
    speed = partial(_speed, report["batches"])
    memory = report["batches"].get(32, {}).get(COMPILED, {}).get("gib")
    found = []
    for what, value, least in [
        ("clips/s at batch 8, compiled", speed(8, COMPILED), 220),
        ("clips/s at batch 32, compiled", speed(32, COMPILED), 280),
        *(
            (f"compiled over {PEERS[2]}, batch {size}", mine / other, 1.3)
            for size in report["batches"]
            if (mine := speed(size, COMPILED)) and (other := speed(size, PEERS[2]))
        ),
    ]:
        if value:
            found.append({"what": what, "value": value, "at_least": least, "met": value >= least})
    if memory:
        found.append({"what": "GiB at batch 32, compiled", "value": memory, "at_most": 20, "met": memory <= 20})
    return found


def table(report: dict[str, Any]) -> str:
    """The report as text."""
    found, peak = report["machine"], report["matmul_tflops"]
    versions = {"torch": found["versions"]["torch"]} | found["peers"]
    lines = [f"{found['gpu']}; {found['cpu']}, {found['cores']} cores"]
    lines += [", ".join(f"{name} {value}" for name, value in each.items()) for each in (versions, report["settings"])]
    lines.append(
        f"{report['forward_gmac_per_clip']:.4g} GMAC a clip; a large matrix product in bf16: {peak:.0f} TFLOP/s"
    )
    for batch_size, batch in report["batches"].items():
        lines += ["", f"batch {batch_size}, forward and backward in bf16"]
        lines.append(f"{'':22}clips/s       (rounds)     ms/step  TFLOP/s  share    GiB  ready after s")
        for name, result in batch.items():
            if "failure" in result:
                lines.append(f"{name:22}not measured: {result['failure']}")
                continue
            turns, gib = result["clips_per_second"], result["gib"]
            speed = statistics.median(turns)
            tflops = 6 * report["forward_gmac_per_clip"] * speed / 1000
            lines.append(
                f"{name:22}{speed:7.1f}  {min(turns):7.1f} .. {max(turns):7.1f} {1000 * batch_size / speed:8.1f} "
                f"{tflops:8.1f} {tflops / peak:6.0%} {'' if gib is None else format(gib, '.1f'):>6} "
                f"{result['prepare_s']:8.0f}"
            )
        each = ", ".join(f"{name} {ms:.3g}" for name, ms in report["attention_over_time_ms"][batch_size].items())
        lines.append(f"attention over time of one block, forward and backward, ms: {each}")
    lines.append("")
    for target in report["targets"]:
        bound = f"at least {target['at_least']}" if "at_least" in target else f"at most {target['at_most']}"
        lines.append(f"{target['what']}: {target['value']:.4g}, target {bound}: {'met' if target['met'] else 'missed'}")
    return "\n".join(lines)
