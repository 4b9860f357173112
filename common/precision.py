"""Mixed precision: data types, the loss scale of fp16, norm and scaling of gradients; and reproducible gradients."""

import math
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_precision(name: str, device: torch.device) -> str:
    """The precision for `train.precision` on `device`: float32, bf16 or fp16."""
    has_bf16 = device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
    if name == "auto":
        return "bf16" if device.type == "cuda" and has_bf16 else "float32"
    if name == "amp":
        return "bf16" if has_bf16 else "fp16"
    return name


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """A context that computes in `precision`; float32 changes nothing."""
    return torch.autocast(device.type, _DTYPES.get(precision), enabled=precision in _DTYPES)


def make_deterministic(device: torch.device) -> None:
    """On a GPU, make this process sum gradients in the same order each time, so that runs can be repeated exactly.

    By default, fused attention sums the contributions of blocks of keys in any order. Setting this only around the
    backward pass is not enough: the forward pass chooses the kernels, and a compiled backward pass rejects a setting
    that differs from its forward pass.
    """
    if device.type == "cuda":
        # Otherwise every new tensor is filled first.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # not in its stub
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # cuBLAS reads it when it starts
        torch.use_deterministic_algorithms(True)


class LossScale:
    """The loss factor in the backward pass that keeps small gradients from vanishing in fp16; 1 if not enabled.

    It changes as in `torch.amp.GradScaler`: halved at an overflow, doubled after 2,000 steps without one. It is a
    number on the host, as the step's only synchronisation fetches the gradient norm anyway, which shows an overflow.
    """

    _GROWTH_INTERVAL = 2000

    def __init__(self, *, enabled: bool):
        self.enabled = enabled
        self.value = 2.0**16 if enabled else 1.0
        self._good_steps = 0

    def update(self, *, overflow: bool) -> None:
        """Adapts the scale after a step: down after an overflow, up after many good steps."""
        if not self.enabled:
            return
        self._good_steps = 0 if overflow else self._good_steps + 1
        if overflow:
            self.value /= 2
        elif self._good_steps == self._GROWTH_INTERVAL:
            self.value = min(self.value * 2, 2.0**127)
            self._good_steps = 0

    def state_dict(self) -> dict[str, Any]:
        """The scale and the number of good steps since it changed."""
        return {"value": self.value, "good_steps": self._good_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from the `state_dict` of another run."""
        if self.enabled:
            self.value, self._good_steps = state["value"], state["good_steps"]


class TorchMultiTensor:
    """Norm and scaling of many tensors in a few kernel launches, with torch's foreach functions."""

    name = "torch foreach"

    def norm(self, tensors: Sequence[Tensor]) -> Tensor:
        """The Euclidean norm of all tensors combined, a float32 scalar on their device; not finite if any value is not.
        Does not wait for the device."""
        return torch.nn.utils.get_total_norm(tensors, foreach=True).float()

    def scale_(self, tensors: Sequence[Tensor], factor: float) -> None:
        """Multiplies all tensors by `factor` in place."""
        if tensors:
            torch._foreach_mul_(list(tensors), factor)


class ApexMultiTensor:
    """The same with Apex's kernels (csrc/multi_tensor_l2norm_kernel.cu, multi_tensor_scale_kernel.cu), for float32 or
    fp16 tensors. The tests run it on a test double in torch; docs/train.md has the results on a GPU."""

    name = "Apex multi_tensor_applier"

    def __init__(self, device: torch.device):
        import amp_C
        from apex.multi_tensor_apply import multi_tensor_applier

        self._apply, self._kernels = multi_tensor_applier, amp_C
        self._flag = torch.zeros(1, dtype=torch.int, device=device)
        self.norm([torch.ones(1, device=device)])  # raises RuntimeError if the kernels do not run here

    def norm(self, tensors: Sequence[Tensor]) -> Tensor:
        """L2 norm of all tensors combined, a scalar."""
        if not tensors:  # Apex reads the first tensor before it checks the number of tensors
            return torch.zeros((), device=self._flag.device)
        self._flag.zero_()  # the kernels set it if a value is not finite, and may do nothing while it is set
        return self._apply(self._kernels.multi_tensor_l2norm, self._flag, [list(tensors)], False)[0].squeeze(0)

    def scale_(self, tensors: Sequence[Tensor], factor: float) -> None:
        """Multiplies all tensors by `factor` in place."""
        if not tensors:
            return
        self._flag.zero_()
        self._apply(self._kernels.multi_tensor_scale, self._flag, [list(tensors), list(tensors)], factor)


def gradient_factor(norm: float, *, clip_norm: float | None, mean: float) -> tuple[float, float]:
    """Returns the norm of the gradients times `mean`, and the factor that gives the gradients that norm, or `clip_norm`
    if that is smaller; not finite if `norm` is not.

    The 1e-6 comes from `torch.nn.utils.clip_grads_with_norm_`.
    """
    norm *= mean
    clip = 1.0 if clip_norm is None or not math.isfinite(norm) else min(clip_norm / (norm + 1e-6), 1.0)
    return norm, mean * clip
