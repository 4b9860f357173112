"""Weights files tell everything; checkpoints are whole or not there."""

import pickle

import pytest
import torch

from dali_pipelines import InputError
from model import TimeSformer
from training import checkpoints
from training.checkpoints import Weights, load_weights, save_weights

MODEL = dict(patch_size=16, embed_dim=24, depth=1, num_heads=3)
PREPROCESSING = dict(num_frames=2, crop_size=32, mean=[0.0] * 3, std=[1.0] * 3)
CLASSES = ("ash", "Birke, ü", "3")


@pytest.fixture
def weights():
    model = TimeSformer(**MODEL, num_frames=2, image_size=32, num_classes=3)
    return Weights(MODEL, PREPROCESSING, CLASSES, model.state_dict())


def test_there_and_back(weights, tmp_path):
    save_weights(tmp_path / "w.safetensors", weights)
    read = load_weights(tmp_path / "w.safetensors")
    assert (read.model, read.preprocessing, read.classes) == (MODEL, PREPROCESSING, CLASSES)
    assert read.state.keys() == weights.state.keys()
    assert all((read.state[name] == weights.state[name]).all() for name in read.state)
    assert list(tmp_path.iterdir()) == [tmp_path / "w.safetensors"]
    clips = torch.rand(1, 3, 2, 32, 32)
    assert (read.build()(clips) == weights.build()(clips)).all() and not read.build().training


def test_other_files_are_refused(weights, tmp_path):
    from safetensors.torch import save_file

    save_weights(tmp_path / "whole", weights)
    (tmp_path / "cut").write_bytes((tmp_path / "whole").read_bytes()[:-100])
    (tmp_path / "pickle").write_bytes(pickle.dumps({"a": 1}))
    (tmp_path / "empty").touch()
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign")
    for name, message in [
        ("cut", "damaged"),
        ("pickle", "not a safetensors file"),
        ("empty", "not a safetensors file"),
        ("foreign", "not the weights that train.py writes"),
        ("gone", "no such weights file"),
    ]:
        with pytest.raises(InputError, match=message):
            load_weights(tmp_path / name)


def test_the_newest_two_checkpoints_are_kept_and_a_damaged_one_is_passed_over(tmp_path, capsys):
    for step in (3, 20, 100):
        checkpoints.save_checkpoint(tmp_path, step, {"step": step, "value": torch.full((3,), float(step))})
    assert [path.name for path in checkpoints.list_checkpoints(tmp_path)] == ["step_00000020.pt", "step_00000100.pt"]
    assert checkpoints.load_newest_checkpoint(tmp_path)[1]["step"] == 100
    newest = tmp_path / "step_00000100.pt"
    newest.write_bytes(newest.read_bytes()[:-200])
    path, state = checkpoints.load_newest_checkpoint(tmp_path)
    assert path.name == "step_00000020.pt" and state["step"] == 20 and "step_00000100.pt" in capsys.readouterr().out
    assert checkpoints.load_newest_checkpoint(tmp_path / "nothing") is None


def test_nothing_is_unpickled(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "made by a pickle"), "w"))

    torch.save({"step": Evil()}, tmp_path / "step_00000001.pt")
    assert checkpoints.load_newest_checkpoint(tmp_path) is None
    assert not (tmp_path / "made by a pickle").exists()
