"""Checkpoints are whole or not there."""

import pytest
import torch

from training import checkpoints


def test_the_newest_two_checkpoints_are_kept_and_a_damaged_one_is_passed_over(tmp_path, capsys):
    for step in (3, 20, 100):
        checkpoints.save_checkpoint(tmp_path, step, {"step": step, "value": torch.full((3,), float(step))})
    assert [path.name[:13] for path in checkpoints.list_checkpoints(tmp_path)] == ["step_00000020", "step_00000100"]
    assert checkpoints.load_newest_checkpoint(tmp_path)[1]["step"] == 100
    newest = checkpoints.list_checkpoints(tmp_path)[-1]
    newest.write_bytes(newest.read_bytes()[:-200])
    path, state = checkpoints.load_newest_checkpoint(tmp_path)
    assert (
        path.name.startswith("step_00000020")
        and state["step"] == 20
        and f"{newest}: damaged" in capsys.readouterr().out
    )
    assert checkpoints.load_newest_checkpoint(tmp_path / "nothing") is None


def test_nothing_is_unpickled(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "made by a pickle"), "w"))

    path = checkpoints.save_checkpoint(tmp_path, 1, {"step": Evil()})
    assert checkpoints.is_intact(path)
    with pytest.raises(checkpoints.DamagedError, match="not a checkpoint of ours"):
        checkpoints.load_checkpoint(path)
    assert checkpoints.load_newest_checkpoint(tmp_path) is None
    assert not (tmp_path / "made by a pickle").exists()
