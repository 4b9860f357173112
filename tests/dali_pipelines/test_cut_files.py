"""Files cut without encoding: what is counted is what is numbered, and bit-equal to a full decode on every way."""

import numpy as np
import pytest

from dali_pipelines import ClipLoader, InputError, Manifest
from dali_pipelines.host_decoder import decode_frames
from dali_pipelines.manifest import coded_size
from dali_pipelines.packets import PacketReader
from dali_pipelines.probe import probe
from preparation.index import probe_file
from tests.bad_files import copy_packets
from tests.videos import cut_packets, decode_all, set_edits, textured, write_video

FRAMES = textured(60, height=64, width=80)
OPEN = "keyint=12:min-keyint=12:bframes=3:b-adapt=0:open-gop=1:b-pyramid=normal:scenecut=0"
BEGINS_WITHIN = "the file does not begin with a frame that can be decoded alone"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Encodes a file of 60 frames, once for each set of options: (codec, options) -> path."""
    folder, made = tmp_path_factory.mktemp("whole"), {}

    def get(codec: str = "h264", params: str = OPEN, **options: str) -> str:
        key = codec, params, *options.items()
        if key not in made:
            settings = {"h264": {"x264-params": params}, "hevc": {"x265-params": f"log-level=none:{params}"}}
            path = folder / f"{len(made)}.{'mkv' if codec in ('vp8', 'vp9') else 'mp4'}"
            made[key] = write_video(path, FRAMES, codec=codec, options=settings.get(codec, {}) | options)
        return made[key]

    return get


def check(path: str, fallbacks: set[str], engine: str = "host") -> np.ndarray:
    """Every frame, one by one and in a clip; returns those of a full decode."""
    expected = decode_all(path)
    video = probe_file(path, True).video  # as prepare.py --verify decode
    assert video == probe(path) and video.frames == len(expected)
    found = [decode_frames(path, np.array([n]), size=coded_size(video)) for n in range(video.frames)]
    assert all((each.frames[0] == frame).all() for each, frame in zip(found, expected, strict=True))
    assert {each.fallback for each in found} == fallbacks
    settings = dict(mode="validate", batch_size=1, num_frames=8, crop_size=32, stride=None, workers=0)
    by_host, by_nvdec = (ClipLoader(Manifest([video]), **settings, decode=decode) for decode in ("host", "nvdec"))
    one, other = next(iter(by_host)), next(iter(by_nvdec))
    assert one.valid.all() and other.valid.all() and other.engines == (engine,)
    assert (one.clips - other.clips).abs().max() < 1e-5
    return expected


@pytest.mark.slow
@pytest.mark.parametrize(
    "params, start",
    [
        (OPEN, 9),
        (OPEN, 21),
        (OPEN, 5),  # within a group: a decoder puts nothing out before the next I-frame
        (OPEN + ":tff=1", 21),
        (OPEN.replace("normal", "strict") + ":bluray-compat=1:slices=4", 21),
        (OPEN.replace("normal", "strict") + ":bluray-compat=1:tff=1", 9),
        ("keyint=12:intra-refresh=1:bframes=0", 14),
    ],
)
@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_h264_cut_into_an_open_group(tmp_path, whole, params, start, suffix):
    path = cut_packets(whole(params=params), tmp_path / f"cut.{suffix}", start)
    expected = check(path, {BEGINS_WITHIN})
    original = decode_all(whole(params=params))
    assert 33 <= len(expected) <= 60 - start and (expected == original[-len(expected) :]).all()


@pytest.mark.slow
@pytest.mark.parametrize("hidden", [1, 6])
def test_h264_with_an_edit_list_starting_in_an_open_group(tmp_path, whole, hidden):
    """As `ffmpeg -ss 0.6 -i whole.mp4 -c copy cut.mp4` writes it."""
    path = cut_packets(whole(), tmp_path / "cut.mp4", 21, hidden=hidden)
    expected = check(path, {BEGINS_WITHIN})
    assert (expected == decode_all(whole())[-len(expected) :]).all()


@pytest.mark.slow
def test_a_capture_may_start_anywhere(tmp_path, whole):
    params = OPEN + ":repeat-headers=1"
    data = open(write_video(tmp_path / "whole.ts", FRAMES, options={"x264-params": params}), "rb").read()
    (tmp_path / "cut.ts").write_bytes(data[len(data) // 188 // 3 * 188 :])
    assert len(check(str(tmp_path / "cut.ts"), {BEGINS_WITHIN})) > 20


@pytest.mark.parametrize("start, lost", [(0, 17), (21, 16)])
def test_a_frame_missing_later_is_a_fault_for_every_engine(tmp_path, whole, start, lost):
    """Leading frames of the cut are no damage, what is lost later is."""
    path = cut_packets(whole(), tmp_path / "cut.mp4", start)
    video = probe(copy_packets(path, tmp_path / "lost.mkv", lost=lost))
    with pytest.raises(InputError, match="invalid data found"):
        decode_frames(video.path, np.array([video.frames - 1]), size=coded_size(video))
    with pytest.raises(InputError, match="invalid data found"):
        probe_file(video.path, True)


REPEATS, LEAVES_OUT = "an edit list repeats frames", "an edit list leaves out frames that others refer to"


@pytest.mark.slow
@pytest.mark.parametrize(
    "codec, pieces, count, fallbacks",
    [
        ("h264", [(800, 2560)], 20, {""}),
        ("h264", [(200, 1024), (600, 20000)], 20, {LEAVES_OUT}),
        ("h264", [(600, 1024), (600, 15360)], 30, {REPEATS}),
        ("h264", [(400, 5120), (400, 5120)], 20, {REPEATS}),
        ("h264", [(600, 15360), (600, 2560)], 30, {REPEATS}),
        ("hevc", [(800, 2560)], 20, {""}),
        ("hevc", [(120, 512), (200, 14336), (400, 9216)], None, {REPEATS}),
        ("hevc", [(600, 5120), (600, 7680)], None, {REPEATS}),
        ("mpeg4", [(600, 5120), (600, 7680)], 30, {"", REPEATS}),
    ],
)
def test_edit_lists_of_several_pieces(tmp_path, whole, codec, pieces, count, fallbacks):
    """A decoder throws away what it takes for doubled: 11 of 17 frames came out of one such file."""
    options = {"bf": "2", "g": "12"} if codec == "mpeg4" else {}
    path = set_edits(whole(codec, **options), tmp_path / "edited.mp4", pieces)
    expected = check(path, fallbacks, "nvdec" if fallbacks == {""} else "host")
    assert count in (None, len(expected))


def test_a_file_with_frames_that_contradict_its_headers_is_refused(tmp_path, whole, monkeypatch):
    """Nothing is known that does so: the selection here is made wrong."""
    shown = PacketReader.shown
    monkeypatch.setattr(PacketReader, "shown", lambda reader: shown(reader)[::-1])
    with pytest.raises(InputError, match="a decoder outputs other frames than its headers say"):
        probe(whole("hevc"))


@pytest.mark.slow
@pytest.mark.parametrize("start", [3, 7, 20])
@pytest.mark.parametrize("hidden_frames", ["0", "1"])
@pytest.mark.parametrize("codec, suffix", [("vp8", "webm"), ("vp8", "ivf"), ("vp9", "webm"), ("vp9", "mp4")])
def test_vp8_and_vp9_starting_within_a_group(tmp_path, whole, codec, suffix, hidden_frames, start):
    """A decoder outputs everything from the first key frame, and only the needed packets are fed."""
    options = {"g": "15", "auto-alt-ref": hidden_frames, "lag-in-frames": "16", "deadline": "good"}
    path = cut_packets(whole(codec, "", **options), tmp_path / f"cut.{suffix}", start)
    whole_frames = decode_all(whole(codec, "", **options))
    expected = check(path, {""}, "nvdec")
    assert len(expected) == (30 if start == 20 else 45) and (expected == whole_frames[-len(expected) :]).all()


def test_a_file_without_any_key_frame_is_refused(tmp_path, whole):
    path = cut_packets(whole("vp8", "", g="100"), tmp_path / "cut.webm", 5)
    with pytest.raises(InputError, match="not a video that FFmpeg can read .invalid data"):
        probe(path)
