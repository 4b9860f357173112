"""Runs of train.py that can be watched and killed, what they leave behind, and whether two of them are equal."""

import contextlib
import ctypes
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch

from common.weights import read_safetensors
from dali_pipelines.manifest import Manifest
from dali_pipelines.probe import probe
from tests.torture.observed import BOARD_BYTES, PHASES
from tests.videos import textured, write_video
from training.checkpoints import list_checkpoints, load_newest_checkpoint

OBSERVED = Path(__file__).with_name("observed.py")
PATIENCE_S = 180  # for anything that a run should come to by itself
_TORCHS_OWN = ("torchinductor_", "torchelastic_")  # its cache; the log folders of a torchrun that is killed
_NEWNS, _NEWUSER = 0x20000, 0x10000000
_SUBREAPER, _PARENT_DEATH = 36, 1  # of prctl
_REC_PRIVATE = 0x4000 | 0x40000

CONFIG = """
name: torture
device: cpu
data: {{train: {folder}/train.csv, val: {folder}/val.csv, num_frames: 4, crop_size: 32, stride: null, workers: 2,
  max_fault_fraction: 1}}
model: {{embed_dim: 24, depth: 2, num_heads: 3, embed_init_std: 0.5, drop_path: 0.2}}
optim: {{name: adamw, lr: 0.002, warmup_start_lr: 0.001, warmup_epochs: 0.5, clip_norm: 5, global_batch_size: 4}}
mix: {{cutmix_prob: 0.5, mixup_alpha: 0.2}}
train: {{epochs: 8, swa_epochs: 3, log_every_steps: 1, checkpoint_every_steps: 2}}
"""


class BrokenPromiseError(Exception):
    """Something that must not happen has happened."""


# -- data --


def make_data(folder: Path) -> Path:
    """20 training and 6 validation videos of three classes, in three codecs, and config.yaml for them."""
    folder.mkdir(parents=True)
    for name, count in (("train", 20), ("val", 6)):
        videos = []
        for number in range(count):
            codec, suffix = (("h264", "mp4"), ("vp9", "webm"), ("mpeg4", "avi"))[number % 3]
            frames = textured(6 + number % 7, height=40, width=40 + 4 * (number % 5), seed=100 * count + number)
            path = write_video(folder / f"{name}_{number}.{suffix}", frames, codec=codec)
            videos.append(probe(path)._replace(path=os.path.basename(path), label=number // 3 % 3))
        Manifest(videos, root=folder, classes=("ash", "birch", "cedar")).write(folder / f"{name}.csv")
    (folder / "config.yaml").write_text(CONFIG.format(folder=folder))
    return folder


def damage_data(source: Path, folder: Path) -> Path:
    """A copy of the data in which one file in ten is no longer what was indexed: cut, emptied or overwritten."""
    shutil.copytree(source, folder)
    for name, numbers in (("train", (3, 13)), ("val", (2,))):
        for number in numbers:
            (path,) = folder.glob(f"{name}_{number}.*")
            whole = path.read_bytes()
            path.write_bytes(b"no video" * 50 if number == 13 else whole[: len(whole) // 3])
        manifest = Manifest.read(folder / f"{name}.csv")
        Manifest([manifest[n] for n in range(len(manifest))], root=folder, classes=manifest.classes).write(
            folder / f"{name}.csv"
        )
    (folder / "config.yaml").write_text(CONFIG.format(folder=folder))
    return folder


# -- what is left behind --


def isolate() -> bool:
    """Gives this process a /dev/shm of its own, makes it the parent of every process that loses its own, and ends
    it with its parent. Returns False if the system does not allow the first."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_SUBREAPER, 1)
    libc.prctl(_PARENT_DEATH, signal.SIGKILL)
    user, group = os.getuid(), os.getgid()
    if libc.unshare(_NEWNS):
        if libc.unshare(_NEWNS | _NEWUSER):
            return False
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    return libc.mount(b"none", b"/", None, _REC_PRIVATE, None) == 0 and mount_disk(Path("/dev/shm"), "256m")


def mount_disk(folder: Path, size: str, *, again: bool = False) -> bool:
    """Puts a file system in memory of this size at `folder`, or resizes the one there; False if that is not allowed."""
    folder.mkdir(parents=True, exist_ok=True)
    remount, options = (0x20 if again else 0), f"size={size}".encode()
    return ctypes.CDLL(None).mount(b"torture", os.fsencode(folder), b"tmpfs", remount, options) == 0


def unmount(folder: Path) -> None:
    ctypes.CDLL(None).umount2(os.fsencode(folder), 2)


def living_children() -> list[psutil.Process]:
    """All descendants of this process that run; the dead ones among its children are buried."""
    with contextlib.suppress(ChildProcessError):
        # Only what this process has inherited: `Popen` waits for those that it started.
        for child in psutil.Process().children():
            if child.pid not in _started and child.status() == psutil.STATUS_ZOMBIE:
                os.waitpid(child.pid, os.WNOHANG)
    found = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if child.status() != psutil.STATUS_ZOMBIE:
                found.append(child)
    return found


_started: set[int] = set()


def find_leftovers(temporary: Path, *, shared_before: set[str] = frozenset(), patience_s: float = 15) -> list[str]:
    """Processes that this one has inherited, files in the temporary folder, and shared memory and semaphores that were
    not there before; in words. Processes have `patience_s` to end."""
    end = time.monotonic() + patience_s
    while (processes := living_children()) and time.monotonic() < end:
        time.sleep(0.05)
    found = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            found.append(f"process {process.pid}: {' '.join(process.cmdline())[:100]}")
    names = [name for name in os.listdir(temporary) if not name.startswith(_TORCHS_OWN)]
    return found + [f"temporary folder: {name}" for name in names] + shared_leftovers(shared_before)


def shared_leftovers(before: set[str]) -> list[str]:
    return [f"/dev/shm/{name}" for name in sorted(set(os.listdir("/dev/shm")) - before)]


# -- runs --


class Settings(NamedTuple):
    """What all starts of one run have in common."""

    folder: Path
    config: Path
    overrides: tuple[str, ...] = ()
    environment: dict[str, str] = {}  # noqa: RUF012
    slow_s: float = 0.0

    @property
    def output(self) -> Path:
        return self.folder / "output"

    @property
    def temporary(self) -> Path:
        return self.folder / "tmp"


class Run:
    """One start of train.py, in one process or, by torchrun, in two: `with Run(settings) as run`. What is left of it is
    killed at the end."""

    def __init__(
        self,
        settings: Settings,
        *arguments: str,
        ranks: int = 1,
        resume: bool = True,
        launcher: tuple[str, ...] = ("--standalone",),
    ):
        self.settings, self.ranks = settings, ranks
        settings.temporary.mkdir(parents=True, exist_ok=True)
        self.is_resumed = bool(list_checkpoints(settings.output / "checkpoints"))
        boards = [settings.folder / f"board.{rank}" for rank in range(ranks)]
        for board in boards:
            board.write_bytes(bytes(BOARD_BYTES))
        self._boards = [os.open(board, os.O_RDONLY) for board in boards]
        command = [sys.executable]
        if ranks > 1:
            command += ["-m", "torch.distributed.run", *launcher, "--nproc-per-node", str(ranks)]
        command += [str(OBSERVED), "-c", str(settings.config)] + ["--resume"] * resume
        command += ["-o", f"output={settings.output}", *settings.overrides, *arguments]
        self._log = settings.folder / "said.txt"
        self._log_start = self._log.stat().st_size if self._log.exists() else 0
        own = {"TORTURE_BOARD": settings.folder, "TORTURE_SLOW": settings.slow_s, "TMPDIR": settings.temporary}
        own |= {"OMP_NUM_THREADS": 1, "PYTHONUNBUFFERED": 1, "PYTHONPATH": OBSERVED.parents[2]}
        self.started = time.monotonic()
        with open(self._log, "ab") as log:
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                env=os.environ | {key: str(value) for key, value in own.items()} | settings.environment,
                start_new_session=True,
                preexec_fn=_prepare,
            )
        _started.add(self.process.pid)

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_) -> None:
        for process in [self.process, *living_children()]:
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                process.kill()
        self.process.wait()
        _started.discard(self.process.pid)
        for board in self._boards:
            os.close(board)

    @property
    def said(self) -> str:
        """Standard output and error of this start."""
        with open(self._log, "rb") as log:
            log.seek(self._log_start)
            return log.read().decode(errors="replace")

    @property
    def is_over(self) -> bool:
        return self.process.poll() is not None

    def phase(self, rank: int = 0) -> str:
        """What that rank does, or did when it died."""
        place, is_writing, _ = os.pread(self._boards[rank], BOARD_BYTES, 0)
        if is_writing:
            return "saving"
        return "resume" if place == 0 and self.is_resumed else PHASES[place]

    @property
    def has_begun(self) -> bool:
        """Whether Python has come to the first line of the command."""
        return bool(os.pread(self._boards[0], BOARD_BYTES, 0)[2])

    def rank_process(self, rank: int) -> psutil.Process | None:
        """The process of that rank; None if it is not there (yet)."""
        if self.ranks == 1:
            return psutil.Process(self.process.pid)
        for child in psutil.Process(self.process.pid).children():
            with contextlib.suppress(psutil.Error):
                if child.environ().get("RANK") == str(rank):
                    return child
        return None

    def workers(self, rank: int = 0) -> list[psutil.Process]:
        """Those of the loaders that live."""
        found = []
        with contextlib.suppress(psutil.Error):
            if main := self.rank_process(rank):
                for child in main.children():
                    with contextlib.suppress(psutil.Error):
                        if "multiprocessing.spawn" in " ".join(child.cmdline()) and is_alive(child):
                            found.append(child)
        return found

    def wait_until(self, holds: Callable[[], Any], *, poll_s: float = 0.0005) -> bool:
        """Whether that came before the end of the run. Raises `BrokenPromiseError` if neither comes."""
        end = time.monotonic() + PATIENCE_S
        while not holds():
            if self.is_over:
                return False
            if time.monotonic() > end:
                raise BrokenPromiseError(f"nothing happens for {PATIENCE_S} s; {self.last_words()}")
            time.sleep(poll_s)
        return True

    @property
    def batches(self) -> int:
        """Micro-batches that all starts so far have computed, over all ranks."""
        return sum(file.read_bytes().count(b"\n") for file in self.settings.folder.glob("ids.*"))

    def wait_for_batches(self, count: int) -> bool:
        """Whether so many more came before the end of the run."""
        wanted = self.batches + count
        return self.wait_until(lambda: self.batches >= wanted, poll_s=0.003)

    def wait(self) -> int:
        """The exit status. Raises `BrokenPromiseError` if the run does not end."""
        try:
            return self.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            raise BrokenPromiseError(f"it does not end within {PATIENCE_S} s; {self.last_words()}") from None

    def last_words(self) -> str:
        return "last lines: " + " | ".join(self.said.splitlines()[-4:])[-600:]


def _prepare() -> None:
    """In a new process: it ends with this one, and Ctrl-C is not ignored, as `make torture &` would hand down."""
    ctypes.CDLL(None).prctl(_PARENT_DEATH, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False


def finish(settings: Settings, *arguments: str, ranks: int = 1) -> str:
    """Starts the run and lets it end; what it said. Raises `BrokenPromiseError` if it ends with an error."""
    with Run(settings, *arguments, ranks=ranks) as run:
        if status := run.wait():
            raise BrokenPromiseError(f"exit status {status}; {run.last_words()}")
        return run.said


def steps_done(output: Path) -> int:
    """Of the newest checkpoint."""
    checkpoints = list_checkpoints(output / "checkpoints")
    return int(checkpoints[-1].name[5:13]) if checkpoints else 0


# -- equality --


def compare_runs(ours: Settings, theirs: Settings, *, within: float = 0.0, logs: bool = True) -> list[str]:
    """The differences between what two finished runs have left, in words; [] if there is none.

    Compared are all weights files, the newest checkpoint, the log of every step and validation, the faults, and the
    sample ids of every micro-step, also of those that were done again after a kill. `within` more than 0: weights and
    losses may differ by so much, and the clips of a step may be dealt to the ranks in another way. `logs` False: a full
    disk may have cost lines of the log.
    """
    found = compare_ids(read_ids(ours.folder), read_ids(theirs.folder), by_rank=not within)
    for name in ("last", "best", "swa"):
        one, two = (each.output / f"{name}.safetensors" for each in (ours, theirs))
        if one.exists() != two.exists():
            found.append(f"{name}.safetensors is missing in one of them")
        elif one.exists():
            found += compare_values(read_safetensors(one), read_safetensors(two), name, within=within)
    if not within:
        one, two = (load_newest_checkpoint(each.output / "checkpoints")[1] for each in (ours, theirs))
        skipped = {"config", "log_bytes", "fault_bytes"}
        one, two = ({key: value for key, value in each.items() if key not in skipped} for each in (one, two))
        found += compare_values(one, two, "checkpoint")
    kept = ("step", "train/loss", "val/loss", "swa/loss") if within else ("step", "train/", "val/", "swa/")
    lines = (read_log(each.output, kept) for each in (ours, theirs))
    if logs:
        found += compare_values(*lines, "metrics.jsonl", within=within)
    if logs and not within:
        one, two = (path.read_text() if path.exists() else "" for path in _fault_files(ours, theirs))
        if one != two:
            found.append("faults.csv differs")
    return found


def _fault_files(*runs: Settings) -> Iterator[Path]:
    return (run.output / "faults.csv" for run in runs)


def compare_values(one: Any, two: Any, name: str, *, within: float = 0.0) -> list[str]:
    """The places where two values of dictionaries, lists, tensors and numbers differ: bit by bit, or by more than
    `within`."""
    if isinstance(one, dict) and isinstance(two, dict) and one.keys() == two.keys():
        pairs = [(f"{name}.{key}", one[key], two[key]) for key in one]
    elif isinstance(one, (list, tuple)) and isinstance(two, (list, tuple)) and len(one) == len(two):
        pairs = [(f"{name}[{n}]", *each) for n, each in enumerate(zip(one, two))]
    else:
        return [] if _are_equal(one, two, within) else [f"{name} differs"]
    return [each for key, a, b in pairs for each in compare_values(a, b, key, within=within)]


def _are_equal(one: Any, two: Any, within: float) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor):
        if one.dtype != two.dtype or one.shape != two.shape:
            return False
        if within and one.is_floating_point():
            return bool(((one - two).abs() <= within).all())
        bits = [value.contiguous().flatten().view(torch.uint8) for value in (one, two) if value.numel()]
        return not bits or torch.equal(*bits)
    if within and isinstance(one, float) and isinstance(two, float):
        return abs(one - two) <= within
    return type(one) is type(two) and one == two


def read_log(output: Path, kept: tuple[str, ...]) -> list[dict[str, float]]:
    """What begins with one of these in the lines of metrics.jsonl; the rest depends on the machine."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key.startswith(kept)} for line in lines]


def read_ids(folder: Path) -> list[list]:
    """Rows (step, micro-step, rank, ranks, sample ids, valid) in the order of the files."""
    files = sorted(folder.glob("ids.*"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def compare_ids(ours: list[list], theirs: list[list], *, by_rank: bool = True) -> list[str]:
    """Whether every micro-step of ours, however often it was done, had the clips of theirs in their order, and no step
    is missing. Without `by_rank`: whether the clips of each step are the same, on whichever rank."""
    if by_rank:
        expected = {tuple(row[:4]): row[4:] for row in theirs}
        found = [f"clips of step {row[0]}" for row in ours if expected.get(tuple(row[:4])) != row[4:]]
        done = {tuple(row[:4]) for row in ours}
    else:
        expected, given = _by_step(theirs), _by_step(ours)
        found = [f"clips of step {step}" for step, ids in given.items() if expected.get(step) != ids]
        done = set(given)
    return sorted(set(found)) + [f"step {key} was never done" for key in expected if key not in done]


def _by_step(rows: list[list]) -> dict[int, list[int]]:
    """Step -> its sample ids, sorted, if all its ranks did it; [] if it was done with different ones."""
    attempts: dict[int, dict[tuple, list[int]]] = {}
    for step, micro_step, rank, ranks, ids, _ in rows:
        before = attempts.setdefault(step, {}).setdefault((ranks, rank, micro_step), list(ids))
        if before != ids:
            before[:] = [-1]
    steps = {}
    for step, parts in attempts.items():
        by_ranks: dict[int, list[list[int]]] = {}
        for (ranks, *_), ids in parts.items():
            by_ranks.setdefault(ranks, []).append(ids)
        whole = [sorted(id for ids in lists for id in ids) for ranks, lists in by_ranks.items() if len(lists) == ranks]
        if whole:
            steps[step] = whole[0] if all(each == whole[0] for each in whole) else []
    return steps


def flip_bit(path: Path, draw: random.Random) -> None:
    data = np.fromfile(path, np.uint8)
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    data.tofile(path)
