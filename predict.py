"""Predicts the classes of videos: `python predict.py --help`."""

from commands.predict import main
from common.command_line import run_command

if __name__ == "__main__":
    run_command(main)
