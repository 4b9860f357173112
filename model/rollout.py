"""Where the network looks: attention rollout over space and time.

Abnar and Zuidema: Quantifying Attention Flow in Transformers (2020), with the attention that a TimeSformer has. What a
token holds after a layer is taken to be half itself and half what attention, averaged over the heads, brings to it;
layers follow each other as their matrices are multiplied, and the class token's row of the product says from which
patches it has what it holds in the end. Norms, values and MLPs are left out: it is a way of looking, not a proof.
"""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from model.timesformer import SelfAttention, TimeSformer


class Rollout(NamedTuple):
    """`patches` and `cls` of a clip sum to 1."""

    patches: Tensor
    """float32 [B, T, rows, columns]: what the class token has from each patch."""
    cls: Tensor
    """float32 [B]: what it has from itself."""
    logits: Tensor
    """[B, K]: what the network says of the clips, the same as without this."""


@torch.no_grad()
def attention_rollout(network: TimeSformer, clips: Tensor) -> Rollout:
    """The rollout of clips [B, 3, T, S, S]; `ValueError` for a network in training mode, where drop path leaves out
    branches.

    The forward pass is the usual one; the weights, which fused attention does not give, are computed once more from
    what goes into it. Only the class token's row is taken through the layers, from the last to the first, so that no
    matrix over all T * N + 1 tokens is made unless the network has one.
    """
    if network.training:
        raise ValueError("the network is in training mode; call eval() first")
    with _attention_weights(network) as layers:
        logits = network(clips)
    batch, frames, tokens, _ = layers[-1].shape  # of the last attention over space
    cls = layers[-1].new_ones(batch)  # [B]
    patches = layers[-1].new_zeros(batch, frames, tokens - 1)  # [B, T, N]
    for number, weights in reversed(list(enumerate(layers))):
        if network.attention == "divided_space_time" and number % 2 == 0:  # [B, N, T, T], without the class token
            attended_cls, attended = cls, torch.einsum("btn,bnts->bsn", patches, weights)
        else:  # [B, T, 1 + N, 1 + N]: a copy of the class token in every frame, averaged afterwards
            row = torch.cat([cls.view(-1, 1, 1).expand(-1, frames, 1) / frames, patches], dim=2)  # [B, T, 1 + N]
            row = (row.unsqueeze(2) @ weights).squeeze(2)
            attended_cls, attended = row[..., 0].sum(1), row[..., 1:]
        cls, patches = (cls + attended_cls) / 2, (patches + attended) / 2
    _, num_frames, size, _ = network.input_shape
    side = size // network.patch_embed.patch_size
    if network.attention == "joint_space_time":  # [B, 1, N * T]
        patches = patches.view(batch, -1, num_frames).transpose(1, 2)
    elif network.attention == "space_only":  # [B * T, 1, N]: each frame is a clip; their results are averaged
        patches, cls = patches.view(-1, num_frames, side * side) / num_frames, cls.view(-1, num_frames).mean(1)
    return Rollout(patches.unflatten(2, (side, side)), cls, logits)


@contextlib.contextmanager
def _attention_weights(network: TimeSformer) -> Iterator[list[Tensor]]:
    """Weights of every attention of the forward passes within, in their order: float32, mean over the heads."""
    found: list[Tensor] = []
    hooks = []
    for block in network.blocks:
        if block.temporal_attn is not None:
            # [B, N, T, D]: patches of one place attend to each other over T.
            hooks.append(block.temporal_norm1.register_forward_hook(_recorder(found, block.temporal_attn, over=2)))
        hooks.append(block.norm1.register_forward_hook(_recorder(found, block.attn, over=1)))  # [B, 1 + N, T, D]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _recorder(found: list[Tensor], attention: SelfAttention, *, over: int):
    """A hook on the norm before `attention`, which attends over dimension `over` (1 or 2) of [B, L, T, D]."""

    def record(_norm, _inputs, normed: Tensor) -> None:
        found.append(_mean_weights(attention, normed.float() if over == 2 else normed.float().transpose(1, 2)))

    return record


def _mean_weights(attention: SelfAttention, x: Tensor) -> Tensor:
    """Tokens [..., L, D] -> how much each attends to each, [..., L, L]; a head at a time, to spare memory."""
    with torch.autocast(x.device.type, enabled=False):
        heads = attention.num_heads
        biases = (None,) * 3 if attention.qkv.bias is None else attention.qkv.bias.float().chunk(3)
        q, k = (
            linear(x, weight, bias).unflatten(-1, (heads, -1))  # [..., L, H, D / H]
            for weight, bias in zip(attention.qkv.weight.float().chunk(3)[:2], biases)
        )
        scale = q.shape[-1] ** -0.5
        total = 0
        for head in range(heads):
            total = total + (scale * q[..., head, :] @ k[..., head, :].transpose(-1, -2)).softmax(-1)
        return total / heads
