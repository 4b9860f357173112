"""Chooses the engine that decodes a loader's videos, from the device, the driver and the manifest."""

from dataclasses import replace

import torch

from dali_pipelines.engines import Decode, LimitsByFormat, Routing, estimate, general_limits
from dali_pipelines.errors import check
from dali_pipelines.gpus import gpu_of_device, unknown_gpu
from dali_pipelines.manifest import Manifest
from dali_pipelines.nvdec import UnavailableError, driver_limits, prepare
from dali_pipelines.plan import View


def choose_routing(
    decode: Decode,
    device: torch.device,
    manifest: Manifest,
    view: View,
    *,
    seed: int,
    host_share: float | None,
    cores: int,
) -> tuple[Routing, str]:
    """(routing, note): the note says how NVDEC and the workers share the work, or why a GPU does not decode; or "".

    host_share: None for the share that keeps both busy ("auto"), or 0 ("nvdec"). cores: CPU cores for the workers.
    Raises `InputError` if `decode` is "nvdec" and NVDEC cannot be used.
    """
    on_gpu = device.type == "cuda"
    if decode == "dali":
        return Routing(engine="dali", on_gpu=on_gpu, limits=_limits_of_dali(device), seed=seed), ""
    if decode == "host" or not (on_gpu or decode == "nvdec"):
        return Routing(engine="host", on_gpu=on_gpu, seed=seed), ""
    try:
        limits = prepare(device)
    except UnavailableError as error:
        check(decode == "auto", f"decode is 'nvdec', but {error}")
        return Routing(engine="host", on_gpu=on_gpu, seed=seed), f"the GPU does not decode: {error}"
    routing = Routing(engine="nvdec", on_gpu=on_gpu, limits=limits, host_share=host_share or 0.0, seed=seed)
    if decode == "nvdec" or host_share is not None:
        return routing, ""
    return _balanced(routing, limits, device, manifest, view, cores)


def _limits_of_dali(device: torch.device) -> LimitsByFormat | None:
    if device.type == "cpu":
        return None
    try:
        return driver_limits(device)
    except UnavailableError:
        return general_limits(decodes_av1=False)


def _balanced(
    routing: Routing, limits: LimitsByFormat, device: torch.device, manifest: Manifest, view: View, cores: int
) -> tuple[Routing, str]:
    """The routing with the host's share that keeps NVDEC and the workers busy, and the expected rates as text."""
    name = torch.cuda.get_device_name(device)
    engines = max(each.engines for each in limits.values())
    gpu = replace(gpu_of_device(name) or unknown_gpu(name, engines), engines=engines)
    found = estimate(manifest, view, routing, gpu=gpu, cores=cores)
    note = (
        f"estimated from the manifest: NVDEC ({engines} engines) alone decodes about {found.nvdec:.0f} clips/s, with "
        f"{cores} workers about {found.together:.0f}: host_share {found.host_share:g}"
    )
    return replace(routing, host_share=found.host_share), note
