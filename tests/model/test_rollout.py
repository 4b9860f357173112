"""Attention rollout against the full matrices, written out token by token."""

import itertools

import pytest
import torch
from torch.nn.functional import linear

from model import TimeSformer, attention_rollout

ATTENTIONS = ("divided_space_time", "joint_space_time", "space_only")
SIDE, FRAMES = 2, 3


def network(attention="divided_space_time", **changes):
    torch.manual_seed(1)
    settings = dict(num_frames=FRAMES, image_size=16 * SIDE, num_classes=5, embed_dim=24, depth=3, num_heads=3)
    made = TimeSformer(**settings | changes, attention=attention, qkv_bias=True).eval()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return made


def clips(count=2, size=16 * SIDE):
    return torch.randn(count, 3, FRAMES, size, size, generator=torch.Generator().manual_seed(2))


def weights(module, tokens):
    """Attention of tokens [L, D] to each other, mean over the heads."""
    q, k, _ = linear(tokens, module.qkv.weight, module.qkv.bias).chunk(3, dim=1)
    heads = zip(q.chunk(module.num_heads, 1), k.chunk(module.num_heads, 1), strict=True)
    return torch.stack([(a @ b.T / a.shape[1] ** 0.5).softmax(1) for a, b in heads]).mean(0)


def inputs_of_attention(model, clip):
    """The outputs of the norms before attention, in order."""
    seen = []
    norms = [norm for block in model.blocks for norm in (getattr(block, "temporal_norm1", None), block.norm1) if norm]
    hooks = [norm.register_forward_hook(lambda _module, _inputs, out: seen.append(out)) for norm in norms]
    with torch.no_grad():
        model(clip[None])
    for hook in hooks:
        hook.remove()
    return seen


def by_whole_matrices(model, clip):
    """[1 + T * N] the class token's row of the product of explicit matrices over all tokens."""
    places, frames = range(SIDE * SIDE), range(FRAMES)
    number = {token: 1 + index for index, token in enumerate(itertools.product(frames, places))}  # 0: the class token
    count = 1 + len(number)
    matrices = []
    modules = [m for block in model.blocks for m in (block.temporal_attn, block.attn) if m is not None]
    for module, x in zip(modules, inputs_of_attention(model, clip), strict=True):
        matrix = torch.zeros(count, count)
        if model.attention == "joint_space_time":  # x: [1, 1 + N * T, 1, D], places first
            order = [0] + [number[frame, place] for place in places for frame in frames]
            matrix[torch.tensor(order)[:, None], torch.tensor(order)] = weights(module, x[0, :, 0])
        elif any(module is block.temporal_attn for block in model.blocks):  # [1, N, T, D]
            matrix[0, 0] = 1
            for place in places:
                attended = weights(module, x[0, place])
                for a, b in itertools.product(frames, frames):
                    matrix[number[a, place], number[b, place]] = attended[a, b]
        else:  # [1, 1 + N, T, D], or [T, 1 + N, 1, D] where each frame is by itself
            for frame in frames:
                attended = weights(module, x[frame, :, 0] if model.attention == "space_only" else x[0, :, frame])
                tokens = [0] + [number[frame, place] for place in places]
                matrix[0, tokens] += attended[0] / FRAMES
                for row, token in enumerate(tokens[1:], start=1):
                    matrix[token, tokens] = attended[row]
        assert torch.allclose(matrix.sum(1), torch.ones(count), atol=1e-5)
        matrices.append(0.5 * torch.eye(count) + 0.5 * matrix)
    product = torch.eye(count)
    for matrix in matrices:
        product = matrix @ product
    return product[0]


@pytest.mark.parametrize("attention", ATTENTIONS[:2])
def test_the_rollout_is_the_row_of_the_product_of_all_matrices(attention):
    model, given = network(attention), clips()
    rollout = attention_rollout(model, given)
    assert rollout.patches.shape == (2, FRAMES, SIDE, SIDE)
    for index, clip in enumerate(given):
        expected = by_whole_matrices(model, clip)
        torch.testing.assert_close(rollout.cls[index], expected[0])
        torch.testing.assert_close(rollout.patches[index].flatten(), expected[1:])
    assert rollout.patches.std() > 0.01  # far from the same for all


def test_space_only_frames_share_the_rollout():
    """Each frame has the rollout of a clip of one frame, and a share of 1 / T."""
    model, given = network("space_only"), clips()
    rollout = attention_rollout(model, given)
    single = network("space_only", num_frames=1)
    single.load_state_dict(model.state_dict())
    for frame in range(FRAMES):
        alone = attention_rollout(single, given[:, :, frame : frame + 1])
        torch.testing.assert_close(rollout.patches[:, frame], alone.patches[:, 0] / FRAMES)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_rows_sum_to_one_and_nothing_changes_in_the_network(attention):
    model, given = network(attention), clips()
    with torch.no_grad():
        before = model(given)
    rollout = attention_rollout(model, given)
    torch.testing.assert_close(rollout.patches.sum((1, 2, 3)) + rollout.cls, torch.ones(2))
    assert torch.equal(rollout.logits, before) and rollout.patches.min() >= 0
    with torch.no_grad():
        assert torch.equal(model(given), before)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_network_whose_attention_is_forced_to_one_patch_lights_it_up(attention):
    """The keys are zero except at one place, where they are parallel to all queries."""
    model = network(attention, image_size=48, depth=1)
    block, place = model.blocks[0], 5  # row 1, column 2
    with torch.no_grad():
        for module in filter(None, (block.attn, block.temporal_attn)):
            module.qkv.weight.zero_()
            module.qkv.bias.zero_()
        dim = model.norm.weight.numel()
        block.norm1.weight.fill_(1)
        block.norm1.bias.zero_()
        model.pos_embed.zero_()
        model.cls_token.copy_(torch.arange(dim) % 2)
        model.patch_embed.proj.weight.mul_(0.01)
        direction = torch.tensor([1.0, -1.0]).repeat(dim // 2)
        model.pos_embed[0, 1 + place] = 100 * direction
        if attention != "space_only":
            model.time_embed.zero_()
        block.attn.qkv.bias[:dim] = direction  # queries: the same for all tokens
        block.attn.qkv.weight[dim : 2 * dim] = 3 * torch.eye(dim)  # keys: the tokens
        if block.temporal_attn is not None:
            block.temporal_fc.weight.zero_()
    patches = attention_rollout(model, clips(size=48)).patches
    share = patches / patches.sum((1, 2, 3), keepdim=True)
    assert share[:, :, 1, 2].sum(1).min() > 0.99
    torch.testing.assert_close(share[:, :, 1, 2], torch.full((2, FRAMES), 1 / FRAMES), atol=0.02, rtol=0)


def test_half_precision_gives_the_same_rollout():
    model, given = network(), clips()
    full = attention_rollout(model, given)
    with torch.autocast("cpu", torch.bfloat16):
        half = attention_rollout(model, given)
    assert half.patches.dtype == torch.float32
    torch.testing.assert_close(half.patches, full.patches, atol=0.01, rtol=0)


def test_a_training_network_is_refused():
    with pytest.raises(ValueError, match="training mode"):
        attention_rollout(network().train(), clips())


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_the_head_of_the_features_is_the_forward_pass(attention):
    model, given = network(attention), clips()
    with torch.no_grad():
        features = model.forward_features(given)
        assert features.shape == (2, 24) and torch.equal(model.head(features), model(given))
