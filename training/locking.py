"""One writer for a folder: a run's output, or an evaluation's results."""

import errno
import fcntl
import os
import socket
from pathlib import Path
from typing import IO

from dali_pipelines.errors import InputError

LOCK = "lock"
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class FolderLock:
    """Keeps other processes that lock `folder` out of it until `release`, or until this process ends, however it does:
    its children do not hold the lock, and the file stays. Raises `InputError` if another process has it.

    A POSIX lock, which NFS servers know too. Two locks within one process do not see each other.
    """

    def __init__(self, folder: Path, *, remedy: str):
        folder.mkdir(parents=True, exist_ok=True)
        self._file: IO[str] | None = open(folder / LOCK, "a+", encoding="utf-8")
        self.note = ""
        """Why nothing keeps other processes out; "" if the lock is held."""
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                self._file.seek(0)
                holder = self._file.read(200).strip() or "it has not said which"
                raise InputError(f"{folder}: another process writes there ({holder}): {remedy}") from None
            if error.errno not in _UNSUPPORTED:
                raise
            self.note = f"note: {folder}: its file system has no locks ({error.strerror}): start no second run there"
            return
        os.truncate(self._file.fileno(), 0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._file.flush()

    def release(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = None
