"""TimeSformer: a vision transformer that attends over time and space in turn.

Bertasius, Wang, Torresani: Is Space-Time Attention All You Need for Video Understanding? (2021); section numbers below
are theirs. PP-TimeSformer is the same network with other data and other initial weights (PaddleVideo, vit_tweaks.py).
Parameters carry the names of timm's ViT, as they do in the published weights.

Shapes: B clips, T frames, N patches a frame, D channels, H heads.
"""

from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention

Attention = Literal["divided_space_time", "joint_space_time", "space_only"]

_LAYER_NORM_EPS = 1e-6  # PaddleVideo pptimesformer_k400_videos.yaml
_MLP_RATIO = 4


class TimeSformer(nn.Module):
    """Clips [B, 3, T, S, S] -> logits [B, num_classes].

    num_frames, image_size, patch_size: T, S and the side of a patch in pixels; S must be a multiple of it.
    qkv_bias: False in PP-TimeSformer (its ImageNet-21K weights have none), True in the original.
    attention: "divided_space_time" (section 3.3, the one with published weights), "joint_space_time" (every patch sees
        every other), or "space_only" (frames are an unordered set; their results are averaged).
    drop_path: chance to leave out a residual branch, rising linearly from 0 in the first block to this in the last.
    embed_init_std: spread of the class token, position and time embeddings at initialisation. 0.02 suits fine-tuning of
        pretrained weights; a small network trained from scratch learns the order of frames only with more.
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
        self.norm = nn.LayerNorm(embed_dim, eps=_LAYER_NORM_EPS)
        self.head = nn.Linear(embed_dim, num_classes)
        # Linear layers keep torch's initialisation, whose spread follows their width (0.02 at 768 channels): a fixed
        # 0.02 starves a narrow network. PaddleVideo also starts temporal_fc at zero; that belongs to loading image
        # weights, where time must begin as no change. From scratch it only delays learning: docs/demo.md.
        for embedding in (self.cls_token, self.pos_embed, *([] if attention == "space_only" else [self.time_embed])):
            nn.init.normal_(embedding, std=embed_init_std)

    def forward(self, clips: Tensor) -> Tensor:
        features = self.forward_features(clips)
        with torch.autocast(features.device.type, enabled=False):  # logits in bf16 tie for 1 clip in 100
            return self.head(features.to(self.head.weight.dtype))

    def forward_features(self, clips: Tensor) -> Tensor:
        """The class token after the last block: [B, 3, T, S, S] -> [B, D]."""
        if clips.shape[1:] != self.input_shape:
            raise ValueError(f"clips are {tuple(clips.shape)}; expected [B, {', '.join(map(str, self.input_shape))}]")
        x = self.patch_embed(clips) + self.pos_embed[:, 1:, None]  # [B, N, T, D]
        cls = (self.cls_token + self.pos_embed[:, :1])[:, None].expand(len(x), -1, -1, -1)  # [B, 1, 1, D]
        num_clips, _, num_frames, _ = x.shape
        if self.attention == "space_only":  # every frame is a clip of its own
            x = x.transpose(1, 2).flatten(0, 1).unsqueeze(2)  # [B*T, N, 1, D]
            cls = cls.repeat_interleave(num_frames, dim=0)
        else:
            x = x + self.time_embed[:, None]
        if self.attention == "joint_space_time":  # every clip is one frame of N*T patches
            x = x.flatten(1, 2).unsqueeze(2)  # [B, N*T, 1, D]
        for block in self.blocks:
            cls, x = block(cls, x)
        if self.attention == "space_only":
            cls = cls.unflatten(0, (num_clips, num_frames)).mean(1)
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


class Block(nn.Module):
    """Attention over time (where `divided`), attention over space, MLP; each a residual branch."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool, divided: bool, drop_path: float):
        super().__init__()
        self.drop_path = drop_path
        self.temporal_attn = None
        if divided:
            self.temporal_norm1 = nn.LayerNorm(dim, eps=_LAYER_NORM_EPS)
            self.temporal_attn = SelfAttention(dim, num_heads, qkv_bias)
            self.temporal_fc = nn.Linear(dim, dim)
        self.norm1 = nn.LayerNorm(dim, eps=_LAYER_NORM_EPS)
        self.attn = SelfAttention(dim, num_heads, qkv_bias)
        self.norm2 = nn.LayerNorm(dim, eps=_LAYER_NORM_EPS)
        self.mlp = Mlp(dim)

    def forward(self, cls: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Class token [B, 1, 1, D] and patches [B, N, T, D] -> the same."""
        batch, num_patches, num_frames, _ = x.shape
        if self.temporal_attn is not None:
            # Section 3.3, equation 10: every patch sees the patches at its place in the other frames.
            over_time = self.temporal_attn(self.temporal_norm1(x).flatten(0, 1)).unflatten(0, (batch, num_patches))
            x = x + self.temporal_fc(over_time * self._keep(x, batch, num_patches, 1, 1))
        # Equation 11: every patch sees the patches of its frame and the class token; each frame has a copy of that
        # token, and the copies are averaged afterwards.
        frames = torch.cat([cls.expand(-1, -1, num_frames, -1), x], dim=1)  # [B, 1+N, T, D]
        over_space = self.attn.within_frames(self.norm1(frames)) * self._keep(x, batch, 1, num_frames, 1)
        cls, x = cls + over_space[:, :1].mean(2, keepdim=True), x + over_space[:, 1:]
        keep = self._keep(x, batch, 1, 1, 1)
        cls, x = cls + self.mlp(self.norm2(cls)) * keep, x + self.mlp(self.norm2(x)) * keep
        return cls, x

    def _keep(self, like: Tensor, *shape: int) -> Tensor | float:
        """Drop path: 0 with probability `drop_path`, else 1 / (1 - drop_path); drawn for each entry of `shape`."""
        if not self.training or not self.drop_path:
            return 1.0
        keep = 1 - self.drop_path
        return like.new_empty(shape).bernoulli_(keep) / keep


class SelfAttention(nn.Module):
    """Multi-head self-attention over dimension 1."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, D] -> [B, L, D]"""
        return self.within_frames(x.unsqueeze(2)).squeeze(2)

    def within_frames(self, x: Tensor) -> Tensor:
        """[B, L, T, D] -> [B, L, T, D]: each of the T frames by itself.

        Queries, keys and values are projected apart, so that frame and head are neighbours in memory: frames become
        heads as a view, and nothing is copied to bring a frame's patches together.
        """
        biases = (None,) * 3 if self.qkv.bias is None else self.qkv.bias.chunk(3)
        heads = x.shape[2] * self.num_heads
        q, k, v = (
            linear(x, weight, bias).flatten(2).unflatten(2, (heads, -1)).transpose(1, 2)  # [B, T*H, L, D/H]
            for weight, bias in zip(self.qkv.weight.chunk(3), biases, strict=True)
        )
        out = scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(x.shape))


class Mlp(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, _MLP_RATIO * dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(_MLP_RATIO * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))
