"""The network: it knows nothing of training or of where clips come from."""

from model.pretrained import LoadReport, WeightsError, load_pretrained
from model.rollout import Rollout, attention_rollout
from model.timesformer import TimeSformer

__all__ = ["LoadReport", "Rollout", "TimeSformer", "WeightsError", "attention_rollout", "load_pretrained"]
