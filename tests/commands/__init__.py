"""How tests run the commands."""

import os
import subprocess
import sys
from pathlib import Path

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
