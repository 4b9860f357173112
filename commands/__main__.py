"""`dali-timesformer COMMAND ...` and `python -m commands COMMAND ...`, for installations without the top-level scripts.

torchrun --nproc-per-node 8 -m commands train -c config.yaml
"""

import importlib
import sys

from common.command_line import run_command
from common.version import VERSION

COMMANDS = ("train", "evaluate", "predict", "export", "prepare", "weights", "benchmark")
_USAGE = f"usage: dali-timesformer {{{','.join(COMMANDS)}}} ...\n       dali-timesformer --version"


def main() -> None:
    """Runs the command named by the first argument and exits with its status."""
    name = sys.argv[1] if len(sys.argv) > 1 else None
    if name == "--version":
        print(VERSION)
    elif name in ("-h", "--help"):
        print(_USAGE)
    elif name not in COMMANDS:
        print(f"{_USAGE}\ndali-timesformer: error: expected one of these commands", file=sys.stderr)
        sys.exit(2)
    else:
        sys.argv[:2] = [f"dali-timesformer {name}"]
        run_command(importlib.import_module(f"commands.{name}").main)


if __name__ == "__main__":
    main()
