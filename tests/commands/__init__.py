"""How tests run the commands."""

import contextlib
import functools
import importlib
import io
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from multiprocessing import Process, connection, forkserver
from multiprocessing.context import ForkServerContext
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from common.command_line import run_command

PROJECT = Path(__file__).parents[2]


CONFIG = """
name: tiny
output: {folder}/output
device: cpu
data: {{train: {folder}/train.csv, val: {folder}/val.csv, num_frames: 4, crop_size: 32, stride: null, workers: 0}}
model: {{embed_dim: 24, depth: 2, num_heads: 3, embed_init_std: 0.5, drop_path: 0.2}}
optim: {{name: sgd, lr: 0.05, warmup_start_lr: 0.01, warmup_epochs: 0.5, clip_norm: 5, global_batch_size: 4}}
train: {{epochs: 3, log_every_steps: 1}}
"""


def free_port() -> int:
    """A port of this machine that nobody listens to."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def run(
    command: str | Path,
    *arguments: object,
    processes: int = 1,
    cwd: Path | None = None,
    path: Path | None = None,
    timeout: float = 300,
) -> subprocess.CompletedProcess:
    """Runs train.py, evaluate.py, ... as a user would; processes > 1: through torchrun. `path`: for imports."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.run(
        [*launcher, str(PROJECT / command), *map(str, arguments)],
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | ({"PYTHONPATH": str(path)} if path else {}),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def run_forked(
    command: str | Path, *arguments: object, processes: int = 1, cwd: Path | None = None, timeout: float = 300
) -> subprocess.CompletedProcess:
    """Does what `run` does, with ranks forked from a process that has imported everything: seconds less for each.
    The first rank that fails ends the others, no `atexit` function runs, and what reads the environment when it is
    imported has read that of pytest."""
    world = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    until = time.monotonic() + timeout
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        ranks = []
        for rank in range(processes):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} | world if processes > 1 else {}
            environment = os.environ | {"OMP_NUM_THREADS": "1"} | own
            streams = [DupFd(file.fileno()) for file in (out, errors)]
            given = str(PROJECT / command), list(map(str, arguments)), str(cwd or os.getcwd()), environment, streams
            ranks.append(fork_server().Process(target=_rank, args=given))
            ranks[-1].start()
        while (alive := [rank.sentinel for rank in ranks if rank.exitcode is None]) and time.monotonic() < until:
            if any(rank.exitcode for rank in ranks):
                break
            connection.wait(alive, 1)
        for end, patience_s in ((Process.terminate, 10), (Process.kill, 30)):  # those that have ended are left alone
            for rank in ranks:
                rank.join(patience_s)
                end(rank)
        for rank in ranks:
            rank.join()
        status = next((rank.exitcode for rank in ranks if rank.exitcode), 0)
        said = []
        for file in (out, errors):
            file.seek(0)
            said.append(file.read().decode())
    return subprocess.CompletedProcess([command, *arguments], status, *said)


@functools.cache
def fork_server() -> ForkServerContext:
    """Forks processes that have imported `tests.preloaded`. It is the only one of a process that runs tests."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preloaded"])
    with mock.patch.dict(os.environ, {"OMP_NUM_THREADS": "1"}):
        forkserver.ensure_running()
    return context


def _rank(script: str, arguments: list[str], folder: str, environment: dict[str, str], streams: list[Any]) -> None:
    for number, stream in enumerate(streams, start=1):
        os.dup2(stream.detach(), number)
    os.chdir(folder)
    os.environ.clear()
    os.environ |= environment
    sys.argv = [script, *arguments]
    sys.path.insert(0, os.path.dirname(script))
    runpy.run_path(script, run_name="__main__")


def run_here(command: str, *arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess:
    """Runs train.py, evaluate.py, ... in this process, which saves seconds of imports; in fixtures of any scope."""
    main = importlib.import_module(f"commands.{command.removesuffix('.py')}").main
    threads, status = torch.get_num_threads(), None
    out, errors = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
    with (
        mock.patch.object(sys, "argv", [command, *map(str, arguments)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(errors),
        contextlib.chdir(cwd or os.curdir),
    ):
        try:
            run_command(main)
        except SystemExit as ended:
            status = ended.code
        finally:
            torch.set_num_threads(threads)
    said = (stream.buffer.getvalue().decode() for stream in (out, errors))
    return subprocess.CompletedProcess([command, *arguments], status, *said)
