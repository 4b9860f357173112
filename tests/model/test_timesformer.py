"""The network against the paper's equations written out with plain loops, and its size against the published one."""

import itertools

import pytest
import torch
from torch.nn.functional import gelu, layer_norm, linear
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from model import TimeSformer, timesformer
from model.kernels import CpuKernels, GpuKernels
from tests.conftest import needs_compiler

SETTINGS = dict(num_frames=3, image_size=32, num_classes=5, patch_size=16, embed_dim=24, depth=2, num_heads=3)


@pytest.fixture(params=[CpuKernels, GpuKernels], ids=["few copies", "few launches"])
def kernels(request, monkeypatch):
    """Both kernels, on the CPU."""
    monkeypatch.setattr(timesformer, "kernels_for", lambda x: request.param)
    return request.param


def network(**changes):
    torch.manual_seed(0)
    made = TimeSformer(**(SETTINGS | changes)).eval()
    for parameter in made.parameters():  # nothing may hide behind a zero or a one at initialisation
        torch.nn.init.normal_(parameter, std=0.2)
    return made


def attention(module, x):
    """Softmax attention among tokens [L, D], one head at a time."""
    dim = x.shape[1] // module.num_heads
    q, k, v = linear(x, module.qkv.weight, module.qkv.bias).chunk(3, dim=1)
    heads = []
    for head in range(module.num_heads):
        part = slice(head * dim, (head + 1) * dim)
        weights = (q[:, part] @ k[:, part].T / dim**0.5).softmax(1)
        heads.append(weights @ v[:, part])
    return linear(torch.cat(heads, 1), module.proj.weight, module.proj.bias)


def norm(module, x):
    return layer_norm(x, x.shape[-1:], module.weight, module.bias, 1e-6)


def mlp(block, x):
    hidden = gelu(linear(norm(block.norm2, x), block.mlp.fc1.weight, block.mlp.fc1.bias))
    return x + linear(hidden, block.mlp.fc2.weight, block.mlp.fc2.bias)


def patches_of(model, clip):
    """{(row, column, frame): token [D]}"""
    p, weight = model.patch_embed.patch_size, model.patch_embed.proj.weight
    tokens = {}
    for row, column, frame in itertools.product(range(2), range(2), range(clip.shape[1])):
        patch = clip[:, frame, row * p : row * p + p, column * p : column * p + p]
        tokens[row, column, frame] = (weight * patch).sum((1, 2, 3)) + model.patch_embed.proj.bias
    return tokens


def by_the_equations(model, clip):
    """Logits [K] of one clip [3, T, S, S]."""
    tokens = patches_of(model, clip)
    for row, column, frame in tokens:
        tokens[row, column, frame] = tokens[row, column, frame] + model.pos_embed[0, 1 + 2 * row + column]
        if model.attention != "space_only":
            tokens[row, column, frame] = tokens[row, column, frame] + model.time_embed[0, frame]
    num_frames = clip.shape[1]
    places = [(row, column) for row in range(2) for column in range(2)]
    start = model.cls_token[0, 0] + model.pos_embed[0, 0]
    if model.attention == "space_only":
        results = [
            encode(model, start, {(*place, 0): tokens[(*place, frame)] for place in places}, places, 1)
            for frame in range(num_frames)
        ]
        return linear(norm(model.norm, torch.stack(results).mean(0)), model.head.weight, model.head.bias)
    cls = encode(model, start, tokens, places, num_frames)
    return linear(norm(model.norm, cls), model.head.weight, model.head.bias)


def encode(model, cls, tokens, places, num_frames):
    for block in model.blocks:
        if model.attention == "divided_space_time":
            for place in places:  # equation 10
                over_time = torch.stack([tokens[(*place, frame)] for frame in range(num_frames)])
                change = attention(block.temporal_attn, norm(block.temporal_norm1, over_time))
                change = linear(change, block.temporal_fc.weight, block.temporal_fc.bias)
                for frame in range(num_frames):
                    tokens[(*place, frame)] = tokens[(*place, frame)] + change[frame]
        groups = [[(*place, frame) for place in places] for frame in range(num_frames)]  # equation 11
        if model.attention == "joint_space_time":
            groups = [sum(groups, [])]
        cls_changes = []
        for group in groups:
            sequence = torch.stack([cls] + [tokens[key] for key in group])
            change = attention(block.attn, norm(block.norm1, sequence))
            cls_changes.append(change[0])
            for key, value in zip(group, change[1:], strict=True):
                tokens[key] = tokens[key] + value
        cls = mlp(block, (cls + torch.stack(cls_changes).mean(0))[None])[0]
        for key in tokens:
            tokens[key] = mlp(block, tokens[key][None])[0]
    return cls


@pytest.mark.parametrize("attention", ["divided_space_time", "joint_space_time", "space_only"])
@pytest.mark.parametrize("qkv_bias", [False, True])
def test_logits_are_those_of_the_equations(kernels, attention, qkv_bias):
    model = network(attention=attention, qkv_bias=qkv_bias)
    clips = torch.rand(2, 3, 3, 32, 32)
    with torch.no_grad():
        expected = torch.stack([by_the_equations(model, clip) for clip in clips])
        torch.testing.assert_close(model(clips), expected, atol=2e-5, rtol=2e-5)


def test_only_space_only_is_blind_to_the_order_of_frames():
    clips = torch.rand(2, 3, 3, 32, 32)
    for attention in ("divided_space_time", "joint_space_time", "space_only"):
        model = network(attention=attention)
        with torch.no_grad():
            same = torch.allclose(model(clips), model(clips.flip(2)), atol=1e-5)
        assert same == (attention == "space_only")


def test_spread_of_the_embeddings_at_initialisation():
    for std in (0.02, 0.5):
        model = TimeSformer(**SETTINGS, embed_init_std=std)
        assert all(0.6 < value.std() / std < 1.4 for value in (model.pos_embed, model.time_embed, model.cls_token))


def test_nothing_is_drawn_for_meta_tensors(monkeypatch):
    """Commands check weights against a network on the meta device, for which `normal_` would import the compiler."""
    monkeypatch.delattr(torch.nn.init, "normal_")
    with torch.device("meta"):
        made = TimeSformer(**SETTINGS)
    assert made.pos_embed.is_meta
    with pytest.raises(AttributeError, match="normal_"):
        TimeSformer(**SETTINGS)


def test_size_of_the_base_model():
    with torch.device("meta"):
        plain = TimeSformer(num_frames=8, image_size=224, num_classes=400)
        with_bias = TimeSformer(num_frames=8, image_size=224, num_classes=400, qkv_bias=True)
    assert sum(value.numel() for value in plain.parameters()) == 121_511_056  # published: 121.4 M
    assert sum(value.numel() for value in with_bias.parameters()) == 121_566_352


def test_multiply_adds_of_the_base_model():
    """Published: 196 G per clip, attention included; the last block computes only the class token's part."""
    with torch.device("meta"):
        model, clips = TimeSformer(num_frames=8, image_size=224, num_classes=400), torch.empty(1, 3, 8, 224, 224)
    with FlopCounterMode(display=False) as counter:
        model.eval()(clips)
    patches, tokens, dim = 8 * 196, 8 * 197, 768
    over_time = patches * (5 * dim**2 + 2 * 8 * dim)
    over_space = tokens * (4 * dim**2 + 2 * 197 * dim)
    block = over_time + over_space + (patches + 1) * 8 * dim**2
    assert round((patches * dim**2 + 12 * block + 400 * dim) / 1e9) == 196
    last = over_time + tokens * 2 * dim**2 + 8 * (2 * dim**2 + 2 * 197 * dim) + 8 * dim**2
    assert counter.get_total_flops() == 2 * (patches * dim**2 + 11 * block + last + 400 * dim)
    assert round(counter.get_total_flops() / 2e9) == 186


class Copies(TorchDispatchMode):
    """Counts operators that move an activation without computing anything."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name = function.overloadpacket._qualified_op_name.removeprefix("aten::")
        if name in ("copy_", "clone", "contiguous", "_to_copy", "cat", "stack", "index", "repeat", "constant_pad_nd"):
            self.names.append(name)
        return function(*arguments, **(keywords or {}))


class Launches(TorchDispatchMode):
    """Counts operators other than views: on a GPU, each launches at least one kernel."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.count += not function.is_view
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize("training", [False, True])
def test_attention_on_a_cpu_reads_strided_views(training):
    """Patches are cut once; after that the only copies are, once a block, the class token put beside the patches, and
    at the end the class tokens that ask."""
    model, clips = network(drop_path=0.0).train(training), torch.rand(2, 3, 3, 32, 32)
    with torch.set_grad_enabled(training), Copies() as copies:
        model(clips)
    assert copies.names == ["clone", *["cat"] * len(model.blocks), "clone"]


def test_number_of_kernel_launches_on_a_gpu(monkeypatch):
    """Counts the computing operators of a block: few, whatever the shapes."""

    def count(kernels, depth):
        monkeypatch.setattr(timesformer, "kernels_for", lambda x: kernels)
        model, clips = network(drop_path=0.1, depth=depth).train(), torch.rand(2, 3, 3, 32, 32)
        with Launches() as launches:
            in_bf16(model)(clips).sum().backward()
        return launches.count

    a_block = {kernels: count(kernels, 4) - count(kernels, 3) for kernels in (CpuKernels, GpuKernels)}
    assert a_block[GpuKernels] <= 115 < 0.6 * a_block[CpuKernels]


def gradients(model, run, clips):
    model.zero_grad()
    torch.manual_seed(3)  # drop path
    run(clips).square().sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["divided_space_time", "joint_space_time", "space_only"])
def test_activation_checkpointing_keeps_gradients_and_memory(kernels, attention):
    model, clips = network(attention=attention, drop_path=0.5, depth=3).train(), torch.rand(2, 3, 3, 32, 32)

    def kept(model):
        """Bytes that a training step keeps for its backward pass."""
        tensors = []
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensors.append(tensor) or tensor, lambda it: it):
            model(clips)
        parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
        return sum(size for address, size in storages.items() if address not in parameters)

    plain, plain_bytes = gradients(model, model, clips), kept(model)
    model.activation_checkpointing = True
    torch.testing.assert_close(gradients(model, model, clips), plain, rtol=0, atol=0)
    pixels = clips.untyped_storage().nbytes()  # kept for the patch embedding
    assert kept(model) - pixels < (plain_bytes - pixels) / 3


def test_bf16_training_follows_float32(kernels):
    """On a CPU, attention is two products and a softmax; with 49 patches of 8 channels its weights are recomputed."""
    model = TimeSformer(**(SETTINGS | dict(image_size=112, drop_path=0.0))).train()
    clips = torch.rand(2, 3, 3, 112, 112)
    exact, rounded = gradients(model, model, clips), gradients(model, in_bf16(model), clips)
    for name, gradient in exact.items():
        assert (rounded[name] - gradient).norm() < 0.05 * gradient.norm(), name


def test_both_arrangements_have_the_same_gradients(monkeypatch):
    model, clips = network(drop_path=0.5, depth=3).train(), torch.rand(2, 3, 3, 32, 32)
    expected = gradients(model, model, clips)
    monkeypatch.setattr(timesformer, "kernels_for", lambda x: GpuKernels)
    torch.testing.assert_close(gradients(model, model, clips), expected, rtol=1e-4, atol=1e-4)


def in_bf16(model):
    def run(clips):
        with torch.autocast("cpu", torch.bfloat16):
            return model(clips)

    return run


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["divided_space_time", "joint_space_time", "space_only"])
def test_a_gpu_computes_what_the_cpu_does(attention):
    model, clips = network(attention=attention, drop_path=0.0).train(), torch.rand(2, 3, 3, 32, 32)
    expected, logits = gradients(model, model, clips), model(clips)
    model, clips = model.cuda(), clips.cuda()
    torch.testing.assert_close(model(clips).cpu(), logits, rtol=1e-3, atol=1e-3)
    found = {name: value.cpu() for name, value in gradients(model, model, clips).items()}
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)
    with torch.autocast("cuda", torch.bfloat16):
        torch.testing.assert_close(model(clips).float().cpu(), logits, rtol=0.1, atol=0.3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "attention, checkpointing",
    [("divided_space_time", False), ("divided_space_time", True), ("joint_space_time", True), ("space_only", False)],
)
def test_is_one_graph(kernels, attention, checkpointing):
    """In training and validation, with autocast and drop path. A second step traces nothing again."""
    torch.compiler.reset()
    model, clips = network(drop_path=0.5, attention=attention), torch.rand(2, 3, 3, 32, 32)
    model.activation_checkpointing = checkpointing
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    for mode in (model.train, model.eval):
        mode()
        expected = gradients(model, in_bf16(model), clips)
        for _ in range(2):
            found = gradients(model, in_bf16(compiled), clips)
            torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)
        with torch.no_grad():
            compiled(clips)
        with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
            compiled(clips)


@pytest.mark.slow
@needs_compiler
def test_the_network_compiled_for_a_gpu_computes_the_same(monkeypatch):
    """Within the noise of bf16."""
    torch.compiler.reset()
    monkeypatch.setattr(timesformer, "kernels_for", lambda x: GpuKernels)
    model, clips = network(drop_path=0.5).train(), torch.rand(2, 3, 3, 32, 32)
    compiled = torch.compile(model, fullgraph=True, dynamic=False, options={"fallback_random": True})
    expected = gradients(model, model, clips)
    exact = torch.cat([value.flatten() for value in expected.values()])
    rounded, found = (
        torch.cat([value.flatten() for value in gradients(model, in_bf16(run), clips).values()])
        for run in (model, compiled)
    )
    assert (found - exact).norm() < 1.2 * (rounded - exact).norm() < 0.05 * exact.norm()


def test_drop_path_drops_whole_branches_in_training_only():
    model = network(drop_path=0.9, depth=4)
    clips = torch.rand(1, 3, 3, 32, 32)
    assert (model(clips) == model(clips)).all()
    model.train()
    torch.manual_seed(1)
    outputs = torch.stack([model(clips) for _ in range(8)])
    assert len(outputs.unique(dim=0)) > 1
    torch.manual_seed(1)
    assert (model(clips) == outputs[0]).all()


def test_drop_path_rises_and_keeps_the_expected_value():
    first, *others = network(drop_path=0.75, depth=4).train()._draw_paths(torch.zeros(4000, 4, 3, 1))
    assert first is None
    for paths, keep in zip(others, (0.75, 0.5, 0.25), strict=True):
        assert [part.shape for part in paths] == [(4000, 4, 1, 1), (4000, 1, 3, 1), (4000, 1, 1, 1)]
        for part in paths:
            torch.testing.assert_close(part.unique(), torch.tensor([0, 1 / keep]))
            assert 0.85 < part.mean() < 1.15
            entries = part.flatten(1).T  # drawn for each by itself
            assert all((one != two).any() for one, two in itertools.combinations(entries, 2))


def test_gradients_reach_every_parameter():
    model = network().train()
    model(torch.rand(2, 3, 3, 32, 32)).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(image_size=40), "image_size 40 is not a multiple of patch_size 16"),
        (dict(num_heads=5), "embed_dim 24 is not a multiple of num_heads 5"),
        (dict(attention="divided"), "expected one of divided_space_time"),
    ],
)
def test_settings_that_cannot_work(changes, message):
    with pytest.raises(ValueError, match=message):
        network(**changes)


def test_clips_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"clips are \(1, 3, 4, 32, 32\); expected \[B, 3, 3, 32, 32\]"):
        network()(torch.rand(1, 3, 4, 32, 32))
