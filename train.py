"""Trains a TimeSformer: `python train.py --help`."""

from commands.train import main
from common.command_line import run_command

if __name__ == "__main__":
    run_command(main)
