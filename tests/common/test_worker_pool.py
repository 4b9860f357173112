"""Work on many files that hang, crash or are killed in the midst of it."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from distributed import Client

from common import child_process as child
from common.worker_pool import Failed, WorkerPool, remove_journals, run
from dali_pipelines import InputError
from tests.commands import free_port
from tests.commands import run as command
from tests.common import tasks
from tests.videos import numbered, write_video

pytestmark = pytest.mark.slow


@pytest.fixture
def noted(tmp_path) -> Iterator[Path]:
    """The file where the functions of `tasks` note what they do."""
    yield tmp_path / "notes"
    child.end_children()


def notes(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.parametrize("workers", [1, 3])
def test_results_in_the_order_of_the_tasks_and_equal_ones_once(noted, tmp_path, workers):
    names = [f"{n % 7}" for n in range(20)]
    done = run(
        tasks.note, [(str(noted), name) for name in names], journal=tmp_path / "j", pool=WorkerPool(workers=workers)
    )
    assert [name for name, _ in done] == names
    assert sorted(notes(noted)) == sorted(set(names))
    processes = {process for _, process in done}
    assert os.getpid() not in processes and 1 <= len(processes) <= workers


def test_a_task_that_hangs_crashes_or_fails_affects_no_other(noted, tmp_path):
    for function, reason in {
        "hang": r"given up after 1 s \(--timeout\)",
        "crash": "the process that reads it ended with signal 11, twice",
        "refuse": "not that one",
        "bug": "KeyError",
    }.items():
        # The limit includes the start of the process, which a busy machine delays.
        pool = WorkerPool(workers=1, timeout_s=1 if function == "hang" else 60)
        (failed,) = run(getattr(tasks, function), [(str(noted),)], journal=tmp_path / function, pool=pool)
        assert isinstance(failed, Failed)
        with pytest.raises(InputError, match=reason):
            raise InputError(failed)
        (good,) = run(tasks.note, [(str(noted), "good")], journal=tmp_path / f"{function}2", pool=WorkerPool(workers=1))
        assert good[0] == "good"
    assert run(tasks.chatter, [("ä\udcff",)], journal=tmp_path / "c", pool=WorkerPool(workers=1)) == ["ä\udcff"]
    assert notes(noted).count("crash") == 2


def test_finished_tasks_are_not_repeated(noted, tmp_path):
    todo = [(str(noted), str(n)) for n in range(5)]
    run(tasks.note, todo[:3], journal=tmp_path / "j", pool=WorkerPool(workers=1))
    with open(tmp_path / "j", "a") as file:
        file.write('{"key": "cut by a ki')
    done = run(tasks.note, todo, journal=tmp_path / "j", pool=WorkerPool(workers=1))
    again = run(tasks.note, todo, journal=tmp_path / "j", pool=WorkerPool(workers=1))
    assert done == again and sorted(notes(noted)) == ["0", "1", "2", "3", "4"]
    remove_journals(tmp_path / "j")
    assert not list(tmp_path.glob("j*"))


def test_failures_are_remembered_too(noted, tmp_path):
    for _ in range(2):
        (failed,) = run(tasks.crash, [(str(noted),)], journal=tmp_path / "j", pool=WorkerPool(workers=1))
        assert isinstance(failed, Failed) and "signal 11" in failed
    assert len(notes(noted)) == 2  # twice in the first run


def test_parts_are_merged(noted, tmp_path):
    todo = [(str(noted), str(n)) for n in range(10)]
    for part in (2, 0):
        run(tasks.note, todo, journal=tmp_path / "j", pool=WorkerPool(workers=1, shard=(part, 3)))
    assert sorted(notes(noted)) == sorted(str(n) for n in range(10) if n % 3 != 1)
    part = run(tasks.note, todo, journal=tmp_path / "j", pool=WorkerPool(workers=1, shard=(1, 3)))
    assert len(notes(noted)) == 10 and all(not isinstance(each, Failed) for each in part)
    assert [text for text, _ in run(tasks.note, todo, journal=tmp_path / "j", pool=WorkerPool(workers=1))] == [
        text for _, text in todo
    ]
    assert len(notes(noted)) == 10
    remove_journals(tmp_path / "j")
    assert not list(tmp_path.glob("j*"))


def test_killed_anywhere_it_does_nothing_twice(noted, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(Path(child.__file__).parents[1])!r})\n"
        "from pathlib import Path\nfrom common.worker_pool import WorkerPool, run\nfrom tests.common import tasks\n"
        f"run(tasks.slow, [({str(noted)!r}, str(n)) for n in range(60)], journal=Path({str(tmp_path / 'j')!r}), "
        "pool=WorkerPool(workers=2))\n"
    )
    runs, lines = 0, 0
    while True:
        runs += 1
        process = subprocess.Popen([sys.executable, str(script)])
        while process.poll() is None:
            time.sleep(0.02)
            if len(notes(tmp_path / "j")) > lines + 12:
                process.send_signal(signal.SIGKILL)
                process.wait()
        lines = len(notes(tmp_path / "j"))
        if process.returncode == 0:
            break
    recorded = [json.loads(line) for line in (tmp_path / "j").read_text().splitlines() if line.endswith("}")]
    assert len(recorded) == 60 == len({entry["key"] for entry in recorded})
    assert runs > 2 and 60 <= len(notes(noted)) <= 60 + 2 * runs  # those under way when it was killed


def test_children_end_with_their_process(noted, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(Path(child.__file__).parents[1])!r})\n"
        "from common import child_process as child\nfrom tests.common import tasks\n"
        f"print(child.in_child(tasks.note, [{str(noted)!r}, 'x'], 10)[1], flush=True)\n"
        f"child.in_child(tasks.hang, [{str(noted)!r}], 100)\n"
    )
    process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    number = int(process.stdout.readline())
    process.kill()
    process.wait()
    process.stdout.close()
    for _ in range(50):
        if not Path(f"/proc/{number}").exists() or "State:\tZ" in Path(f"/proc/{number}/status").read_text():
            break
        time.sleep(0.1)
    else:
        pytest.fail("the child goes on")


@pytest.fixture
def scheduler(tmp_path) -> Iterator[str]:
    """Address of a real dask scheduler with two workers, somewhere else than here."""
    project = str(Path(child.__file__).parents[1])
    dask = [sys.executable, "-m", "dask"]
    address = f"tcp://127.0.0.1:{free_port()}"
    settings = {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": project}, "stderr": subprocess.DEVNULL}
    where = ["--host", "127.0.0.1", "--no-dashboard"]
    processes = [subprocess.Popen([*dask, "scheduler", *where, "--port", address.rpartition(":")[2]], **settings)]
    worker = [*dask, "worker", address, "--nthreads", "1", "--no-dashboard", "--local-directory", str(tmp_path)]
    processes += [subprocess.Popen([*worker, extra], **settings) for extra in ("--nanny", "--no-nanny")]
    with Client(address, timeout=30) as client:
        client.wait_for_workers(2, timeout=30)
    yield address
    for process in reversed(processes):
        process.terminate()
    for process in processes:
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:  # now and then a worker of dask does not take a SIGTERM
            process.kill()
            process.wait()


def test_dask_does_the_same(scheduler, tmp_path):
    frames = numbered(6, height=32, width=48)
    for name in "abcdef":
        (tmp_path / "videos" / name).mkdir(parents=True)
        write_video(tmp_path / "videos" / name / f"{name}.mp4", frames)
    (tmp_path / "videos" / "a" / "bad.mp4").write_text("no video")
    dask = ["--executor", "dask", "--scheduler", scheduler]
    for out, more in (("here.csv", []), ("there.csv", dask)):
        done = command("prepare.py", "folder", "videos", "--out", out, *more, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "6 of 7 videos, 6 classes" in done.stdout and "a/bad.mp4: not a video" in done.stdout
    here, there = ((tmp_path / name).read_text().splitlines() for name in ("here.csv", "there.csv"))
    assert [line for line in here if "made by" not in line] == [line for line in there if "made by" not in line]


def test_a_missing_scheduler_is_reported(tmp_path):
    (tmp_path / "videos" / "a").mkdir(parents=True)
    (tmp_path / "videos" / "a" / "a.mp4").touch()
    for settings, message in (
        (["--executor", "dask"], "--executor dask needs --scheduler"),
        (["--scheduler", "tcp://x:1"], "--scheduler needs --executor dask"),
        (["--executor", "dask", "--scheduler", f"tcp://127.0.0.1:{free_port()}"], "no dask scheduler answers there"),
    ):
        done = command("prepare.py", "folder", "videos", *settings, cwd=tmp_path)
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
