"""Measures speed, side by side with other software: `python benchmark.py --help`."""

from commands.benchmark import main
from common.command_line import run_command

if __name__ == "__main__":
    run_command(main)
