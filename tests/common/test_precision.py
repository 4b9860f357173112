"""The loss scale against torch's own scaler, and clipping by hand."""

import math
import os

import pytest
import torch

from common.precision import ApexMultiTensor, LossScale, TorchMultiTensor, gradient_factor, make_deterministic
from tests.apex_double import install


def test_the_loss_scale_moves_as_that_of_torch(monkeypatch):
    """Overflows at random, a growth interval of 5: the same scale after each of 300 steps as `GradScaler`'s."""
    monkeypatch.setattr(LossScale, "_GROWTH_INTERVAL", 5)
    ours = LossScale(enabled=True)
    theirs = torch.amp.GradScaler("cpu", growth_interval=5)
    parameter = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([parameter], lr=0.0)
    overflows = (torch.rand(300, generator=torch.Generator().manual_seed(0)) < 0.15).tolist()
    for overflow in overflows:
        theirs.scale(parameter.sum() * (math.inf if overflow else 1.0)).backward()
        theirs.step(optimizer)
        theirs.update()
        optimizer.zero_grad()
        ours.update(overflow=overflow)
        assert ours.value == theirs.get_scale()
    assert 20 < sum(overflows) < 80
    again = LossScale(enabled=True)
    again.load_state_dict(ours.state_dict())
    assert again.state_dict() == ours.state_dict()


def test_without_fp16_the_loss_scale_stays_one():
    scale = LossScale(enabled=False)
    for overflow in (True, False) * 3000:
        scale.update(overflow=overflow)
    scale.load_state_dict({"value": 1024.0, "good_steps": 3})
    assert scale.value == 1


@pytest.mark.parametrize(
    "norm, clip_norm, mean, expected",
    [
        (3.0, None, 0.5, (1.5, 0.5)),
        (3.0, 2.0, 0.5, (1.5, 0.5)),  # within
        (8.0, 1.0, 0.5, (4.0, 0.125)),  # 4 is to become 1
        (0.0, 1.0, 2.0, (0.0, 2.0)),
    ],
)
def test_the_factor_of_the_gradients_by_hand(norm, clip_norm, mean, expected):
    assert gradient_factor(norm, clip_norm=clip_norm, mean=mean) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("norm", [math.inf, math.nan])
def test_a_norm_that_is_not_finite_stays_so(norm):
    assert not math.isfinite(gradient_factor(norm, clip_norm=1.0, mean=0.5)[0])


@pytest.fixture(params=["torch", "apex"])
def multi_tensor(request, monkeypatch):
    if request.param == "torch":
        return TorchMultiTensor()
    install(monkeypatch)
    return ApexMultiTensor(torch.device("cpu"))


def test_norm_and_scaling_of_many_tensors(multi_tensor):
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator) for shape in ((3, 4), (70_000,), (1,), (2, 2, 2))]
    copies = [tensor.clone() for tensor in tensors]
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    norm = multi_tensor.norm(tensors)
    assert norm.shape == () and norm.dtype == torch.float32
    torch.testing.assert_close(norm, flat.norm(), rtol=1e-5, atol=0)
    multi_tensor.scale_(tensors, 0.25)
    for tensor, copy in zip(tensors, copies, strict=True):
        torch.testing.assert_close(tensor, copy * 0.25, rtol=1e-6, atol=0)


def test_only_a_gpu_has_to_be_told_the_order_of_sums(monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":1:1")
    make_deterministic(torch.device("cpu"))
    assert not torch.are_deterministic_algorithms_enabled()
    try:
        make_deterministic(torch.device("cuda"))
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()  # attention only warns then
        assert not torch.utils.deterministic.fill_uninitialized_memory
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"  # cuBLAS takes only this one and :16:8
    finally:
        torch.use_deterministic_algorithms(False)


def test_no_tensors(multi_tensor):
    assert multi_tensor.norm([]).item() == 0
    multi_tensor.scale_([], 2.0)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_value_that_is_not_finite_shows_in_the_norm_and_not_in_the_next(multi_tensor, bad):
    good, ill = torch.ones(5), torch.ones(5)
    ill[3] = bad
    assert not multi_tensor.norm([good, ill]).isfinite()
    assert multi_tensor.norm([good, good]).item() == pytest.approx(math.sqrt(10))
    multi_tensor.scale_([good], 3.0)
    assert good.tolist() == [3.0] * 5
