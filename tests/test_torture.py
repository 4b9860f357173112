"""The harness of `make torture` fails when something is wrong."""

import json
import os
import random
import signal
import subprocess
import uuid
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from tests.torture import __main__ as torture
from tests.torture.kills import PHASES, WHO, Chain, Kill, _expect, _strike
from tests.torture.runs import (
    BrokenPromiseError,
    Settings,
    compare_ids,
    compare_runs,
    compare_values,
    find_leftovers,
)
from training.checkpoints import save_checkpoint

ROWS = [[step, 0, rank, 2, [4 * step + rank, 7], [True, False]] for step in range(3) for rank in range(2)]
VALUES = {"network": {"weight": torch.linspace(-1, 1, 50)}, "loader": [{"epoch": 1}], "loss": 0.5}


def make_finished(folder: Path) -> Settings:
    """What a run leaves, as far as it is compared."""
    run = Settings(folder, folder / "config.yaml")
    save_checkpoint(run.output / "checkpoints", 3, {"step": 3, **VALUES})
    for name in ("last", "best", "swa"):
        save_file(VALUES["network"], run.output / f"{name}.safetensors", {"classes": "two"})
    (run.output / "metrics.jsonl").write_text('{"step": 1, "train/loss": 0.5, "speed/step_ms": 1}\n')
    (folder / "ids.0").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return run


def test_any_difference_between_two_runs_is_found(tmp_path):
    ours, theirs = make_finished(tmp_path / "ours"), make_finished(tmp_path / "theirs")
    assert compare_runs(ours, theirs) == []
    data = bytearray((ours.output / "swa.safetensors").read_bytes())
    data[-1] ^= 1
    (ours.output / "swa.safetensors").write_bytes(data)
    assert compare_runs(ours, theirs) == ["swa[0].weight differs"]
    (ours.output / "swa.safetensors").unlink()
    (ours.output / "metrics.jsonl").write_text("")
    (ours.output / "faults.csv").write_text("epoch\n")
    state = {"step": 3, **VALUES, "loader": [{"epoch": 2}]}
    save_checkpoint(ours.output / "checkpoints", 4, state)
    assert compare_runs(ours, theirs) == [
        "swa.safetensors is missing in one of them",
        "checkpoint.loader[0].epoch differs",
        "metrics.jsonl differs",
        "faults.csv differs",
    ]


@pytest.mark.parametrize(
    "one, two, is_equal",
    [
        (0.0, -0.0, False),  # equal numbers of different bits
        (float("nan"), float("nan"), True),
        (1.0, 1.0 + 2**-23, False),
    ],
)
def test_tensors_are_compared_bit_by_bit(one, two, is_equal):
    one, two = torch.tensor([3.0, one]), torch.tensor([3.0, two])
    assert (compare_values({"a": [one]}, {"a": [two]}, "x") == []) is is_equal
    assert compare_values(one, one.double(), "x") == ["x differs"]


def test_clips_that_were_never_seen_or_others_are_found():
    again = [*ROWS, ROWS[2]]  # done twice, after a kill
    assert compare_ids(again, ROWS) == compare_ids(again, ROWS, by_rank=False) == []
    assert compare_ids(ROWS[:-1], ROWS) == ["step (2, 0, 1, 2) was never done"]
    assert compare_ids(ROWS[:-1], ROWS, by_rank=False) == ["step 2 was never done"]
    other = [*ROWS[2][:4], [7, 4], [True, False]]
    assert compare_ids([*ROWS, other], ROWS) == ["clips of step 1"]  # in another order
    other = [*ROWS[2][:4], [8, 4], [True, False]]
    assert compare_ids([*ROWS, other], ROWS, by_rank=False) == ["clips of step 1"]
    one_rank = [[step, 0, 0, 1, [4 * step, 7, 4 * step + 1, 7], [True] * 4] for step in range(3)]
    assert compare_ids(one_rank, ROWS, by_rank=False) == []


def test_what_is_left_behind_is_found(tmp_path):
    name = f"sem.torture-{uuid.uuid4().hex}"
    before = set(os.listdir("/dev/shm"))
    (tmp_path / "clip_loader_pid1_a").mkdir()
    with subprocess.Popen(["sleep", "60"]) as process:
        Path("/dev/shm", name).touch()
        try:
            found = find_leftovers(tmp_path, shared_before=before, patience_s=0)
        finally:
            Path("/dev/shm", name).unlink()
            process.kill()
    assert {f"process {process.pid}: sleep 60", "temporary folder: clip_loader_pid1_a", f"/dev/shm/{name}"} <= {*found}
    (tmp_path / "clip_loader_pid1_a").rmdir()
    found = find_leftovers(tmp_path, shared_before=set(os.listdir("/dev/shm")), patience_s=0)
    assert not [each for each in found if str(process.pid) in each or "temporary" in each]


def test_kills_that_come_too_late_do_not_count():
    run = SimpleNamespace(is_over=True, has_begun=True, wait=lambda: 0, last_words=lambda: "")
    assert _strike(run, "main process", 0, random.Random(0)) is None
    assert _expect(run, {75}, "training") is None
    run.wait = lambda: 75
    assert _expect(run, {75}, "training") == "training"
    for status in (1, -signal.SIGTERM):  # the second: nothing was saved
        run.wait = lambda status=status: status
        with pytest.raises(BrokenPromiseError):
            _expect(run, {75, -signal.SIGTERM}, "training")


def test_the_report_counts_what_is_equal_and_complains_of_the_rest(capsys):
    kills = [Kill("one", "worker", phase, 1) for phase in PHASES if phase != "SWA"] * 30
    good = Chain("one", kills, [], [], 0, "", "folder")
    bad = good._replace(kills=kills[:5], differences=["last.weight differs"])
    problems = torture._report(
        [good, bad], {"a": ("fine", True), "b": ("hangs", False)}, SimpleNamespace(seed=1, jobs=2), 3
    )
    assert f"{len(kills)} of {len(kills) + 5} kills, in 2 runs, end equal" in capsys.readouterr().out
    assert len(problems) == 2 + len(WHO) and "not equal: last.weight differs" in problems[0]
    assert {"b: hangs", "never killed: SWA", "never killed: main process"} <= {*problems}
