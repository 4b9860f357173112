"""Videos stored as one image per frame: names, decoding against PIL, the loader's three ways, faults."""

import io
import os
import re

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from dali_pipelines import ClipLoader, InputError, Manifest
from dali_pipelines.files import Source, join, open_video, size_of
from dali_pipelines.folders import frame_folders_below
from dali_pipelines.frame_names import frame_files, is_frames, name_frames
from dali_pipelines.host_decoder import decode_all, decode_frames
from dali_pipelines.images import image_size
from dali_pipelines.probe import probe
from tests.videos import textured

SIZE = (48, 64)


def encoded(pixels, kind="JPEG", **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def write_frames(folder, count: int, *, seed: int = 0, start: int = 1, size=SIZE) -> str:
    """Writes img_00001.jpg and so on; returns the path that names them."""
    folder.mkdir(parents=True)
    for number, frame in enumerate(textured(count, height=size[0], width=size[1], seed=seed), start=start):
        (folder / f"img_{number:05}.jpg").write_bytes(encoded(frame, quality=90))
    return str(folder / name_frames(os.listdir(folder))[0])


def pil(path: str) -> np.ndarray:
    return np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))


@pytest.fixture(scope="module")
def frames(tmp_path_factory) -> Manifest:
    """Five folders of 4 to 24 frames; copies of it may be damaged."""
    root = tmp_path_factory.mktemp("frames")
    videos = [
        probe(write_frames(root / f"v{n}", 4 + 5 * n, seed=n, start=n))._replace(label=n % 3, path=f"v{n}/{name}")
        for n in range(5)
        for name in [f"img_{{{n:05}..{4 + 6 * n - 1:05}}}.jpg"]
    ]
    return Manifest(videos, root=root)


def loader(manifest: Manifest, mode="test", **settings) -> ClipLoader:
    settings = dict(batch_size=2, num_frames=4, crop_size=32, stride=2, workers=0, seed=3) | settings
    return ClipLoader(manifest, mode=mode, **settings)


# -- names --


def test_names_and_paths_are_inverse():
    rng = np.random.default_rng(0)
    for _ in range(200):
        start, count = int(rng.choice([0, 1, 8, 97])), int(rng.integers(1, 30))
        digits = int(rng.choice([1, 3, 5]))
        kept = [n for n in range(start, start + count) if rng.random() < rng.choice([0.7, 1])] or [start]
        head, tail = rng.choice(["img_", "", "frame-", "v1_c2_"]), rng.choice([".jpg", "_rgb.JPEG", ".png"])
        names = [f"{head}{number:0{digits}}{tail}" for number in kept]
        (path,) = name_frames(rng.permutation([*names, "notes.txt", "flow_x_00001.jpg"]).tolist())
        files = frame_files(f"a/b/{path}")
        assert is_frames(path) and [files.path(k) for k in range(len(files))] == [f"a/b/{name}" for name in names]
        assert files.gaps == kept[-1] - kept[0] + 1 - len(kept)
        with pytest.raises(IndexError):
            files.path(len(files))


@pytest.mark.parametrize(
    "names, paths",
    [
        (["img_9.jpg", "img_10.jpg", "img_8.jpg"], ["img_{8..10}.jpg"]),
        (["img_09.jpg", "img_10.jpg", "img_12.jpg"], ["img_{09..10,12}.jpg"]),
        (["img_1.jpg", "img_02.jpg"], ["img_{1,02}.jpg"]),
        (["left_1.jpg", "right_1.jpg"], ["left_{1}.jpg", "right_{1}.jpg"]),
        (["x_1.jpg", "y_1.jpg", "img_1.jpg"], ["img_{1}.jpg"]),
        (["flow_x_1.jpg"], ["flow_x_{1}.jpg"]),
        (["cover.jpg", "a.mp4"], []),
    ],
)
def test_names_of_a_folder(names, paths):
    assert name_frames(names) == paths


def test_paths_that_do_not_name_frames():
    for path in ("a.mp4", "a{1}.mp4", "a{}.jpg", "a{x}.jpg", "{1..2}/a.jpg", "img_1.jpg", "a{1..}.jpg"):
        assert not is_frames(path)
    url = join("http://server/a b", "c d/img_{1..2}.jpg")
    assert is_frames(url) and frame_files(url).path(1) == "http://server/a b/c%20d/img_2.jpg"


def test_folders_of_frames_are_found(tmp_path):
    write_frames(tmp_path / "b" / "v", 3)
    write_frames(tmp_path / "a" / "w", 2, start=0)
    (tmp_path / "a" / "w" / "list.txt").write_text("")
    (tmp_path / "c").mkdir()
    for name in ("left_1.jpg", "right_1.jpg"):
        (tmp_path / "c" / name).write_bytes(b"")
    found = frame_folders_below(tmp_path)
    assert found.videos == ["a/w/img_{00000..00001}.jpg", "b/v/img_{00001..00003}.jpg"]
    assert "3 files skipped: 2 .jpg, 1 .txt" in found.note and "c: skipped, as its images are numbered" in found.note


# -- decoding --


def test_images_of_every_kind_are_decoded_as_pil_does(tmp_path):
    pixels = textured(1, height=40, width=56, seed=0)[0]
    picture = Image.fromarray(pixels)
    turned = picture.getexif()
    turned[0x0112] = 6
    kinds = {
        "jpg": picture,
        "gray": picture.convert("L"),
        "cmyk": picture.convert("CMYK"),
        "png": picture,
        "alpha": picture.convert("RGBA"),
        "exif": picture.rotate(90, expand=True),
    }
    for number, (kind, image) in enumerate(kinds.items()):
        options = {"exif": turned} if kind == "exif" else {}
        suffix = ".png" if kind in ("png", "alpha") else ".jpg"
        path = tmp_path / f"img_{number}{suffix}"
        image.save(path, "PNG" if suffix == ".png" else "JPEG", **options)
        found = decode_frames(str(tmp_path / f"img_{{{number}}}{suffix}"), np.array([0]), size=(40, 56))
        assert np.array_equal(found.frames[0], pil(path)), kind
        video = probe(str(tmp_path / f"img_{{{number}}}{suffix}"))
        assert (video.height, video.width, video.frames) == (40, 56, 1)
        assert video.codec == ("png frames" if suffix == ".png" else "jpeg frames")


def test_only_the_frames_of_the_clip_are_read(tmp_path):
    path = write_frames(tmp_path / "v", 6)
    for number in (1, 3, 4, 6):
        (tmp_path / "v" / f"img_{number:05}.jpg").unlink()
    found = decode_frames(path, np.array([1, 4]), size=SIZE, region=(slice(4, 20), slice(8, 40)))
    expected = [pil(tmp_path / "v" / f"img_{number:05}.jpg")[4:20, 8:40] for number in (2, 5)]
    assert np.array_equal(found.frames, expected) and (found.packets_read, found.packets_kept) == (2, 2)


def test_all_frames_and_the_size_of_the_files(frames):
    source = frames.source(4)
    decoded = [frame.to_ndarray(format="rgb24") for frame in decode_all(source, frames=24, size=SIZE)]
    files = [frame_files(source.path).path(k) for k in range(24)]
    assert np.array_equal(decoded, [pil(file) for file in files])
    assert size_of(source) == sum(map(os.path.getsize, files))
    with pytest.raises(InputError, match="images in files of their own"):
        open_video(source)


GOOD = encoded(textured(1, height=SIZE[0], width=SIZE[1], seed=0)[0])
PNG = encoded(textured(1, height=SIZE[0], width=SIZE[1], seed=0)[0], "PNG")
BROKEN = {
    "an empty file": b"",
    "not a JPEG or PNG image": b"GIF89a" * 20,
    "cut off": GOOD[: len(GOOD) // 2],
    "a damaged JPEG header": GOOD[:2] + bytes(40) + GOOD[2:],
    "not an image that DALI can decode": GOOD[: GOOD.index(b"\xff\xda")] + b"\xff\xd9",
    "a frame is 32x32, not 64x48": encoded(np.zeros((32, 32, 3), np.uint8)),
    "a frame is 48x64, not 64x48": encoded(np.zeros((64, 48, 3), np.uint8)),
}


@pytest.mark.parametrize("reason", BROKEN)
def test_the_error_names_the_broken_file(tmp_path, reason):
    path = write_frames(tmp_path / "v", 3)
    (tmp_path / "v" / "img_00002.jpg").write_bytes(BROKEN[reason])
    with pytest.raises(InputError, match=f"^img_00002.jpg: {re.escape(reason)}"):
        list(decode_all(path, frames=3, size=SIZE))


def test_headers_cut_anywhere_are_errors():
    assert image_size(GOOD) == image_size(PNG) == SIZE
    for data in (GOOD, PNG):
        for end in range(0, len(data) - 16, 7):
            with pytest.raises(InputError):
                image_size(data[:end])


def test_probing_needs_the_first_and_the_last_frame(tmp_path):
    path = write_frames(tmp_path / "v", 3)
    with pytest.raises(InputError, match="its frames are 64x48, more than 100 pixels"):
        probe(path, max_pixels=100)
    (tmp_path / "v" / "img_00003.jpg").unlink()
    with pytest.raises(InputError, match="img_00003.jpg: no such file"):
        probe(path)
    with pytest.raises(InputError, match="frame 3 is needed, but its path names only 3"):
        decode_frames(Source(path), np.array([3]), size=SIZE)


# -- the loader --


@pytest.mark.parametrize("decode, engine", [("host", "host"), ("nvdec", "dali"), ("dali", "host")])
def test_clips_are_those_of_the_frames_by_pil(frames, decode, engine):
    """The sampled frames depend only on the number of frames and the rate, as for any video: the expected clips are
    cut out of the images of PIL at the positions of the plan."""
    from dali_pipelines.cpu_cut import cut_clips
    from dali_pipelines.graph import Cut
    from dali_pipelines.plan import View, plan_sample

    settings = dict(num_frames=4, crop_size=32, stride=2)
    cut = Cut(crop_size=32, clips=3, windows=1, mean=(0, 0, 0), std=(1, 1, 1), half=False)
    made = loader(frames, decode=decode)
    assert made.decoders == {"jpeg frames": "DALI"}
    batches = list(made)
    assert not made.stats.faults and not made.stats.fallbacks and made.stats.engines == {engine: 5}
    for row, clip in enumerate(torch.cat([batch.clips for batch in batches])[:5]):
        plan = plan_sample(frames[row], View(mode="test", **settings), seed=3, epoch=0, sample_id=row)
        files = frame_files(frames.source(row).path)
        images = np.stack([pil(files.path(position)) for position in plan.positions.tolist()])
        expected = torch.empty_like(clip)
        cut_clips(images, plan.picks, plan.rectangles, plan.transpose, cut, expected)
        torch.testing.assert_close(clip, expected, rtol=0, atol=1e-4 if engine == "host" else 1e-3)
    last = batches[-1]  # two rows for one video: the second is padding, as `Batch` explains
    assert last.sample_ids.tolist() == [4, -1] and last.valid.tolist() == [True, False]


@pytest.mark.parametrize("decode", ["host", "nvdec"])
def test_a_missing_or_broken_frame_is_a_fault_that_names_it(tmp_path, decode):
    paths = [write_frames(tmp_path / f"v{n}", 6, seed=n) for n in range(3)]
    manifest = Manifest([probe(path) for path in paths])
    (tmp_path / "v0" / "img_00001.jpg").unlink()
    (tmp_path / "v1" / "img_00001.jpg").write_bytes(BROKEN["not an image that DALI can decode"])
    made = loader(manifest, "validate", decode=decode, batch_size=3)
    (batch,) = made
    assert batch.valid.tolist() == [False, False, True] and not batch.clips[:2].any()
    reasons = {fault.sample_id: fault.reason for fault in made.stats.faults}
    assert reasons[0] == "img_00001.jpg: no such file or directory"
    name = "img_00001.jpg" if decode == "host" else "frame 0"
    assert reasons[1] == f"{name}: not an image that DALI can decode; damaged?"
    assert made.stats.faults[0].path.endswith("v0/img_{00001..00006}.jpg")


@pytest.mark.slow
def test_mixed_with_videos_in_worker_processes_and_resumed(frames, small_data):
    videos = Manifest.read(small_data / "train.csv")
    rows = [frames[n]._replace(path=str(frames.root / frames[n].path)) for n in range(5)]
    mixed = Manifest([*list(videos)[:5], *rows], root=videos.root)
    settings = dict(mode="train", batch_size=5, stride=None)
    expected = torch.cat([batch.clips for batch in loader(mixed, **settings)])
    made = loader(mixed, workers=2, **settings)
    first = next(iter(made))
    resumed = loader(mixed, **settings)
    resumed.load_state_dict(made.state_dict())
    (second,) = resumed
    assert torch.equal(torch.cat([first.clips, second.clips]), expected)
    assert not made.stats.faults and not resumed.stats.faults


@pytest.mark.gpu
def test_nvjpeg_gives_the_same_clips(frames):
    """Its inverse DCT rounds differently: a few levels of 255."""
    expected = torch.cat([batch.clips for batch in loader(frames)])
    made = loader(frames, device="cuda", decode="nvdec")
    found = torch.cat([batch.clips for batch in made])
    assert made.decoders == {"jpeg frames": "nvJPEG"} and made.stats.engines == {"dali": 5}
    assert (found.cpu() - expected).abs().mean() < 1 / 255
    assert (found.cpu() - expected).abs().max() < 8 / 255
