"""Where the metrics of a run go: TensorBoard, Weights & Biases, MLflow (`train.loggers`)."""

import dataclasses
import importlib.util
import json
import os
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from common.config import Config, flat, preprocessing, to_yaml
from common.metrics import Metric
from dali_pipelines.errors import InputError
from dali_pipelines.text import split_lines

_FINAL = dict.fromkeys(Metric.VALIDATION, 0.0)  # the metrics of HParams, which shows their last values
_PROJECT = "dali-timesformer"
_IDS = "loggers.json"  # in the output folder: the ids by which a resumed run finds its entry in a service
_MOST_SECONDS = 20  # for the last entries to be sent: torchrun and Slurm kill a process that takes half a minute to end


class Logger(ABC):
    """A place that shows the metrics of one run.

    Whatever its methods raise, the run continues; see `Monitor`.
    """

    name: str
    package: str
    """Imported only if the logger is used: importing takes a second or more."""
    keeps_trying = False
    """Whether entries follow after one has failed: not to a service that does not answer, which costs time."""

    def __init__(self, folder: Path, report: Callable[[str], None]):
        """folder: the run's output. report: prints a line."""
        self.folder, self.report = folder, report
        self.config, self.step = Config(), 0

    @abstractmethod
    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log values by name (`Metric`) at an optimizer step."""

    @abstractmethod
    def log_image(self, step: int, image: np.ndarray) -> None:
        """Log the clips of a step, uint8 [height, width, 3], as `Metric.CLIPS`."""

    @abstractmethod
    def close(self, *, is_complete: bool = True) -> None:
        """Finish writing. is_complete: whether the run has reached its end; one that has not may be resumed."""

    def begin(self, config: Config, *, step: int) -> None:
        """The run starts or resumes after `step`, or has rolled back to it. Later entries are removed if possible."""
        self.config, self.step = config, step

    def run_id(self) -> str | None:
        """The id of this run in the service, if it has one already."""
        path = self.folder / _IDS
        value = json.loads(path.read_text(encoding="utf-8")).get(self.name) if path.exists() else None
        return value if isinstance(value, str) else None

    def keep_run_id(self, value: str) -> None:
        """Let a resumed run find `run_id`."""
        path = self.folder / _IDS
        ids = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        path.write_text(json.dumps(ids | {self.name: value}), encoding="utf-8")


class TensorBoardLogger(Logger):
    """Event files in tensorboard/, with the config and its hyperparameters."""

    name = package = "tensorboard"
    keeps_trying = True
    _writer: SummaryWriter | None = None
    _purge_step: int | None = None

    def begin(self, config: Config, *, step: int) -> None:
        """TensorBoard hides entries after `step` once the writer opens."""
        super().begin(config, step=step)
        self._purge_step = step + 1

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write scalars."""

        def add_scalars(writer: SummaryWriter) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, step)

        self._write(add_scalars)

    def log_image(self, step: int, image: np.ndarray) -> None:
        """Write an image."""
        self._write(lambda writer: writer.add_image(Metric.CLIPS, image, step, dataformats="HWC"))

    def close(self, *, is_complete: bool = True) -> None:
        """Write the end of the session for HParams."""
        writer, self._writer = self._writer, None
        if writer is not None:
            _, _, end = hparams(_hyperparameters(self.config), _FINAL)
            writer._get_file_writer().add_summary(end)
            writer.close()

    def _write(self, write: Callable[[SummaryWriter], None]) -> None:
        try:
            if self._writer is None:
                self._writer = self._open()
            write(self._writer)
            self._writer.flush()
        except OSError:
            self._writer = None
            raise

    def _open(self) -> SummaryWriter:
        writer = SummaryWriter(self.folder / "tensorboard", purge_step=self._purge_step)
        text = to_yaml(self.config)
        writer.add_text("config", "".join(f"    {line}\n" for line in split_lines(text)))
        experiment, start, _ = hparams(_hyperparameters(self.config), _FINAL)
        for summary in (experiment, start):
            writer._get_file_writer().add_summary(summary)
        self._purge_step = None  # if it is reopened after an error, the existing events belong to this run
        return writer


class WandbLogger(Logger):
    """A run of Weights & Biases in the project WANDB_PROJECT, by default dali-timesformer; its files are in wandb/.

    W&B only appends: its own step may not go back. So the optimizer step is a metric, `step`, over which all others are
    drawn; steps repeated after a kill or a rollback have two points.
    """

    name = package = "wandb"
    _run: Any = None

    def begin(self, config: Config, *, step: int) -> None:
        """Connect before the first step, which would otherwise wait."""
        super().begin(config, step=step)
        self._open()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send values."""
        self._open().log({"step": step, **values})

    def log_image(self, step: int, image: np.ndarray) -> None:
        """Send an image."""
        import wandb

        self._open().log({"step": step, Metric.CLIPS: wandb.Image(image)})

    def close(self, *, is_complete: bool = True) -> None:
        """Wait until everything is sent, but no longer than 20 seconds: `wandb sync` sends the rest. A run that is not
        complete is shown as failed."""
        run, self._run = self._run, None
        if run is not None:
            run.finish(exit_code=int(not is_complete))

    def _open(self) -> Any:
        if self._run is None:
            import wandb

            run_id = self.run_id() or uuid.uuid4().hex[:8]
            run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", _PROJECT),
                name=self.config.name,
                id=run_id,
                resume="allow",
                dir=self.folder,
                settings=wandb.Settings(console="off", silent=True, finish_timeout=_MOST_SECONDS),
            )
            self._run = run
            run.config.update(flat(dataclasses.asdict(self.config)), allow_val_change=True)
            run.define_metric("*", step_metric="step")
            self.keep_run_id(run_id)
            place = f"offline, in {self.folder}/wandb" if run.offline else run.url
            self.report(f"Weights & Biases: run {run_id}, {place}")
        return self._run


class MlflowLogger(Logger):
    """A run of MLflow in the experiment MLFLOW_EXPERIMENT_NAME, by default dali-timesformer, at MLFLOW_TRACKING_URI, by
    default the folder mlruns/ in the output.

    MLflow only appends: steps repeated after a kill or a rollback have two points, of which the later is shown. Its
    parameters cannot change; settings changed on resuming become tags, such as resumed.optim.lr.
    """

    name = package = "mlflow"
    _client: Any = None
    _run_id = ""

    def begin(self, config: Config, *, step: int) -> None:
        """Connect before the first step, which would otherwise wait."""
        super().begin(config, step=step)
        self._open()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send values."""
        client = self._open()
        from mlflow.entities import Metric as Point

        now = round(1000 * time.time())
        client.log_batch(self._run_id, metrics=[Point(name, value, now, step) for name, value in values.items()])

    def log_image(self, step: int, image: np.ndarray) -> None:
        """Send an image."""
        self._open().log_image(self._run_id, image, key=Metric.CLIPS, step=step, synchronous=True)

    def close(self, *, is_complete: bool = True) -> None:
        """Mark the run as finished, or as killed if it is not complete."""
        client, self._client = self._client, None
        if client is not None:
            client.set_terminated(self._run_id, "FINISHED" if is_complete else "KILLED")

    def _open(self) -> Any:
        if self._client is not None:
            return self._client
        # mlflow reads these when it is imported. Its own retries take minutes, in which the run would wait.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        from mlflow import MlflowClient
        from mlflow.entities import Param, RunTag

        uri = os.environ.get("MLFLOW_TRACKING_URI") or (self.folder / "mlruns").resolve().as_uri()
        client = MlflowClient(uri, registry_uri=uri if uri.startswith("file:") else None)
        settings = {key: str(value)[:500] for key, value in flat(dataclasses.asdict(self.config)).items()}
        self._run_id = self.run_id() or ""
        if self._run_id:
            client.update_run(self._run_id, status="RUNNING")
            before = client.get_run(self._run_id).data.params
            changed = [(key, value) for key, value in settings.items() if before.get(key, value) != value]
            client.log_batch(self._run_id, tags=[RunTag(f"resumed.{key}", value) for key, value in changed])
        else:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
            experiment = client.get_experiment_by_name(name)
            experiment_id = experiment.experiment_id if experiment else client.create_experiment(name)
            self._run_id = client.create_run(experiment_id, run_name=self.config.name).info.run_id
            params = [Param(key, value) for key, value in settings.items()]
            for start in range(0, len(params), 100):  # the most that one request takes
                client.log_batch(self._run_id, params=params[start : start + 100])
            self.keep_run_id(self._run_id)
        self._client = client
        self.report(f"MLflow: run {self._run_id} at {uri}")
        return client


LOGGERS = {logger.name: logger for logger in (TensorBoardLogger, WandbLogger, MlflowLogger)}
"""Values of `train.loggers`."""


def make_loggers(config: Config, report: Callable[[str], None]) -> list[Logger]:
    """The loggers of a run. Raises `InputError` if the package of one is not installed."""
    for name in config.train.loggers:
        if importlib.util.find_spec(LOGGERS[name].package) is None:
            raise InputError(
                f"train.loggers: {name} is not installed; install it (pip install '.[{name}]' in the project's "
                "folder), or leave it out"
            )
    return [LOGGERS[name](Path(config.output), report) for name in dict.fromkeys(config.train.loggers)]


def _hyperparameters(config: Config) -> dict[str, Any]:
    """The settings that may change the result, such as {"optim.lr": 0.1}, in types that HParams accepts."""
    sections = dataclasses.asdict(config) | {"data": preprocessing(config.data)}
    return {
        f"{name}.{key}": value if isinstance(value, (bool, int, float, str)) else str(value)
        for name, section in sections.items()
        if isinstance(section, dict)
        for key, value in section.items()
    } | {"seed": config.seed}
