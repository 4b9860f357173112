"""Configs: precedence, and errors that name the key."""

import dataclasses
import os
import re
import shlex
from pathlib import Path

import pytest

from commands.train import main as train_command
from common.config import (
    Config,
    ModelConfig,
    absolute_paths,
    clip_settings,
    flat,
    load_config,
    preprocessing,
    to_yaml,
)
from common.config_rules import check_value
from common.settings import settings
from dali_pipelines import ClipLoader, InputError

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("name: mine\noptim: {lr: 1e-3}\ndata: {stride: null, num_frames: 4}\n")
    return str(path)


def test_overrides_beat_the_file_and_the_file_beats_the_defaults(file):
    config = load_config(file, ["data.num_frames=16", "data.mean=[0.1,0.2,0.3]", "optim.lr=0.5", "optim.lr=2e-3"])
    assert (config.data.num_frames, config.optim.lr, config.data.stride) == (16, 0.002, None)
    assert config.data.mean == [0.1, 0.2, 0.3] and config.model == ModelConfig()
    assert config.output == "output/mine"  # follows the name
    below = load_config(file, defaults={"data": {"num_frames": 2, "crop_size": 64}})
    assert (below.data.num_frames, below.data.crop_size) == (4, 64)


def test_the_resolved_config_reads_back(file, tmp_path):
    config = load_config(file, ["seed=3"])
    (tmp_path / "b.yaml").write_text(to_yaml(config))
    assert load_config(str(tmp_path / "b.yaml")) == absolute_paths(config)


@pytest.mark.parametrize(
    "override, message",
    [
        ("data.num_frame=8", "unknown key data.num_frame; did you mean data.num_frames"),
        ("lr=1", "unknown key lr; did you mean optim.lr"),
        ("learning=1", "unknown key learning; known: name, seed, output, device, model, data"),
        ("optim.learning_rate=1", "unknown key optim.learning_rate; did you mean optim.lr?"),
        ("model.backbone.num_frames=3", r"unknown key model.backbone; did you mean data.num_frames\?"),
        ("optim.learnig_rate=1", r"unknown key optim.learnig_rate; did you mean optim.lr\?"),
        ("train.loggers=wandb", "train.loggers: expected a list of tensorboard, wandb, mlflow"),
        ("train.epochs=abc", "train.epochs: Value 'abc' .* expected 1 or more"),
        ("COMMON={fps: 5, batch: 3}", "unknown key COMMON; known: name"),
        ("optim.foo=1", "unknown key optim.foo; known: optim.name, optim.implementation"),  # no guess
        ("MODEL.backbone.num_seg=16", "a section of PaddleVideo; here it is data.num_frames=16"),
        ("PIPELINE.test.sample.num_seg=16", "here it is data.num_frames=16"),
        ("OPTIMIZER.name=Momentum", "here it is optim.name=sgd"),
        ("MODEL.head.num_classes=5", r"the number of classes follows from the class names \(data.labels\)"),
        ("METRIC.name=CenterCropMetric", "here: train.py and evaluate.py always compute it"),
        ("MIX.name=VideoMix", "a section of PaddleVideo; docs/migrate.md says"),
        ("MODEL.runtime_cfg.test.avg_type=score", "here: evaluate.py --average"),
        ("OPTIMIZER.learning_rate.milestones=[11,14]", r"here it is optim.decay_epochs=\[11,14\]"),
        ("PIPELINE.train.transform.0.Normalization.mean=[0,0,0]", r"here it is data.mean=\[0,0,0\]"),
        ("PIPELINE.train.transform.2.JitterScale.min_size=9", r"here: data.short_side=\[low,high\]"),
        ("save_interval=5", "unknown key save_interval; here: a checkpoint is saved after every epoch"),
        ("load_from=a.pth", "unknown key load_from; did you mean train.pretrained?"),
        ("train_dataloader.dataset.data_prefix.video=a", "here: data.train, data.val and data.test name manifests"),
        ("model.backbone.attention_type=space_only", "did you mean model.attention?"),
        ("test_dataloader.dataset.pipeline.1.num_clips=4", "here: evaluate.py --windows N"),
        ("optim_wrapper.optimizer.type=AdamW", "did you mean optim.name?"),
        ("param_scheduler.0.milestones=[5,10]", "did you mean optim.decay_epochs?"),
        ("model.cls_head.num_classes=9", "unknown key model.cls_head; here: it follows from the class names"),
        ("data.test.ann_file=a.txt", "data.test is not a section; expected data.test=VALUE"),
        ("data.mean=[127.5,127.5,127.5]", "data.mean is .* for pixels from 0 to 1: 127.5 of 255 is 0.5"),
        ("data.std=[58.4,57.1,57.4]", "data.std is .* for pixels from 0 to 1"),
        ("model.num_classes=3", "it follows from"),
        ("data=3", "data is a section"),
        ("data.num_frames=eight", "data.num_frames: Value 'eight'"),
        ("data.num_frames=0", "data.num_frames is 0; expected 1 or more"),
        ("data.crop_size=100", "a multiple of model.patch_size, 16"),
        ("data.short_side=[256]", r"expected \[low, high\]"),
        ("optim.name=adam", "expected one of sgd, adamw"),
        ("model.attention=time", "expected one of divided_space_time"),
        ("train.precision=half", "expected one of auto, amp, float32, bf16, fp16"),
        ("seed=-1", "seed is -1"),
        ("seed=18446744073709551616", "seed is 18446744073709551616; expected 0 or more"),
        ("nonsense", "expected KEY=VALUE without spaces"),
        ("optim.lr =x", "optim.lr: Value 'x'"),
        ("data.mean=[1,", "not YAML"),
        ("output=${name", "output"),
        ("data.mean=[nan,0,0]", "data.mean is .* expected three numbers"),
        ("optim.clip_norm=-1", "optim.clip_norm is -1.0; expected more than 0, or null"),
        ("optim.lr=inf", "optim.lr is inf; expected more than 0"),
        ("optim.betas=[0.9]", "expected two numbers"),
        ("optim.weight_decay=-1", "optim.weight_decay is -1"),
        ("optim.warmup_epochs=20", "expected less than train.epochs, 20: the learning rate would never reach"),
        ("model.num_heads=0", "model.num_heads is 0"),
        ("model.num_heads=7", "model.embed_dim is 768; expected a multiple of model.num_heads, 7"),
        ("model.patch_size=-16", "model.patch_size is -16"),
        ("train.checkpoint_every_steps=-1", "or null"),
        ("optim.decay_epochs=[3,2]", "optim.decay_epochs is .* expected rising, above 0"),
        ("mix.cutmix_box=time", "expected one of space, reference"),
        ("mix.cutmix_prob=2", "mix.cutmix_prob is 2.0; expected 0 to 1"),
        ("mix.cutmix_alpha=0", "mix.cutmix_alpha is 0.0; expected more than 0"),
        ("distill.temperature=0", "expected more than 0"),
        ("optim.layer_decay=0", "optim.layer_decay is 0.0; expected more than 0, at most 1"),
        ("optim.head_lr_factor=0", "optim.head_lr_factor is 0.0; expected more than 0"),
        ("augment.randaugment_magnitude=11", "augment.randaugment_magnitude is 11.0; expected 0 to 10"),
        ("augment.erasing_prob=2", "augment.erasing_prob is 2.0; expected 0 to 1"),
        ("train.ema_decay=1", "train.ema_decay is 1.0; expected 0 or more, less than 1, or null"),
        ("train.freeze_blocks=13", "train.freeze_blocks is 13; expected at most model.depth, 12"),
        ("train.freeze_blocks=3", "train.freeze_blocks is 3 without train.pretrained"),
        ("train={swa_epochs: 2, ema_decay: 0.9}", "swa_epochs is 2 and train.ema_decay is 0.9; only one average"),
        ("train.swa_epochs=21", "train.swa_epochs is 21; expected at most train.epochs, 20"),
        ("base=a.yaml", "unknown key base"),
        ("data.max_fault_fraction=5", "data.max_fault_fraction is 5.0; expected 0 to 1"),
        ("data.max_fault_fraction=-0.1", "expected 0 to 1"),
    ],
)
def test_errors_name_the_key(file, override, message):
    with pytest.raises(InputError, match=message):
        load_config(file, [override])


@pytest.mark.parametrize(
    "key, good, bad",
    [
        ("seed", [0, 2**64 - 1], [-1, 2**64]),
        ("data.short_side", [None, [1, 65_536]], [[1], [0, 1], [1, 65_537]]),
        ("data.stride", [None, 0.5, 1e6], [0, 1.1e6]),
        ("data.target_fps", [1e-3, 1e6], [0, 1.1e6]),
        ("optim.betas", [[0, 0.99]], [[0.9], [0.9, 1], [-0.1, 0.9]]),
        ("optim.layer_decay", [0.01, 1], [0, 1.01]),
        ("optim.head_lr_factor", [0.1, 10], [0]),
        ("augment.randaugment_ops", [0, 1], [-1]),
        ("augment.randaugment_magnitude", [0, 10], [-0.1, 10.1]),
        ("augment.erasing_prob", [0, 1], [-0.1, 1.1]),
        ("train.freeze_blocks", [0, 1], [-1]),
        ("train.ema_decay", [None, 0, 0.999], [-0.1, 1]),
        ("train.loggers", [[], ["tensorboard", "wandb", "mlflow"]], [["comet"]]),
        ("train.validate_every", [1], [0]),
        ("train.best_metric", ["top1", "mean_class_accuracy", "macro_f1", "loss"], ["top5"]),
        ("train.early_stopping", [None, 1], [0]),
    ],
)
def test_first_and_last_values_that_are_allowed(key, good, bad):
    for value in good:
        check_value(key, value)
    for value in bad:
        with pytest.raises(InputError, match=f"^{key} is .*; expected"):
            check_value(key, value)


def test_a_date_is_a_valid_name(tmp_path):
    (tmp_path / "a.yaml").write_text("name: 2024-01-01\n")
    assert load_config(str(tmp_path / "a.yaml")).output == "output/2024-01-01"


def test_a_file_that_is_not_a_config(tmp_path):
    (tmp_path / "list.yaml").write_text("- a\n- b\n")
    (tmp_path / "bad.yaml").write_text("a: [1\n")
    (tmp_path / "unknown.yaml").write_text("trainer: {epochs: 3}\n")
    (tmp_path / "dots.yaml").write_text("optim.lr: 0.1\n")
    (tmp_path / "tabs.yaml").write_text("train:\n\tepochs: 3\n")
    (tmp_path / "ansi.yaml").write_text("name: Übung\n", encoding="cp1252")
    (tmp_path / "table.yaml").write_text("path,label\n" * 99)
    for name, message in (
        ("list", "key: value"),
        ("bad", "not YAML"),
        ("unknown", "unknown key trainer; did you"),
        ("dots", "unknown key optim.lr; in a file, write it as optim: {lr: 0.1}"),
        ("tabs", "a tab. indent with spaces"),
        ("ansi", "not UTF-8; save the file as UTF-8"),
        ("table", "^.{,300}$"),
    ):
        with pytest.raises(InputError, match=message):
            load_config(str(tmp_path / f"{name}.yaml"))
    with pytest.raises(InputError, match="no such config; these come with the project"):
        load_config(str(tmp_path / "gone.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_of_the_project_loads_and_says_what_it_is_for(path):
    config = load_config(str(path))
    text = path.read_text()
    assert config.name == path.stem and text.startswith("#") and "train.py -c configs/" in text
    assert "Reaches: " in text or ("Reproduces: " in text and "Not run here" in text)
    keys = [line.split(":")[0].strip() for line in text.splitlines() if ":" in line and not line.startswith("#")]
    assert keys.count("num_frames") <= 1 and config.data.train and config.data.val
    for file in (config.data.labels, *re.findall(r"configs/\S+\.(?:yaml|txt)", text.split("Command: ")[1])):
        assert file is None or (CONFIGS[0].parents[1] / file).is_file() or file.startswith("configs/recognition")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_file_that_windows_saved(tmp_path, encoding):
    (tmp_path / "a.yaml").write_text("train:\r\n  epochs: 30\r\n", encoding=encoding, newline="")
    assert load_config(str(tmp_path / "a.yaml")).train.epochs == 30


def test_a_file_extends_its_base(file, tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "b.yaml").write_text("base: ../a.yaml\noptim: {momentum: 0.5}\ndata: {num_frames: 16}\n")
    (tmp_path / "c.yaml").write_text("base: inner/b.yaml\nname: c\n")
    config = load_config(str(tmp_path / "c.yaml"), ["optim.lr=2.0"])
    assert (config.name, config.data.num_frames, config.optim.momentum, config.optim.lr) == ("c", 16, 0.5, 2.0)
    assert config.data.stride is None  # from the lowest
    (tmp_path / "round.yaml").write_text("base: round.yaml\n")
    with pytest.raises(InputError, match=r"round.yaml: its `base` leads back to itself"):
        load_config(str(tmp_path / "round.yaml"))
    for base in ("${name}", "[x]", "5", "{a: 1}", "''", "???"):
        (tmp_path / "odd.yaml").write_text(f"base: {base}\n")
        with pytest.raises(InputError, match=r"odd.yaml: base is .* expected the name of a YAML file"):
            load_config(str(tmp_path / "odd.yaml"))
    (tmp_path / "bad.yaml").write_text("base: gone.yaml\n")
    with pytest.raises(InputError, match=r"gone.yaml: no such config"):
        load_config(str(tmp_path / "bad.yaml"))


def test_a_config_of_another_project_is_translated(tmp_path):
    (tmp_path / "paddle.yaml").write_text(
        """
        MODEL: {backbone: {pretrained: "", num_seg: 16, qkv_bias: False}, head: {num_classes: 101, ls_eps: 0.1},
            runtime_cfg: {test: {avg_type: score}}}
        DATASET: {batch_size: 8, train: {file_path: data/k400/train.list}}
        PIPELINE:
            train:
                sample: {num_seg: 16}
                transform: [Normalization: {mean: [0, 0, 0]}, JitterScale: {min_size: 256, max_size: 320}]
            test: {transform: [JitterScale: {min_size: 224, max_size: 224}, UniformCrop: {target_size: 224}]}
        OPTIMIZER:
            name: Momentum
            learning_rate: {learning_rate: 0.004, name: MultiStepDecay, milestones: [11, 14], gamma: 0.1}
            weight_decay: {value: 7e-5}
        model_name: "my TimeSformer"
        epochs: 15
        """
    )
    with pytest.raises(InputError, match="a config of PaddleVideo. Take -c pptimesformer_k400.yaml") as raised:
        load_config(str(tmp_path / "paddle.yaml"))
    assert "it tests with evaluate.py --average score" in str(raised.value)
    typed = shlex.split(re.search(r"here are: -o (.*) \(docs/migrate.md;", str(raised.value))[1])
    config = load_config(None, typed)  # what the message says can be typed
    assert (config.data.num_frames, config.data.crop_size, config.data.short_side) == (16, 224, [256, 320])
    assert (config.optim.name, config.optim.lr, config.optim.weight_decay) == ("sgd", 0.004, 7e-5)
    assert typed[-1] == "data.labels=null"  # of the manifest, not of the config to take
    assert (config.optim.decay_epochs, config.train.epochs, config.name) == ([11, 14], 15, "my TimeSformer")
    assert (config.model.qkv_bias, config.train.label_smoothing, config.data.train) == (
        False,
        0.1,
        "data/k400/train.list",
    )
    for other, name in (("backbone: {name: ResNetTSM}", "ResNetTSM"), ("framework: AttentionLstm", "AttentionLstm")):
        (tmp_path / "other.yaml").write_text(f"MODEL: {{{other}}}\n")
        with pytest.raises(InputError, match=f"PaddleVideo for {name}; the only network here is TimeSformer"):
            load_config(str(tmp_path / "other.yaml"))
    with pytest.raises(InputError, match="timesformer.py: a config of mmaction2"):
        load_config("timesformer.py")


def test_a_path_in_a_file_starts_at_that_file(tmp_path, monkeypatch):
    (tmp_path / "inner").mkdir()
    (tmp_path / "there.pdparams").touch()
    (tmp_path / "base.yaml").write_text(
        "data: {train: a/train.csv, labels: names.txt, val: /b/val.csv, test: 's3://c/test.csv'}\n"
        "train: {pretrained: owner/name}\n"
    )
    (tmp_path / "inner" / "own.yaml").write_text(
        "base: ../base.yaml\nname: x\noutput: ../runs/${name}\ndata: {labels: own.txt}\n"
    )
    for folder, path in (
        (tmp_path, "inner/own.yaml"),
        (tmp_path / "inner", "own.yaml"),
        ("/", f"{tmp_path}/inner/own.yaml"),
    ):
        monkeypatch.chdir(folder)
        config = absolute_paths(load_config(path, ["data.cache=typed"]))
        assert config.data.train == f"{tmp_path}/a/train.csv" and config.data.labels == f"{tmp_path}/inner/own.txt"
        assert (config.data.val, config.data.test) == ("/b/val.csv", "s3://c/test.csv")
        assert config.output == f"{tmp_path}/runs/x" and config.train.pretrained == "owner/name"  # on the Hub
        assert config.data.cache == os.path.abspath("typed")
        (tmp_path / "inner" / "saved.yaml").write_text(to_yaml(config))
        assert load_config(f"{tmp_path}/inner/saved.yaml") == config
    monkeypatch.chdir(tmp_path)
    assert load_config("base.yaml").output == "output/timesformer"  # the default starts at the current folder
    assert load_config("demo.yaml") == load_config(CONFIGS[0].parent / "demo.yaml")  # comes with the project


def test_every_setting_is_explained(file, tmp_path, in_process):
    assert [each.key for each in settings()] == list(flat(dataclasses.asdict(Config())))
    assert all(each.meaning for each in settings())
    status, printed, _ = in_process(train_command, "-c", file, "--print-config", "--amp", "-o", "data.train=a.csv")
    (tmp_path / "printed.yaml").write_text(printed)
    expected = load_config(file, ["data.train=a.csv", "train.precision=amp"])
    assert status == 0 and load_config(str(tmp_path / "printed.yaml")) == absolute_paths(expected)
    assert "  # Learning rate at the end of the warm-up, for the global batch.\n  lr: 0.001\n" in printed
    status, printed, _ = in_process(train_command, "--list-settings", "optim.lr")
    assert (status, printed) == (
        0,
        "optim.lr: float = 0.0025\n    Learning rate at the end of the warm-up, for the global batch.\n",
    )
    status, _, error = in_process(train_command, "--list-settings", "foo")
    assert status == 2 and "no setting begins with foo; expected one of name, seed" in error


def test_what_paddlevideo_calls_testing_is_another_command(in_process):
    status, _, error = in_process(train_command, "--test", "-c", "demo.yaml", "-w", "a.pdparams")
    assert status == 2 and "To test: evaluate.py -w a.pdparams -c demo.yaml" in error


def test_clip_settings_fit_the_loader(numbered_videos):
    config = load_config(None, ["data.short_side=[40,50]", "data.crop_size=32"])
    sides = {}
    for mode in ("train", "validate", "test"):
        made = ClipLoader(numbered_videos, **clip_settings(config.data, mode), batch_size=2, workers=0)
        sides[mode] = made._view.short_sides
    assert sides == {"train": (40, 50), "validate": (40, 40), "test": (32, 32)}
    assert set(preprocessing(config.data)) >= {"num_frames", "crop_size", "mean", "std", "stride", "past_end"}
