"""Finds out what a decoder outputs for a video file, and builds the video's entry for the packet index."""

import math
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple

import av
import numpy as np
from av.sidedata.sidedata import SideData

from dali_pipelines.bitstream.codecs import CODECS
from dali_pipelines.bitstream.parser import UncertainError
from dali_pipelines.errors import InputError, reason
from dali_pipelines.files import Source, VideoLike, as_source, fetch, open_video
from dali_pipelines.frame_names import frame_files, is_frames
from dali_pipelines.host_decoder import (
    MAX_PIXELS,
    check_pixels,
    decode_batch,
    decode_packets,
    prepare,
    read_image,
    read_images,
)
from dali_pipelines.manifest import Video
from dali_pipelines.packet_index import Recorder, Stream, no_entry
from dali_pipelines.packets import PacketReader, VideoPacket, demux, video_stream


def probe(video: VideoLike, max_pixels: int = MAX_PIXELS, cache: str | None = None) -> Video:
    """Describes what a decoder outputs for a file; the label is 0.

    Counts frames by packets if that is exact (`Codec.is_frame_a_packet`), otherwise by decoding.

    Raises `InputError` with a readable reason if the file is not a readable video, or its frames have more than
    `max_pixels`. `cache`: see `files.fetch`.
    """
    return probe_packets(fetch(video, cache), max_pixels=max_pixels)[0]


def probe_packets(video: VideoLike, *, max_pixels: int = MAX_PIXELS) -> tuple[Video, bytes]:
    """The result of `probe`, and the video's entry for the packet index."""
    source = fetch(video)
    if is_frames(source.path):
        return _probe_frames(source, max_pixels), no_entry("its frames are images in files of their own")
    try:
        with open_video(source) as container:
            stream = video_stream(container)
            codec = stream.codec_context.codec.canonical_name
            average_rate, guessed_rate, tick = stream.average_rate, stream.guessed_rate, stream.time_base
            is_frame_a_packet = codec in CODECS and CODECS[codec].is_frame_a_packet
            structure = _read_structure(container, source, max_pixels)
        first = structure.first
        if first is None:
            with open_video(source) as container:
                prepare(container, max_pixels=max_pixels)
                first = next(decode_packets(demux(container)), None)
        if first is None:
            raise InputError("its video stream decodes to no frames")
        frames = len(structure.shown)
        if not frames or not is_frame_a_packet:
            with open_video(source) as container:
                prepare(container, max_pixels=max_pixels)
                frames = _count_frames(container, structure.shown, until_damage=is_frame_a_packet)
    except av.error.FFmpegError as error:
        raise InputError(f"not a video that FFmpeg can read ({reason(error)})") from None
    if not frames:
        raise InputError("all frames of its video stream are damaged")
    gaps = _gaps(structure.times)
    fps = (tick and frame_rate(gaps, tick, average_rate)) or guessed_rate or average_rate
    if not fps:
        raise InputError("no frame rate in it")
    rotation, mirrored = orientation(first)
    width, height = (first.width, first.height) if rotation in (0, 180) else (first.height, first.width)
    found = Video(
        path=as_source(video).path,
        label=0,
        frames=frames,
        fps=float(fps),
        width=width,
        height=height,
        codec=codec,
        rotation=rotation,
        pixel_format=first.format.name,
        vfr=_is_variable(gaps),
        gop=int(structure.gop) or frames,
        mirrored=mirrored,
    )
    return found, structure.entry


FRAMES_FPS = 30.0
"""The frame rate of frames in files, which have none: that of most videos."""


def _probe_frames(source: Source, max_pixels: int) -> Video:
    """Decodes the first frame and reads the last; the others are checked when they are decoded."""
    files = frame_files(source.path)
    first = read_image(files, 0)
    check_pixels(first.size, max_pixels)
    read_images(source, np.array([len(files) - 1]), size=first.size)
    (image,) = decode_batch([first.data], [first.name], size=None)
    height, width = image.shape[:2]
    return Video(source.path, 0, len(files), FRAMES_FPS, width, height, files.codec, rotation=0, gop=1)


class _Structure(NamedTuple):
    """What the packets of a file tell about it."""

    shown: list[int]
    """The packet number of each frame; [] if the headers do not say."""
    gop: int
    """Frames of the longest group; 0 if the headers do not say."""
    times: list[tuple[int | None, int | None]]
    """(pts, dts) of the packets of frames, in file order."""
    first: av.VideoFrame | None
    """The first frame, if it has been decoded."""
    entry: bytes
    """The entry for the packet index."""


def _read_structure(container: av.container.InputContainer, source: Source, max_pixels: int) -> _Structure:
    prepare(container, max_pixels=max_pixels)
    context = video_stream(container).codec_context
    stream, first = Stream.of(context), None
    try:
        with Recorder(source) as recorder:
            reader = PacketReader(container, recorder)
            shown = reader.shown()
            if reader.packets and reader.packets[0] is not None:
                held = (packet for packet in reader.packets if packet is not None)
                first = next(_decode(held, context), None)
            if context.codec.intra_only:
                context.flush_buffers()
                shown = _without_broken_end(reader, shown)
            entry = recorder.entry(reader, stream)
    except UncertainError as error:
        with open_video(source) as again:
            packets = demux(again)
            times = [(packet.pts, packet.dts) for packet in packets if packet.size and not packet.is_discard]
        return _Structure([], 0, times, None, no_entry(str(error)))
    before = np.cumsum([0] + [header.is_shown for header in reader.headers])
    starts = [number for number, header in enumerate(reader.headers) if header.starts_group]
    gop = max(np.diff(before[[*starts, len(reader.headers)]]), default=0)
    times = [time for time, header in zip(reader.times, reader.headers, strict=True) if header.is_shown]
    return _Structure(shown, gop, times, first, entry)


def _decode(packets: Iterable[VideoPacket], context: av.VideoCodecContext) -> Iterator[av.VideoFrame]:
    """All frames of the packets."""
    yield from decode_packets(packets)
    yield from context.decode(None)


def _without_broken_end(reader: PacketReader, shown: list[int]) -> list[int]:
    """`shown` without the frames at the end that cannot be decoded: a file that was cut off, then closed or padded by
    some program, is good up to there. Each packet must be one frame."""
    while shown and (packet := reader.packets[shown[-1]]) is not None:
        try:
            packet.decode()
            break
        except av.error.FFmpegError:
            shown = shown[:-1]
    return shown


def _gaps(times: Sequence[tuple[int | None, int | None]]) -> np.ndarray:
    """Ticks from each frame to the next, float64, from pts, or dts if pts are missing; empty if both are."""
    table = np.array(times, np.float64).reshape(-1, 2)  # None becomes NaN
    # Times start over in joined recordings.
    parts = np.split(table, np.flatnonzero(np.diff(table[:, 1]) < 0) + 1)
    for column in (0, 1):
        if np.isfinite(table[:, column]).sum() > _MOST_TIMES * len(table):
            return np.concatenate([np.diff(np.sort(part[np.isfinite(part[:, column]), column])) for part in parts])
    return np.empty(0)


_MOST_TIMES = 0.75
"""Times are used if this share of frames has them."""


def frame_rate(gaps: np.ndarray, tick: Fraction, header_rate: Fraction | None) -> float | None:
    """Frames per second for most of a video, from the times of its frames; None if these are no help.

    gaps: ticks of `tick` seconds from each frame to the next. `header_rate` is returned unchanged if it agrees.

    Computed from the mean of the gaps near the median: long pauses and dropped frames do not count, and jitter and
    rounded times (33, 33, 34 ms) even out. If few gaps are near it, as when frames come in pairs, from the mean over
    stretches of frames.
    """
    if not len(gaps) or not gaps.sum():
        return None
    for stretch in (1, min(_STRETCH, len(gaps))):
        sums = np.sort(np.convolve(gaps, np.ones(stretch), "valid"))
        near = sums[np.abs(sums - sums[len(sums) // 2]) <= sums[len(sums) // 2] / 2]
        gap = float(near.mean()) / stretch
        if len(near) > len(sums) * 2 / 3:
            break
    if not gap:
        return None
    if header_rate and abs(gap - 1 / float(header_rate * tick)) <= gap / 100 + 1 / len(gaps):
        return float(header_rate)
    rate = 1 / (gap * float(tick))
    whole = round(rate)
    if abs(rate - whole / 1.001) < rate / 10_000:
        return whole / 1.001
    return float(whole) if abs(rate - whole) < rate / 200 else rate


_STRETCH = 12
"""Frames per stretch: a multiple of 2, 3 and 4, as frames may come in such groups."""


def _is_variable(gaps: np.ndarray) -> int:
    """1 if a frame's duration is off by more than a tenth, and by more than clock rounding; otherwise 0."""
    return int(len(gaps) > 0 and (np.abs(gaps - np.median(gaps)) > np.maximum(np.median(gaps) / 10, 1)).any())


_MOST_TILT = 10
"""Degrees by which a display matrix may miss a quarter turn. Players show such a frame upright."""


def orientation(frame: av.VideoFrame) -> tuple[int, int]:
    """`Video.rotation` and `Video.mirrored` from a frame's display matrix. Raises `InputError` for other angles."""
    try:
        matrix = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # PyAV does not know some other side data, such as Exif
        if frame.rotation:
            raise InputError("rotated or mirrored, but other side data hides how; re-encode it") from None
        return 0, 0
    if not isinstance(matrix, SideData):
        return 0, 0
    # Column x of a coded frame goes to (x * a, x * b) of the shown one, row y to (y * c, y * d).
    a, b, _, c, d, *_ = map(int, np.frombuffer(bytes(matrix), np.int32))
    if a * d == b * c:  # degenerate: all zeros, from muxers that do not set it
        return 0, 0
    mirrored = a * d < b * c
    if mirrored:
        a, b = -a, -b
    angle = -math.degrees(math.atan2(b, a)) % 360
    rotation = 90 * round(angle / 90)
    if abs(angle - rotation) > _MOST_TILT:
        raise InputError(f"rotated by {angle:.0f} degrees; only quarter turns are supported")
    return rotation % 360, int(mirrored)


def _count_frames(container: av.container.InputContainer, shown: list[int], *, until_damage: bool) -> int:
    """Number of frames that a decoder outputs, up to the last undamaged one: a truncated file is good up to there.

    Raises `InputError` if they differ from `shown` (unless that is empty): then only the whole video could be decoded.
    Raises FFmpeg's errors if other packets follow, unless `until_damage`.
    """
    video_stream(container).codec_context.copy_opaque = True
    packets = _numbered(demux(container))
    count = 0
    try:
        for number, frame in enumerate(decode_packets(packets), start=1):
            if shown and frame.opaque != shown[number - 1 : number]:
                raise InputError(
                    "a decoder outputs other frames than its headers say: packets may be missing; re-encode it"
                )
            if not frame.is_corrupt:
                count = number
    except av.error.FFmpegError:
        is_at_end = not any(packet.size for packet in packets)
        if not (count and (until_damage or is_at_end)):
            raise
    return count


def _numbered(packets: Iterable[VideoPacket]) -> Iterator[VideoPacket]:
    """Sets the `opaque` of each packet with data to its number, in a list, as it is compared with a slice."""
    number = 0
    for packet in packets:
        packet.opaque = [number]
        number += bool(packet.size)
        yield packet
