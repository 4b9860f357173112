"""The next command that a run proposes can be pasted where the run was started."""

import sys
from pathlib import Path

import pytest

from commands import evaluate, export, predict, train
from common.command_line import run_command, sibling_command
from dali_pipelines.errors import InputError
from tests.commands import PROJECT

PYTHON = "/elsewhere/venv/bin/python"


@pytest.mark.parametrize(
    "started, folder, on_path, expected",
    [
        ("train.py", PROJECT, False, f"{PYTHON} evaluate.py -w 'a b.safetensors'"),
        ("train.py", PROJECT, True, "python evaluate.py -w 'a b.safetensors'"),
        ("../train.py", PROJECT / "docs", True, "python ../evaluate.py"),
        (f"{PROJECT}/train.py", PROJECT, True, "python evaluate.py"),
        (f"{PROJECT}/train.py", Path("/"), True, f"python {str(PROJECT)[1:]}/evaluate.py"),
        ("dali-timesformer train", PROJECT, True, "python -m commands evaluate"),
        ("/opt/ipykernel_launcher.py", PROJECT / "docs", True, f"python {PROJECT}/evaluate.py"),
        ("", PROJECT, True, "python evaluate.py"),
    ],
)
def test_the_command_beside_this_one(monkeypatch, started, folder, on_path, expected):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [started])
    monkeypatch.setattr(sys, "executable", PYTHON)
    monkeypatch.setattr("shutil.which", lambda name: PYTHON if on_path and name == "python" else None)
    assert sibling_command("evaluate", "-w", "a b.safetensors").startswith(expected)


def test_the_installed_command(monkeypatch, tmp_path):
    script = tmp_path / "dali-timesformer"
    script.touch()
    monkeypatch.chdir(tmp_path.parent)
    monkeypatch.setattr(sys, "argv", ["dali-timesformer train"])
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    for found, expected in ((str(script), "dali-timesformer"), (None, f"{tmp_path.name}/dali-timesformer")):
        monkeypatch.setattr("shutil.which", lambda name, found=found: found)
        assert sibling_command("predict", "a.mp4") == f"{expected} predict a.mp4"


@pytest.mark.parametrize(
    "typed, expected",
    [
        ("dali-timesformer train", "use dali-timesformer prepare folder or dali-timesformer export, not a/train.py"),
        ("train.py", "use python prepare.py folder or export.py, not a/train.py"),
    ],
)
def test_messages_name_commands_as_they_are_typed(monkeypatch, capsys, typed, expected):
    monkeypatch.setattr(sys, "argv", [typed])

    def main():
        raise InputError("use python prepare.py folder or export.py, not a/train.py")

    with pytest.raises(SystemExit):
        run_command(main)
    assert capsys.readouterr().err == f"{typed}: error: {expected}\n"


@pytest.mark.parametrize(
    "command, arguments, hint",
    [
        (train, "-c x.yaml --log_dir=log --gpus=0", "--log_dir is torchrun --log-dir DIR --tee 3; --gpus is torchrun"),
        (evaluate, "--test -w a.pdparams", "--test is always on in evaluate.py"),
        (export, "-p a.pdparams -o inference", "-p is -w FILE (and -o PATH of tools/export_model.py is --out PATH)"),
        (predict, "--input_file a.avi --use_gpu=True", "--input_file is predict.py -w best.onnx VIDEO; --use_gpu is"),
        (train, "-c x.yaml --cfg-options optim.lr=1", "--cfg-options is -o KEY=VALUE (docs/migrate.md)"),
        (train, "x.py --work-dir=a", "x.py is -c x.py; --work-dir is -o output=DIR, or evaluate.py --out DIR"),
        (train, "-c x.yaml --resume epoch_5.pth", "--resume takes no file: it continues from the newest checkpoint"),
        (evaluate, "x.py a.pth --dump a.pkl", "x.py is -c x.py; a.pth is -w a.pth; --dump is always on"),
        (train, "-c x.yaml --epochs 5 --weight-decay=0", "--epochs is -o train.epochs=VALUE; --weight-decay is -o opt"),
        (predict, "-w a.safetensors a.mp4 --csv b.csv", "--csv takes no file: --csv > b.csv"),
    ],
)
def test_options_of_other_programs(in_process, command, arguments, hint):
    status, _, errors = in_process(command.main, *arguments.split())
    assert status == 2 and f"here, {hint}" in errors
