"""train.py, watched: what a run was doing when it was killed, and the clips of every step, in order.

The command is train.py's own. Its trainer notes its phase in a file that is mapped into memory, which the kernel keeps
when the process is killed, and appends the sample ids of each micro-step to another. Both are in the folder
$TORTURE_BOARD. $TORTURE_SLOW: seconds that each flush to disk, and each 64 KiB of a checkpoint, take longer.
"""

import json
import mmap
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from commands import train
from common.command_line import run_command

PHASES = ("starting", "training", "end of epoch", "validation", "SWA")
"""What the main thread does. "starting" lasts until the first clips are there."""
BOARD_BYTES = 3  # phase, whether a file is being written, whether this process has begun
_CHUNK = 1 << 16


class Board:
    """What this process is doing."""

    def __init__(self, folder: str):
        rank = os.environ.get("RANK", "0")
        path = os.path.join(folder, f"board.{rank}")
        with open(path, "r+b") as file:
            self._bytes = mmap.mmap(file.fileno(), BOARD_BYTES)
        self._bytes[2] = 1
        self._ids = os.open(os.path.join(folder, f"ids.{rank}"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def enter(self, phase: str) -> None:
        self._bytes[0] = PHASES.index(phase)

    def write(self, is_writing: bool) -> None:
        self._bytes[1] = is_writing

    def note(self, *row: object) -> None:
        """One write, so that no kill leaves half a line."""
        os.write(self._ids, (json.dumps(row) + "\n").encode())


def observe(board: Board) -> None:
    """Replaces the trainer and the saver that train.py is about to import by ones that keep the board."""
    from training import engine, saving

    class Observed(engine.Trainer):
        def forward_backward(self, batch, micro_step, *, is_last):
            board.enter("training")
            place = self.step, micro_step, self.process.rank, self.process.world_size
            board.note(*place, batch.sample_ids.tolist(), batch.valid.tolist())
            return super().forward_backward(batch, micro_step, is_last=is_last)

        def finish_epoch(self):
            is_averaged = self.average is not None and self.step > self.average.first_epoch * self.steps_per_epoch
            board.enter("SWA" if is_averaged else "end of epoch")
            result = super().finish_epoch()
            board.enter("training")
            return result

        def validate(self, *networks):
            if len(networks) == 1:
                board.enter("validation")
            result = super().validate(*networks)
            if len(networks) == 1:
                board.enter("end of epoch")
            return result

    class ObservedSaver(saving.Saver):
        def _write(self, state):
            board.write(True)
            try:
                super()._write(state)
            finally:
                board.write(False)

    engine.Trainer, engine.Saver = Observed, ObservedSaver


def slow_down(seconds: float) -> None:
    from training import checkpoints

    flush, write = os.fsync, checkpoints._HashingFile.write

    def slow_flush(file):
        time.sleep(seconds)
        flush(file)

    def slow_write(self, data):
        time.sleep(seconds * len(data) / _CHUNK)
        return write(self, data)

    os.fsync, checkpoints._HashingFile.write = slow_flush, slow_write


def main() -> None:
    board, plain = Board(os.environ["TORTURE_BOARD"]), train.train

    def observed(*arguments):
        observe(board)
        if seconds := float(os.environ.get("TORTURE_SLOW", 0)):
            slow_down(seconds)
        plain(*arguments)

    train.train = observed
    train.main()


if __name__ == "__main__":
    sys.argv[0] = "train.py"
    run_command(main)
