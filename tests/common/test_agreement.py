"""Two runs in one folder, and processes that are not at the same work: refused at the start."""

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common.agreement import check_agreement, shared_facts
from common.config import load_config
from common.distributed import start_process
from common.locking import FolderLock
from dali_pipelines import InputError, Manifest
from dali_pipelines.files import unfinished
from tests.commands import PROJECT, run_forked
from tests.training.test_endings import patched, started, wait_for
from tests.training.test_engine import lines, train
from training.checkpoints import is_intact, list_checkpoints, load_checkpoint, save_checkpoint
from training.saving import Saver

# -- one writer for a folder --

LOCKED = "import sys; from common.locking import FolderLock; from pathlib import Path; import os, time\n"


@pytest.mark.slow
def test_a_second_run_in_the_folder_is_refused_and_harms_nothing(config_file, tmp_path):
    output = tmp_path / "output"
    slow = "step = Trainer.train_step\n"
    slow += "Trainer.train_step = lambda self, b: (time.sleep(60 * (self.step == 2)), step(self, b))[1]"
    arguments = [patched(tmp_path, slow), "-c", config_file, "--resume", "-o", "train.checkpoint_every_steps=1"]
    with started(*arguments, "data.workers=1", stdout=subprocess.DEVNULL) as first:
        wait_for(lambda: len(list_checkpoints(output / "checkpoints")) == 2)
        second = run_forked("train.py", "-c", config_file, "--resume")
        assert second.returncode == 2, second.stdout
        assert f"{output}: another process is writing there (process {first.pid} on " in second.stderr
        assert first.poll() is None
        # Its workers, which may live a moment longer, do not hold the lock.
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
        (output / "checkpoints" / "unnamed-0123456789ab.pt.0123456789ab.part").write_text("left by a kill")
        (output / "last.safetensors.0123456789ab.part").write_text("left by a kill")
        third = run_forked("train.py", "-c", config_file, "--resume", "-o", "train.checkpoint_every_steps=1")
    assert third.returncode == 0 and "resumed from" in third.stdout, third.stderr
    assert [line["step"] for line in lines(output) if "train/lr" in line] == list(range(1, 10))
    assert all(map(is_intact, list_checkpoints(output / "checkpoints")))
    assert not list(output.rglob("*.part")) and len(list((output / "checkpoints").iterdir())) == 2


@pytest.mark.slow
def test_two_evaluations_in_one_folder(config_file, small_data, tmp_path):
    train(config_file, "train.epochs=1", "optim.warmup_epochs=0.5")
    results = tmp_path / "results"
    held = "lock = FolderLock(Path(sys.argv[1]), remedy=''); print('held', flush=True); time.sleep(60)"
    command = [sys.executable, "-c", LOCKED + held, str(results)]
    with subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        arguments = [
            "-w",
            tmp_path / "output/best.safetensors",
            "-o",
            f"data.test={small_data}/val.csv",
            "--out",
            results,
        ]
        refused = run_forked("evaluate.py", *arguments)
        assert refused.returncode == 2 and f"another process is writing there (process {holder.pid}" in refused.stderr
        assert [path.name for path in results.iterdir()] == ["lock"]
        holder.kill()
    done = run_forked("evaluate.py", *arguments)
    assert done.returncode == 0 and (results / "results.json").exists(), done.stderr


def test_a_forked_child_does_not_hold_the_lock(tmp_path):
    forks = (
        "lock = FolderLock(Path(sys.argv[1]), remedy='')\nif os.fork() == 0: time.sleep(3); os._exit(0)\nos._exit(0)"
    )
    subprocess.run([sys.executable, "-c", LOCKED + forks, str(tmp_path)], cwd=PROJECT, check=True)
    FolderLock(tmp_path, remedy="").release()


def test_a_lock_that_is_a_link_overwrites_nothing(tmp_path):
    (tmp_path / "precious").write_text("something")
    (tmp_path / "lock").symlink_to("precious")
    with pytest.raises(InputError, match="lock is a link"):
        FolderLock(tmp_path, remedy="")
    assert (tmp_path / "precious").read_text() == "something"


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "faults.csv"])
def test_a_link_in_the_output_folder_leads_to_nothing_that_is_overwritten(tmp_path, name):
    (tmp_path / "precious").write_text("years of work")
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / name).symlink_to(tmp_path / "precious")
    with pytest.raises(InputError, match=f"{name} is a link to a file that would be overwritten: remove it"):
        Saver(tmp_path / "output", lambda *_: None).lock()
    assert (tmp_path / "precious").read_text() == "years of work"


@pytest.mark.slow
def test_a_file_system_without_locks_is_reported_and_used(config_file, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    train(config_file, "train.max_steps=1")
    assert "its file system has no locks (No locks available): do not start a second run" in capsys.readouterr().out


def test_unfinished_files_have_names_of_their_own_and_do_not_pile_up(tmp_path):
    path = tmp_path / "m[1].csv"
    first, second = unfinished(path), unfinished(path)
    assert first != second and first.parent == tmp_path
    for each in (first, second):
        each.touch()
    os.utime(first, (0, 0))
    other = tmp_path / "film.part"  # of a browser
    other.touch()
    os.utime(other, (0, 0))
    Manifest([]).write(path)
    assert sorted(tmp_path.iterdir()) == sorted([path, second, other])


# -- ranks that are at other work --


class Ranks:
    """What `check_agreement` needs of a process, with the facts of all."""

    def __init__(self, *facts):
        self.facts = facts

    def gather(self, _):
        return list(self.facts)


def test_the_first_rank_that_differs_is_named_with_all_that_differs():
    check_agreement(Ranks({"a": 1}, {"a": 1}, {"a": 1}), {"a": 1})
    with pytest.raises(
        InputError, match="^a is 1 on rank 0 and 2 on rank 2, b is None on rank 0 and 3 on rank 2; start"
    ):
        check_agreement(Ranks({"a": 1}, {"a": 1}, {"a": 2, "b": 3}), {"a": 1})


def two_ranks(config_file, folder, *, first=(), second=()):
    """train.py as torchrun starts it on two machines, each with overrides of its own."""
    own = [list(map(str, each)) for each in (first, second)]
    (folder / "train.py").write_text(
        f"import os, sys\nsys.argv += {own!r}[int(os.environ['RANK'])]\n" + (PROJECT / "train.py").read_text()
    )
    settings = ["train.hang_timeout_s=30", "train.max_steps=1"]
    return run_forked(folder / "train.py", "-c", config_file, "-o", *settings, processes=2)


def reordered(small_data: Path, tmp_path: Path) -> str:
    manifest = Manifest.read(small_data / "train.csv")
    Manifest([manifest[n] for n in reversed(range(13))], root=small_data, classes=manifest.classes).write(
        tmp_path / "r.csv"
    )
    return f"data.train={tmp_path}/r.csv"


@pytest.mark.slow
def test_ranks_at_other_work_are_refused(config_file, small_data, tmp_path):
    done = two_ranks(config_file, tmp_path, second=[reordered(small_data, tmp_path), "optim.lr=0.1"])
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 2, done.stderr
    assert done.stderr.count("optim.lr is 0.05 on rank 0 and 0.1 on rank 1, data.train is 13 videos, checksum") == 2
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize(
    "change", [{"label": 2}, {"path": "x.mp4"}, {"frames": 5}, {"fps": 5.0}, {"rotation": 90}, {"gop": 3}], ids=str
)
def test_manifests_that_give_other_clips_differ(small_data, change):
    manifest = Manifest.read(small_data / "train.csv")
    videos = [manifest[n] for n in range(13)]
    assert Manifest(videos, root="elsewhere").summary() == manifest.summary()
    videos[7] = videos[7]._replace(**change)
    assert Manifest(videos).summary() != manifest.summary()


@pytest.mark.slow
def test_settings_and_versions_are_compared():
    facts = shared_facts(load_config(None))
    for override in ("seed=1", "model.depth=3", "data.flip=false", "mix.cutmix_prob=0.5", "train.epochs=3"):
        assert shared_facts(load_config(None, [override])) != facts
    assert {"version of code", "version of torch", "version of DALI"} < facts.keys()


@pytest.mark.slow
def test_ranks_that_begin_with_other_weights_are_refused(config_file, small_data, tmp_path):
    for seed in (1, 2):
        train(config_file, "train.max_steps=1", f"seed={seed}", f"output={tmp_path}/run{seed}")
    own = [[f"train.pretrained={tmp_path}/run{seed}/last.safetensors"] for seed in (1, 2)]
    done = two_ranks(config_file, tmp_path, first=own[0], second=own[1])
    assert done.returncode == 2 and done.stderr.count("the weights' checksum is") == 2, done.stderr


@pytest.mark.slow
def test_what_differs_between_machines_may_differ(config_file, small_data, tmp_path):
    (tmp_path / "elsewhere").symlink_to(small_data)
    (tmp_path / "val.csv").write_text(
        (small_data / "val.csv").read_text().replace("# root: .", f"# root: {small_data}")
    )
    own = [f"data.train={tmp_path}/elsewhere/train.csv", f"data.val={tmp_path}/val.csv", "data.workers=1"]
    done = two_ranks(config_file, tmp_path, second=own)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_other_code_than_the_checkpoints_is_a_note(config_file, tmp_path, monkeypatch, capsys):
    train(config_file, "train.max_steps=1")
    from training import resuming

    old = resuming.versions()
    monkeypatch.setattr(resuming, "versions", lambda: old | {"torch": "9.0"})
    capsys.readouterr()
    train(config_file, "train.max_steps=2", resume=True)
    assert f"note: torch was {old['torch']} in the checkpoint, and is 9.0 now" in capsys.readouterr().out


def test_a_port_in_use_and_variables_that_are_wrong_are_one_line(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "RANK": "0"}
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        message = f"the 2 processes do not find each other at 127.0.0.1:{port}: .*in use.*--master-port"
        with pytest.raises(InputError, match=message), start_process("cpu", timeout_s=5):
            pass
    monkeypatch.delenv("MASTER_PORT")
    with pytest.raises(InputError, match=r"\(MASTER_PORT is not set\)"), start_process("cpu", timeout_s=5):
        pass
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(InputError, match="one of RANK, WORLD_SIZE.* is not a number .*first"), start_process("cpu"):
        pass


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        lambda state: {"step": 1, "format": state["format"]},
        lambda state: state | {"config": 3},
        lambda state: state | {"loader": 3},
        lambda state: state | {"network": {"a": torch.zeros(2)}},
        lambda state: state | {"optimizer": []},
        lambda state: state | {"left_out": 5},
    ],
    ids=["empty", "config", "loader", "network", "optimizer", "left_out"],
)
def test_a_forged_checkpoint_is_a_one_line_error(config_file, tmp_path, change):
    train(config_file, "train.max_steps=1")
    folder = tmp_path / "output" / "checkpoints"
    state = load_checkpoint(list_checkpoints(folder)[-1])
    for path in list_checkpoints(folder):
        path.unlink()
    save_checkpoint(folder, 1, change(state))
    with pytest.raises(InputError, match="step_00000001-.*: not a checkpoint of this run"):
        train(config_file, "train.max_steps=2", resume=True)
