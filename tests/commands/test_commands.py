"""Bad input at the command line: one line with the problem and a remedy, exit code 2, never a traceback."""

import importlib
import os
import signal
import subprocess
import sys

import pytest

from common.config import load_config, preprocessing
from common.weights import Weights, build_network, save_weights
from dali_pipelines.manifest import Manifest
from tests.commands import PROJECT, run, run_here

pytestmark = pytest.mark.slow


@pytest.fixture
def place(config_file, small_data, tmp_path):
    """A folder with good and bad files."""
    config = load_config(str(config_file))
    manifest = Manifest.read(small_data / "val.csv")
    videos = [manifest[n] for n in range(len(manifest))]
    Manifest((), root=small_data).write(tmp_path / "empty.csv")
    Manifest([videos[0]._replace(label=7)], root=small_data).write(tmp_path / "label7.csv")
    Manifest(videos, root=small_data, classes=("ash", "beech", "cedar")).write(tmp_path / "beech.csv")
    (tmp_path / "list.txt").write_text("val_0.mp4 0\n")
    (tmp_path / "nolabel.txt").write_text("val_0.mp4 0\nval_1.webm\n")
    (tmp_path / "text.mp4").write_text("no video " * 50)
    (tmp_path / "numbers.txt").write_text("val_0.mp4 0\nval_1.webm 0 2\n")
    (tmp_path / "classes.json").write_text('{"ash": 1, "birch": 2, "cedar": 3}')
    (tmp_path / "text.txt").write_text("text.mp4 0\n")
    network = build_network(config.model, preprocessing(config.data), 2)
    two = Weights(vars(config.model), preprocessing(config.data), ("ash", "birch"), network.state_dict())
    save_weights(tmp_path / "two.safetensors", two)
    (tmp_path / "file").touch()
    return tmp_path


SCRIPTS = ("train.py", "evaluate.py", "predict.py", "prepare.py", "benchmark.py")
CASES = [
    ("train.py -c gone.yaml", "gone.yaml: no such config; these come with the project: demo.yaml, "),
    ("train.py -c tiny.yaml -o optim.learning_rate=1", "unknown key optim.learning_rate; did you mean"),
    ("train.py -c tiny.yaml -o data.train=gone.csv", "gone.csv: no such manifest; name yours with -o data.train=FILE"),
    ("train.py -c tiny.yaml -o data.train=empty.csv", "empty.csv: no videos in it"),
    ("train.py -c tiny.yaml -o data.train=text.mp4", "text.mp4:1: not a manifest: no column"),
    (
        "train.py -c tiny.yaml -o data.val=label7.csv",
        "label7.csv: val_0.mp4 has label 7, but there are 3 classes (0 to 2)",
    ),
    ("train.py -c tiny.yaml -o data.val=beech.csv", "class 1 is 'beech' there, 'birch' here"),
    ("train.py -c tiny.yaml -o data.val=beech.csv", "index it again, with prepare.py folder|index --classes FROM"),
    ("train.py -c tiny.yaml -o data.labels=classes.json", "classes.json: gives 'ash' the label 1; expected the labels"),
    ("train.py -c tiny.yaml -o output=file/folder", "file"),
    ("train.py -c tiny.yaml -o data.views_per_decode=3", "cannot share evenly, a multiple of 3 each; the nearest"),
    ("train.py -c tiny.yaml -o data.decode=gpu", "data.decode is gpu; expected one of auto, nvdec, dali, host"),
    ("train.py -c tiny.yaml -o device=tpu", "device is 'tpu'"),
    ("evaluate.py -w gone.safetensors", "gone.safetensors: no such weights file"),
    ("evaluate.py -w two.safetensors", "data.test is not set, and there is no config.yaml beside"),
    ("evaluate.py -w two.safetensors -o data.test=label7.csv", "has label 7, but there are 2 classes"),
    ("evaluate.py -w two.safetensors -c tiny.yaml", "its classes are not those of the weights: 3 there, 2 here"),
    ("evaluate.py -w two.safetensors -c tiny.yaml -o data.crop_size=64", "data.crop_size is 64, but these weights"),
    ("evaluate.py -w tiny.yaml -c two.safetensors", "-w tiny.yaml: a config, not weights; give it with -c, and the"),
    ("predict.py -w two.safetensors -c two.safetensors text.mp4", "-c two.safetensors: weights, not a config"),
    ("evaluate.py -w text.mp4 -c tiny.yaml", "not a safetensors file"),
    ("predict.py -w text.mp4 text.mp4", "not a safetensors file"),
    ("predict.py -w two.safetensors text.mp4 file --picture p.png", "--picture draws one video, but 2 are named"),
    ("predict.py -w two.safetensors text.mp4 --top-k 0", "--top-k is 0"),
    ("predict.py -w two.safetensors text.mp4 --windows 0", "--windows is 0"),
    ("predict.py -w two.safetensors *.avi", "*.avi: no such file, and no match as a pattern"),
    ("predict.py -w two.safetensors - --explain p.png", "--explain draws one video, but a list is named"),
    ("predict.py -w two.safetensors text.mp4 --features f.csv", "--features f.csv: expected a name that ends in .npz"),
    ("prepare.py index --list gone.txt --out out.csv", "gone.txt: No such file or directory"),
    ("prepare.py index --list nolabel.txt --out out.csv", "nolabel.txt:2: expected `path label`"),
    ("prepare.py index --list numbers.txt --out out.csv", "numbers.txt:2: expected `path label`, with one label"),
    ("prepare.py index --list list.txt --out out.csv --classes list.txt", "list.txt: a list of videos, such as"),
    ("prepare.py index --list text.txt --out out.csv", "none of the 1 listed videos can be read"),
    ("prepare.py index --list list.txt --out out.csv", "none of the 1 listed videos can be read"),
    ("prepare.py folder gone", "gone: no such folder"),
    ("prepare.py folder . --val-fraction 2", "--val-fraction is 2.0"),
    ("prepare.py folder . --out x.txt", "--out x.txt: expected a folder, or a file name that ends in .csv"),
    ("prepare.py demo --out demo --seed 99999999999999999999999", "--seed is 99999999999999999999999"),
    ("predict.py -w two.safetensors text.mp4 --picture nodir/p.png", "nodir/p.png: no such folder"),
    ("predict.py -w two.safetensors text.mp4 --device mps", "device is 'mps'"),
    ("prepare.py demo --out file/demo --train-videos 1 --val-videos 1", "file"),
    ("benchmark.py loader text.mp4", "text.mp4: not a video that FFmpeg can read"),
    ("benchmark.py loader text.mp4 --rounds 0", "--rounds is 0; expected 1 or more"),
    (
        "benchmark.py loader text.mp4 --contestants ours theirs",
        "--contestants theirs: expected some of ours, decord",
    ),
]


@pytest.mark.parametrize("option", ["--picture", "--explain"])
def test_plots_without_matplotlib(place, in_process, monkeypatch, option):
    monkeypatch.chdir(place)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    main = importlib.import_module("commands.predict").main
    status, _, errors = in_process(main, "-w", "two.safetensors", "text.mp4", option, "p.png")
    assert status == 2 and errors == f"predict.py: error: {option} needs matplotlib: pip install matplotlib\n"


@pytest.mark.parametrize("command, message", CASES, ids=[command for command, _ in CASES])
def test_bad_input_is_one_line(place, in_process, monkeypatch, command, message):
    script, *arguments = command.split()
    before = sorted(os.listdir(place))
    monkeypatch.chdir(place)
    main = importlib.import_module(f"commands.{script.removesuffix('.py')}").main
    status, _, errors = in_process(main, *arguments)
    lines = errors.splitlines()
    assert status == 2, errors
    assert len(lines) == 1 and lines[0].startswith(f"{script}: error: "), errors
    assert message in lines[0]
    assert sorted(os.listdir(place)) == before  # nothing written, nothing lost


@pytest.mark.parametrize(
    "command, message", [next(case for case in CASES if case[0].startswith(name)) for name in SCRIPTS]
)
def test_bad_input_is_one_line_of_the_script(place, command, message):
    done = run(*command.split(), cwd=place)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and message in done.stderr


def test_a_folder_that_cannot_be_written(place):
    """Root may write anywhere, so the folder is one that nobody can write."""
    done = run_here("train.py", "-c", "tiny.yaml", "-o", "output=/proc/nothing", cwd=place)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "/proc/nothing" in done.stderr


def test_names_that_are_not_utf8_go_through_all_commands(config_file, small_data, tmp_path):
    """Names of a class and of its videos, from the folder to the plots."""
    names = [b"k\xff", "l\u2028m".encode(), b"n\ro"]
    for name in names:
        folder = os.path.join(os.fsencode(tmp_path), b"videos", name)
        os.makedirs(folder)
        for number in (0, 3, 6, 9):
            os.symlink(
                os.fsencode(small_data / f"train_{number}.{('mp4', 'webm')[number % 2]}"),
                folder + b"/v\xfe%d.mp4" % number,
            )
    (tmp_path / "videos" / "notes.txt").touch()
    done = run_here("prepare.py", "folder", "videos", "--val-fraction", "0.3", cwd=tmp_path)
    assert done.returncode == 0 and "videos: 1 file skipped: 1 .txt" in done.stdout, done.stderr
    manifest = Manifest.read(tmp_path / "videos" / "val.csv")
    assert manifest.classes == tuple(map(os.fsdecode, names)) and manifest[0].path.startswith("k\udcff/v\udcfe")
    data = ["data.train=videos/train.csv", "data.val=videos/val.csv", "train.epochs=1"]
    weights = "-w", "output/best.safetensors"
    for start, command in (
        (run_here, ("train.py", "-c", config_file, "-o", *data)),
        (run_here, ("evaluate.py", *weights, "-o", "data.test=videos/val.csv", "device=cpu")),
        (run, ("predict.py", *weights, "videos", "--csv", "--explain", "pictures", "-o", "device=cpu")),
    ):
        done = start(*command, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert done.stdout.count("\\udcff") >= 4
    assert len(os.listdir(tmp_path / "pictures")) == 12
    done = run_here("train.py", "-c", config_file, "-o", os.fsdecode(b"data.train=v\xff.csv"), cwd=tmp_path)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "not UTF-8" in done.stderr


@pytest.mark.parametrize("lines_before", [4, 5])
def test_ctrl_c_is_one_line_even_with_workers(place, lines_before):
    """While the loader's workers, which get the signal too, start, and once training has begun."""
    command = [sys.executable, str(PROJECT / "train.py"), "-c", "tiny.yaml", "-o", "data.workers=2", "train.epochs=500"]
    settings = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    # A shell that runs the tests in the background has SIGINT ignored, and its children would inherit that.
    settings["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, cwd=place, **settings) as process:
        for _ in range(lines_before):
            process.stdout.readline()
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and errors == "train.py: stopped by Ctrl-C\n"


def test_training_with_several_views_of_a_decode_logs_it(config_file):
    """13 videos, two views each: 26 clips, six steps of four."""
    settings = ["data.views_per_decode=2", "data.decode=dali", "train.epochs=1", "data.workers=1"]
    done = run_here("train.py", "-c", config_file, "-o", *settings)
    assert done.returncode == 0, done.stderr
    assert "6 steps per epoch" in done.stdout and "decoders: h264 host, vp9 DALI" in done.stdout


def test_threads_that_fail_because_of_ctrl_c_print_nothing(tmp_path):
    """DALI has one that watches its workers."""
    (tmp_path / "script.py").write_text(
        "import threading, time\nfrom common.command_line import run_command\n"
        "def fail():\n    time.sleep(0.3)\n    raise RuntimeError('its workers are gone')\n"
        "def main():\n    threading.Thread(target=fail).start()\n    raise KeyboardInterrupt\n"
        "run_command(main)\n"
    )
    done = run(tmp_path / "script.py", path=PROJECT)
    assert done.returncode == 130 and done.stderr == "script.py: stopped by Ctrl-C\n"
