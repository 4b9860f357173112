"""However a run ends: killed, asked to end, by Ctrl-C, on a full disk, with a process that dies or hangs."""

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.config import Config
from common.preemption import REQUEUE
from common.weights import load_weights
from dali_pipelines import InputError, Manifest
from dali_pipelines.manifest import Video
from tests.commands import PROJECT, free_port, run_forked, run_here
from tests.training.test_engine import assert_equal_weights, lines, losses, train
from training import checkpoints
from training.checkpoints import list_checkpoints, load_newest_checkpoint
from training.engine import Trainer, to_predict
from training.monitor import Monitor
from training.run_state import RunState

pytestmark = pytest.mark.slow

# Everything that draws at random or remembers: mixing, drop path, moments, averages; and workers.
SETTINGS = ["optim.name=adamw", "optim.lr=0.002", "optim.warmup_start_lr=0.001", "mix.cutmix_prob=0.5"]
SETTINGS += ["mix.mixup_alpha=0.2", "train.swa_epochs=3", "train.epochs=8", "train.checkpoint_every_steps=1"]
SETTINGS += ["data.workers=1"]

SLOW = """
import sys, time
sys.path.insert(0, {project!r})
from training.engine import Trainer
from training.monitor import Monitor
{patch}
import train
from common.command_line import run_command
run_command(train.main)
"""


def patched(folder: Path, patch: str) -> Path:
    """A train.py whose Trainer has been changed."""
    path = folder / "train.py"
    path.write_text(SLOW.format(project=str(PROJECT), patch=patch))
    return path


@contextlib.contextmanager
def started(script, *arguments, processes=1, environment=None, **settings):
    """The process; what is left of its group is killed."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    process = subprocess.Popen(
        [*launcher, *map(str, [script, *arguments])],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | (environment or {}),
        text=True,
        start_new_session=True,
        **settings,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for(condition, timeout=90):
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "it does not come"
        time.sleep(0.02)


def has_steps(output, count):
    path = output / "metrics.jsonl"
    return lambda: path.exists() and path.read_text().count("train/lr") >= count


def assert_same_run(one, two):
    """Bit by bit: the log of every step once, and all weights."""
    assert losses(one) == losses(two)
    assert [line["step"] for line in lines(one)] == [line["step"] for line in lines(two)]
    assert_equal_weights(one, two)
    for name in ("best", "swa"):
        first, second = (load_weights(folder / f"{name}.safetensors").state for folder in (one, two))
        assert all((first[key] == second[key]).all() for key in first), name


@pytest.fixture(scope="module")
def unbroken(small_data, tmp_path_factory):
    from tests.commands import CONFIG

    folder = tmp_path_factory.mktemp("unbroken")
    (folder / "c.yaml").write_text(CONFIG.format(folder=small_data))
    done = run_here("train.py", "-c", folder / "c.yaml", "-o", *SETTINGS, f"output={folder}/output")
    assert done.returncode == 0, done.stderr
    return folder / "output"


def test_killed_at_random_moments_the_run_is_the_unbroken_one(config_file, tmp_path, unbroken):
    """Start-up, steps, saving, validation: with kill -9, of the whole group."""
    draw = random.Random(1)
    output = tmp_path / "output"
    arguments = ["-c", config_file, "--resume", "-o", *SETTINGS]
    for kills in range(3):
        with open(tmp_path / "said", "w") as said, started(PROJECT / "train.py", *arguments, stdout=said) as process:
            before = len(losses(output)) if (output / "metrics.jsonl").exists() else 0
            wait_for(lambda n=before: process.poll() is not None or has_steps(output, n + 1)())
            time.sleep(draw.uniform(0, 0.6))
            os.killpg(process.pid, signal.SIGKILL)
            if process.wait() == 0:
                break
            assert process.returncode == -signal.SIGKILL
            assert load_newest_checkpoint(output / "checkpoints") or kills == 0
    assert run_here("train.py", *arguments).returncode == 0
    assert_same_run(output, unbroken)
    assert len(list((output / "checkpoints").iterdir())) == 2  # and nothing unfinished


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=["SIGTERM", "SIGUSR1"])
def test_asked_to_end_it_saves_and_says_so(config_file, tmp_path, unbroken, number):
    output = tmp_path / "output"
    arguments = ["-c", config_file, "--resume", "-o", *SETTINGS]
    with started(PROJECT / "train.py", *arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        wait_for(has_steps(output, 4))
        process.send_signal(number)
        process.send_signal(number)
        _, said = process.communicate(timeout=20)
    assert process.returncode == REQUEUE == 75
    match = re.fullmatch(rf"train.py: {number.name}: saved step (\d+); resume with --resume\n", said)
    assert load_newest_checkpoint(output / "checkpoints")[1]["step"] == int(match[1]) >= 4
    if number == signal.SIGTERM:  # the same code handles both
        assert run_here("train.py", *arguments).returncode == 0
        assert_same_run(output, unbroken)


def test_asked_to_end_before_training(config_file):
    with started(PROJECT / "train.py", "-c", config_file, stderr=subprocess.PIPE) as process:
        wait_for(lambda: "preemption" in _threads(process.pid))
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=20)
    assert process.returncode == REQUEUE and said == "train.py: SIGTERM: ended before training started\n"


def _threads(pid):
    """Names of more than the first thread, once there are any."""
    with contextlib.suppress(FileNotFoundError):
        return ["preemption"] * (len(list(Path(f"/proc/{pid}/task").iterdir())) > 1)
    return []


def test_in_a_step_that_takes_too_long_the_last_whole_one_is_saved(config_file, tmp_path, unbroken):
    """Step 5 sleeps for a minute between its forward pass and its end: within 20 s it is over, saved before it."""
    patch = """
plain = Trainer._commit_step
def commit_step(self, *arguments):
    if self.step == 5 and not (self.output / "slept").exists():
        (self.output / "slept").touch()
        time.sleep(60)
    plain(self, *arguments)
Trainer._commit_step = commit_step
"""
    output = tmp_path / "output"
    script = patched(tmp_path, patch)
    settings = [setting for setting in SETTINGS if not setting.startswith("train.checkpoint_every")]
    with started(script, "-c", config_file, "-o", *settings, stderr=subprocess.PIPE) as process:
        wait_for((output / "slept").exists)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=20)
    assert process.returncode == REQUEUE
    first, second, *_ = said.splitlines()
    assert first == "train.py: SIGTERM: training ends within a step, a validation or a save"
    assert second == "train.py: saved step 5; resume with --resume"
    assert run_here("train.py", "-c", config_file, "--resume", "-o", *settings).returncode == 0
    assert_same_run(output, unbroken)


def test_ctrl_c_saves_too(config_file, tmp_path, unbroken):
    output = tmp_path / "output"
    arguments = ["-c", config_file, "--resume", "-o", *SETTINGS]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    pipes["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    with started(PROJECT / "train.py", *arguments, **pipes) as process:
        wait_for(has_steps(output, 4))
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and errors == "train.py: stopped by Ctrl-C\n"
    assert load_newest_checkpoint(output / "checkpoints")[1]["step"] >= 4
    assert run_here("train.py", *arguments).returncode == 0
    assert_same_run(output, unbroken)


def test_a_run_resumes_with_one_two_and_one_processes(config_file, tmp_path):
    """The same order of clips and the same effective batch: losses as of an unbroken run, but for rounding."""
    settings = ["model.drop_path=0", "train.epochs=4", "data.workers=0"]
    train(config_file, *settings, f"output={tmp_path}/unbroken")
    for processes, last in ((1, 4), (2, 8), (1, 12)):
        arguments = ["-c", config_file, "--resume", "-o", *settings, f"train.max_steps={last}"]
        done = run_forked("train.py", *arguments, processes=processes)
        assert done.returncode == 0, done.stderr
        assert f"= {processes} ranks x {4 // processes} clips x 1 micro-steps" in done.stdout
    assert len(losses(tmp_path / "output")) == 12
    assert losses(tmp_path / "output") == pytest.approx(losses(tmp_path / "unbroken"), abs=1e-5)
    assert_equal_weights(tmp_path / "output", tmp_path / "unbroken", within=1e-5)


# -- several processes --


def test_torchrun_that_is_asked_to_end_lets_all_come_to_an_end(config_file, tmp_path):
    """It sends SIGTERM to all processes of all ranks, the loader's workers included."""
    settings = [*SETTINGS, "train.epochs=500"]
    output = tmp_path / "output"
    with open(tmp_path / "said", "w") as said:
        arguments = ["-c", config_file, "-o", *settings]
        with started(PROJECT / "train.py", *arguments, processes=2, stdout=said, stderr=said) as process:
            wait_for(has_steps(output, 4))
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=40)
    said = (tmp_path / "said").read_text()
    (step,) = re.findall(r"train.py: SIGTERM: saved step (\d+); resume with --resume", said)
    assert load_newest_checkpoint(output / "checkpoints")[1]["step"] == int(step)
    assert max(line["step"] for line in lines(output)) == int(step)
    assert "worker process died" not in said


def test_a_process_that_dies_is_the_one_whose_error_is_seen(config_file, tmp_path):
    """Torchrun restarts the run, which resumes, and ends as if it had never been interrupted."""
    patch = """
plain = Trainer.forward_backward
def forward_backward(self, *arguments, **settings):
    if self.step == 4 and self.process.rank == 1 and not (self.output / "failed").exists():
        (self.output / "failed").touch()
        raise ZeroDivisionError("of rank 1")
    return plain(self, *arguments, **settings)
Trainer.forward_backward = forward_backward
"""
    script = patched(tmp_path, patch)
    settings = ["-c", config_file, "-o", "data.workers=0"]
    unbroken = run_forked("train.py", *settings, f"output={tmp_path}/unbroken", processes=2)
    assert unbroken.returncode == 0, unbroken.stderr
    again = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    again += ["--max-restarts", "1", script, *settings, f"output={tmp_path}/again"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, again)), env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    errors = done.stderr
    others = errors.find("train.py (rank 0): error")
    assert others == -1 or others > errors.index("ZeroDivisionError: of rank 1")
    assert "gloo" not in errors.lower()
    assert "resumed from step_00000004-" in done.stdout  # though no checkpoint was due
    assert losses(tmp_path / "again") == losses(tmp_path / "unbroken")
    assert_equal_weights(tmp_path / "again", tmp_path / "unbroken")


@pytest.mark.parametrize("kind", ["sleeps", "stopped"])
def test_a_process_that_hangs_is_named(config_file, tmp_path, kind):
    """One that can still speak says where it hangs; one that cannot is named by the others. Without torchrun, which
    would end all of them after the first, but gives one that is stopped half a minute."""
    hang = {"sleeps": "time.sleep(1000)", "stopped": "os.kill(os.getpid(), signal.SIGSTOP)"}[kind]
    patch = f"""
import os, signal
plain = Trainer.forward_backward
def forward_backward(self, *arguments, **settings):
    if self.step == 4 and self.process.rank == 1:
        {hang}
    return plain(self, *arguments, **settings)
Trainer.forward_backward = forward_backward
"""
    script = patched(tmp_path, patch)
    settings = ["-c", config_file, "-o", "data.workers=0", "train.hang_timeout_s=5"]
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    with (
        started(script, *settings, environment=group | {"RANK": "0"}, **pipes) as first,
        started(script, *settings, environment=group | {"RANK": "1"}, **pipes) as second,
    ):
        _, errors = (second if kind == "sleeps" else first).communicate(timeout=60)
        if kind == "sleeps":
            assert "train.py (rank 1): error: no progress for 5 s at step 4, " in errors
            assert "in forward_backward" in errors
            _, errors = first.communicate(timeout=60)
            assert errors.startswith("train.py (rank 0): error: another process has ended; its own error, or torchrun")
        else:
            expected = r"train.py \(rank 0\): error: waited 6.25 s at step 4 for rank 1 \(last seen at step \d+, .*\) "
            assert re.match(expected, errors)
    assert load_newest_checkpoint(tmp_path / "output" / "checkpoints")[1]["step"] == 4


# -- disks --


def test_a_disk_that_is_full_for_a_while_costs_nothing(config_file, tmp_path, small_files, monkeypatch, capsys):
    plain = RunState.advance

    def advance(self, result, *, num_failed):
        plain(self, result, num_failed=num_failed)
        small_files(20_000 if 3 <= self.step < 5 else None)

    train(config_file, f"output={tmp_path}/unbroken")
    monkeypatch.setattr(RunState, "advance", advance)
    train(config_file, "train.checkpoint_every_steps=1")
    said = capsys.readouterr().out
    assert "cannot be written: File too large; training continues, and the earlier checkpoints are kept" in said
    assert losses(tmp_path / "output") == losses(tmp_path / "unbroken")
    assert_equal_weights(tmp_path / "output", tmp_path / "unbroken")


def test_a_disk_that_stays_full_stops_the_run_which_resumes_when_there_is_room(
    config_file, tmp_path, small_files, monkeypatch, capsys
):
    plain = RunState.advance

    def advance(self, result, *, num_failed):
        plain(self, result, num_failed=num_failed)
        if self.step == 3:
            small_files(20_000)

    train(config_file, f"output={tmp_path}/unbroken")
    with monkeypatch.context() as patch:
        patch.setattr(RunState, "advance", advance)
        message = "cannot be written: File too large; the checkpoints in .* are kept: make room, or the folder writable"
        with pytest.raises(InputError, match=message):
            train(config_file, "train.checkpoint_every_steps=1")
    small_files(None)
    captured = capsys.readouterr()
    assert captured.out.count("training continues, and the earlier checkpoints are kept") == 2 and captured.err == ""
    assert [load_newest_checkpoint(tmp_path / "output" / "checkpoints")[1]["step"]] == [2]
    assert len(list_checkpoints(tmp_path / "output" / "checkpoints")) == 2
    train(config_file, "train.checkpoint_every_steps=1", resume=True)
    assert losses(tmp_path / "output") == losses(tmp_path / "unbroken")
    assert_equal_weights(tmp_path / "output", tmp_path / "unbroken")


@pytest.mark.parametrize("when", ["last epoch", "for a while"])
def test_weights_files_that_could_not_be_written_stay_pending(config_file, tmp_path, small_files, monkeypatch, when):
    """No checkpoint is past them: they come with the next that is written, or the validation is made again."""
    plain = Trainer.finish_epoch
    full_at = 9 if when == "last epoch" else 3

    def finish_epoch(self):
        if self.step == full_at:
            self.saver.wait()
            small_files(20_000)
        plain(self)
        if self.step == full_at and when == "for a while":
            with contextlib.suppress(InputError):
                self.saver._writer._job.result()
            small_files(None)

    train(config_file, f"output={tmp_path}/unbroken")
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "finish_epoch", finish_epoch)
        if when == "last epoch":
            with pytest.raises(InputError, match="last.safetensors: cannot be written: File too large"):
                train(config_file, "train.checkpoint_every_steps=1")
        else:
            train(config_file, "train.checkpoint_every_steps=1")
    small_files(None)
    train(config_file, "train.checkpoint_every_steps=1", resume=True)
    for name in ("best", "last"):
        ours, theirs = (load_weights(tmp_path / run / f"{name}.safetensors").state for run in ("output", "unbroken"))
        assert all((ours[key] == theirs[key]).all() for key in theirs), name


def test_ended_while_the_weights_of_an_epoch_are_copied_nothing_is_forgotten(config_file, tmp_path, monkeypatch):
    """Ctrl-C between validation and the files that it brings, at the end of the run."""
    plain, calls = RunState.state_dict, []

    def state_dict(self):
        if self.step == 9 and not self.is_validated and not calls:
            calls.append(1)
            raise KeyboardInterrupt
        return plain(self)

    train(config_file, f"output={tmp_path}/unbroken")
    with monkeypatch.context() as patch:
        patch.setattr(RunState, "state_dict", state_dict)
        with pytest.raises(KeyboardInterrupt):
            train(config_file)
    train(config_file, resume=True)
    assert_equal_weights(tmp_path / "output", tmp_path / "unbroken")
    ours, theirs = ([line["step"] for line in lines(tmp_path / name)] for name in ("output", "unbroken"))
    assert ours == theirs


@pytest.mark.parametrize("when", ["after step 1", "after the line of step 2"])
def test_ended_between_two_lines_of_the_log_nothing_of_them_is_lost(config_file, tmp_path, monkeypatch, when):
    """Ctrl-C; each line is a mean over two steps."""
    settings = ["train.log_every_steps=2", "train.epochs=1"]
    plain = Monitor.log

    def log(self, step, values):
        plain(self, step, values)
        raise KeyboardInterrupt

    def advance(self, interval, *, epoch):
        raise KeyboardInterrupt

    def shown(name):
        return [
            {key: line[key] for key in line if key.startswith(("step", "train"))} for line in lines(tmp_path / name)
        ]

    train(config_file, *settings, f"output={tmp_path}/unbroken")
    with monkeypatch.context() as patch:
        patch.setattr(Monitor, *(("advance", advance) if when == "after step 1" else ("log", log)))
        with pytest.raises(KeyboardInterrupt):
            train(config_file, *settings)
    train(config_file, *settings, resume=True)
    assert shown("output") == shown("unbroken") and [line["step"] for line in shown("output")] == [2, 3, 3]


def test_two_that_save_at_once_do_not_write_into_one_file(config_file, tmp_path, monkeypatch):
    """Ctrl-C while training waits for a slow disk: the write in progress and the last one do not overlap."""
    slow, plain, interrupted = checkpoints.save_checkpoint, Trainer._collect_writes, []

    def slow_write(*arguments):
        time.sleep(0.3)
        return slow(*arguments)

    def collect_writes(self, **settings):
        if self.step == 5 and not interrupted:
            interrupted.append(1)
            raise KeyboardInterrupt
        plain(self, **settings)

    monkeypatch.setattr(checkpoints, "save_checkpoint", slow_write)
    monkeypatch.setattr(Trainer, "_collect_writes", collect_writes)
    with pytest.raises(KeyboardInterrupt):
        train(config_file, "train.checkpoint_every_steps=1")
    kept = list_checkpoints(tmp_path / "output" / "checkpoints")
    assert [checkpoints.load_checkpoint(path)["step"] for path in kept] == [4, 5]


def test_logs_that_cannot_be_written_cost_no_training(config_file, tmp_path, monkeypatch, capsys):
    """metrics.jsonl and TensorBoard's file on a full disk, from step 3 on: a line for each, none is a half one."""

    def no_room(*_):
        raise OSError(28, "No space left on device")

    from tensorboard.summary.writer.record_writer import RecordWriter

    plain = Trainer._commit_step

    def commit_step(self, *arguments):
        plain(self, *arguments)
        if self.step == 3:
            monkeypatch.setattr(RecordWriter, "write", no_room)
            self.monitor._lines = Path("/dev/full")

    monkeypatch.setattr(Trainer, "_commit_step", commit_step)
    assert train(config_file).step == 9
    captured = capsys.readouterr()
    assert captured.out.count("cannot be written (No space left on device); training continues without it") == 2
    assert "Traceback" not in captured.err
    text = (tmp_path / "output" / "metrics.jsonl").read_text()
    assert [json.loads(line)["step"] for line in text.splitlines()] == [1, 2]


def test_the_command_to_predict_names_something_that_predict_takes():
    config = Config()
    config.data.val = "val.csv"
    video = Video("a.mp4", 0, 10, 30.0, 64, 64, "h264", 0)
    assert to_predict(Manifest([video], root="videos"), config).endswith("videos/a.mp4")
    packed = video._replace(shard="val.parquet", offset=100, size=10)
    assert to_predict(Manifest([packed], root="videos"), config) == "val.csv"
