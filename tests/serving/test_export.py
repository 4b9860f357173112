"""Exported files give the outputs of the network for any number of clips, and only such files are saved."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

import export as command
from common.config import Config
from common.weights import Weights, open_weights, save_weights
from dali_pipelines import InputError
from evaluation.evaluate import predict_views
from evaluation.result_files import read_summary
from model import TimeSformer, load_pretrained
from model.pretrained import from_hugging_face, to_hugging_face
from serving import onnx_format, tensorrt, torch_format, verification
from serving.export_formats import open_exported
from serving.hugging_face import export_hugging_face
from serving.onnx_format import export_onnx, open_onnx
from serving.tensorrt import build_tensorrt
from serving.torch_format import METADATA_FILE, export_torch, open_torch
from serving.triton import triton_name, write_triton
from serving.verification import (
    Clips,
    MismatchError,
    clips_to_compare,
    compare,
    synthetic_views,
    time_in_turn,
    verified,
)
from tests.commands import PROJECT, run, run_here

PREPROCESSING = {
    "num_frames": 4,
    "crop_size": 32,
    "short_side": None,
    "stride": None,
    "target_fps": 30.0,
    "past_end": "fit",
    "mean": [0.45, 0.4, 0.5],
    "std": [0.225, 0.25, 0.2],
}
CLASSES = ("ash", "Birke, ü", "cedar")


def make_weights(attention="divided_space_time", qkv_bias=False):
    torch.manual_seed(1)
    model = {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "embed_init_std": 0.5}
    model |= {"attention": attention, "qkv_bias": qkv_bias}
    network = TimeSformer(**model, num_frames=4, image_size=32, num_classes=3)
    torch.nn.init.normal_(network.head.weight)  # logits as far apart as a trained network's
    return Weights(model, PREPROCESSING, CLASSES, network.state_dict())


@pytest.fixture(scope="module")
def weights():
    return make_weights()


@pytest.fixture(scope="module")
def clips(weights):
    return Clips(synthetic_views(weights), [f"clip {number}" for number in range(4)], "compared on four")


@pytest.fixture(scope="module")
def onnx_file(weights, clips, tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "w.onnx"
    export_onnx(path, weights, clips)
    return path


@pytest.fixture(scope="module")
def torch_file(weights, clips, tmp_path_factory):
    path = tmp_path_factory.mktemp("torch") / "w.pt2"
    export_torch(path, weights, clips)
    return path


def in_onnxruntime(path, clips):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    [output] = session.get_outputs()
    return output.name, torch.from_numpy(session.run(None, {"clips": clips.numpy()})[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    "attention, qkv_bias", [("divided_space_time", True), ("joint_space_time", False), ("space_only", True)]
)
def test_onnx_gives_the_logits_of_the_network(attention, qkv_bias, clips, tmp_path):
    weights = make_weights(attention, qkv_bias)
    (tmp_path / "w.tensorrt").mkdir()  # engines of an older file, which TensorRT would use
    said = export_onnx(tmp_path / "w.onnx", weights, clips)
    assert not (tmp_path / "w.tensorrt").exists()
    assert "same top-1 for all 12" in said and "opset 20" in said and "x as fast" in said
    for batch in (1, 2, 5):
        given = torch.randn(batch, 3, 4, 32, 32)
        name, logits = in_onnxruntime(tmp_path / "w.onnx", given)
        assert name == "logits" and logits.shape == (batch, 3)
        torch.testing.assert_close(logits, weights.build()(given), atol=1e-5, rtol=0)


@pytest.mark.slow
def test_three_views_are_averaged_inside(weights, clips, tmp_path):
    export_onnx(tmp_path / "w.onnx", weights, clips, views=3)
    for batch in (1, 2, 5):
        given = torch.randn(batch, 3, 3, 4, 32, 32)
        name, probabilities = in_onnxruntime(tmp_path / "w.onnx", given)
        assert name == "probabilities"
        expected = predict_views(weights.build(), given, "float32")
        torch.testing.assert_close(probabilities, expected, atol=1e-6, rtol=0)
    with pytest.raises(InputError, match=r"clips are \(1, 2, 3, 4, 32, 32\); this file takes \[B, 3, 3, 4, 32, 32\]"):
        open_exported(tmp_path / "w.onnx")(torch.zeros(1, 2, 3, 4, 32, 32))


@pytest.mark.slow
def test_metadata_of_an_onnx_file(weights, onnx_file):
    model = onnx.load(onnx_file)
    onnx.checker.check_model(model, full_check=True)
    told = {each.key: each.value for each in model.metadata_props}
    assert told["format"] == "dali-timesformer onnx 1"
    assert (told["views"], told["precision"]) == ("1", "float32")
    assert json.loads(told["model"]) == weights.model and json.loads(told["preprocessing"]) == PREPROCESSING
    assert tuple(json.loads(told["classes"])) == CLASSES
    assert [each.version for each in model.opset_import] == [20]
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert list(onnx_file.parent.iterdir()) == [onnx_file]  # no external data, nothing left over
    assert str(PROJECT).encode() not in onnx_file.read_bytes()  # nor of the machine


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["onnx", "torch"])
def test_an_opened_export_gives_the_probabilities_of_evaluation(kind, weights, onnx_file, torch_file):
    exported = open_exported({"onnx": onnx_file, "torch": torch_file}[kind])
    assert (exported.model, exported.preprocessing, exported.classes) == (weights.model, PREPROCESSING, CLASSES)
    assert (exported.views, exported.precision) == (1, "float32")
    for batch, views in ((1, 3), (2, 1), (5, 2)):
        given = torch.randn(batch, views, 3, 4, 32, 32)
        expected = predict_views(weights.build(), given, "float32")
        torch.testing.assert_close(exported(given), expected, atol=1e-6, rtol=0)
    with pytest.raises(InputError, match=r"this file takes \[B, V, 3, 4, 32, 32\]"):
        exported(torch.zeros(1, 3, 4, 32, 32))


@pytest.mark.slow
def test_torch_with_views_and_in_float16(weights, clips, tmp_path):
    export_torch(tmp_path / "w.pt2", weights, clips, views=3, precision="float16")
    exported = open_exported(tmp_path / "w.pt2")
    assert exported.precision == "float16" and any(p.dtype == torch.float16 for p in _parameters(tmp_path / "w.pt2"))
    given = torch.randn(5, 3, 3, 4, 32, 32)
    probabilities = exported(given)
    assert probabilities.dtype == torch.float32
    torch.testing.assert_close(probabilities, predict_views(weights.build(), given, "float32"), atol=5e-3, rtol=0)
    with pytest.raises(InputError, match=r"int8 needs --format onnx"):
        export_torch(tmp_path / "8.pt2", weights, clips, precision="int8")


def _parameters(path):
    return torch.export.load(path).state_dict.values()


def test_a_torch_file_holds_no_pickle(torch_file):
    with zipfile.ZipFile(torch_file) as archive:
        assert all(not info.file_size for info in archive.infolist() if info.filename.endswith(".pt"))
        [config] = [name for name in archive.namelist() if name.endswith("weights_config.json")]
        entries = json.loads(archive.read(config))["config"].values()
        assert len(entries) > 40 and not any(entry["use_pickle"] for entry in entries)
    assert str(PROJECT).encode() not in torch_file.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("precision, limit", [("float16", 2e-2), ("int8", 0.5)])
def test_smaller_files(precision, limit, weights, clips, onnx_file, tmp_path):
    # One class ahead of the others: int8 moves these logits by a tenth, which turns the top-1 of some clip otherwise.
    weights = dataclasses.replace(weights, state=weights.state | {"head.bias": torch.tensor([30.0, 0.0, 0.0])})
    said = export_onnx(tmp_path / "w.onnx", weights, clips, precision=precision)
    assert f"onnxruntime ({precision})" in said
    assert (tmp_path / "w.onnx").stat().st_size < 0.75 * onnx_file.stat().st_size
    exported = open_exported(tmp_path / "w.onnx")
    assert (exported.precision, exported.classes) == (precision, CLASSES)
    given = torch.randn(5, 3, 4, 32, 32)
    logits, expected = exported.run(given), weights.build()(given)
    assert logits.dtype == torch.float32
    assert 1e-6 < (logits - expected).abs().max() < limit
    kinds = {node.op_type for node in onnx.load(tmp_path / "w.onnx").graph.node}
    assert ("MatMulInteger" in kinds) == (precision == "int8")
    assert list(tmp_path.iterdir()) == [tmp_path / "w.onnx"]


def test_slow_networks_are_announced_and_timed_once(clips, monkeypatch, capsys):
    """Each call takes 20 s of a clock that only the network moves."""
    clock = [0.0]
    monkeypatch.setattr(verification.time, "perf_counter", lambda: clock[0])

    def run(inputs):
        clock[0] += 20
        return torch.tensor([[1.0, 0.0]]).expand(len(inputs), 2)

    compare(run, run, clips, views=3, precision="float32")
    assert capsys.readouterr().out == "comparing the export with the network on 4 videos: about 3 min\n"
    before = clock[0]
    assert time_in_turn([run, run], clips.views[:2]) == [10_000, 10_000] and clock[0] == before + 40


def test_mismatches(clips):
    def off(value):  # the largest logit, 100, of one clip in twelve
        return lambda inputs: torch.where(
            (inputs == clips.views[2, 1]).flatten(1).all(1)[:, None] & torch.tensor([True, False, False]), value, 0.0
        )

    def ours(inputs):
        return torch.tensor([[99.0, 98.0, 97.0]]).expand(len(inputs), 3)

    for precision, good, bad in [("float32", 9e-4, 2e-3), ("float16", 0.9, 1.1), ("float16", 0.9, float("nan"))]:
        near, far = off(good), off(bad)
        said = compare(ours, lambda x, change=near: ours(x) + change(x), clips, views=1, precision=precision)
        assert "same top-1 for all 12" in said
        with pytest.raises(MismatchError, match=r"clip 2, view 2 of 3: a logit differs by"):
            compare(ours, lambda x, change=far: ours(x) + change(x), clips, views=1, precision=precision)
    assert "difference of a logit 50," in compare(
        ours, lambda x: ours(x) + off(50)(x), clips, views=1, precision="int8"
    )
    with pytest.raises(
        MismatchError, match=r"clip 2, view 2 of 3: the top-1 is class 1, but 0 in the original network"
    ):
        compare(ours, lambda x: ours(x) - off(2)(x), clips, views=1, precision="int8")
    with pytest.raises(MismatchError, match=r"expected \(1, 3\)"):
        compare(ours, lambda x: ours(x)[:, :2], clips, views=1, precision="int8")


@pytest.fixture
def weights_file(weights, tmp_path):
    save_weights(tmp_path / "w.safetensors", weights)
    return tmp_path / "w.safetensors"


def in_process(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["export.py", *map(str, arguments)])
    threads = torch.get_num_threads()
    try:
        return command.main()
    finally:
        torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.parametrize("kind, suffix", [("onnx", ".onnx"), ("torch", ".pt2")])
def test_a_mismatch_fails_and_deletes_nothing(kind, suffix, weights_file, monkeypatch, capsys):
    module, opener = {"onnx": (onnx_format, open_onnx), "torch": (torch_format, open_torch)}[kind]

    def opens_another(path):
        exported = opener(path)
        return dataclasses.replace(exported, run=lambda inputs: exported.run(inputs) + 0.01)

    monkeypatch.setattr(module, opener.__name__, opens_another)
    out = weights_file.with_name(f"best{suffix}")
    out.write_bytes(b"the good one")
    assert in_process(monkeypatch, "-w", weights_file, "--format", kind, "--out", out) == 1
    assert out.read_bytes() == b"the good one"
    kept = out.with_name(f"best.mismatch{suffix}")
    said = capsys.readouterr().err
    assert "synthetic clip 0, view 1 of 3: a logit differs by 0.01, more than 0.001 (float32; 12 of 12 differ)" in said
    assert f"kept as {kept}; {out} is unchanged" in said
    assert opener(kept).classes == CLASSES
    assert {each.name for each in out.parent.iterdir()} == {out.name, kept.name, "w.safetensors"}
    if kind == "torch":  # and when it is good again
        monkeypatch.undo()
        assert in_process(monkeypatch, "-w", weights_file, "--format", kind, "--out", out) == 0
        assert open_exported(out).classes == CLASSES and kept.exists()


def test_an_interrupted_export_leaves_nothing(tmp_path):
    (tmp_path / "w.onnx").write_bytes(b"the good one")
    with pytest.raises(IsADirectoryError), verified(tmp_path / "w.onnx") as path:
        path.write_bytes(b"half") and tmp_path.write_bytes(b"fails")
    assert [each.read_bytes() for each in tmp_path.iterdir()] == [b"the good one"]


def test_a_network_too_large_for_one_file(weights, clips, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_format, "_LARGEST", 1000)
    with pytest.raises(InputError, match=r"too large for one ONNX file; use --format torch"):
        export_onnx(tmp_path / "w.onnx", weights, clips)
    assert not list(tmp_path.iterdir())


def test_other_and_damaged_files_are_refused(onnx_file, torch_file, tmp_path, monkeypatch):
    whole = onnx_file.read_bytes()
    (tmp_path / "cut.onnx").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.onnx").write_text("not a protobuf")
    (tmp_path / "empty.onnx").touch()
    model = onnx.load(onnx_file)
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "foreign.onnx")
    told = {each.key: each.value for each in onnx.load(onnx_file).metadata_props}
    for name, changes in [
        ("classes", {"classes": '["a"]'}),
        ("json", {"model": "{"}),
        ("views", {"views": "3"}),
        ("size", {"preprocessing": json.dumps(PREPROCESSING | {"crop_size": "32"})}),
        ("later", {"format": "dali-timesformer onnx 2"}),
    ]:
        onnx.helper.set_model_props(model, told | changes)
        onnx.save(model, tmp_path / f"{name}.onnx")
    whole = torch_file.read_bytes()
    (tmp_path / "cut.pt2").write_bytes(whole[:-1000])
    (tmp_path / "text.pt2").write_text("no archive")
    middle = len(whole) // 4
    (tmp_path / "flipped.pt2").write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    for name, content in [("foreign", None), ("list", "[1]"), ("half", '{"format":')]:
        with zipfile.ZipFile(tmp_path / f"{name}.pt2", "w") as archive:
            archive.writestr("w/models/model.json", "{}")
            if content:
                archive.writestr(f"w/extra/{METADATA_FILE}", content)
    shutil.copy(onnx_file, tmp_path / "onnx.bin")
    monkeypatch.setattr(torch.export, "load", None)  # none of them gets as far
    for name, message in [
        ("cut.onnx", "not an ONNX file, or a damaged one"),
        ("text.onnx", "not an ONNX file, or a damaged one"),
        ("empty.onnx", "not an ONNX file, or a damaged one|not a file that export.py wrote"),
        ("foreign.onnx", "not a file that export.py wrote"),
        ("later.onnx", ".*lacks the format 'dali-timesformer onnx 1'"),
        ("json.onnx", "its metadata is invalid"),
        ("size.onnx", "its metadata is invalid"),
        ("classes.onnx", "damaged: its network does not match"),
        ("views.onnx", "damaged: its network does not match"),
        ("cut.pt2", "not a .pt2 file, or a damaged one"),
        ("text.pt2", "not a .pt2 file, or a damaged one"),
        ("flipped.pt2", "damaged: the checksum of .*data/weights/weight"),
        ("foreign.pt2", "not a file that export.py wrote"),
        ("list.pt2", "not a file that export.py wrote"),
        ("half.pt2", "not a .pt2 file, or a damaged one"),
        ("onnx.bin", "expected an .onnx or .pt2 file"),
        ("gone.pt2", "no such file"),
    ]:
        with pytest.raises(InputError, match=f"{name}: ({message})"):
            open_exported(tmp_path / name)


def _with_loop(graph):
    """Makes the result loop forever."""
    kind, result = onnx.TensorProto, graph.output[0].name
    [last] = [node for node in graph.node if result in node.output]
    last.output[:] = ["inner"]
    same = [onnx.helper.make_node("Identity", [name], [f"{name}2"]) for name in ("c", "x")]
    given = {"i": kind.INT64, "c": kind.BOOL, "x": kind.FLOAT}
    body = onnx.helper.make_graph(
        same,
        "body",
        [onnx.helper.make_tensor_value_info(name, each, None) for name, each in given.items()],
        [onnx.helper.make_tensor_value_info(f"{name}2", given[name], None) for name in ("c", "x")],
    )
    graph.initializer.append(onnx.numpy_helper.from_array(np.array(True), "true"))
    graph.node.append(onnx.helper.make_node("Loop", ["", "true", "inner"], [result], body=body))


def _with_huge(graph):
    """Makes a tensor of 4 TiB on the way."""
    last = graph.node[-1]
    graph.initializer.append(onnx.numpy_helper.from_array(np.array([1 << 40]), "shape"))
    graph.node.append(onnx.helper.make_node("ConstantOfShape", ["shape"], ["huge"]))
    graph.node.append(onnx.helper.make_node("ReduceSum", ["huge"], ["sum"], keepdims=0))
    graph.node.append(onnx.helper.make_node("Add", ["inner", "sum"], list(last.output)))
    last.output[:] = ["inner"]


def test_an_onnx_file_that_would_run_forever_is_refused(onnx_file, clips, tmp_path):
    model = onnx.load(onnx_file)
    _with_loop(model.graph)
    onnx.save(model, tmp_path / "loop.onnx")
    with pytest.raises(InputError, match="loop.onnx: refused, because export.py never writes loops or functions"):
        open_exported(tmp_path / "loop.onnx")
    model = onnx.load(onnx_file)
    model.functions.append(onnx.helper.make_function("d", "f", [], [], [], []))
    onnx.save(model, tmp_path / "function.onnx")
    with pytest.raises(InputError, match="function.onnx: refused, because export.py never writes loops or functions"):
        open_exported(tmp_path / "function.onnx")
    model = onnx.load(onnx_file)
    _with_huge(model.graph)
    onnx.save(model, tmp_path / "huge.onnx")
    with pytest.raises(InputError, match="the exported network cannot be run"):
        open_exported(tmp_path / "huge.onnx")(clips.views)


def _rewritten(source, target, *, text=None, member=None, compression=zipfile.ZIP_STORED):
    """A .pt2 file with `text` = (before, after) replaced in its JSON, and with `member` = (name, bytes) as well."""
    replaced = 0
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for name in old.namelist():
            data = old.read(name)
            if text and name.endswith(".json") and "/extra/" not in name:
                replaced += data.count(text[0])
                data = data.replace(*text)
            new.writestr(name, data)
        if member:
            new.writestr(f"{old.namelist()[0].split('/')[0]}/{member[0]}", member[1])
    assert bool(replaced) == bool(text)
    return target


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(text=(b'"use_pickle": false', b'"use_pickle":true')), r"pickles \(.*model_weights_config"),
        (dict(text=(b'"use_pickle": false', b'"use_pickle": 1')), r"pickles \("),
        (dict(text=(b"torch.ops.aten.gelu.default", b"torch.os.system")), "target 'torch.os.system'"),
        (dict(text=(b"torch.ops.aten.gelu.default", b"torch.ops.load_library")), "target 'torch.ops.load_library'"),
        (dict(text=(b"_operator.mul", b"_operator.methodcaller")), "target '_operator.methodcaller'"),
        (dict(text=(b'"Symbol(', b'"print(1) or Symbol(')), "expr_str "),
        (dict(text=(b'"guards_code": []', b'"guards_code": ["print(1)"]')), "guards_code 'print"),
        (dict(text=(b'"name": "linear"', b'"name": "linear = print(1) #"')), "name 'linear = print"),
        (dict(text=(b"builtins.tuple", b"os.system")), "in_spec"),
        (dict(member=("data/constants/opaque_obj_0", b"cos\nsystem\n")), "opaque_obj_0"),
        (dict(member=("data/aotinductor/model/a.so", b"ELF")), "aotinductor"),
        (dict(member=("../../evil", b"x")), "evil"),
        (dict(member=("models/MODEL.json", b"{}")), "a member twice"),
        (dict(member=("data/sample_inputs/model.pt", b"cos\n")), "a member twice"),
        (dict(compression=zipfile.ZIP_DEFLATED), "compressed members"),
    ],
)
def test_a_torch_file_that_could_run_code_is_refused(torch_file, tmp_path, monkeypatch, change, message):
    monkeypatch.setattr(torch.export, "load", lambda path: pytest.fail("torch was given the file"))
    path = _rewritten(torch_file, tmp_path / "bad.pt2", **change)
    with pytest.raises(InputError, match=f"bad.pt2: refused, because export.py never writes .*{message}"):
        open_exported(path)


def test_compressed_metadata_of_a_torch_file_is_not_unpacked(tmp_path, monkeypatch):
    path = tmp_path / "bomb.pt2"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"bomb/extra/{METADATA_FILE}", b" " * (1 << 20))
    monkeypatch.setattr(zipfile.ZipFile, "read", lambda *_: pytest.fail("it was unpacked"))
    with pytest.raises(InputError, match=r"bomb.pt2: refused, because export.py never writes compressed members"):
        open_exported(path)


@pytest.mark.slow
def test_an_operator_of_a_torch_file_that_fails_is_named(torch_file, tmp_path):
    path = _rewritten(
        torch_file, tmp_path / "odd.pt2", text=(b"torch.ops.aten.gelu.default", b"torch.ops.aten.det.default")
    )
    with pytest.raises(InputError, match=r"odd.pt2: .*"):
        open_exported(path)(torch.zeros(1, 1, 3, 4, 32, 32))


def test_names_of_hugging_face_round_trip():
    ours = list(make_weights(qkv_bias=True).state)
    assert [from_hugging_face(to_hugging_face(name)) for name in ours] == ours
    assert to_hugging_face("blocks.3.temporal_norm1.bias") == "timesformer.encoder.layer.3.temporal_layernorm.bias"


@pytest.mark.slow
@pytest.mark.usefixtures("torchvision_loads")
@pytest.mark.parametrize("attention, qkv_bias", [("divided_space_time", False), ("joint_space_time", True)])
def test_hugging_face_gives_the_same_logits(attention, qkv_bias, clips, tmp_path):
    from transformers import AutoConfig, AutoImageProcessor, TimesformerForVideoClassification

    weights = make_weights(attention, qkv_bias)
    folder = tmp_path / "my_model"
    said = export_hugging_face(folder, weights, clips)
    assert "ms in transformers" in said and "same top-1 for all 12" in said
    network = TimesformerForVideoClassification.from_pretrained(folder).eval()
    given = torch.randn(3, 3, 4, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(network(given.transpose(1, 2)).logits, weights.build()(given), atol=1e-5, rtol=0)
    config = AutoConfig.from_pretrained(folder)
    assert config.id2label == dict(enumerate(CLASSES)) and config.label2id["cedar"] == 2
    pictures = [np.random.default_rng(n).integers(0, 256, (37, 37, 3), np.uint8) for n in range(4)]
    theirs = AutoImageProcessor.from_pretrained(folder)(pictures, return_tensors="pt")["pixel_values"][0]
    middle = torch.from_numpy(np.stack(pictures)[:, 2:34, 2:34]) / 255  # 37 pixels: validation's 8/7 of 32
    ours = (middle - torch.tensor(PREPROCESSING["mean"])) / torch.tensor(PREPROCESSING["std"])
    torch.testing.assert_close(theirs, ours.permute(0, 3, 1, 2), atol=1e-5, rtol=0)
    card = (folder / "README.md").read_text()
    assert "license:" not in card and "No licence is named" in card
    assert "1. Birke, ü" in card and "# my_model" in card
    assert "Not evaluated." in card and "model card without accuracies" in said
    # And our own reader takes it back.
    again = TimeSformer(**weights.model, num_frames=4, image_size=32, num_classes=3)
    report = load_pretrained(again, folder, classes=CLASSES)
    assert not (report.adapted or report.initial or report.left_out)
    assert report.preprocessing == {"mean": PREPROCESSING["mean"], "std": PREPROCESSING["std"]}
    with pytest.raises(InputError, match=r"my_model: already exists; name a new folder"):
        export_hugging_face(folder, weights, clips)


@pytest.mark.slow
def test_the_model_card_has_the_numbers_of_the_evaluation(weights, small_data, tmp_path):
    """From weights to card through the commands; a card never has the numbers of other weights or clips."""
    for name, factor in (("best", 1), ("other", 2)):
        state = weights.state | {"head.bias": factor * weights.state["head.bias"]}
        named = dataclasses.replace(weights, state=state, classes=("ash", "birch", "cedar"))
        save_weights(tmp_path / f"{name}.safetensors", named)
    settings = ["-o", f"data.test={small_data}/val.csv", "data.workers=0", "device=cpu"]
    done = run_here("evaluate.py", "-w", tmp_path / "best.safetensors", *settings)
    assert done.returncode == 0, done.stderr
    summary = read_summary(tmp_path / "evaluation" / "results.json")

    def card_of(name, *settings):
        out = tmp_path / f"card_{name}{len(settings)}"
        given = "-w", tmp_path / f"{name}.safetensors", "--format", "huggingface", "--out", out
        done = run_here("export.py", *given, *settings)
        assert done.returncode == 0, done.stderr
        return done.stdout, (out / "README.md").read_text()

    said, card = card_of("best")
    assert f"model card with test/top1_1x3_prob {summary['top1']:.4f}" in said
    assert f"| top1 | {round(summary['top1'], 4)} |" in card and "top5" not in card  # three classes
    assert "| protocol | test/top1_1x3_prob |" in card and "| expected | 7 |" in card
    assert "7 videos of the manifest val.csv (SHA-256 " in card and "1 x 3 clips (windows x crops)" in card
    assert "weights |" not in card and str(tmp_path) not in card
    for said, card in (card_of("other"), card_of("best", "-o", "data.num_frames=8")):
        assert "model card without accuracies" in said and "Not evaluated." in card


@pytest.mark.slow
@pytest.mark.parametrize("torchvision", ["as installed", "missing"])
def test_the_snippet_of_the_model_card_runs(weights, clips, small_data, tmp_path, torchvision):
    """In a fresh process: PyPI's torchvision is a CUDA build, which does not load beside a CPU build of torch."""
    export_hugging_face(tmp_path / "my_model", weights, clips)
    [snippet] = re.findall(r"```python\n(.*?)```", (tmp_path / "my_model" / "README.md").read_text(), re.DOTALL)
    shutil.copy(small_data / "val_0.mp4", tmp_path / "video.mp4")
    before = "" if torchvision == "as installed" else "import sys\nsys.modules['torchvision'] = None\n"
    command = [sys.executable, "-c", before + snippet]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.strip() in CLASSES, done.stderr


def test_what_is_pushed_to_the_hub(weights, small_data, tmp_path, monkeypatch):
    """At the boundary of huggingface_hub: the repository, its privacy, and the files."""
    from huggingface_hub import HfApi, RepoUrl

    done = []

    def create_repo(_, name, **options):
        done.append(("create", name, options))
        return RepoUrl(f"https://huggingface.co/me/{name}")

    def upload_folder(_, *, repo_id, folder_path, **options):
        done.append(("upload", repo_id, sorted(path.name for path in folder_path.iterdir())))

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    monkeypatch.setitem(sys.modules, "transformers", None)  # would take seconds
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    save_weights(tmp_path / "w.safetensors", weights)
    given = ["-w", tmp_path / "w.safetensors", "--format", "huggingface", "--out", tmp_path / "out"]
    in_process(monkeypatch, *given, "--push-to-hub", "trees", "--licence", "cc-by-4.0")
    files = ["README.md", "config.json", "model.safetensors", "preprocessor_config.json"]
    assert done == [("create", "trees", {"private": True, "exist_ok": True}), ("upload", "me/trees", files)]
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlicense: cc-by-4.0\nlibrary_name") and 'from_pretrained("trees")' in card
    shutil.rmtree(tmp_path / "out")

    def refuse(*_, **__):
        error = OSError("Client error\nFor more information check: https://...")
        error.server_message = "Invalid credentials"  # as HfHubHTTPError has it
        raise error

    monkeypatch.setattr(HfApi, "create_repo", refuse)
    with pytest.raises(InputError, match=f"trees: Invalid credentials; .* hf upload trees {tmp_path}/out --private"):
        in_process(monkeypatch, *given, "--push-to-hub", "trees")
    with pytest.raises(InputError, match="--push-to-hub a/b/c: expected NAME or USER/NAME"):
        in_process(monkeypatch, *given, "--push-to-hub", "a/b/c")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(InputError, match="not logged in .* `hf auth login`"):
        in_process(monkeypatch, *given, "--push-to-hub", "trees")
    with pytest.raises(InputError, match="--licence needs --format huggingface, not onnx"):
        in_process(monkeypatch, *given[:2], "--format", "onnx", "--out", tmp_path / "w.onnx", "--licence", "mit")


def test_space_only_attention_is_refused_for_transformers(clips, tmp_path):
    with pytest.raises(InputError, match=r"space_only: .* not their mean"):
        export_hugging_face(tmp_path / "out", make_weights("space_only"), clips)
    assert not (tmp_path / "out").exists()


def parse_triton(text):
    """Parses a config with protobuf, and the fields of Triton's model_config.proto that are used."""
    file = descriptor_pb2.FileDescriptorProto(name="config.proto", package="inference", syntax="proto3")
    kinds = file.enum_type.add(name="DataType")
    for number, kind in enumerate(("TYPE_INVALID", "TYPE_FP16", "TYPE_FP32")):
        kinds.value.add(name=kind, number=number)
    file.message_type.add(name="ModelDynamicBatching")
    one, many = 1, 3  # LABEL_OPTIONAL, LABEL_REPEATED
    string, int32, int64, message, enum = 9, 5, 3, 11, 14
    tensor = [("name", string, one, ""), ("data_type", enum, one, "DataType"), ("dims", int64, many, "")]
    for name, fields in [
        ("ModelInput", tensor),
        ("ModelOutput", [*tensor, ("label_filename", string, one, "")]),
        (
            "ModelConfig",
            [
                ("name", string, one, ""),
                ("platform", string, one, ""),
                ("max_batch_size", int32, one, ""),
                ("input", message, many, "ModelInput"),
                ("output", message, many, "ModelOutput"),
                ("dynamic_batching", message, one, "ModelDynamicBatching"),
            ],
        ),
    ]:
        described = file.message_type.add(name=name)
        for number, (field, kind, label, of) in enumerate(fields, 1):
            added = described.field.add(name=field, number=number, type=kind, label=label)
            if of:
                added.type_name = f".inference.{of}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    config = message_factory.GetMessageClass(pool.FindMessageTypeByName("inference.ModelConfig"))()
    return text_format.Parse(text, config)


@pytest.mark.parametrize("views", [1, 3])
def test_a_repository_for_triton(views, weights, onnx_file, tmp_path):
    odd = dataclasses.replace(weights, classes=("ash", "two\nlines", "cedar"))
    write_triton(tmp_path / "models", onnx_file, odd, name="motions", views=views)
    model = tmp_path / "models" / "motions"
    config = parse_triton((model / "config.pbtxt").read_text())
    assert (config.name, config.platform, config.max_batch_size) == ("motions", "onnxruntime_onnx", 8)
    [given], [made] = config.input, config.output
    assert (given.name, given.data_type, list(given.dims)) == ("clips", 2, [3] * (views == 3) + [3, 4, 32, 32])
    assert (made.name, made.data_type, list(made.dims)) == ({1: "logits", 3: "probabilities"}[views], 2, [3])
    assert config.HasField("dynamic_batching")
    assert (model / made.label_filename).read_text() == "ash\ntwo lines\ncedar\n"
    assert (model / "1" / "model.onnx").read_bytes() == onnx_file.read_bytes()
    session = onnxruntime.InferenceSession(onnx_file)  # Triton's backend asks for the batch to be its own dimension
    assert session.get_inputs()[0].shape[0] == "batch"


@pytest.mark.slow
def test_as_a_user_runs_it(weights, small_data, tmp_path):
    """With weights alone, and the run's config.yaml beside them."""
    folder = tmp_path / "run"
    folder.mkdir()
    save_weights(folder / "best.safetensors", weights)
    (folder / "config.yaml").write_text(
        f"name: trees\ndata: {{val: {small_data}/val.csv, num_frames: 4, crop_size: 32, workers: 0}}\n"
    )
    given = "-w", folder / "best.safetensors"
    out = tmp_path / "best.onnx"
    done = run("export.py", *given, "--format", "onnx", "--out", out, "--triton", tmp_path / "models")
    assert done.returncode == 0, done.stderr
    assert f"compared on 7 of the 7 videos in {small_data}/val.csv: largest difference of a logit" in done.stdout
    assert "same top-1 for all 21" in done.stdout and f"saved to {out}" in done.stdout
    assert (tmp_path / "models" / "trees" / "1" / "model.onnx").read_bytes() == out.read_bytes()
    video = small_data / "val_0.mp4"
    again = run_here(
        "export.py", *given, "--format", "torch", "--out", tmp_path / "b.pt2", "--views", 3, "--videos", video
    )
    assert again.returncode == 0 and "compared on 1 video: largest difference of a probability" in again.stdout


@pytest.mark.slow
def test_wrong_arguments(weights_file, monkeypatch, tmp_path):
    (tmp_path / "folder.onnx").mkdir()
    for arguments, message in [
        ("--format onnx", "--out is missing"),
        ("--format onnx --out a.pt2", "a.pt2: expected a name that ends in .onnx"),
        ("--format torch --out a.onnx", "a.onnx: expected a name that ends in .pt2"),
        (f"--format onnx --out {tmp_path}/none/a.onnx", "no such folder; make .*none first"),
        (f"--format onnx --out {tmp_path}/folder.onnx", "a folder; expected the name of a file"),
        ("--format torch --out a.pt2 --triton x", "--triton needs --format onnx"),
        ("--format torch --out a.pt2 --precision int8", "int8 needs --format onnx"),
        ("--format huggingface --out a --views 3", "--views 3 needs --format onnx or torch"),
        (
            "--format huggingface --out a --precision float16",
            "float16 needs --format onnx or torch; huggingface supports only",
        ),
        ("--format onnx --out a.onnx --tensorrt --precision int8", "--tensorrt needs --precision float32 or float16"),
        (
            f"--format onnx --out {tmp_path}/a.onnx --tensorrt",
            "here has .*CPUExecutionProvider, but not TensorrtExecutionProvider",
        ),
        (
            f"--format onnx --out {tmp_path}/a.onnx -o data.crop_size=64",
            "data.crop_size is 64, but these weights were trained with 32",
        ),
        (f"--format onnx --triton {tmp_path} -o name=a/b", "expected no / in it"),
        (f"--format onnx --triton {tmp_path} -o name=..", "expected no / in it"),
        (f"--format onnx --out {tmp_path}/a.onnx --videos a.csv b.csv", "expected video files, or one manifest"),
    ]:
        with pytest.raises(InputError, match=message):
            in_process(monkeypatch, "-w", weights_file, *arguments.split())
    assert {each.name for each in tmp_path.iterdir()} == {"w.safetensors", "folder.onnx"}


def test_missing_packages_are_named(weights_file, weights, clips, onnx_file, tmp_path, monkeypatch):
    for name in ("onnx", "onnxruntime", "onnxscript"):
        with monkeypatch.context() as without:
            without.setitem(sys.modules, name, None)
            with pytest.raises(InputError, match=f"needs {name}: pip install onnx onnxscript onnxruntime"):
                export_onnx(tmp_path / "w.onnx", weights, clips)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(InputError, match=r"w.onnx: cannot be opened without onnxruntime: pip install onnxruntime"):
        open_exported(onnx_file)
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "NOT VERIFIED: transformers cannot be imported" in export_hugging_face(tmp_path / "hf", weights, clips)


@pytest.mark.slow
def test_more_frames_than_the_weights_have(weights_file, clips, tmp_path):
    weights, config, _ = open_weights(str(weights_file), None, ["data.num_frames=8"])
    clips = clips_to_compare(weights, config, [], None, beside=weights_file)
    assert clips.origin == "compared on synthetic clips; name real ones with --videos"
    export_torch(tmp_path / "w.pt2", weights, clips)
    exported = open_exported(tmp_path / "w.pt2")
    assert exported.input_shape == (3, 8, 32, 32) and exported.preprocessing["num_frames"] == 8


@pytest.mark.slow
def test_where_the_clips_are_from(weights_file, weights, small_data, tmp_path, monkeypatch):
    from common.config import load_config
    from common.distributed import start_process

    def ask(videos=(), **data):
        config = load_config(None, defaults={"model": weights.model, "data": weights.preprocessing | data})
        with start_process("cpu") as process:
            return clips_to_compare(weights, config, list(videos), process, beside=weights_file)

    monkeypatch.setattr(verification, "_MOST_VIDEOS", 3)
    some = ask(val=f"{small_data}/val.csv")
    assert some.origin == f"compared on 3 of the 7 videos in {small_data}/val.csv" and some.views.shape[:3] == (3, 3, 3)
    assert [name.rsplit("/")[-1] for name in some.names] == ["val_0.mp4", "val_2.mp4", "val_4.mp4"]
    bad = tmp_path / "bad.mp4"
    whole = (small_data / "val_0.mp4").read_bytes()
    bad.write_bytes(whole[:50])
    with pytest.raises(InputError, match=r"--videos .*bad.mp4: not a video that FFmpeg can read"):
        ask([str(bad)])
    (tmp_path / "config.yaml").write_text("data: {val: gone.csv}")
    assert ask().origin.startswith(
        f"{tmp_path}/config.yaml names {tmp_path}/gone.csv, which does not exist; compared on synthetic"
    )
    (tmp_path / "other.yaml").write_text(f"data: {{val: {small_data}/val.csv}}")
    for text, reason in (
        ("base: other.yaml", "refers to another file"),
        ("name: ${oc.env:HOME}", "has an interpolation"),
    ):
        (tmp_path / "config.yaml").write_text(text)
        assert reason in ask().origin and "compared on synthetic" in ask().origin
        assert triton_name(Config(), beside=tmp_path / "w.safetensors") == "timesformer"
    (tmp_path / "config.yaml").write_text("data: {vale: gone.csv}")
    assert "unknown key data.vale" in ask().origin and "compared on synthetic clips" in ask().origin


def test_options_of_the_tensorrt_provider(weights, clips, onnx_file, tmp_path, monkeypatch):
    """Without TensorRT: checks the options for onnxruntime, and the message if the provider does not start."""
    asked = []

    class Session(onnxruntime.InferenceSession):
        def __init__(self, path, options=None, providers=()):
            asked.append(providers)
            super().__init__(path, options, providers=["CPUExecutionProvider"])

    path = tmp_path / "w.onnx"
    shutil.copy(onnx_file, path)
    available = ["TensorrtExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: available)
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    half = open_onnx(path)
    monkeypatch.setattr(tensorrt, "open_onnx", lambda _: dataclasses.replace(half, precision="float16"))
    with pytest.raises(InputError, match=r"could not start TensorrtExecutionProvider"):
        build_tensorrt(path, weights, clips, views=1, precision="float16")
    assert [each.name for each in tmp_path.iterdir()] == ["w.onnx"]  # an empty folder of engines would count as one
    name, options = asked[-1][0]
    assert name == "TensorrtExecutionProvider" and options["trt_fp16_enable"] is True
    assert options["trt_profile_min_shapes"] == "clips:1x3x4x32x32"
    assert options["trt_profile_max_shapes"] == "clips:8x3x4x32x32"
    assert options["trt_engine_cache_path"] == str(tmp_path / "w.unverified.tensorrt")
    monkeypatch.setattr(tensorrt, "start_session", lambda *_, **given: onnxruntime.InferenceSession(path))
    build_tensorrt(path, weights, clips, views=1, precision="float16")
    assert (tmp_path / "w.tensorrt").is_dir() and not (tmp_path / "w.unverified.tensorrt").exists()
    other = dataclasses.replace(weights, state={name: value + 0.1 for name, value in weights.state.items()})
    (tmp_path / "w.tensorrt").rmdir()
    with pytest.raises(MismatchError, match=r"kept as .*w.mismatch.tensorrt"):
        build_tensorrt(path, other, clips, views=1, precision="float16")
    assert not (tmp_path / "w.tensorrt").exists()  # predict.py would use it
