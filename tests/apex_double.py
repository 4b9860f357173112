"""A double of NVIDIA Apex that computes on the CPU what its CUDA kernels and fused optimizers do on a GPU.

Written after apex/optimizers, apex/multi_tensor_apply and csrc/multi_tensor_* of NVIDIA/apex: signatures, state and
quirks; arithmetic is in float32 whatever is stored. The last bits may differ, as Apex is built with --use_fast_math.
Stricter on purpose: raises where a kernel would read beyond a tensor or take one type's bits for another's, where an
empty tensor would keep others from being updated, and where something else stands for a bool. Left out:
FusedAdam(capturable=True); Apex AMP's master weights in FusedSGD, though not the fourth list of its kernel.
"""

import functools
import itertools
import operator
import sys
from collections import Counter
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, required

_F16, _BF16, _F32, _F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
_LAYOUTS = (torch.contiguous_format, torch.channels_last, torch.channels_last_3d)


def _float(value) -> float:
    """In float32; of all that pybind11 takes for a C++ float, thus not of a string, but of a tensor of one element."""
    if not (hasattr(value, "__float__") or hasattr(value, "__index__")):
        raise TypeError(f"incompatible function arguments: {value!r} is not a float")
    return torch.tensor(float(value), dtype=_F32).item()


def _instance(kind: type, value):
    if not isinstance(value, kind):
        raise TypeError(f"incompatible function arguments: {value!r} is not a {kind.__name__}")
    return value


_SCALARS = {
    "f": _float,
    "i": operator.index,
    "b": functools.partial(_instance, bool),
    "?": lambda value: value is not None and _instance(bool, value),
    "t": functools.partial(_instance, Tensor),
}


def _is_dense(tensor: Tensor) -> bool:
    return any(tensor.is_contiguous(memory_format=layout) for layout in _LAYOUTS)


def _flat(tensor: Tensor) -> Tensor:
    """A view in the order of memory, which is how kernels pair the elements of channels_last and other tensors."""
    return tensor.data.as_strided((tensor.numel(),), (1,))


def _check(dtypes: set[tuple[torch.dtype, ...]], noop_flag: Tensor, tensor_lists: list[list[Tensor]]) -> None:
    rows, tensors = list(zip(*tensor_lists)), list(itertools.chain(*tensor_lists))
    types = {tuple(t.dtype for t in row) for row in rows}
    problems = {
        "expected scalar type Int": noop_flag.dtype != torch.int32 or noop_flag.numel() == 0,
        "tensor_lists[0].size() is not > 0": not tensors,
        "Size mismatch among tensor lists": len(set(map(len, tensor_lists))) > 1,
        "A tensor was not contiguous.": not all(map(_is_dense, tensors)),
        "Size mismatch": any(len({t.numel() for t in row}) > 1 for row in rows),
        "Apex launches nothing for what precedes an empty tensor at the end": any(t.numel() == 0 for t in tensors),
        f"not implemented for {types}, or types differ within a list": len(types) > 1 or not types <= dtypes,
    }
    for problem, found in problems.items():
        if found:
            raise RuntimeError(problem)


def _kernel(scalars: str, dtypes: set[tuple[torch.dtype, ...]]):
    """Of tensor lists of one of the combinations of `dtypes`; it sees them flat. `scalars`: kinds of all further."""

    def decorate(kernel):
        @functools.wraps(kernel)
        def launch(self, chunk_size, noop_flag, tensor_lists, *args):
            self.calls[kernel.__name__] += 1
            if len(args) != len(scalars):
                raise TypeError(f"incompatible function arguments: {len(args)} after the lists, not {len(scalars)}")
            args = [_SCALARS[kind](value) for kind, value in zip(scalars, args)]
            tensor_lists = [[_instance(Tensor, tensor) for tensor in tensors] for tensors in tensor_lists]
            _check(dtypes, _instance(Tensor, noop_flag), tensor_lists)
            lists = [[_flat(tensor) for tensor in tensors] for tensors in tensor_lists]
            return kernel(self, operator.index(chunk_size), _flat(noop_flag), lists, *args)

        return launch

    return decorate


def _l2norm(chunk_size: int, flag: Tensor, tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
    squares = [torch.stack([chunk.float().square().sum() for chunk in t.split(chunk_size)]) for t in tensors]
    if not torch.cat(squares).isfinite().all():  # of the squares' sum in a chunk, not of the elements
        flag[0] = 1
    return torch.cat(squares).sum().sqrt().view(1), torch.stack([chunks.sum() for chunks in squares]).sqrt()


def _adam_direction(grad, m, v, beta1, beta2, beta3, epsilon, step, bias_correction) -> Tensor:
    """Updates the moments; only what is stored of them is rounded to their type."""
    correction1 = correction2 = 1.0
    if bias_correction == 1:
        correction1, correction2 = _float(1 - beta1**step), _float(1 - beta2**step)
    new_m = beta1 * m.float() + beta3 * grad
    new_v = beta2 * v.float() + _float(1 - beta2) * grad * grad
    m.copy_(new_m)
    v.copy_(new_v)
    return (new_m / correction1) / ((new_v / correction2).sqrt() + epsilon)


class AmpC(ModuleType):
    """The extension module amp_C: no keyword arguments, no defaults. `calls` counts by name of the kernel."""

    def __init__(self):
        super().__init__("amp_C")
        self.calls: Counter[str] = Counter()

    @_kernel("f", set(itertools.product((_F32, _F16, _BF16), repeat=2)))
    def multi_tensor_scale(self, chunk_size, flag, lists, scale):
        for source, target in zip(*lists):
            if not source.isfinite().all():  # of the input: what overflows in the output is not noticed
                flag[0] = 1
            target.copy_(source.float() * scale)

    @_kernel("?", {(_F32,), (_F16,), (_BF16,)})
    def multi_tensor_l2norm(self, chunk_size, flag, lists, per_tensor):
        norm, norms = _l2norm(chunk_size, flag, lists[0])
        return norm, norms if per_tensor else torch.empty(0)

    @_kernel("ffffbbbf", {(_F16,) * 3, (_F32,) * 3, (_F16, _F32, _F32, _F16), (_F32, _F32, _F32, _F16)})
    def multi_tensor_sgd(self, chunk, flag, lists, wd, momentum, dampening, lr, nesterov, first_run, wd_after, scale):
        if flag[0]:  # the only kernel here that looks
            return
        for grad, weight, buffer, *copies in zip(*lists):
            direction, decay = grad.float() * scale, wd * weight.float() if wd != 0 else 0.0
            if not wd_after:
                direction = direction + decay
            if momentum != 0:
                velocity = direction if first_run else buffer.float() * momentum + _float(1 - dampening) * direction
                buffer.copy_(velocity)
                direction = direction + momentum * velocity if nesterov else velocity
            if wd_after:
                direction = direction + decay
            weight += (-lr * direction).to(weight.dtype)  # rounded before it is added, and after
            for copy in copies:
                copy.copy_(weight)

    @_kernel("ffffiiif", {(dtype, dtype, _F32, _F32) for dtype in (_F64, _F32, _F16, _BF16)})
    def multi_tensor_adam(self, chunk, flag, lists, lr, beta1, beta2, epsilon, step, mode, bias_correction, decay):
        for grad, param, m, v in zip(*lists):
            p = param.float()
            g = grad.float() + decay * p if mode == 0 else grad.float()
            update = _adam_direction(g, m, v, beta1, beta2, _float(1 - beta1), epsilon, step, bias_correction)
            param.copy_(p - lr * (update if mode == 0 else update + decay * p))

    @_kernel("ffffiifiitf?", {(_F32,) * 4, (_F16,) * 4})
    def multi_tensor_lamb(
        self, chunk, flag, lists, lr, beta1, beta2, epsilon, step, bias_correction, decay, grad_averaging, mode,
        global_grad_norm, max_grad_norm, use_nvlamb,
    ):  # fmt: skip
        if global_grad_norm.dtype != _F32:
            raise RuntimeError(f"expected scalar type Float but found {global_grad_norm.dtype}")
        norm, beta3 = _flat(global_grad_norm)[0], _float(1 - beta1) if grad_averaging == 1 else 1.0
        clip = norm / max_grad_norm if norm > max_grad_norm else 1.0
        param_norms = _l2norm(chunk, flag, lists[1])[1]
        for grad, param, m, v in zip(*lists):
            decayed = decay * param.float() if decay != 0 else 0.0
            g = grad.float() / clip + (decayed if mode == 0 else 0.0)
            update = _adam_direction(g, m, v, beta1, beta2, beta3, epsilon, step, bias_correction)
            grad.copy_(update + (0.0 if mode == 0 else decayed))  # the gradient is lost
        for grad, param, norm, update_norm in zip(*lists[:2], param_norms, _l2norm(chunk, flag, lists[0])[1]):
            adapt = (use_nvlamb or decay != 0) and norm != 0 and update_norm != 0
            param.copy_(param.float() - (lr * (norm / update_norm) if adapt else lr) * grad.float())


class MultiTensorApply:
    def __init__(self, chunk_size: int):
        self.chunk_size, self.available = chunk_size, sys.modules["amp_C"] is not None

    def __call__(self, op, noop_flag_buffer, tensor_lists, *args):
        if not self.available:
            raise RuntimeError("Attempted to call MultiTensorApply method, but MultiTensorApply is not available")
        return op(self.chunk_size, noop_flag_buffer, tensor_lists, *args)


class _Fused(Optimizer):
    keeps_grads = False

    def __init__(self, params, set_grad_none, kernels, **defaults):
        super().__init__(params, defaults)
        self.set_grad_none, self.apply = set_grad_none, sys.modules["apex.multi_tensor_apply"].multi_tensor_applier
        if not self.apply.available:
            raise RuntimeError(f"apex.optimizers.{type(self).__name__} requires cuda extensions")
        self._dummy_overflow_buf = torch.tensor([0], dtype=torch.int)
        for name in kernels:
            setattr(self, name, getattr(sys.modules["amp_C"], name))

    def zero_grad(self):
        super().zero_grad(set_to_none=self.set_grad_none or not self.keeps_grads)

    def step(self, closure=None):
        loss = None if closure is None else closure()
        self._update()
        return loss

    def _by_dtype(self, params, dtypes, complain=True) -> dict[torch.dtype, list[Tensor]]:
        params = [p for p in params if p.grad is not None]
        if complain and any(p.dtype not in dtypes for p in params):
            raise RuntimeError(f"{type(self).__name__} only support fp16 and fp32.")
        return {dtype: same for dtype in dtypes if (same := [p for p in params if p.dtype == dtype])}

    def _next_lists(self, group, dtypes, state_dtype=None):
        """Counts the step; gives gradients, parameters and both moments, of one type at a time."""
        group["step"] = group["step"] + 1 if "step" in group else 1
        for params in self._by_dtype(group["params"], dtypes).values():
            for p in params:
                for name in ("exp_avg", "exp_avg_sq") if len(self.state[p]) == 0 else ():
                    self.state[p][name] = torch.zeros_like(p.data, dtype=state_dtype)
            moments = ([self.state[p][name] for p in params] for name in ("exp_avg", "exp_avg_sq"))
            yield [[p.grad for p in params], params, *moments]


class FusedSGD(_Fused):
    def __init__(
        self, params, lr=required, momentum=0, dampening=0, weight_decay=0, nesterov=False, wd_after_momentum=False,
        materialize_master_grads=True, set_grad_none=False,
    ):  # fmt: skip
        for name, value in {"learning rate": lr, "momentum": momentum, "weight_decay": weight_decay}.items():
            if value is not required and value < 0.0:
                raise ValueError(f"Invalid {name} value: {value}")
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ValueError("Nesterov momentum requires a momentum and zero dampening")
        settings = dict(lr=lr, momentum=momentum, dampening=dampening, weight_decay=weight_decay, nesterov=nesterov)
        super().__init__(params, set_grad_none, ["multi_tensor_sgd"], **settings)
        self.wd_after_momentum, self.materialize_master_grads = wd_after_momentum, materialize_master_grads
        self.most_recent_scale, self.scale_set_by_backward = 1.0, False

    def get_momentums(self, params):
        """Whether it is the first run is up to the last parameter alone, for all."""
        first_run = not params or "momentum_buffer" not in self.state[params[-1]]
        for p in params:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p.data)
        return [self.state[p]["momentum_buffer"] for p in params], first_run

    def _update(self):
        for group in self.param_groups:
            settings = [group[name] for name in ("weight_decay", "momentum", "dampening", "lr", "nesterov")]
            for params in self._by_dtype(group["params"], (_F16, _F32), complain=False).values():
                momentums, first_run = self.get_momentums(params)
                lists = [[p.grad for p in params], params, momentums]
                further = [*settings, first_run, self.wd_after_momentum, 1.0 / self.most_recent_scale]
                self.apply(self.multi_tensor_sgd, self._dummy_overflow_buf, lists, *further)
        self.most_recent_scale, self.scale_set_by_backward = 1.0, False


class FusedAdam(_Fused):
    def __init__(
        self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-8, adam_w_mode=True, weight_decay=0.0,
        amsgrad=False, set_grad_none=True, capturable=False, master_weights=False,
    ):  # fmt: skip
        if amsgrad or (master_weights and not capturable):
            raise RuntimeError("FusedAdam has no AMSGrad variant, and master weights only if capturable")
        if capturable:
            raise NotImplementedError("the double has no FusedAdam(capturable=True)")
        settings = dict(lr=lr, bias_correction=bias_correction, betas=betas, eps=eps, weight_decay=weight_decay)
        super().__init__(params, set_grad_none, ["multi_tensor_adam"], **settings)
        self.adam_w_mode, self.capturable, self.master_weights = int(bool(adam_w_mode)), capturable, master_weights

    def step(self, closure=None, grads=None, output_params=None, scale=None, grad_norms=None, grad_scaler=None):
        if any(argument is not None for argument in (grads, output_params, scale, grad_norms)):
            raise RuntimeError("FusedAdam has been updated. Call step() with no arguments.")
        return super().step(closure)

    def _update(self):
        for group in filter(operator.itemgetter("params"), self.param_groups):
            for lists in self._next_lists(group, (_F16, _BF16, _F32), _F32):
                settings = [group["lr"], *group["betas"], group["eps"], group["step"], self.adam_w_mode]
                further = [*settings, 1 if group["bias_correction"] else 0, group["weight_decay"]]
                self.apply(self.multi_tensor_adam, self._dummy_overflow_buf, lists, *further)


class FusedLAMB(_Fused):
    def __init__(
        self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.01, amsgrad=False,
        adam_w_mode=True, grad_averaging=True, set_grad_none=True, max_grad_norm=1.0, use_nvlamb=False,
    ):  # fmt: skip
        if amsgrad:
            raise RuntimeError("FusedLAMB does not support the AMSGrad variant.")
        settings = dict(lr=lr, bias_correction=bias_correction, betas=betas, eps=eps, weight_decay=weight_decay)
        settings |= dict(grad_averaging=grad_averaging, max_grad_norm=max_grad_norm)
        super().__init__(params, set_grad_none, ["multi_tensor_l2norm", "multi_tensor_lamb"], **settings)
        self.adam_w_mode, self.use_nvlamb = int(bool(adam_w_mode)), use_nvlamb

    def _norm(self, tensors: list[Tensor]) -> Tensor:
        return self.apply(self.multi_tensor_l2norm, self._dummy_overflow_buf, [tensors], False)[0]

    def _update(self):
        params = itertools.chain.from_iterable(group["params"] for group in self.param_groups)
        norms = [self._norm([p.grad for p in same]) for same in self._by_dtype(params, (_F32, _F16)).values()]
        norm = self._norm([*norms, torch.zeros(1), torch.zeros(1)][:2])
        for group in self.param_groups:
            for lists in self._next_lists(group, (_F16, _F32)):
                settings = [group["lr"], *group["betas"], group["eps"], group["step"]]
                settings += [1 if group["bias_correction"] else 0, group["weight_decay"]]
                settings += [1 if group["grad_averaging"] else 0, self.adam_w_mode]
                further = [*settings, norm, self.defaults["max_grad_norm"], self.use_nvlamb]
                self.apply(self.multi_tensor_lamb, self._dummy_overflow_buf, lists, *further)


def install(monkeypatch: pytest.MonkeyPatch, *, cuda_ext: bool = True, keeps_grads: bool = False) -> AmpC:
    """Lets this test import Apex; gives its amp_C. Without `cuda_ext` it is an Apex that was built without amp_C.

    `keeps_grads`: zero_grad() zeroes in place where set_grad_none is False, as of Apex 4689df1; before that, with
    PyTorch 2.0 or newer, gradients become None all the same.
    """
    amp_c = AmpC()
    monkeypatch.setitem(sys.modules, "amp_C", amp_c if cuda_ext else None)
    apex, apply, optimizers = (ModuleType(name) for name in ("apex", "apex.multi_tensor_apply", "apex.optimizers"))
    apex.multi_tensor_apply, apex.optimizers = apply, optimizers
    apply.MultiTensorApply, apply.multi_tensor_applier = MultiTensorApply, MultiTensorApply(2048 * 32)
    optimizers.FusedSGD, optimizers.FusedAdam, optimizers.FusedLAMB = FusedSGD, FusedAdam, FusedLAMB
    for module in (apex, apply, optimizers):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(_Fused, "keeps_grads", keeps_grads)
    return amp_c
