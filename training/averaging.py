"""Averages of the weights: stochastic weight averaging (SWA), and an exponential moving average (EMA)."""

from typing import Any

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from common.config import TrainConfig
from model import TimeSformer

_PREFIX = "module."  # of the weights in the state of `AveragedModel`, which also has a count


class WeightAverage:
    """The mean of the weights after each epoch from `first_epoch` (from 0) on (SWA, Izmailov et al. 2018), or with
    `decay`, their exponential moving average after each step."""

    def __init__(self, network: TimeSformer, *, first_epoch: int = 0, decay: float | None = None):
        self.first_epoch, self.decay = first_epoch, decay
        self.name = "swa" if decay is None else "ema"
        """Name of the weights file, and prefix of the metrics."""
        self._averaged = AveragedModel(network, multi_avg_fn=None if decay is None else self._blend)

    @property
    def is_per_step(self) -> bool:
        """Whether the average is updated after each step (EMA), rather than each epoch (SWA)."""
        return self.decay is not None

    @property
    def count(self) -> int:
        """Number of epochs (SWA) or steps (EMA) in the average."""
        return int(self._averaged.n_averaged)

    @property
    def network(self) -> nn.Module:
        """A `TimeSformer` with the averaged weights."""
        return self._averaged.module

    def summary(self) -> str:
        """What is averaged, such as "average of 3 epochs"."""
        return f"average of {self.count} {'steps' if self.is_per_step else 'epochs'}"

    def update(self, network: TimeSformer) -> None:
        """Adds the network's weights to the average."""
        self._averaged.update_parameters(network)

    def state_dict(self) -> dict[str, Any]:
        """The averaged weights and their count."""
        return self._averaged.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from the `state_dict` of another run."""
        self._averaged.load_state_dict(state)

    def _blend(self, averaged: Any, current: Any, _: Tensor | int) -> None:
        """The update of EMA, with a shorter memory in the first steps (as in timm, ModelEmaV3, and TensorFlow's
        ExponentialMovingAverage): a decay of 0.999 alone would keep the initial weights for thousands of steps."""
        assert self.decay is not None  # otherwise torch's mean is used
        steps = self.count
        get_ema_multi_avg_fn(min(self.decay, (1 + steps) / (10 + steps)))(averaged, current, steps)


def make_average(network: TimeSformer, train: TrainConfig) -> WeightAverage | None:
    """The average that the settings ask for, if any."""
    if train.ema_decay is not None:
        return WeightAverage(network, decay=train.ema_decay)
    if train.swa_epochs:
        return WeightAverage(network, first_epoch=train.epochs - train.swa_epochs)
    return None


def averaged_weights(state: dict[str, Any]) -> dict[str, Any]:
    """The network's weights in a `WeightAverage.state_dict`."""
    return {key.removeprefix(_PREFIX): value for key, value in state.items() if key.startswith(_PREFIX)}
