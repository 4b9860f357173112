"""The attention and the MLP of a block, optimised for each kind of device.

On a CPU, memory bandwidth is scarce: `CpuKernels` copies nothing and keeps little. On a GPU, launching kernels takes
longer than running them for small batches, and casting makes a copy anyway: `GpuKernels` computes few, large products.
Both compute the same result from the same weights. Measurements are in docs/benchmarks.md.

Shapes: B clips, L tokens that attend to each other, T sequences of them, D channels, H heads.
"""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

T = TypeVar("T")


class CpuKernels:
    """Saves memory traffic."""

    @staticmethod
    def attention(
        x: Tensor, qkv: nn.Linear, num_heads: int, project: Callable[[Tensor], Tensor], queries: int | None
    ) -> Tensor:
        """Multi-head self-attention over dimension 1 of [B, L, T, D], within each of the T sequences; then `project`.
        `queries`: only the first this many tokens attend, default all; returns [B, queries, T, D].

        Queries, keys and values are separate products, so that sequence and head are adjacent dimensions: merging them
        is a view, without a copy that gathers the tokens of a sequence.
        """
        x = _cast(x)
        query_tokens = x if queries is None else x[:, :queries]
        biases = (None,) * 3 if qkv.bias is None else qkv.bias.chunk(3)
        heads = x.shape[2] * num_heads
        q, k, v = (
            linear(tokens, weight, bias).flatten(2).unflatten(2, (heads, -1)).transpose(1, 2)  # [B, T*H, L, D/H]
            for tokens, weight, bias in zip((query_tokens, x, x), qkv.weight.chunk(3), biases, strict=True)
        )
        return project(_attend(q, k, v).transpose(1, 2).reshape(query_tokens.shape))

    @staticmethod
    def mlp(norm: nn.LayerNorm, fc1: nn.Linear, fc2: nn.Linear, *tokens: Tensor) -> tuple[Tensor, ...]:
        """fc2(gelu(fc1(norm(each)))) for each of the tokens [B, L, T, D].

        The output of GELU, a sixth of a block's memory, is not kept: the backward pass computes it again.
        """

        def contract(*hidden: Tensor) -> tuple[Tensor, ...]:
            return tuple(fc2(gelu(each)) for each in hidden)

        return _recomputed(contract, *(fc1(_cast(norm(each))) for each in tokens))


class GpuKernels:
    """Saves kernel launches."""

    @staticmethod
    def attention(
        x: Tensor, qkv: nn.Linear, num_heads: int, project: Callable[[Tensor], Tensor], queries: int | None
    ) -> Tensor:
        """Like `CpuKernels.attention`. One product computes queries, keys and values; the copy that casts the tokens
        also gathers those of a sequence, and a compiler fuses it with the preceding norm.

        CUDA's kernels take at most 65,535 sequences; over time, their number is clips times patches: 334 clips of 196
        patches.
        """
        sequences = _cast(x.transpose(1, 2)).flatten(0, 1)  # [B*T, L, D]
        heads = (num_heads, -1)
        if queries is None:
            q, k, v = qkv(sequences).unflatten(2, (3, *heads)).permute(2, 0, 3, 1, 4).unbind()  # [B*T, H, L, D/H]
        else:
            dim = x.shape[3]
            q_bias, kv_bias = (None, None) if qkv.bias is None else qkv.bias.split([dim, 2 * dim])
            q_weight, kv_weight = qkv.weight.split([dim, 2 * dim])
            q = linear(sequences[:, :queries], q_weight, q_bias).unflatten(2, heads).transpose(1, 2)
            kv = linear(sequences, kv_weight, kv_bias)
            k, v = kv.unflatten(2, (2, *heads)).permute(2, 0, 3, 1, 4).unbind()
        attended = scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return torch.unflatten(project(attended), 0, (x.shape[0], -1)).transpose(1, 2)

    @staticmethod
    def mlp(norm: nn.LayerNorm, fc1: nn.Linear, fc2: nn.Linear, *tokens: Tensor) -> tuple[Tensor, ...]:
        """Like `CpuKernels.mlp`, with all tokens in one product. The output of GELU is kept, except in a compiled
        network, where the kernel that reads its input anyway computes it again."""

        def contract(hidden: Tensor) -> Tensor:
            contracted: Tensor = fc2(gelu(hidden))
            return contracted

        shapes = [each.shape[1:3] for each in tokens]
        parts = [each.flatten(1, 2) for each in tokens]
        hidden = fc1(_cast(norm(torch.cat(parts, dim=1) if len(parts) > 1 else parts[0])))
        found = _recomputed(contract, hidden) if torch.compiler.is_compiling() else contract(hidden)
        parts = found.split([part.shape[1] for part in parts], dim=1)
        return tuple(part.unflatten(1, shape) for part, shape in zip(parts, shapes, strict=True))


def kernels_for(x: Tensor) -> type[CpuKernels] | type[GpuKernels]:
    """The kernels for the device of `x`."""
    return GpuKernels if x.is_cuda else CpuKernels


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype of autocast on a device; None if it is off. The meta device has none."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def _cast(x: Tensor) -> Tensor:
    """Casts to the dtype of autocast; contiguous if that is a copy. Done once, not by autocast for every product."""
    return x.to(autocast_dtype(x.device) or x.dtype, memory_format=torch.contiguous_format)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention over dimension 2 of [B, H, L, D/H] on a CPU."""
    if not (q.dtype == torch.bfloat16 and torch.is_grad_enabled()):
        return scaled_dot_product_attention(q, k, v)
    # The CPU's fused kernel takes 1.9 times as long in bf16 training: 65 ms instead of 34 (two clips, one block).
    together = [each.flatten(0, 1) for each in (q, k, v)]  # [B*H, L, D/H]
    is_short = q.shape[2] <= q.shape[3]  # then the weights are no larger than q and k, and are kept
    out = _attend_by_products(*together) if is_short else _recomputed(_attend_by_products, *together)
    return torch.unflatten(out, 0, q.shape[:2])


def _attend_by_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.baddbmm(q.new_empty(1, 1, 1), q, k.transpose(1, 2), beta=0, alpha=q.shape[2] ** -0.5)
    return scores.softmax(2) @ v


def _recomputed(function: Callable[..., T], *inputs: Tensor) -> T:
    """function(*inputs), with only the inputs kept for autograd: backward runs it again up to its last product."""
    if not torch.is_grad_enabled():
        return function(*inputs)
    result: T = checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
    return result
