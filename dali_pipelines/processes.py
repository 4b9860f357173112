"""Cleans up however a process ends: leaves no worker processes, temporary folders or semaphores behind."""

import contextlib
import ctypes
import fcntl
import multiprocessing
import os
import re
import shutil
import signal
import stat
import tempfile
import threading
import time
import weakref
from collections.abc import Iterable, Iterator
from multiprocessing import synchronize, util
from pathlib import Path
from typing import Any

_PREFIX = "clip_loader_pid"
_NAME = re.compile(rf"{_PREFIX}\d+_\w+")
_SEMAPHORES = Path("/dev/shm")  # where Linux keeps their names
_TICK_S = 0.5
_PR_SET_PDEATHSIG = 1


def end_with_parent(parent: int | None = None) -> None:
    """Ends this worker when `parent`, the process that started it, ends for any reason, and not before.

    Call it first. If the parent is already gone, it does not return. Workers of DALI and concurrent.futures would
    otherwise wait for work forever, and hold their shared memory. A signal to the parent's whole group, such as
    torchrun's SIGTERM, is left to the parent, which may need its workers for an orderly end.
    None: the parent known to multiprocessing; without one, nothing happens. With a given parent, this process also ends
    with the thread that started it.

    The kernel ends the worker, even if it hangs in C and blocks all other threads: with SIGIO when the parent's end of
    a pipe closes, or with the signal that it sends when the starting thread ends. As forks of the parent may have
    copies of that pipe, a thread checks as well.
    """
    if parent is None:
        known = multiprocessing.parent_process()
        if known is None:
            return
        parent = known.pid
        fcntl.fcntl(known.sentinel, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(known.sentinel, fcntl.F_SETFL, os.O_RDONLY | os.O_ASYNC)
    else:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    os.setpgid(0, 0)
    with contextlib.suppress(OSError):  # if memory runs out, a worker is killed first: that costs a video, not the run
        Path("/proc/self/oom_score_adj").write_text("500")
    threading.Thread(target=_end_after, args=(parent,), daemon=True).start()


def _end_after(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_TICK_S)
    os._exit(1)


class TemporaryFolder:
    """A folder for this process, `name`, in the temporary folder. It is removed by `close`, when this object is
    garbage-collected, or when the process ends; after a kill, by the next `TemporaryFolder`.

    The folder is locked, and the kernel releases the lock when the process ends; process ids would be useless in a
    temporary folder shared by several containers.
    """

    def __init__(self) -> None:
        _remove_abandoned()
        self.name, lock = _make_locked()
        self.close = weakref.finalize(self, _remove, self.name, lock, os.getpid())


def _make_locked() -> tuple[str, int]:
    while True:
        name = tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}_")
        with contextlib.suppress(FileNotFoundError):
            lock = os.open(name, os.O_RDONLY)
            with contextlib.suppress(OSError):  # on a file system without locks, nobody else can lock it either
                fcntl.flock(lock, fcntl.LOCK_EX)
            if os.path.exists(name):  # another process may have removed it before it was locked
                return name, lock
            os.close(lock)


def _remove(name: str, lock: int, owner: int) -> None:
    if os.getpid() == owner:  # not in a fork, which has a copy of everything
        shutil.rmtree(name, ignore_errors=True)
        os.close(lock)


def _remove_abandoned() -> None:
    for entry in os.scandir(tempfile.gettempdir()):
        with contextlib.suppress(OSError):  # in use, or gone
            status = entry.stat(follow_symlinks=False)
            if not _NAME.fullmatch(entry.name) or not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
                continue
            lock = os.open(entry.path, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                for semaphore in _SEMAPHORES.glob(f"sem.{entry.name}-*"):
                    semaphore.unlink(missing_ok=True)
                shutil.rmtree(entry.path, ignore_errors=True)
            finally:
                os.close(lock)


@contextlib.contextmanager
def semaphores_named_after(folder: str) -> Iterator[None]:
    """A context in which new semaphores are named after a `TemporaryFolder`: if this process and multiprocessing's
    resource tracker are killed together, they are removed with the folder."""
    settings: dict[str, Any] = vars(multiprocessing.current_process())["_config"]
    before = settings["semprefix"]
    settings["semprefix"] = f"/{os.path.basename(folder)}"
    try:
        yield
    finally:
        settings["semprefix"] = before


def unlink_semaphores(locks: Iterable[synchronize.SemLock]) -> None:
    """Removes their names from the system, once all processes have opened them: however a process ends, none is left
    behind, and multiprocessing's resource tracker has nothing to report."""
    wanted = {id(lock) for lock in locks}
    finalizers: dict[Any, Any] = vars(util)["_finalizer_registry"]
    cleanup = synchronize.SemLock._cleanup  # type: ignore[attr-defined]  # not in the stubs
    for finalizer in list(finalizers.values()):
        if finalizer._callback is cleanup and id(finalizer._weakref()) in wanted:
            finalizer()
