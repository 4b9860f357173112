"""What else is done to runs: full disks, damaged checkpoints, planted links, slow ranks, ports in use."""

import contextlib
import csv
import functools
import os
import random
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from tests.torture.runs import (
    BrokenPromiseError,
    Run,
    Settings,
    compare_runs,
    find_leftovers,
    finish,
    flip_bit,
    mount_disk,
    read_ids,
    unmount,
)
from tests.videos import textured, write_video
from training.checkpoints import list_checkpoints


class SkippedError(Exception):
    """The machine does not allow the attack; the message says why."""


class Place(NamedTuple):
    """Where an attack runs, and what it may use."""

    settings: Settings
    data: dict[str, Path]
    references: dict[str, Path]
    draw: random.Random

    def require_equal(self, reference: str = "one", *, logs: bool = True) -> str:
        theirs = self.settings._replace(folder=self.references[reference])
        if found := compare_runs(self.settings, theirs, logs=logs):
            raise BrokenPromiseError(f"not equal to the unbroken run: {'; '.join(found[:5])}")
        return "equal afterwards"


def attack(name: str, folder: Path, data: dict[str, Path], references: dict[str, Path], seed: int) -> tuple[str, bool]:
    """What came of it in words, and whether it is what is promised."""
    settings = Settings(folder, data["good"] / "config.yaml")
    before = set(os.listdir("/dev/shm"))
    try:
        outcome = ATTACKS[name](Place(settings, data, references, random.Random(seed)))
        settings.temporary.mkdir(parents=True, exist_ok=True)
        if left := [each for each in find_leftovers(settings.temporary, shared_before=before) if "pid1_" not in each]:
            raise BrokenPromiseError(f"left behind: {'; '.join(left)}")
    except SkippedError as reason:
        return f"skipped: {reason}", True
    except Exception as failure:  # a result like any other: the report names it
        return f"{type(failure).__name__}: {failure} ({folder})", False
    return outcome, True


def _run_to_step(settings: Settings, step: int, *, ranks: int = 1) -> None:
    """A run that is killed after it has begun that step."""
    with Run(settings, ranks=ranks) as run:
        if not run.wait_for_batches((step + 1) * ranks):
            raise BrokenPromiseError(f"it ended before step {step}; {run.last_words()}")
        run.process.kill()
        run.wait()


def _end_with_message(settings: Settings, *words: str, ranks: int = 1, status: int | None = 2, **options) -> str:
    """The line of a run that ends with an error, which must have one of the words in it, and no traceback."""
    with Run(settings, ranks=ranks, **options) as run:
        return _check_message(run, *words, status=status)


def _check_message(run: Run, *words: str, status: int | None = 2) -> str:
    ended = run.wait()
    if ended == 0 or ended != (status or ended):
        raise BrokenPromiseError(f"exit status {ended}, expected {status or 'an error'}; {run.last_words()}")
    if status and "Traceback" in run.said:
        raise BrokenPromiseError(f"a traceback; {run.last_words()}")
    lines = [line for line in run.said.splitlines() if any(word in line for word in words)]
    if not lines:
        raise BrokenPromiseError(f"no line with {' or '.join(words)}; {run.last_words()}")
    return lines[-1].replace(str(run.settings.folder), "...")[:160]


# -- disks --


@contextlib.contextmanager
def _small_disk(folder: Path, kib: int) -> Iterator[None]:
    if not mount_disk(folder, f"{kib}k"):
        raise SkippedError("no file system can be mounted here")
    try:
        yield
    finally:
        unmount(folder)


def full_disk(place: Place, kib: tuple[int, int]) -> str:
    """Two checkpoints of 0.7 MB and three weights files of 0.16 MB want 2.6 MB while they are written."""
    settings, size = place.settings, place.draw.randint(*kib)
    with _small_disk(settings.output, size):
        with Run(settings) as run:
            status = run.wait()
            if status not in (0, 2) or "Traceback" in run.said:
                raise BrokenPromiseError(f"{size} KiB: exit status {status}; {run.last_words()}")
            if status == 2 and "No space left on device" not in run.said:
                raise BrokenPromiseError(f"{size} KiB: no line says that the disk is full; {run.last_words()}")
        mount_disk(settings.output, "64m", again=True)
        finish(settings)
        return f"{size} KiB: exit status {status}; {place.require_equal(logs=False)}"


def full_temporary_folder(place: Place) -> str:
    with _small_disk(place.settings.temporary, 4):
        said = _end_with_message(place.settings, f"{place.settings.temporary}/clip_loader_pid")
        mount_disk(place.settings.temporary, "64m", again=True)
        finish(place.settings)
        return f'"{said}"; {place.require_equal()}'


def full_shared_memory(place: Place, phase: str) -> str:
    """From some moment of this phase on; workers are started for each validation."""
    filling = Path("/dev/shm/torture")
    if shutil.disk_usage("/dev/shm").total > 1 << 30:
        raise SkippedError("/dev/shm is everybody's here")
    try:
        with Run(place.settings) as run:
            run.wait_until(lambda: run.phase() == phase)
            time.sleep(place.draw.uniform(0, 0.3))
            with open(filling, "wb") as file:
                for size in (1 << 22, 1 << 12):
                    with contextlib.suppress(OSError):
                        while True:
                            os.posix_fallocate(file.fileno(), file.seek(0, 2), size)
            said = _check_message(run, "/dev/shm has")
    finally:
        filling.unlink(missing_ok=True)
    finish(place.settings)
    return f'"{said}"; {place.require_equal()}'


# -- checkpoints --

_DAMAGES: dict[str, Callable[[Path, random.Random], object]] = {
    "a flipped bit": flip_bit,
    "a cut file": lambda path, draw: os.truncate(path, draw.randrange(1, path.stat().st_size)),
    "an empty file": lambda path, draw: os.truncate(path, 0),
    "zeros": lambda path, draw: path.write_bytes(bytes(path.stat().st_size)),
}


def damaged_checkpoint(place: Place, kind: str) -> str:
    _run_to_step(place.settings, place.draw.randrange(6, 30))
    newest = list_checkpoints(place.settings.output / "checkpoints")[-1]
    _DAMAGES[kind](newest, place.draw)
    if f"{newest}: damaged" not in finish(place.settings):
        raise BrokenPromiseError(f"{newest.name} is damaged, and nothing says so")
    if not newest.with_name(newest.name + ".damaged").exists():
        raise BrokenPromiseError(f"{newest.name} is not put aside")
    return f"the one before is taken; {place.require_equal()}"


def damaged_checkpoints(place: Place) -> str:
    _run_to_step(place.settings, 12)
    folder = place.settings.output / "checkpoints"
    for path in list_checkpoints(folder):
        flip_bit(path, place.draw)
    said = _end_with_message(place.settings, "no checkpoint that can be read")
    if len(list(folder.glob("*.damaged"))) != 2:
        raise BrokenPromiseError("the damaged checkpoints are gone")
    return f'"{said}"'


# -- ranks and workers --


def stopped_rank(place: Place) -> str:
    with Run(place.settings, ranks=2) as run:
        for _ in range(2):
            run.wait_for_batches(9)
            _stop_for([run.rank_process(1)], 4)
        if status := run.wait():
            raise BrokenPromiseError(f"exit status {status}; {run.last_words()}")
    return place.require_equal("two")


def stopped_workers(place: Place) -> str:
    with Run(place.settings) as run:
        for count in (5, 8):
            run.wait_for_batches(count)
            _stop_for(run.workers(), 4)
        if status := run.wait():
            raise BrokenPromiseError(f"exit status {status}; {run.last_words()}")
    return place.require_equal()


def _stop_for(processes: list, seconds: float) -> None:
    for process in processes:
        process.suspend()
    time.sleep(seconds)
    for process in processes:
        process.resume()


def killed_torchrun(place: Place) -> str:
    """Its ranks lose the store that it keeps. Whether they end or finish, the next start is refused or equal."""
    settings = place.settings
    with Run(settings, ranks=2) as run:
        run.wait_for_batches(13)
        run.process.send_signal(signal.SIGKILL)
        run.wait()
        if left := [each for each in find_leftovers(settings.temporary, patience_s=60) if each.startswith("process")]:
            raise BrokenPromiseError(f"a minute later there are still {'; '.join(left)}")
    finish(settings, ranks=2)
    return place.require_equal("two")


def two_starts(place: Place) -> str:
    other = place.settings._replace(
        folder=place.settings.folder / "second", overrides=(f"output={place.settings.output}",)
    )
    with Run(place.settings) as first, Run(other) as second:
        statuses = sorted((first.wait(), second.wait()))
        said = first.said + second.said
    if statuses != [0, 2] or "another process is writing there" not in said:
        raise BrokenPromiseError(f"exit statuses {statuses}; {said[-300:]}")
    if first.process.returncode:  # the clips of the one that ran
        shutil.copy(other.folder / "ids.0", place.settings.folder / "ids.0")
    return f"the later one is refused; {place.require_equal()}"


def port_in_use(place: Place, *, torchrun: bool) -> str:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        if torchrun:
            launcher = ("--master-addr", "127.0.0.1", "--master-port", port)
            said = _end_with_message(place.settings, "EADDRINUSE", "in use", ranks=2, status=None, launcher=launcher)
        else:
            group = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            settings = place.settings._replace(environment=group)
            said = _end_with_message(settings, f"127.0.0.1:{port}")
    return f'"{said}"'


# -- files --


def damaged_files(place: Place) -> str:
    """Of the unbroken run on damaged files: each is named with a reason, in every epoch."""
    with open(place.references["damaged"] / "output" / "faults.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    named = {Path(row["path"]).stem for row in rows if row["reason"]}
    if named != {"train_3", "train_13", "val_2"}:
        raise BrokenPromiseError(f"faults.csv names {sorted(named)}")
    return f"{len(rows)} rows in faults.csv, each with its reason"


def replaced_files(place: Place) -> str:
    """Training files become shorter, longer, larger, cut, a folder, a pipe that nobody writes to, or nothing."""
    data, settings = place.settings.folder / "data", place.settings
    shutil.copytree(place.data["good"], data)
    for name in ("train.csv", "val.csv"):
        (data / name).write_text((data / name).read_text().replace(str(place.data["good"]), str(data)))
    settings = settings._replace(overrides=(f"data.train={data}/train.csv", f"data.val={data}/val.csv"))
    files = [next(data.glob(f"train_{number}.*")) for number in range(0, 21, 3)][:7]
    with Run(settings) as run:
        run.wait_for_batches(8)
        shorter, longer, larger, cut, becomes_folder, becomes_pipe, gone = files
        write_video(data / "new.mp4", textured(2, height=40, width=40))
        os.replace(data / "new.mp4", shorter)
        write_video(data / "new.mp4", textured(40, height=40, width=52))
        os.replace(data / "new.mp4", longer)
        write_video(data / "new.mp4", textured(9, height=96, width=64))
        os.replace(data / "new.mp4", larger)
        os.truncate(cut, cut.stat().st_size // 3)  # also in the hands of whoever reads it
        for path in (becomes_folder, becomes_pipe, gone):
            path.unlink()
        becomes_folder.mkdir()
        os.mkfifo(becomes_pipe)
        if (status := run.wait()) or "Traceback" in run.said:
            raise BrokenPromiseError(f"exit status {status}; {run.last_words()}")
    with open(settings.output / "faults.csv", newline="") as file:
        named = {Path(row["path"]).stem: row["reason"] for row in csv.DictReader(file)}
    if missing := {path.stem for path in (larger, cut, becomes_folder, becomes_pipe, gone)} - named.keys():
        raise BrokenPromiseError(f"faults.csv does not name {sorted(missing)}")
    theirs = {tuple(row[:4]): row[4] for row in read_ids(place.references["one"])}
    if any(theirs[tuple(row[:4])] != row[4] for row in read_ids(settings.folder)):
        raise BrokenPromiseError("the order of clips is another")
    return f"{len(named)} of 7 are faults with a reason, the run ends well, the order of clips is kept"


def planted_links(place: Place) -> str:
    """Names that the run writes, truncates or removes are links to what is not its own."""
    settings, precious = place.settings, place.settings.folder / "precious"
    _run_to_step(settings, 6)
    (precious / "folder").mkdir(parents=True)
    names = ["lock", "last.part", "unnamed", "step", "folder/inner", "temporary"]
    for name in names:
        (precious / name).write_text(f"precious {name}\n")
    settings.output.rename(settings.folder / "real output")
    settings.output.symlink_to(settings.folder / "real output")
    settings.temporary.rename(settings.folder / "real tmp")
    settings.temporary.symlink_to(settings.folder / "real tmp")
    (settings.temporary / "clip_loader_pid1_link").symlink_to(precious)
    abandoned = settings.temporary / "clip_loader_pid2_abandoned"
    abandoned.mkdir()
    (abandoned / "folder").symlink_to(precious / "folder")
    (abandoned / "rows.npy").symlink_to(precious / "temporary")
    (settings.output / "last.safetensors.part").symlink_to(precious / "last.part")
    (settings.output / "checkpoints/unnamed-0.pt").symlink_to(precious / "unnamed")
    (settings.output / "checkpoints/step_00000099-0123456789abcdef.pt").symlink_to(precious / "step")
    (settings.output / "lock").unlink()
    (settings.output / "lock").symlink_to(precious / "lock")
    _end_with_message(settings, "lock is a link")
    (settings.output / "lock").unlink()
    finish(settings)
    for name in names:
        if not (precious / name).exists() or (precious / name).read_text() != f"precious {name}\n":
            raise BrokenPromiseError(f"{name}, which a link led to, is damaged")
    if abandoned.exists() or not (settings.temporary / "clip_loader_pid1_link").is_symlink():
        raise BrokenPromiseError("an abandoned folder is kept, or a link that is not its own is removed")
    return f"all that links led to is unharmed; {place.require_equal()}"


ATTACKS: dict[str, Callable[[Place], str]] = {
    **{
        f"full disk {n}": functools.partial(full_disk, kib=kib)
        for n, kib in enumerate([(100, 700), (700, 1500), (1500, 2600)], 1)
    },
    "full temporary folder": full_temporary_folder,
    **{
        f"full /dev/shm in {each}": functools.partial(full_shared_memory, phase=each)
        for each in ("training", "validation")
    },
    **{f"newest checkpoint: {kind}": functools.partial(damaged_checkpoint, kind=kind) for kind in _DAMAGES},
    "both checkpoints damaged": damaged_checkpoints,
    "a rank stopped for 4 s, twice": stopped_rank,
    "workers stopped for 4 s, twice": stopped_workers,
    "SIGKILL of torchrun alone": killed_torchrun,
    "two starts at once": two_starts,
    "port in use, torchrun": functools.partial(port_in_use, torchrun=True),
    "port in use, without torchrun": functools.partial(port_in_use, torchrun=False),
    "10 % damaged files": damaged_files,
    "files replaced while it runs": replaced_files,
    "planted links": planted_links,
}
