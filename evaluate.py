"""Evaluates weights on the videos of a manifest: `python evaluate.py --help`."""

from commands.evaluate import main
from common.command_line import run_command

if __name__ == "__main__":
    run_command(main)
