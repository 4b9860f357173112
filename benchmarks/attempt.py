"""Runs one contestant of a benchmark in a process of its own."""

import logging
import multiprocessing
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

from dali_pipelines.processes import end_with_parent


class CannotReadError(Exception):
    """A contestant cannot read a file that our loader can; the message says which and why."""


def attempt(result: dict[str, Any], function: Callable, name: str, *arguments: Any) -> Any:
    """Calls `function(name, *arguments)` in a new process and returns its result. If the contestant `name` fails,
    returns None and sets `result["failure"]` to the reason."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, function, name, *arguments))
    process.start()
    sender.close()
    try:
        answer, result["failure"] = receiver.recv()
        process.join()
    except EOFError:
        process.join()
        answer, result["failure"] = None, f"its process ended with exit code {process.exitcode}"
    except BaseException:  # Ctrl-C
        process.kill()
        raise
    return answer


def _answer(sender: Connection, function: Callable, name: str, *arguments: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Ctrl-C, the main process ends this one
    end_with_parent()
    logging.disable()  # SPDL logs errors and also raises them
    torch.set_num_threads(1)
    try:
        sender.send((function(name, *arguments), None))
    except Exception as error:
        # A DataLoader prefixes the message with its worker's traceback.
        message = (str(error).strip() or type(error).__name__).splitlines()[-1]
        sender.send((None, message.removeprefix(f"{CannotReadError.__module__}.{CannotReadError.__name__}: ")))
