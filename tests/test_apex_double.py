"""The double of Apex against torch.optim, timm and plain arithmetic: tests that use it rest on this."""

import copy
import inspect
import sys

import pytest
import torch
from torch import nn

from tests import apex_double

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
CHUNK = 2048 * 32
SGD = (0.0, 0.9, 0.0, 0.1, False, True, False, 1.0)  # further arguments that the kernels take
ADAM = (0.1, 0.9, 0.999, 1e-8, 1, 1, 1, 0.0)
LAMB = (0.1, 0.9, 0.999, 1e-8, 1, 1, 0.0, 1, 1, torch.ones(1), 1.0, False)


@pytest.fixture
def amp_c(monkeypatch):
    return apex_double.install(monkeypatch)


def flag(value=0):
    return torch.tensor([value], dtype=torch.int32)


def values(*shape, seed=0, dtype=F32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def parameters():
    """Two groups; one tensor is of more than one chunk, one of a single element."""
    groups = ([(3, 4), (CHUNK + 5,)], [(2, 2, 5), (1,)])
    return [[nn.Parameter(values(*shape)) for shape in shapes] for shapes in groups]


def train(make, steps=5, size=1.0):
    """The parameters after some steps of what `make` makes of the groups; learning rates change on the way."""
    first, second = parameters()
    optimizer = make([{"params": first}, {"params": second, "lr": 0.02, "weight_decay": 0.3}])
    for step in range(steps):
        for index, parameter in enumerate(first + second):
            parameter.grad = size * (values(*parameter.shape, seed=1 + 10 * step + index) + 0.1 * parameter.detach())
        assert optimizer.step(lambda: 7.0) == 7.0
        optimizer.param_groups[0]["lr"] *= 0.7
    return [parameter.detach() for parameter in first + second], optimizer


def assert_same(found, expected, rtol=2e-5, atol=2e-6):
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("weight_decay", [0, 0.2])
@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        dict(momentum=0.9),
        dict(momentum=0.9, nesterov=True),
        dict(momentum=0.9, dampening=0.3),
    ],
)
def test_sgd_is_that_of_torch(amp_c, settings, weight_decay):
    from apex.optimizers import FusedSGD

    settings = dict(lr=0.05, weight_decay=weight_decay) | settings
    expected, _ = train(lambda groups: torch.optim.SGD(groups, **settings))
    found, optimizer = train(lambda groups: FusedSGD(groups, **settings))
    assert_same(found, expected)
    assert amp_c.calls == {"multi_tensor_sgd": 10}
    assert all(set(state) == {"momentum_buffer"} for state in optimizer.state.values()) and len(optimizer.state) == 4


@pytest.mark.parametrize("settings", [dict(), dict(weight_decay=0.2), dict(betas=(0.7, 0.98), eps=1e-3)])
@pytest.mark.parametrize("adam_w_mode", [True, False])
def test_adam_is_that_of_torch(amp_c, adam_w_mode, settings):
    from apex.optimizers import FusedAdam

    reference = torch.optim.AdamW if adam_w_mode else torch.optim.Adam
    settings = dict(lr=0.01, weight_decay=0) | settings
    expected, _ = train(lambda groups: reference(groups, **settings))
    found, optimizer = train(lambda groups: FusedAdam(groups, adam_w_mode=adam_w_mode, **settings))
    assert_same(found, expected)
    assert amp_c.calls == {"multi_tensor_adam": 10}
    assert all(set(state) == {"exp_avg", "exp_avg_sq"} for state in optimizer.state.values())
    assert [(type(group["step"]), group["step"]) for group in optimizer.param_groups] == [(int, 5)] * 2


def test_adam_without_bias_correction(amp_c):
    from apex.optimizers import FusedAdam

    parameter = nn.Parameter(values(9))
    parameter.grad = values(9, seed=1)
    expected = parameter.detach() - 0.01 * (0.1 * parameter.grad) / ((0.001 * parameter.grad**2).sqrt() + 1e-8)
    FusedAdam([parameter], lr=0.01, bias_correction=False).step()
    assert_same(parameter.detach(), expected)


@pytest.mark.slow
@pytest.mark.usefixtures("torchvision_loads")
@pytest.mark.parametrize("size", [1e-3, 1.0])  # of the gradients: less and more than max_grad_norm
@pytest.mark.parametrize(
    "settings",
    [
        dict(weight_decay=0.1),
        dict(weight_decay=0.0),
        dict(weight_decay=0.0, use_nvlamb=True),
        dict(grad_averaging=False, bias_correction=False),
        dict(max_grad_norm=10.0, betas=(0.7, 0.98), eps=1e-3),
    ],
)
def test_lamb_is_that_of_timm(amp_c, settings, size):
    from apex.optimizers import FusedLAMB
    from timm.optim import Lamb

    settings = dict(lr=0.01) | settings
    others = {{"use_nvlamb": "always_adapt"}.get(name, name): value for name, value in settings.items()}
    expected, _ = train(lambda groups: Lamb(groups, **others), size=size)
    found, optimizer = train(lambda groups: FusedLAMB(groups, **settings), size=size)
    assert_same(found, expected)
    assert amp_c.calls == {"multi_tensor_lamb": 10, "multi_tensor_l2norm": 10}
    assert all(set(state) == {"exp_avg", "exp_avg_sq"} for state in optimizer.state.values())
    assert [(type(group["step"]), group["step"]) for group in optimizer.param_groups] == [(int, 5)] * 2


@pytest.mark.parametrize("adam_w_mode", [True, False])
@pytest.mark.parametrize("dtype", [F32, F16])
def test_a_step_of_lamb_by_hand(amp_c, dtype, adam_w_mode):
    from apex.optimizers import FusedLAMB

    parameter = nn.Parameter(values(20, dtype=dtype))
    parameter.grad = values(20, seed=1, dtype=dtype)
    p, g = parameter.detach().double(), parameter.grad.double()
    g = g / g.norm() if adam_w_mode else g / g.norm() + 0.1 * p
    update = g / (g.abs() + 1e-6) + (0.1 * p if adam_w_mode else 0)  # both moments without their bias
    FusedLAMB([parameter], lr=0.01, weight_decay=0.1, adam_w_mode=adam_w_mode).step()
    tolerance = dict(rtol=1e-5 if dtype == F32 else 5e-4, atol=1e-5)  # of half: one rounding, 2**-11
    assert_same(parameter.detach().double(), p - 0.01 * p.norm() / update.norm() * update, **tolerance)
    assert_same(parameter.grad.double(), update, **tolerance)  # that is where LAMB keeps its update


def test_global_norm_of_lamb_is_over_groups_and_types(amp_c):
    from apex.optimizers import FusedLAMB

    parameters = [nn.Parameter(torch.ones(1, dtype=dtype)) for dtype in (F16, F32, F32)]
    for parameter, grad in zip(parameters, (2, 3, 6)):
        parameter.grad = torch.full_like(parameter, grad)
    optimizer = FusedLAMB([{"params": parameters[:2]}, {"params": parameters[2:], "max_grad_norm": 100.0}])
    optimizer.step()
    moments = [optimizer.state[parameter]["exp_avg"].item() for parameter in parameters]
    assert moments == pytest.approx([0.1 * 2 / 7, 0.1 * 3 / 7, 0.1 * 6 / 7], rel=1e-3)  # no group has its own maximum


@pytest.mark.parametrize("dtype", [F16, BF16, F64])
def test_types_of_parameters(amp_c, dtype):
    from apex.optimizers import FusedAdam, FusedLAMB, FusedSGD

    def step(optimizer_class, **settings):
        parameter = nn.Parameter(values(50, dtype=dtype))
        parameter.grad = values(50, seed=1, dtype=dtype)
        optimizer = optimizer_class([parameter], lr=0.1, **settings)
        optimizer.step()
        return parameter.detach(), parameter.grad.float(), optimizer.state[parameter]

    start = values(50, dtype=dtype)
    after, grad, state = step(FusedSGD, momentum=0.9)
    if dtype == F16:
        assert_same(after.float(), start.float() - 0.1 * grad, rtol=1e-3, atol=1e-3)
        assert torch.equal(state["momentum_buffer"].float(), grad) and state["momentum_buffer"].dtype == F16
    else:
        assert torch.equal(after, start) and not state  # silently left alone
    if dtype == F64:
        with pytest.raises(RuntimeError, match="only support"):
            step(FusedAdam)
    else:
        after, grad, state = step(FusedAdam)
        assert_same(after.float(), start.float() - 0.1 * grad.sign(), rtol=1e-2, atol=1e-2)
        assert {value.dtype for value in state.values()} == {F32}
    if dtype == F16:
        assert {value.dtype for value in step(FusedLAMB)[2].values()} == {F16}
    else:
        with pytest.raises(RuntimeError, match="only support"):
            step(FusedLAMB)


def test_a_parameter_that_comes_last_and_late_resets_the_momentum_of_all(amp_c):
    from apex.optimizers import FusedSGD

    def second_step(late):
        parameters = [nn.Parameter(torch.zeros(1)) for _ in range(3)]
        optimizer = FusedSGD(parameters, lr=1.0, momentum=0.5)
        for names in ({0, 1, 2} - {late}, {0, 1, 2}):
            for index in names:
                parameters[index].grad = torch.ones(1)
            optimizer.step()
        return [optimizer.state[parameter]["momentum_buffer"].item() for parameter in parameters]

    assert second_step(late=0) == [1.0, 1.5, 1.5]
    assert second_step(late=2) == [1.0, 1.0, 1.0]


def test_what_sgd_rounds_in_half_precision(amp_c):
    """The step before it is added, the sum, and what is stored of the momentum but not what is used of it."""
    weight, grad, buffer = (values(50, seed=seed, dtype=F16) for seed in range(3))
    velocity = 0.9 * buffer.float() + grad.float()
    expected = weight.float() + (-0.1 * velocity).half().float()
    amp_c.multi_tensor_sgd(CHUNK, flag(), [[grad], [ours := weight.clone()], [buffer]], *SGD[:5], False, *SGD[6:])
    assert torch.equal(ours, expected.half()) and torch.equal(buffer, velocity.half())
    assert not torch.equal(ours, (weight.float() - 0.1 * velocity).half())
    assert not torch.equal(ours, (weight.float() + (-0.1 * velocity.half().float()).half().float()).half())


def test_sgd_with_half_copies_of_its_weights(amp_c):
    from apex.multi_tensor_apply import multi_tensor_applier

    weight, copies = values(30), torch.zeros(30, dtype=F16)
    for dtype in (F16, F32):
        ours, buffer, grad = weight.clone(), torch.zeros(30), (64 * values(30, seed=1)).to(dtype)
        settings = (0.1, 0.0, 0.0, 0.5, False, True, False, 1 / 64)
        multi_tensor_applier(amp_c.multi_tensor_sgd, flag(), [[grad], [ours], [buffer], [copies]], *settings)
        assert_same(ours, weight - 0.5 * (grad.float() / 64 + 0.1 * weight))
        assert torch.equal(copies, ours.half()) and not buffer.any()


def test_weight_decay_after_momentum_and_scale_of_sgd(amp_c):
    from apex.optimizers import FusedSGD

    parameter = nn.Parameter(torch.tensor([2.0]))
    optimizer = FusedSGD([parameter], lr=0.1, momentum=0.5, weight_decay=0.25, wd_after_momentum=True)
    for gradient, scale, expected in ((8.0, 8.0, 1.85), (1.0, 1.0, 1.65375)):
        parameter.grad, optimizer.most_recent_scale = torch.tensor([gradient]), scale
        optimizer.step()
        assert parameter.item() == pytest.approx(expected) and optimizer.most_recent_scale == 1.0
    assert optimizer.state[parameter]["momentum_buffer"].item() == pytest.approx(1.5)


def test_elements_are_paired_in_the_order_of_memory(amp_c):
    weight = values(2, 3, 2, 2, 2)
    grad = values(2, 3, 2, 2, 2, seed=1)
    last = dict(memory_format=torch.channels_last_3d)
    both = weight.clone().to(**last)
    amp_c.multi_tensor_sgd(CHUNK, flag(), [[grad.to(**last)], [both], [torch.zeros_like(both)]], *SGD)
    assert_same(both, weight - 0.1 * grad)
    mixed = weight.clone().to(**last)
    amp_c.multi_tensor_sgd(CHUNK, flag(), [[grad], [mixed], [torch.zeros_like(mixed)]], *SGD)
    in_memory = mixed.permute(0, 2, 3, 4, 1).flatten()
    assert_same(in_memory, weight.permute(0, 2, 3, 4, 1).flatten() - 0.1 * grad.flatten())


@pytest.mark.parametrize("source", [F32, F16, BF16])
@pytest.mark.parametrize("target", [F32, F16, BF16])
@pytest.mark.parametrize("bad", [None, float("inf"), float("-inf"), float("nan")])
def test_scale(amp_c, source, target, bad):
    inputs = [values(7, dtype=source), values(CHUNK + 3, seed=1, dtype=source)]
    if bad is not None:
        inputs[1][CHUNK + 1] = bad
    outputs, overflow = [torch.zeros_like(tensor, dtype=target) for tensor in inputs], flag()
    amp_c.multi_tensor_scale(CHUNK, overflow, [inputs, outputs], 0.25)
    assert overflow.item() == (bad is not None)
    for given, found in zip(inputs, outputs):
        torch.testing.assert_close(found, (given.double() * 0.25).to(target), equal_nan=True)


def test_scale_notices_what_comes_in_not_what_goes_out_and_never_clears_its_flag(amp_c):
    output, overflow = torch.zeros(2, dtype=F16), flag()
    amp_c.multi_tensor_scale(CHUNK, overflow, [[torch.tensor([1.0, 1e5])], [output]], 1.0)
    assert output.tolist() == [1.0, float("inf")] and overflow.item() == 0
    in_place, overflow = torch.ones(3), flag(1)
    amp_c.multi_tensor_scale(CHUNK, overflow, [[in_place], [in_place]], 3)
    assert in_place.tolist() == [3.0] * 3 and overflow.item() == 1


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("per_tensor", [True, False, None])
def test_l2norm(amp_c, dtype, per_tensor):
    tensors, overflow = [100 * values(3, 5, dtype=dtype), 100 * values(1000, seed=1, dtype=dtype)], flag()
    norm, norms = amp_c.multi_tensor_l2norm(333, overflow, [tensors], per_tensor)
    expected = torch.stack([tensor.double().norm() for tensor in tensors])
    assert norm.shape == (1,) and norm.dtype == norms.dtype == F32 and overflow.item() == 0
    assert_same(norm[0].double(), expected.norm(), atol=0)
    assert_same(norms.double(), expected if per_tensor else expected[:0], atol=0)


@pytest.mark.parametrize("bad", [float("inf"), float("nan"), 1e20])  # the square of the last is too much for float32
def test_l2norm_that_is_not_finite(amp_c, bad):
    overflow = flag()
    norm, norms = amp_c.multi_tensor_l2norm(2, overflow, [[torch.ones(4), torch.tensor([1.0, 1.0, bad])]], True)
    assert overflow.item() == 1 and norms[0].item() == 2.0
    assert not norm.isfinite().any() and not norms[1].isfinite() and norm.isnan().item() == (bad != bad)


def test_only_sgd_does_nothing_when_the_flag_is_set(amp_c):
    for kernel, settings, moments in (("sgd", SGD, 1), ("adam", ADAM, 2), ("lamb", LAMB, 2)):
        for value in (0, 1):
            lists = [[torch.ones(3)] for _ in range(2 + moments)]
            getattr(amp_c, f"multi_tensor_{kernel}")(CHUNK, flag(value), lists, *settings)
            unchanged = torch.equal(lists[1][0], torch.ones(3))
            assert unchanged == (kernel == "sgd" and value == 1)
    assert amp_c.calls == {"multi_tensor_sgd": 2, "multi_tensor_adam": 2, "multi_tensor_lamb": 2}


def ones(count, *shape, dtype=F32):
    return [[torch.ones(shape or (4,), dtype=dtype)] for _ in range(count)]


@pytest.mark.parametrize(
    ("kernel", "lists", "settings", "error"),
    [
        ("scale", ones(1), (1.0,), RuntimeError),
        ("scale", ones(3), (1.0,), RuntimeError),
        ("scale", [], (1.0,), RuntimeError),
        ("scale", [[], []], (1.0,), RuntimeError),
        ("scale", [[torch.ones(4)] * 2, [torch.ones(4)]], (1.0,), RuntimeError),
        ("scale", [[torch.ones(1)], [torch.ones(4)]], (1.0,), RuntimeError),
        ("scale", ones(2, 4, 0), (1.0,), RuntimeError),
        ("scale", [[torch.ones(4, 4).t()], [torch.ones(4, 8)[:, ::2]]], (1.0,), RuntimeError),
        ("scale", ones(2, dtype=F64), (1.0,), RuntimeError),
        ("scale", [[torch.ones(4), torch.ones(4).half()], [torch.ones(4)] * 2], (1.0,), RuntimeError),
        ("scale", ones(2), ("1",), TypeError),
        ("scale", ones(2), (), TypeError),
        ("scale", ones(2), (1.0, 1.0), TypeError),
        ("scale", [[None], [torch.ones(4)]], (1.0,), TypeError),
        ("l2norm", ones(2), (False,), RuntimeError),
        ("l2norm", ones(1, dtype=torch.int32), (False,), RuntimeError),
        ("l2norm", ones(1), (), TypeError),
        ("l2norm", ones(1), (2,), TypeError),
        ("sgd", ones(2), SGD, RuntimeError),
        ("sgd", ones(3, dtype=BF16), SGD, RuntimeError),
        ("sgd", ones(1, dtype=F16) + ones(2), SGD, RuntimeError),
        ("sgd", ones(4), SGD, RuntimeError),
        ("sgd", ones(3), SGD[:-2], TypeError),
        ("sgd", ones(3), (*SGD[:4], 0.9, *SGD[5:]), TypeError),
        ("adam", ones(3), ADAM, RuntimeError),
        ("adam", ones(4, dtype=F16), ADAM, RuntimeError),
        ("adam", ones(4), (*ADAM[:4], 1.0, *ADAM[5:]), TypeError),
        ("lamb", ones(5), LAMB, RuntimeError),
        ("lamb", ones(4, dtype=BF16), LAMB, RuntimeError),
        ("lamb", ones(2, dtype=F16) + ones(2), LAMB, RuntimeError),
        ("lamb", ones(4), (*LAMB[:9], 1.0, *LAMB[10:]), TypeError),
        ("lamb", ones(4), (*LAMB[:9], torch.ones(1).double(), *LAMB[10:]), RuntimeError),
        ("lamb", ones(4), (*LAMB[:10], None, LAMB[11]), TypeError),
    ],
)
def test_bad_arguments(amp_c, kernel, lists, settings, error):
    with pytest.raises(error):
        getattr(amp_c, f"multi_tensor_{kernel}")(CHUNK, flag(), copy.deepcopy(lists), *settings)


@pytest.mark.parametrize("bad", [torch.zeros(1), torch.zeros(1, dtype=torch.int64), torch.zeros(0).int(), 0])
def test_flag_is_a_tensor_of_int32(amp_c, bad):
    with pytest.raises(RuntimeError if isinstance(bad, torch.Tensor) else TypeError):
        amp_c.multi_tensor_scale(CHUNK, bad, ones(2), 1.0)


def test_constructors(amp_c):
    from apex.optimizers import FusedAdam, FusedLAMB, FusedSGD

    parameters = [nn.Parameter(torch.ones(1))]
    names = {cls: " ".join(inspect.signature(cls.__init__).parameters) for cls in (FusedSGD, FusedAdam, FusedLAMB)}
    assert names == {
        FusedSGD: "self params lr momentum dampening weight_decay nesterov wd_after_momentum materialize_master_grads "
        "set_grad_none",
        FusedAdam: "self params lr bias_correction betas eps adam_w_mode weight_decay amsgrad set_grad_none capturable "
        "master_weights",
        FusedLAMB: "self params lr bias_correction betas eps weight_decay amsgrad adam_w_mode grad_averaging "
        "set_grad_none max_grad_norm use_nvlamb",
    }
    assert FusedAdam(parameters).defaults["weight_decay"] == 0 and FusedAdam(parameters).defaults["eps"] == 1e-8
    assert FusedLAMB(parameters).defaults["weight_decay"] == 0.01 and FusedLAMB(parameters).defaults["eps"] == 1e-6
    for make in (
        lambda: FusedSGD(parameters),
        lambda: FusedSGD(parameters, lr=-1.0),
        lambda: FusedSGD(parameters, lr=0.1, nesterov=True),
        lambda: FusedSGD(parameters, lr=0.1, momentum=0.9, dampening=0.1, nesterov=True),
    ):
        with pytest.raises(ValueError):
            make()
    for cls, name in ((FusedAdam, "amsgrad"), (FusedLAMB, "amsgrad"), (FusedAdam, "master_weights")):
        with pytest.raises(RuntimeError):
            cls(parameters, **{name: True})


@pytest.mark.parametrize("keeps_grads", [False, True])
def test_zero_grad_takes_no_argument(monkeypatch, keeps_grads):
    apex_double.install(monkeypatch, keeps_grads=keeps_grads)
    from apex.optimizers import FusedAdam, FusedLAMB, FusedSGD

    for cls, none in ((FusedSGD, False), (FusedSGD, True), (FusedAdam, True), (FusedLAMB, True), (FusedLAMB, False)):
        parameter = nn.Parameter(torch.ones(2))
        parameter.grad = torch.ones(2)
        optimizer = cls([parameter], lr=0.1, set_grad_none=none)
        assert cls([parameter], lr=0.1).set_grad_none == (cls is not FusedSGD)
        with pytest.raises(TypeError):
            optimizer.zero_grad(set_to_none=True)
        optimizer.zero_grad()
        assert parameter.grad is None if none or not keeps_grads else torch.equal(parameter.grad, torch.zeros(2))


def test_states_go_to_and_from_torch_for_sgd_but_not_for_adam(amp_c):
    from apex.optimizers import FusedAdam, FusedSGD

    parameter = nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)

    def state(optimizer):
        optimizer.step()
        return copy.deepcopy(optimizer.state_dict())

    settings = dict(lr=0.1, momentum=0.9)
    for one, other in ((FusedSGD, torch.optim.SGD), (torch.optim.SGD, FusedSGD)):
        optimizer = other([parameter], lr=0.3)
        optimizer.load_state_dict(state(one([parameter], **settings)))
        optimizer.step()
        assert_same(optimizer.state[parameter]["momentum_buffer"], torch.full((2,), 1.9))
    saved = state(FusedAdam([parameter]))
    assert saved["param_groups"][0]["step"] == 1 and "step" not in saved["state"][0]
    optimizer = FusedAdam([parameter])
    optimizer.load_state_dict(state(torch.optim.Adam([parameter])))
    with pytest.raises(KeyError, match="bias_correction"):
        optimizer.step()


def test_adam_of_half_precision_cannot_resume_from_its_own_state(amp_c):
    """PyTorch casts what it loads to the type of the parameter, the kernel takes moments for float32."""
    from apex.optimizers import FusedAdam

    for dtype in (F32, BF16):
        parameter = nn.Parameter(torch.ones(2, dtype=dtype))
        parameter.grad = torch.ones(2, dtype=dtype)
        optimizer, other = FusedAdam([parameter]), FusedAdam([parameter])
        optimizer.step()
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        if dtype == F32:
            other.step()
            assert other.param_groups[0]["step"] == 2
        else:
            with pytest.raises(RuntimeError, match="not implemented for"):
                other.step()


def test_an_apex_without_its_extension(monkeypatch):
    apex_double.install(monkeypatch, cuda_ext=False)
    from apex.multi_tensor_apply import multi_tensor_applier
    from apex.optimizers import FusedSGD

    with pytest.raises(ImportError):
        import amp_C  # noqa: F401
    with pytest.raises(RuntimeError, match="FusedSGD requires cuda extensions"):
        FusedSGD([nn.Parameter(torch.ones(1))], lr=0.1)
    with pytest.raises(RuntimeError):
        multi_tensor_applier(None, flag(), [[torch.ones(1)]])


def test_install_is_for_one_test():
    before = {name: sys.modules.get(name) for name in ("amp_C", "apex", "apex.optimizers", "apex.multi_tensor_apply")}
    with pytest.MonkeyPatch.context() as monkeypatch:
        installed = apex_double.install(monkeypatch)
        import amp_C
        from amp_C import multi_tensor_l2norm
        from apex.multi_tensor_apply import MultiTensorApply, multi_tensor_applier

        assert amp_C is installed and multi_tensor_applier.available and multi_tensor_applier.chunk_size == CHUNK
        norm, _ = MultiTensorApply(2)(multi_tensor_l2norm, flag(), [[torch.ones(9)]], False)
        assert norm.item() == 3.0 and installed.calls == {"multi_tensor_l2norm": 1}
    assert before == {name: sys.modules.get(name) for name in before}
