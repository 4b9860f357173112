"""`benchmark.py model --device cuda`: training steps of this network and of Hugging Face's on a GPU.

Why the comparison is fair:

- All contestants have the same weights, clips and autocast (bf16); a step is forward and backward, without optimizer.
  In float32, before it is compiled, a network's logits must agree with ours to 1e-3; in bf16, as timed, to 5%.
- Ours uses deterministic algorithms, as in training; Hugging Face's network uses PyTorch's default, which may be
  faster.
- Each contestant has its own process. All prepare in parallel (compiling takes a core, not the GPU); then they take
  turns on an otherwise idle GPU, and a different one starts each round. Ratios are of medians.
- Hugging Face's network is also measured with PyTorch's fused attention, which it does not use itself, and compiled.
- TFLOP/s count the multiply-adds of our network per clip, three forward passes per step, for all contestants.
- Memory: torch.cuda.max_memory_allocated of a step, with weights and gradients; with CUDA graphs, what they reserve.
"""

import contextlib
import multiprocessing
import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.machine import gpu_matmul_tflops, machine, wait_for_gpu
from benchmarks.networks import PATCH_SIZE, SIZES, M, NetworkWork, TorchContestant, hugging_face, ours, peer_versions
from benchmarks.reporting import Report, command, listed, progress, write_and_print
from common.precision import make_deterministic
from dali_pipelines.errors import InputError
from dali_pipelines.processes import end_with_parent
from model.kernels import _attend_by_products
from model.timesformer import multiply_adds
from training.compiling import compile_network, cuda_graphs_skipped

BATCH_SIZES = (8, 32)  # the published recipe's, and one to fill the GPU
OURS, COMPILED, GRAPHS = "ours", "ours compiled", "ours, CUDA graphs"
PEERS = ("huggingface eager", "huggingface sdpa", "huggingface compiled")
_LARGEST_DIFFERENCE = 1e-3
_LARGEST_SHARE = 0.05  # in bf16: norm of the difference, relative to the norm
_PREPARE_S = 100  # seconds to import, build, compile and warm up
_ATTEMPTS = 10  # attempts to allocate memory that other contestants may hold
_COMPILE_THREADS = "3"  # of each contestant


class Contestant:
    """Training steps in bf16; `logits` of one clip in float32, for comparison."""

    def __init__(
        self,
        work: NetworkWork,
        make: Callable[[NetworkWork], TorchContestant[M]],
        prepare: Callable[[M], None],
        *,
        graphs: bool = False,
    ):
        self.work, self.graphs = work, graphs
        if make is ours and work.device == "cuda":
            make_deterministic(torch.device("cuda"))
        made = make(work._replace(batch_size=1))
        self.logits = made.logits()
        self.module: nn.Module = made.module
        self.clips = made.clips
        self._transposed = made.clips.shape[1] != 3  # Hugging Face's are [B, T, 3, S, S]
        prepare(made.module)

    def load(self, batch_size: int) -> None:
        """Replaces the clips with a batch of another size."""
        clips = self.work._replace(batch_size=batch_size).clips()
        self.clips = (clips.transpose(1, 2).contiguous() if self._transposed else clips).to(self.work.device)

    def step(self) -> Tensor:
        """Runs a forward and a backward pass, and returns the logits."""
        if self.graphs:
            torch.compiler.cudagraph_mark_step_begin()
        self.module.zero_grad(set_to_none=True)
        with torch.autocast(self.work.device, torch.bfloat16):
            result = self.module(self.clips)
        logits = getattr(result, "logits", result)
        logits.float().square().sum().backward()
        return logits.detach()


def _compile(module: nn.Module) -> None:
    module.compile(dynamic=False)


CONTESTANTS: dict[str, Callable[[NetworkWork], Contestant]] = {
    OURS: partial(Contestant, make=ours, prepare=lambda module: None),
    COMPILED: partial(Contestant, make=ours, prepare=compile_network),
    GRAPHS: partial(Contestant, make=ours, prepare=partial(compile_network, cuda_graphs=True), graphs=True),
    PEERS[0]: partial(Contestant, make=partial(hugging_face, fused=False), prepare=lambda module: None),
    PEERS[1]: partial(Contestant, make=partial(hugging_face, fused=True), prepare=lambda module: None),
    PEERS[2]: partial(Contestant, make=partial(hugging_face, fused=True), prepare=_compile),
}


# -- a contestant's process --


class Load(NamedTuple):
    """Asks a process to prepare for a batch size; the answer is `Prepared`."""

    batch_size: int


class Time(NamedTuple):
    """Asks a process to time steps for some seconds; the answer is clips/s."""

    seconds: float


class Prepared(NamedTuple):
    """The answer of a contestant that is ready."""

    prepare_s: float
    gib: float | None
    """Peak memory of a step in GiB; None on a CPU."""
    logits: Tensor
    """float32 [1, classes] of one clip, computed in float32."""
    timed_logits: Tensor
    """float32 [classes] of the first clip, computed as timed."""


class Failure(str):
    """The reason that a contestant failed."""


def serve(name: str, work: NetworkWork, pipe: Connection) -> None:
    """Runs in its own process: answers every `Load` and `Time`, with `Failure` if it fails, until it gets None."""
    end_with_parent()
    torch.set_num_threads(1 if work.device == "cuda" else torch.get_num_threads())
    began = time.perf_counter()
    contestant: Contestant | None = None
    while (message := pipe.recv()) is not None:
        try:
            if isinstance(message, Load):
                contestant = contestant or CONTESTANTS[name](work)
                contestant.load(message.batch_size)
                timed_logits = _warm_up(contestant)
                prepare_s = time.perf_counter() - began
                pipe.send(Prepared(prepare_s, _peak_gib(contestant), contestant.logits, timed_logits))
            else:
                assert contestant is not None
                pipe.send(_clips_per_second(contestant, seconds=message.seconds))
        except Exception as error:  # out of memory, not installed, compiler failure: still measure the others
            pipe.send(Failure((str(error).strip() or type(error).__name__).splitlines()[0]))
        began = time.perf_counter()


def _warm_up(contestant: Contestant) -> Tensor:
    """Runs three steps, the first of which compiles. Returns the logits of the first clip.

    All contestants do this at the same time, so one may have to wait for memory."""
    for attempt in range(_ATTEMPTS):
        try:
            return _three_steps(contestant)
        except torch.OutOfMemoryError:
            if attempt == _ATTEMPTS - 1:
                raise
        # Not within the handler, where the traceback holds the memory of the step.
        contestant.module.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        time.sleep(random.uniform(1, 4))
    raise AssertionError


def _three_steps(contestant: Contestant) -> Tensor:
    for _ in range(3):
        logits = contestant.step()
    wait_for_gpu(contestant.work.device)
    if contestant.graphs and cuda_graphs_skipped():
        raise RuntimeError("the compiler skipped the CUDA graphs")
    return logits[0].float().cpu()


def _clips_per_second(contestant: Contestant, *, seconds: float) -> float:
    for _ in range(2):
        contestant.step()
    wait_for_gpu(contestant.work.device)
    steps, start = 0, time.perf_counter()
    while True:
        for _ in range(4):
            contestant.step()
        steps += 4
        wait_for_gpu(contestant.work.device)
        took = time.perf_counter() - start
        if took > seconds:
            break
    if contestant.work.device == "cuda":
        torch.cuda.empty_cache()  # for the next contestant
    return steps * len(contestant.clips) / took


def _peak_gib(contestant: Contestant) -> float | None:
    """Peak memory of a step in GiB. Frees unused memory for the others afterwards."""
    if contestant.work.device != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    contestant.step()
    wait_for_gpu("cuda")
    torch.cuda.empty_cache()
    peak = torch.cuda.max_memory_allocated()
    if contestant.graphs:  # replaying them allocates nothing
        peak = max(peak, torch.cuda.memory_reserved())
    return peak / 2**30


@dataclass
class Runner:
    """Starts a contestant's process and talks to it."""

    name: str
    work: NetworkWork
    failure: str = ""
    prepared: Prepared | None = None
    turns: list[float] = field(default_factory=list)
    """Clips/s."""

    def __post_init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(self.name, self.work, theirs))
        self._process.start()
        theirs.close()

    def send(self, message: Load | Time | None) -> None:
        """Sends a message; None ends the process."""
        with contextlib.suppress(OSError):  # the process has ended, which `receive` reports
            self.pipe.send(message)

    def receive(self, deadline: float) -> Any:
        """Returns the answer; if there is none, sets `failure`, ends the process and returns None."""
        answer: Any = Failure(f"no answer within {_PREPARE_S} s")
        try:
            if self.pipe.poll(max(deadline - time.monotonic(), 0)):
                answer = self.pipe.recv()
        except (EOFError, OSError):
            self._process.join(timeout=5)
            answer = Failure(f"its process ended with exit code {self._process.exitcode}")
        if not isinstance(answer, Failure):
            return answer
        self.failure = answer
        self.stop()
        return None

    def stop(self) -> None:
        """Ends the process."""
        self.send(None)
        self._process.join(timeout=5)
        self._process.kill()
        self._process.join()
        self.pipe.close()

    def result(self) -> dict[str, Any]:
        """The result for the report."""
        if self.prepared is None or self.failure:
            return {"failure": self.failure}
        return {"clips_per_second": self.turns, "gib": self.prepared.gib, "prepare_s": self.prepared.prepare_s}


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
    work = NetworkWork(size, 1, num_frames, image_size, device)
    try:
        gmac = multiply_adds(work.network) / 1e9
    except ValueError as error:
        raise InputError(str(error)) from None
    out.mkdir(parents=True, exist_ok=True)
    minutes = len(batch_sizes) * (_PREPARE_S + len(contestants) * rounds * seconds) / 60
    progress(f"at most about {max(round(minutes), 1)} min: {len(contestants)} networks, {rounds} rounds a batch size")
    runners = [Runner(name, work) for name in contestants]
    try:
        measured = {batch_size: _measure(runners, batch_size, rounds, seconds) for batch_size in batch_sizes}
    finally:
        for runner in runners:
            runner.stop()
    report: Report = {
        "command": command(),
        "machine": machine() | {"peers": peer_versions()},
        "settings": {"size": size, "num_frames": num_frames, "image_size": image_size, "rounds": rounds},
        "forward_gmac_per_clip": gmac,
        "matmul_tflops": gpu_matmul_tflops(device),
        "batches": measured,
        "attention_over_time_ms": {
            batch_size: attention_over_time(work, batch_size, device) for batch_size in batch_sizes
        },
    }
    write_and_print(report, out / "model.json", table(report))


def _measure(runners: list[Runner], batch_size: int, rounds: int, seconds: float) -> dict[str, dict[str, Any]]:
    """Measures all contestants; returns `Runner.result` by name."""
    progress(f"batch {batch_size}: preparing {len(runners)} networks")
    alive = [runner for runner in runners if not runner.failure]
    deadline = time.monotonic() + _PREPARE_S
    for runner in alive:
        runner.turns = []
        runner.send(Load(batch_size))
    for runner in alive:
        runner.prepared = runner.receive(deadline)
    alive = [runner for runner in alive if not runner.failure]
    for runner in alive:
        _check_logits(runner, alive[0])
    for number in range(rounds):
        progress(f"batch {batch_size}: round {number + 1} of {rounds}")
        first = number % max(len(alive), 1)
        for runner in (*alive[first:], *alive[:first]):
            if runner.failure:
                continue
            runner.send(Time(seconds))
            if speed := runner.receive(time.monotonic() + _PREPARE_S):
                runner.turns.append(speed)
    return {runner.name: runner.result() for runner in runners}


def _check_logits(runner: Runner, reference: Runner) -> None:
    """Raises `InputError` if two networks compute different logits."""
    found, expected = runner.prepared, reference.prepared
    assert found and expected
    difference = (found.logits - expected.logits).abs().max().item()
    share = ((found.timed_logits - expected.timed_logits).norm() / expected.timed_logits.norm()).item()
    if not (difference <= _LARGEST_DIFFERENCE and share <= _LARGEST_SHARE):
        raise InputError(
            f"{runner.name} and {reference.name} compute different results: their logits differ by {difference:.1e}, "
            f"and by {share:.1%} in bf16, as timed"
        )


# -- attention over time, three ways --


def _by_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The CPU's attention: two products and a softmax."""
    return _attend_by_products(*(each.flatten(0, 1) for each in (q, k, v))).unflatten(0, q.shape[:2])


def _packed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention over sequences packed into 64 tokens, with a mask between them."""
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


def attention_over_time(work: NetworkWork, batch_size: int, device: str) -> dict[str, float]:
    """Milliseconds, forward and backward, of one block's attention over time in bf16: as the network does it ("sdpa"),
    as two products and a softmax, and packed."""
    dim, _, heads = SIZES[work.size]
    patches = batch_size * (work.image_size // PATCH_SIZE) ** 2 // 8 * 8
    shape = (patches, work.num_frames, 3, heads, dim // heads)
    qkv = torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True)
    ways: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        "sdpa": scaled_dot_product_attention,
        "products": _by_products,
        "packed": _packed,
    }
    found = {}
    for name, attend in ways.items():
        times = []
        for _ in range(20 if device == "cuda" else 2):
            wait_for_gpu(device)
            start = time.perf_counter()
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
            torch.autograd.grad(attend(q, k, v).transpose(1, 2).flatten(2).sum(), qkv)
            wait_for_gpu(device)
            times.append(1000 * (time.perf_counter() - start))
        found[name] = statistics.median(times)
    return found


# -- the report --


def table(report: Report) -> str:
    """The report as text."""
    found, peak = report["machine"], report["matmul_tflops"]
    versions = {"torch": found["versions"]["torch"]} | found["peers"]
    lines = [f"{found['gpu']}; {found['cpu']}, {found['cores']} cores"]
    lines += [listed(versions), listed(report["settings"])]
    lines.append(
        f"{report['forward_gmac_per_clip']:.4g} GMAC per clip; a large matrix product in bf16: {peak:.0f} TFLOP/s"
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
    return "\n".join(lines)
