"""Saves a run that is about to end because of a signal, a hang, or an error."""

from common.distributed import DistributedContext
from common.preemption import Preemption
from training.faults import FaultLog
from training.run_state import RunState
from training.saving import Saver

_PATIENCE_S = 5  # for an update of the weights to finish
_NOT_SAVED = "nothing could be saved within an update; the last checkpoint is kept"


class EmergencySaver:
    """Saves the last finished step, from any thread."""

    def __init__(
        self,
        process: DistributedContext,
        state: RunState,
        saver: Saver,
        faults: FaultLog,
        preemption: Preemption,
        *,
        steps_per_epoch: int,
    ):
        self._process, self._state, self._saver, self._faults = process, state, saver, faults
        self._preemption, self._steps_per_epoch = preemption, steps_per_epoch

    def save(self) -> str:
        """Save unsaved steps; returns the result as a message. Never raises an error."""
        if not self._process.is_main:
            return "rank 0 saves"
        try:
            with self._state.reading(timeout_s=_PATIENCE_S) as is_consistent:
                return self._save() if is_consistent else _NOT_SAVED
        except Exception as error:  # the process must end with its original error
            return f"nothing could be saved ({error})"

    def _save(self) -> str:
        self._preemption.handle()
        self._saver.wait()
        state, step = self._state, self._state.step
        if self._saver.saved == state.position and not self._saver.has_pending:
            return f"step {step} is saved already" if step else "nothing to save yet"
        if state.num_faults:
            epoch = (step - 1) // self._steps_per_epoch
            self._faults.write(state.finished_faults(), epoch=epoch, mode="train")
            state.logs = state.logs._replace(fault_bytes=self._faults.size())
        self._saver.write(state.state_dict())
        if self._saver.saved != state.position:
            return f"step {step} is not saved: its weights are not finite"
        return f"saved step {step}; resume with --resume"
