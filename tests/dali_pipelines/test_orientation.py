"""Display matrices: frames are shown as players show them, whatever decodes them."""

import io

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from dali_pipelines import ClipLoader, InputError, Manifest
from dali_pipelines.manifest import coded_size
from dali_pipelines.probe import probe
from tests.videos import decode_all, filter_packets, set_matrix, textured, write_video

MATRICES = {
    (1, 0, 0, 1): (0, 0),
    (0, -1, 1, 0): (90, 0),
    (-1, 0, 0, -1): (180, 0),
    (0, 1, -1, 0): (270, 0),
    (-1, 0, 0, 1): (0, 1),
    (0, 1, 1, 0): (90, 1),
    (1, 0, 0, -1): (180, 1),
    (0, -1, -1, 0): (270, 1),
}
"""a, b, c, d of a display matrix: (rotation, mirrored)."""


def show(frames: np.ndarray, matrix: tuple[int, int, int, int]) -> np.ndarray:
    """Frames [N, H, W, 3] with every pixel where the matrix says: (x, y) goes to (a x + c y, b x + d y)."""
    a, b, c, d = matrix
    y, x = np.mgrid[: frames.shape[1], : frames.shape[2]]
    to_x, to_y = a * x + c * y, b * x + d * y
    to_x, to_y = to_x - to_x.min(), to_y - to_y.min()
    shown = np.zeros((len(frames), to_y.max() + 1, to_x.max() + 1, 3), np.uint8)
    shown[:, to_y, to_x] = frames[:, y, x]
    return shown


def validation_crops(frames: np.ndarray, crop: int) -> torch.Tensor:
    """[C, N, crop, crop] in 0..1, of [N, H, W, 3]."""
    short = round(crop * 8 / 7)
    sides = frames.shape[1:3]
    size = [side * short // min(sides) for side in sides]
    y, x = (round((side - crop) / 2) for side in size)
    frames = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255
    whole = interpolate(frames, size=size, mode="bilinear", align_corners=False)
    return whole[:, :, y : y + crop, x : x + crop].transpose(0, 1)


def check(path, matrix, *, decode):
    video = probe(path)
    frames = decode_all(path)
    expected = show(frames, matrix)
    assert (video.rotation, video.mirrored) == MATRICES[matrix]
    assert (video.height, video.width) == expected.shape[1:3] and coded_size(video) == frames.shape[1:3]
    settings = dict(mode="validate", batch_size=1, num_frames=len(frames), crop_size=32, stride=None, workers=0)
    made = ClipLoader(Manifest([video]), **settings, decode=decode)
    batch = next(iter(made))
    assert batch.valid.all() and batch.engines == (decode,)
    error = (batch.clips[0] - validation_crops(expected, 32)).abs()
    assert error.mean() < 2 / 255 if decode == "dali" else error.max() < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("decode, codec", [("host", "h264"), ("nvdec", "h264"), ("nvdec", "hevc"), ("dali", "vp9")])
@pytest.mark.parametrize("matrix", MATRICES)
def test_all_eight_orientations_with_every_engine(tmp_path, matrix, decode, codec):
    path = write_video(tmp_path / "a.mp4", textured(4, height=64, width=96), codec=codec)
    check(set_matrix(path, matrix), matrix, decode=decode)


@pytest.mark.parametrize("decode", ["host", "nvdec"])
@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
@pytest.mark.parametrize(
    "told, matrix",
    [
        ("rotate=90", (0, -1, 1, 0)),
        ("flip=horizontal", (-1, 0, 0, 1)),
        ("rotate=90:flip=horizontal", (0, 1, 1, 0)),
        ("rotate=90:flip=vertical", (0, -1, -1, 0)),
    ],
)
def test_an_orientation_within_the_stream(tmp_path, told, matrix, suffix, decode):
    """As an SEI message of H.264, which the remuxed packets still hold."""
    whole = write_video(tmp_path / "a.mp4", textured(4, height=64, width=96))
    path = filter_packets(whole, tmp_path / f"b.{suffix}", f"h264_metadata=display_orientation=insert:{told}")
    check(path, matrix, decode=decode)


@pytest.mark.parametrize("matrix", [(0, 0, 0, 0), (1, 0.02, -0.02, 1), (1, 0.1, -0.1, 1), (2, 0, 0, 2), (1, 0, 0.1, 1)])
def test_a_degenerate_or_slightly_tilted_matrix_is_no_rotation(tmp_path, matrix):
    path = write_video(tmp_path / "a.mp4", textured(4, height=64, width=96))
    video = probe(set_matrix(path, matrix))
    assert (video.rotation, video.mirrored, video.height, video.width) == (0, 0, 64, 96)


@pytest.mark.parametrize("matrix, angle", [((0.866, -0.5, 0.5, 0.866), 30), ((-0.6, 0.8, 0.8, 0.6), 53)])
def test_other_angles_are_named(tmp_path, matrix, angle):
    path = write_video(tmp_path / "a.mp4", textured(4, height=64, width=96))
    with pytest.raises(InputError, match=f"^rotated by {angle} degrees; only quarter turns are supported$"):
        probe(set_matrix(path, matrix))


def test_a_manifest_without_the_column(tmp_path):
    """A manifest of an earlier version: rotated as before, and nothing mirrored."""
    path = set_matrix(write_video(tmp_path / "a.mp4", textured(4, height=64, width=96)), (0, 1, 1, 0))
    Manifest([probe(path)], root=tmp_path).write(tmp_path / "new.csv")
    found = Manifest.read(tmp_path / "new.csv")
    assert (found[0].rotation, found[0].mirrored) == (90, 1) and found[0] == probe(path)
    header, names, row = (tmp_path / "new.csv").read_text().rsplit("\n", 3)[:3]
    assert names.endswith(",mirrored") and row.endswith(",1")
    old = io.StringIO("\n".join([header, names.removesuffix(",mirrored"), row.removesuffix(",1")]))
    (tmp_path / "old.csv").write_text(old.getvalue())
    assert Manifest.read(tmp_path / "old.csv")[0] == found[0]._replace(mirrored=0)
    (tmp_path / "new.csv").write_text("\n".join([header, names, row.removesuffix(",1") + ",2"]))
    with pytest.raises(InputError, match="mirrored is '2'; expected 0 or 1"):
        Manifest.read(tmp_path / "new.csv")
