"""Weights files are self-contained; third-party weights need a config."""

import dataclasses
import pickle

import pytest
import torch
from safetensors.torch import save_file

from common.weights import Weights, average_weights, load_weights, open_weights, save_weights
from dali_pipelines import InputError
from model import TimeSformer
from tests.commands import run, run_here
from tests.conftest import DATA

MODEL = dict(patch_size=16, embed_dim=24, depth=1, num_heads=3)
PREPROCESSING = dict(num_frames=2, crop_size=32, mean=[0.0] * 3, std=[1.0] * 3)
CLASSES = ("ash", "Birke, ü", "3")


@pytest.fixture
def weights():
    model = TimeSformer(**MODEL, num_frames=2, image_size=32, num_classes=3)
    return Weights(MODEL, PREPROCESSING, CLASSES, model.state_dict())


def test_round_trip(weights, tmp_path):
    save_weights(tmp_path / "w.safetensors", weights)
    read = load_weights(tmp_path / "w.safetensors")
    assert (read.model, read.preprocessing, read.classes) == (MODEL, PREPROCESSING, CLASSES)
    assert read.state.keys() == weights.state.keys()
    assert all((read.state[name] == weights.state[name]).all() for name in read.state)
    assert list(tmp_path.iterdir()) == [tmp_path / "w.safetensors"]
    clips = torch.rand(1, 3, 2, 32, 32)
    assert (read.build()(clips) == weights.build()(clips)).all() and not read.build().training


def test_names_of_classes_come_back_whatever_is_in_them(weights, tmp_path):
    names = ("first\u2028half", "\udcff", "a\nb\r\x85")
    save_weights(tmp_path / "w.safetensors", dataclasses.replace(weights, classes=names))
    assert load_weights(tmp_path / "w.safetensors").classes == names


def test_other_files_are_refused(weights, tmp_path):
    save_weights(tmp_path / "whole", weights)
    (tmp_path / "cut").write_bytes((tmp_path / "whole").read_bytes()[:-100])
    (tmp_path / "pickle").write_bytes(pickle.dumps({"a": 1}))
    (tmp_path / "empty").touch()
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign")
    less = {name: value for name, value in weights.state.items() if name != "norm.bias"}
    nan = weights.state | {"norm.bias": torch.full((24,), torch.nan)}
    for name, changes in (
        ("less", {"state": less}),
        ("nan", {"state": nan}),
        ("classes", {"classes": CLASSES[:2]}),
        ("header", {"model": {"depth": 2, "width": 3}}),
    ):
        save_weights(tmp_path / name, dataclasses.replace(weights, **changes))
    for name, message in [
        ("cut", "damaged"),
        ("pickle", "not a safetensors file"),
        ("empty", "not a safetensors file"),
        ("foreign", "not weights written by train.py"),
        ("less", "damaged: norm.bias is not what its header says"),
        ("nan", "damaged: norm.bias"),
        ("classes", "damaged: head.bias"),
        ("header", "its header is not what train.py writes"),
        ("gone", "no such weights file"),
    ]:
        with pytest.raises(InputError, match=message):
            load_weights(tmp_path / name)


@pytest.mark.parametrize(
    "section, key, value, message",
    [
        ("model", "depth", 10_000_000, "model.depth is 10000000; expected 1 or more, at most 1000"),
        ("model", "depth", True, "model.depth is 'True'"),
        ("model", "num_heads", 0, "model.num_heads is 0"),
        ("model", "patch_size", 0, "model.patch_size is 0"),
        ("model", "embed_dim", 3 << 40, "model.embed_dim is 3298534883328"),
        ("model", "embed_dim", 10**400, "model.embed_dim is '1000"),
        ("model", "drop_path", float("nan"), "model.drop_path is nan"),
        ("model", "attention", "${oc.env:HOME}", "model.attention is \\${oc.env:HOME}; expected one of"),
        ("model", "embed_dim", "${oc.decode:24}", "model.embed_dim is '\\${oc.decode:24}'"),
        ("model", "num_classes", 9, "model.num_classes is not a setting of weights"),
        ("preprocessing", "workers", 64, "data.workers is not a setting of weights"),
        ("preprocessing", "cache", "/tmp/cache", "data.cache is not a setting of weights"),
        ("preprocessing", "labels", "/etc/passwd", "data.labels is not a setting of weights"),
        ("preprocessing", "num_frames", 4096, "damaged: time_embed is not what its header"),
        ("preprocessing", "crop_size", 512, "damaged: pos_embed is not what its header"),
        ("preprocessing", "crop_size", 8192, "a clip has . x 8192 x 8192 pixels"),
        ("preprocessing", "num_frames", 1 << 40, "data.num_frames is 1099511627776"),
        ("preprocessing", "short_side", [1, 10**9], "data.short_side is"),
        ("preprocessing", "stride", 1e300, "data.stride is 1e\\+300"),
        ("preprocessing", "target_fps", 1e-300, "data.target_fps is 1e-300"),
        ("preprocessing", "mean", [0.0, 10**400, 0.0], "data.mean is"),
        ("preprocessing", "std", [1.0, 0.0, 1.0], "data.std is"),
        ("preprocessing", "past_end", None, "data.past_end is 'None'"),
    ],
)
def test_a_header_sets_plain_settings_of_its_own_within_bounds(weights, tmp_path, section, key, value, message):
    changed = {section: getattr(weights, section) | {key: value}}
    save_weights(tmp_path / "w.safetensors", dataclasses.replace(weights, **changed))
    with pytest.raises(InputError, match=message) as refused:
        open_weights(str(tmp_path / "w.safetensors"), None)
    assert len(str(refused.value)) < 500


@pytest.mark.parametrize(
    "attention, frames, side, patch, message",
    [
        # No tensor of a space-only network shows how many frames it takes.
        ("space_only", 4096, 512, 16, "a clip has 4096 x 512 x 512 pixels"),
        ("divided_space_time", 2048, 128, 4, "a clip has 2048 x 1024 patches of 24 values"),
        ("joint_space_time", 1024, 128, 16, "65536 patches attend to each other"),
        ("space_only", 1, 256, 1, "65536 patches attend to each other"),
    ],
)
def test_a_small_file_cannot_request_a_huge_network(tmp_path, attention, frames, side, patch, message):
    model = MODEL | {"attention": attention, "patch_size": patch}
    told = 2 if attention == "space_only" else frames
    state = TimeSformer(**model, num_frames=told, image_size=side, num_classes=3).state_dict()
    clips = PREPROCESSING | {"num_frames": frames, "crop_size": side}
    save_weights(tmp_path / "w.safetensors", Weights(model, clips, CLASSES, state))
    with pytest.raises(InputError, match=message):
        load_weights(tmp_path / "w.safetensors")


@pytest.mark.parametrize("classes", [[], {"a": 1}, "abc", [1, 2, 3], 3], ids=str)
def test_classes_in_a_header_are_a_list_of_names(weights, tmp_path, classes):
    save_weights(tmp_path / "w.safetensors", dataclasses.replace(weights, classes=classes))
    with pytest.raises(InputError, match="its header is not what train.py writes"):
        load_weights(tmp_path / "w.safetensors")


@pytest.mark.slow
def test_another_preprocessing_than_the_weights_is_refused(tmp_path, config_file):
    model = TimeSformer(num_frames=4, image_size=32, num_classes=3, embed_dim=24, depth=2, num_heads=3)
    config = open_config(config_file)
    save_weights(tmp_path / "w.safetensors", Weights(*config, CLASSES, model.state_dict()))
    path = str(tmp_path / "w.safetensors")
    assert open_weights(path, str(config_file))[1].data.crop_size == 32
    assert open_weights(path, str(config_file), ["model.drop_path=0.5"])[1].model.drop_path == 0.5
    changes = "data.mean=[0.5,0.5,0.5]", "data.crop_size=64", "data.stride=8", "data.past_end=hold", "model.depth=5"
    for override in changes:
        with pytest.raises(InputError, match=r"but these weights were trained with"):
            open_weights(path, str(config_file), [override])
    # Only the number of frames may differ, as in PaddleVideo's test with 16.
    weights, config, said = open_weights(path, None, ["data.num_frames=8"])
    assert config.data.num_frames == weights.preprocessing["num_frames"] == 8
    assert "time_embed: resized from 4 to 8 frames" in said
    assert weights.build()(torch.rand(1, 3, 8, 32, 32)).shape == (1, 3)
    assert (weights.state["time_embed"][0, ::2] == model.time_embed[0]).all()


def open_config(config_file):
    from common.config import load_config, preprocessing

    config = load_config(str(config_file))
    return dataclasses.asdict(config.model), preprocessing(config.data)


@pytest.fixture
def golden_config(tmp_path):
    (tmp_path / "labels.txt").write_text("".join(f"class {n}\n" for n in range(11)))
    (tmp_path / "golden.yaml").write_text(
        f"data: {{num_frames: 4, crop_size: 64, stride: null, workers: 0, labels: {tmp_path}/labels.txt}}\n"
        "model: {embed_dim: 48, depth: 3, num_heads: 3}\n"
    )
    return str(tmp_path / "golden.yaml")


@pytest.mark.slow
def test_third_party_weights_open_with_a_config(golden_config, tmp_path):
    path = str(DATA / "tiny.pdparams")
    weights, config, said = open_weights(path, golden_config)
    assert said == f"{path} (PaddleVideo): 63 tensors loaded unchanged"
    assert weights.classes[10] == "class 10" and weights.preprocessing["crop_size"] == config.data.crop_size == 64
    space = tmp_path / "space.pth"
    timeless = {f"model.{name}": value for name, value in weights.state.items() if "temporal" not in name}
    del timeless["model.time_embed"]
    torch.save(timeless, space)
    foreign = {name: torch.zeros(3) for name in ("a", "b")}
    save_file(foreign, tmp_path / "x.safetensors")
    (tmp_path / "ten.txt").write_text("a\n" * 10)
    vit = {name: value for name, value in weights.state.items() if "temporal" not in name and name != "time_embed"}
    save_file(vit, tmp_path / "vit.safetensors")
    for file, config_path, overrides, message in [
        (path, None, [], "does not say how clips are cut, or what the classes are; give a config with -c"),
        (
            tmp_path / "x.safetensors",
            None,
            [],
            "x.safetensors: not weights written by train.py; for other weights",
        ),
        (tmp_path / "x.safetensors", golden_config, [], "not weights of a known vision transformer"),
        (path, golden_config, ["data.labels=null"], "tiny.pdparams: has no class names; give a file with one per line"),
        (
            path,
            golden_config,
            [f"data.labels={tmp_path}/ten.txt"],
            "its classes are not the 10 in .*ten.txt: 11 classes in the file, 10 here. Name the file of its own",
        ),
        (path, golden_config, ["model.qkv_bias=true"], "set model.qkv_bias=false"),
        (tmp_path / "vit.safetensors", golden_config, [], "vit.safetensors: not trained for these classes of videos"),
        ("gone.pdparams", golden_config, [], "gone.pdparams: no such weights file"),
        ("gone.pdparams", None, [], "gone.pdparams: no such weights file"),
        ("https://a.b/c.pdparams", golden_config, [], "c.pdparams: a URL; download it, and name the file"),
        ("a.pdmodel", None, [], "a.pdmodel: exported by Paddle; expected the .pdparams that it was exported from"),
        (tmp_path, None, [], "does not say how clips are cut"),
        (space, golden_config, ["model.attention=joint_space_time"], "not trained for these classes of videos"),
    ]:
        with pytest.raises(InputError, match=message):
            open_weights(str(file), config_path, overrides)


def test_the_mean_of_weights(weights, tmp_path):
    paths = []
    for number in range(3):
        state = {name: torch.full_like(value, 3.0 * number) for name, value in weights.state.items()}
        paths.append(str(tmp_path / f"{number}.safetensors"))
        save_weights(paths[-1], dataclasses.replace(weights, state=state))
    averaged = average_weights(paths)
    assert all((value == 3).all() for value in averaged.state.values())
    assert (averaged.model, averaged.classes) == (weights.model, weights.classes)
    save_weights(tmp_path / "other.safetensors", dataclasses.replace(weights, classes=("a", "b", "c")))
    with pytest.raises(InputError, match=r"one file cannot be averaged"):
        average_weights(paths[:1])
    with pytest.raises(InputError, match=r"other.safetensors: its classes differs from .*0.safetensors"):
        average_weights([paths[0], str(tmp_path / "other.safetensors")])


@pytest.mark.slow
def test_the_commands_as_a_user_runs_them(golden_config, weights, tmp_path, small_data):
    out = tmp_path / "converted.safetensors"
    done = run("weights.py", "convert", DATA / "tiny.pdparams", "-c", golden_config, "--out", out)
    assert done.returncode == 0, done.stderr
    assert "63 tensors loaded unchanged" in done.stdout and f"saved to {out}: 11 classes" in done.stdout
    video = small_data / "val_0.mp4"
    ours = run_here("predict.py", "-w", out, video, "--device", "cpu", "--json")
    theirs = run_here(
        "predict.py", "-w", DATA / "tiny.pdparams", "-c", golden_config, video, "--device", "cpu", "--json"
    )
    assert ours.stdout == theirs.stdout and "class " in ours.stdout, theirs.stderr
    assert "63 tensors loaded" in theirs.stderr
    again = run_here("weights.py", "convert", DATA / "tiny.pdparams", "-c", golden_config, "--out", out)
    assert again.returncode == 2 and "converted.safetensors: already exists" in again.stderr
    average = run_here("weights.py", "average", out, out, "--out", tmp_path / "mean.safetensors")
    assert average.returncode == 0 and "mean of 2 files" in average.stdout
    assert (
        load_weights(tmp_path / "mean.safetensors").state["head.bias"] == load_weights(out).state["head.bias"]
    ).all()
