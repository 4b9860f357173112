"""Averages and converts weights files: `python weights.py --help`."""

from commands.weights import main
from common.command_line import run_command

if __name__ == "__main__":
    run_command(main)
