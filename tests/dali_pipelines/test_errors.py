"""How commands end: one line for what is for people, a traceback for our own bugs."""

import pytest

from common.command_line import run_command
from dali_pipelines.errors import InputError, naming


def fails_while_cleaning_up():
    try:
        raise KeyboardInterrupt
    finally:
        raise AttributeError("pipeline_stack")


def raises(error):
    def main():
        raise error

    return main


def on_a_full_disk():
    with naming("a.csv.journal"), open("/dev/full", "w") as file:
        file.write("no room")


@pytest.mark.parametrize(
    "main, status, line",
    [
        (lambda: None, 0, ""),
        (lambda: 3, 3, ""),
        (raises(InputError("a.csv: is\n  empty")), 2, "error: a.csv: is empty"),
        (raises(FileNotFoundError(2, "No such file", "gone")), 2, "error: gone: No such file"),
        (on_a_full_disk, 2, "error: a.csv.journal: No space left on device"),
        (raises(KeyboardInterrupt()), 130, "stopped by Ctrl-C"),
        (fails_while_cleaning_up, 130, "stopped by Ctrl-C"),
    ],
)
def test_errors_set_the_exit_status_and_print_one_line(capsys, monkeypatch, main, status, line):
    monkeypatch.setattr("sys.argv", ["/somewhere/train.py"])
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit) as end:
        run_command(main)
    assert end.value.code == status and capsys.readouterr().err == (f"train.py: {line}\n" if line else "")


def test_our_own_bugs_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: 1 / 0)
