"""Runs functions in a process of its own: a video can make FFmpeg hang, or take the process down with it.

A thread that calls `in_child` keeps one process for all its calls, and starts another where that one had to be ended.
Functions are passed by name, so they must be at the top level of a module; arguments and results travel as JSON. The
threads of a dask worker can call it as well.
"""

import contextlib
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dali_pipelines.errors import InputError
from dali_pipelines.processes import end_with_parent

_COMMAND = ["-m", "common.child_process"]
_here = threading.local()
_children: weakref.WeakSet["_Child"] = weakref.WeakSet()


def name_of(function: Callable) -> str:
    """ "module:function", by which another process finds it."""
    return f"{function.__module__}:{function.__qualname__}"


def find_function(name: str) -> Callable:
    """The function that `name_of` named."""
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


def in_child(function: Callable, arguments: Sequence, timeout_s: float, *, setting: str = "--timeout") -> Any:
    """Calls `function(*arguments)` in a child process. The result is what JSON makes of it: tuples become lists.
    `setting` is the name by which people set `timeout_s`.

    Raises `InputError` where it does, where it takes longer than `timeout_s`, and where its process ends, twice.
    """
    for is_last in (False, True):
        child = getattr(_here, "child", None)
        if child is None or child.has_ended:
            child = _here.child = _Child()
            _children.add(child)
        try:
            return child.call(name_of(function), arguments, timeout_s)
        except TimeoutError:
            child.end()
            raise InputError(f"given up after {timeout_s:g} s ({setting})") from None
        except _EndedError as error:
            if is_last:
                raise InputError(f"the process that reads it ends with {error}, twice") from None
    raise AssertionError


def end_children() -> None:
    """Ends the processes of all threads; calls under way fail. For an end before the work is done."""
    for child in list(_children):
        child.end()


class _EndedError(Exception):
    """The process has ended; the message is its signal or status."""


class _Child:
    def __init__(self):
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path[1:]])}
        self._process = subprocess.Popen(
            [sys.executable, *_COMMAND, str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            process_group=0,  # Ctrl-C is for the process around it
        )
        self._answer = b""
        self.has_ended = False

    def call(self, function: str, arguments: Sequence, timeout_s: float) -> Any:
        try:
            self._process.stdin.write(json.dumps([function, arguments]).encode() + b"\n")
            self._process.stdin.flush()
            answer = json.loads(self._read_line(timeout_s))
        except (BrokenPipeError, EOFError):
            status = self.end(patience_s=1)
            raise _EndedError(f"signal {-status}" if status < 0 else f"status {status}") from None
        if "error" in answer:
            raise InputError(answer["error"])
        return answer["result"]

    def _read_line(self, timeout_s: float) -> bytes:
        pipe, until = self._process.stdout.fileno(), time.monotonic() + timeout_s
        while b"\n" not in self._answer:
            if not select.select([pipe], [], [], max(until - time.monotonic(), 0))[0]:
                raise TimeoutError
            some = os.read(pipe, 1 << 16)
            if not some:
                raise EOFError
            self._answer += some
        line, _, self._answer = self._answer.partition(b"\n")
        return line

    def end(self, patience_s: float = 0) -> int:
        """Its exit status; one that ends by itself within `patience_s` keeps its own."""
        self.has_ended = True
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(patience_s)
        self._process.kill()
        return self._process.wait()

    def __del__(self):
        self.end()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


def _main() -> None:
    """Answers every line of stdin with one on stdout; ends with the process around it, whose end closes stdin."""
    end_with_parent(int(sys.argv[-1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is no answer
    for line in sys.stdin.buffer:
        function, arguments = json.loads(line)
        try:
            answer = {"result": find_function(function)(*arguments)}
        except (InputError, OSError, MemoryError) as error:
            answer = {"error": str(error) or type(error).__name__}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()


if __name__ == "__main__":
    _main()
