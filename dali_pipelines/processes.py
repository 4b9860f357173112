"""What every worker process owes the process that started it."""

import multiprocessing
import os
import threading


def end_with_parent() -> None:
    """Ends this worker when the process that started it is gone, however that ended, and not before.

    Workers of DALI and of concurrent.futures wait for work for ever, and hold their shared memory, where their parent
    was killed. A signal to the parent's whole group, as torchrun's SIGTERM, is for the parent to handle, which may
    need its workers to come to an end in good order. Does nothing in a process that multiprocessing has not started.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        os.setpgid(0, 0)
        threading.Thread(target=_end_after, args=(parent,), daemon=True).start()


def _end_after(parent) -> None:
    parent.join()
    os._exit(1)
