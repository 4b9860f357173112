"""Third-party weights: the logits of their libraries, and every difference reported or refused."""

import argparse
import collections
import contextlib
import http.server
import json
import os
import pickle
import resource
import struct
import threading
import zipfile
from typing import ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from model import TimeSformer, WeightsError, load_pretrained
from model.pdparams import read_pdparams
from tests.conftest import DATA

SIZES = dict(embed_dim=24, depth=2, num_heads=3)
KINDS = ["divided_space_time", "joint_space_time", "space_only"]


def network(*, num_frames=4, image_size=32, num_classes=5, **changes):
    return TimeSformer(
        num_frames=num_frames, image_size=image_size, num_classes=num_classes, **(SIZES | changes)
    ).eval()


def scatter(module, seed=0):
    """Random numbers in every parameter, so that none is hidden by a zero or a one."""
    torch.manual_seed(seed)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return module.eval()


# -- PaddleVideo --


def golden_network(**changes):
    return network(**(dict(num_frames=4, image_size=64, num_classes=11, embed_dim=48, depth=3, num_heads=3) | changes))


def test_paddlevideos_logits_and_three_view_probabilities():
    model = golden_network()
    report = load_pretrained(model, DATA / "tiny.pdparams")
    assert report.origin == "PaddleVideo" and sorted(report.loaded) == sorted(model.state_dict())
    assert not (report.adapted or report.initial or report.left_out)
    golden = {key: torch.from_numpy(value) for key, value in np.load(DATA / "tiny.npz").items()}
    with torch.no_grad():
        torch.testing.assert_close(model(golden["clip"]), golden["logits"], atol=1e-5, rtol=0)
        views = golden["views"].unflatten(2, (3, 4)).transpose(1, 2).flatten(0, 1)  # [3, 3, 4, 64, 64]
        torch.testing.assert_close(model(views).softmax(1).mean(0), golden["view_probs"][0], atol=1e-6, rtol=0)


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_pdparams_of_every_pickle_protocol(tmp_path, protocol):
    state = scatter(network()).state_dict()
    # Linear weights are [in, out], the head is `head.fc`; some versions name a tensor beside its numbers.
    theirs = {}
    for number, (name, value) in enumerate(state.items()):
        array = (value.T if value.ndim == 2 else value).numpy().copy(order="KAC"[number % 3])
        name = name.replace("head.", "head.fc.") if name.startswith("head.") else f"backbone.{name}"
        theirs[name] = (f"linear_{number}.w_0", array) if number % 5 == 0 else array
    theirs["StructuredToParameterName@@"] = dict.fromkeys(theirs, "w")
    (tmp_path / "w.pdparams").write_bytes(pickle.dumps(theirs, protocol))
    model = network()
    load_pretrained(model, tmp_path / "w.pdparams")
    assert all((model.state_dict()[name] == value).all() for name, value in state.items())


class Calls:
    """An object whose pickle calls a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def crafted_array(dtype_state, array_state):
    """An array with a false dtype: numpy would take raw bytes for pointers to objects."""

    class Type:
        def __reduce__(self):
            return np.dtype, ("O8", False, True), dtype_state

    class Array:
        def __reduce__(self):
            make = np._core.multiarray._reconstruct
            return make, (np.ndarray, (0,), b"b"), (1, (1,), Type(), False, array_state)

    return Array()


OBJECT = (3, "|", None, None, None, 8, 8, 0)
MALICIOUS = {
    "system": Calls(os.system, "touch made"),
    "open": Calls(open, "made", "w"),
    "eval": Calls(eval, "open('made', 'w')"),
    "getattr": Calls(getattr, "text", "upper"),
    "numpy.load": Calls(np.load, "made.npy", None, True),
    "numpy.fromfile": Calls(np.fromfile, "made"),
    "memmap": Calls(np.memmap, "made", "u1", "w+", 0, (4,)),
    "partial": Calls(__import__("functools").partial, os.system, "touch made"),
    "pointers": crafted_array(OBJECT, b"\1" * 8),
    "objects": np.array([Calls(os.system, "touch made")], dtype=object),
    "structured": np.zeros(2, dtype=[("a", "f4")]),
    "text": np.array(["a", "b"]),
    "big endian": np.zeros(4, ">f4"),
}


@pytest.mark.parametrize("name", MALICIOUS)
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickle_that_wants_more_than_arrays_is_refused(tmp_path, monkeypatch, name, protocol):
    monkeypatch.chdir(tmp_path)
    for content in ({"backbone.cls_token": MALICIOUS[name]}, MALICIOUS[name], [MALICIOUS[name]]):
        (tmp_path / "w.pdparams").write_bytes(pickle.dumps(content, protocol))
        with pytest.raises(WeightsError, match="w.pdparams: not weights of PaddlePaddle, or damaged"):
            load_pretrained(network(), "w.pdparams")
    assert os.listdir(tmp_path) == ["w.pdparams"]


@pytest.mark.parametrize(
    "program",
    [
        b"cnumpy\ndtype\n(dS'__call__'\nS'x'\nsb.",
        b"cnumpy\ndtype\n(N(dS'_function'\nI1\nstb.",
        b"c_codecs\nencode\n(N(dS'__defaults__'\n(I1\ntstb.",
        b"cbuiltins\ntuple\n(N(dS'__call__'\nI1\nstb.",
    ],
)
def test_a_pickle_cannot_change_the_names_it_may_use(tmp_path, program):
    """BUILD sets attributes of any result of find_class and REDUCE; no change may persist."""
    (tmp_path / "w.pdparams").write_bytes(program)
    with pytest.raises(WeightsError, match=r"w.pdparams"):
        load_pretrained(network(), tmp_path / "w.pdparams")
    assert sorted(load_pretrained(golden_network(), DATA / "tiny.pdparams").loaded) == sorted(
        golden_network().state_dict()
    )


def doubled(depth):
    """Nested tuples, each with the same element twice: small to write, endless to walk through."""
    links = b"".join(
        b"0h" + bytes([n - 1]) + b"h" + bytes([n - 1]) + b"\x86q" + bytes([n]) for n in range(1, depth + 1)
    )
    return b")q\0" + links


BOMBS = {
    "memo": b"\x80\x02}r" + struct.pack("<I", 2**32 - 1) + b".",
    "key": b"\x80\x02" + doubled(60) + b"0}h" + bytes([60]) + b"Ns.",
    "byte order": b"\x80\x02"
    + doubled(60)
    + b"0cnumpy\ndtype\n(X\x02\0\0\0f4K\0K\x01tR(K\x03h"
    + bytes([60])
    + b"NNNK\0K\0K\0tb.",
    "long": b"\x80\x02}X\x01\0\0\0a\x8a\xff" + b"\x7f" * 255 + b"s.",
    "bytes": b"\x80\x04\x8e" + struct.pack("<Q", 2**50) + b"x.",
    "buffer": b"\x80\x05\x96" + struct.pack("<Q", 2**50) + b"x.",
    "extension": b"\x80\x02}\x82\x01s.",
    "persistent": b"\x80\x02}X\x01\0\0\0aPx\ns.",
    "deep": b"\x80\x02" + b"]" * 200000 + b"a" * 199999 + b".",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BOMBS)
def test_small_files_that_ask_for_much_memory(tmp_path, name):
    (tmp_path / "w.pdparams").write_bytes(BOMBS[name])
    with pytest.raises(WeightsError) as error:
        load_pretrained(network(), tmp_path / "w.pdparams")
    assert len(str(error.value)) < 500


def test_a_small_file_of_many_names_for_one_array_takes_no_more_memory(tmp_path):
    array = np.zeros(100_000, "f4")
    shared = {f"a{number}": array for number in range(300)}
    (tmp_path / "w.pdparams").write_bytes(pickle.dumps(shared, 2))
    tensors = read_pdparams(tmp_path / "w.pdparams")
    assert len({tensor.data_ptr() for tensor in tensors.values()}) == 1 and len(tensors) == 300


@pytest.mark.slow
@pytest.mark.parametrize(
    "content", [{5: "x"}, {(1, 2): "x"}, {None: "x"}, {b"a": "x"}, {"model": {"a": "x"}, "b": "x"}]
)
@pytest.mark.parametrize("suffix", ["pdparams", "pth"])
def test_names_that_are_not_strings_and_tensors_beside_the_model(tmp_path, content, suffix):
    def filled(value):
        array = np.zeros((2, 2), "f4") if suffix == "pdparams" else torch.zeros(2, 2)
        return {k: filled(v) for k, v in value.items()} if isinstance(value, dict) else array

    path = tmp_path / f"w.{suffix}"
    if suffix == "pth":
        torch.save(filled(content), path)
    else:
        path.write_bytes(pickle.dumps(filled(content), 2))
    with pytest.raises(WeightsError, match=f"w.{suffix}"):
        load_pretrained(network(), path)


@pytest.mark.parametrize("form", ["slices", "checkpoint", "bfloat16"])
def test_other_forms_of_pdparams(tmp_path, form):
    state = scatter(network()).state_dict()
    theirs = {name: (value.T if value.ndim == 2 else value).contiguous().numpy() for name, value in state.items()}
    if form == "slices":
        whole = theirs.pop("blocks.0.mlp.fc1.weight")
        first, second = np.split(whole.flatten(), [100])
        theirs |= {"blocks.0.mlp.fc1.weight@@.0": first, "blocks.0.mlp.fc1.weight@@.1": second}
        slices = ["blocks.0.mlp.fc1.weight@@.0", "blocks.0.mlp.fc1.weight@@.1"]
        theirs["UnpackBigParamInfor@@"] = {"blocks.0.mlp.fc1.weight": {"OriginShape": whole.shape, "slices": slices}}
    elif form == "checkpoint":
        theirs = {"model": collections.OrderedDict(theirs), "epoch": 3, "LR_Scheduler": {"last_lr": 0.1}}
    else:
        theirs["norm.bias"] = state["norm.bias"].bfloat16().view(torch.uint16).numpy()
        state["norm.bias"] = state["norm.bias"].bfloat16().float()
    (tmp_path / "w.pdparams").write_bytes(pickle.dumps(theirs, 2))
    model = network()
    load_pretrained(model, tmp_path / "w.pdparams")
    assert all((model.state_dict()[name] == value).all() for name, value in state.items())


@pytest.mark.slow
def test_damaged_pdparams_are_named_and_change_nothing(tmp_path):
    whole = (DATA / "tiny.pdparams").read_bytes()
    random = np.random.default_rng(0)
    model = golden_network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    refused = 0
    for case in range(200):
        content = bytearray(whole)
        if case % 2:
            content = content[: random.integers(len(whole))]
        else:
            content[random.integers(5000)] ^= 1 << random.integers(8)  # where the program is
        path = tmp_path / "w.pdparams"
        path.write_bytes(content)
        with contextlib.suppress(WeightsError):
            load_pretrained(model, path)
            model.load_state_dict(before)
            continue
        refused += 1
        assert all((value == before[name]).all() for name, value in model.state_dict().items())
    assert refused >= 100


# -- timm --


@pytest.fixture(scope="module")
def timm(torchvision_loads):
    return pytest.importorskip("timm")


def image_vit(timm, **changes):
    sizes = dict(embed_dim=24, depth=2, num_heads=3, img_size=32, num_classes=21) | changes
    return scatter(timm.create_model("vit_base_patch16_224_miil.in21k", pretrained=False, **sizes))


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
@pytest.mark.parametrize("num_frames", [1, 4])
def test_an_image_network_starts_as_itself_on_every_frame(timm, tmp_path, suffix, num_frames):
    vit = image_vit(timm)
    path = tmp_path / f"vit.{suffix}"
    (save_file if suffix == "safetensors" else torch.save)(vit.state_dict(), path)
    model = scatter(network(num_frames=num_frames), seed=1)
    report = load_pretrained(model, path)
    model.head = vit.head
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        logits = model(images.unsqueeze(2).expand(-1, -1, num_frames, -1, -1))
        torch.testing.assert_close(logits, vit(images), atol=1e-5, rtol=1e-5)
    assert report.initial == dict.fromkeys(
        ("head.weight", "head.bias"), "a new head: the file's 21 classes are image classes"
    )
    block = model.blocks[1]
    assert (block.temporal_attn.qkv.weight == vit.blocks[1].attn.qkv.weight).all()
    assert (block.temporal_norm1.bias == vit.blocks[1].norm1.bias).all()
    assert not block.temporal_fc.weight.any() and not block.temporal_fc.bias.any() and not model.time_embed.any()
    text = str(report)
    assert "adapted: blocks.*.temporal_fc.weight, blocks.*.temporal_fc.bias: zero" in text
    assert "blocks.*.temporal_norm1.weight" in text and "copied from the attention over space" in text
    assert sorted([*report.loaded, *report.adapted, *report.initial]) == sorted(model.state_dict())


def test_an_image_network_of_another_size_and_with_biases(timm, tmp_path):
    vit = scatter(timm.create_model("vit_tiny_patch16_224", img_size=48, embed_dim=24, depth=2, num_heads=3))
    torch.save(vit.state_dict(), tmp_path / "vit.pth")
    model = network(image_size=32, qkv_bias=True)
    report = load_pretrained(model, tmp_path / "vit.pth")
    assert report.adapted["pos_embed"] == "resized from 3 x 3 to 2 x 2 patches"
    assert (model.blocks[0].temporal_attn.qkv.bias == vit.blocks[0].attn.qkv.bias).all()
    with pytest.raises(WeightsError, match="keys and values have a bias: set model.qkv_bias=true"):
        load_pretrained(network(image_size=32), tmp_path / "vit.pth")
    with pytest.raises(WeightsError, match=r"it lacks blocks.2.*; .*set model.depth=2") as raised:
        load_pretrained(network(image_size=32, qkv_bias=True, depth=3), tmp_path / "vit.pth")
    assert "qkv_bias" not in str(raised.value)


# -- Hugging Face and facebookresearch --


@pytest.fixture(scope="module")
def hugging_face(torchvision_loads):
    return pytest.importorskip("transformers")


def their_model(transformers, attention="divided_space_time", **changes):
    settings = dict(
        image_size=32, patch_size=16, num_frames=4, hidden_size=24, num_hidden_layers=2, num_attention_heads=3,
        intermediate_size=96, num_labels=5, attention_type=attention,
    )  # fmt: skip
    return scatter(
        transformers.TimesformerForVideoClassification(transformers.TimesformerConfig(**(settings | changes)))
    )


def their_logits(theirs, clips):
    with torch.no_grad():
        return theirs(clips.transpose(1, 2)).logits


@pytest.mark.slow
@pytest.mark.parametrize("qkv_bias", [True, False])
@pytest.mark.parametrize("attention", KINDS)
def test_logits_of_hugging_face(hugging_face, tmp_path, attention, qkv_bias):
    num_frames = 1 if attention == "space_only" else 4  # theirs forgets to average the frames
    theirs = their_model(hugging_face, attention, qkv_bias=qkv_bias, num_frames=num_frames)
    theirs.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        '{"image_mean": [0.45, 0.45, 0.45], "image_std": [0.2, 0.2, 0.2]}'
    )
    torch.save(theirs.state_dict(), tmp_path / "w.bin")
    clips = torch.rand(2, 3, num_frames, 32, 32)
    for source in (tmp_path, tmp_path / "model.safetensors", tmp_path / "w.bin"):
        model = network(attention=attention, qkv_bias=qkv_bias, num_frames=num_frames)
        report = load_pretrained(model, source)
        assert report.origin == "Hugging Face" and sorted(report.loaded) == sorted(model.state_dict())
        with torch.no_grad():
            torch.testing.assert_close(model(clips), their_logits(theirs, clips), atol=1e-5, rtol=1e-5)
    assert load_pretrained(model, tmp_path).preprocessing == {"mean": [0.45] * 3, "std": [0.2] * 3}


def test_a_network_of_hugging_face_without_a_head(hugging_face, tmp_path):
    theirs = their_model(hugging_face)
    theirs.timesformer.save_pretrained(tmp_path)
    model = network(qkv_bias=True)
    report = load_pretrained(model, tmp_path)
    assert set(report.initial.values()) == {"a new head: the file has none"}
    assert (model.blocks[1].mlp.fc2.weight == theirs.timesformer.encoder.layer[1].output.dense.weight).all()


def test_another_number_of_heads_is_noticed_if_the_file_has_it(hugging_face, tmp_path):
    their_model(hugging_face).save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match="has 3 attention heads, the network 4; set model.num_heads"):
        load_pretrained(network(qkv_bias=True, num_heads=4), tmp_path)


@pytest.mark.parametrize("prefix", ["model.", "module.model."])
def test_checkpoints_of_facebookresearch(hugging_face, tmp_path, prefix):
    theirs = their_model(hugging_face)
    theirs.save_pretrained(tmp_path)
    source = network(qkv_bias=True)
    load_pretrained(source, tmp_path)  # shown to be right above
    state = {prefix + name: value for name, value in source.state_dict().items()}
    content = {"epoch": 14, "model_state": state, "optimizer_state": {"state": {}}, "cfg": "TRAIN:\n"}
    torch.save(content, tmp_path / "w.pyth")
    model = network(qkv_bias=True)
    report = load_pretrained(model, tmp_path / "w.pyth")
    clips = torch.rand(2, 3, 4, 32, 32)
    assert report.origin == "facebookresearch/TimeSformer"
    with torch.no_grad():
        torch.testing.assert_close(model(clips), their_logits(theirs, clips), atol=1e-5, rtol=1e-5)


class MmactionBlock(nn.Module):
    """A block with the names of mmaction2's (mmaction/models/common/transformer.py), on torch's own attention."""

    def __init__(self, attention: str, width: int, heads: int):
        super().__init__()
        is_divided = attention == "divided_space_time"
        self.attentions = nn.ModuleList(nn.Module() for _ in range(1 + is_divided))
        for each in self.attentions:
            each.attn = nn.MultiheadAttention(width, heads, batch_first=True)
            if is_divided:
                each.norm = nn.LayerNorm(width, eps=1e-6)
        if is_divided:
            self.attentions[0].temporal_fc = nn.Linear(width, width)
        ffn = nn.Module()
        first = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU())
        ffn.layers = nn.Sequential(first, nn.Linear(4 * width, width))
        if is_divided:
            ffn.norm = nn.LayerNorm(width, eps=1e-6)
        else:
            self.norms = nn.ModuleList(nn.LayerNorm(width, eps=1e-6) for _ in range(2))
        self.ffns = nn.ModuleList([ffn])

    def forward(self, tokens, frames: int):
        """tokens [B, 1 + P * T, D], patches before frames, or [B * T, 1 + P, D] if frames are apart."""
        ffn = self.ffns[0]
        if len(self.attentions) == 1:
            normed = self.norms[0](tokens)
            tokens = tokens + self.attentions[0].attn(normed, normed, normed)[0]
            return tokens + ffn.layers(self.norms[1](tokens))
        time, space = self.attentions
        count, width = len(tokens), tokens.shape[-1]
        patches = tokens[:, 1:]
        normed = time.norm(patches.reshape(-1, frames, width))
        patches = patches + time.temporal_fc(time.attn(normed, normed, normed)[0]).reshape(count, -1, width)
        by_frame = patches.reshape(count, -1, frames, width).transpose(1, 2).flatten(0, 1)
        cls = tokens[:, :1].repeat_interleave(frames, 0)
        normed = space.norm(torch.cat([cls, by_frame], 1))
        found = space.attn(normed, normed, normed)[0]
        of_patches = found[:, 1:].unflatten(0, (count, frames)).transpose(1, 2).reshape(count, -1, width)
        change = torch.cat([found[:, :1].unflatten(0, (count, frames)).mean(1), of_patches], 1)
        tokens = torch.cat([tokens[:, :1], patches], 1) + change
        return tokens + ffn.layers(ffn.norm(tokens))


def mmaction_state_and_logits(attention: str, clips) -> tuple[dict, torch.Tensor]:
    """A state dict with mmaction2's names, and the logits of its network for clips [B, 3, T, S, S]."""
    width, frames, patches = 24, clips.shape[2], (clips.shape[-1] // 16) ** 2
    top = nn.ModuleDict({"backbone": nn.Module(), "cls_head": nn.Module()})
    backbone = top["backbone"]
    backbone.cls_token = nn.Parameter(torch.randn(1, 1, width))
    backbone.pos_embed = nn.Parameter(torch.randn(1, patches + 1, width))
    if attention != "space_only":
        backbone.time_embed = nn.Parameter(torch.randn(1, frames, width))
    backbone.patch_embed = nn.ModuleDict({"projection": nn.Conv2d(3, width, 16, 16)})
    backbone.norm = nn.LayerNorm(width, eps=1e-6)
    blocks = nn.ModuleList(MmactionBlock(attention, width, 3) for _ in range(2))
    backbone.transformer_layers = nn.ModuleDict({"layers": blocks})
    top["cls_head"].fc_cls = nn.Linear(width, 5)
    for value in top.parameters():
        nn.init.normal_(value, std=0.3)
    count = len(clips)
    tokens = backbone.patch_embed["projection"](clips.transpose(1, 2).flatten(0, 1)).flatten(2).transpose(1, 2)
    tokens = torch.cat([backbone.cls_token.expand(len(tokens), -1, -1), tokens], 1) + backbone.pos_embed
    if attention != "space_only":
        over_time = tokens[:, 1:].unflatten(0, (count, frames)).transpose(1, 2) + backbone.time_embed
        tokens = torch.cat([tokens[::frames, :1], over_time.reshape(count, -1, width)], 1)
    for block in blocks:
        tokens = block(tokens, frames)
    if attention == "space_only":
        tokens = tokens.unflatten(0, (count, frames)).mean(1)
    return top.state_dict(), top["cls_head"].fc_cls(backbone.norm(tokens)[:, 0])


@pytest.mark.parametrize("attention", ["divided_space_time", "joint_space_time", "space_only"])
def test_checkpoints_of_mmaction2(tmp_path, attention):
    clips = torch.rand(2, 3, 4, 32, 32)
    with torch.no_grad():
        state, logits = mmaction_state_and_logits(attention, clips)
        torch.save({"meta": {"epoch": 15}, "state_dict": state}, tmp_path / "w.pth")
        model = network(qkv_bias=True, attention=attention)
        report = load_pretrained(model, tmp_path / "w.pth")
        assert report.origin == "mmaction2" and not report.initial and not report.adapted
        torch.testing.assert_close(model.eval()(clips), logits, atol=1e-4, rtol=1e-4)


def test_an_image_network_of_mmaction2(tmp_path):
    state, _ = mmaction_state_and_logits("space_only", torch.rand(1, 3, 1, 32, 32))
    state = {name.removeprefix("backbone."): value for name, value in state.items() if "cls_head" not in name}
    torch.save({"state_dict": state}, tmp_path / "vit.pth")
    report = load_pretrained(network(qkv_bias=True), tmp_path / "vit.pth")
    assert report.origin == "an image ViT of mmaction2" and list(report.initial) == ["head.weight", "head.bias"]
    assert any("copied from the attention" in how for how in report.adapted.values())


def wrapped(state: dict, *prefixes: str) -> dict:
    return {"".join(prefixes) + name: value for name, value in state.items()}


def averaged(state: dict) -> dict:
    return {"n_averaged": torch.tensor(3)} | wrapped(state, "module.")


CONTAINERS = {
    "compiled": lambda state: wrapped(state, "_orig_mod."),
    "DDP, compiled": lambda state: wrapped(state, "module.", "_orig_mod."),
    "compiled, DDP": lambda state: wrapped(state, "_orig_mod.", "module."),
    "blocks compiled": lambda state: {name.replace("blocks.0.", "blocks.0._orig_mod."): v for name, v in state.items()},
    "FSDP, checkpointing": lambda state: {
        name.replace("blocks.1.", "blocks.1._fsdp_wrapped_module._checkpoint_wrapped_module."): value
        for name, value in state.items()
    },
    "model_state_dict": lambda state: {"model_state_dict": state, "epoch": 3, "optimizer_state_dict": {"state": {}}},
    "state_dict": lambda state: {"state_dict": wrapped(state, "module."), "arch": "x", "best": 0.5},
    "state_dict_ema": lambda state: {"state_dict_ema": state, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}},
    "model": lambda state: {"model": state, "args": argparse.Namespace(lr=0.1)},
    "model_ema": lambda state: {"model_ema": averaged(state), "n_averaged": torch.tensor(3)},
    "nested": lambda state: {
        "checkpoint": {"model": {"state_dict": wrapped(state, "model.")}},
        "losses": torch.ones(9),
    },
    "AveragedModel": averaged,
    "AveragedModel, compiled": lambda state: averaged(wrapped(state, "_orig_mod.")),
    "Lightning": lambda state: {"state_dict": wrapped(state, "model."), "pytorch-lightning_version": "2"},
    "a network in a network": lambda state: wrapped(state, "net.video.backbone."),
    "backbone and head": lambda state: {
        ("model.head.fc" + name[4:] if name.startswith("head.") else f"model.backbone.{name}"): value
        for name, value in state.items()
    },
    "one network under two names": lambda state: {"model": state, "state_dict": state},
    "ours, with an average": lambda state: {"network": state, "loader": {}, "average": averaged(state)},
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_wrappers_and_containers(tmp_path, name):
    source, model = scatter(network()), network()
    torch.save(CONTAINERS[name](source.state_dict()), tmp_path / "w.pth")
    report = load_pretrained(model, tmp_path / "w.pth")
    assert sorted(report.loaded) == sorted(source.state_dict()) and not (report.adapted or report.initial)
    assert all((model.state_dict()[key] == value).all() for key, value in source.state_dict().items())
    assert report.left_out.keys() <= {"n_averaged"}
    assert ("n_averaged" in report.left_out) == ("Averaged" in name or name == "model_ema")


def test_wrappers_in_safetensors(tmp_path):
    source, model = scatter(network()), network()
    save_file(averaged(wrapped(source.state_dict(), "_orig_mod.")), tmp_path / "w.safetensors")
    load_pretrained(model, tmp_path / "w.safetensors")
    assert all((model.state_dict()[key] == value).all() for key, value in source.state_dict().items())


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda a, b: {"state_dict": a, "state_dict_ema": b},
            r"networks: state_dict, state_dict_ema; .*\['state_dict_ema'\]",
        ),
        (lambda a, b: {"x": {"model": a, "model_ema": averaged(b)}}, r"x/model, x/model_ema; .*\['x'\]\['model_ema'\]"),
        (lambda a, b: a | {"ema": b}, "networks: the file itself, ema;"),
        (lambda a, b: wrapped(a, "student.") | wrapped(b, "teacher."), "begin with 'student.', 'teacher.'"),
        (lambda a, b: a | wrapped(b, "ema."), "begin with '', 'ema.'"),
    ],
)
def test_several_networks_in_a_file_are_an_error_that_names_them(tmp_path, make, message):
    torch.save(make(network().state_dict(), network().state_dict()), tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=message):
        load_pretrained(network(), tmp_path / "w.pth")


def test_a_checkpoint_that_contains_itself(tmp_path):
    content = {"epoch": 1}
    content["self"] = content
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="expected a dictionary of tensors"):
        load_pretrained(network(), tmp_path / "w.pth")


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(hidden_act="relu"), "config.json has hidden_act 'relu'; expected 'gelu'"),
        (dict(layer_norm_eps=1e-2), "config.json has layer_norm_eps 0.01; expected 1e-06"),
        (dict(global_pool="avg"), "config.json has global_pool 'avg'; expected 'token'"),
        (dict(num_attention_heads=4), "has 4 attention heads, the network 3"),
        (
            dict(pretrained_cfg={"mean": "abc", "std": [1, 1, 1]}),
            "mean in its JSON files is not a list of three numbers",
        ),
        (
            dict(pretrained_cfg={"mean": [0.5], "std": [1, 1, 1]}),
            "mean in its JSON files is not a list of three numbers",
        ),
    ],
)
def test_a_network_that_computes_something_else_is_noticed(hugging_face, tmp_path, changes, message):
    their_model(hugging_face).save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", **changes)
    for source in (tmp_path, tmp_path / "model.safetensors"):
        with pytest.raises(WeightsError, match=message):
            load_pretrained(network(qkv_bias=True), source)


def test_odd_json_is_no_traceback(hugging_face, tmp_path):
    their_model(hugging_face).save_pretrained(tmp_path)
    for pretrained in (None, "x", [1]):
        edit_json(tmp_path / "config.json", pretrained_cfg=pretrained)
        load_pretrained(network(qkv_bias=True), tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": 0.5, "image_std": 0.25}')
    report = load_pretrained(network(qkv_bias=True), tmp_path)
    assert report.preprocessing == {"mean": [0.5] * 3, "std": [0.25] * 3}
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(WeightsError, match=r"config.json: not JSON"):
        load_pretrained(network(qkv_bias=True), tmp_path)


def test_class_names_of_hugging_face(hugging_face, tmp_path):
    names = ["ash", "big birch", "cedar", "fir", "oak"]
    their_model(hugging_face, id2label=dict(enumerate(names))).save_pretrained(tmp_path)
    for classes, is_new in (
        (names, False), (["Ash", "big_birch", "cedar", "fir", "Oak"], False), (names[::-1], True), (None, False),
    ):  # fmt: skip
        assert bool(load_pretrained(network(qkv_bias=True), tmp_path, classes=classes).initial) == is_new
    their_model(hugging_face).save_pretrained(tmp_path / "unnamed")
    assert not load_pretrained(network(qkv_bias=True), tmp_path / "unnamed", classes=names).initial


def test_a_torch_file_with_a_program_in_it_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    endless = {}
    endless["model"] = endless
    program = {"model_state": Calls(os.system, "touch made")}
    pickled = r"a.pyth: contains pickled objects, which are refused \(posix.system\); .* torch.save\(torch.load\("
    for name, content, message in (
        ("a.pyth", program, pickled),
        ("b.pth", {"x": 1}, "b.pth"),
        ("c.pth", endless, "c.pth"),
    ):
        torch.save(content, name)
        with pytest.raises(WeightsError, match=message):
            load_pretrained(network(), name)
    assert sorted(os.listdir(tmp_path)) == ["a.pyth", "b.pth", "c.pth"]


@pytest.mark.parametrize("format", ["zip", "old"])
def test_a_torch_file_cannot_take_memory_that_it_does_not_fill(tmp_path, format):
    """torch lets a pickle call bytearray, which fills as much as it is told to; a storage needs only its size."""
    path = tmp_path / "w.pth"
    torch.save({"w": torch.zeros(300)}, path, _use_new_zipfile_serialization=format == "zip")
    wants = b"c__builtin__\nbytearray\n\x8a\x05" + (16 << 30).to_bytes(5, "little") + b"\x85R"
    if format == "zip":
        with zipfile.ZipFile(path) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in members.items():
                archive.writestr(name, b"\x80\x02" + wants + b"." if name.endswith("data.pkl") else data)
    else:
        content = path.read_bytes()
        assert content.count(b"M\x2c\x01") == 2  # 300, of the storage and of the tensor
        path.write_bytes(content.replace(b"M\x2c\x01", b"\x8a\x05" + (4 << 30).to_bytes(5, "little")))
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with pytest.raises(WeightsError, match="w.pth: not a file of torch.save, damaged, or"):
        load_pretrained(network(), path)
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 8 << 20  # KiB


def test_many_names_for_one_tensor_are_refused(tmp_path):
    """Each is checked: 3,000 of 16 MB take minutes."""
    shared = torch.zeros(1000)
    torch.save({f"w{number}": shared for number in range(300)}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"w.pth: its tensors are larger than the file"):
        load_pretrained(network(), tmp_path / "w.pth")


# -- the Hugging Face Hub --


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers the two requests that huggingface_hub makes for a file."""

    files: ClassVar[dict[str, bytes]] = {}

    def do_HEAD(self):
        self.do_GET(head=True)

    def do_GET(self, head=False):
        content = self.files.get(self.path)
        self.send_response(200 if content is not None else 404)
        if content is None:
            self.send_header("X-Error-Code", "EntryNotFound" if self.path.startswith("/timm/") else "RepoNotFound")
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("ETag", f'"{abs(hash(content))}"')
        self.send_header("Content-Length", str(len(content or b"")))
        self.end_headers()
        if not head:
            self.wfile.write(content or b"")

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch, tmp_path):
    constants = pytest.importorskip("huggingface_hub").constants
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(Hub, "files", {})
    yield Hub.files
    server.shutdown()


@pytest.mark.slow
def test_weights_by_name_from_the_hub(hub, tmp_path):
    vit = {name: value for name, value in scatter(network()).state_dict().items() if "temporal" not in name}
    del vit["time_embed"]
    save_file(vit, tmp_path / "m")
    hub["/timm/vit_tiny.in21k/resolve/main/model.safetensors"] = (tmp_path / "m").read_bytes()
    config = {"pretrained_cfg": {"mean": [0.0] * 3, "std": [1.0] * 3}}
    hub["/timm/vit_tiny.in21k/resolve/main/config.json"] = json.dumps(config).encode()
    model = network()
    report = load_pretrained(model, "timm/vit_tiny.in21k")
    assert report.origin == "an image ViT" and report.preprocessing == {"mean": [0.0] * 3, "std": [1.0] * 3}
    assert (model.blocks[1].attn.qkv.weight == vit["blocks.1.attn.qkv.weight"]).all()


@pytest.mark.slow
def test_names_that_the_hub_does_not_know(hub):
    for name, message in (
        ("timm/nothing", "has none of model.safetensors, pytorch_model.bin"),
        ("nobody/nothing", "cannot be fetched from the Hugging Face Hub"),
        ("gone.pth", "no such weights file"),
        ("folder/gone.safetensors", "no such weights file"),
    ):
        with pytest.raises(WeightsError, match=f"{name}: {message}"):
            load_pretrained(network(), name)


# -- our own, and what can be adapted --


def our_file(path, model, classes=("ash", "birch", "cedar", "fir", "oak")):
    metadata = {
        "model": json.dumps({"num_heads": 3}),
        "preprocessing": json.dumps({"mean": [0.0] * 3, "std": [1.0] * 3}),
        "classes": json.dumps(classes),
    }
    save_file(model.state_dict(), path, metadata)
    return path


@pytest.mark.parametrize("theirs, ours", [(8, 16), (16, 8), (3, 7)])
def test_another_number_of_frames(tmp_path, theirs, ours):
    source = scatter(network(num_frames=theirs))
    model = network(num_frames=ours)
    report = load_pretrained(model, our_file(tmp_path / "w.safetensors", source))
    assert report.adapted == {"time_embed": f"resized from {theirs} to {ours} frames, to the nearest"}
    picks = [k * theirs // ours for k in range(ours)]
    assert (model.time_embed[0] == source.time_embed[0, picks]).all()
    assert (model.pos_embed == source.pos_embed).all() and (model.head.weight == source.head.weight).all()


def test_another_image_size_keeps_corners_and_linear_gradients(tmp_path):
    source = network(image_size=64)  # 4 x 4 patches
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    with torch.no_grad():
        scatter(source)
        source.pos_embed[0, 1:, 0] = (10 * rows + columns).flatten()
    for size, side in ((112, 7), (32, 2)):
        model = network(image_size=size)
        report = load_pretrained(model, our_file(tmp_path / "w.safetensors", source))
        assert report.adapted == {"pos_embed": f"resized from 4 x 4 to {side} x {side} patches"}
        rows, columns = torch.meshgrid(torch.linspace(0, 3, side), torch.linspace(0, 3, side), indexing="ij")
        torch.testing.assert_close(model.pos_embed[0, 1:, 0].unflatten(0, (side, side)), 10 * rows + columns)
        assert (model.pos_embed[0, 0] == source.pos_embed[0, 0]).all()
        corners = [1, side, 1 + side * (side - 1), side * side]
        torch.testing.assert_close(model.pos_embed[0, corners], source.pos_embed[0, [1, 4, 13, 16]])


def test_other_classes_get_a_new_head(tmp_path):
    source = scatter(network())
    path = our_file(tmp_path / "w.safetensors", source)
    names = ("ash", "birch", "cedar", "fir", "oak")
    for classes, number, reason in (
        (None, 30, "5 classes in the file, 30 here"),
        (names[::-1], 5, "the file's 5 classes have other names"),
    ):
        model = network(num_classes=number)
        before = model.head.weight.clone()
        report = load_pretrained(model, path, classes=classes)
        assert report.initial == dict.fromkeys(("head.weight", "head.bias"), f"a new head: {reason}")
        assert (model.head.weight == before).all() and (model.norm.weight == source.norm.weight).all()
    for classes in (None, names):
        model = network()
        assert not load_pretrained(model, path, classes=classes).initial
        assert (model.head.weight == source.head.weight).all()


def test_weights_without_attention_over_time_start_one_with(tmp_path):
    source = scatter(network(attention="space_only"))
    model = network()
    report = load_pretrained(model, our_file(tmp_path / "w.safetensors", source))
    clips = torch.rand(2, 3, 1, 32, 32).expand(-1, -1, 4, -1, -1)
    with torch.no_grad():
        torch.testing.assert_close(model(clips), source(clips), atol=1e-5, rtol=1e-5)
    assert not report.initial and "time_embed" in report.adapted


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            dict(depth=3),
            "it lacks blocks.2.temporal_norm1.weight, .* and 15 more; .*, the network 3: set model.depth=2",
        ),
        (dict(depth=1), "the network has no blocks.1.*it has 2 blocks, the network 1: set model.depth=2"),
        (dict(embed_dim=48), "set model.embed_dim=24"),
        (dict(qkv_bias=True), "have no bias: set model.qkv_bias=false"),
        (dict(embed_dim=48), "cls_token is 1 x 1 x 24 there, 1 x 1 x 48 here"),
        (dict(patch_size=8), "patch_embed.proj.weight is 24 x 3 x 16 x 16 there, 24 x 3 x 8 x 8 here"),
        (dict(attention="space_only"), "the network has no .*temporal.*set model.attention=divided_space_time"),
        (dict(num_heads=4), "has 3 attention heads, the network 4"),
    ],
)
def test_differences_are_named_and_change_nothing(tmp_path, changes, message):
    path = our_file(tmp_path / "w.safetensors", scatter(network()))
    model = network(**changes)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(WeightsError, match=message):
        load_pretrained(model, path)
    assert all((value == before[name]).all() for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"blocks.x.y": torch.ones(2)}, "the network has no blocks.x.y"),
        ({"blocks.": torch.ones(2)}, "the network has no blocks.;|the network has no blocks."),
        ({"module.norm.bias": torch.ones(24)}, "contains several tensors for norm.bias"),
        ({"head.weight": None}, "it lacks head.weight"),
        ({"head.weight": torch.tensor(1.0)}, "head.weight is  there|does not fit"),
        ({"pos_embed": torch.ones(1, 1, 24)}, "pos_embed is 1 x 1 x 24 there"),
        ({"pos_embed": torch.ones(1, 0, 24)}, "pos_embed is 1 x 0 x 24 there"),
        ({"time_embed": torch.ones(1, 0, 24)}, "time_embed is 1 x 0 x 24 there"),
        ({"norm.bias": torch.ones(24, dtype=torch.int64)}, "norm.bias is not a tensor of floating-point numbers"),
        ({"norm.bias": torch.ones(24, dtype=torch.complex64)}, "norm.bias is not a tensor of floating-point numbers"),
        ({"norm.bias": torch.ones(24).to(torch.float8_e4m3fn)}, "norm.bias is not a tensor of floating-point numbers"),
        ({"norm.bias": torch.ones(24).to_sparse()}, "norm.bias is not a tensor of floating-point numbers"),
        ({"norm.bias": torch.full((24,), 1e300, dtype=torch.float64)}, "norm.bias has values that are not finite"),
        ({"pos_embed": torch.ones(1, 1, 1).expand(1, 2**30, 24)}, "pos_embed is larger than its data in the file"),
    ],
)
def test_odd_tensors_are_named_and_change_nothing(tmp_path, changes, message):
    state = {name: value for name, value in (network().state_dict() | changes).items() if value is not None}
    torch.save(state, tmp_path / "w.pth")
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(WeightsError, match=message):
        load_pretrained(model, tmp_path / "w.pth")
    assert all((value == before[name]).all() for name, value in model.state_dict().items())


def test_half_precision_weights_become_float32(tmp_path):
    source = scatter(network())
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        torch.save({name: value.to(dtype) for name, value in source.state_dict().items()}, tmp_path / "w.pth")
        model = network()
        load_pretrained(model, tmp_path / "w.pth")
        assert model.norm.bias.dtype == torch.float32
        torch.testing.assert_close(model.norm.bias, source.norm.bias, atol=2e-3, rtol=0)


def test_unknown_tensors_and_nan_are_errors(tmp_path):
    state = collections.OrderedDict(scatter(network()).state_dict())
    save_file(state | {"blocks.0.ls1.gamma": torch.ones(24)}, tmp_path / "more.safetensors")
    save_file({"conv1.weight": torch.ones(3)}, tmp_path / "resnet.safetensors")
    save_file(state | {"norm.bias": torch.full((24,), torch.nan)}, tmp_path / "nan.safetensors")
    (tmp_path / "folder").mkdir()
    for name, message in (
        ("more.safetensors", "the network has no blocks.0.ls1.gamma"),
        ("resnet.safetensors", "not weights of a known vision transformer; it contains conv1.weight"),
        ("nan.safetensors", "norm.bias has values that are not finite"),
        ("folder", "a folder without model.safetensors or pytorch_model.bin"),
    ):
        with pytest.raises(WeightsError, match=message):
            load_pretrained(network(), tmp_path / name)


def test_a_compressed_file_is_refused(tmp_path):
    """1 MB of zeros in each kB: torch.load would unpack it into memory."""
    torch.save({"head.weight": torch.zeros(1 << 18)}, tmp_path / "plain.pth")
    with (
        zipfile.ZipFile(tmp_path / "plain.pth") as plain,
        zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for name in plain.namelist():
            bomb.writestr(name, plain.read(name))
    assert os.path.getsize(tmp_path / "bomb.pth") < 10_000 and torch.load(tmp_path / "bomb.pth", weights_only=True)
    with pytest.raises(WeightsError, match="bomb.pth: compressed inside"):
        load_pretrained(network(), tmp_path / "bomb.pth")
