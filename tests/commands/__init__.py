"""How tests run the commands."""

import contextlib
import importlib
import io
import os
import subprocess
import sys
from pathlib import Path
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
