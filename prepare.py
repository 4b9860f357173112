"""Makes and checks the manifests that training reads: `python prepare.py --help`."""

from commands.prepare import main
from common.command_line import run_command

if __name__ == "__main__":
    run_command(main)
