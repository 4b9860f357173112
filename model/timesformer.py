"""TimeSformer: a vision transformer that alternates attention over time and space.

Bertasius, Wang, Torresani: Is Space-Time Attention All You Need for Video Understanding? (2021); section numbers below
are theirs. PP-TimeSformer is the same network with other data and initial weights (PaddleVideo, vit_tweaks.py).
Parameters are named as in timm's ViT and the published weights.

Shapes: B clips, T frames, N patches per frame, D channels. kernels.py computes attention and MLP on each device,
attention_types.py defines which patches attend to each other.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from model.attention_types import ATTENTION_TYPES
from model.kernels import autocast_dtype, kernels_for

LAYER_NORM_EPS = 1e-6  # PaddleVideo pptimesformer_k400_videos.yaml


class TimeSformer(nn.Module):
    """Clips [B, 3, T, S, S] -> logits [B, num_classes].

    num_frames, image_size, patch_size: T, S and the side of a patch in pixels; S must be a multiple of it.
    qkv_bias: False in PP-TimeSformer (its ImageNet-21K weights have none), True in the original.
    attention: a key of `ATTENTION_TYPES`.
    drop_path: probability of skipping a residual branch, rising linearly from 0 in the first block to this in the last.
    embed_init_std: standard deviation of the class token, position and time embeddings at initialisation. 0.02 suits
        fine-tuning of pretrained weights; a small network trained from scratch needs more to learn the order of frames.
    activation_checkpointing: an attribute, for long clips: training keeps only the input of a block, and runs it twice.
    frozen_blocks: an attribute, the number of first blocks that `freeze` has frozen.

    Raises `ValueError` for settings that do not fit together.
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
        attention: str = "divided_space_time",
        drop_path: float = 0.1,
        embed_init_std: float = 0.02,
    ):
        super().__init__()
        if image_size % patch_size:
            raise ValueError(f"image_size {image_size} is not a multiple of patch_size {patch_size}")
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim {embed_dim} is not a multiple of num_heads {num_heads}")
        if attention not in ATTENTION_TYPES:
            raise ValueError(f"attention is {attention!r}; expected one of {', '.join(ATTENTION_TYPES)}")
        self.attention = attention
        self.attention_type = ATTENTION_TYPES[attention]
        self.num_heads = num_heads
        self.drop_path = drop_path
        self.activation_checkpointing = False
        self.frozen_blocks = 0
        self.input_shape = (3, num_frames, image_size, image_size)
        self.patch_embed = PatchEmbed(patch_size, embed_dim)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + (image_size // patch_size) ** 2, embed_dim))
        if self.attention_type.has_time_embedding:
            self.time_embed = nn.Parameter(torch.empty(1, num_frames, embed_dim))
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, qkv_bias, over_time=self.attention_type.over_time, is_last=number == depth)
            for number in range(1, depth + 1)
        )
        self.norm = nn.LayerNorm(embed_dim, eps=LAYER_NORM_EPS)
        self.head = nn.Linear(embed_dim, num_classes)
        # Linear layers keep torch's initialisation, which scales with their width: a fixed 0.02 is too small for a
        # narrow network. PaddleVideo's zero temporal_fc is for image weights: see pretrained.py, docs/quickstart.md.
        time_embedding = [self.time_embed] if self.attention_type.has_time_embedding else []
        for embedding in (self.cls_token, self.pos_embed, *time_embedding):
            if not embedding.is_meta:  # for meta tensors, torch would import its compiler, which takes seconds
                nn.init.normal_(embedding, std=embed_init_std)

    def freeze(self, num_blocks: int) -> None:
        """Exclude the embeddings and the first `num_blocks` blocks from training, for fine-tuning. They need no
        gradients, and drop no paths. Raises `ValueError` if there are fewer blocks."""
        if not 0 <= num_blocks <= len(self.blocks):
            raise ValueError(f"num_blocks is {num_blocks}; expected 0 to {len(self.blocks)}")
        self.frozen_blocks = num_blocks
        trained = ("head.", "norm.", *(f"blocks.{index}." for index in range(num_blocks, len(self.blocks))))
        for name, value in self.named_parameters():
            value.requires_grad_(name.startswith(trained))

    def forward(self, clips: Tensor) -> Tensor:
        """Clips [B, 3, T, S, S] -> logits [B, K]. Autocast does not apply to the head."""
        features = self.forward_features(clips)
        logits: Tensor
        if autocast_dtype(clips.device) is None:
            logits = self.head(features)
        else:
            with torch.autocast(clips.device.type, enabled=False):  # logits in bf16 tie for 1 clip in 100
                logits = self.head(features.to(self.head.weight.dtype))
        return logits

    def forward_features(self, clips: Tensor) -> Tensor:
        """The head's input, the class token after the last block and norm: [B, 3, T, S, S] -> [B, D].
        Raises `ValueError` for clips of another shape."""
        if clips.shape[1:] != self.input_shape:
            raise ValueError(f"clips are {tuple(clips.shape)}; expected [B, {', '.join(map(str, self.input_shape))}]")
        x = self.patch_embed(clips) + self.pos_embed[:, 1:, None]  # [B, N, T, D]
        cls = (self.cls_token + self.pos_embed[:, :1])[:, None].expand(x.shape[0], -1, -1, -1)  # [B, 1, 1, D]
        if self.attention_type.has_time_embedding:
            x = x + self.time_embed[:, None]
        cls, x = self.attention_type.arrange(cls, x)
        for block, keep in zip(self.blocks, self._draw_paths(x), strict=True):
            if self.activation_checkpointing and torch.is_grad_enabled():
                cls, x = checkpoint(block, cls, x, keep, use_reentrant=False, preserve_rng_state=False)
            else:
                cls, x = block(cls, x, keep)
        features: Tensor = self.norm(self.attention_type.pool(cls, clips.shape[0])[:, 0, 0])
        return features

    def _draw_paths(self, x: Tensor) -> "list[Paths | None]":
        """Draws the drop path of every block, for patches [B, N, T, D], in float32. None: nothing is dropped,
        as in frozen blocks."""
        batch, num_patches, num_frames, _ = x.shape
        depth = len(self.blocks)
        if not self.training or not self.drop_path or depth == 1:
            return [None] * depth
        keep = 1 - torch.linspace(0, self.drop_path, depth, device=x.device)[1:, None, None]
        drawn = torch.rand(depth - 1, batch, num_patches + num_frames + 1, device=x.device) < keep
        time, space, mlp = (drawn / keep).split([num_patches, num_frames, 1], dim=2)
        each_block = zip(time[:, :, :, None, None], space[:, :, None, :, None], mlp[:, :, :, None, None], strict=True)
        paths = [None, *(Paths(*each) for each in each_block)]
        return [None if index < self.frozen_blocks else each for index, each in enumerate(paths)]


class Paths(NamedTuple):
    """The factors of a block's residual branches under drop path: 0, or 1 / (1 - rate)."""

    time: Tensor
    """[B, N, 1, 1]"""
    space: Tensor
    """[B, 1, T, 1]"""
    mlp: Tensor
    """[B, 1, 1, 1]"""


class PatchEmbed(nn.Module):
    """Clips [B, 3, T, S, S] -> patches [B, N, T, D], in row-major order."""

    def __init__(self, patch_size: int, embed_dim: int):
        super().__init__()
        self.patch_size = patch_size
        # With a stride equal to its size, the convolution is one matrix product over the patches: see `forward`.
        self.proj = nn.Conv2d(3, embed_dim, patch_size, stride=patch_size)

    def forward(self, clips: Tensor) -> Tensor:
        """Clips [B, 3, T, S, S] -> patches [B, N, T, D]."""
        p = self.patch_size
        x = clips.unflatten(4, (-1, p)).unflatten(3, (-1, p))  # [B, 3, T, rows, p, columns, p]
        x = x.permute(0, 3, 5, 2, 1, 4, 6).flatten(4)  # [B, rows, columns, T, 3*p*p]
        return linear(x.flatten(1, 2), self.proj.weight.flatten(1), self.proj.bias)


def multiply_adds(make: Callable[[], TimeSformer]) -> int:
    """The number of multiply-adds, including attention, in the forward pass of one clip through the network that `make`
    builds. Nothing is actually computed."""
    with torch.device("meta"):
        network = make().eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(torch.empty(1, *network.input_shape))
    return int(counter.get_total_flops()) // 2


class Block(nn.Module):
    """Attention over time (if `over_time`), attention over space, MLP; each is a residual branch. Nothing uses the
    patches after the last block, so the last block computes only what the class token needs."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool, *, over_time: bool, is_last: bool):
        super().__init__()
        self.is_last = is_last
        self.temporal_attn: SelfAttention | None = None
        if over_time:
            self.temporal_norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
            self.temporal_attn = SelfAttention(dim, num_heads, qkv_bias)
            self.temporal_fc = nn.Linear(dim, dim)
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.attn = SelfAttention(dim, num_heads, qkv_bias)
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(dim)

    def forward(self, cls: Tensor, x: Tensor, paths: Paths | None) -> tuple[Tensor, Tensor]:
        """Class token [B, 1, 1, D] and patches [B, N, T, D] -> the same; the last block leaves patches unfinished."""
        if self.temporal_attn is not None:
            x = x + self._over_time(self.temporal_attn, x, paths)
        # Equation 11: every patch attends to the patches of its frame and the class token; each frame has its own copy
        # of that token, and the copies are averaged afterwards.
        frames = torch.cat([cls.expand(-1, -1, x.shape[2], -1), x], dim=1)  # [B, 1+N, T, D]
        change = self.attn(self.norm1(frames), queries=1 if self.is_last else None)
        if paths is not None:
            change = change * paths.space
        cls = cls + change[:, :1].mean(2, keepdim=True)
        tokens = (cls,) if self.is_last else (cls, x + change[:, 1:])
        changes = self.mlp(self.norm2, *tokens)
        if paths is not None:
            changes = tuple(each * paths.mlp for each in changes)
        cls, *patches = [token + each for token, each in zip(tokens, changes, strict=True)]
        return cls, patches[0] if patches else x

    def _over_time(self, attention: "SelfAttention", x: Tensor, paths: Paths | None) -> Tensor:
        """Section 3.3, equation 10: every patch attends to the patches at its position in the other frames."""
        inner, outer = attention.proj, self.temporal_fc
        sequences = self.temporal_norm1(x).flatten(0, 1).unsqueeze(2)  # [B*N, T, 1, D]
        change: Tensor
        if not self.training:
            change = attention(sequences, lambda heads: outer(inner(heads))).view(x.shape)
            return change
        # Replacing two successive products by one with the combined weight saves 4 % of a training step, and the memory
        # of the intermediate result.
        weight = outer.weight @ inner.weight
        bias = linear(inner.bias, outer.weight, outer.bias if paths is None else None)
        change = attention(sequences, lambda heads: linear(heads, weight, bias)).view(x.shape)
        return change if paths is None else change * paths.time + outer.bias


class SelfAttention(nn.Module):
    """Multi-head self-attention over dimension 1 of [B, L, T, D], within each of the T frames."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(
        self, x: Tensor, project: Callable[[Tensor], Tensor] | None = None, *, queries: int | None = None
    ) -> Tensor:
        """Attention over x [B, L, T, D]. project: applied to the output of the heads instead of `proj`. queries: only
        the first this many tokens attend, and the result has as many; default: all L."""
        project = self.proj if project is None else project
        return kernels_for(x).attention(x, self.qkv, self.num_heads, project, queries)


class Mlp(nn.Module):
    """Two linear layers with GELU between them; the hidden layer is four times as wide."""

    def __init__(self, dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, norm: nn.LayerNorm, *tokens: Tensor) -> tuple[Tensor, ...]:
        """The MLP of norm(tokens), each [B, L, T, D] -> [B, L, T, D]."""
        return kernels_for(tokens[0]).mlp(norm, self.fc1, self.fc2, *tokens)
