"""The one kind of error meant for the user."""

import contextlib
import os
from collections.abc import Iterator


class InputError(ValueError):
    """Bad input: says which file or key, what was expected, and what to do. Commands print it as one line."""


def reason(error: Exception) -> str:
    """The system's or FFmpeg's message for an error, in lower case."""
    return str(getattr(error, "strerror", None) or error).lower()


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Names the file in an `OSError` that does not: one of a write, such as "No space left on device"."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or os.fspath(path)
        raise


def check(holds: bool, message: str) -> None:
    """Raises `InputError` with the message unless `holds`."""
    if not holds:
        raise InputError(message)
