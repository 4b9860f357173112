"""`benchmark.py soak`: loads many clips with one loader and checks that memory and open files do not grow."""

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.copies import copy_videos
from benchmarks.videos import find_videos
from benchmarks.work import repeated
from common.system_metrics import processes, proportional_mib
from dali_pipelines import ClipLoader, InputError, Manifest

_SAMPLES = 10
_GROWTH = 1.05  # largest ratio of the last samples to those in the middle


def soak(
    videos: Sequence[str], *, clips: int, workers: int, batch_size: int, crop_size: int, sizes: int | None
) -> None:
    """Prints memory (PSS in MiB), shared memory and open files of the loader's processes, and
    the GPU's memory, after every tenth of `clips`. Raises `InputError` if one of them grows.

    sizes: load copies of the videos in this number of frame sizes.
    """
    with tempfile.TemporaryDirectory() as folder:
        found = find_videos(videos)
        if sizes:
            found = copy_videos(found, Path(folder), gop=16, sizes=sizes)
        manifest = repeated(found, batch_size, Path(folder, "videos.packets"))
        _soak(manifest, clips, workers, batch_size, crop_size)


def _soak(manifest: Manifest, clips: int, workers: int, batch_size: int, crop_size: int) -> None:
    loader = ClipLoader(
        manifest,
        mode="train",
        batch_size=batch_size,
        num_frames=8,
        crop_size=crop_size,
        workers=workers,
        device="cuda" if torch.cuda.is_available() else "cpu",
    )
    samples: list[dict[str, float]] = []
    header = f"{'clips':>8} {'clips/s':>8} {'main MiB':>9} {'workers MiB':>12} {'/dev/shm MiB':>13} {'open files':>11}"
    print(f"{header} {'GPU MiB':>9}")
    while len(samples) < _SAMPLES:
        for _ in loader:
            if loader.stats.clips >= clips * (len(samples) + 1) / _SAMPLES and len(samples) < _SAMPLES:
                samples.append(_sample())
                main, others, shared, files, gpu = samples[-1].values()
                speed = loader.stats.clips_per_second
                row = f"{loader.stats.clips:>8} {speed:>8.1f} {main:>9.0f} {others:>12.0f} {shared:>13.0f} {files:>11}"
                print(f"{row} {gpu:>9.0f}")
    loader.close()
    for name in samples[0]:
        middle, last = (max(sample[name] for sample in part) for part in (samples[3:6], samples[7:]))
        if last > middle * _GROWTH + 4:
            raise InputError(f"{name} grew from {middle:.0f} in the middle of the run to {last:.0f} at its end")
    stats = loader.stats
    print(f"no growth; {len(stats.faults)} faults, fallbacks: {stats.fallbacks or 'none'}")


def _gpu_mib() -> float:
    """Memory of the GPU in use, by any process; 0 without a GPU."""
    if not torch.cuda.is_available():
        return 0.0
    free, total = torch.cuda.mem_get_info()
    return (total - free) / 2**20


def _sample() -> dict[str, float]:
    main, *others = processes()
    return {
        "memory of the main process": proportional_mib(main),
        "memory of the workers": sum(map(proportional_mib, others)),
        "/dev/shm": shutil.disk_usage("/dev/shm").used / 2**20,
        "open files": sum(len(os.listdir(f"/proc/{process}/fd")) for process in (main, *others)),
        "memory of the GPU": _gpu_mib(),
    }
