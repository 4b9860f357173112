"""A lock for a folder to which only one process may write: a run's output, or an evaluation's results."""

import contextlib
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
    """Keeps other processes from locking `folder` until `release`, or until this process ends for any reason.

    Child processes do not hold the lock. A killed process leaves the file behind, but not the lock. Raises
    `InputError` if another process has the lock, or its file is a symbolic link. It is a POSIX lock, which NFS servers
    support too; two locks within one process do not exclude each other.
    """

    def __init__(self, folder: Path, *, remedy: str, name: str = LOCK):
        """name: of the lock's file; processes with another one are not kept out."""
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / name
        self.note = ""
        """Why the folder could not be locked; "" if the lock is held."""
        self._file: IO[str] | None = None
        while self._file is None:
            try:
                file = open(self._path, "a+", encoding="utf-8", opener=_open_no_link)
            except OSError as error:
                if error.errno != errno.ELOOP:
                    raise
                raise InputError(
                    f"{self._path} is a link; the file it points to would be overwritten: remove it"
                ) from None
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EAGAIN, errno.EACCES):
                    file.seek(0)
                    holder = file.read(200).strip() or "unknown"
                    raise InputError(f"{folder}: another process is writing there ({holder}): {remedy}") from None
                if error.errno not in _UNSUPPORTED:
                    raise
                self.note = (
                    f"note: {folder}: its file system has no locks ({error.strerror}): do not start a second run there"
                )
            # The last holder may have removed the file in between: then the lock is on a deleted file.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), self._path.stat()):
                    self._file = file
        os.truncate(self._file.fileno(), 0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._file.flush()

    def release(self) -> None:
        """Releases the lock, if this process holds it."""
        if self._file is not None:
            if not self.note:
                self._path.unlink(missing_ok=True)
            self._file.close()
        self._file = None


def _open_no_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)
