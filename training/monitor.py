"""What a run shows: TensorBoard, one JSON line an interval, a progress bar, and a line an epoch."""

import json
import sys
import time
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from training.pictures import clip_grid


class Monitor:
    """Writes tensorboard/ and metrics.jsonl below `folder`. The main process has one, the others have `Silent`."""

    def __init__(self, folder: Path, *, total_steps: int, step: int):
        self._writer = SummaryWriter(folder / "tensorboard", purge_step=step or None)
        self._lines = open(folder / "metrics.jsonl", "a", encoding="utf-8")
        self._bar = tqdm(
            total=total_steps, initial=step, unit="step", dynamic_ncols=True, disable=not sys.stderr.isatty()
        )

    def say(self, text: str) -> None:
        """One line on stdout, above the progress bar."""
        self._bar.write(text, file=sys.stdout)
        sys.stdout.flush()

    def advance(self, **shown: str) -> None:
        self._bar.update()
        self._bar.set_postfix(shown, refresh=False)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Scalars such as {"train/loss": 1.2} at an optimizer step, also as a line of metrics.jsonl."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._line({"step": step, **values})

    def log_config(self, text: str) -> None:
        self._writer.add_text("config", "".join(f"    {line}\n" for line in text.splitlines()))

    def log_clips(self, step: int, clips: Tensor, *, mean: list[float], std: list[float]) -> None:
        """A picture of some clips [B, 3, T, S, S] as the network sees them: a row a clip, a column a frame."""
        self._writer.add_image("train/clips", clip_grid(clips[:4], mean=mean, std=std), step, dataformats="HWC")

    def _line(self, values: dict[str, Any]) -> None:
        self._lines.write(json.dumps({"time": round(time.time(), 3), **values}) + "\n")
        self._lines.flush()

    def close(self) -> None:
        self._bar.close()
        self._lines.close()
        self._writer.close()


class Silent:
    """A monitor that shows nothing."""

    def say(self, text: str) -> None: ...

    def advance(self, **shown: str) -> None: ...

    def log(self, step: int, values: dict[str, float]) -> None: ...

    def log_config(self, text: str) -> None: ...

    def log_clips(self, step: int, clips: Tensor, *, mean: list[float], std: list[float]) -> None: ...

    def close(self) -> None: ...
