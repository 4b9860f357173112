"""Train, evaluate and predict from Python, for notebooks and programs.

    import dali_timesformer as dt

    result = dt.train("configs/small.yaml", {"data.train": "train.csv", "data.val": "val.csv"})
    print(result.best.accuracy, result.weights["best"])

    results = dt.evaluate(result.weights["best"])
    print(results.top1, results.mean_class_accuracy)

    predictions = dt.predict(result.weights["best"], ["holiday.mp4"])
    for prediction in predictions:
        print(prediction.video, predictions.top(prediction, 3))

The functions do what train.py, evaluate.py and predict.py do. They raise `InputError` for bad input, and never exit.
They work in a notebook, at Python's prompt and in a program, which needs no `if __name__ == "__main__":`.

`config` is the path of a YAML file, a `Config`, or a dict. `overrides` and such a dict have entries like
{"optim.lr": 0.01} or {"optim": {"lr": 0.01}}. For a loop over epochs, see `Trainer.epochs`.
"""

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: its idle threads then yield to the workers

import torch

from common import config as _config
from common.config import Config
from common.distributed import DistributedContext, start_process
from common.weights import Weights
from dali_pipelines import InputError
from evaluation.evaluate import build_results, check_members, manifest_for, with_videos_of_run
from evaluation.evaluate import evaluate as _evaluate
from evaluation.results import Protocol, Results
from serving.exported import Exported, check_protocol
from serving.prediction import Prediction, TopClass, Unreadable, open_model, top_classes
from serving.prediction import predict as _predict
from training.engine import EpochResult, Trainer, TrainingResult

__all__ = [
    "Config",
    "EpochResult",
    "InputError",
    "Prediction",
    "Predictions",
    "Protocol",
    "Results",
    "Trainer",
    "TrainingResult",
    "Unreadable",
    "evaluate",
    "load_config",
    "predict",
    "train",
]

Settings = Mapping[str, Any]
"""Values by key, such as {"optim.lr": 0.01} or {"optim": {"lr": 0.01}}."""


def load_config(config: str | os.PathLike | Config | Settings, overrides: Settings | None = None) -> Config:
    """The settings of a YAML file, a `Config` or a dict, with `overrides`.

    Raises `InputError` that names the key and, for an unknown key, the closest known one.
    """
    changes = _as_arguments(overrides)
    if isinstance(config, Config):
        return _config.load_config(None, changes, defaults=dataclasses.asdict(config))
    if isinstance(config, Mapping):
        return _config.load_config(None, [*_as_arguments(config), *changes])
    return _config.load_config(os.fspath(config), changes)


def train(
    config: str | os.PathLike | Config | Settings,
    overrides: Settings | None = None,
    *,
    resume: bool = False,
    verbose: bool = True,
) -> TrainingResult:
    """Train a network, as train.py does; returns its accuracy and the paths of its weights files.

    resume: continue from the newest checkpoint in `output`, if there is one. verbose: print the lines of the log.
    Interrupted by Ctrl-C or "Interrupt Kernel", it saves its last step, and `resume=True` continues.
    """
    settings = load_config(config, overrides)
    with _start_process(settings.device, timeout_s=2 * settings.train.hang_timeout_s) as process:
        return Trainer(settings, process, resume=resume, verbose=verbose).train()


def evaluate(
    weights: str | os.PathLike | Sequence[str | os.PathLike],
    manifest: str | os.PathLike | None = None,
    *,
    config: str | os.PathLike | None = None,
    overrides: Settings | None = None,
    protocol: Protocol | None = None,
) -> Results:
    """Evaluate weights or an export, or several as an ensemble, on the videos of a manifest, as evaluate.py does.

    manifest: default: `data.test`, else `data.val`, of the config. config: a YAML file; default: the settings in the
    weights file, with the manifest of the run's config.yaml beside it. protocol: windows, crops and averaging; default:
    three crops of one window.

    The results are only returned; `evaluation.result_files.write_results` writes them into a folder.
    """
    started = time.monotonic()
    names = [os.fspath(each) for each in ([weights] if isinstance(weights, str | os.PathLike) else weights)]
    if not names:
        raise InputError("no weights given; expected a weights file, or several")
    changes = _as_arguments(overrides)
    if manifest is not None:
        changes += _as_arguments({"data.test": os.fspath(manifest)})
    opened = [open_model(name, None if config is None else os.fspath(config), changes) for name in names]
    members, protocol = [each for each, _, _ in opened], protocol or Protocol()
    settings = with_videos_of_run(opened[0][1], names[0])
    check_members(members, names)
    for name, model in zip(names, members, strict=True):
        if isinstance(model, Exported):
            check_protocol(model, name, protocol)
    videos = manifest_for(settings, members[0])
    with _start_process(settings.device) as process:
        predictions = _evaluate(settings, members, videos, process, protocol=protocol)
        return build_results(predictions, settings, members, names, videos, process, protocol=protocol, started=started)


class Predictions(contextlib.AbstractContextManager, Iterator[Prediction | Unreadable]):
    """The predictions of videos in their order, computed while you iterate.

    A `Prediction` holds the clips too, a few MB: keep only what you need of each. If you stop before the last video,
    `close` ends the workers, as does the end of a `with` block.
    """

    def __init__(self, weights: Weights | Exported, predictions: Generator[Prediction | Unreadable, None, None]):
        self.classes = tuple(weights.classes)
        """Class names in the order of `Prediction.probabilities`."""
        self._predictions = predictions

    def __next__(self) -> Prediction | Unreadable:
        return next(self._predictions)

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the iteration and its workers."""
        self._predictions.close()

    def top(self, prediction: Prediction, k: int = 5) -> list[TopClass]:
        """The k most likely classes, best first, each with its name ("class"), "label" and "probability"."""
        return top_classes(prediction.probabilities, k, self.classes)


def predict(
    weights: str | os.PathLike,
    videos: str | os.PathLike | Sequence[str | os.PathLike],
    *,
    config: str | os.PathLike | None = None,
    overrides: Settings | None = None,
    num_windows: int = 1,
    features: bool = False,
    explain: bool = False,
) -> Predictions:
    """Predict videos, as predict.py does; weights: a weights file or an export.

    videos: files, folders, globs or manifests. num_windows: temporal windows over each video. features, explain:
    compute `Prediction.features` and `Prediction.attention`. A video that cannot be read yields an `Unreadable` with
    the reason; wrong arguments raise `InputError`.
    """
    if num_windows < 1:
        raise InputError(f"num_windows is {num_windows}; expected 1 or more")
    paths = [os.fspath(each) for each in ([videos] if isinstance(videos, str | os.PathLike) else videos)]
    model, settings, _ = open_model(
        os.fspath(weights), None if config is None else os.fspath(config), _as_arguments(overrides)
    )

    def predictions() -> Generator[Prediction | Unreadable, None, None]:
        with _start_process(settings.device) as process:
            yield from _predict(
                model, settings, paths, process, num_windows=num_windows, features=features, explain=explain
            )

    return Predictions(model, predictions())


@contextlib.contextmanager
def _start_process(device: str, **settings: float) -> Iterator[DistributedContext]:
    """`start_process`, with as many torch threads as the commands use, for as long as it lasts."""
    threads = torch.get_num_threads()
    with start_process(device, **settings) as process:
        torch.set_num_threads(process.cores)
        try:
            yield process
        finally:
            torch.set_num_threads(threads)


def _as_arguments(settings: Settings | None) -> list[str]:
    """The settings as `-o KEY=VALUE` takes them; JSON is YAML. Paths, for example, become texts."""
    return [f"{key}={json.dumps(value, default=str)}" for key, value in (settings or {}).items()]
