"""Readings of the machine that a run shows: memory, and how busy the GPU's decoders are."""

import contextlib
import functools
import os
import re
from pathlib import Path
from typing import Any

import torch


def processes() -> list[int]:
    """This process and all that it has started, directly or not."""
    found = [os.getpid()]
    for process in found:
        with contextlib.suppress(OSError):  # it may end meanwhile
            for thread in Path(f"/proc/{process}/task").iterdir():
                found += map(int, (thread / "children").read_text().split())
    return found


def proportional_mib(process: int) -> float:
    """Its memory, where what it shares with others counts in parts (PSS)."""
    return int(re.search(r"^Pss: +(\d+) kB", Path(f"/proc/{process}/smaps_rollup").read_text(), re.M)[1]) / 1024


def host_memory_gib() -> float:
    """Of this process and its workers."""
    total = 0.0
    for process in processes():
        with contextlib.suppress(OSError, TypeError):  # it may have ended meanwhile
            total += proportional_mib(process)
    return total / 1024


def gpu_gauges(device: torch.device) -> dict[str, float]:
    """Memory in GiB: the most that torch has held since the last call, and all that is in use, DALI's too; and which
    share of the last moments, 0 to 1, NVDEC and the rest of the GPU have worked (NVML). Empty without a GPU."""
    if device.type != "cuda":
        return {}
    free, total = torch.cuda.mem_get_info(device)
    gauges = {
        "gpu/torch_memory_gib": torch.cuda.max_memory_allocated(device) / 2**30,
        "gpu/memory_gib": (total - free) / 2**30,
    }
    torch.cuda.reset_peak_memory_stats(device)
    return gauges | nvml_gauges(str(torch.cuda.get_device_properties(device).uuid))


def nvml_gauges(uuid: str) -> dict[str, float]:
    """Nothing where NVML does not know the GPU, as in some containers and MIG slices."""
    nvml = _nvml()
    if nvml is None:
        return {}
    try:
        handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        decoder, _ = nvml.nvmlDeviceGetDecoderUtilization(handle)  # and the sampling period in microseconds
        return {
            "gpu/decoder_share": decoder / 100,
            "gpu/compute_share": nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100,
        }
    except nvml.NVMLError:
        return {}


@functools.cache
def _nvml() -> Any:
    """NVIDIA's pynvml (nvidia-ml-py), ready to use, or None."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml
