"""TimeSformer: a vision transformer that attends over time and space in turn.

Bertasius, Wang, Torresani: Is Space-Time Attention All You Need for Video Understanding? (2021); section numbers below
are theirs. PP-TimeSformer is the same network with other data and other initial weights (PaddleVideo, vit_tweaks.py).
Parameters carry the names of timm's ViT, as they do in the published weights.

Shapes: B clips, T frames, N patches a frame, D channels, H heads. Measured numbers are in docs/benchmarks.md.
"""

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

Attention = Literal["divided_space_time", "joint_space_time", "space_only"]

LAYER_NORM_EPS = 1e-6  # PaddleVideo pptimesformer_k400_videos.yaml


class TimeSformer(nn.Module):
    """Clips [B, 3, T, S, S] -> logits [B, num_classes].

    num_frames, image_size, patch_size: T, S and the side of a patch in pixels; S must be a multiple of it.
    qkv_bias: False in PP-TimeSformer (its ImageNet-21K weights have none), True in the original.
    attention: "divided_space_time" (section 3.3, the one with published weights), "joint_space_time" (every patch sees
        every other), or "space_only" (frames are an unordered set; their results are averaged).
    drop_path: chance to leave out a residual branch, rising linearly from 0 in the first block to this in the last.
    embed_init_std: spread of the class token, position and time embeddings at initialisation. 0.02 suits fine-tuning of
        pretrained weights; a small network trained from scratch learns the order of frames only with more.
    activation_checkpointing: an attribute, for long clips; training keeps what goes into a block, and runs it twice.
    """

    def __init__(
        self,
        *,
        num_frames: int,
        image_size: int,
        num_classes: int,
        patch_size: int = 16,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        qkv_bias: bool = False,
        attention: Attention = "divided_space_time",
        drop_path: float = 0.1,
        embed_init_std: float = 0.02,
    ):
        super().__init__()
        if image_size % patch_size:
            raise ValueError(f"image_size {image_size} is not a multiple of patch_size {patch_size}")
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim {embed_dim} is not a multiple of num_heads {num_heads}")
        if attention not in get_args(Attention):
            raise ValueError(f"attention is {attention!r}; expected one of {', '.join(get_args(Attention))}")
        self.attention = attention
        self.activation_checkpointing = False
        self.input_shape = (3, num_frames, image_size, image_size)
        self.patch_embed = PatchEmbed(patch_size, embed_dim)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + (image_size // patch_size) ** 2, embed_dim))
        if attention != "space_only":
            self.time_embed = nn.Parameter(torch.empty(1, num_frames, embed_dim))
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, qkv_bias, attention == "divided_space_time", drop_path * i / max(depth - 1, 1))
            for i in range(depth)
        )
        self.norm = nn.LayerNorm(embed_dim, eps=LAYER_NORM_EPS)
        self.head = nn.Linear(embed_dim, num_classes)
        # Linear layers keep torch's initialisation, whose spread follows their width: a fixed 0.02 starves a narrow
        # network. A zero temporal_fc, as PaddleVideo has, belongs to image weights: see pretrained.py, docs/demo.md.
        for embedding in (self.cls_token, self.pos_embed, *([] if attention == "space_only" else [self.time_embed])):
            nn.init.normal_(embedding, std=embed_init_std)

    def forward(self, clips: Tensor) -> Tensor:
        features = self.forward_features(clips)
        if _autocast_dtype(clips.device.type) is None:
            return self.head(features)
        with torch.autocast(clips.device.type, enabled=False):  # logits in bf16 tie for 1 clip in 100
            return self.head(features.to(self.head.weight.dtype))

    def forward_features(self, clips: Tensor) -> Tensor:
        """What the head sees, the class token after the last block and norm: [B, 3, T, S, S] -> [B, D]."""
        if clips.shape[1:] != self.input_shape:
            raise ValueError(f"clips are {tuple(clips.shape)}; expected [B, {', '.join(map(str, self.input_shape))}]")
        x = self.patch_embed(clips) + self.pos_embed[:, 1:, None]  # [B, N, T, D]
        cls = (self.cls_token + self.pos_embed[:, :1])[:, None].expand(x.shape[0], -1, -1, -1)  # [B, 1, 1, D]
        if self.attention == "space_only":  # every frame is a clip of its own
            cls = cls.repeat_interleave(x.shape[2], dim=0)
            x = x.transpose(1, 2).flatten(0, 1).unsqueeze(2)  # [B*T, N, 1, D]
        else:
            x = x + self.time_embed[:, None]
        if self.attention == "joint_space_time":  # every clip is one frame of N*T patches
            x = x.flatten(1, 2).unsqueeze(2)  # [B, N*T, 1, D]
        for block in self.blocks:
            if self.activation_checkpointing and torch.is_grad_enabled():
                cls, x = checkpoint(block, cls, x, use_reentrant=False)
            else:
                cls, x = block(cls, x)
        if self.attention == "space_only":
            cls = cls.unflatten(0, (clips.shape[0], -1)).mean(1)
        return self.norm(cls[:, 0, 0])


class PatchEmbed(nn.Module):
    """Clips [B, 3, T, S, S] -> patches [B, N, T, D], rows first."""

    def __init__(self, patch_size: int, embed_dim: int):
        super().__init__()
        self.patch_size = patch_size
        # A convolution whose stride is its size: one matrix product over the patches, written as that.
        self.proj = nn.Conv2d(3, embed_dim, patch_size, stride=patch_size)

    def forward(self, clips: Tensor) -> Tensor:
        p = self.patch_size
        x = clips.unflatten(4, (-1, p)).unflatten(3, (-1, p))  # [B, 3, T, rows, p, columns, p]
        x = x.permute(0, 3, 5, 2, 1, 4, 6).flatten(4)  # [B, rows, columns, T, 3*p*p]
        return linear(x.flatten(1, 2), self.proj.weight.flatten(1), self.proj.bias)


def multiply_adds(make: Callable[[], TimeSformer]) -> int:
    """Of one clip's forward pass of the network that `make` builds, with the products of attention; nothing is
    computed."""
    with torch.device("meta"):
        network = make().eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(torch.empty(1, *network.input_shape))
    return counter.get_total_flops() // 2


class Block(nn.Module):
    """Attention over time (where `divided`), attention over space, MLP; each a residual branch."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool, divided: bool, drop_path: float):
        super().__init__()
        self.drop_path = drop_path
        self.temporal_attn = None
        if divided:
            self.temporal_norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
            self.temporal_attn = SelfAttention(dim, num_heads, qkv_bias)
            self.temporal_fc = nn.Linear(dim, dim)
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.attn = SelfAttention(dim, num_heads, qkv_bias)
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(dim)

    def forward(self, cls: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Class token [B, 1, 1, D] and patches [B, N, T, D] -> the same."""
        batch, num_patches, num_frames, _ = x.shape
        if self.temporal_attn is not None:
            # Section 3.3, equation 10: every patch sees the patches at its place in the other frames.
            over_time = self.temporal_attn.attend(_normed(self.temporal_norm1, x).flatten(0, 1).unsqueeze(2))
            x = x + self._project_over_time(over_time.view(x.shape), self._keep(x, batch, num_patches, 1, 1))
        # Equation 11: every patch sees the patches of its frame and the class token; each frame has a copy of that
        # token, and the copies are averaged afterwards.
        frames = torch.cat([cls.expand(-1, -1, num_frames, -1), x], dim=1)  # [B, 1+N, T, D]
        over_space = _scale(self.attn(_normed(self.norm1, frames)), self._keep(x, batch, 1, num_frames, 1))
        cls_change, x_change = over_space.split([1, num_patches], dim=1)
        cls, x = cls + cls_change.mean(2, keepdim=True), x + x_change
        # The class token apart: no backward pass is then made for the last block's patches, which no loss sees.
        keep = self._keep(x, batch, 1, 1, 1)
        cls_change, x_change = self.mlp(_normed(self.norm2, cls), _normed(self.norm2, x))
        return cls + _scale(cls_change, keep), x + _scale(x_change, keep)

    def _project_over_time(self, x: Tensor, keep: Tensor | None) -> Tensor:
        inner, outer = self.temporal_attn.proj, self.temporal_fc
        if not self.training:
            return outer(inner(x))
        # Two products in a row: one with their product saves 4 % of a training step, and what lies between them.
        bias = linear(inner.bias, outer.weight, outer.bias if keep is None else None)
        x = linear(x, outer.weight @ inner.weight, bias)
        return x if keep is None else x * keep + outer.bias

    def _keep(self, like: Tensor, *shape: int) -> Tensor | None:
        """Drop path: 0 with probability `drop_path`, else 1 / (1 - drop_path); drawn for each entry of `shape`."""
        if not self.training or not self.drop_path:
            return None
        keep = 1 - self.drop_path
        return like.new_empty(shape).bernoulli_(keep) / keep


def _scale(branch: Tensor, keep: Tensor | None) -> Tensor:
    return branch if keep is None else branch * keep


def _normed(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """In the type that products take it in: cast once, not by autocast for each of three products."""
    return norm(x).to(_autocast_dtype(x.device.type) or x.dtype)


class SelfAttention(nn.Module):
    """Multi-head self-attention over dimension 1 of [B, L, T, D]: each of the T frames by itself."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.attend(x))

    def attend(self, x: Tensor) -> Tensor:
        """What the heads find, before the projection. Queries, keys and values are made apart, so that frame and head
        are neighbours in memory: frames become heads as a view, and no copy brings a frame's patches together."""
        biases = (None,) * 3 if self.qkv.bias is None else self.qkv.bias.chunk(3)
        heads = x.shape[2] * self.num_heads
        q, k, v = (
            linear(x, weight, bias).flatten(2).unflatten(2, (heads, -1)).transpose(1, 2)  # [B, T*H, L, D/H]
            for weight, bias in zip(self.qkv.weight.chunk(3), biases, strict=True)
        )
        return _attend(q, k, v).transpose(1, 2).reshape(x.shape)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention over dimension 2 of [B, H, L, D/H].

    CUDA's kernels have B and H at most 65,535: over time B is clips times patches, over space H is frames times heads.
    """
    if not (q.is_cpu and q.dtype == torch.bfloat16 and torch.is_grad_enabled()):
        return scaled_dot_product_attention(q, k, v)
    # The CPU's fused kernel takes 1.9 times as long in bf16 training: 65 ms against 34, two clips, one block.
    together = [each.flatten(0, 1) for each in (q, k, v)]  # [B*H, L, D/H]
    is_short = q.shape[2] <= q.shape[3]  # then the weights are no larger than what they come from, and are kept
    out = _attend_by_products(*together) if is_short else _recomputed(_attend_by_products, *together)
    return out.unflatten(0, q.shape[:2])


def _attend_by_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.baddbmm(q.new_empty(1, 1, 1), q, k.transpose(1, 2), beta=0, alpha=q.shape[2] ** -0.5)
    return scores.softmax(2) @ v


def _recomputed(function: Callable, *inputs: Tensor) -> Any:
    """function(*inputs), which keeps only its inputs, and in backward is run again up to its last product."""
    if not torch.is_grad_enabled():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


def _autocast_dtype(device: str) -> torch.dtype | None:
    """None without autocast, which some devices (meta) do not have."""
    enabled = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if enabled else None


class Mlp(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, *tokens: Tensor) -> tuple[Tensor, ...]:
        """Each [..., D] -> [..., D]."""
        return _recomputed(self._contract, *map(self.fc1, tokens))

    def _contract(self, *hidden: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.fc2(gelu(each)) for each in hidden)  # GELU's result is a sixth of a block's memory
