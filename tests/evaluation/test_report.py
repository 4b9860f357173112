"""report.html: the numbers of an evaluation, the right frames, nothing fetched, and a page that works."""

import base64
import csv
import io
import json
import os
import re
import shutil
import subprocess
import time
from html.parser import HTMLParser

import av
import numpy as np
import pytest

from dali_pipelines import ClipLoader, InputError, Manifest
from dali_pipelines.manifest import Video
from dali_pipelines.probe import probe
from evaluation.report import REPORT, write_report
from tests.videos import textured, write_video

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium to open the page with")


def write_evaluation(folder, manifest_file, classes, tops, lines, unreadable=()):
    """The files of evaluate.py that are read again, for predictions `tops` [N, M] and `lines`, the probabilities as
    text."""
    manifest = Manifest.read(manifest_file)
    labels, count = manifest.labels, len(manifest)
    valid = np.array([row not in unreadable for row in range(count)])
    folder.mkdir(exist_ok=True)
    with open(folder / "predictions.csv", "w", newline="", errors="surrogateescape") as file:
        writer = csv.writer(file, lineterminator="\n")
        head = ["row", "path", "label", "class", "reason", *(f"top{k + 1}" for k in range(5))]
        writer.writerow(head + [f"p{k}" for k in range(len(classes))])
        blanks = [""] * (5 - tops.shape[1])
        for row in range(count):
            known, reason = (tops[row].tolist() + blanks, "") if valid[row] else ([""] * 5, "no such file")
            buffer = io.StringIO(newline="")
            entry = [
                row,
                manifest[row].path,
                labels[row],
                classes[labels[row]].encode(errors="replace").decode(),
                reason,
            ]
            csv.writer(buffer, lineterminator="").writerow(entry + known)
            file.write(f"{buffer.getvalue()},{lines[row] if valid[row] else ',' * (len(classes) - 1)}\n")
    right, right5 = valid & (tops[:, 0] == labels), valid & (tops == labels[:, None]).any(1)
    results = {
        "protocol": "test/top1_1x3_prob",
        "windows": 1,
        "crops": 3,
        "average": "prob",
        "weights": [{"path": "out/best.safetensors", "sha256": "5e" * 32, "top1": right.mean(), "top5": right5.mean()}],
        "config": {
            "name": "tiny",
            "data": {"num_frames": 4, "crop_size": 32, "stride": None, "target_fps": 30, "past_end": "fit"},
        },
        "manifest": {
            "path": str(manifest_file),
            "sha256": "ab" * 32,
            "root": str(manifest_file.parent),
            "listed": count + 2,
            "kept": count,
            "left_out": 2,
        },
        "expected": count,
        "evaluated": int(valid.sum()),
        "failed": int((~valid).sum()),
        "top1": right.mean(),
        "top1_interval": [right.mean() / 2, (1 + right.mean()) / 2],
        "top5": right5.mean(),
        "top5_interval": [right5.mean() / 2, (1 + right5.mean()) / 2],
        "mean_class_accuracy": 0.4321,
        "classes": list(classes),
        "faults": [{"row": row, "path": manifest[row].path, "reason": "no such file"} for row in unreadable],
        "date": "2026-11-24T12:00:00+00:00",
        "seconds": 61.5,
        "versions": {"torch": "2.13.0"},
    }
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def as_text(probabilities):
    return [",".join(f"{value:.6f}" for value in row) for row in probabilities]


@pytest.fixture
def evaluation(small_data, tmp_path):
    """13 videos of three classes, 0, 1, 2, 0, ...; rows 1, 3, 6, 8 and 10 are mistakes, 4 is unreadable."""
    said = {1: (2, 0.6), 3: (1, 0.95), 6: (2, 0.8), 8: (1, 0.7), 10: (2, 0.99)}
    probabilities = np.full((13, 3), 0.1)
    for row in range(13):
        top, share = said.get(row, (row % 3, 0.9))
        probabilities[row] = 0.75 * (1 - share)
        probabilities[row, top] = share
        probabilities[row, (top + 1) % 3] = 0.25 * (1 - share)
    tops = np.argsort(-probabilities, axis=1)
    return write_evaluation(
        tmp_path / "run", small_data / "train.csv", ("ash", "Birch", "cedar"), tops, as_text(probabilities), [4]
    )


MOST_CONFIDENT = [10, 3, 6, 8, 1]


class Page(HTMLParser):
    """Elements of a page in order: (tag, attributes, text in it up to the next tag)."""

    def __init__(self, text):
        super().__init__()
        self.elements = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append([tag, dict(attributes), ""])

    def handle_data(self, data):
        if self.elements:
            self.elements[-1][2] += data

    def all(self, tag, **wanted):
        return [
            (attributes, text.strip())
            for each, attributes, text in self.elements
            if each == tag and all(attributes.get(key) == value for key, value in wanted.items())
        ]

    def one(self, tag, **wanted):
        (found,) = self.all(tag, **wanted)
        return found


def page_text(folder):
    """The page without its styles and scripts."""
    return re.sub(r"<(style|script)\b.*?</\1>", "", (folder / REPORT).read_text(encoding="utf-8"), flags=re.DOTALL)


def read(path):
    return Page(path.read_text(encoding="utf-8"))


@pytest.mark.slow
def test_numbers_are_those_of_the_evaluation(evaluation):
    page = read(write_report(evaluation))
    value = {attributes["id"]: float(attributes["value"]) for attributes, _ in page.all("data")}
    wanted = {"top1": 7 / 13, "mean_class_accuracy": 0.4321, "expected": 13, "evaluated": 12}
    assert {key: value[key] for key in wanted} == pytest.approx(wanted)
    # Class 0: 3 right of 5, 3 predictions; class 1: 1 of 4, 3 predictions; class 2: 3 of 4, 6 predictions.
    assert value["macro_f1"] == pytest.approx((6 / 8 + 2 / 7 + 6 / 10) / 3)
    assert "top-5" not in page_text(evaluation).lower()  # with three classes it would be 1
    assert all(title in (evaluation / REPORT).read_text() for title in ('"true class"', '"predicted class"'))
    assert value["failed"] == 1 and value["left_out"] == 2
    rows = [attributes for attributes, _ in page.all("tr") if "data-label" in attributes]
    assert [(row["data-label"], row["data-accuracy"], row["data-videos"]) for row in rows] == [
        ("1", "0.2500", "4"),  # the unreadable one counts
        ("0", "0.6000", "5"),
        ("2", "0.7500", "4"),
    ]
    data = json.loads(page.one("script", id="data")[1])
    cells = {tuple(data["cells"][i : i + 2]): data["cells"][i + 2] for i in range(0, len(data["cells"]), 3)}
    assert cells == {(0, 0): 3, (0, 1): 1, (0, 2): 1, (1, 1): 1, (1, 2): 2, (2, 1): 1, (2, 2): 3}
    assert data["mistakes"]["row"] == MOST_CONFIDENT and data["mistakes"]["confidence"] == [990, 950, 800, 700, 600]
    pairs = [attributes["href"] for attributes, _ in page.all("a") if "predicted=" in attributes["href"]]
    assert pairs.count("#true=1&predicted=2") == 2  # in the table, and in the list
    text = (evaluation / "report.html").read_text()
    assert "53.8&#8239;%" in text and "26.9&#8239;% to 76.9&#8239;%" in text and "5e" * 32 in text
    assert "Of the others, top-1 is 58.3&#8239;%" in text and "points wide" in text


def test_calibration_error_by_hand(evaluation):
    # Bins of 1/15: 0.9 holds seven, all right; each of the five others is alone and wrong (0.95 and 0.99 together).
    value = float(read(write_report(evaluation)).one("data", id="ece")[0]["value"])
    assert value == pytest.approx((7 * 0.1 + 0.6 + 0.8 + 0.7 + 0.95 + 0.99) / 12)


def pictures_of(page):
    """Row -> its frames, uint8 [N, S, S, 3]."""
    found, row = {}, None
    for tag, attributes, _ in page.elements:
        if tag == "article":
            row = int(attributes["id"].removeprefix("row-"))
            found[row] = []
        elif tag == "img":
            jpeg = base64.b64decode(attributes["src"].removeprefix("data:image/jpeg;base64,"))
            with av.open(io.BytesIO(jpeg), format="mjpeg") as container:
                found[row].append(next(container.decode(video=0)).to_ndarray(format="rgb24"))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("most", [0, 2, 24])
def test_the_most_confident_mistakes_are_shown(evaluation, most):
    page = read(write_report(evaluation, most_cards=most))
    pictures = pictures_of(page)
    assert list(pictures) == MOST_CONFIDENT[:most]
    for row, each in pictures.items():
        card = page.one("article", id=f"row-{row}")[0]
        assert (card["data-label"], len(each)) == (str(row % 3), 4)


@pytest.mark.slow
def test_frames_are_those_that_the_network_saw(tmp_path):
    """Including rotated videos, and a long one whose frames are far apart."""
    videos = []
    for number, (rotation, count) in enumerate([(0, 9), (90, 7), (180, 7), (270, 60)]):
        path = tmp_path / f"{number}.mp4"
        write_video(path, textured(count, height=64, width=104, seed=number), rotation=rotation)
        videos.append(probe(path)._replace(path=path.name, label=0))
    Manifest(videos, root=tmp_path).write(tmp_path / "m.csv")
    tops = np.tile([1, 0], (4, 1))
    folder = write_evaluation(tmp_path / "run", tmp_path / "m.csv", ("a", "b"), tops, as_text([[0.1, 0.9]] * 4))
    pictures = pictures_of(read(write_report(folder)))
    settings = {"num_frames": 4, "crop_size": 32, "stride": None, "device": "cpu", "workers": 0, "batch_size": 4}
    (batch,) = ClipLoader(Manifest.read(tmp_path / "m.csv"), mode="test", **settings)
    for row, seen in enumerate(batch.clips[:, 1].permute(0, 2, 3, 4, 1).numpy() * 255):  # middle crop, [T, S, S, 3]
        shown = np.stack(pictures[row]).astype(float)
        distance = np.abs(shown[:, None] - seen[None]).mean((2, 3, 4))
        assert distance.argmin(1).tolist() == [0, 1, 2, 3]
        assert distance.diagonal().max() < 10, "another part of the picture"


@pytest.mark.slow
def test_nothing_is_fetched(evaluation):
    path = write_report(evaluation)
    text = path.read_text(encoding="utf-8")
    for tag, attributes, _ in read(path).elements:
        assert tag not in ("link", "iframe", "object", "embed", "base")
        for name, value in attributes.items():
            if name in ("src", "href", "srcset", "action", "data", "poster"):
                assert value.startswith(("#", "data:image/jpeg;base64,"))
    assert not re.search(r"https?:|//\w+\.\w|url\(|@import|\bfetch\(|XMLHttpRequest|\bimport\(", text)
    assert "default-src 'none'" in read(path).all("meta")[1][0]["content"]


NASTY = (
    "<b>&\"'</b>",
    "</script><script>window.onerror('bad')</script>",
    "long " * 80,
    "<!--<script>",
    "wei\u00dfe \udce9t\u00e9",
)


@pytest.fixture
def nasty(tmp_path):
    """Names and paths that could break a page; the manifest is gone."""
    paths = [
        "<img src=x onerror=alert(1)>.mp4",
        "a,\"b\"\n'c'.mp4",
        os.fsdecode(b"caf\xe9.mp4"),
        "d" * 300,
        "\u202ee.mp4",
    ]
    videos = [Video(path, label, 30, 25.0, 64, 48, "h264", 0) for label, path in enumerate(paths)]
    Manifest(videos, root=tmp_path).write(tmp_path / "m.csv")
    tops = np.array([[(label + 1) % 5, label] for label in range(5)])
    folder = write_evaluation(tmp_path / "run", tmp_path / "m.csv", NASTY, tops, as_text([[0.2] * 5] * 5), [4])
    (tmp_path / "m.csv").unlink()
    return folder


def test_names_are_escaped(nasty):
    page = read(write_report(nasty))
    text = (nasty / "report.html").read_text(encoding="utf-8")
    assert not page.all("img") and not any("onerror" in attributes for _, attributes, _ in page.elements)
    assert len(page.all("script")) == 3 and "<b>&" not in text and "<img src=x" not in text
    data = json.loads(page.one("script", id="data")[1])
    assert data["classes"][:4] == list(NASTY[:4]) and data["classes"][4] == "wei\u00dfe \\xe9t\u00e9"
    shown = [text for _, text in page.all("p", **{"class": "path"})]
    assert shown == ["<img src=x onerror=alert(1)>.mp4", "a,\"b\"\\x0a'c'.mp4", "caf\\xe9.mp4", "d" * 300]
    assert "\\u202ee.mp4" in [text for _, text in page.all("td", **{"class": "path"})]


def test_a_missing_manifest_or_video_costs_only_its_frames(evaluation, small_data, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(small_data, moved)
    results = json.loads((evaluation / "results.json").read_text())

    def report_with(manifest_file):
        results["manifest"]["path"] = str(manifest_file)
        (evaluation / "results.json").write_text(json.dumps(results))
        path = write_report(evaluation)
        return pictures_of(read(path)), path.read_text()

    (moved / "train_3.webm").unlink()
    pictures, text = report_with(moved / "train.csv")
    assert {row: len(each) for row, each in pictures.items()} == {10: 4, 3: 0, 6: 4, 8: 4, 1: 4}
    assert "No frames: no such file or directory." in text
    pictures, text = report_with(moved / "val.csv")  # another manifest in its place
    assert not any(pictures.values()) and text.count("No frames: the manifest has changed since then.") == 5
    pictures, text = report_with(tmp_path / "gone.csv")
    assert list(pictures) == MOST_CONFIDENT and not any(pictures.values())
    assert f"No frames: {tmp_path}/gone.csv: no such manifest" in text


def test_every_video_right_or_none_readable(evaluation, small_data, tmp_path):
    tops = np.argsort(-np.eye(3)[np.arange(13) % 3], axis=1, kind="stable")
    lines = as_text(np.eye(3)[np.arange(13) % 3])
    settings = (small_data / "train.csv", ("ash", "Birch", "cedar"), tops, lines)
    page = read(write_report(write_evaluation(tmp_path / "right", *settings)))
    assert not page.all("article") and not page.all("section", id="unreadable")
    page = read(write_report(write_evaluation(tmp_path / "none", *settings, range(13))))
    assert not page.all("article") and not page.all("section", id="calibration")
    assert len([row for row, _ in page.all("tr") if "data-row" in row]) == 13
    assert json.loads(page.one("script", id="data")[1])["cells"] == []


def replace(name, old, new):
    def change(folder):
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new, 1))

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda folder: (folder / "results.json").unlink(),
            "results.json: No such file or directory; evaluate.py writes it",
        ),
        (lambda folder: (folder / "predictions.csv").unlink(), "predictions.csv: No such file"),
        (lambda folder: (folder / "results.json").write_text("top1: 0.5"), "results.json: not JSON"),
        (lambda folder: (folder / "results.json").write_text("[]"), r"results.json: .* the file is '\[\]'"),
        (replace("results.json", '"top1_interval"', '"interval"'), "no top1_interval"),
        (replace("results.json", '"crop_size": 32', '"crop_size": "32"'), "crop_size is '32'"),
        (replace("results.json", '"expected": 13', '"expected": 14'), "13 videos, but results.json has 14"),
        (replace("results.json", '"ash", ', ""), "not those of evaluate.py for 2 classes"),
        (replace("predictions.csv", "0.900000", "much"), r"predictions.csv:2: could not convert .*'much'"),
        (replace("predictions.csv", ",ash,,0,", ",ash,,7,"), "predictions.csv:2: class 7 of 3"),
        (replace("predictions.csv", "no such file", ""), "predictions.csv:6: neither a prediction nor a reason"),
        (replace("predictions.csv", "\n1,", "\n"), "predictions.csv:3: 12 columns, but the header names 13"),
    ],
)
def test_missing_and_wrong_files_are_errors(evaluation, change, message):
    change(evaluation)
    with pytest.raises(InputError, match=message):
        write_report(evaluation)
    assert not list(evaluation.glob("report*"))


HOOKS = """
const root = document.documentElement.dataset, canvas = document.getElementById("matrix");
const text = (id) => document.getElementById(id).textContent;
const order = () => [...document.querySelectorAll(".classes tbody tr:not([hidden])")].map((row) => row.dataset.label);
const key = (name) => canvas.dispatchEvent(new KeyboardEvent("keydown", { key: name, cancelable: true }));
const place = (x, y) => {
  const box = canvas.getBoundingClientRect();
  return { clientX: box.left + x * box.width, clientY: box.top + y * box.height, pointerId: 1, cancelable: true };
};
const mouse = (kind, x, y) => canvas.dispatchEvent(new PointerEvent(kind, place(x, y)));
const wheel = (deltaY) => canvas.dispatchEvent(new WheelEvent("wheel", { deltaY, ...place(0.6, 0.6) }));
canvas.setPointerCapture = () => {};  // there is no such pointer
"""


def opened(path, tmp_path, fragment="", *, script="", width=1280):
    """The page in headless Chromium after `script` ran, and the attributes of its root."""
    page = tmp_path / "opened.html"
    wide = "root.fits = document.documentElement.scrollWidth <= innerWidth;"
    page.write_text(f"{path.read_text(encoding='utf-8')}<script>{HOOKS}{script}{wide}</script>", encoding="utf-8")
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--window-size={width},900", "--dump-dom"]
    done = subprocess.run(
        [CHROMIUM, *flags, f"--user-data-dir={tmp_path}/profile", f"file://{page}{fragment}"],
        capture_output=True,
        timeout=100,
    )
    dom = Page(done.stdout.decode())
    root = dom.elements[0][1]
    assert "data-ready" in root, done.stderr.decode()[-2000:]
    assert "data-error" not in root, root["data-error"]
    assert root["data-fits"] == "true", "the page is wider than its window"
    return dom, root


def visible(dom):
    return [int(row["data-label"]) for row, _ in dom.all("tr") if "data-label" in row and "hidden" not in row]


@needs_chromium
def test_the_address_sorts_filters_and_selects(evaluation, tmp_path):
    path = write_report(evaluation)
    dom, _ = opened(path, tmp_path, "#sort=name&order=descending&filter=R&true=1&predicted=2")
    assert visible(dom) == [2, 1]  # cedar, birch
    assert "2 of 3 classes" in dom.one("output", id="shown")[1]
    assert dom.one("h3", id="chosen")[1] == "Birch \u2192 cedar"
    assert dom.one("output", id="readout")[1] == "Birch \u2192 cedar: 2 (66.7\u202f%)"
    videos = [text for attributes, text in dom.all("a") if attributes["href"] in ("#row-10", "#row-1")]
    assert videos == ["train_10.mp4", "train_1.webm"]
    dom, _ = opened(path, tmp_path, "#sort=nonsense&true=99")
    assert visible(dom) == [1, 0, 2] and dom.one("h3", id="chosen")[1] == "Videos"  # none chosen


@needs_chromium
def test_clicks_and_keys(evaluation, tmp_path):
    script = """
    const orders = [order().join("")];
    for (const name of ["name", "name", "videos", "accuracy"]) {
      document.querySelector(`[data-sort=${name}]`).click();
      orders.push(order().join(""));
    }
    root.orders = orders.join(" ");
    root.hash = location.hash;
    const filter = document.getElementById("filter");
    filter.value = "BIR"; filter.dispatchEvent(new Event("input"));
    root.filtered = order();
    mouse("pointermove", 0.99, 0.5); root.pointed = text("readout");
    mouse("pointerdown", 0.99, 0.5); mouse("pointerup", 0.99, 0.5); root.chosen = text("chosen");
    for (const name of ["ArrowUp", "ArrowLeft", "+", "Enter"]) key(name);
    root.moved = text("readout"); root.entered = text("chosen");
    const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
    root.colours = new Set(new Uint32Array(pixels.buffer)).size;
    """
    _, root = opened(write_report(evaluation), tmp_path, script=script)
    assert root["data-orders"] == "102 012 210 012 102"
    assert "sort=accuracy" in root["data-hash"] and root["data-filtered"] == "1"
    assert root["data-pointed"] == "Birch \u2192 cedar: 2 (66.7\u202f%)" and root["data-chosen"] == "Birch \u2192 cedar"
    assert root["data-moved"] == "ash \u2192 Birch: 1 (20.0\u202f%)" and root["data-entered"] == "ash \u2192 Birch"
    assert int(root["data-colours"]) > 4, "nothing is drawn"


@needs_chromium
def test_nasty_names_in_the_browser(nasty, tmp_path):
    script = """root.videos = [...document.querySelectorAll(".classes td")].filter(
        (cell) => cell.offsetWidth && cell.textContent.includes("/")).length;"""
    dom, root = opened(write_report(nasty), tmp_path, "#true=1&sort=name", width=400, script=script)
    assert dom.one("h3", id="chosen")[1] == f"Mistakes of {NASTY[1]}"
    assert not dom.all("img") and len(visible(dom)) == 5 == int(root["data-videos"])


@pytest.mark.slow
def test_400_classes_and_20000_videos(tmp_path):
    """As large as Kinetics-400's validation; -s prints size and time."""
    random = np.random.default_rng(0)
    labels = np.arange(20_000) % 399  # one class has no video
    videos = [
        Video(f"val/some folder/{n:022d}.mp4", int(k), 300, 30.0, 340, 256, "h264", 0) for n, k in enumerate(labels)
    ]
    classes = [f"class number {k}" for k in range(400)]
    Manifest(videos, root=tmp_path, classes=classes).write(tmp_path / "m.csv")
    probabilities = random.dirichlet(np.full(400, 0.02), 400)
    probabilities = np.stack([np.roll(row, label - row.argmax()) for label, row in enumerate(probabilities)])
    text = as_text(probabilities)
    said = np.where(random.random(20_000) < 0.5, labels, random.integers(0, 400, 20_000))
    tops = np.argsort(-probabilities, axis=1)[said, :5]
    lines = [text[label] for label in said]
    folder = write_evaluation(tmp_path / "run", tmp_path / "m.csv", classes, tops, lines, range(0, 20_000, 500))
    start = time.perf_counter()
    path = write_report(folder)
    seconds, size = time.perf_counter() - start, path.stat().st_size
    assert seconds < 30 and size < 4e6
    valid = np.arange(20_000) % 500 != 0
    cells, counts = np.unique(np.stack([labels, said], 1)[valid], axis=0, return_counts=True)
    page = read(path)
    assert np.array_equal(
        np.reshape(json.loads(page.one("script", id="data")[1])["cells"], (-1, 3)), np.column_stack([cells, counts])
    )
    assert "1 class has no video here: <b>class number 399</b>" in path.read_text()
    if CHROMIUM:
        script = """
        const corner = () => { mouse("pointermove", 0.997, 0.997); return text("readout").match(/\\d+/g).slice(0, 2); };
        const corners = [];
        key("0"); corners.push(corner());
        wheel(-1200); corners.push(corner());  // scrolls the page
        canvas.focus(); wheel(-1200); corners.push(corner());
        mouse("pointerdown", 0.6, 0.6); mouse("pointermove", 0.5, 0.5); mouse("pointerup", 0.5, 0.5);
            corners.push(corner());
        key("0"); corners.push(corner());
        root.corners = corners;
        mouse("pointerleave", 0, 0);
        """
        dom, root = opened(path, tmp_path, "#sort=videos&true=3&predicted=3", script=script)
        corners = np.reshape([int(each) for each in root["data-corners"].split(",")], (5, 2))  # true, predicted
        assert (corners[[0, 1, 4]] == 399).all() and (corners[2] > 180).all()
        assert (corners[3] > corners[2]).all() and (corners[3] < 399).all()
        assert len(visible(dom)) == 400 and visible(dom)[0] == 399
        right = counts[(cells == [3, 3]).all(1)][0]
        assert dom.one("output", id="readout")[1].startswith(f"class number 3 \u2192 class number 3: {right} (")
        print(f"{size / 1e6:.2f} MB written in {seconds:.1f} s, ready after {root['data-ready']} ms")
        assert int(root["data-ready"]) < 20_000
