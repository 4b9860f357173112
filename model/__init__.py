"""The network: it knows nothing of training or of where clips come from."""

from model.pretrained import LoadReport, WeightsError, load_pretrained
from model.timesformer import TimeSformer

__all__ = ["LoadReport", "TimeSformer", "WeightsError", "load_pretrained"]
