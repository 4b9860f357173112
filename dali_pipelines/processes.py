"""What every worker process owes the process that started it."""

import multiprocessing
import os
import threading


def end_with_parent() -> None:
    """Ends this worker when the process that started it is gone, however that ended.

    Workers of DALI and of concurrent.futures wait for work for ever, and hold their shared memory, where their parent
    was killed. Does nothing in a process that multiprocessing has not started.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_after, args=(parent,), daemon=True).start()


def _end_after(parent) -> None:
    parent.join()
    os._exit(1)
