"""Calls functions in a child process, because a video can make FFmpeg hang or crash.

A thread that calls `in_child` keeps one process for all its calls, and replaces it if it has to be ended. Functions are
passed by name, so they must be at the top level of a module; arguments and results are passed as JSON. Threads of a
dask worker can call it too.
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
_thread = threading.local()
_children: weakref.WeakSet["_Child"] = weakref.WeakSet()


def name_of(function: Callable) -> str:
    """The function as "module:function", for `find_function` in another process."""
    return f"{function.__module__}:{function.__qualname__}"


def find_function(name: str) -> Callable:
    """The function with a name from `name_of`."""
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


def in_child(function: Callable, arguments: Sequence, timeout_s: float, *, setting: str = "--timeout") -> Any:
    """Call `function(*arguments)` in a child process. The result is converted to JSON and back: tuples become lists.

    setting: the option with which users set `timeout_s`. Raises `InputError` if the function does, if it takes longer
    than `timeout_s`, or if its process crashes twice.
    """
    try:
        return _call(function, arguments, timeout_s, setting)
    except _EndedError:
        pass
    try:
        return _call(function, arguments, timeout_s, setting)
    except _EndedError as error:
        raise InputError(f"the process that reads it ended with {error}, twice") from None


def _call(function: Callable, arguments: Sequence, timeout_s: float, setting: str) -> Any:
    child = getattr(_thread, "child", None)
    if child is None or child.has_ended:
        child = _thread.child = _Child()
        _children.add(child)
    try:
        return child.call(name_of(function), arguments, timeout_s)
    except TimeoutError:
        child.end()
        raise InputError(f"given up after {timeout_s:g} s ({setting})") from None


def end_children() -> None:
    """End the child processes of all threads; calls in progress fail."""
    for child in list(_children):
        child.end()


class _EndedError(Exception):
    """The process has ended; the message gives its signal or status."""


class _Child:
    def __init__(self) -> None:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path[1:]])}
        self._process = subprocess.Popen(
            [sys.executable, *_COMMAND, str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            process_group=0,  # only the parent handles Ctrl-C
        )
        assert self._process.stdin and self._process.stdout  # both are pipes
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        self._buffer = b""
        self.has_ended = False

    def call(self, function: str, arguments: Sequence, timeout_s: float) -> Any:
        try:
            self._stdin.write(json.dumps([function, arguments]).encode() + b"\n")
            self._stdin.flush()
            answer = json.loads(self._read_line(timeout_s))
        except (BrokenPipeError, EOFError):
            status = self.end(patience_s=1)
            raise _EndedError(f"signal {-status}" if status < 0 else f"status {status}") from None
        if "error" in answer:
            raise InputError(answer["error"])
        return answer["result"]

    def _read_line(self, timeout_s: float) -> bytes:
        pipe, until = self._stdout.fileno(), time.monotonic() + timeout_s
        while b"\n" not in self._buffer:
            if not select.select([pipe], [], [], max(until - time.monotonic(), 0))[0]:
                raise TimeoutError
            data = os.read(pipe, 1 << 16)
            if not data:
                raise EOFError
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def end(self, patience_s: float = 0) -> int:
        """End the process, unless it ends by itself within `patience_s`; returns its exit status."""
        self.has_ended = True
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(patience_s)
        self._process.kill()
        return self._process.wait()

    def __del__(self):
        self.end()
        for pipe in (self._stdin, self._stdout):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


def _main() -> None:
    """Answer every line of stdin with a line on stdout, until stdin closes because the parent ends."""
    end_with_parent(int(sys.argv[-1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # output of libraries must not be taken for an answer
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
