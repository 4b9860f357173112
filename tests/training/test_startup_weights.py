"""Pretrained weights that are missing, and what the first lines say of the weights and the classes."""

import pytest

from common.config import load_config
from dali_pipelines import InputError
from training.engine import Trainer


@pytest.mark.slow
def test_missing_weights_are_named_with_the_way_without_and_nothing_is_written(config_file, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "best.safetensors").touch()
    for name, message in (
        ("gone.pth", "train.pretrained: gone.pth: .*random weights: -o train.pretrained=null"),
        (tmp_path / "run", "train.pretrained: .*the folder of a run; .* such as .*run/best.safetensors"),
    ):
        with pytest.raises(InputError, match=message):
            Trainer(load_config(config_file, [f"train.pretrained={name}"]))
    assert list((tmp_path / "output").iterdir()) == []
    (tmp_path / "labels.txt").write_text("ash\nbirch\ncedar\ndogwood\n")
    Trainer(load_config(config_file, [f"data.labels={tmp_path}/labels.txt"])).close()
    said = capsys.readouterr().out
    assert "random weights: train.pretrained is not set" in said
    assert "train.csv: no video of dogwood: the network cannot learn them" in said
