"""Features of videos in one file: what the network's head sees, for retrieval and linear probes."""

import json
from pathlib import Path

import numpy as np

from common.weights import Weights, atomic_write
from dali_pipelines.errors import InputError
from serving.prediction import Prediction


class Features:
    """Collects the features of predictions, and writes them whole or not at all."""

    def __init__(self, path: Path):
        self._path = path
        self._rows: list[np.ndarray] = []
        self._videos: list[str] = []
        self._labels: list[int | None] = []

    def add(self, prediction: Prediction) -> None:
        """Videos that cannot be read are left out."""
        if prediction.features is not None:
            self._rows.append(prediction.features.numpy())
            self._videos.append(prediction.video)
            self._labels.append(prediction.label)

    def save(self, weights: Weights) -> None:
        """Arrays: features float32 [M, D], paths [M], labels int64 [M] where all videos are from manifests, classes [K]
        and, as JSON texts, model and preprocessing. `InputError` where there is nothing to write."""
        if not self._rows:
            raise InputError(f"{self._path}: not written: none of the videos can be read")
        arrays = {
            "features": np.stack(self._rows),
            "paths": np.array(self._videos),
            "classes": np.array(weights.classes),
            "model": np.array(json.dumps(weights.model)),
            "preprocessing": np.array(json.dumps(weights.preprocessing)),
        }
        if None not in self._labels:
            arrays["labels"] = np.array(self._labels, np.int64)
        with atomic_write(self._path) as file:
            np.savez(file, **arrays)
