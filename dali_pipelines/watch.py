"""Notices workers that hang, and which sample a worker was at when it hung or died.

Each worker notes in a small file that it shares with the loader's process which sample it is at. There, a thread looks
at these notes. It counts its own looks, not the clock: a machine that slept, or a job that was stopped as a whole, has
not hung.
"""

import contextlib
import ctypes
import os
import signal
import threading
from typing import Any

import numpy as np

from dali_pipelines.processes import unlink_semaphores

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
    """Watches the workers of a DALI pipeline, and ends them all when one of them has been at the same sample for
    `timeout_s`, or when somebody has waited for them so long and none has done anything.

    Then `Pipeline.run` raises, as it does when a worker dies by itself.
    """

    def __init__(self, folder: str, pool: Any, timeout_s: float):
        self.is_waited_for = False
        """Set while somebody waits for the workers."""
        self.has_killed = False
        self.stuck: list[int] = []
        """Sample ids that the workers were at which hung."""
        self._folder = folder
        self._processes = pool.pool._processes
        tasks = [context.dedicated_task_queue for context in pool.pool._workers_contexts]
        queues = [pool.pool._result_queue, pool.pool._general_task_queue, *tasks]
        self._queues = [queue for queue in queues if queue is not None]
        unlink_semaphores(lock for queue in self._queues for lock in _locks(queue))
        self._shut = [0] * len(self._queues)  # looks at which the lock of each was held
        self._frees = 0
        self._tick = min(timeout_s / 8, 0.5)
        self._patience = timeout_s / self._tick
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    @property
    def have_ended(self) -> bool:
        """Whether a worker has hung or died."""
        return self.has_killed or any(process.exitcode not in (None, 0) for process in self._processes)

    def dead(self) -> list[tuple[int, int]]:
        """(exit status, sample id that it was at) of the workers that have died at a sample; DALI ends the others with
        SIGTERM."""
        found = [(process.exitcode, self._notes(process.pid)[0]) for process in self._processes]
        return [each for each in found if each[0] not in (None, 0, -signal.SIGTERM) and each[1] != NOTHING]

    def kill(self) -> None:
        """Kills the workers."""
        for process in self._processes:
            process.kill()

    def stop(self) -> None:
        """Ends the watching thread."""
        self._stop.set()
        if self._thread is not threading.current_thread():  # or it was started by the garbage collector
            self._thread.join()
        for process in self._processes:
            with contextlib.suppress(FileNotFoundError):
                os.remove(_file(self._folder, process.pid))

    def _watch(self) -> None:
        last: dict[int, tuple[int, int]] = {}
        looks = {process.pid: 0 for process in self._processes}  # at which a worker was where it had been before
        idle_looks = 0  # at which somebody was waiting
        while not self._stop.wait(self._tick):
            notes = {pid: self._notes(pid) for pid in looks}
            looks = {pid: count + 1 if notes[pid] == last.get(pid) else 0 for pid, count in looks.items()}
            idle_looks = idle_looks + 1 if self.is_waited_for else 0
            last = notes
            if self.has_killed or (idle_looks > 1 and not all(process.is_alive() for process in self._processes)):
                self._free()
                continue
            stuck = [pid for pid, count in looks.items() if count >= self._patience and notes[pid][0] != NOTHING]
            if stuck or min(idle_looks, *looks.values()) >= self._patience:
                self.stuck = [notes[pid][0] for pid in stuck]
                self.has_killed = True
                self.kill()

    def _free(self) -> None:
        """Opens what a dead worker has left shut: DALI would wait for it in `run`, for ever. Nobody needs these queues
        any more, so if the gentle way does not help, everything is opened, and DALI fails in one way or another."""
        self.kill()
        self._frees += 1
        for number, queue in enumerate(self._queues):
            lock, woken = queue.lock._semlock, queue.cv_not_empty._woken_count._semlock
            self._shut[number] = self._shut[number] + 1 if lock._is_zero() else 0
            if self._frees > 8:
                queue._read_meta()
                queue.meta.is_closed = 1
                queue._write_meta()
                for semaphore in (woken, queue.cv_not_empty._wait_semaphore._semlock, lock):
                    _post(semaphore)
            elif self._shut[number] > 1:  # not just now, by somebody alive
                # Held in this process: by a thread that has woken a worker, who was to say so. Otherwise by a dead one.
                _post(woken if lock._count() else lock)

    def _notes(self, pid: int) -> tuple[int, int]:
        try:
            sample_id, count = np.fromfile(_file(self._folder, pid), np.int64)
            return int(sample_id), int(count)
        except (FileNotFoundError, ValueError):  # not begun
            return NOTHING, 0


def _locks(queue: Any) -> list[Any]:
    """All that a queue of DALI's waits for."""
    ready = queue.cv_not_empty
    return [queue.lock, ready._sleeping_count, ready._woken_count, ready._wait_semaphore]


def _post(semaphore: Any) -> None:
    """Releases it, without its Python object's idea of who holds it."""
    ctypes.CDLL(None).sem_post(ctypes.c_void_p(semaphore.handle))


def _file(folder: str, pid: int) -> str:
    return os.path.join(folder, f"worker_{pid}")
