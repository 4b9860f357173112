"""The schedule against hand-made tables and PaddleVideo's, which parameters decay, and who computes the update."""

import copy

import pytest
import torch

from common.config import OptimConfig
from dali_pipelines import InputError
from model import TimeSformer
from tests.apex_double import install
from training.optimizer import (
    learning_rate,
    load_optimizer_state,
    make_optimizer,
    resolve_implementation,
    set_learning_rate,
)

KINDS = ("sgd", "adamw", "lamb")

# ../shared/golden/train_tiny.npz `lrs`: warm-up of 4 steps from 0.005, cosine from 0.05 over 12
PADDLEVIDEO = [0.005, 0.013125, 0.02125, 0.029375, 0.0375, 0.031470476127563, 0.025, 0.018529523872437, 0.0125]
PADDLEVIDEO += [0.007322330470336, 0.003349364905389, 0.000851854342773]


def rate(step, *, steps_per_epoch=4, epochs=3, **optim):
    return learning_rate(step, OptimConfig(**optim), steps_per_epoch=steps_per_epoch, epochs=epochs)


def test_the_schedule_is_paddlevideos():
    rates = [rate(step, warmup_epochs=1, lr=0.05, warmup_start_lr=0.005) for step in range(12)]
    assert rates == pytest.approx(PADDLEVIDEO, abs=1e-12)


@pytest.mark.parametrize(
    "step, expected",
    [
        (0, 0.1),  # where the warm-up starts
        (2, 0.8),  # half-way: (0.1 + 1.5) / 2, the cosine at step 4 being 1.5
        (4, 1.5),  # the cosine, a third of the way: 1 + cos(pi / 3)
        (6, 1.0),  # half-way down
        (12, 0.0),
        (20, 0.0),  # stays there
    ],
)
def test_the_schedule_by_hand(step, expected):
    assert rate(step, warmup_epochs=1, lr=2.0, warmup_start_lr=0.1) == pytest.approx(expected)


def test_without_warmup_and_with_a_floor():
    rates = [rate(step, epochs=1, warmup_epochs=0, lr=1.0, final_lr=0.2) for step in range(5)]
    assert rates == pytest.approx([1.0, 0.8828427, 0.6, 0.3171573, 0.2])


def test_decay_in_steps():
    rates = [
        rate(step, steps_per_epoch=2, warmup_epochs=0.5, warmup_start_lr=0.1, lr=1.0, decay_epochs=[1, 2.5])
        for step in range(6)
    ]
    assert rates == pytest.approx([0.1, 1.0, 0.1, 0.1, 0.1, 0.01])


@pytest.mark.parametrize(
    "name, implementation",
    [("sgd", "fused"), ("sgd", "foreach"), ("adamw", "fused"), ("adamw", "foreach"), ("lamb", "foreach")],
)
def test_embeddings_and_the_heads_bias_do_not_decay(name, implementation):
    model = TimeSformer(num_frames=2, image_size=32, num_classes=3, embed_dim=24, depth=2, num_heads=3)
    optimizer = make_optimizer(model, OptimConfig(name=name, lr=0.1, weight_decay=0.5), implementation)
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    kept = {key for key, value in model.named_parameters() if (value == before[key]).all() and value.count_nonzero()}
    assert kept == {"cls_token", "pos_embed", "time_embed", "head.bias"}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(before)


# -- learning rates by layer --


def network(depth=2):
    return TimeSformer(num_frames=2, image_size=32, num_classes=3, embed_dim=24, depth=depth, num_heads=3)


def factors(model, optimizer):
    """lr_factor of every parameter in the optimizer."""
    names = {value: name for name, value in model.named_parameters()}
    return {names[value]: group["lr_factor"] for group in optimizer.param_groups for value in group["params"]}


def test_one_rate_is_two_groups():
    """So that optimizer states of older runs fit."""
    model = network()
    decaying, others = make_optimizer(model, OptimConfig(), "foreach").param_groups
    names = [name for name, _ in model.named_parameters()]
    found = factors(model, make_optimizer(model, OptimConfig(), "foreach"))
    kept = ("cls_token", "pos_embed", "time_embed", "head.bias")
    assert list(found) == [*(name for name in names if name not in kept), *(name for name in names if name in kept)]
    assert len(others["params"]) == 4 and (decaying["lr_factor"], others["lr_factor"]) == (1, 1)


def test_rates_fall_from_the_head_to_the_embeddings():
    model = network(depth=3)
    optimizer = make_optimizer(model, OptimConfig(layer_decay=0.5, head_lr_factor=10), "foreach")
    expected = {"head": 10, "norm": 1, "blocks.2": 0.5, "blocks.1": 0.25, "blocks.0": 0.125}
    for name, factor in factors(model, optimizer).items():
        assert factor == next((each for part, each in expected.items() if name.startswith(f"{part}.")), 0.0625), name
    undecayed = [group for group in optimizer.param_groups if group["weight_decay"] == 0]
    assert sum(len(group["params"]) for group in undecayed) == 4  # as without factors


@pytest.mark.parametrize("name, implementation", [(name, each) for name in KINDS for each in ("foreach", "apex")])
def test_a_factor_scales_the_steps_of_its_layer(monkeypatch, name, implementation):
    install(monkeypatch)

    def moved(**optim):
        torch.manual_seed(0)
        model = network()
        config = OptimConfig(name=name, weight_decay=0.1, **optim)
        optimizer = make_optimizer(model, config, implementation)
        set_learning_rate(optimizer, 0.01)
        before = {key: value.detach().clone() for key, value in model.named_parameters()}
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        return {key: value.detach() - before[key] for key, value in model.named_parameters()}, factors(model, optimizer)

    (plain, _), (scaled, each) = moved(), moved(layer_decay=0.5, head_lr_factor=4)
    assert set(each.values()) == {4, 1, 0.5, 0.25, 0.125}
    for key, factor in each.items():
        torch.testing.assert_close(scaled[key], plain[key] * factor, atol=1e-6, rtol=1e-3)


def test_frozen_parameters_are_not_in_the_optimizer():
    model = network()
    model.freeze(1)
    names = factors(model, make_optimizer(model, OptimConfig(), "foreach"))
    assert {name.partition(".")[0] for name in names} == {"blocks", "norm", "head"}
    assert not any(name.startswith("blocks.0.") for name in names)


# -- who computes it --


def updated(optim, implementation, *, steps=4, start=None, make=make_optimizer):
    """(optimizer, weights) after steps with gradients that are always the same."""
    torch.manual_seed(0)
    model = TimeSformer(num_frames=2, image_size=32, num_classes=3, embed_dim=24, depth=1, num_heads=3)
    optimizer = make(model, optim, implementation)
    if start is not None:
        weights, state = start
        model.load_state_dict(weights)
        load_optimizer_state(optimizer, copy.deepcopy(state))
    generator = torch.Generator().manual_seed(100 if start else 0)
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return optimizer, {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_near(one, two, within=2e-6):
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], atol=within, rtol=1e-5, msg=lambda text, name=name: name + text)


@pytest.mark.parametrize("name, momentum", [("sgd", 0.9), ("sgd", 0.0), ("adamw", 0.9), ("lamb", 0.9)])
def test_apex_computes_what_torch_does(monkeypatch, name, momentum):
    kernels = install(monkeypatch)
    optim = OptimConfig(name=name, lr=0.01, weight_decay=0.1, momentum=momentum)
    _, expected = updated(optim, "foreach")
    optimizer, weights = updated(optim, "apex")
    assert type(optimizer).__module__.startswith(("apex", "tests.apex_double")) and sum(kernels.calls.values()) >= 8
    assert_near(expected, weights)
    _, untouched = updated(optim, "foreach", steps=0)
    assert (weights["head.weight"] - untouched["head.weight"]).abs().max() > 1e-3


@pytest.mark.slow
def test_lamb_is_that_of_timm(torchvision_loads):
    from timm.optim import Lamb

    optim = OptimConfig(name="lamb", lr=0.01, weight_decay=0.1)
    _, ours = updated(optim, "foreach")

    def theirs(model, optim, implementation):
        groups = make_optimizer(model, optim, implementation).param_groups
        groups = [{"params": group["params"], "weight_decay": group["weight_decay"]} for group in groups]
        return Lamb(groups, lr=0.01, eps=1e-6, max_grad_norm=None)

    _, expected = updated(optim, "foreach", make=theirs)
    assert_near(expected, ours)


@pytest.mark.parametrize(
    "name, before, after",
    [
        *((name, *pair) for name in KINDS for pair in (("foreach", "apex"), ("apex", "foreach"))),
        *((name, *pair) for name in KINDS[:2] for pair in (("fused", "apex"), ("foreach", "fused"))),
    ],
)
def test_a_run_may_resume_with_another_implementation(monkeypatch, name, before, after):
    """As on another machine: moments and counts are taken over."""
    install(monkeypatch)
    optim = OptimConfig(name=name, lr=0.01, weight_decay=0.1)
    optimizer, weights = updated(optim, before, steps=3)
    start = (weights, optimizer.state_dict())
    (_, expected), (_, changed) = (updated(optim, each, steps=3, start=start) for each in (before, after))
    assert_near(expected, changed)
    _, anew = updated(optim, before, steps=3, start=(weights, updated(optim, before, steps=0)[0].state_dict()))
    assert (anew["head.weight"] - expected["head.weight"]).abs().max() > 1e-4  # the state matters


CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize("name, expected", [("sgd", "fused"), ("adamw", "fused"), ("lamb", "foreach")])
def test_without_apex_it_is_torch(name, expected):
    for device in (CPU, GPU):
        assert resolve_implementation(OptimConfig(name=name), device) == expected


def test_apex_is_used_for_lamb_on_a_gpu_or_on_request(monkeypatch):
    install(monkeypatch)
    monkeypatch.setattr("training.optimizer.ApexMultiTensor", lambda device: None)  # its kernels run
    assert resolve_implementation(OptimConfig(name="lamb"), GPU) == "apex"
    assert resolve_implementation(OptimConfig(name="lamb"), CPU) == "foreach"
    assert resolve_implementation(OptimConfig(name="sgd"), GPU) == "fused"
    assert resolve_implementation(OptimConfig(name="sgd"), CPU) == "fused"
    assert resolve_implementation(OptimConfig(name="sgd", implementation="apex"), CPU) == "apex"
    assert resolve_implementation(OptimConfig(name="sgd", implementation="foreach"), GPU) == "foreach"


def test_apex_without_kernels_that_run_is_not_used(monkeypatch):
    def no_kernels(device):
        raise RuntimeError("CUDA error: no kernel image is available\nmore")

    install(monkeypatch)
    monkeypatch.setattr("training.optimizer.ApexMultiTensor", no_kernels)
    assert resolve_implementation(OptimConfig(name="lamb"), GPU) == "foreach"
    message = r"optim.implementation is apex, and its kernels do not run on cuda:0 \(CUDA error: no kernel image is"
    with pytest.raises(InputError, match=message):
        resolve_implementation(OptimConfig(implementation="apex"), GPU)


def test_what_is_forced_and_missing_is_an_error():
    with pytest.raises(InputError, match="apex, and it cannot be imported .*; NVIDIA's Apex is in NGC's PyTorch cont"):
        resolve_implementation(OptimConfig(implementation="apex"), CPU)
    with pytest.raises(InputError, match="torch has no fused LAMB; expected auto, apex or foreach"):
        resolve_implementation(OptimConfig(name="lamb", implementation="fused"), CPU)
