"""Chosen frames must equal those of a decoder that decodes everything."""

import numpy as np
import pytest

from dali_pipelines import InputError
from dali_pipelines.host_decoder import decode_frames
from dali_pipelines.manifest import coded_size
from tests.videos import decode_all, edit_packets, numbered, textured, write_video

SIZE = (72, 96)


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("host") / "textured.mp4", textured(60, height=SIZE[0], width=SIZE[1]))


@pytest.mark.slow
@pytest.mark.parametrize("positions", [[0], [59], [0, 7, 13, 59], list(range(60))])
def test_the_wanted_frames_and_only_those(video, positions):
    decoded = decode_frames(video, np.array(positions), size=SIZE)
    assert decoded.frames.dtype == np.uint8 and (decoded.frames == decode_all(video)[positions]).all()
    assert decoded.packets_kept <= decoded.packets_read <= 60


@pytest.mark.slow
def test_a_region_is_that_part_of_the_whole(video):
    region = (slice(3, 50), slice(10, 90))
    decoded = decode_frames(video, np.array([5, 9]), size=SIZE, region=region)
    assert (decoded.frames == decode_all(video)[[5, 9], 3:50, 10:90]).all()


def test_decoding_stops_at_the_last_wanted_frame(video):
    assert decode_frames(video, np.array([3]), size=SIZE).packets_read < 30


def test_reasons(video, tmp_path):
    with pytest.raises(
        InputError, match="frame 60 is needed, but it decodes to only 60 frames; if the file was replaced, index it"
    ):
        decode_frames(video, np.array([0, 60]), size=SIZE)
    with pytest.raises(
        InputError,
        match="a frame is 96x72, not 40x30: the size changes within the video; if the file was",
    ):
        decode_frames(video, np.array([0]), size=(30, 40))
    with pytest.raises(InputError, match="no such file"):
        decode_frames(tmp_path / "gone.mp4", np.array([0]), size=SIZE)
    (tmp_path / "text.mp4").write_text("no video" * 100)
    with pytest.raises(InputError, match=r"not a video that FFmpeg can read \(a text file\)"):
        decode_frames(tmp_path / "text.mp4", np.array([0]), size=SIZE)


@pytest.mark.slow
def test_damage_is_a_fault(tmp_path):
    """Overwritten bytes are noticed where the decoder can: H.264 has no checksum, so some small damage cannot be."""
    path = write_video(tmp_path / "good.mp4", textured(40, height=240, width=320))
    data = open(path, "rb").read()
    faults = 0
    rng = np.random.default_rng(1)
    for _ in range(12):
        start = int(rng.integers(len(data) // 4, len(data) * 3 // 4))
        (tmp_path / "damaged.mp4").write_bytes(data[:start] + rng.bytes(500) + data[start + 500 :])
        try:
            decode_frames(tmp_path / "damaged.mp4", np.arange(0, 40, 5), size=(240, 320))
        except InputError:
            faults += 1
    assert faults >= 9


def test_numbered_frames_of_every_codec(numbered_videos):
    for index in range(len(numbered_videos)):
        video = numbered_videos[index]
        size = coded_size(video)
        positions = np.unique(np.linspace(0, video.frames - 1, 5).astype(int))
        decoded = decode_frames(numbered_videos.file(index), positions, size=size)
        expected = np.stack(numbered(125, height=2, width=2))[positions][:, 0, 0].astype(int)
        assert np.abs(decoded.frames.mean(axis=(1, 2)) - expected).max() < 12, video.path


@pytest.mark.slow
@pytest.mark.parametrize("positions", [[13], [0, 13]])
def test_damage_in_mpeg4_is_detected_as_in_a_full_decode(tmp_path, positions):
    """FFmpeg notices that a frame ends too early once it has seen some that do not."""
    whole = write_video(tmp_path / "whole.mov", textured(18, height=48, width=64), codec="mpeg4", options={"g": "12"})
    rng, silent, faults = np.random.default_rng(0), 0, 0
    for _ in range(40):
        place, bit = rng.random(), 1 << int(rng.integers(8))

        def damaged(number: int, data: bytes, place=place, bit=bit) -> bytes:
            at = 20 + int(place * (len(data) - 20))
            return data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :] if number == 13 else data

        path = edit_packets(whole, tmp_path / "damaged.mov", damaged)
        try:
            found = decode_frames(path, np.array(positions), size=(48, 64)).frames[-1]
            silent += (found != decode_all(path)[13]).any()
        except InputError:
            faults += 1
    assert not silent and faults > 5
