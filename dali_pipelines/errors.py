"""The one kind of error that is meant for the person who typed the command."""


class InputError(ValueError):
    """Bad input: says which file or key, what was expected, and what to do. Commands print it as one line."""


def check(holds: bool, message: str) -> None:
    """Raises `InputError` with the message unless something holds."""
    if not holds:
        raise InputError(message)
