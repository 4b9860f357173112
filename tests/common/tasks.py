"""Functions that tests run in child processes. They note what they do in a file."""

import ctypes
import os
import time

from dali_pipelines.errors import InputError


def note(path, text):
    with open(path, "a") as file:
        file.write(text + "\n")
    return [text, os.getpid()]


def slow(path, text):
    time.sleep(0.02)
    return note(path, text)


def hang(path):
    while True:
        time.sleep(1)


def crash(path):
    note(path, "crash")
    ctypes.string_at(0)


def refuse(path):
    raise InputError(f"{path}: not that one")


def bug(path):
    return {}[path]


def chatter(path):
    os.write(1, b"no answer")
    return path
