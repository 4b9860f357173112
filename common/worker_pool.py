"""Processes many files with several workers, and keeps a journal of the results, from which a killed run resumes."""

import glob
import json
import os
import queue
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from common.child_process import end_children, find_function, in_child, name_of
from dali_pipelines.errors import InputError, naming
from dali_pipelines.text import read_lines

_MAX_SUBMITTED = 1024  # unfinished tasks in an executor at a time


class Failed(str):
    """A message that says why a task has no result."""

    is_done = True


class NotDone(Failed):
    """The task belongs to another shard of the work (`WorkerPool.shard`)."""

    is_done = False


class ProgressBar(Protocol):
    """The result of `WorkerPool.progress`, such as a tqdm bar."""

    def update(self) -> Any:
        """Counts one more result."""

    def close(self) -> Any:
        """Ends the display."""


@dataclass(frozen=True)
class WorkerPool:
    """What does the work, and how.

    workers: threads, each of which runs its tasks in its own child process (`in_child`); None: one per CPU core.
    scheduler: address of a dask scheduler, whose workers do the work instead.
    timeout_s: seconds for one task.
    shard: (i, n), i from 0: do only every n-th task, starting at the i-th; their results stay in the journal.
    progress: makes a progress bar for the counts `total` and `initial`.
    """

    workers: int | None = None
    scheduler: str | None = None
    timeout_s: float = 60
    shard: tuple[int, int] = (0, 1)
    progress: Callable[..., ProgressBar] | None = None

    @property
    def is_whole(self) -> bool:
        """Whether it does all tasks, not only one shard of them."""
        return self.shard[1] == 1

    def journal(self, whole: Path, kind: str = "") -> Path:
        """The journal of this shard, beside the journal `whole` of all tasks, where `run` finds it; `whole` itself if
        there is only one shard. kind: distinguishes journals of different tasks."""
        part, parts = self.shard
        return whole if self.is_whole else whole.with_name(f"{whole.name}.{kind}{part}-of-{parts}")

    @contextmanager
    def executor(self) -> Iterator[Executor]:
        """A context with the threads or the dask client that does the work."""
        if self.scheduler:
            with _dask_executor(self.scheduler) as executor:
                yield executor
            return
        executor = ThreadPoolExecutor(self.workers or len(os.sched_getaffinity(0)), "work")
        try:
            yield executor
        except BaseException:
            executor.shutdown(wait=False, cancel_futures=True)
            end_children()
            raise
        executor.shutdown()


def run(
    function: Callable,
    tasks: Sequence[Sequence],
    *,
    journal: Path,
    pool: WorkerPool,
    timeout_s: float | None = None,
    is_good: Callable[[Any], bool] = lambda result: True,
) -> list[Any]:
    """Call `function(*task)` for every task, in child processes. Returns the results in the order of the tasks, each
    converted to JSON and back, or a `Failed`.

    Every result is written to the file `journal` immediately, and later runs do not compute it again; equal tasks are
    done once. The journals of other shards (`pool.shard`) are beside it, and are read too; at the end, the caller
    removes them all with `remove_journals`. Tasks of other shards that are not done yet are `NotDone`.
    is_good: whether the result of an earlier run is still valid.
    """
    keys = [_key(function, task) for task in tasks]
    wanted = dict.fromkeys(keys)
    done = {key: result for key, result in _read_journals(journal) if key in wanted and is_good(result)}
    part, parts = pool.shard
    own = list(wanted)[part::parts]
    missing = [key for key in own if key not in done]
    timeout_s = timeout_s or pool.timeout_s
    if missing:
        path = pool.journal(journal)
        path.parent.mkdir(parents=True, exist_ok=True)
        with pool.executor() as executor, naming(path), open(path, "a", encoding="utf-8") as file:
            if file.tell():
                file.write("\n")  # in case a kill cut off the last line
            bar = pool.progress(total=len(own), initial=len(own) - len(missing)) if pool.progress else None
            try:
                for key, result in _results(executor, missing, timeout_s):
                    done[key] = result
                    entry = {"key": key, "failed": result} if isinstance(result, Failed) else {"key": key, "is": result}
                    file.write(json.dumps(entry) + "\n")
                    file.flush()
                    if bar:
                        bar.update()
            finally:
                if bar:
                    bar.close()
    return [done.get(key, NotDone("not done")) for key in keys]


def remove_journals(journal: Path) -> None:
    """Remove the journals of a run and its shards, once its results are written elsewhere."""
    for path in _journals(journal):
        path.unlink(missing_ok=True)


def _results(executor: Executor, keys: Iterable[str], timeout_s: float) -> Iterator[tuple[str, Any]]:
    """Keys and results as they complete; only some tasks are submitted at a time."""
    ready: queue.SimpleQueue[Future] = queue.SimpleQueue()
    waiting = iter(keys)
    submitted: dict[Future, str] = {}

    def submit() -> None:
        key = next(waiting, None)
        if key is not None:
            future = executor.submit(_do, key, timeout_s)
            submitted[future] = key
            future.add_done_callback(ready.put)

    for _ in range(_MAX_SUBMITTED):
        submit()
    while submitted:
        future = ready.get()
        key = submitted.pop(future)
        submit()
        kind, result = future.result()
        yield key, Failed(result) if kind == "failed" else result


def _do(key: str, timeout_s: float) -> tuple[str, Any]:
    function, arguments = json.loads(key)
    try:
        return "done", in_child(find_function(function), arguments, timeout_s)
    except InputError as error:
        return "failed", str(error)


def _key(function: Callable, task: Sequence) -> str:
    return json.dumps([name_of(function), list(task)])


def _journals(journal: Path) -> list[Path]:
    return [journal, *map(Path, sorted(glob.glob(f"{glob.escape(str(journal))}.*-of-*")))]


def _read_journals(journal: Path) -> Iterator[tuple[str, Any]]:
    for path in _journals(journal):
        try:
            lines = read_lines(path)
        except FileNotFoundError:
            continue
        for line in lines:
            try:
                entry = json.loads(line)
                yield entry["key"], Failed(entry["failed"]) if "failed" in entry else entry["is"]
            except (json.JSONDecodeError, KeyError, TypeError):
                continue  # cut off by a kill


@contextmanager
def _dask_executor(address: str) -> Iterator[Executor]:
    try:
        from distributed import Client
    except ImportError:
        raise InputError(
            "--executor dask needs dask.distributed: pip install distributed (or '.[dask]' in a checkout)"
        ) from None
    try:
        client = Client(address, timeout=5)
    except (OSError, TimeoutError, ValueError) as error:
        raise InputError(f"--scheduler {address}: no dask scheduler answers there ({error})") from None
    with client:
        if not client.scheduler_info()["workers"]:
            raise InputError(f"--scheduler {address}: no workers; start some with `dask worker {address}`")
        try:
            client.run(lambda: bool(__import__("common.worker_pool")))
        except ImportError as error:
            raise InputError(
                f"--scheduler {address}: its workers cannot import this project ({error}): start them in its folder, "
                "with it on PYTHONPATH, or after pip install"
            ) from None
        try:
            yield client.get_executor(pure=False)
        except Exception as error:
            if not type(error).__module__.startswith("distributed"):
                raise
            reason = f"{type(error).__name__}: {error}"
            raise InputError(f"--scheduler {address}: {reason}; run it again to continue") from None
