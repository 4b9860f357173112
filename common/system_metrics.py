"""Memory of a run's processes, and memory and utilisation of its GPU."""

import contextlib
import functools
import os
import re
from pathlib import Path
from typing import Any

import torch

from common.metrics import Metric


def processes() -> list[int]:
    """Process ids of this process and all of its descendants."""
    found = [os.getpid()]
    for process in found:
        with contextlib.suppress(OSError):  # it may end meanwhile
            for thread in Path(f"/proc/{process}/task").iterdir():
                found += map(int, (thread / "children").read_text().split())
    return found


def proportional_mib(process: int) -> float:
    """Memory of a process in MiB; shared pages count in proportion (PSS). Raises `OSError` once it has ended."""
    usage = Path(f"/proc/{process}/smaps_rollup").read_text()
    kilobytes = re.search(r"^Pss: +(\d+) kB", usage, re.M)
    if kilobytes is None:
        raise ProcessLookupError(f"process {process} has ended")
    return int(kilobytes[1]) / 1024


def host_memory_gib() -> float:
    """Memory of this process and its workers in GiB (PSS)."""
    total = 0.0
    for process in processes():
        with contextlib.suppress(OSError):  # it may have ended meanwhile
            total += proportional_mib(process)
    return total / 1024


def gpu_metrics(device: torch.device) -> dict[str, float]:
    """The `Metric.GPU_...` values of `device`, by name; empty without a GPU. Resets torch's peak memory."""
    if device.type != "cuda":
        return {}
    free, total = torch.cuda.mem_get_info(device)
    values = {
        Metric.GPU_TORCH_MEMORY_GIB: torch.cuda.max_memory_allocated(device) / 2**30,
        Metric.GPU_MEMORY_GIB: (total - free) / 2**30,
    }
    torch.cuda.reset_peak_memory_stats(device)
    return values | nvml_metrics(str(torch.cuda.get_device_properties(device).uuid))


def nvml_metrics(uuid: str) -> dict[str, float]:
    """Utilisation of NVDEC and of the rest of the GPU, 0 to 1; empty if NVML does not know the GPU, as in some
    containers and MIG slices."""
    nvml = _nvml()
    if nvml is None:
        return {}
    try:
        handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        decoder, _ = nvml.nvmlDeviceGetDecoderUtilization(handle)  # and the sampling period in microseconds
        return {
            Metric.GPU_DECODER_SHARE: decoder / 100,
            Metric.GPU_COMPUTE_SHARE: nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100,
        }
    except nvml.NVMLError:
        return {}


@functools.cache
def _nvml() -> Any:
    """NVIDIA's pynvml (nvidia-ml-py), initialised, or None."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml
