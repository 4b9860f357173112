"""predict.py --live: streams that end, break off and come back."""

import contextlib
import itertools
import json
import wave

import av
import numpy as np
import pytest
import torch

import predict as command
from common.config import load_config, preprocessing
from common.distributed import start_process
from common.weights import Weights, build_network, load_weights, save_weights
from dali_pipelines import InputError
from serving.live import watch
from serving.prediction import open_model, predict
from tests.videos import textured, write_video
from tests.web import serve

pytestmark = pytest.mark.slow

CLASSES = ("ash", "birch", "cedar")
IN_PROCESS = ("device=cpu", "data.workers=0")


@pytest.fixture(scope="module")
def weights_file(tmp_path_factory):
    """Windows of 10 frames at 25 frames a second."""
    settings = ["data.num_frames=4", "data.crop_size=32", "data.stride=2.5", "data.target_fps=25"]
    config = load_config(None, [*settings, "model.embed_dim=24", "model.depth=1", "model.num_heads=3"])
    torch.manual_seed(3)
    network = build_network(config.model, preprocessing(config.data), 3)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    torch.nn.init.normal_(network.patch_embed.proj.weight, std=3)
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    save_weights(path, Weights(vars(config.model), preprocessing(config.data), CLASSES, network.state_dict()))
    return path


@pytest.fixture(scope="module")
def frames():
    """30 frames, smooth enough that the codec hardly changes them."""
    small = textured(30, height=12, width=16, seed=5)
    return [np.repeat(np.repeat(frame, 4, 0), 4, 1) for frame in small]


def live(weights_file, source, *, every=0.2, overrides=(), **given):
    weights, config, _ = open_model(str(weights_file), None, [*IN_PROCESS, *overrides])
    given = {"report": lambda _: None, "wait": lambda _: None} | given
    with start_process("cpu") as process:
        yield from watch(str(source), weights, config, process, every=every, **given)


def write_hls(folder, frames):
    """A playlist with segments of about 0.4 seconds."""
    with av.open(
        str(folder / "live.m3u8"), "w", format="hls", options={"hls_time": "0.4", "hls_list_size": "0"}
    ) as out:
        stream = out.add_stream("libx264", rate=25, options={"x264-params": "keyint=10:bframes=2", "crf": "1"})
        stream.height, stream.width = frames[0].shape[:2]
        for frame in frames:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        out.mux(stream.encode(None))


@pytest.mark.parametrize("rotation", [0, 90])
def test_windows_are_those_of_files_with_the_same_frames(weights_file, frames, tmp_path, monkeypatch, rotation):
    """Windows of 10 frames, every 5: the network gets what predict.py gives it for a file with only these frames."""
    from serving import live as module

    seen = []
    run = module.predict_views
    monkeypatch.setattr(module, "predict_views", lambda _, clips, *more: seen.append(clips[0]) or run(_, clips, *more))
    lossless = {"codec": "h264", "options": {"qp": "0", "x264-params": "keyint=1"}, "rotation": rotation}
    whole = write_video(tmp_path / "whole.mp4", frames, **lossless)
    found = list(live(weights_file, whole))
    assert [tuple(round(25 * each) for each in one.seconds) for one in found] == [
        (start, start + 10) for start in (0, 5, 10, 15, 20)
    ]
    weights, config, _ = open_model(str(weights_file), None, IN_PROCESS)
    for number in (0, 4):
        part = write_video(tmp_path / f"{number}.mp4", frames[5 * number : 5 * number + 10], **lossless)
        with start_process("cpu") as process:
            [expected] = predict(weights, config, [str(part)], process)
        torch.testing.assert_close(seen[number], expected.views, atol=0.5 / 255 + 2e-4, rtol=0)
        torch.testing.assert_close(found[number].probabilities, expected.probabilities, atol=1e-3, rtol=0)
    assert (seen[0] - seen[4]).abs().mean() > 10 / 255


def test_an_hls_stream_over_http(weights_file, frames, tmp_path, in_process):
    write_hls(tmp_path, frames)
    with serve(tmp_path) as server:
        url = f"{server.url}/live.m3u8"
        given = ["-w", weights_file, url, "--live", "--every", "0.2", "-o", *IN_PROCESS]
        status, said, errors = in_process(command.main, *given, "--json")
        assert status == 0 and not errors
        assert server.requests["live.m3u8"] and len([name for name in server.requests if name.endswith(".ts")]) >= 2
        status, table, _ = in_process(command.main, *given, "--csv", "--top-k", 1)
        status, text, _ = in_process(command.main, *given)
    lines = [json.loads(line) for line in said.splitlines()]
    assert len(lines) == 5 and {line["video"] for line in lines} == {url}
    assert [round(b["start"] - a["start"], 3) for a, b in itertools.pairwise(lines)] == [0.2] * 4
    assert all(line["wall"].endswith("+00:00") and len(line["top"]) == 3 for line in lines)
    assert table.splitlines()[0] == "video,wall,start,end,label1,class1,probability1"
    for line, row, words in zip(lines, table.splitlines()[1:], text.splitlines(), strict=True):
        best = line["top"][0]
        assert row.endswith(f",{best['label']},{best['class']},{best['probability']}")
        assert f"  {best['class']} ({best['label']}) {best['probability']:.2f}, " in words


def test_a_source_that_drops_and_comes_back(weights_file, frames, tmp_path):
    """The server breaks off in the middle; the source is opened again and windows start anew."""
    write_video(tmp_path / "v.mkv", frames * 3, codec="mpeg4", options={"qmax": "2"})
    reports, waits = [], []
    with serve(tmp_path) as server:
        server.ranges, server.cuts = False, 2
        source = f"{server.url}/v.mkv"
        found = list(live(weights_file, source, report=reports.append, wait=waits.append))
        assert server.requests["v.mkv"] == 3
    assert len(reports) == 2 and waits == [1, 1] and all("lost" in each and "again in 1 s" in each for each in reports)
    starts = [round(25 * one.seconds[0]) for one in found]
    assert starts.count(0) == 3 and starts[-17:] == list(range(0, 85, 5)) and len(starts) > 20


def test_a_source_that_stays_away_is_given_up(weights_file, frames, tmp_path):
    write_video(tmp_path / "v.mkv", frames * 3, codec="mpeg4", options={"qmax": "2"})
    waits = []
    with serve(tmp_path) as server:
        server.ranges, server.cuts = False, 1
        source = f"{server.url}/v.mkv"

        def wait(seconds):
            waits.append(seconds)
            (tmp_path / "v.mkv").unlink(missing_ok=True)

        with pytest.raises(InputError, match="v.mkv: lost .*, and not back after 8 tries"):
            list(live(weights_file, source, wait=wait))
    assert waits == [1, 2, 4, 8, 16, 30, 30, 30]


def test_memory_holds_only_what_coming_windows_need(weights_file, tmp_path, monkeypatch):
    """Two windows of four frames overlap."""
    from serving import live as module

    most = [0]
    add = module._Windows.add

    def counted(self, frame):
        clips = add(self, frame)
        most[0] = max(most[0], len(self._kept))
        assert all(kept.shape == (3 * 32, 32, 3) for kept in self._kept.values())
        return clips

    monkeypatch.setattr(module._Windows, "add", counted)
    video = write_video(tmp_path / "v.mp4", textured(200, height=40, width=64))
    assert len(list(live(weights_file, video))) == 39 and most[0] <= 8


def test_weights_that_look_at_whole_videos(weights_file, frames, tmp_path):
    weights = load_weights(weights_file)
    weights.preprocessing["stride"] = None
    save_weights(tmp_path / "whole.safetensors", weights)
    video = write_video(tmp_path / "v.mp4", frames)
    found = list(live(tmp_path / "whole.safetensors", video, every=0.4))
    assert [[round(25 * each) for each in one.seconds] for one in found] == [[0, 10], [10, 20], [20, 30]]
    reports = []
    assert not list(live(tmp_path / "whole.safetensors", video, every=9, report=reports.append))
    assert reports == [f"{video}: ended before the first window of 9.0 s was complete: no prediction"]


def test_a_source_that_says_nothing(weights_file, monkeypatch):
    def silent(*_, **__):
        raise av.error.ExitError(0, "immediate exit requested")

    monkeypatch.setattr("serving.live.av.open", silent)
    with pytest.raises(InputError, match=r"udp://a:1: cannot be opened \(no data for 10 s\)"):
        list(live(weights_file, "udp://a:1"))


def test_wrong_arguments(weights_file, tmp_path, in_process):
    (tmp_path / "text.mp4").write_text("no video " * 50)
    with wave.open(str(tmp_path / "sound.wav"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(bytes(8000))
    given = ["-w", weights_file, "--live", "-o", *IN_PROCESS]
    for arguments, message in (
        ([tmp_path / "text.mp4"], "text.mp4: cannot be opened (Invalid data found"),
        ([tmp_path / "sound.wav"], "sound.wav: no video stream in it"),
        (["gone.mp4"], "gone.mp4: cannot be opened (No such file or directory)"),
        (["/dev/video99"], "/dev/video99: cannot be opened (No such file or directory)"),
        (
            ["http://al:s3cret@127.0.0.1:9/v.mp4"],
            "http://al:***@127.0.0.1:9/v.mp4: cannot be opened (connection refused)",
        ),
        (["rtsp://al:s3cret@127.0.0.1:9/v"], "rtsp://al:***@127.0.0.1:9/v: cannot be opened (connection refused)"),
        (["a.mp4", "b.mp4"], "--live predicts one source, but 2 are named"),
        (["a.mp4", "--windows", 2], "--windows needs a video that ends; omit --live"),
        (["a.mp4", "--every", 0], "--every is 0; expected seconds, more than 0"),
    ):
        status, _, errors = in_process(command.main, *given[:3], *arguments, *given[3:])
        assert status == 2 and message.lower() in errors.lower(), errors


def test_ctrl_c_while_a_source_sends_nothing_is_not_lost(monkeypatch):
    """PyAV 18.1 loses one that comes in a read which then times out."""
    import _thread
    import socket
    import threading

    from serving import live as module

    monkeypatch.setattr(module, "_TIMEOUT", (0.3, 0.3))
    with socket.create_server(("127.0.0.1", 0)) as server:
        frames = module._in_thread(module._frames(f"tcp://127.0.0.1:{server.getsockname()[1]}"))
        threading.Timer(0.1, _thread.interrupt_main).start()
        with pytest.raises(KeyboardInterrupt):
            next(frames)


def test_ctrl_c_ends_it(weights_file, frames, tmp_path, in_process, monkeypatch):
    """After the first prediction has been printed."""
    from serving import live as module

    plain = module.live_text

    def interrupted(*given):
        if interrupted.count:
            raise KeyboardInterrupt
        interrupted.count += 1
        return plain(*given)

    interrupted.count = 0
    monkeypatch.setattr(module, "live_text", interrupted)
    video = write_video(tmp_path / "v.mp4", frames)
    with contextlib.suppress(KeyboardInterrupt):
        status, said, errors = in_process(
            command.main, "-w", weights_file, video, "--live", "--every", 0.2, "-o", *IN_PROCESS
        )
    assert status == 130 and len(said.splitlines()) == 1 and errors.endswith("stopped by Ctrl-C\n")
