"""SIGTERM and SIGUSR1 (Slurm) ask a run to save and end, so that it can be resumed later.

This module imports nothing slow, because commands set it up in their first lines.
"""

import contextlib
import faulthandler
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable

REQUEUE = 75
"""Exit status of a run that was asked to end and can be resumed: EX_TEMPFAIL of sysexits.h."""

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_PATIENCE_S = 5
_SAVING_S = 60


class Preemption:
    """A context that stores either signal in `signal`, so that the training loop can end in an orderly way.

    If the loop does not `handle` it within 5 s, this ends the process itself, with status `REQUEUE`: training may be in
    a long step, in a validation, or waiting for a process that has ended. Without `save`, it ends the process at once.
    """

    def __init__(self) -> None:
        self.signal: str | None = None
        """SIGTERM or SIGUSR1, once received."""
        self.save: Callable[[], str] | None = None
        """Saves unsaved work, from a thread, and returns a message."""
        self._handled = threading.Event()

    def __enter__(self) -> "Preemption":
        # With the wake-up descriptor, a thread learns of a signal even while the main thread waits in C code.
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._fd_before = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, lambda *_: None) for number in _SIGNALS}
        self._thread = threading.Thread(target=self._watch, name="preemption", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._handled.set()
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._fd_before)
        self._writer.close()
        self._thread.join()
        self._reader.close()

    def handle(self) -> None:
        """Tell the thread that the loop has seen the signal and will end the process itself."""
        self._handled.set()

    def _watch(self) -> None:
        while (number := self._reader.recv(1)) and number[0] not in _SIGNALS:
            pass  # Ctrl-C
        if not number:
            return
        self.signal = signal.Signals(number[0]).name
        if self.save is None:
            end(f"{self.signal}: ended before training started", REQUEUE)
        if not self._handled.wait(_PATIENCE_S):
            end(f"{self.signal}: training ends within a step, a validation or a save", REQUEUE, save=self.save)


def end(message: str, status: int, *, stacks: bool = False, save: Callable[[], str] | None = None) -> None:
    """End this process, from any of its threads, with a `message` on stderr.

    stacks: also print the stacks of all threads. save: called first; it may take a minute, and its result is printed.
    """
    _print(message)
    if stacks:
        with contextlib.suppress(OSError, ValueError):
            faulthandler.dump_traceback(sys.stderr)
    if save is not None:
        results: list[str] = []
        thread = threading.Thread(target=lambda: results.append(save()), daemon=True)
        thread.start()
        thread.join(_SAVING_S)  # saving may hang too, in the file system or on the GPU
        _print(results[0] if results else f"nothing could be saved within {_SAVING_S} s; the last checkpoint is kept")
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    os._exit(status)


def _print(message: str) -> None:
    rank = os.environ.get("RANK")
    command = os.path.basename(sys.argv[0]) + (f" (rank {rank})" if rank else "")
    with contextlib.suppress(OSError, ValueError):
        print(f"{command}: {message}", file=sys.stderr, flush=True)
