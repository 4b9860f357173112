"""Attention rollout over space and time: which patches a prediction is based on.

Abnar and Zuidema: Quantifying Attention Flow in Transformers (2020), applied to the attention of a TimeSformer. After a
layer, a token counts as half itself and half the tokens it attends to, averaged over the heads. In the product of these
matrices over the layers, the class token's row says how much of it comes from each patch. Norms, values and MLPs are
ignored: rollout is a visualisation, not a proof.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from model.timesformer import Block, SelfAttention, TimeSformer


class Rollout(NamedTuple):
    """The result of attention rollout: for each clip, `patches` and `cls` sum to 1."""

    patches: Tensor
    """float32 [B, T, rows, columns]: the share of the class token that comes from each patch."""
    cls: Tensor
    """float32 [B]: the share that comes from the class token itself."""
    logits: Tensor
    """[B, K]: the logits of the clips, the same as without rollout."""


@torch.no_grad()
def attention_rollout(network: TimeSformer, clips: Tensor) -> Rollout:
    """The rollout of clips [B, 3, T, S, S]. Raises `ValueError` for a network in training mode, because drop path skips
    branches there.

    The forward pass is the usual one; fused attention does not return its weights, so they are recomputed from its
    input. Only the class token's row is propagated, from the last layer to the first, so no matrix over all T * N + 1
    tokens is computed unless the network has one.
    """
    if network.training:
        raise ValueError("the network is in training mode; call eval() first")
    with _attention_weights(network) as layers:
        logits = network(clips)
    last = layers[-1].weights  # attention over space, [B, T, 1 + N, 1 + N]
    batch, frames, tokens, _ = last.shape
    cls = last.new_ones(batch)  # [B]
    patches = last.new_zeros(batch, frames, tokens - 1)  # [B, T, N]
    for over_time, weights in reversed(layers):
        if over_time:  # [B, N, T, T], without the class token
            attended_cls, attended = cls, torch.einsum("btn,bnts->bsn", patches, weights)
        else:  # [B, T, 1 + N, 1 + N]: a copy of the class token in every frame, averaged afterwards
            row = torch.cat([cls.view(-1, 1, 1).expand(-1, frames, 1) / frames, patches], dim=2)  # [B, T, 1 + N]
            row = (row.unsqueeze(2) @ weights).squeeze(2)
            attended_cls, attended = row[..., 0].sum(1), row[..., 1:]
        cls, patches = (cls + attended_cls) / 2, (patches + attended) / 2
    _, num_frames, size, _ = network.input_shape
    side = size // network.patch_embed.patch_size
    cls, patches = network.attention_type.restore(cls, patches, num_frames)
    return Rollout(patches.unflatten(2, (side, side)), cls, logits)


class _Layer(NamedTuple):
    over_time: bool
    weights: Tensor
    """float32 [B, T, L, L], or over time [B, N, T, T]: attention weights between tokens, averaged over the heads."""


@contextlib.contextmanager
def _attention_weights(network: TimeSformer) -> Iterator[list[_Layer]]:
    """A context with a list that collects the attention weights of forward passes, layer by layer."""
    found: list[_Layer] = []
    hooks = []
    for block in network.blocks:
        assert isinstance(block, Block)
        if block.temporal_attn is not None:
            recorder = _recorder(found, block.temporal_attn, over_time=True)
            hooks.append(block.temporal_norm1.register_forward_hook(recorder))
        hooks.append(block.norm1.register_forward_hook(_recorder(found, block.attn, over_time=False)))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _recorder(found: list[_Layer], attention: SelfAttention, *, over_time: bool) -> Callable[..., None]:
    """A hook on the norm before `attention`, whose output is [B, L, T, D]: attention is over T or over L."""

    def record(_norm: nn.Module, _inputs: Any, normed: Tensor) -> None:
        tokens = normed.float() if over_time else normed.float().transpose(1, 2)
        found.append(_Layer(over_time, _mean_weights(attention, tokens)))

    return record


def _mean_weights(attention: SelfAttention, x: Tensor) -> Tensor:
    """Tokens [..., L, D] -> attention weights [..., L, L], averaged over the heads one by one, to save memory."""
    with torch.autocast(x.device.type, enabled=False):
        heads = attention.num_heads
        biases = (None,) * 3 if attention.qkv.bias is None else attention.qkv.bias.float().chunk(3)
        q, k = (
            torch.unflatten(linear(x, weight, bias), -1, (heads, -1))  # [..., L, H, D / H]
            for weight, bias in zip(attention.qkv.weight.float().chunk(3)[:2], biases)
        )
        scale = q.shape[-1] ** -0.5
        each_head = ((scale * q[..., head, :] @ k[..., head, :].transpose(-1, -2)).softmax(-1) for head in range(heads))
        total: Tensor = functools.reduce(torch.add, each_head)
        return total / heads
