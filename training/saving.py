"""What a run writes to go on from and to be used, checkpoints and weights files, and finding it again."""

import contextlib
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.locking import FolderLock
from common.weights import Weights, save_weights
from dali_pipelines.errors import InputError
from training import checkpoints

_LAUNCH = "launch"  # a file beside the checkpoints
_FAILED_WRITES = 3  # in a row, before a run stops that cannot save


class Saver:
    """Writes the checkpoints of a run, and its weights files last, best and swa, in a thread; of the main process.

    States are those of `Trainer`, in host memory. Weights files are owed until they are written, and no checkpoint is
    written that is past one that is owed: a run that goes on from before them writes them again.
    """

    def __init__(self, output: Path, weights: Callable[[dict[str, Any], str], Weights]):
        """`weights`: those for last, best or swa of a state."""
        self.folder = output / "checkpoints"
        self.saved = (0, False)
        """Step and `is_validated` of the newest checkpoint."""
        self._output, self._weights = output, weights
        self._writer = checkpoints.Writer()
        self._owed: list[tuple[list[str], dict[str, Any]]] = []
        self._writing = threading.Lock()
        self._lock: FolderLock | None = None
        self._failures = 0

    def owe(self, names: list[str], state: dict[str, Any]) -> None:
        """The weights files of these names are those of `state`."""
        self._owed.append((names, state))

    @property
    def owes(self) -> bool:
        return bool(self._owed)

    def forget(self) -> None:
        """What is owed: the run has gone back to before it."""
        self._owed.clear()

    def submit(self, state: dict[str, Any]) -> None:
        """A thread writes it; `collect` what was written before first."""
        self._writer.submit(lambda: self.write(state))

    def write(self, state: dict[str, Any]) -> None:
        """From any thread, one after another. Raises `InputError`. Weights that are not finite are not written: there
        is nothing in them to go on from, and the next step says so."""
        with self._writing:
            try:
                self._write(state)
            except InputError as error:
                if not checkpoints.made_room(self.folder, error):
                    raise
                self._write(state)

    def _write(self, state: dict[str, Any]) -> None:
        while self._owed:
            names, of_then = self._owed[0]
            for name in names:
                save_weights(self._output / f"{name}.safetensors", self._weights(of_then, name))
            self._owed.pop(0)
        if all(value.isfinite().all() for value in state["network"].values()):
            checkpoints.save_checkpoint(self.folder, state["step"], state)
            self.saved = (state["step"], state["is_validated"])

    def wait(self) -> None:
        """Until nothing is being written, whatever comes of it."""
        try:
            self._writer.wait()
        except (InputError, OSError):
            self._failures += 1

    def collect(self, say: Callable[[str], None], *, is_last: bool) -> None:
        """Waits for what is being written. What fails is said, and the run goes on without it, but not for ever: raises
        `InputError` after three in a row, or where nothing `is_last` to come after it."""
        try:
            if self._writer.wait():
                self._failures = 0
        except (InputError, OSError) as error:
            self._failures += 1
            if is_last or self._failures == _FAILED_WRITES:
                raise InputError(
                    f"{error}; what was saved before stands in {self.folder}: see that it can be written, and go on "
                    "with --resume"
                ) from None
            say(f"{error}; training goes on, and what was saved before stands")

    def close(self) -> None:
        """Waits; what is still owed is tried a last time."""
        self._writer.close()
        with contextlib.suppress(InputError, OSError):
            if self._owed:
                self.write(self._owed[-1][1])
        if self._lock:
            self._lock.release()

    def lock(self) -> str:
        """Keeps other runs out of the output folder, until `close`; a note for people if that is not possible."""
        self._lock = FolderLock(self._output, remedy="wait until it has ended, or name another folder: -o output=DIR")
        return self._lock.note

    def begin(self) -> None:
        """The run begins, or goes on, here: where torchrun starts it again, it is known by what it is called. Removes
        what a kill has left half written, if no other run can be writing it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._lock and not self._lock.note:
            checkpoints.remove_unfinished(self.folder)
            for path in self._output.glob("*.safetensors.*part"):
                path.unlink(missing_ok=True)
        (self.folder / _LAUNCH).unlink(missing_ok=True)
        if name := _launch():
            (self.folder / _LAUNCH).write_text(name)


def find_checkpoint(output: Path, *, resume: bool) -> tuple[Path, dict[str, Any]] | None:
    """The one to go on from, and its state: where that is wanted, or torchrun has started this same run again. None to
    begin. Raises `InputError` where results of an earlier run would be overwritten."""
    folder = output / "checkpoints"
    goes_on = resume or _is_started_again(folder)
    if goes_on and (newest := checkpoints.load_newest_checkpoint(folder)):
        return newest
    held = ["checkpoints"] if list(folder.glob("step_*")) else []
    if goes_on and folder.exists() and not held:
        return None  # a run that ended before its first checkpoint was written
    held += [name for name in ("best.safetensors", "last.safetensors") if (output / name).exists()]
    if not held:
        return None
    if goes_on:
        raise InputError(
            f"{output} holds the {held[0]} of an earlier run, but no checkpoint that can be read: "
            "to begin anew, name another folder with -o output=DIR"
        )
    raise InputError(
        f"{output} holds the {held[0]} of an earlier run: continue that with --resume, "
        "or name another folder with -o output=DIR"
    )


def _is_started_again(folder: Path) -> bool:
    name = _launch()
    with contextlib.suppress(OSError):
        return name is not None and (folder / _LAUNCH).read_text() == name
    return False


def _launch() -> str | None:
    """What names this run among those of torchrun, the same when it starts it again: its run id, or where it has none
    the process of torchrun itself. None without torchrun."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    if name != "none":
        return name
    began = Path(f"/proc/{os.getppid()}/stat").read_text().rpartition(")")[2].split()[19]
    return f"{socket.gethostname()} {os.getppid()} {began}"
