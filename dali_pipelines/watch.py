"""Detects workers that hang, and which sample a worker was processing when it hung or died.

Each worker notes its current sample in a small file shared with the loader's process, where a thread polls these notes.
It counts polls, not seconds: a machine that slept, or a job that was stopped as a whole, has not hung.
"""

import contextlib
import ctypes
import os
import signal
import threading
from typing import Any

import numpy as np

from dali_pipelines.processes import unlink_semaphores

NOTHING = -2  # instead of a sample id: the worker is between two samples


class Progress:
    """A worker's notes."""

    def __init__(self, folder: str):
        self._notes = np.memmap(_file(folder, os.getpid()), np.int64, "w+", shape=2)
        self._notes[0] = NOTHING

    def at(self, sample_id: int) -> None:
        """Notes that the worker starts on this sample; `NOTHING`: it has finished one."""
        self._notes[0] = sample_id
        self._notes[1] += 1


class Watchdog:
    """Watches the workers of a DALI pipeline, and ends them all when one of them has spent `timeout_s` on a sample, or
    when the loader has waited that long for them and none has made progress.

    Then `Pipeline.run` raises, as it does when a worker dies by itself.
    """

    def __init__(self, folder: str, pool: Any, timeout_s: float):
        self.is_waited_for = False
        """Set while the loader waits for the workers."""
        self.has_killed = False
        self.stuck: list[int] = []
        """Sample ids of the workers that hung."""
        self._folder = folder
        self._processes = pool.pool._processes
        tasks = [context.dedicated_task_queue for context in pool.pool._workers_contexts]
        queues = [pool.pool._result_queue, pool.pool._general_task_queue, *tasks]
        self._queues = [queue for queue in queues if queue is not None]
        unlink_semaphores(lock for queue in self._queues for lock in _locks(queue))
        self._shut = [0] * len(self._queues)  # consecutive polls at which the lock of each was held
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
        """(exit status, sample id) of the workers that died while processing a sample; DALI ends the others with
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
        if self._thread is not threading.current_thread():  # it is if the garbage collector runs in that thread
            self._thread.join()
        for process in self._processes:
            with contextlib.suppress(FileNotFoundError):
                os.remove(_file(self._folder, process.pid))

    def _watch(self) -> None:
        last: dict[int, tuple[int, int]] = {}
        polls = {process.pid: 0 for process in self._processes}  # without progress since the last change
        idle_polls = 0  # at which the loader was waiting
        while not self._stop.wait(self._tick):
            notes = {pid: self._notes(pid) for pid in polls}
            polls = {pid: count + 1 if notes[pid] == last.get(pid) else 0 for pid, count in polls.items()}
            idle_polls = idle_polls + 1 if self.is_waited_for else 0
            last = notes
            if self.has_killed or (idle_polls > 1 and not all(process.is_alive() for process in self._processes)):
                self._free()
                continue
            stuck = [pid for pid, count in polls.items() if count >= self._patience and notes[pid][0] != NOTHING]
            if stuck or min(idle_polls, *polls.values()) >= self._patience:
                self.stuck = [notes[pid][0] for pid in stuck]
                self.has_killed = True
                self.kill()

    def _free(self) -> None:
        """Releases the locks that a dead worker still holds: DALI would wait for them in `run` forever. Nobody needs
        these queues any more, so if that does not help, everything is released, and DALI fails one way or another."""
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
            elif self._shut[number] > 1:  # not just held for a moment by a live process
                # If this process holds it, a thread is waiting for a woken worker to confirm; otherwise a dead worker
                # holds it.
                _post(woken if lock._count() else lock)

    def _notes(self, pid: int) -> tuple[int, int]:
        try:
            sample_id, count = np.fromfile(_file(self._folder, pid), np.int64)
            return int(sample_id), int(count)
        except (FileNotFoundError, ValueError):  # not started
            return NOTHING, 0


def _locks(queue: Any) -> list[Any]:
    """All locks of one of DALI's queues."""
    ready = queue.cv_not_empty
    return [queue.lock, ready._sleeping_count, ready._woken_count, ready._wait_semaphore]


def _post(semaphore: Any) -> None:
    """Releases it, whoever holds it according to its Python object."""
    ctypes.CDLL(None).sem_post(ctypes.c_void_p(semaphore.handle))


def _file(folder: str, pid: int) -> str:
    return os.path.join(folder, f"worker_{pid}")
