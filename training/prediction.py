"""Predictions for video files, by the same way from file to clip as evaluation."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dali_pipelines import ClipLoader, InputError, Manifest
from dali_pipelines.files import fetch
from dali_pipelines.manifest import probe
from training.config import Config, clip_settings
from training.distributed import Process
from training.evaluation import predict_views
from training.precision import resolve_precision
from training.weights import Weights


@dataclass(frozen=True)
class Prediction:
    """What the network says of one video; `reason` says why it says nothing."""

    video: str
    reason: str | None = None
    probabilities: Tensor | None = None
    """float32 [K], mean over the three crops."""
    views: Tensor | None = None
    """[3, 3, T, S, S]: the clips that the network saw, normalised."""

    def top(self, k: int, classes: Sequence[str]) -> list[dict[str, Any]]:
        """The k likeliest classes, best first: class, label, probability."""
        if self.probabilities is None:
            return []
        best = self.probabilities.topk(min(k, len(classes)))
        return [
            {"class": classes[label], "label": label, "probability": round(value, 6)}
            for value, label in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]


def predict(weights: Weights, config: Config, videos: Sequence[str], process: Process) -> Iterator[Prediction]:
    """A prediction for each video as it comes, first those that cannot be opened, then the others in their order."""
    good = []
    for path in videos:
        try:
            good.append(probe(fetch(path, config.data.cache))._replace(path=path))
        except InputError as error:
            yield Prediction(path, reason=str(error))
    if not good:
        return
    loader = ClipLoader(
        Manifest(good),
        **clip_settings(config.data, "test"),
        batch_size=min(4, len(good)),
        device=process.device,
        workers=0 if len(good) == 1 else min(config.data.workers or process.cores, len(good)),
    )
    network = weights.build(process.device)
    precision = resolve_precision(config.train.precision, process.device)
    faults = iter(loader.stats.faults)  # in the order of the batches, as they come
    for batch in loader:
        probabilities = predict_views(network, batch.clips, precision).cpu()
        for index, sample_id in enumerate(batch.sample_ids.tolist()):
            if sample_id < 0:
                continue
            if batch.valid[index]:
                yield Prediction(good[sample_id].path, None, probabilities[index], batch.clips[index])
            else:
                yield Prediction(good[sample_id].path, next(faults).reason)
