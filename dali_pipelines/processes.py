"""What a process leaves behind, however it ends: no worker processes, no temporary folders, no semaphores."""

import contextlib
import fcntl
import multiprocessing
import os
import re
import shutil
import stat
import tempfile
import threading
import time
import weakref
from collections.abc import Iterable
from multiprocessing import synchronize, util

_PREFIX = "clip_loader_pid"
_NAME = re.compile(rf"{_PREFIX}\d+_\w+")
_TICK_S = 0.5


def end_with_parent(parent: int | None = None) -> None:
    """Ends this worker when `parent`, the process that started it, is gone, however that ended, and not before.

    Call it first of all. If the parent is gone by then, this does not return to any work. Workers of DALI and of
    concurrent.futures would wait for work for ever, and hold their shared memory. A signal to the parent's whole group,
    as torchrun's SIGTERM, is for the parent to handle, which may need its workers to come to an end in good order.
    None: the process that multiprocessing knows; without one, nothing happens.
    """
    if parent is None:
        known = multiprocessing.parent_process()
        if known is None:
            return
        parent = known.pid
    if os.getppid() != parent:
        os._exit(1)
    os.setpgid(0, 0)
    threading.Thread(target=_end_after, args=(parent,), daemon=True).start()


def _end_after(parent: int) -> None:
    """Asks for the number of the parent: the end of a pipe would not come while some other process has a copy of it,
    and the kernel's PR_SET_PDEATHSIG comes when the thread ends that has started this process."""
    while os.getppid() == parent:
        time.sleep(_TICK_S)
    os._exit(1)


class TemporaryFolder:
    """A folder for this process in the temporary folder: `name`. It is removed by `close`, when nobody holds this
    object any more, and at the end of the process; after a kill by the next one that is made.

    The folder is locked. The kernel lets go of the lock when the process ends; process numbers would be of no use in a
    temporary folder that several containers share.
    """

    def __init__(self):
        _remove_abandoned()
        self.name, lock = _make_locked()
        self.close = weakref.finalize(self, _remove, self.name, lock, os.getpid())


def _make_locked() -> tuple[str, int]:
    while True:
        name = tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}_")
        with contextlib.suppress(FileNotFoundError):
            lock = os.open(name, os.O_RDONLY)
            with contextlib.suppress(OSError):  # a file system without locks: then nobody else can lock it either
                fcntl.flock(lock, fcntl.LOCK_EX)
            if os.path.exists(name):  # another process may have found it before it was locked
                return name, lock
            os.close(lock)


def _remove(name: str, lock: int, owner: int) -> None:
    if os.getpid() == owner:  # not a fork of it, which has a copy of everything
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
                shutil.rmtree(entry.path, ignore_errors=True)
            finally:
                os.close(lock)


def unlink_semaphores(locks: Iterable[synchronize.SemLock]) -> None:
    """Takes their names from the system, once all processes have opened them: whatever ends how, none is left behind,
    and multiprocessing's resource tracker has nothing to report."""
    wanted = {id(lock) for lock in locks}
    for finalizer in list(util._finalizer_registry.values()):
        if finalizer._callback is synchronize.SemLock._cleanup and id(finalizer._weakref()) in wanted:
            finalizer()
