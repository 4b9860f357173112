"""Checkpoint files: written atomically, checked by a checksum, the newest two kept."""

import errno
import hashlib
import os
import re
import uuid
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch

from common.weights import atomic_rename, atomic_write
from dali_pipelines.errors import InputError
from model.pretrained_files import is_compressed, memory_for

_NUM_KEPT = 2
_NAME = re.compile(r"step_(\d{8,})-([0-9a-f]{16})\.pt")
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_UNNAMED = "unnamed"  # prefix of a file whose checksum is not known yet


class DamagedError(InputError):
    """A checkpoint's bytes differ from those that were written."""


class Checkpoint(NamedTuple):
    """A checkpoint that was read."""

    path: Path
    state: dict[str, Any]
    """What `RunState.state_dict` returned."""


class _HashingFile:
    """A writable file that computes the SHA-256 of its content."""

    def __init__(self, file: IO[bytes]):
        self._file = file
        self.hash = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        self.hash.update(data)
        try:
            return self._file.write(data)
        except OSError as error:  # torch.save turns it into a RuntimeError without the reason
            self.error = error
            raise

    def flush(self) -> None:
        self._file.flush()


def save_checkpoint(folder: str | os.PathLike, step: int, state: dict[str, Any]) -> Path:
    """Write folder/step_00000123-0a1b2c3d4e5f6789.pt atomically, and remove all but the newest two.

    The name ends with the first 16 digits of the file's SHA-256, so that one rename puts both in place. Raises
    `InputError` if the file cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    unnamed = folder / f"{_UNNAMED}-{uuid.uuid4().hex[:12]}.pt"
    with atomic_write(unnamed) as file:
        hashing = _HashingFile(file)
        try:
            torch.save(state, hashing)  # type: ignore[arg-type]  # its stub requires more methods than it calls
        except RuntimeError as error:
            raise hashing.error or error from None
    path = folder / f"step_{step:08d}-{hashing.hash.hexdigest()[:16]}.pt"
    atomic_rename(unnamed, path)
    for old in list_checkpoints(folder)[:-_NUM_KEPT]:
        old.unlink()
    return path


def remove_unfinished(folder: str | os.PathLike) -> None:
    """Remove the unfinished checkpoints of a killed run. Only the process that holds the folder's lock may call it."""
    for path in Path(folder).glob(f"{_UNNAMED}*"):
        path.unlink(missing_ok=True)


def make_room(folder: str | os.PathLike, error: InputError) -> bool:
    """Remove the older checkpoints if `error` means that the disk is full, and the newest one is intact; returns
    whether it did."""
    found = list_checkpoints(folder)
    is_full = getattr(error.__cause__, "errno", None) in _DISK_FULL
    if not is_full or len(found) < 2 or not is_intact(found[-1]):
        return False
    for old in found[:-1]:
        old.unlink()
    return True


def list_checkpoints(folder: str | os.PathLike) -> list[Path]:
    """Checkpoints in `folder`, oldest first."""
    found = []
    for path in Path(folder).glob("step_*.pt"):
        if (name := _NAME.fullmatch(path.name)) and path.is_file():
            found.append((int(name[1]), path.stat().st_mtime_ns, path))
    return [path for *_, path in sorted(found)]


def is_intact(path: Path) -> bool:
    """Whether the file's checksum is the one in its name."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest().startswith(path.stem.rpartition("-")[2])


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The state in a checkpoint. Raises `DamagedError` if its bytes differ from those that were written, and
    `InputError` if it cannot be read."""
    try:
        if not is_intact(path):
            raise DamagedError(f"{path}: damaged, its checksum is not the one in its name")
        if is_compressed(path):
            raise InputError(f"{path}: not a checkpoint of this program (compressed)")
        with memory_for(path):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except InputError:
        raise
    except Exception as error:  # torch raises many kinds; the checksum is right, so another program wrote the file
        raise InputError(f"{path}: not a checkpoint of this program ({type(error).__name__})") from None
    if not isinstance(state, dict) or "step" not in state:
        raise InputError(f"{path}: not a checkpoint of this program")
    return state


def load_newest_checkpoint(folder: str | os.PathLike) -> Checkpoint | None:
    """The newest checkpoint that can be read; None if there is none.

    Prints why others cannot be read, and renames damaged ones to NAME.damaged: otherwise, new checkpoints would push
    out good ones instead of those.
    """
    for path in reversed(list_checkpoints(folder)):
        try:
            return Checkpoint(path, load_checkpoint(path))
        except InputError as error:
            print(f"{error}; looking for an older one", flush=True)
            if isinstance(error, DamagedError):
                path.rename(path.with_name(path.name + ".damaged"))
    return None


class Writer:
    """Runs jobs that write files in a thread, one after another. `wait` raises the error of a failed job, once."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="writer")
        self._job: Future | None = None

    def submit(self, job: Callable[[], Any]) -> None:
        """Starts `job` in the background thread."""
        self._job = self._pool.submit(job)

    def wait(self) -> bool:
        """Wait for the job in progress; returns whether there has been one since the last call. Any thread may call
        it."""
        job = self._job
        if job is None:
            return False
        try:
            job.result()
        finally:
            if job.done() and self._job is job:  # not if Ctrl-C interrupted the wait
                self._job = None
        return True

    def close(self) -> None:
        """Wait for the job in progress, whether it fails or not."""
        self._pool.shutdown()


def host_copy(value: Any) -> Any:
    """Copy `value` with all its tensors to host memory, so that training does not change the copy."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: host_copy(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(host_copy, value))
    return value
