"""`benchmark.py soak`: many clips through one loader, and what it holds on to meanwhile."""

import os
import shutil
from collections.abc import Sequence

import torch

from benchmarks.loader import find_videos
from dali_pipelines import ClipLoader, InputError, Manifest
from training.gauges import processes, proportional_mib

_LOOKS = 10
_GROWTH = 1.05  # of the last looks over those in the middle


def soak(videos: Sequence[str], *, clips: int, workers: int, batch_size: int, crop_size: int) -> None:
    """Prints memory (MiB, each shared page in parts), shared memory and open files of the loader's processes after
    every tenth of `clips`. Raises `InputError` where one of them grows."""
    found = find_videos(videos)
    loader = ClipLoader(
        Manifest(found * -(-batch_size // len(found))),
        mode="train",
        batch_size=batch_size,
        num_frames=8,
        crop_size=crop_size,
        workers=workers,
        device="cuda" if torch.cuda.is_available() else "cpu",
    )
    looks: list[dict[str, float]] = []
    print(f"{'clips':>8} {'clips/s':>8} {'main MiB':>9} {'workers MiB':>12} {'/dev/shm MiB':>13} {'open files':>11}")
    while len(looks) < _LOOKS:
        for _ in loader:
            if loader.stats.clips >= clips * (len(looks) + 1) / _LOOKS and len(looks) < _LOOKS:
                looks.append(_look())
                main, others, shared, files = looks[-1].values()
                speed = loader.stats.clips_per_second
                print(f"{loader.stats.clips:>8} {speed:>8.1f} {main:>9.0f} {others:>12.0f} {shared:>13.0f} {files:>11}")
    loader.close()
    for name in looks[0]:
        middle, last = (max(look[name] for look in part) for part in (looks[3:6], looks[7:]))
        if last > middle * _GROWTH + 4:
            raise InputError(f"{name} grew from {middle:.0f} in the middle of the run to {last:.0f} at its end")
    stats = loader.stats
    print(f"flat; {len(stats.faults)} faults, fall-backs {stats.fallbacks or 'none'}")


def _look() -> dict[str, float]:
    main, *others = processes()
    return {
        "memory of the main process": proportional_mib(main),
        "memory of the workers": sum(map(proportional_mib, others)),
        "/dev/shm": shutil.disk_usage("/dev/shm").used / 2**20,
        "open files": sum(len(os.listdir(f"/proc/{process}/fd")) for process in (main, *others)),
    }
