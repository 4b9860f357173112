"""The network: it knows nothing of training or of where clips come from."""

from model.timesformer import TimeSformer

__all__ = ["TimeSformer"]
