"""The one kind of error meant for the user."""


class InputError(ValueError):
    """Bad input: says which file or key, what was expected, and what to do. Commands print it as one line."""


def reason(error: Exception) -> str:
    """The system's or FFmpeg's message for an error, in lower case."""
    return str(getattr(error, "strerror", None) or error).lower()


def check(holds: bool, message: str) -> None:
    """Raises `InputError` with the message unless `holds`."""
    if not holds:
        raise InputError(message)
