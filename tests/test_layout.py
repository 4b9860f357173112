"""Which package may import which: arrows only go down (CONTRIBUTING.md)."""

import ast
import subprocess
import sys

import pytest

from tests.commands import PROJECT

BELOW = {
    "model": set(),
    "dali_pipelines": set(),
    "common": {"dali_pipelines", "model"},
    "training": {"common", "dali_pipelines", "model"},
    "preparation": {"common", "dali_pipelines", "model"},
    "evaluation": {"common", "dali_pipelines", "model"},
    "serving": {"evaluation", "common", "dali_pipelines", "model"},
    "benchmarks": {"serving", "evaluation", "training", "preparation", "common", "dali_pipelines", "model"},
    "dali_timesformer": {"serving", "evaluation", "training", "common", "dali_pipelines", "model"},
    "commands": {"benchmarks", "serving", "evaluation", "training", "preparation", "common", "dali_pipelines", "model"},
}


def imported(package: str) -> set[str]:
    found = set()
    for path in [*(PROJECT / package).rglob("*.py"), *PROJECT.glob(f"{package}.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            found |= {name.split(".")[0] for name in names}
    return found & BELOW.keys() - {package}


@pytest.mark.parametrize("package", BELOW)
def test_imports_go_down(package):
    assert imported(package) <= BELOW[package]


def test_the_layers_have_no_cycle():
    assert all(package not in BELOW[below] for package, lower in BELOW.items() for below in lower)


@pytest.mark.slow
def test_what_workers_import_leaves_torch_out():
    code = "import sys, dali_pipelines.workers, common.child_process; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=PROJECT, check=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments, status, text",
    [
        (["--version"], 0, "0."),
        (["--help"], 0, "usage: dali-timesformer {train,"),
        (["train", "--help"], 0, "usage: dali-timesformer train"),
        (["evaluate"], 2, "usage: dali-timesformer evaluate"),
        (["dance"], 2, "expected one of these commands"),
        ([], 2, "expected one of these commands"),
    ],
)
def test_the_console_script(arguments, status, text):
    done = subprocess.run([sys.executable, "-m", "commands", *arguments], cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == status and text in done.stdout + done.stderr


def test_git_ignores_what_the_documented_commands_write():
    written = ["my_videos/train.csv", "my_model/config.json", "models/x/1/model.onnx", "output/demo/best.safetensors"]
    written += [
        "best.onnx",
        "best.pt2",
        "val.csv",
        "val.npz",
        "attention.png",
        "timeline.png",
        "out.mp4",
        "data/k400/a",
    ]
    written += ["ppTimeSformer_k400_8f.pdparams", "names.txt", "predictions.csv", "k400.safetensors"]
    done = subprocess.run(["git", "check-ignore", *written], cwd=PROJECT, capture_output=True, text=True)
    if done.returncode == 128:
        pytest.skip("not a git checkout")
    assert done.stdout.split() == written
    tracked = subprocess.run(
        ["git", "ls-files", "-ci", "--exclude-standard"], cwd=PROJECT, capture_output=True, text=True
    )
    assert not tracked.stdout
