"""The network. Imports nothing from training or the data pipeline."""

from model.pretrained import LoadReport, load_pretrained
from model.pretrained_files import WeightsError
from model.rollout import Rollout, attention_rollout
from model.timesformer import TimeSformer

__all__ = ["LoadReport", "Rollout", "TimeSformer", "WeightsError", "attention_rollout", "load_pretrained"]
