"""Checkpoints, which tell where training stood."""

import errno
import hashlib
import os
import re
import uuid
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import torch

from common.weights import atomic_rename, atomic_write
from dali_pipelines.errors import InputError

_KEPT = 2  # checkpoints: the newest, and the one before it
_NAME = re.compile(r"step_(\d{8,})-([0-9a-f]{16})\.pt")
_FULL = (errno.ENOSPC, errno.EDQUOT)
_UNNAMED = "unnamed"  # begins the name of a file whose checksum is not known yet


class DamagedError(InputError):
    """A checkpoint whose bytes are not those that were written."""


class _Hashing:
    """A file to write to, and the SHA-256 of what was written."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self.hash = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        self.hash.update(data)
        try:
            return self._file.write(data)
        except OSError as error:  # torch.save makes a RuntimeError of it that does not say why
            self.error = error
            raise

    def flush(self) -> None:
        self._file.flush()


def save_checkpoint(folder: str | os.PathLike, step: int, state: dict[str, Any]) -> Path:
    """Writes folder/step_00000123-0a1b2c3d4e5f6789.pt, whole or not at all, and removes all but the newest two.

    The name ends with the first 16 digits of the file's SHA-256, so that one rename puts both in place. Raises
    `InputError`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    unnamed = folder / f"{_UNNAMED}-{uuid.uuid4().hex[:12]}.pt"
    with atomic_write(unnamed) as file:
        hashing = _Hashing(file)
        try:
            torch.save(state, hashing)
        except RuntimeError as error:
            raise hashing.error or error from None
    path = folder / f"step_{step:08d}-{hashing.hash.hexdigest()[:16]}.pt"
    atomic_rename(unnamed, path)
    for old in list_checkpoints(folder)[:-_KEPT]:
        old.unlink()
    return path


def remove_unfinished(folder: str | os.PathLike) -> None:
    """Removes what a killed run has left of a checkpoint. Only for the process that may write there."""
    for path in Path(folder).glob(f"{_UNNAMED}*"):
        path.unlink(missing_ok=True)


def made_room(folder: str | os.PathLike, error: InputError) -> bool:
    """Where a write has failed with `error` because the disk is full: gives up the older checkpoint, if the newer is
    intact."""
    *older, newest = list_checkpoints(folder) or [None]
    if getattr(error.__cause__, "errno", None) not in _FULL or not older or not is_intact(newest):
        return False
    for old in older:
        old.unlink()
    return True


def list_checkpoints(folder: str | os.PathLike) -> list[Path]:
    """Oldest first."""
    found = [path for path in Path(folder).glob("step_*.pt") if _NAME.fullmatch(path.name) and path.is_file()]
    return sorted(found, key=lambda path: (int(_NAME.fullmatch(path.name)[1]), path.stat().st_mtime_ns))


def is_intact(path: Path) -> bool:
    """Whether the file's checksum is the one in its name."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest().startswith(_NAME.fullmatch(path.name)[2])


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Raises `DamagedError` where it is not what was written, and `InputError` where it cannot be read."""
    try:
        if not is_intact(path):
            raise DamagedError(f"{path}: damaged, its checksum is not the one in its name")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except InputError:
        raise
    except Exception as error:  # its checksum is right, so somebody made it; torch raises a dozen kinds
        raise InputError(f"{path}: not a checkpoint of ours ({type(error).__name__})") from None
    if not isinstance(state, dict) or "step" not in state:
        raise InputError(f"{path}: not a checkpoint of ours")
    return state


def load_newest_checkpoint(folder: str | os.PathLike) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that is intact, and its path; None where there is none. Others are named, and damaged ones
    put aside, as NAME.damaged: those that will be written are not to be removed in favour of them."""
    for path in reversed(list_checkpoints(folder)):
        try:
            return path, load_checkpoint(path)
        except InputError as error:
            print(f"{error}; looking for an older one", flush=True)
            if isinstance(error, DamagedError):
                path.rename(path.with_name(path.name + ".damaged"))
    return None


class Writer:
    """Writes files in a thread, one job after another.

    What a job raises comes out of `wait`, once."""

    def __init__(self):
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="writer")
        self._job: Future | None = None

    def submit(self, job: Callable[[], Any]) -> None:
        self._job = self._pool.submit(job)

    def wait(self) -> bool:
        """Until nothing is being written; whether something was, since the last call. Any thread may wait."""
        job = self._job
        if job is None:
            return False
        try:
            job.result()
        finally:
            if job.done() and self._job is job:  # not where Ctrl-C has interrupted the waiting
                self._job = None
        return True

    def close(self) -> None:
        """Waits, and says nothing of what was raised."""
        self._pool.shutdown()


def host_copy(value: Any) -> Any:
    """`value` with every tensor in it copied to host memory; what training does next does not change it."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: host_copy(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(host_copy, value))
    return value
