"""Fixtures: where the reference data is, and a folder of small videos of every codec, made once a session."""

import errno
import io
import os
import shutil
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from common.command_line import run_command
from dali_pipelines.manifest import Manifest
from dali_pipelines.probe import probe
from model.torchvision import let_torchvision_load
from tests.commands import CONFIG
from tests.videos import numbered, textured, write_video

SHARED = Path(__file__).parents[2] / "shared"
DATA = Path(__file__).parent / "data"

needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")


def pytest_configure(config):
    torch.set_num_threads(1)  # tiny networks: more threads only wait for each other


@pytest.fixture(autouse=True)
def threads_may_fail_aloud(monkeypatch):
    """Also after a test in which a command has ended within this process, and silenced them."""
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)


@pytest.fixture(scope="session")
def torchvision_loads() -> None:
    let_torchvision_load()


@pytest.fixture(scope="session")
def shared_videos() -> Path:
    """Real clips and golden numbers live beside the project, see ../shared; skipped where they do not exist."""
    if not (SHARED / "videos").is_dir():
        pytest.skip("no ../shared/videos here")
    return SHARED / "videos"


@pytest.fixture(scope="session")
def numbered_videos(tmp_path_factory) -> Manifest:
    """Videos whose frames say their own number, in every codec, container and oddity that the loader meets."""
    folder = tmp_path_factory.mktemp("numbered")
    size = {"height": 144, "width": 176}  # no smaller than NVDEC takes, whatever the codec
    long = numbered(100, **size)
    uneven = np.cumsum(np.random.default_rng(0).integers(1, 5, 100)).tolist()
    made = [
        write_video(folder / "bframes.mp4", long),
        write_video(folder / "bframes.mkv", long),
        write_video(folder / "short_gop.mov", long, options={"x264-params": "keyint=12:bframes=2"}),
        write_video(folder / "open_gop.mp4", long, options={"x264-params": "keyint=20:bframes=3:open-gop=1"}),
        write_video(folder / "intra_refresh.mp4", long, options={"x264-params": "intra-refresh=1:keyint=20:bframes=0"}),
        write_video(folder / "hevc.mp4", long, codec="hevc"),
        write_video(folder / "mpeg4.avi", long, codec="mpeg4"),
        write_video(folder / "mpeg4_bframes.mp4", long, codec="mpeg4", options={"bf": "2"}),
        write_video(folder / "vp9.webm", long, codec="vp9"),
        write_video(folder / "vp9.mp4", long, codec="vp9"),
        write_video(folder / "vp8.webm", long, codec="vp8"),
        write_video(folder / "mjpeg.avi", long, codec="mjpeg"),
        write_video(folder / "mjpeg.mkv", long, codec="mjpeg"),
        write_video(folder / "av1.mp4", long[:40], codec="av1"),
        write_video(folder / "uneven.mp4", long, times=uneven),
        write_video(folder / "uneven.webm", long, times=uneven, codec="vp9"),
        write_video(folder / "odd_size.webm", numbered(60, height=95, width=127), codec="vp9"),
        write_video(folder / "odd_size.avi", numbered(60, height=127, width=95), codec="mpeg4"),
        write_video(folder / "one.mp4", long[:1]),
        write_video(folder / "one.webm", long[:1], codec="vp9"),
        write_video(folder / "two, with a comma.mp4", long[:2]),
        *(write_video(folder / f"turned_{r}.mp4", long[:50], rotation=r) for r in (90, 180, 270)),
    ]
    videos = [probe(path)._replace(path=Path(path).name, label=n % 7) for n, path in enumerate(made)]
    return Manifest(videos, root=folder)


@pytest.fixture(scope="session")
def small_data(tmp_path_factory) -> Path:
    """13 training and 7 validation videos (primes: nothing divides them) of three classes, told apart by their tint,
    in two codecs; with manifests train.csv and val.csv."""
    folder = tmp_path_factory.mktemp("small")
    for name, count in (("train", 13), ("val", 7)):
        videos = []
        for number in range(count):
            codec, suffix = (("h264", "mp4"), ("vp9", "webm"))[number % 2]
            tint = 80 * np.eye(3)[number % 3]
            frames = [
                np.clip(frame * 0.6 + tint, 0, 255).astype(np.uint8)
                for frame in textured(6 + number, height=40, width=40 + 4 * number, seed=100 * count + number)
            ]
            path = write_video(folder / f"{name}_{number}.{suffix}", frames, codec=codec)
            videos.append(probe(path)._replace(path=os.path.basename(path), label=number % 3))
        Manifest(videos, root=folder, classes=("ash", "birch", "cedar")).write(folder / f"{name}.csv")
    return folder


@pytest.fixture
def config_file(small_data, tmp_path) -> Path:
    """A config that reads `small_data` and writes below the test's own folder."""
    text = CONFIG.format(folder=small_data).replace(f"{small_data}/output", f"{tmp_path}/output")
    path = tmp_path / "tiny.yaml"
    path.write_text(text)
    return path


@pytest.fixture
def small_files(monkeypatch):
    """Sets how many bytes a checkpoint or weights file may have: a longer write fails midway, as on a full disk."""
    largest = [None]

    class SmallFile(io.FileIO):
        def write(self, data):
            if largest[0] is not None and self.tell() + len(data) > largest[0]:
                super().write(data[: largest[0] - self.tell()])
                raise OSError(errno.EFBIG, "File too large")
            return super().write(data)

    monkeypatch.setattr("common.weights.open", SmallFile, raising=False)
    return lambda size: largest.__setitem__(0, size)


@pytest.fixture
def in_process(monkeypatch, capsys):
    """Runs a command's `main` here, which is quicker than `run`: (exit status, stdout, stderr)."""

    def command(main, *arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [f"{main.__module__.rpartition('.')[2]}.py", *map(str, arguments)])
        threads = torch.get_num_threads()
        try:
            with pytest.raises(SystemExit) as ended:
                run_command(main)
        finally:
            torch.set_num_threads(threads)
        return ended.value.code, *capsys.readouterr()

    return command


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))
