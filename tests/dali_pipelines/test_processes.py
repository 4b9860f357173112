"""What is left behind by processes that end, are killed, or drop their loaders."""

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import util
from multiprocessing.synchronize import SemLock
from pathlib import Path

import pytest

from dali_pipelines import ClipLoader, Manifest
from dali_pipelines.probe import probe
from dali_pipelines.processes import TemporaryFolder, end_with_parent, semaphores_named_after
from dali_pipelines.workers import _blocked_interrupt
from tests.videos import textured, write_video

PROJECT = Path(__file__).parents[2]
LOADER = """
import sys, time
from dali_pipelines import ClipLoader, Manifest

def main():
    settings = dict(mode="train", batch_size=4, num_frames=2, crop_size=32, stride=None, workers=2)
    loader = ClipLoader(Manifest.read("list.csv"), **settings)
    next(iter(loader))
    print("has begun", flush=True)
    time.sleep(float(sys.argv[1]))

main()
"""
POOL = """
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import util
from multiprocessing.synchronize import SemLock
from multiprocessing import get_context
from dali_pipelines.processes import end_with_parent

if __name__ == "__main__":
    with ProcessPoolExecutor(2, get_context("spawn"), initializer=end_with_parent) as pool:
        list(pool.map(time.sleep, [0.1] * 4))
        print("has begun", flush=True)
        time.sleep(100)
"""


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return probe(write_video(tmp_path_factory.mktemp("video") / "a.mp4", textured(8, height=48, width=64)))


def start(tmp_path: Path, script: str, *arguments: str, marker: str = "") -> subprocess.Popen:
    """A script in a process whose offspring can be told by its environment, with a temporary folder of its own."""
    (tmp_path / "script.py").write_text(script)
    (tmp_path / "tmp").mkdir(exist_ok=True)
    environment = os.environ | {"PYTHONPATH": str(PROJECT), "TMPDIR": str(tmp_path / "tmp"), "MARKER": marker}
    command = [sys.executable, "script.py", *arguments]
    return subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def marked(marker: str) -> dict[int, str]:
    """Command lines of living processes that have the marker in their environment."""
    found = {}
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if f"MARKER={marker}\0".encode() in (place / "environ").read_bytes():
                found[int(place.name)] = (place / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:  # it has ended
            continue
    return found


def wait_until(condition, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.3, None])
def test_a_kill_leaves_nothing(video, tmp_path, delay):
    """Seconds after its first worker's start; None: once it has a first batch."""
    Manifest([video] * 8, root="/").write(tmp_path / "list.csv")
    marker = f"{tmp_path}"
    process = start(tmp_path, LOADER, "100", marker=marker)

    def workers() -> list[int]:
        return [pid for pid, command in marked(marker).items() if "spawn_main" in command]

    assert wait_until(workers, 60)
    if delay is None:
        process.stdout.readline()
        assert len(workers()) == 2
        assert not list((tmp_path / "tmp").glob("*autograph*"))
    else:
        time.sleep(delay)
    process.kill()
    errors = process.communicate()[1]
    assert delay is not None or not errors  # no semaphore is left for the resource tracker to report
    assert wait_until(lambda: not marked(marker), 20), marked(marker)  # the tracker too
    assert [path.name.startswith("clip_loader_pid") for path in (tmp_path / "tmp").iterdir()] == [True]
    process = start(tmp_path, LOADER, "0", marker=marker)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and b"has begun" in out and not errors
    assert not list((tmp_path / "tmp").iterdir())


@pytest.mark.slow
def test_idle_processes_of_a_pool_end_with_their_process(tmp_path):
    marker = f"{tmp_path}"
    process = start(tmp_path, POOL, marker=marker)
    process.stdout.readline()
    assert len(marked(marker)) >= 3
    process.kill()
    process.communicate()
    assert wait_until(lambda: not marked(marker), 20), marked(marker)


HANGING = """
import multiprocessing, re, sys
from dali_pipelines.processes import end_with_parent
from common import child_process as child

def hang(_=None):
    print("has begun", file=sys.stderr, flush=True)
    re.match(r"(a+)+$", "a" * 60 + "b")  # in C, and never lets another thread run

def end_with_parent_and_hang():
    end_with_parent()
    hang()

if __name__ == "__main__":
    if {by_child}:
        child._COMMAND = ["-c", "import script; script.child.json.loads = script.hang; script.child._main()"]
        child.in_child(hang, [], 100)
    process = multiprocessing.get_context("spawn").Process(target=end_with_parent_and_hang)
    process.start()
    process.join()
"""


@pytest.mark.slow
@pytest.mark.parametrize("by_child", [False, True])
def test_a_worker_that_hangs_ends_with_its_process(tmp_path, by_child):
    marker = f"{tmp_path}"
    process = start(tmp_path, HANGING.replace("{by_child}", str(by_child)), marker=marker)
    if (line := process.stderr.readline()) != b"has begun\n":
        pytest.fail((line + process.communicate()[1]).decode())
    assert len(marked(marker)) >= 2
    time.sleep(1)  # it hangs by now
    process.kill()
    process.communicate()
    assert wait_until(lambda: not marked(marker), 10), marked(marker)


def test_a_child_whose_parent_is_gone_before_it_starts(tmp_path):
    """It may have a task already, and its input may be open: some other process may have a copy of it."""
    command = [sys.executable, "-m", "common.child_process", str(os.getpid() + 1)]
    with subprocess.Popen(command, cwd=PROJECT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdin.write(b'["os:getpid", []]\n')
        process.stdin.flush()
        assert process.stdout.read() == b"" and process.wait(20) == 1


def test_folders_are_kept_as_long_as_their_process_lives(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for name in ("clip_loader_other", "clip_loader_pid", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "clip_loader_pid1_abc").symlink_to(tmp_path / "other")
    (tmp_path / "clip_loader_pid2_abc").write_text("a file")
    own = TemporaryFolder()
    others = set(tmp_path.iterdir()) - {Path(own.name)}
    assert len(others) == 5
    abandoned = tmp_path / "clip_loader_pid3_abc"
    abandoned.mkdir()
    (abandoned / "rows.npy").write_text("something")
    reader, writer = os.pipe()
    child = os.fork()
    if not child:  # holds a folder, and is killed
        held = TemporaryFolder()
        os.write(writer, held.name.encode())
        time.sleep(20)
        os._exit(0)
    its = Path(os.read(reader, 1000).decode())
    assert not abandoned.exists() and its.is_dir()
    second = TemporaryFolder()
    assert its.is_dir() and Path(own.name).is_dir()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    second.close()
    assert not Path(second.name).exists() and its.is_dir()
    third = TemporaryFolder()
    assert not its.exists()
    child = os.fork()
    if not child:  # a fork that ends does not own it
        third.close()
        os._exit(0)
    os.waitpid(child, 0)
    assert Path(third.name).is_dir()
    name = third.name
    del third
    own.close()
    assert not Path(name).exists() and set(tmp_path.iterdir()) == others
    for each in (reader, writer):
        os.close(each)


def test_semaphores_of_a_killed_process_are_removed_with_its_folder(tmp_path, monkeypatch):
    """If multiprocessing's resource tracker, which would do it, was killed too."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("multiprocessing.resource_tracker.register", lambda *_: None)
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        held = TemporaryFolder()
        with semaphores_named_after(held.name):
            kept = multiprocessing.get_context("spawn").Lock()
        os.write(writer, kept._semlock.name.encode())
        time.sleep(20)
        os._exit(0)
    path = Path("/dev/shm") / f"sem.{os.read(reader, 1000).decode()[1:]}"
    TemporaryFolder()
    assert path.exists()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    TemporaryFolder()
    assert not path.exists() and not list(tmp_path.iterdir())
    assert multiprocessing.current_process()._config["semprefix"] == "/mp"
    for each in (reader, writer):
        os.close(each)


def resources() -> dict[str, int]:
    gc.collect()
    return {
        "threads": threading.active_count(),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "semaphores": sum(each._callback is SemLock._cleanup for each in util._finalizer_registry.values()),
        "processes": len(multiprocessing.active_children()),
    }


@pytest.mark.slow
def test_a_fork_that_drops_its_copy_of_a_loader_ends_and_the_loader_lives(video):
    made = ClipLoader(
        Manifest([video] * 6), mode="train", batch_size=2, num_frames=2, crop_size=16, stride=None, workers=1
    )
    next(iter(made))
    child = os.fork()
    if not child:
        del made
        gc.collect()
        os._exit(0)
    try:
        assert wait_until(lambda: os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT), 10)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert next(iter(made)).valid.all()
    made.close()


@pytest.mark.slow
@pytest.mark.parametrize("mode, decode", [("train", "host"), ("train", "nvdec"), ("validate", "host")])
def test_loaders_that_are_dropped_leave_nothing(video, mode, decode):
    def drop(workers: int, *, is_read: bool) -> None:
        settings = dict(mode=mode, batch_size=2, num_frames=2, crop_size=16, stride=None)
        made = ClipLoader(Manifest([video] * 6), workers=workers, decode=decode, **settings)
        if is_read:
            iterator = iter(made)
            next(iterator)
            assert resources()["processes"] > before["processes"]
            assert resources()["semaphores"] == before["semaphores"]  # nothing that a kill could leave
            made.cycle = made, iterator  # only the garbage collector finds it

    before = {"processes": 0}
    multiprocessing.resource_tracker.ensure_running()
    drop(1, is_read=False)  # what is loaded once
    before = resources()
    for _ in range(5):
        drop(1, is_read=False)
    assert resources() == before
    for _ in range(2):
        drop(1, is_read=True)
        assert wait_until(lambda: resources() == before, 10), (resources(), before)


@pytest.mark.slow
def test_ends_with_the_parent_only(tmp_path):
    """It does nothing in a process that was not started as a worker."""
    group = os.getpgid(0)
    end_with_parent()
    assert os.getpgid(0) == group
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=end_with_parent) as pool:
        assert pool.submit(os.getpgid, 0).result() != group


def test_ctrl_c_waits_until_the_workers_have_their_input():
    """Also if the signal comes to a thread that was there before: Python handles it in the main thread all the same."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    go, reached = threading.Event(), threading.Event()
    other = threading.Thread(target=lambda: (go.wait(), signal.raise_signal(signal.SIGINT)))
    other.start()

    def start_workers() -> None:
        with _blocked_interrupt():
            go.set()
            other.join()
            time.sleep(0.1)
            reached.set()

    with pytest.raises(KeyboardInterrupt):
        start_workers()
    assert reached.is_set() and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, before)
