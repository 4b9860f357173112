"""Exports weights to files that other software runs: `python export.py --help`."""

from commands.export import main
from common.command_line import run_command

if __name__ == "__main__":
    run_command(main)
