"""Writes a run's checkpoints and weights files in a background thread."""

import contextlib
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from common.locking import FolderLock
from common.weights import Weights, save_weights
from dali_pipelines.errors import InputError
from training import checkpoints
from training.resuming import write_launch_id

_WRITTEN_IN_PLACE = ("config.yaml", "metrics.jsonl", "faults.csv")
"""Files of the output folder that are cut or overwritten; all others get a new file."""
_MAX_FAILED_WRITES = 3  # in a row, before a run stops


class Saver:
    """Writes checkpoints, and the weights files last, best and swa or ema; for the main process.

    The states are those of `RunState.state_dict`. Pending weights are written before any newer checkpoint: a run that
    resumes from an older one writes them again.
    """

    def __init__(self, output: Path, weights: Callable[..., Weights]):
        """weights: `RunState.weights`, which builds the content of a weights file from a state."""
        self.folder = output / "checkpoints"
        self.saved = (0, False)
        """`RunState.position` of the newest checkpoint."""
        self._output, self._weights = output, weights
        self._writer = checkpoints.Writer()
        self._pending: list[tuple[Mapping[str, bool], dict[str, Any]]] = []
        self._write_lock = threading.Lock()
        self._folder_lock: FolderLock | None = None
        self._failures = 0

    def enqueue(self, files: Mapping[str, bool], state: dict[str, Any]) -> None:
        """Let the next `write` write the weights files last, best and swa that are named in `files` from `state`, each
        with the averaged weights or without."""
        self._pending.append((files, state))

    @property
    def has_pending(self) -> bool:
        """Whether weights files are waiting to be written."""
        return bool(self._pending)

    def discard_pending(self) -> None:
        """Drop the pending weights files: the run has rolled back to before them."""
        self._pending.clear()

    def submit(self, state: dict[str, Any]) -> None:
        """Let the thread `write` the state. Call `collect` first."""
        self._writer.submit(lambda: self.write(state))

    def write(self, state: dict[str, Any]) -> None:
        """Write the pending weights, then a checkpoint of `state`, unless its weights are not finite: no run could
        resume from those, and the next step reports them. Any thread may call it. Raises `InputError`."""
        with self._write_lock:
            try:
                self._write(state)
            except InputError as error:
                if not checkpoints.make_room(self.folder, error):
                    raise
                self._write(state)

    def _write(self, state: dict[str, Any]) -> None:
        while self._pending:
            files, pending_state = self._pending[0]
            for name, averaged in files.items():
                save_weights(self._output / f"{name}.safetensors", self._weights(pending_state, averaged=averaged))
            self._pending.pop(0)
        if all(value.isfinite().all() for value in state["network"].values()):
            checkpoints.save_checkpoint(self.folder, state["step"], state)
            self.saved = (state["step"], state["is_validated"])

    def wait(self) -> None:
        """Wait for the write in progress; a failure is only counted."""
        try:
            self._writer.wait()
        except (InputError, OSError):
            self._failures += 1

    def collect(self, report: Callable[[str], None], *, is_last: bool) -> None:
        """Wait for the write in progress, and `report` a failure. Raises `InputError` at the third failure in a row, or
        if no other write follows (`is_last`)."""
        try:
            if self._writer.wait():
                self._failures = 0
        except (InputError, OSError) as error:
            self._failures += 1
            if is_last or self._failures == _MAX_FAILED_WRITES:
                raise InputError(
                    f"{error}; the checkpoints in {self.folder} are kept: make room, or the folder writable, and "
                    "resume with --resume"
                ) from None
            report(f"{error}; training continues, and the earlier checkpoints are kept")

    def close(self) -> None:
        """Wait for the write in progress, and try pending weights one last time."""
        self._writer.close()
        with contextlib.suppress(InputError, OSError):
            if self._pending:
                self.write(self._pending[-1][1])
        if self._folder_lock:
            self._folder_lock.release()

    def lock(self) -> str:
        """Lock the output folder against other runs until `close`; returns a note if that is not possible, else ""."""
        remedy = "wait until it has ended, or name another folder: -o output=DIR"
        try:
            self._folder_lock = FolderLock(self._output, remedy=remedy)
        except FileExistsError:
            raise InputError(f"output {self._output} is a file; expected a folder: -o output=DIR") from None
        except OSError as error:
            raise InputError(
                f"output {self._output}: the folder cannot be created or written ({error.strerror}); name another one: "
                "-o output=DIR"
            ) from None
        for path in (self._output / name for name in _WRITTEN_IN_PLACE):
            if path.is_symlink():
                raise InputError(f"{path} is a link to a file that would be overwritten: remove it")
        return self._folder_lock.note

    def begin(self) -> None:
        """Create the checkpoint folder, and note which launch of torchrun the run belongs to.

        Removes unfinished files of a killed run, if the lock shows that no other run is writing them.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._folder_lock and not self._folder_lock.note:
            checkpoints.remove_unfinished(self.folder)
            for path in self._output.glob("*.safetensors.*part"):
                path.unlink(missing_ok=True)
        write_launch_id(self.folder)
