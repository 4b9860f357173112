"""Weights & Biases and MLflow, by their own packages: runs are read back. TensorBoard: test_monitor.py."""

import json
import struct

import pytest

from common.config import load_config
from common.distributed import start_process
from dali_pipelines import InputError
from tests.training.test_engine import lines, train
from training import loggers
from training.engine import Trainer

OVERRIDES = ["train.epochs=2", "train.log_every_steps=3", "optim.weight_decay=0.25"]


@pytest.fixture
def offline(monkeypatch):
    """No service is asked; variables that a logger sets are removed afterwards."""
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_ALLOW_FILE_STORE", "MLFLOW_EXPERIMENT_NAME", "WANDB_PROJECT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")


def wandb_records(path):
    """The records of a .wandb file: a header of seven bytes, then the log format of LevelDB."""
    from wandb.proto import wandb_internal_pb2

    data, place, whole, block = path.read_bytes(), 7, b"", 1 << 15
    while place < len(data):
        if block - place % block < 7:  # a block's tail is too short for a record's header
            place += block - place % block
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # full, last
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def name_of(item):
    return item.key or "/".join(item.nested_key)


def mlflow_run(output):
    """A client, and what it says of the run."""
    from mlflow import MlflowClient

    uri = f"file://{output}/mlruns"
    client = MlflowClient(uri, registry_uri=uri)
    return client, client.get_run(json.loads((output / "loggers.json").read_text())["mlflow"])


@pytest.mark.slow
def test_wandb_and_mlflow_hold_what_the_lines_hold_and_a_resumed_run_continues_there(
    config_file, tmp_path, offline, monkeypatch, capsys
):
    import wandb

    asked, init = [], wandb.init
    monkeypatch.setattr(wandb, "init", lambda **given: asked.append(given["settings"]) or init(**given))
    loggers_on = ["train.loggers=[wandb,mlflow]"]
    with start_process("cpu") as process:
        for _ in Trainer(load_config(str(config_file), [*OVERRIDES, *loggers_on]), process).epochs():
            break  # a run that is not complete
    stopped = mlflow_run(tmp_path / "output")
    train(config_file, *OVERRIDES, *loggers_on, "optim.weight_decay=0.5", resume=True)
    assert [settings.finish_timeout for settings in asked] == [20, 20]  # a run does not wait for a service forever
    output = tmp_path / "output"
    assert not (output / "tensorboard").exists()
    ids = json.loads((output / "loggers.json").read_text())
    said = capsys.readouterr().out
    assert said.count(f"Weights & Biases: run {ids['wandb']}, offline, in {output}/wandb") == 2
    assert said.count(f"MLflow: run {ids['mlflow']} at file://{output}/mlruns") == 2
    expected = {  # step and name -> value
        (line["step"], name): value
        for line in lines(output)
        for name, value in line.items()
        if name not in ("time", "step")
    }
    assert {(3, "val/top1"), (3, "val/macro_f1"), (6, "val/top1"), (6, "train/loss")} <= set(expected)

    files = sorted(output.glob(f"wandb/offline-run-*/run-{ids['wandb']}.wandb"))
    records = [record for file in files for record in wandb_records(file)]
    found, images = {}, []
    for record in records:
        values = {name_of(item): json.loads(item.value_json) for item in record.history.item}
        images += [values["step"]] if any(name.startswith("train/clips") for name in values) else []
        found |= {(values["step"], name): value for name, value in values.items() if "step" in values}
    assert {key: found.get(key) for key in expected} == pytest.approx(expected)
    assert images == [1, 4]
    assert len(list(output.glob("wandb/offline-run-*/files/media/images/train/clips*.png"))) == 2
    (run, *_) = (record.run for record in records if record.run.run_id)
    assert (run.display_name, run.project) == ("tiny", "dali-timesformer")
    settings = [{name_of(item): json.loads(item.value_json) for item in record.config.update} for record in records]
    decay = [values["optim.weight_decay"] for values in settings if "optim.weight_decay" in values]
    assert decay == [0.25, 0.5]

    assert [record.exit.exit_code for record in records if record.HasField("exit")] == [1, 0]

    client, run = mlflow_run(output)
    assert stopped[1].info.status == "KILLED" and (run.info.run_name, run.info.status) == ("tiny", "FINISHED")
    assert run.data.params["optim.weight_decay"] == "0.25" and run.data.tags["resumed.optim.weight_decay"] == "0.5"
    history = {
        (point.step, name): point.value
        for name in run.data.metrics
        for point in client.get_metric_history(ids["mlflow"], name)
    }
    assert history == pytest.approx(expected)
    assert len(client.list_artifacts(ids["mlflow"], "images")) >= 2


def test_a_service_that_fails_is_mentioned_once_and_asked_no_more(tmp_path, config_file, monkeypatch, capsys):
    from training.monitor import Monitor

    calls = []

    class Failing(loggers.MlflowLogger):
        def begin(self, config, *, step):
            pass

        def log(self, step, values):
            calls.append(step)
            raise ConnectionError("nobody\nanswers")

    monkeypatch.setitem(loggers.LOGGERS, "mlflow", Failing)
    monitor = Monitor(tmp_path, total_steps=3)
    monitor.open(load_config(str(config_file), ["train.loggers=[mlflow]"]), step=0, size=0)
    for step in (1, 2):
        monitor.log(step, {"a": 0.5})
    monitor.close()
    message = "mlflow: cannot be written (ConnectionError: nobody); training continues without it\n"
    assert calls == [1] and capsys.readouterr().out == message
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_logger_that_is_not_installed(config_file, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        InputError, match=r"train.loggers: wandb is not installed; install it \(pip install '.\[wandb\]'"
    ):
        loggers.make_loggers(load_config(str(config_file), ["train.loggers=[wandb]"]), print)
    with pytest.raises(InputError, match=r"train.loggers is \['comet'\]; expected a list of tensorboard, wandb"):
        load_config(str(config_file), ["train.loggers=[comet]"])
