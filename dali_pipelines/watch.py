"""Workers that hang are noticed, and which sample a worker was at when it hung or died.

Each worker notes in a small file that it shares with the loader's process which sample it is at. There, a thread looks
at these notes. It counts its own looks, not the clock: a machine that slept, or a job that was stopped as a whole, has
not hung.
"""

import contextlib
import os
import signal
import threading

import numpy as np

NOTHING = -2  # in place of a sample id: between two samples


class Progress:
    """A worker's notes."""

    def __init__(self, folder: str):
        self._notes = np.memmap(_file(folder, os.getpid()), np.int64, "w+", shape=2)
        self._notes[0] = NOTHING

    def at(self, sample_id: int) -> None:
        """The worker begins with this sample; `NOTHING`: it has finished one."""
        self._notes[0] = sample_id
        self._notes[1] += 1


class Watchdog:
    """Kills the workers when one of them has been at the same sample for `timeout_s`, or when somebody has waited for
    them so long and none has done anything."""

    def __init__(self, folder: str, pids: list[int], timeout_s: float):
        self.is_waited_for = False
        """Set while somebody waits for the workers."""
        self.has_killed = False
        self.stuck: list[int] = []
        """Sample ids that the workers were at which hung."""
        self._folder = folder
        self._pids = pids
        self._tick = min(timeout_s / 8, 0.5)
        self._patience = timeout_s / self._tick
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def at(self, pid: int) -> int:
        """The sample that a worker is at, or was at when it died; `NOTHING`."""
        return self._notes(pid)[0]

    def kill(self) -> None:
        for pid in self._pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        last: dict[int, tuple[int, int]] = {}
        looks = dict.fromkeys(self._pids, 0)  # at which a worker was where it had been before
        idle_looks = 0  # at which somebody was waiting
        while not self._stop.wait(self._tick):
            notes = {pid: self._notes(pid) for pid in self._pids}
            for pid in self._pids:
                looks[pid] = looks[pid] + 1 if notes[pid] == last.get(pid) else 0
            last = notes
            stuck = [pid for pid in self._pids if notes[pid][0] != NOTHING and looks[pid] >= self._patience]
            idle_looks = idle_looks + 1 if self.is_waited_for else 0
            if stuck or (min(idle_looks, *looks.values()) >= self._patience):
                self.has_killed = True
                self.stuck += [notes[pid][0] for pid in stuck]
                self.kill()
                return

    def _notes(self, pid: int) -> tuple[int, int]:
        try:
            sample_id, count = np.fromfile(_file(self._folder, pid), np.int64)
            return int(sample_id), int(count)
        except (FileNotFoundError, ValueError):  # not begun
            return NOTHING, 0


def _file(folder: str, pid: int) -> str:
    return os.path.join(folder, f"worker_{pid}")
