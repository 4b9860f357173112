"""Pretrained weights that cannot be loaded."""

import pytest

from common.config import load_config
from dali_pipelines import InputError
from training.engine import Trainer


@pytest.mark.slow
def test_missing_weights_are_named_with_the_way_without_and_nothing_is_written(config_file, tmp_path):
    config = load_config(config_file, ["train.pretrained=gone.pth"])
    with pytest.raises(InputError, match="train.pretrained: gone.pth: .*random weights: -o train.pretrained=null"):
        Trainer(config)
    assert list((tmp_path / "output").iterdir()) == []
