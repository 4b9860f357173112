"""Pretrained weights that cannot be loaded."""

import pytest
from torch import nn

from common.config import load_config
from dali_pipelines import InputError
from training.startup import load_pretrained_weights


def test_missing_weights_are_named_with_the_way_without():
    config = load_config(None, ["train.pretrained=gone.pth"])
    with pytest.raises(InputError, match="train.pretrained: gone.pth: .*random weights: -o train.pretrained=null"):
        load_pretrained_weights(nn.Linear(1, 1), config, ("ash",))
