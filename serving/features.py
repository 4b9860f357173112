"""Writes features of videos to an .npz file: the inputs of the network's head, for retrieval and linear probes."""

import json
from pathlib import Path

import numpy as np

from common.weights import Weights, atomic_write
from dali_pipelines.errors import InputError
from serving.exported import Exported
from serving.prediction import Prediction, Unreadable


class Features:
    """Collects the features of predictions, and writes them atomically."""

    def __init__(self, path: Path):
        self._path = path
        self._rows: list[np.ndarray] = []
        self._videos: list[str] = []
        self._labels: list[int | None] = []

    def add(self, prediction: Prediction | Unreadable) -> None:
        """Adds the features of a video; ignores videos that cannot be read."""
        if isinstance(prediction, Prediction) and prediction.features is not None:
            self._rows.append(prediction.features.numpy())
            self._videos.append(prediction.video)
            self._labels.append(prediction.label)

    def save(self, weights: Weights | Exported) -> None:
        """Writes the arrays features float32 [M, D], paths [M], labels int64 [M] if all videos are from manifests,
        classes [K] and, as JSON, model and preprocessing. Raises `InputError` if there are no features."""
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
            np.savez(file, allow_pickle=False, **arrays)
