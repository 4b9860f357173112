"""What a decoder puts out for a video file, and the entry of the video for the packet index."""

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
from dali_pipelines.host_decoder import MAX_PIXELS, decode_packets, prepare
from dali_pipelines.manifest import Video
from dali_pipelines.packet_index import Recorder, Stream, no_entry
from dali_pipelines.packets import PacketReader, VideoPacket, demux, video_stream


def probe(video: VideoLike, max_pixels: int = MAX_PIXELS, cache: str | None = None) -> Video:
    """What a decoder puts out for a file; label is 0.

    Frames are counted by their packets if that is exact, and by decoding otherwise (`Codec.is_frame_a_packet`).

    Raises `InputError` with a reason that a person understands if the file is not a video that can be read, or its
    frames have more than `max_pixels`. `cache`: see `files.fetch`.
    """
    return probe_packets(fetch(video, cache), max_pixels=max_pixels)[0]


def probe_packets(video: VideoLike, *, max_pixels: int = MAX_PIXELS) -> tuple[Video, bytes]:
    """`probe`, and the entry of the video for the packet index."""
    source = fetch(video)
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
            raise InputError("no frame comes out of its video stream")
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
    rotation, mirrored = _orientation(first)
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


class _Structure(NamedTuple):
    """What the packets of a file say."""

    shown: list[int]
    """The number of the packet of each frame; [] if the headers do not tell."""
    gop: int
    """Frames of the longest group; 0 if the headers do not tell."""
    times: list[tuple[int | None, int | None]]
    """(pts, dts) of the packets of frames, in the order of the file."""
    first: av.VideoFrame | None
    """The first frame, if it has been decoded."""
    entry: bytes
    """For the packet index."""


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
    """A file that is cut off, and was closed or padded by some program since, is good up to there: frames at its end
    that cannot be decoded are not counted. Each packet must be a frame of its own."""
    while shown and (packet := reader.packets[shown[-1]]) is not None:
        try:
            packet.decode()
            break
        except av.error.FFmpegError:
            shown = shown[:-1]
    return shown


def _gaps(times: Sequence[tuple[int | None, int | None]]) -> np.ndarray:
    """Ticks from each frame to the next, float64; by pts, or by dts if pts are missing; empty if both are."""
    table = np.array(times, np.float64).reshape(-1, 2)  # None becomes NaN
    # Recordings that were joined: times begin anew.
    parts = np.split(table, np.flatnonzero(np.diff(table[:, 1]) < 0) + 1)
    for column in (0, 1):
        if np.isfinite(table[:, column]).sum() > _MOST_TIMES * len(table):
            return np.concatenate([np.diff(np.sort(part[np.isfinite(part[:, column]), column])) for part in parts])
    return np.empty(0)


_MOST_TIMES = 0.75
"""Times are of use if this share of frames has them."""


def frame_rate(gaps: np.ndarray, tick: Fraction, header_rate: Fraction | None) -> float | None:
    """Frames a second that most of a video has by the times of its frames; None if these say nothing.

    gaps: ticks of `tick` seconds from each frame to the next. `header_rate` is taken as it is if it agrees.

    The mean of the gaps that are near the median: long pauses and dropped frames do not count, and jitter and rounded
    times (33, 33, 34 ms) even out. If few are near it, as when frames come in pairs, it is the mean
    over stretches of frames.
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
"""Frames: a multiple of 2, 3 and 4, in which they may come."""


def _is_variable(gaps: np.ndarray) -> int:
    """Whether a frame is shown for a time that is more than a tenth, and more than the rounding of a clock, off."""
    return int(len(gaps) > 0 and (np.abs(gaps - np.median(gaps)) > np.maximum(np.median(gaps) / 10, 1)).any())


_MOST_TILT = 10
"""Degrees that a display matrix may be off a quarter turn. Players show such a frame upright."""


def _orientation(frame: av.VideoFrame) -> tuple[int, int]:
    """`Video.rotation` and `Video.mirrored` by the display matrix of a frame. Raises `InputError` for other angles."""
    try:
        matrix = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # PyAV does not know some other data beside it, such as Exif
        if frame.rotation:
            raise InputError("turned or mirrored, beside other data that hides how; encode it anew") from None
        return 0, 0
    if not isinstance(matrix, SideData):
        return 0, 0
    # Column x of a coded frame goes to (x * a, x * b) of the shown one, row y to (y * c, y * d).
    a, b, _, c, d, *_ = map(int, np.frombuffer(bytes(matrix), np.int32))
    if a * d == b * c:  # nothing that could be shown: all zeros, by muxers that forgot it
        return 0, 0
    mirrored = a * d < b * c
    if mirrored:
        a, b = -a, -b
    angle = -math.degrees(math.atan2(b, a)) % 360
    rotation = 90 * round(angle / 90)
    if abs(angle - rotation) > _MOST_TILT:
        raise InputError(f"turned by {angle:.0f} degrees; only quarter turns are known")
    return rotation % 360, int(mirrored)


def _count_frames(container: av.container.InputContainer, shown: list[int], *, until_damage: bool) -> int:
    """Frames that come out of a decoder, up to the last one that is whole: a file that is cut off is good up to there.

    Raises `InputError` if they are not those of `shown` (unless empty): then nothing could be decoded but all of the
    video. Raises FFmpeg's errors if other packets follow, unless `until_damage`.
    """
    video_stream(container).codec_context.copy_opaque = True
    packets = _numbered(demux(container))
    count = 0
    try:
        for number, frame in enumerate(decode_packets(packets), start=1):
            if shown and frame.opaque != shown[number - 1 : number]:
                raise InputError(
                    "a decoder puts out other frames than its headers say: packets may be missing; encode it anew"
                )
            if not frame.is_corrupt:
                count = number
    except av.error.FFmpegError:
        is_at_end = not any(packet.size for packet in packets)
        if not (count and (until_damage or is_at_end)):
            raise
    return count


def _numbered(packets: Iterable[VideoPacket]) -> Iterator[VideoPacket]:
    """With the number of each that has data as its `opaque`, in a list: it is compared with a slice."""
    number = 0
    for packet in packets:
        packet.opaque = [number]
        number += bool(packet.size)
        yield packet
