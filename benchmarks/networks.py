"""The networks to time: ours, Hugging Face's and PaddleVideo's, with the same weights and clips."""

import contextlib
import importlib.metadata
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from model import TimeSformer
from model.pretrained import from_hugging_face
from model.torchvision import let_torchvision_load

SIZES = {  # channels, blocks, heads
    "base": (768, 12, 12),
    "small": (384, 12, 6),
    "tiny": (48, 2, 3),
}
PATCH_SIZE = 16
OURS = "ours"
COMPILED = "ours compiled"
PEERS = ("huggingface eager", "huggingface sdpa")
PRECISIONS = {"float32": torch.float32, "bf16": torch.bfloat16}
_CLASSES = 400
M = TypeVar("M", bound=nn.Module)


class NetworkWork(NamedTuple):
    """Clips [batch_size, 3, num_frames, image_size, image_size] for a network of `size`."""

    size: str
    batch_size: int
    num_frames: int
    image_size: int
    device: str

    def network(self) -> TimeSformer:
        """Our network, with the same weights in every process and without drop path, which is random."""
        dim, depth, heads = SIZES[self.size]
        torch.manual_seed(0)
        return TimeSformer(
            num_frames=self.num_frames,
            image_size=self.image_size,
            num_classes=_CLASSES,
            embed_dim=dim,
            depth=depth,
            num_heads=heads,
            patch_size=PATCH_SIZE,
            drop_path=0.0,
        ).train()

    def clips(self) -> Tensor:
        """Random clips, the same in every process."""
        shape = (self.batch_size, 3, self.num_frames, self.image_size, self.image_size)
        return torch.randn(shape, generator=torch.Generator().manual_seed(1))


class NetworkContestant(Protocol):
    """A network with the clips of a `NetworkWork`."""

    @property
    def precisions(self) -> Sequence[str]:
        """The members of `PRECISIONS` that it supports."""

    def logits(self) -> Tensor:
        """Logits of the clips in float32, [B, classes]."""

    def forward(self, precision: str) -> None:
        """Runs a forward pass."""

    def training(self, precision: str) -> None:
        """Runs a forward and a backward pass."""


class TorchContestant(NetworkContestant, Generic[M]):
    """A PyTorch module that maps `clips` to logits."""

    precisions = tuple(PRECISIONS)

    def __init__(self, module: M, clips: Tensor, work: NetworkWork):
        self.module, self.clips, self.device = module.to(work.device), clips.to(work.device), work.device

    def logits(self) -> Tensor:
        """Logits [B, K], float32 on the CPU."""
        with torch.no_grad():
            return self._run().float().cpu()

    def forward(self, precision: str) -> None:
        """One forward pass without gradients."""
        with torch.no_grad():
            self._run(precision)

    def training(self, precision: str) -> None:
        """One forward and backward pass."""
        self.module.zero_grad(set_to_none=False)
        self._run(precision).float().square().sum().backward()

    def _run(self, precision: str = "float32") -> Tensor:
        with torch.autocast(self.device, PRECISIONS[precision], enabled=precision != "float32"):
            result = self.module(self.clips)
        return getattr(result, "logits", result)


def ours(work: NetworkWork, *, compiled: bool = False, checkpointing: bool = False) -> TorchContestant[TimeSformer]:
    """Our network."""
    network = work.network()
    network.activation_checkpointing = checkpointing
    if compiled:
        network.compile(fullgraph=True)
    return TorchContestant(network, work.clips(), work)


def hugging_face(work: NetworkWork, *, fused: bool) -> TorchContestant[nn.Module]:
    """Hugging Face's TimeSformer with our weights; `fused`: with PyTorch's fused attention."""
    let_torchvision_load()
    from transformers import TimesformerConfig, TimesformerForVideoClassification

    dim, depth, heads = SIZES[work.size]
    config = TimesformerConfig(
        image_size=work.image_size,
        num_frames=work.num_frames,
        hidden_size=dim,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=4 * dim,
        qkv_bias=False,
    )
    config.num_labels = _CLASSES
    network = TimesformerForVideoClassification(config).train()
    ours = work.network().state_dict()
    network.load_state_dict({name: ours[from_hugging_face(name)] for name in network.state_dict()})
    if fused:
        for layer in network.timesformer.encoder.layer:
            for attention in (layer.attention.attention, layer.temporal_attention.attention):
                attention.forward = partial(_fused_attention, attention)
    return TorchContestant(network, work.clips().transpose(1, 2).contiguous(), work)  # [B, T, 3, S, S]


def _fused_attention(module: Any, hidden_states: Tensor, output_attentions: bool = False) -> tuple[Tensor]:
    q, k, v = module.qkv(hidden_states).unflatten(2, (3, module.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind()
    return (scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2),)


class PaddleContestant(NetworkContestant):
    """PaddleVideo's formulation (vit_tweaks.py) in Paddle: tokens [B, 1+N*T, D], copied into another order
    for each attention; softmax attention as two products."""

    precisions = ("float32",)  # Paddle's auto_cast does nothing on a CPU

    def __init__(self, work: NetworkWork):
        os.environ.setdefault("FLAGS_paddle_num_threads", str(torch.get_num_threads()))
        import paddle

        self.paddle, self.work = paddle, work
        paddle.set_device("cpu")
        self.heads = SIZES[work.size][2]
        self.clips = paddle.to_tensor(work.clips().numpy())
        self.weights = {}
        for name, value in work.network().state_dict().items():
            value = value.T if value.ndim == 2 else value  # Paddle's Linear is [in, out]
            self.weights[name] = paddle.to_tensor(value.contiguous().numpy(), stop_gradient=False)

    def logits(self) -> Tensor:
        """Logits [B, K], float32 on the CPU."""
        with self.paddle.no_grad():
            return torch.from_numpy(self._run().numpy())

    def forward(self, precision: str) -> None:
        """One forward pass without gradients."""
        with self.paddle.no_grad():
            self._run().numpy()

    def training(self, precision: str) -> None:
        """One forward and backward pass."""
        for weight in self.weights.values():
            weight.clear_gradient(True)
        self._run().square().sum().backward()

    def _linear(self, x: Any, name: str) -> Any:
        return self.paddle.nn.functional.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def _norm(self, x: Any, name: str) -> Any:
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return self.paddle.nn.functional.layer_norm(x, weight.shape, weight, bias, 1e-6)

    def _attention(self, x: Any, name: str) -> Any:
        length, dim = x.shape[1:]
        qkv = self._linear(x, f"{name}.qkv").reshape([-1, length, 3, self.heads, dim // self.heads])
        q, k, v = qkv.transpose([2, 0, 3, 1, 4]).unbind(0)
        weights = self.paddle.nn.functional.softmax(q.matmul(k, transpose_y=True) * (dim // self.heads) ** -0.5)
        return self._linear(weights.matmul(v).transpose([0, 2, 1, 3]).reshape([-1, length, dim]), f"{name}.proj")

    def _run(self) -> Any:
        concat, weights = self.paddle.concat, self.weights
        num_clips, _, frames, side, _ = self.clips.shape
        pixels = self.clips.transpose([0, 2, 1, 3, 4]).reshape([-1, 3, side, side])
        kernel, bias = weights["patch_embed.proj.weight"], weights["patch_embed.proj.bias"]
        x = self.paddle.nn.functional.conv2d(pixels, kernel, bias, stride=kernel.shape[-1])
        x = x.flatten(2).transpose([0, 2, 1])  # [B*T, N, D]
        patches, dim = x.shape[1:]
        x = x.reshape([num_clips, frames, patches, dim]).transpose([0, 2, 1, 3])
        x = x + weights["pos_embed"][:, 1:].unsqueeze(2) + weights["time_embed"].unsqueeze(1)
        cls = (weights["cls_token"] + weights["pos_embed"][:, :1]).expand([num_clips, 1, dim])
        x = concat([cls, x.reshape([num_clips, -1, dim])], 1)
        for n in range(SIZES[self.work.size][1]):
            block = f"blocks.{n}."
            over_time = self._norm(x[:, 1:].reshape([-1, frames, dim]), block + "temporal_norm1")
            over_time = self._attention(over_time, block + "temporal_attn").reshape([num_clips, -1, dim])
            cls, tokens = x[:, :1], x[:, 1:] + self._linear(over_time, block + "temporal_fc")
            copies = cls.tile([1, frames, 1]).reshape([-1, 1, dim])
            places = tokens.reshape([num_clips, patches, frames, dim]).transpose([0, 2, 1, 3])
            sequence = concat([copies, places.reshape([-1, patches, dim])], 1)  # [B*T, 1+N, D]
            change = self._attention(self._norm(sequence, block + "norm1"), block + "attn")
            cls_change = change[:, 0].reshape([num_clips, frames, dim]).mean(1, keepdim=True)
            change = change[:, 1:].reshape([num_clips, frames, patches, dim]).transpose([0, 2, 1, 3])
            x = concat([cls, tokens], 1) + concat([cls_change, change.reshape([num_clips, -1, dim])], 1)
            hidden = self.paddle.nn.functional.gelu(self._linear(self._norm(x, block + "norm2"), block + "mlp.fc1"))
            x = x + self._linear(hidden, block + "mlp.fc2")
        return self._linear(self._norm(x, "norm")[:, 0], "head")


CONTESTANTS: dict[str, Callable[[NetworkWork], NetworkContestant]] = {
    OURS: ours,
    COMPILED: partial(ours, compiled=True),
    "ours checkpointed": partial(ours, checkpointing=True),
    PEERS[0]: partial(hugging_face, fused=False),
    PEERS[1]: partial(hugging_face, fused=True),
    "paddle": PaddleContestant,
}


def peer_versions() -> dict[str, str]:
    """Versions of the installed peers."""
    found = {}
    for package in ("transformers", "paddlepaddle"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found
