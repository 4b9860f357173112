"""Stochastic weight averaging (SWA, Izmailov et al. 2018): the mean of the weights of the last epochs."""

from typing import Any

from torch import nn
from torch.optim.swa_utils import AveragedModel

from model import TimeSformer

_PREFIX = "module."  # of the weights in the state of `AveragedModel`, which also has a count


class WeightAverage:
    """The mean of the weights after each epoch from `first_epoch` (from 0) on."""

    def __init__(self, network: TimeSformer, *, first_epoch: int):
        self.first_epoch = first_epoch
        self._averaged = AveragedModel(network)

    @property
    def count(self) -> int:
        """Number of epochs in the mean."""
        return int(self._averaged.n_averaged)

    @property
    def network(self) -> nn.Module:
        """A `TimeSformer` with the averaged weights."""
        return self._averaged.module

    def update(self, network: TimeSformer) -> None:
        """Adds the network's weights to the average."""
        self._averaged.update_parameters(network)

    def state_dict(self) -> dict[str, Any]:
        """The averaged weights and their count."""
        return self._averaged.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from the `state_dict` of another run."""
        self._averaged.load_state_dict(state)


def averaged_weights(state: dict[str, Any]) -> dict[str, Any]:
    """The network's weights in a `WeightAverage.state_dict`."""
    return {key.removeprefix(_PREFIX): value for key, value in state.items() if key.startswith(_PREFIX)}
