"""Describes the machine, and measures its CPU time, I/O and peak speed."""

import importlib.metadata
import os
import platform
import re
import time
from pathlib import Path
from typing import Any

import av
import torch

from common.system_metrics import processes

_PACKAGES = ("torch", "nvidia-dali-cuda120", "av", "decord2", "torchcodec", "spdl", "numpy")


def machine() -> dict[str, Any]:
    """Returns CPU, GPU and versions."""
    versions = {"python": platform.python_version(), "ffmpeg (av)": av.ffmpeg_version_info}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    cpu = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.M)
    return {
        "cpu": cpu[1] if cpu else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": versions,
    }


def gpu_machine() -> dict[str, Any]:
    """Like `machine`, with the GPU's driver and the CUDA version of torch."""
    found = machine() | {"cuda": torch.version.cuda, "driver": None}
    if torch.cuda.is_available():
        import pynvml

        pynvml.nvmlInit()
        found["driver"] = pynvml.nvmlSystemGetDriverVersion()
    return found


def cpu_seconds() -> float:
    """CPU time of this process and its descendants in seconds."""
    ticks = 0
    for process in processes():
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])  # user, system
    return ticks / os.sysconf("SC_CLK_TCK")


def bytes_read() -> int:
    """Bytes that this process and its descendants have read by system calls, including small amounts through pipes."""
    return sum(int(Path(f"/proc/{process}/io").read_text().split()[1]) for process in processes())


def wait_for_gpu(device: str) -> None:
    """Waits for the work of a CUDA device; returns at once on a CPU."""
    if device == "cuda":
        torch.cuda.synchronize()


def matmul_flops(size: int, dtype: torch.dtype, device: str) -> float:
    """Operations/s of the fastest of several products of square matrices with `size` rows."""
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    best = float("inf")
    for _ in range(8):
        start = time.perf_counter()
        a @ b
        wait_for_gpu(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def gpu_matmul_tflops(device: str) -> float:
    """TFLOP/s of a large matrix product in bf16; of a small one on a CPU, for tests."""
    return matmul_flops(8192 if device == "cuda" else 512, torch.bfloat16, device) / 1e12
