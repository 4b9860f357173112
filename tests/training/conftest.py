"""A small data set and a config for it, and how tests run the commands."""

import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dali_pipelines.errors import run_command
from dali_pipelines.manifest import Manifest, probe
from tests.videos import textured, write_video

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


@pytest.fixture(scope="session")
def small_data(tmp_path_factory) -> Path:
    """13 training and 7 validation videos (primes: nothing divides them) of three classes, told apart by their tint,
    in two codecs; with manifests train.csv and val.csv."""
    folder = tmp_path_factory.mktemp("small")
    for name, count in (("train", 13), ("val", 7)):
        videos = []
        for number in range(count):
            codec, suffix = (("h264", "mp4"), ("vp9", "webm"))[number % 2]
            tint = 80 * np.eye(3)[number % 3]
            pictures = [
                np.clip(picture * 0.6 + tint, 0, 255).astype(np.uint8)
                for picture in textured(6 + number, height=40, width=40 + 4 * number, seed=100 * count + number)
            ]
            path = write_video(folder / f"{name}_{number}.{suffix}", pictures, codec=codec)
            videos.append(probe(path)._replace(path=os.path.basename(path), label=number % 3))
        Manifest(videos, root=folder, classes=("ash", "birch", "cedar")).write(folder / f"{name}.csv")
    return folder


@pytest.fixture
def config_file(small_data, tmp_path) -> Path:
    """A config that reads `small_data` and writes below the test's own folder."""
    text = CONFIG.format(folder=small_data).replace(f"{small_data}/output", f"{tmp_path}/output")
    path = tmp_path / "tiny.yaml"
    path.write_text(text)
    return path


@pytest.fixture
def small_files(monkeypatch):
    """Sets how many bytes a checkpoint or weights file may have: a longer write fails midway, as on a full disk."""
    largest = [None]

    class SmallFile(io.FileIO):
        def write(self, data):
            if largest[0] is not None and self.tell() + len(data) > largest[0]:
                super().write(data[: largest[0] - self.tell()])
                raise OSError(errno.EFBIG, "File too large")
            return super().write(data)

    monkeypatch.setattr("training.weights.open", SmallFile, raising=False)
    return lambda size: largest.__setitem__(0, size)


@pytest.fixture
def in_process(monkeypatch, capsys):
    """Runs a command's `main` here, which is quicker than `run`: (exit status, stdout, stderr)."""

    def command(main, *arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [f"{main.__module__}.py", *map(str, arguments)])
        threads = torch.get_num_threads()
        try:
            with pytest.raises(SystemExit) as ended:
                run_command(main)
        finally:
            torch.set_num_threads(threads)
        return ended.value.code, *capsys.readouterr()

    return command


def run(
    command: str | Path,
    *arguments: object,
    processes: int = 1,
    cwd: Path | None = None,
    path: Path | None = None,
    timeout: float = 300,
) -> subprocess.CompletedProcess:
    """Runs train.py, evaluate.py, ... as a person would; processes > 1: through torchrun. `path`: for imports."""
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
