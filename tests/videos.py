"""Small videos for tests, made with PyAV."""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.bitstream import BitStreamFilterContext

ENCODERS = {
    "h264": ("libx264", {"preset": "veryfast", "x264-params": "bframes=3:keyint=250:scenecut=0"}),
    "hevc": ("libx265", {"preset": "ultrafast", "x265-params": "log-level=none:bframes=2"}),
    "mpeg4": ("mpeg4", {"qscale": "2"}),
    "vp9": ("libvpx-vp9", {"deadline": "realtime", "cpu-used": "8", "crf": "10", "b": "0"}),
    "vp8": ("libvpx", {"deadline": "realtime", "cpu-used": "8", "crf": "10", "b": "2000000"}),
    "mjpeg": ("mjpeg", {"qscale": "2"}),
    "av1": ("libsvtav1", {"preset": "12", "crf": "20"}),
    "mpeg2video": ("mpeg2video", {"qscale": "2", "bf": "2"}),
}
_LEVELS = np.array([16, 66, 116, 166, 216])  # five a channel: far enough apart to survive any codec


def write_video(
    path: str | Path,
    rgb_frames: Iterable[np.ndarray],
    *,
    codec: str = "h264",
    fps: Fraction | int = 25,
    rotation: int = 0,
    times: Sequence[int] | None = None,
    options: dict[str, str] | None = None,
    pix_fmt: str | None = None,
    matrix: int | None = None,
    full_range: bool = False,
) -> str:
    """Encodes uint8 [H, W, 3] frames; `rotation` only tags the file; `times` are presentation times in 1/fps.

    `matrix`: of the colours, as a number of H.273 (1 BT.709, 6 BT.601); frames are converted to it, or to BT.601 for
    others, and the stream says so.
    """
    rgb_frames = list(rgb_frames)
    encoder, defaults = ENCODERS.get(codec, (codec, {}))
    options = defaults | (options or {})
    if codec == "h264":  # with it, x264's assembly gives other bytes from run to run for frames as small as these
        options["x264-params"] += ":mbtree=0"
    with _usual_priority(), av.open(str(path), "w") as container:
        stream = container.add_stream(encoder, rate=fps, options=options)
        stream.height, stream.width = rgb_frames[0].shape[:2]
        stream.pix_fmt = pix_fmt or ("yuvj420p" if codec == "mjpeg" else "yuv420p")
        stream.codec_context.time_base = Fraction(1, 1) / fps
        stream.codec_context.thread_count = 1
        if rotation:
            stream.set_display_rotation(rotation)
        if matrix is not None:
            stream.codec_context.colorspace = matrix
        if full_range:
            stream.codec_context.color_range = 2
        for number, rgb_frame in enumerate(rgb_frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb_frame), format="rgb24")
            if matrix is not None or full_range:
                frame = frame.reformat(
                    format=stream.pix_fmt,
                    dst_colorspace="itu709" if matrix == 1 else "itu601",
                    dst_color_range="JPEG" if full_range else "MPEG",
                )
                frame.colorspace, frame.color_range = matrix or 2, 2 if full_range else 1
            frame.pts = number if times is None else times[number]
            frame.time_base = Fraction(1, 1) / fps
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return str(path)


@contextlib.contextmanager
def _usual_priority() -> Iterator[None]:
    """SVT-AV1 makes whoever calls it a real-time process where it may, as for root; what is started later would be one
    too, and two that wait for each other can then stop the machine."""
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, parameters)


def edit_packets(source: str | Path, path: str | Path, edit: Callable[[int, bytes], bytes]) -> str:
    """Copies a video with the bytes of its packets changed by `edit(number, data)`."""
    with av.open(str(source)) as original, av.open(str(path), "w") as container:
        stream = container.add_stream_from_template(original.streams.video[0])
        for number, packet in enumerate(original.demux(video=0)):
            if packet.size:
                edited = av.Packet(edit(number, bytes(packet)))
                edited.pts, edited.dts, edited.time_base = packet.pts, packet.dts, packet.time_base
                edited.is_keyframe, edited.stream = packet.is_keyframe, stream
                container.mux(edited)
    return str(path)


def join_packets(first: str | Path, second: str | Path, path: str | Path) -> str:
    """One stream of the packets of two, one after the other; its header is that of the first."""
    with av.open(str(path), "w") as container:
        stream, start = None, 0
        for source in (first, second):
            with av.open(str(source)) as original:
                stream = stream or container.add_stream_from_template(original.streams.video[0])
                packets = [packet for packet in original.demux(video=0) if packet.size]
                for number, packet in enumerate(packets):
                    packet.pts = packet.dts = (start + number) * 40
                    packet.time_base, packet.stream = Fraction(1, 1000), stream
                    container.mux(packet)
                start += len(packets)
    return str(path)


def filter_packets(source: str | Path, path: str | Path, bitstream_filter: str) -> str:
    """Copies a video through a bitstream filter of FFmpeg, as "h264_metadata=crop_left=16"."""
    with av.open(str(source)) as original, av.open(str(path), "w") as container:
        stream = container.add_stream_from_template(original.streams.video[0])
        context = BitStreamFilterContext(bitstream_filter, original.streams.video[0], stream)
        for packet in original.demux(video=0):
            for filtered in context.filter(packet if packet.size else None):
                filtered.stream = stream
                container.mux(filtered)
    return str(path)


def find_box(data: bytes, *names: bytes) -> list[tuple[int, int]]:
    """(start, size) of each box on the path `names` from the top of an MP4 file."""
    found, place, end = [], 0, len(data)
    for name in names:
        while data[place + 4 : place + 8] != name:
            place += int.from_bytes(data[place : place + 4])
            assert place < end, f"no box {name}"
        found.append((place, int.from_bytes(data[place : place + 4])))
        place, end = place + 8, place + found[-1][1]
    return found


def set_matrix(path: str | Path, matrix: Sequence[float]) -> str:
    """Gives an MP4's first track the display matrix a, b, c, d: column x and row y go to (a x + c y, b x + d y)."""
    data = bytearray(Path(path).read_bytes())
    *_, (start, _) = find_box(data, b"moov", b"trak", b"tkhd")
    a, b, c, d = (round(value * 65536) for value in matrix)
    fields = np.array([a, b, 0, c, d, 0, 0, 0, 1 << 30 if any(matrix) else 0], ">i4")
    data[start + 48 : start + 48 + fields.nbytes] = fields.tobytes()
    Path(path).write_bytes(data)
    return str(path)


def set_edits(source: str | Path, path: str | Path, pieces: Sequence[tuple[int, int]]) -> str:
    """Copies an MP4 file whose index is at its end, with an edit list of (duration in ms, start in ticks) for its
    first track."""
    data = bytearray(Path(source).read_bytes())
    *parents, (start, size) = find_box(data, b"moov", b"trak", b"edts")
    table = b"".join(np.array([*piece, 1 << 16], ">i4").tobytes() for piece in pieces)
    body = b"elst" + bytes(4) + len(pieces).to_bytes(4) + table
    edits = (12 + len(body)).to_bytes(4) + b"edts" + (4 + len(body)).to_bytes(4) + body
    for parent, parent_size in parents:
        data[parent : parent + 4] = (parent_size + len(edits) - size).to_bytes(4)
    data[start : start + size] = edits
    Path(path).write_bytes(data)
    return str(path)


def cut_packets(source: str | Path, path: str | Path, start: int, *, hidden: int = 0) -> str:
    """Copies the packets from number `start` on, as a cut without encoding does; `hidden` frames are before time 0."""
    with av.open(str(source)) as original, av.open(str(path), "w") as container:
        stream = container.add_stream_from_template(original.streams.video[0])
        packets = [packet for packet in original.demux(video=0) if packet.size][start:]
        origin = packets[0].pts + hidden * packets[0].duration
        for packet in packets:
            packet.pts, packet.stream = packet.pts - origin, stream
            packet.dts = None if packet.dts is None else packet.dts - origin
            container.mux(packet)
    return str(path)


def numbered(count: int, *, height: int, width: int) -> list[np.ndarray]:
    """Frames of one colour each, which encodes their number (below 125) in every part of the frame."""
    return [np.full((height, width, 3), _LEVELS[[n % 5, n // 5 % 5, n // 25]], np.uint8) for n in range(count)]


def read_numbers(clip: np.ndarray) -> list[int]:
    """The numbers shown by a clip [C, T, H, W] of `numbered` frames, values 0..1."""
    colours = clip.mean(axis=(2, 3)).T * 255  # [T, C]
    digits = np.abs(colours[:, :, None] - _LEVELS).argmin(axis=2)
    assert np.abs(colours - _LEVELS[digits]).max() < 20, "a colour between two levels: blended or wrong frames"
    return (digits @ [1, 5, 25]).tolist()


def textured(count: int, *, height: int, width: int, seed: int = 0) -> list[np.ndarray]:
    """A smooth random texture drifting over another: every frame and every part of it differs."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    waves = [(*rng.uniform(0.02, 0.25, 2), rng.uniform(0, 6.28), rng.uniform(0.7, 1.3, 3)) for _ in range(4)]
    rgb_frames = []
    for number in range(count):
        shift = 0.35 * number
        light = [
            colour * np.sin(wy * y + wx * x + phase + shift * (k - 1.5))[..., None]
            for k, (wy, wx, phase, colour) in enumerate(waves)
        ]
        rgb_frames.append(np.clip(127 + 28 * sum(light), 0, 255).astype(np.uint8))
    return rgb_frames


def decode_all(path: str | Path) -> np.ndarray:
    """Every frame that PyAV decodes, skipping errors as FFmpeg does: uint8 [N, H, W, 3], not rotated."""
    frames = []
    with av.open(str(path), metadata_errors="replace") as container:
        for packet in container.demux(container.streams.best("video")):
            with contextlib.suppress(av.error.InvalidDataError):
                frames += [frame.to_ndarray(format="rgb24") for frame in packet.decode()]
    return np.stack(frames)
