"""What `make demo` does, with few videos: every command one after another, on every codec of the demo."""

import json
import shutil

import pytest

from dali_pipelines import Manifest
from tests.commands import PROJECT, run

pytestmark = pytest.mark.slow


def test_the_demo_from_nothing_to_a_prediction(tmp_path):
    (tmp_path / "configs").mkdir()  # its manifests are ../data/demo/*.csv
    config = shutil.copy(PROJECT / "configs" / "demo.yaml", tmp_path / "configs")
    made = run("prepare.py", "demo", "--out", "data/demo", "--train-videos", 64, "--val-videos", 13, cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    manifest = Manifest.read(tmp_path / "data" / "demo" / "val.csv")
    assert len(manifest) == 13 and len(manifest.classes) == 8

    trained = run("train.py", "-c", config, "-o", "train.epochs=1", "--resume", cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    assert "64 training and 13 validation videos, 8 classes" in trained.stdout
    assert "epoch 1: val top-1" in trained.stdout and "best so far: output/demo/best.safetensors" in trained.stdout

    weights = tmp_path / "output" / "demo" / "best.safetensors"
    evaluated = run("evaluate.py", "-w", weights, "-c", config, cwd=tmp_path)
    assert evaluated.returncode == 0, evaluated.stderr
    assert "13 videos evaluated, 0 unreadable" in evaluated.stdout
    assert evaluated.stdout.splitlines()[-1].startswith("test/top1_1x3_prob 0.")

    videos = [manifest.file(n) for n in range(4)]
    predicted = run("predict.py", "-w", weights, *videos, "--json", cwd=tmp_path)
    assert predicted.returncode == 0, predicted.stderr
    entries = [json.loads(line) for line in predicted.stdout.splitlines()]
    assert [entry["video"] for entry in entries] == videos
    assert all(entry["top"][0]["class"] in manifest.classes for entry in entries)
