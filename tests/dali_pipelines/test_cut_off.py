"""Files whose end is missing: decoders of many codecs make up the rest of the last frame, and do not say so."""

from pathlib import Path

import av
import numpy as np
import pytest

from dali_pipelines import ClipLoader, InputError, Manifest
from dali_pipelines.host_decoder import decode_all, decode_frames
from dali_pipelines.manifest import coded_size
from dali_pipelines.probe import probe

FRAMES = 6
SIZES = {"dnxhd": (720, 1280), "dvvideo": (576, 720)}
FORMATS = {"mjpeg": "yuvj420p", "ljpeg": "yuvj420p", "jpegls": "rgb24", "png": "rgb24", "prores_ks": "yuv422p10le",
           "huffyuv": "yuv422p", "dnxhd": "yuv422p", "gif": "rgb8"}  # fmt: skip


def write(path: Path, codec: str) -> None:
    """Noise, so that every byte of a packet counts."""
    rng = np.random.default_rng(0)
    height, width = SIZES.get(codec, (96, 128))
    with av.open(path, "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width, stream.pix_fmt = height, width, FORMATS.get(codec, "yuv420p")
        stream.bit_rate = 110_000_000
        stream.codec_context.thread_count = 1
        for number in range(FRAMES):
            pixels = rng.integers(0, 256, (height // 4, width // 4, 3), np.uint8).repeat(4, 0).repeat(4, 1)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format=stream.pix_fmt)
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def cut(whole: Path, path: Path) -> None:
    """In the middle of the last packet: a camera that lost its power, a download that stopped."""
    with av.open(whole) as container:
        last = [packet for packet in container.demux(video=0) if packet.size][-1]
        end = last.pos + last.size // 2
    path.write_bytes(whole.read_bytes()[:end])


def copy(whole: Path, path: Path) -> None:
    """By a program that puts what is left of the last packet into a whole file."""
    with av.open(whole) as container, av.open(path, "w") as out:
        stream = out.add_stream_from_template(container.streams.video[0])
        packets = [packet for packet in container.demux(video=0) if packet.size]
        for packet in packets:
            if packet is packets[-1]:
                rest = av.Packet(bytes(packet)[: packet.size // 2])
                rest.pts, rest.dts, rest.time_base = packet.pts, packet.dts, packet.time_base
                rest.duration, rest.is_keyframe = packet.duration, packet.is_keyframe
                packet = rest
            packet.stream = stream
            out.mux(packet)


def zero(whole: Path, path: Path) -> None:
    """Space that was reserved and never written."""
    with av.open(whole) as container:
        last = [packet for packet in container.demux(video=0) if packet.size][-1]
    data = bytearray(whole.read_bytes())
    data[last.pos + last.size // 2 : last.pos + last.size] = bytes(last.size - last.size // 2)
    path.write_bytes(data)


CASES = [
    *[("mjpeg", suffix, damage) for suffix in ("avi", "mkv", "mov") for damage in (cut, copy, zero)
      if (suffix, damage) != ("mov", cut)],
    *[(codec, "avi", cut) for codec in ("huffyuv", "ffvhuff", "ljpeg", "jpegls", "png", "ffv1", "utvideo",
                                        "dvvideo", "mpeg4", "rawvideo")],
    ("dvvideo", "dv", cut), ("gif", "gif", cut),
    *[(codec, "avi", copy) for codec in ("ljpeg", "jpegls", "png", "ffv1")],
    *[(codec, "mov", damage) for codec in ("prores_ks", "dnxhd", "png") for damage in (copy, zero)],
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("codec, suffix, damage", CASES, ids=[f"{c}-{s}-{d.__name__}" for c, s, d in CASES])
def test_a_truncated_frame_is_not_counted(tmp_path, codec, suffix, damage):
    whole, path = tmp_path / f"whole.{suffix}", tmp_path / f"damaged.{suffix}"
    write(whole, codec)
    damage(whole, path)
    before, video = probe(whole), probe(path)
    assert (before.frames, video.frames) == (FRAMES, FRAMES - 1)
    size = coded_size(video)
    expected = decode_frames(whole, np.arange(FRAMES), size=size).frames
    for positions in ([FRAMES - 2], [0, FRAMES - 2], range(FRAMES - 1)):
        found = decode_frames(path, np.array(positions), size=size).frames
        assert (found == expected[list(positions)]).all()
    assert len(list(decode_all(path, frames=video.frames, size=size))) == FRAMES - 1  # --verify decode
    # Indexed before the damage: a fault, whichever other frames the clip has.
    for positions in ([FRAMES - 1], [0, FRAMES - 1], range(FRAMES)):
        with pytest.raises(InputError):
            decode_frames(path, np.array(positions), size=size)
    with pytest.raises(InputError):
        list(decode_all(path, frames=FRAMES, size=size))


def test_damage_within_mjpeg_is_always_a_fault(tmp_path):
    write(tmp_path / "whole.avi", "mjpeg")
    with av.open(tmp_path / "whole.avi") as container:
        third = [packet for packet in container.demux(video=0) if packet.size][2]
    data = bytearray((tmp_path / "whole.avi").read_bytes())
    data[third.pos + third.size // 2 : third.pos + third.size] = bytes(third.size - third.size // 2)
    path = tmp_path / "damaged.avi"
    path.write_bytes(data)
    video = probe(path)
    assert video.frames == FRAMES  # those after it are good
    size = coded_size(video)
    assert decode_frames(path, np.array([1, 3, 5]), size=size).frames.shape[0] == 3
    for positions in ([2], [1, 2], [2, 3]):
        with pytest.raises(InputError):
            decode_frames(path, np.array(positions), size=size)
    with pytest.raises(InputError):
        list(decode_all(path, frames=video.frames, size=size))


@pytest.mark.parametrize("decode", ["host", "dali"])
def test_the_loader_counts_the_same_frames_as_the_index(tmp_path, decode):
    write(tmp_path / "whole.avi", "mjpeg")
    cut(tmp_path / "whole.avi", tmp_path / "cut.avi")
    before, after = probe(tmp_path / "whole.avi"), probe(tmp_path / "cut.avi")
    rows = [after, before, before._replace(path=after.path)]
    settings = dict(mode="validate", batch_size=3, num_frames=FRAMES, crop_size=32, stride=None, workers=0)
    made = ClipLoader(Manifest(rows), decode=decode, **settings)
    (batch,) = made
    assert batch.valid.tolist() == [True, True, False]
    assert set(made.stats.engines) == {decode}
    planned = np.linspace(0, FRAMES - 2, FRAMES).astype(int)
    assert (batch.clips[0] - batch.clips[1][:, planned]).abs().max() < 1e-6
