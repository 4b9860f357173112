"""predict.py: predictions in the order of the arguments, as they arrive; windows, features, explanations."""

import contextlib
import csv
import io
import json
import os
import re
import subprocess
import sys
from itertools import islice

import numpy as np
import pytest
import torch

import evaluate as evaluate_command
import predict as command
from common.child_process import in_child
from common.config import clip_settings, load_config, preprocessing
from common.distributed import start_process
from common.weights import Weights, build_network, load_weights, save_weights
from dali_pipelines import ClipLoader, InputError, Manifest
from dali_pipelines.manifest import Video
from dali_pipelines.probe import probe
from evaluation.evaluate import evaluate
from evaluation.result_files import read_results
from model import attention_rollout
from serving import prediction, video_arguments
from serving.features import Features
from serving.formats import as_json, clock, csv_columns, csv_rows
from serving.onnx_format import export_onnx, open_onnx, runner
from serving.prediction import Unreadable, open_model, predict
from serving.torch_format import export_torch
from serving.verification import Clips, synthetic_views
from tests.commands import PROJECT, run_forked, run_here
from tests.videos import textured, write_video

pytestmark = pytest.mark.slow

IN_PROCESS = ("-o", "device=cpu", "data.workers=0")  # quicker for a few videos
CLASSES = ("ash", "birch", "cedar, Lebanese")


@pytest.fixture(scope="module")
def weights_file(tmp_path_factory):
    """Weights whose predictions differ from video to video; windows of 6.7 frames (the videos have 6 to 18)."""
    settings = ["data.num_frames=4", "data.crop_size=32", "data.stride=2", "data.mean=[0.4,0.5,0.6]"]
    small = ["model.embed_dim=24", "model.depth=2", "model.num_heads=3"]
    config = load_config(None, [*settings, *small])
    torch.manual_seed(3)
    network = build_network(config.model, preprocessing(config.data), 3)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    torch.nn.init.normal_(network.patch_embed.proj.weight, std=3)  # what is seen outweighs where it is
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    save_weights(path, Weights(vars(config.model), preprocessing(config.data), CLASSES, network.state_dict()))
    return path


@pytest.fixture(scope="module")
def mixed(small_data, tmp_path_factory):
    """A manifest in its own folder, with rotated and unreadable videos among others."""
    folder = tmp_path_factory.mktemp("mixed")
    manifest = Manifest.read(small_data / "val.csv")
    turned = [
        probe(write_video(folder / f"{turn}.mp4", textured(20, height=40, width=64, seed=turn), rotation=turn))
        for turn in (90, 270)
    ]
    (folder / "text.mp4").write_text("no video " * 50)
    rows = [manifest[n]._replace(path=manifest.file(n)) for n in range(4)]
    rows[1:1] = [turned[0], rows[0]._replace(path="gone.mp4"), turned[1], rows[0]._replace(path="text.mp4", label=2)]
    Manifest(rows, root=folder, classes=CLASSES).write(folder / "mixed.csv")
    return folder / "mixed.csv"


def predictions(weights_file, videos, *, overrides=(), **settings):
    weights, config, _ = open_model(str(weights_file), None, ["data.workers=0", "device=cpu", *overrides])
    with start_process("cpu") as process:
        yield from predict(weights, config, [str(video) for video in videos], process, **settings)


# -- the same as evaluation --


def test_predicting_a_manifest_matches_its_evaluation_without_probing(weights_file, mixed, monkeypatch):
    weights, config, _ = open_model(str(weights_file), None, ["data.workers=0", "device=cpu"])
    with start_process("cpu") as process:
        result = evaluate(config, [weights], Manifest.read(mixed), process)
    monkeypatch.setattr(prediction, "in_child", lambda *task, **_: pytest.fail(f"{task}: its row is known"))
    found = list(predictions(weights_file, [mixed]))
    assert [each.reason is None for each in found] == result.valid.tolist() == [n not in (2, 4) for n in range(8)]
    assert [(each.video, each.reason) for each in found if each.reason] == [
        (fault.path, fault.reason) for fault in result.faults
    ]
    for each, row in zip(found, result.probabilities, strict=True):
        assert each.reason or (each.probabilities - row).abs().max() < 1e-6
    assert [each.label for each in found] == result.labels.tolist()
    assert len({each.probabilities.argmax().item() for each in found if not each.reason}) > 1


def test_chunks_do_not_change_predictions_and_the_first_waits_for_one_chunk(weights_file, small_data, monkeypatch):
    files = sorted(small_data.glob("val_*"))
    whole = list(predictions(weights_file, files))
    probed = []
    monkeypatch.setattr(video_arguments, "_CHUNK", 2)
    monkeypatch.setattr(prediction, "in_child", lambda *task, **more: probed.append(task) or in_child(*task, **more))
    some = predictions(weights_file, files)
    first = next(some)
    assert len(probed) == 2
    again = [first, *some]
    assert [each.video for each in again] == [each.video for each in whole] == list(map(str, files))
    for a, b in zip(again, whole, strict=True):
        torch.testing.assert_close(a.probabilities, b.probabilities, atol=1e-6, rtol=0)


def test_a_bad_disk_and_a_slow_file_do_not_affect_other_videos(weights_file, small_data, tmp_path):
    names = ("a.webm", "b.mp4", "c.avi", "d.webm")
    for name in ("a.webm", "d.webm"):
        (tmp_path / name).symlink_to(small_data / "val_1.webm")
    (tmp_path / "b.mp4").symlink_to("/proc/self/mem")  # reads fail with EIO
    write_video(tmp_path / "c.avi", textured(12, height=40, width=40), codec="mpeg4")
    os.truncate(tmp_path / "c.avi", 1 << 40)  # sparse, as of a download that reserves its place
    done = run_forked("predict.py", "-w", weights_file, tmp_path, "--json", "-o", "device=cpu", "data.timeout_s=3")
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 1 and "exit status 1: 2 of 4 videos cannot be read" in done.stderr, done.stderr
    assert [answer["video"] for answer in answers] == [str(tmp_path / name) for name in names]
    first, bad, slow, last = (answer["error"] for answer in answers)
    assert first is None and last is None and answers[0]["top"] == answers[3]["top"]
    assert "not a video" in bad and slow == "given up after 3 s (data.timeout_s)"


# -- what can be named --


def test_files_folders_globs_and_manifests_in_the_order_they_are_named(tmp_path, small_data):
    for name in ("b.mp4", "a.MKV", "notes.txt", "._a.mkv", "deep/er/c.webm", "deep/[x].avi"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()

    def names(*arguments):
        found = video_arguments.find_videos([str(tmp_path / argument) for argument in arguments])
        listed = [video for chunk in video_arguments.chunks(found) for video in chunk.videos]
        assert video_arguments.count(found) == len(listed)
        return [video.removeprefix(f"{tmp_path}/") for video in listed]

    assert names("b.mp4", "b.mp4", "gone.mp4") == ["b.mp4", "b.mp4", "gone.mp4"]
    assert names(".") == ["a.MKV", "b.mp4", "deep/[x].avi", "deep/er/c.webm"]
    assert names("deep", "*.mp4", "deep/[x].avi") == ["deep/[x].avi", "deep/er/c.webm", "b.mp4", "deep/[x].avi"]
    assert names("**/*.webm") == ["deep/er/c.webm"]
    assert names("d*") == ["deep/[x].avi", "deep/er/c.webm"]
    chunks = list(video_arguments.chunks(video_arguments.find_videos(["a.mp4", str(small_data / "val.csv"), "b.mp4"])))
    assert [len(chunk.videos) for chunk in chunks] == [1, 7, 1] and chunks[1].root == small_data
    assert chunks[1].videos[3] == Manifest.read(small_data / "val.csv")[3]


def test_a_glob_follows_links_but_no_loops(tmp_path):
    (tmp_path / "videos" / "deep").mkdir(parents=True)
    (tmp_path / "more").mkdir()
    for name in ("videos/deep/a.mp4", "more/b.mts"):
        (tmp_path / name).touch()
    (tmp_path / "videos" / "deep" / "loop").symlink_to(tmp_path / "videos")
    (tmp_path / "videos" / "more").symlink_to(tmp_path / "more")
    for pattern in ("**/*.m*", "**", "*"):
        (found,) = video_arguments.find_videos([f"{tmp_path}/videos/{pattern}"], warn=lambda _: None)
        assert found == [f"{tmp_path}/videos/deep/a.mp4", f"{tmp_path}/videos/more/b.mts"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["gone*.mp4"], r"gone\*.mp4: no such file, and no match as a pattern"),
        (["rtsp://camera/1"], "rtsp://camera/1: a stream without an end; predict it with --live"),
        (["empty"], "empty: no videos in this folder or below it"),
        (["empty.csv"], "empty.csv: no videos in it"),
        (["gone.csv"], "gone.csv: no such manifest"),
        (["-", "a.mp4", "-"], "named 2 times"),
    ],
)
def test_arguments_without_match_are_errors(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    Manifest(()).write(tmp_path / "empty.csv")
    with pytest.raises(InputError, match=message):
        video_arguments.find_videos(arguments)


def test_a_producer_that_waits_for_its_prediction_gets_it(weights_file, small_data):
    command = [sys.executable, PROJECT / "predict.py", "-w", weights_file, "-", "--json", "--device", "cpu"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        for name in ("val_0.mp4", "gone.mp4", "val_1.webm"):
            process.stdin.write(f"{small_data / name}\n".encode())
            process.stdin.flush()
            answer = json.loads(process.stdout.readline())
            assert answer["video"] == str(small_data / name) and bool(answer["error"]) == (name == "gone.mp4")
        process.stdin.write(bytes(small_data / "val_2.mp4"))  # the last line need not end
        rest, errors = process.communicate(timeout=60)
    assert json.loads(rest)["video"] == str(small_data / "val_2.mp4")
    assert process.returncode == 1 and b"1 of 4 videos cannot be read" in errors


@contextlib.contextmanager
def stdin_from(path):
    before = os.dup(0)
    try:
        with open(path, "rb") as file:
            os.dup2(file.fileno(), 0)
        yield
    finally:
        os.dup2(before, 0)
        os.close(before)


def test_a_producer_of_nothing(weights_file):
    with stdin_from(os.devnull):
        done = run_here("predict.py", "-w", weights_file, "-", *IN_PROCESS)
    assert done.returncode == 2 and done.stderr == "predict.py: error: no path on stdin; expected one per line\n"


@pytest.mark.parametrize(
    "content",
    [
        b"b c.mp4\r\n\r\n\xe9.mp4\r\n",
        b"\xef\xbb\xbfb c.mp4\n\xe9.mp4",
        b"b c.mp4\0\xe9.mp4\0",
        b"b c.mp4\0\xe9.mp4",
    ],
    ids=["Windows", "byte order mark", "print0", "print0 without an end"],
)
def test_lists_on_stdin_as_other_programs_write_them(weights_file, small_data, tmp_path, content):
    """One of the paths is not UTF-8."""
    for name in (b"b c.mp4", b"\xe9.mp4"):
        os.symlink(os.fsencode(small_data / "val_0.mp4"), os.path.join(os.fsencode(tmp_path), name))
    (tmp_path / "list").write_bytes(content)
    with stdin_from(tmp_path / "list"):
        done = run_here("predict.py", "-w", weights_file, "-", "--json", *IN_PROCESS, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(each["video"], each["error"]) for each in answers] == [("b c.mp4", None), ("\udce9.mp4", None)]


@pytest.mark.parametrize("pieces", [1, 3, 1000])
@pytest.mark.parametrize(
    "content, expected",
    [
        ("a\r\nü\n".encode("utf-16"), ["a", "ü"]),
        (b"\xfe\xff" + "a\nü".encode("utf-16-be"), ["a", "ü"]),
        (b"\xef\xbb\xbfa\n", ["a"]),
        (b"\xef\xbb", ["\udcef\udcbb"]),
        (b"\xff\n\xfe\xff\n", ["\udcff", "\udcfe\udcff"]),
        ("a\u2028b\x0b\n \n\r\n".encode(), ["a\u2028b\x0b"]),
    ],
)
def test_stdin_in_pieces_and_encodings(monkeypatch, content, expected, pieces):
    waiting = [content[start : start + pieces] for start in range(0, len(content), pieces)] + [b""]
    monkeypatch.setattr(os, "read", lambda *_: waiting.pop(0))
    assert [path for chunk in video_arguments.chunks([video_arguments.STDIN]) for path in chunk.videos] == expected


def test_folders_with_links_and_other_files(weights_file, small_data, tmp_path):
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "n.txt").touch()
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "a.MTS").symlink_to(small_data / "val_0.mp4")
    (tmp_path / "videos" / "more").symlink_to(tmp_path / "more")
    done = run_here("predict.py", "-w", weights_file, "videos", "--json", *IN_PROCESS, cwd=tmp_path)
    assert done.returncode == 0 and json.loads(done.stdout)["video"] == "videos/more/a.MTS"
    assert done.stderr == "videos: 1 file skipped: 1 .txt\n"


def test_json_and_csv_keep_the_order_even_of_bad_videos(weights_file, mixed, small_data, tmp_path):
    named = [small_data / "val_6.mp4", mixed.parent / "gone.mp4", f"{small_data}/val_[01].*", mixed]
    files = [named[0], named[1], small_data / "val_0.mp4", small_data / "val_1.webm"]
    rows = Manifest.read(mixed)
    files = [*map(str, files), *(rows.file(n) for n in range(len(rows)))]
    arguments = ["-w", weights_file, *named, "--top-k", 2, *IN_PROCESS]
    lines, table = run_here("predict.py", *arguments, "--json"), run_here("predict.py", *arguments, "--csv")
    answers = [json.loads(line) for line in lines.stdout.splitlines()]
    assert [answer["video"] for answer in answers] == files
    bad = [answer for answer in answers if answer["error"]]
    assert len(bad) == 3 and all(f"{each['video']}: {each['error']}" in lines.stderr for each in bad)
    assert lines.returncode == table.returncode == 1 and "3 of 12 videos cannot be read" in lines.stderr
    reader = csv.DictReader(io.StringIO(table.stdout))
    columns = ["video", "error", "label1", "class1", "probability1", "label2", "class2", "probability2"]
    assert reader.fieldnames == columns
    for row, answer in zip(reader, answers, strict=True):
        assert row["video"] == answer["video"] and row["error"] == (answer["error"] or "")
        for place, entry in enumerate(answer["top"], start=1):
            assert (row[f"class{place}"], int(row[f"label{place}"])) == (entry["class"], entry["label"])
            assert float(row[f"probability{place}"]) == entry["probability"]
        assert answer["top"] or row["class1"] == ""
    assert {answer["top"][0]["class"] for answer in answers if answer["top"]} & {"cedar, Lebanese"}  # quoted


# -- windows --


@pytest.mark.parametrize("most_bytes", [1 << 30, 3 * 40 * 64 * 4 * 2], ids=["at once", "in parts"])
def test_windows_average_their_crops_and_the_video_averages_all(weights_file, mixed, monkeypatch, most_bytes):
    monkeypatch.setattr(prediction, "_MOST_BYTES", most_bytes)
    weights = load_weights(weights_file)
    config, network = load_config(None, defaults=weights.config()), weights.build()
    found = list(predictions(weights_file, [mixed], num_windows=5))
    settings = clip_settings(config.data, "test")
    loader = ClipLoader(Manifest.read(mixed), **settings, batch_size=1, num_windows=5, workers=0)
    varied = 0
    for each, batch in zip(found, loader, strict=True):
        assert (each.reason is None) == batch.valid.item()
        if each.reason is None:
            with torch.no_grad():
                views = network(batch.clips[0]).softmax(1)
            expected = views.unflatten(0, (5, 3)).mean(1)
            torch.testing.assert_close(each.window_probabilities, expected, atol=1e-6, rtol=0)
            torch.testing.assert_close(each.probabilities, views.mean(0), atol=1e-6, rtol=0)
            torch.testing.assert_close(each.views, batch.clips[0, :3])
            torch.testing.assert_close(each.window_frames, batch.clips[0, 1::3, :, 2])
            varied += (expected[0] - expected[4]).abs().max() > 1e-4
    assert varied >= 3
    turned, row = found[1], Manifest.read(mixed)[1]
    assert turned.seconds[0, 0] == 0 and turned.seconds[-1, 1] == row.frames / row.fps
    assert (np.diff(turned.seconds, axis=0) > 0).all()


def test_memory_for_windows_is_bounded_whatever_the_video():
    hd = probe_like(width=1920, height=1080)
    small = probe_like(width=340, height=256)
    at_once = prediction._windows_per_sample
    assert at_once(Manifest([small]), 10, 8) == 10
    for video, num_windows in ((hd, 60), (small, 60), (hd, 1), (probe_like(width=7680, height=4320), 7)):
        count = at_once(Manifest([small, video]), num_windows, 8)
        assert 1 <= count <= num_windows
        assert count == 1 or count * 8 * 3 * video.width * video.height <= 128 << 20
        assert count <= 16


def probe_like(*, width, height):
    return Video("a.mp4", 0, 108_000, 30.0, width, height, "h264", 0)


def test_a_large_video_is_decoded_by_a_worker_also_alone(weights_file, tmp_path, monkeypatch):
    """Its frames would fill this process's memory, and nothing would end a decoder that takes too long."""
    asked = []

    def loader(*_, workers, **__):
        asked.append(workers)
        raise InputError("enough")

    monkeypatch.setattr(prediction, "ClipLoader", loader)
    for width, height, frames in ((340, 256, 300), (8192, 8192, 2), (640, 360, 10_000)):
        video = probe_like(width=width, height=height)._replace(frames=frames)
        Manifest([video]).write(tmp_path / "one.csv")
        with pytest.raises(InputError, match="enough"):
            next(predictions(weights_file, [tmp_path / "one.csv"], overrides=["data.workers=4"]))
    assert asked == [0, 1, 1]


def test_an_answer_that_is_not_finite_is_none(weights_file, small_data, tmp_path):
    weights = load_weights(weights_file)
    weights.state["head.weight"].fill_(3e38)
    save_weights(tmp_path / "w.safetensors", weights)
    (found,) = predictions(tmp_path / "w.safetensors", [small_data / "val_1.webm"])
    assert isinstance(found, Unreadable) and "the network's output is not finite" in found.reason


def test_the_timeline_as_a_user_sees_it(weights_file, small_data, tmp_path):
    video = small_data / "val_6.mp4"
    options = ["-w", weights_file, video, "--windows", 4, "--device", "cpu"]
    text = run_here("predict.py", *options, "--picture", tmp_path / "timeline.png")
    assert text.returncode == 0, text.stderr
    lines = text.stdout.splitlines()
    assert len(lines) == 1 + 3 + 4 and lines[4].startswith("    0:00.0 - 0:00.")
    assert re.search(r"  (ash|birch|cedar, Lebanese) \([012]\) 0\.\d\d, ", lines[4])
    assert (tmp_path / "timeline.png").read_bytes().startswith(b"\x89PNG")
    [found] = predictions(weights_file, [video], num_windows=4)
    columns = csv_columns(2, CLASSES, windows=True)
    table = [dict(zip(columns, row, strict=True)) for row in csv_rows(found, 2, CLASSES, windows=True)]
    answer = json.loads(as_json(found, 2, CLASSES, windows=True))
    assert [row["start"] for row in table] == ["", *(window["start"] for window in answer["windows"])]
    assert [row["end"] for row in table[1:]] == [round(end, 3) for end in found.seconds[:, 1].tolist()]
    for row, probabilities in zip(table, [found.probabilities, *found.window_probabilities], strict=True):
        assert row["probability1"] == pytest.approx(probabilities.max().item(), abs=2e-6)
        assert row["class2"] == CLASSES[probabilities.argsort(descending=True)[1]]
    assert (clock(8.54), clock(59.96), clock(3728.5)) == ("0:08.5", "1:00.0", "1:02:08.5")


# -- features, explanations --


def test_features_are_the_mean_input_of_the_head(weights_file, mixed, tmp_path):
    weights = load_weights(weights_file)
    config, network = load_config(None, defaults=weights.config()), weights.build()
    features = Features(tmp_path / "f.npz")
    for each in predictions(weights_file, [mixed], features=True):
        features.add(each)
    features.save(weights)
    with np.load(tmp_path / "f.npz", allow_pickle=False) as file:
        saved = dict(file)
    rows, good = Manifest.read(mixed), [0, 1, 3, 5, 6, 7]
    assert saved["paths"].tolist() == [rows.file(n) for n in good]
    assert saved["labels"].tolist() == [rows[n].label for n in good]
    assert tuple(saved["classes"]) == CLASSES and json.loads(str(saved["model"])) == weights.model
    assert json.loads(str(saved["preprocessing"])) == weights.preprocessing
    assert saved["features"].shape == (6, 24) and saved["features"].dtype == np.float32
    loader = ClipLoader(rows, **clip_settings(config.data, "test"), batch_size=1, workers=0)
    expected = [network.forward_features(batch.clips[0]).mean(0) for batch in loader if batch.valid.item()]
    torch.testing.assert_close(torch.from_numpy(saved["features"]), torch.stack(expected).detach())


def test_features_as_a_user_writes_them(weights_file, mixed, small_data, tmp_path):
    out = tmp_path / "f.npz"
    done = run_here("predict.py", "-w", weights_file, mixed, small_data / "val_0.mp4", "--features", out, *IN_PROCESS)
    assert done.returncode == 1 and "2 of 9 videos cannot be read" in done.stderr
    with np.load(out) as saved:
        assert len(saved["features"]) == 7 and "labels" not in saved  # one video is from no manifest
    nothing = Features(tmp_path / "none.npz")
    nothing.add(next(predictions(weights_file, ["gone.mp4"], features=True)))
    with pytest.raises(InputError, match="not written: none of the videos"):
        nothing.save(load_weights(weights_file))
    assert [path.name for path in tmp_path.iterdir()] == ["f.npz"]


def test_explanations_are_the_rollout_of_the_middle_crop(weights_file, small_data, tmp_path):
    video = small_data / "val_6.mp4"
    [found] = predictions(weights_file, [video], explain=True)
    network = load_weights(weights_file).build()
    assert found.attention.shape == (4, 2, 2)
    torch.testing.assert_close(found.attention, attention_rollout(network, found.views[1:2]).patches[0])
    assert not torch.allclose(found.attention, attention_rollout(network, found.views[:1]).patches[0])
    done = run_here("predict.py", "-w", weights_file, video, video, "--explain", tmp_path / "why", *IN_PROCESS)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "why").iterdir()) == ["val_6.png", "val_6_2.png"]


# -- exported networks --


@pytest.fixture(scope="module")
def exported_files(weights_file):
    """By suffix; the .onnx file averages over three views itself."""
    weights = load_weights(weights_file)
    clips = Clips(synthetic_views(weights), [f"clip {number}" for number in range(4)], "compared on four")
    export_onnx(weights_file.with_name("w.onnx"), weights, clips, views=3)
    export_torch(weights_file.with_name("w.pt2"), weights, clips)
    return {suffix: weights_file.with_name(f"w.{suffix}") for suffix in ("onnx", "pt2")}


@pytest.mark.parametrize("suffix", ["onnx", "pt2"])
def test_an_exported_network_predicts_as_its_weights_do(weights_file, mixed, exported_files, suffix, in_process):
    for windows in (1, 3):
        expected = list(predictions(weights_file, [mixed], num_windows=windows))
        found = list(predictions(exported_files[suffix], [mixed], num_windows=windows))
        assert [each.reason for each in found] == [each.reason for each in expected]
        for a, b in zip(found, expected, strict=True):
            assert a.reason or (a.window_probabilities - b.window_probabilities).abs().max() < 1e-5
    said = []
    for file in (exported_files[suffix], weights_file):
        status, lines, errors = in_process(command.main, "-w", file, mixed, "--json", *IN_PROCESS)
        assert status == 1 and "2 of 8 videos cannot be read" in errors
        said.append([json.loads(line) for line in lines.splitlines()])
    for ours, theirs in zip(*said, strict=True):
        assert (ours["video"], ours["error"]) == (theirs["video"], theirs["error"])
        ours, theirs = ({each["class"]: each["probability"] for each in answer["top"]} for answer in (ours, theirs))
        assert ours == pytest.approx(theirs, abs=1.1e-5)


@pytest.mark.parametrize("suffix", ["onnx", "pt2"])
def test_an_exported_network_is_evaluated_as_its_weights_are(
    weights_file, mixed, exported_files, suffix, in_process, tmp_path
):
    found = []
    for file in (weights_file, exported_files[suffix]):
        given = ["-w", file, "-o", f"data.test={mixed}", *IN_PROCESS[1:], "--out", tmp_path / "results"]
        status, said, errors = in_process(evaluate_command.main, *given, "--allow-missing", "--windows", 2)
        assert status == 0, errors
        found.append((read_results(tmp_path / "results"), said.splitlines()[-2:], errors))
    (weights, expected, _), (exported, lines, errors) = found
    assert lines == expected and "macro F1" in lines[0] and lines[1].startswith("test/top1_2x3_prob ")
    assert errors == {"onnx": "onnxruntime: CPUExecutionProvider\n", "pt2": "torch.export: cpu\n"}[suffix]
    np.testing.assert_allclose(exported.probabilities, weights.probabilities, atol=1e-5)
    assert exported.valid.tolist() == weights.valid.tolist() and weights.valid.sum() == 6
    if suffix == "onnx":
        status, _, errors = in_process(evaluate_command.main, *given, "--crops", 1)
        assert status == 2 and "averages the probabilities of 3 crops itself; that needs --crops 3" in errors


def _providers(monkeypatch, *available):
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: list(available))


def test_an_onnx_file_runs_in_another_provider_that_is_there(exported_files, small_data, in_process):
    """The wheels for CPUs have one more provider, which leaves every operator of this network to the CPU."""
    given = ["-w", exported_files["onnx"], small_data / "val_0.mp4", "--json", *IN_PROCESS]
    status, said, errors = in_process(command.main, *given)
    assert (status, errors) == (0, "onnxruntime: CPUExecutionProvider\n")
    status, again, errors = in_process(command.main, *given, "--provider", "azure")
    assert (status, again, errors) == (0, said, "onnxruntime: AzureExecutionProvider\n")
    for provider, package in (("cuda", "onnxruntime-gpu"), ("tensorrt", "onnxruntime-gpu and tensorrt")):
        status, _, errors = in_process(command.main, *given, "--provider", provider)
        assert status == 2 and f"here has azure, cpu; install {package} in place of onnxruntime" in errors
    for file, message in (
        (exported_files["pt2"], "--provider cuda is for .onnx files; "),
        ("w.safetensors", "weights run in torch: use -o device=cuda"),
        ("https://a/w.onnx", "-w https://a/w.onnx: a URL; download it"),
        ("w.engine", "a TensorRT engine, which has no class names; name the .onnx file"),
    ):
        status, _, errors = in_process(command.main, "-w", file, small_data / "val_0.mp4", "--provider", "cuda")
        assert status == 2 and message in errors


def test_auto_takes_the_best_provider_that_starts(exported_files, tmp_path, monkeypatch):
    """onnxruntime is asked for providers that it lists but cannot start, and silently runs on the CPU."""
    import onnxruntime

    asked, started = [], "CPUExecutionProvider"

    class Session(onnxruntime.InferenceSession):
        def __init__(self, path, options=None, providers=()):
            asked.append([name for name, *_ in (each if isinstance(each, tuple) else (each,) for each in providers)])
            super().__init__(path, options, providers=["CPUExecutionProvider"])

        def get_providers(self):
            return [started] if started in asked[-1] else super().get_providers()

    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    cpu, cuda, tensorrt = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
    _providers(monkeypatch, tensorrt, cuda, cpu)
    path = tmp_path / "w.onnx"
    path.symlink_to(exported_files["onnx"])
    assert open_onnx(path, "auto").runtime == f"onnxruntime: {cpu}"
    assert asked[1:] == [[cuda, cpu], [cpu]]  # the first one checks the file
    started = cuda
    assert open_onnx(path, "auto").runtime == f"onnxruntime: {cuda}"
    started = tensorrt
    assert open_onnx(path, "auto").runtime == f"onnxruntime: {cpu}"  # without engines, which take minutes to build
    exported = open_onnx(path, "tensorrt")
    assert exported.runtime == f"onnxruntime: {tensorrt}" and asked[-1] == [tensorrt, cuda, cpu]
    (tmp_path / "w.tensorrt").mkdir()
    assert open_onnx(path, "auto").runtime == f"onnxruntime: {tensorrt}"
    started = cpu
    with pytest.raises(InputError, match="--provider cuda: onnxruntime could not start CUDAExecutionProvider"):
        open_onnx(path, "cuda")


def test_engines_get_no_larger_batches_than_they_were_built_for(exported_files):
    sizes = []

    class Session:
        def run(self, _, inputs):
            sizes.append(len(inputs["clips"]))
            return [np.zeros((len(inputs["clips"]), 3), np.float32)]

    assert runner(Session(), most=8)(torch.zeros(19, 1)).shape == (19, 3) and sizes == [8, 8, 3]


def test_features_of_an_exported_network_are_errors(mixed, exported_files):
    for wish in ("features", "explain"):
        with pytest.raises(InputError, match="gives only probabilities"):
            next(predictions(exported_files["onnx"], [mixed], **{wish: True}))
    for override, message in (
        ("data.crop_size=48", "data.crop_size is 48, but these weights were trained with 32"),
        ("data.num_frames=8", "exported for 4 frames, data.num_frames is 8"),
    ):
        with pytest.raises(InputError, match=message):
            next(predictions(exported_files["pt2"], [mixed], overrides=[override]))


def test_weights_adapt_to_more_frames_but_not_to_other_preprocessing(weights_file, small_data):
    [found] = islice(predictions(weights_file, [small_data / "val_6.mp4"], overrides=["data.num_frames=8"]), 1)
    assert found.views.shape == (3, 3, 8, 32, 32)
    with pytest.raises(InputError, match="data.mean is"):
        next(predictions(weights_file, [small_data / "val_6.mp4"], overrides=["data.mean=[0,0,0]"]))


def test_an_overlay_as_a_user_makes_it(weights_file, small_data, tmp_path, in_process):
    out = tmp_path / "labelled.mp4"
    given = ["-w", weights_file, "--overlay", out, "--windows", 2, *IN_PROCESS]
    rows = Manifest.read(small_data / "val.csv")
    Manifest([rows[6]._replace(path=rows.file(6))], classes=CLASSES).write(tmp_path / "one.csv")
    for video in (small_data / "val_6.mp4", tmp_path / "one.csv"):
        status, said, errors = in_process(command.main, *given[:2], video, *given[2:])
        assert status == 0 and errors == f"saved {out}: {rows[6].frames} frames\n", errors
        assert len(said.splitlines()) == 1 + 3 + 2
        made = probe(out)
        assert (made.frames, made.width, made.height) == (rows[6].frames, rows[6].width, rows[6].height)
    for path, message in (
        (tmp_path / "x.avi", "expected a name that ends in .mp4, .mkv, .mov"),
        (small_data / "val_6.mp4", "is the video itself; name another file"),
    ):
        status, _, errors = in_process(command.main, *given[:2], small_data / "val_6.mp4", "--overlay", path)
        assert status == 2 and message in errors
