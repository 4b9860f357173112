"""SIGTERM and SIGUSR1 (Slurm) ask a run to save and to end, so that it can be started again.

Imports nothing that takes long: it stands guard from a command's first lines.
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
"""Exit status of a run that was asked to end and can go on: EX_TEMPFAIL of sysexits.h."""

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_PATIENCE_S = 5
_SAVING_S = 60


class Preemption:
    """Within `with`, notes either signal in `signal`, for the loop that ends in an orderly way, and ends the process
    itself with `REQUEUE` where that takes longer than 5 s: training may be in the middle of a long step, of a
    validation, or waiting for a process that is gone. Without `save`, it ends at once."""

    def __init__(self):
        self.signal: str | None = None
        """SIGTERM or SIGUSR1, once it has come."""
        self.save: Callable[[], str] | None = None
        """Saves what there is to save, from a thread, and returns what to say of it."""
        self._handled = threading.Event()

    def __enter__(self) -> "Preemption":
        # The wake-up descriptor tells a thread of a signal also while this one waits within C.
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._fd_before = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, lambda *_: None) for number in _SIGNALS}
        self._thread = threading.Thread(target=self._watch, name="preemption", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._handled.set()
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._fd_before)
        self._writer.close()
        self._thread.join()
        self._reader.close()

    def handle(self) -> None:
        """The loop has seen the signal and ends by itself: the thread leaves it alone."""
        self._handled.set()

    def _watch(self) -> None:
        while (number := self._reader.recv(1)) and number[0] not in _SIGNALS:
            pass  # Ctrl-C
        if not number:
            return
        self.signal = signal.Signals(number[0]).name
        if self.save is None:
            end(f"{self.signal}: ended before training began", REQUEUE)
        if not self._handled.wait(_PATIENCE_S):
            end(f"{self.signal}: training is ended within a step, a validation or a save", REQUEUE, save=self.save)


def end(message: str, status: int, *, stacks: bool = False, save: Callable[[], str] | None = None) -> None:
    """Ends this process, from any of its threads, with a line on stderr and, where asked for, the stacks of its
    threads; first `save` may take a minute to save what there is, and its answer is a line too."""
    _say(message)
    if stacks:
        with contextlib.suppress(OSError, ValueError):
            faulthandler.dump_traceback(sys.stderr)
    if save is not None:
        answers: list[str] = []
        thread = threading.Thread(target=lambda: answers.append(save()), daemon=True)
        thread.start()
        thread.join(_SAVING_S)  # a file system, or a GPU, may hang as well
        _say(answers[0] if answers else f"nothing could be saved within {_SAVING_S} s; the newest checkpoint stands")
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    os._exit(status)


def _say(message: str) -> None:
    rank = os.environ.get("RANK")
    command = os.path.basename(sys.argv[0]) + (f" (rank {rank})" if rank else "")
    with contextlib.suppress(OSError, ValueError):
        print(f"{command}: {message}", file=sys.stderr, flush=True)
