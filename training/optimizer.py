"""Optimizers and their implementations, weight decay, and the learning rate as a function of the step."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch

from common.config import OptimConfig
from common.precision import ApexMultiTensor, TorchMultiTensor
from dali_pipelines.errors import InputError
from model import TimeSformer

_NO_DECAY = ("cls_token", "pos_embed", "time_embed", "head.bias")
"""Parameters without L2 decay in PaddleVideo's pptimesformer (vit_tweaks.py, ppTimeSformer_head.py); all others have
it."""

_LAMB_EPSILON = 1e-6  # Apex fused_lamb.py


def resolve_implementation(optim: OptimConfig, device: torch.device) -> str:
    """The implementation for `optim.implementation`: apex, fused or foreach.

    "auto" means torch's fused kernels, which are as fast as Apex's (docs/benchmarks.md). Torch has no LAMB: it comes
    from Apex on a GPU if its kernels run, otherwise from `Lamb`. Raises `InputError` if a forced implementation is
    missing.
    """
    wanted = optim.implementation
    if wanted == "fused" and optim.name == "lamb":
        raise InputError("optim.implementation is fused, and torch has no fused LAMB; expected auto, apex or foreach")
    if wanted == "auto" and optim.name != "lamb":
        return "fused"
    if wanted == "apex" or (wanted == "auto" and device.type == "cuda"):
        missing = _apex_missing(device)
        if not missing:
            return "apex"
        if wanted == "apex":
            raise InputError(
                f"optim.implementation is apex, and {missing}; NVIDIA's Apex is in NGC's PyTorch containers, or can be "
                "built from source with the CUDA extensions (the `apex` on PyPI is another project)"
            )
    return "foreach" if wanted == "auto" else wanted


def _apex_missing(device: torch.device) -> str:
    """Why Apex cannot be used, in words; "" if it can."""
    try:
        import amp_C  # noqa: F401
        from apex.optimizers import FusedAdam, FusedLAMB, FusedSGD  # noqa: F401
    except ImportError as error:
        return f"it cannot be imported ({error})"
    try:
        ApexMultiTensor(device)
    except (ImportError, RuntimeError) as error:
        return f"its kernels do not run on {device} ({str(error).splitlines()[0]})"
    return ""


def make_multi_tensor(implementation: str, device: torch.device) -> TorchMultiTensor | ApexMultiTensor:
    """The kernels for norms and scaling that belong to an implementation."""
    return ApexMultiTensor(device) if implementation == "apex" else TorchMultiTensor()


def make_optimizer(model: TimeSformer, optim: OptimConfig, implementation: str) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum, AdamW or LAMB, in the implementation that `resolve_implementation` returned.

    Frozen parameters are left out. Each group has an `lr_factor`: see `set_learning_rate`.
    """
    groups = _parameter_groups(model, optim)
    common: dict[str, Any] = {"lr": optim.lr, "weight_decay": optim.weight_decay}
    sgd: dict[str, Any] = {"momentum": optim.momentum, "nesterov": optim.momentum > 0}
    betas = (optim.betas[0], optim.betas[1])
    if implementation == "apex":
        from apex.optimizers import FusedAdam, FusedLAMB, FusedSGD

        if optim.name == "sgd":
            # Gradients are unscaled before the step, and there are no fp16 parameters, so no copies are needed.
            return FusedSGD(groups, **common, **sgd, materialize_master_grads=False, set_grad_none=True)
        if optim.name == "adamw":
            return FusedAdam(groups, **common, betas=betas, adam_w_mode=True)
        # `max_grad_norm`: the gradients are already clipped.
        return FusedLAMB(groups, **common, betas=betas, eps=_LAMB_EPSILON, max_grad_norm=math.inf)
    if optim.name == "lamb":
        return Lamb(groups, **common, betas=betas)
    common |= {"fused": implementation == "fused", "foreach": implementation == "foreach"}
    if optim.name == "sgd":
        return torch.optim.SGD(groups, **common, **sgd)
    return torch.optim.AdamW(groups, **common, betas=betas)


def _parameter_groups(model: TimeSformer, optim: OptimConfig) -> list[dict[str, Any]]:
    """The trainable parameters by their `lr_factor`; of each factor, those with weight decay come first."""
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for name, value in model.named_parameters():
        if not value.requires_grad:
            continue
        factor, decays = _lr_factor(name, len(model.blocks), optim), name not in _NO_DECAY
        group = groups.setdefault((factor, not decays), {"params": [], "lr_factor": factor})
        group["params"].append(value)
        if not decays:
            group["weight_decay"] = 0.0
    return [groups[key] for key in sorted(groups)]


def _lr_factor(name: str, depth: int, optim: OptimConfig) -> float:
    """The learning rate of parameter `name`, as a multiple of that of the last norm.

    `layer_decay` applies once per layer below the head, as in BEiT (microsoft/unilm, beit/optim_factory.py): the
    embeddings are layer 0, block i (from 0) is layer i + 1, the last norm and the head are layer depth + 1.
    """
    part, *rest = name.split(".")
    if part == "head":
        return optim.head_lr_factor
    layer = depth + 1 if part == "norm" else int(rest[0]) + 1 if part == "blocks" else 0
    return optim.layer_decay ** (depth + 1 - layer)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Let the next step use the learning rate `lr`, times the `lr_factor` of each group."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_factor"]


def optimizer_summary(optimizer: torch.optim.Optimizer, implementation: str) -> str:
    """The optimizer and its implementation, such as "SGD (torch fused)", and the range of its groups' `lr_factor`."""
    by = {"apex": "Apex", "fused": "torch fused", "foreach": "torch foreach"}[implementation]
    factors = [group["lr_factor"] for group in optimizer.param_groups]
    rates = f" with {min(factors):.2g} to {max(factors):.2g} times the learning rate" if set(factors) != {1.0} else ""
    return f"{type(optimizer).__name__} ({by}){rates}"


class Lamb(torch.optim.Optimizer):
    """LAMB (You et al., Large Batch Optimization for Deep Learning, 2020, algorithm 2), with torch's foreach functions.

    It computes what Apex's FusedLAMB does (csrc/multi_tensor_lamb.cu: bias correction, decoupled decay, no trust ratio
    without decay), and has the same state: `exp_avg`, `exp_avg_sq`, the group's `step`.
    """

    def __init__(self, params: Iterable, *, lr: float, betas: tuple[float, float], weight_decay: float):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "eps": _LAMB_EPSILON})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Update the parameters with their gradients; a `closure` is not called."""
        for group in self.param_groups:
            params = [value for value in group["params"] if value.grad is not None]
            if not params:
                continue
            for value in params:
                if not self.state[value]:
                    self.state[value] = {name: torch.zeros_like(value) for name in ("exp_avg", "exp_avg_sq")}
            grads = [value.grad for value in params]
            means, squares = ([self.state[value][name] for value in params] for name in ("exp_avg", "exp_avg_sq"))
            group["step"] = step = group.get("step", 0) + 1
            (beta1, beta2), decay = group["betas"], group["weight_decay"]
            torch._foreach_lerp_(means, grads, 1 - beta1)
            torch._foreach_mul_(squares, beta2)
            torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)
            updates = torch._foreach_div(means, 1 - beta1**step)
            spreads = torch._foreach_sqrt(torch._foreach_div(squares, 1 - beta2**step))
            torch._foreach_add_(spreads, group["eps"])
            torch._foreach_div_(updates, spreads)
            if decay:
                torch._foreach_add_(updates, params, alpha=decay)
                norms = torch.stack([torch.stack(torch._foreach_norm(each)) for each in (params, updates)])
                ratios = torch.where((norms > 0).all(0), norms[0] / norms[1], 1.0)
                torch._foreach_mul_(updates, list(ratios.unbind()))
            torch._foreach_add_(params, updates, alpha=-group["lr"])


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load the moments and step counts of `state`, which any implementation may have written; settings are kept.

    Apex counts steps per group, torch's AdamW per parameter.
    """
    settings = [{k: v for k, v in group.items() if k not in ("params", "step")} for group in optimizer.param_groups]
    counted = [group["step"] for group in state["param_groups"] if "step" in group]
    counted += [int(each["step"]) for each in state["state"].values() if "step" in each]
    moments = {key: {k: v for k, v in each.items() if k != "step"} for key, each in state["state"].items()}
    groups = [{k: v for k, v in group.items() if k != "step"} for group in state["param_groups"]]
    if counted and isinstance(optimizer, torch.optim.AdamW):
        for each in moments.values():
            each["step"] = torch.tensor(float(counted[0]))
    elif counted:
        for group in groups:
            group["step"] = counted[0]
    for group, wanted in zip(groups, settings, strict=True):
        group.update(wanted)
    optimizer.load_state_dict({"state": moments, "param_groups": groups})


def learning_rate(step: int, optim: OptimConfig, *, steps_per_epoch: int, epochs: int) -> float:
    """The learning rate of optimizer step `step` (from 0).

    It is a cosine from `lr` at step 0 to `final_lr` at the end of the epochs (PaddleVideo solver/custom_lr.py,
    CustomWarmupCosineDecay), or falls to a tenth after each of `decay_epochs` (facebookresearch/TimeSformer, LR_POLICY
    steps_with_relative_lrs). In the first `warmup_epochs` it rises linearly from `warmup_start_lr`.
    """

    def decayed(epoch: float) -> float:
        if optim.decay_epochs:
            return optim.lr * 0.1 ** sum(epoch >= end for end in optim.decay_epochs)
        return optim.final_lr + (optim.lr - optim.final_lr) * 0.5 * (1 + math.cos(math.pi * min(epoch / epochs, 1)))

    epoch = step / steps_per_epoch
    if epoch < optim.warmup_epochs:
        start = optim.warmup_start_lr
        return start + (decayed(optim.warmup_epochs) - start) * epoch / optim.warmup_epochs
    return decayed(epoch)
