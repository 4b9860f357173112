"""`train.py --profile`: a trace of some steps, and the time of each part of a step."""

from collections.abc import Callable
from pathlib import Path

from torch.profiler import profile, record_function, schedule

__all__ = ["PARTS", "StepProfiler", "record_function"]

PARTS = ("data", "forward", "backward", "optimizer")
"""Names of the parts of a step in the trace (`record_function`)."""

_SKIPPED, _WARMUP, _TRACED = 3, 1, 4  # steps


class StepProfiler:
    """Traces four steps of the main process, after the first four, into folder/trace.json.gz (for chrome://tracing or
    ui.perfetto.dev), and reports the mean milliseconds of each part to `report`."""

    def __init__(self, folder: Path, report: Callable[[str], None]):
        self._folder, self._report = folder, report
        self._is_done = False
        self._profile = profile(
            schedule=schedule(wait=_SKIPPED, warmup=_WARMUP, active=_TRACED, repeat=1),
            on_trace_ready=self._finish,
        )

    def start(self) -> None:
        """Starts the profiler."""
        self._profile.start()

    def step(self) -> None:
        """Records the end of a step."""
        self._profile.step()

    def stop(self) -> None:
        """Ends the profiler; reports if the run was too short for a trace."""
        if not self._is_done:
            self._report(f"--profile: the run ended before {_SKIPPED + _WARMUP + _TRACED} steps; no trace was written")
            self._profile.on_trace_ready = None
        self._profile.stop()

    def _finish(self, finished: profile) -> None:
        self._is_done = True
        path = self._folder / "trace.json.gz"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            finished.export_chrome_trace(str(path))
        except OSError as error:
            self._report(f"--profile: {path} cannot be written ({error.strerror})")
            return
        times = {event.key: event.cpu_time_total / 1000 / _TRACED for event in finished.key_averages()}
        parts = ", ".join(f"{part} {times.get(part, 0):.1f} ms" for part in PARTS)
        self._report(f"--profile: a step takes {parts} (host time, {_TRACED} steps); the trace is {path}")
