"""What a run shows: metrics.jsonl, TensorBoard, lines, metrics of the GPU by a double of NVML, the profile."""

import gzip
import json
import math
import re
import sys
import types

import pytest
import torch
from nvidia.dali import __version__ as dali_version
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.record_writer import RecordWriter

from common import system_metrics
from common.config import load_config
from tests.training.test_engine import lines, train
from training.engine import Trainer
from training.monitor import Monitor
from training.profiling import PARTS

INTERVAL = {
    "train/loss", "train/top1", "train/top5", "train/lr", "train/grad_norm", "train/loss_scale", "train/skipped_steps",
    "train/epoch", "train/faults", "speed/clips_per_second", "speed/step_ms", "speed/data_wait_ms",
    "speed/data_wait_share", "data/packets_read", "data/packets_kept", "host/memory_gib",
}  # fmt: skip
VALIDATION = {"val/top1", "val/top5", "val/loss", "val/mean_class_accuracy", "val/macro_f1"}


def events(folder):
    return EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "images": 0}).Reload()


@pytest.mark.slow
def test_tensorboard_and_the_lines_hold_the_same(config_file, tmp_path):
    train(config_file, "train.epochs=2", "train.log_every_steps=2", "train.swa_epochs=1")
    output = tmp_path / "output"
    logged = lines(output)
    assert [line["step"] for line in logged] == [2, 3, 3, 4, 6, 6]
    assert set(logged[0]) == {"time", "step"} | INTERVAL and set(logged[2]) == {"time", "step"} | VALIDATION
    assert {"swa/top1", "swa/top5", "swa/loss"} <= set(logged[-1])
    found = events(output)
    assert set(found.Tags()["scalars"]) >= INTERVAL | VALIDATION
    for name in INTERVAL | VALIDATION:
        theirs = [(event.step, event.value) for event in found.Scalars(name)]
        ours = [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in logged if name in line]
        assert theirs == ours, name
    first = logged[0]
    assert first["speed/step_ms"] >= first["speed/data_wait_ms"] > 0 and 0 < first["speed/data_wait_share"] < 1
    assert first["data/packets_read"] >= first["data/packets_kept"] > 0 and 0.1 < first["host/memory_gib"] < 24


@pytest.mark.slow
def test_the_image_shows_mixed_clips_once_per_epoch(config_file, tmp_path):
    """Mixup with a share of about a half: the clips of a run with it are other ones, of as many pixels."""
    train(config_file, "train.epochs=2", f"output={tmp_path}/plain")
    train(config_file, "train.epochs=2", "mix.mixup_alpha=50")
    plain, mixed = (events(tmp_path / name).Images("train/clips") for name in ("plain", "output"))
    assert [picture.step for picture in mixed] == [1, 4]
    assert (mixed[0].height, mixed[0].width) == (4 * 32, 4 * 32)
    assert mixed[0].encoded_image_string != plain[0].encoded_image_string


@pytest.mark.slow
def test_config_and_hyperparameters_are_shown(config_file, tmp_path):
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    train(config_file, "train.epochs=1")
    found = events(tmp_path / "output")
    text = found.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "global_batch_size: 4" in text and "past_end: fit" in text
    start = found.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    values = HParamsPluginData.FromString(start).session_start_info.hparams
    assert values["optim.lr"].number_value == 0.05 and values["model.attention"].string_value == "divided_space_time"
    metrics = HParamsPluginData.FromString(found.SummaryMetadata("_hparams_/experiment").plugin_data.content)
    assert {metric.name.tag for metric in metrics.experiment.metric_infos} == VALIDATION
    assert "_hparams_/session_end_info" in found.summary_metadata


@pytest.mark.slow
def test_after_a_kill_no_step_appears_twice(config_file, tmp_path):
    """Killed after step 5, whose log went further than the newest checkpoint."""
    train(config_file, "train.epochs=2")
    output = tmp_path / "output"
    newest = max((output / "checkpoints").iterdir())
    newest.unlink()
    with open(output / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "tra')
    train(config_file, "train.epochs=2", resume=True)
    assert [line["step"] for line in lines(output) if "train/lr" in line] == [1, 2, 3, 4, 5, 6]
    found = events(output)
    assert [event.step for event in found.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    assert [picture.step for picture in found.Images("train/clips")] == [1, 4]


@pytest.mark.slow
def test_a_writer_that_had_to_be_opened_again_takes_nothing_away(config_file, tmp_path, monkeypatch):
    """TensorBoard's file on a disk that is full at step 4; what was written before stays, what follows too."""
    plain = Monitor.log_interval

    def log_interval(self, step, values):
        with monkeypatch.context() as patch:
            if step == 4:
                patch.setattr(RecordWriter, "write", no_room)
            plain(self, step, values)

    def no_room(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Monitor, "log_interval", log_interval)
    train(config_file)
    shown = [event.step for event in events(tmp_path / "output").Scalars("train/loss")]
    assert shown == [1, 2, 3, 5, 6, 7, 8, 9]


def test_values_that_are_not_finite_are_null_in_the_lines(tmp_path, config_file):
    monitor = Monitor(tmp_path, total_steps=3)
    monitor.open(load_config(str(config_file)), step=0, size=0)
    monitor.log(1, {"a": math.nan, "b": math.inf, "c": 2.5})
    monitor.close()
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    values = json.loads(line, parse_constant=pytest.fail)
    assert (values["a"], values["b"], values["c"]) == (None, None, 2.5)


@pytest.mark.slow
def test_lines_without_a_terminal(config_file, capsys):
    train(config_file, "train.epochs=1", "train.log_every_steps=3")
    said = capsys.readouterr()
    line = r"step 3/3, epoch 1.00: loss \d\.\d{4}, lr 0\.\d+, [\d.]+ clips/s, data wait \d+%, ETA 00:00\n"
    assert re.search(line, said.out) and said.err == ""


@pytest.mark.slow
def test_the_start_says_what_runs_where(config_file, capsys):
    train(config_file, "train.epochs=1", "data.batch_size=2", "optim.name=lamb", "train.precision=bf16")
    said = capsys.readouterr().out.splitlines()
    assert said[:6] == [
        f"device cpu, 1 ranks, 1 on this machine; torch {torch.__version__}, DALI {dali_version}",
        "network eager: train.compile=auto compiles on a GPU",
        "precision bf16, optimizer Lamb (torch foreach), gradients by torch foreach",
        "13 training and 7 validation videos, 3 classes",
        "decoders: h264 host, vp9 host",
        "global batch 4 = 1 ranks x 2 clips x 2 micro-steps; 3 steps per epoch (1 clips left over), 3 in 1 epochs",
    ]
    assert [line.split("/")[-1] for line in said if "no packet index" in line] == [
        f"{name}.csv: no packet index beside it, so each clip reads through its file; to get one, run again: "
        "prepare.py index, folder, transcode or pack"
        for name in ("train", "val")
    ]


@pytest.mark.slow
def test_the_progress_bar_on_a_terminal(config_file, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TQDM_MININTERVAL", "0")
    train(config_file, "train.epochs=1")
    said = capsys.readouterr()
    assert "step 1/3" not in said.out
    shown = r"3/3 \[00:\d\d<00:00, .*step/s, epoch=1, loss=\d\.\d{3}, clips/s=[\d.]+, data wait=\d+%\]"
    assert re.search(shown, said.err)


# -- the GPU --


def test_decoder_use_by_nvml(monkeypatch):
    """A double with the functions of nvidia-ml-py that are called, as its documentation has them."""

    class NVMLError(Exception):
        pass

    def by_uuid(uuid):
        if uuid != "GPU-0123":
            raise NVMLError("not found")
        return "handle"

    double = types.ModuleType("pynvml")
    double.NVMLError, double.nvmlInit, double.nvmlDeviceGetHandleByUUID = NVMLError, lambda: None, by_uuid
    double.nvmlDeviceGetDecoderUtilization = lambda handle: [37, 167_000]
    double.nvmlDeviceGetUtilizationRates = lambda handle: types.SimpleNamespace(gpu=80, memory=20)
    monkeypatch.setitem(sys.modules, "pynvml", double)
    system_metrics._nvml.cache_clear()
    assert system_metrics.nvml_metrics("0123") == {"gpu/decoder_share": 0.37, "gpu/compute_share": 0.8}
    assert system_metrics.nvml_metrics("other") == {}
    system_metrics._nvml.cache_clear()


def test_without_a_gpu_nothing_is_said_of_one():
    system_metrics._nvml.cache_clear()
    assert system_metrics.gpu_metrics(torch.device("cpu")) == {} and system_metrics.nvml_metrics("0123") == {}


@pytest.mark.gpu
def test_metrics_of_a_gpu():
    device = torch.device("cuda", 0)
    held = torch.zeros(2**28, device=device)
    found = system_metrics.gpu_metrics(device)
    assert found["gpu/torch_memory_gib"] >= 1 and found["gpu/memory_gib"] >= 1 and held.numel()
    assert 0 <= found["gpu/decoder_share"] <= 1 and 0 <= found["gpu/compute_share"] <= 1


# -- profile --


def profiled(config_file, *overrides):
    from common.distributed import start_process

    config = load_config(str(config_file), overrides)
    with start_process("cpu") as process:
        Trainer(config, process, resume=False, profile=True).train()


@pytest.mark.slow
def test_the_profile_labels_the_parts_of_a_step(config_file, tmp_path, capsys):
    profiled(config_file)
    said = capsys.readouterr().out
    times = re.search(r"--profile: a step takes (.*) \(host time, 4 steps\); the trace is (\S+)", said)
    path = tmp_path / "output" / "profile" / "trace.json.gz"
    assert times[2] == str(path)
    assert all(float(re.search(rf"{part} ([\d.]+) ms", times[1])[1]) > 0 for part in PARTS)
    with gzip.open(path) as file:
        names = [event.get("name") for event in json.load(file)["traceEvents"] if event.get("cat") == "user_annotation"]
    assert all(names.count(part) >= 4 for part in PARTS)


def test_a_run_that_is_too_short_for_a_profile_says_so(config_file, tmp_path, capsys):
    profiled(config_file, "train.max_steps=2")
    assert "--profile: the run ended before 8 steps; no trace was written" in capsys.readouterr().out
    assert not (tmp_path / "output" / "profile").exists()
