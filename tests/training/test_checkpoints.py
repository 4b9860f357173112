"""Checkpoints are whole and what was written, or not there."""

import errno
import math
import os
import random
import threading
from pathlib import Path

import pytest
import torch

from dali_pipelines import InputError
from training import checkpoints
from training.checkpoints import (
    list_checkpoints,
    load_checkpoint,
    load_newest_checkpoint,
    make_room,
    save_checkpoint,
)
from training.resuming import check_values, find_checkpoint
from training.saving import Saver


def state_of(step, size=3):
    return {"step": step, "value": torch.full((size,), float(step)), "more": [{"a": (1, 2.5, "x")}, None]}


def test_the_newest_two_checkpoints_are_kept(tmp_path):
    for step in (3, 20, 100):
        save_checkpoint(tmp_path, step, state_of(step))
    assert [path.name[:14] for path in list_checkpoints(tmp_path)] == ["step_00000020-", "step_00000100-"]
    path, state = load_newest_checkpoint(tmp_path)
    assert path == list_checkpoints(tmp_path)[-1] and state["step"] == 100
    assert torch.equal(state["value"], torch.full((3,), 100.0)) and state["more"] == state_of(1)["more"]
    assert load_newest_checkpoint(tmp_path / "nothing") is None


def test_the_later_of_two_checkpoints_of_a_step_counts(tmp_path):
    """The same step before and after its validation."""
    first = save_checkpoint(tmp_path, 7, {"step": 7, "is_validated": False})
    os.utime(first, ns=(0, os.stat(first).st_mtime_ns - 1))
    save_checkpoint(tmp_path, 7, {"step": 7, "is_validated": True})
    assert load_newest_checkpoint(tmp_path)[1]["is_validated"] is True


def test_any_flipped_bit_is_noticed_and_the_one_before_taken(tmp_path, capsys):
    """300 places at random; and what was cut off, anywhere."""
    older = save_checkpoint(tmp_path, 1, state_of(1))
    newer = save_checkpoint(tmp_path, 2, state_of(2))
    whole, draw = newer.read_bytes(), random.Random(0)
    for number in range(320):
        data = bytearray(whole)
        if number < 300:
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        else:
            del data[draw.randrange(len(data)) :]
        newer.write_bytes(data)
        path, state = load_newest_checkpoint(tmp_path)
        assert path == older and state["step"] == 1
        assert f"{newer}: damaged, its checksum is not the one in its name" in capsys.readouterr().out
        newer.with_name(newer.name + ".damaged").unlink()
    newer.write_bytes(whole)
    assert load_newest_checkpoint(tmp_path)[0] == newer


def test_damaged_checkpoints_are_renamed_and_push_out_no_good_one(tmp_path):
    """A run that resumes from before them keeps its own two."""
    save_checkpoint(tmp_path, 10, state_of(10))
    for step in (91, 92):
        save_checkpoint(tmp_path / "other", step, state_of(step)).rename(
            tmp_path / f"step_{step:08d}-0123456789abcdef.pt"
        )
    assert load_newest_checkpoint(tmp_path)[1]["step"] == 10
    for step in (11, 12):
        save_checkpoint(tmp_path, step, state_of(step))
    assert [load_checkpoint(path)["step"] for path in list_checkpoints(tmp_path)] == [11, 12]
    assert len(list(tmp_path.glob("*.damaged"))) == 2


def test_unrelated_files_are_left_alone(tmp_path):
    path = save_checkpoint(tmp_path, 5, state_of(5))
    for name in ("step_00000009.pt", "step_9-0123456789abcdef.pt", "unnamed.pt", "unnamed.pt.part", "notes.txt"):
        (tmp_path / name).write_bytes(b"?")
    (tmp_path / "step_00000011-0123456789abcdef.pt").mkdir()
    (tmp_path / "step_00000012-0123456789abcdef.pt").symlink_to("nowhere")
    assert load_newest_checkpoint(tmp_path)[0] == path


def test_nothing_is_unpickled(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "made by a pickle"), "w"))

    path = save_checkpoint(tmp_path, 1, {"step": Evil()})
    assert checkpoints.is_intact(path)
    with pytest.raises(InputError, match="not a checkpoint of this program"):
        load_checkpoint(path)
    with pytest.raises(InputError, match="not a checkpoint of this program"):
        load_checkpoint(save_checkpoint(tmp_path, 2, ["a", "list"]))
    assert load_newest_checkpoint(tmp_path) is None
    assert not (tmp_path / "made by a pickle").exists()


def test_a_write_that_fails_leaves_what_was_there(tmp_path, small_files):
    small_files(20_000)
    paths = [save_checkpoint(tmp_path, 1, state_of(1))]
    with pytest.raises(InputError, match="cannot be written: .*File too large"):
        save_checkpoint(tmp_path, 3, state_of(3, size=10_000))
    assert sorted(tmp_path.iterdir()) == paths
    assert load_newest_checkpoint(tmp_path)[1]["step"] == 1


def test_the_older_of_two_makes_room_for_a_new_one(tmp_path):
    """Where the disk is full, and the newer is intact; and not for another reason."""
    full, other = InputError("no space left"), InputError("no permission")
    full.__cause__, other.__cause__ = OSError(errno.ENOSPC, ""), OSError(errno.EACCES, "")
    for step in (1, 2):
        save_checkpoint(tmp_path, step, state_of(step))
    assert not make_room(tmp_path, other) and len(list_checkpoints(tmp_path)) == 2
    whole = list_checkpoints(tmp_path)[-1].read_bytes()
    list_checkpoints(tmp_path)[-1].write_bytes(b"damaged")
    assert not make_room(tmp_path, full) and len(list_checkpoints(tmp_path)) == 2
    list_checkpoints(tmp_path)[-1].write_bytes(whole)
    assert make_room(tmp_path, full)
    assert [load_checkpoint(path)["step"] for path in list_checkpoints(tmp_path)] == [2]
    assert not make_room(tmp_path, full)  # the last one stays
    assert [load_checkpoint(path)["step"] for path in list_checkpoints(tmp_path)] == [2]


def test_pending_weights_are_written_before_newer_checkpoints(tmp_path, monkeypatch):
    """A disk that is full for a while: they are kept, and no newer checkpoint is written."""
    written, room = [], [0]

    def save_weights(path, weights):
        if not room[0]:
            raise InputError(f"{path}: no space left") from OSError(errno.ENOSPC, "")
        written.append((path.name, weights))

    monkeypatch.setattr("training.saving.save_weights", save_weights)
    monkeypatch.setattr("training.checkpoints.make_room", lambda folder, error: room[0] > 1)
    saver = Saver(tmp_path, lambda state, *, averaged: f"weights of {state['step']}")
    states = [state_of(step) | {"is_validated": True, "network": {}} for step in range(4)]
    saver.enqueue({"last": False, "best": False}, states[1])
    for state in states[1:3]:
        with pytest.raises(InputError, match="no space left"):
            saver.write(state)
        assert saver.has_pending and not list_checkpoints(saver.folder)
    room[0] = 1
    saver.write(states[3])
    assert written == [("last.safetensors", "weights of 1"), ("best.safetensors", "weights of 1")]
    assert not saver.has_pending and saver.saved == (3, True)
    saver.enqueue({"last": False}, states[2])
    saver.close()  # tries a last time
    assert written[-1] == ("last.safetensors", "weights of 2") and not saver.has_pending


@pytest.mark.parametrize(
    "name, message",
    [
        ("file", "output .*file is a file; expected a folder"),
        ("file/x", "cannot be created or written \\(Not a direct"),
    ],
)
def test_an_output_that_is_no_folder(tmp_path, name, message):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=f"{message}.*-o output=DIR"):
        Saver(tmp_path / name, lambda state, *, averaged: None).lock()


def test_a_restart_by_torchrun_is_recognised(tmp_path, monkeypatch):
    def starts(name):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", name)
        return find_checkpoint(tmp_path, resume=False)

    saver = Saver(tmp_path, lambda state, name: None)
    for name in ("job-1", "none"):
        assert starts(name) is None
        saver.begin()
        assert starts(name) is None  # killed before it came to anything
        (tmp_path / "last.safetensors").touch()
        assert starts(name) is None  # ... or to its first checkpoint
        path = save_checkpoint(saver.folder, 7, state_of(7))
        assert starts(name)[0] == path
        with pytest.raises(InputError, match="holds the checkpoints of an earlier run: continue that with --resume"):
            starts("job-2")
        with pytest.raises(InputError, match="holds the checkpoints of an earlier run"):
            starts("job-2")  # started again itself
        monkeypatch.delenv("TORCHELASTIC_RUN_ID")
        assert find_checkpoint(tmp_path, resume=True)[0] == path
        for made in (path, tmp_path / "last.safetensors"):
            made.unlink()


def test_the_writer_works_in_the_background_and_reports_failures_once():
    writer, go = checkpoints.Writer(), threading.Event()
    writer.submit(go.wait)
    go.set()  # we are here while it is being written
    assert writer.wait() is True and writer.wait() is False

    def fail():
        raise InputError("disk full")

    writer.submit(fail)
    with pytest.raises(InputError, match="disk full"):
        writer.wait()
    assert writer.wait() is False
    writer.submit(fail)
    writer.close()


def test_a_copy_on_the_host_does_not_change_with_the_original():
    weights = torch.ones(3)
    copied = checkpoints.host_copy({"a": [weights, (weights, 2)], "b": {"c": weights}, "d": "text"})
    weights += 1
    assert copied["a"][0].tolist() == copied["a"][1][0].tolist() == copied["b"]["c"].tolist() == [1, 1, 1]
    assert copied["a"][1][1] == 2 and copied["d"] == "text" and isinstance(copied["a"][1], tuple)


@pytest.mark.parametrize(
    "key, value",
    [
        *(("step", value) for value in (-1, 9, 10**400, math.nan, "8", True)),
        ("log_bytes", math.nan),
        ("fault_bytes", -1),
        ("failed", 10**30),
        ("best_top1", "0.5"),
        ("best_top1", math.nan),
        ("best", {"accuracy": [0.5, 0.5, 0.1, 0.5, 0.5], "epoch": -1, "source": "network", "num_stale": 0}),
        ("best", {"accuracy": [0.5, 0.5, 0.1, 0.5], "epoch": 1, "source": "network", "num_stale": 0}),
        ("best", {"accuracy": [0.5, 0.5, math.nan, 0.5, 0.5], "epoch": 1, "source": "network", "num_stale": 0}),
        ("best", {"accuracy": None}),
        ("best", {"epochs": 3}),
        ("is_validated", "no"),
        ("left_out", ["8"]),
        ("mode", "x"),
        ("loader", {"epoch": 10**18}),
        ("loader", {"entries": -4}),
    ],
)
def test_numbers_that_no_run_has_are_refused(key, value):
    """A checkpoint with the right checksum in its name, which this program did not write."""
    position = {"epoch": 1, "entries": 12, "rows": 20, "step_entries": 4, "views_per_decode": 1}
    state = {"step": 8, "failed": 0, "fault_bytes": 0, "log_bytes": 4306, "is_validated": False, "best_top1": 0.5}
    state |= {"left_out": [], "mode": "eager", "loader": position}
    check_values(Path("step_8.pt"), state)
    with pytest.raises(InputError, match=rf"step_8.pt: not a checkpoint of this run \(({key}|step|loader\.\w+) is"):
        check_values(Path("step_8.pt"), state | {key: position | value if key == "loader" else value})
