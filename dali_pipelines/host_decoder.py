"""Decodes selected frames of a video with PyAV, from only the packets that they need.

It decodes what DALI has no decoder for on the device, and finds out what is wrong with a file: DALI's own decoder fails
on the whole batch.
"""

import contextlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple, Protocol

import av
import numpy as np

from dali_pipelines.bitstream.codecs import CODECS
from dali_pipelines.bitstream.parser import MissingFrameError, UncertainError
from dali_pipelines.errors import InputError, check, reason
from dali_pipelines.files import Source, VideoLike, as_source, fetch, is_url, open_video, read_bytes
from dali_pipelines.frame_names import FrameFiles, frame_files, is_frames
from dali_pipelines.images import batch_length, host_decoder, image_size
from dali_pipelines.packet_index import IndexedVideo
from dali_pipelines.packets import Flag, PacketReader, PacketSource, VideoPacket, demux, video_stream

MAX_PIXELS = 1 << 26
"""Pixels of a frame, twice those of 8K. A file of a few kilobytes can claim more, and a decoder may hold 17 frames."""


class Decoded(NamedTuple):
    """The frames of one video."""

    frames: np.ndarray
    """uint8 [N, H, W, 3] RGB, one per distinct position, as coded (not rotated), cut to the region; or the output of
    `reduce` for that."""
    packets_read: int
    packets_kept: int
    """Packets fed to the decoder."""
    fallback: str
    """Why everything up to the last frame was decoded; "" if only the needed packets were."""


Region = tuple[slice, slice]
"""Rows and columns."""
Reduce = Callable[[np.ndarray], np.ndarray]
_WHOLE = (slice(None), slice(None))


def decode_frames(
    video: VideoLike,
    positions: np.ndarray,
    *,
    size: tuple[int, int],
    region: Region = _WHOLE,
    reduce: Reduce | None = None,
) -> Decoded:
    """The frames at `positions` (ascending, distinct), counted as the decoder outputs them from the start.

    `size` is the (height, width) that the frames must have, `region` the rows and columns to return; `reduce` gets that
    part of each frame and returns its replacement, uint8 [h, w, 3]. Uses one thread: other processes decode other
    samples. Frames that are images in files of their own are decoded by DALI. Raises `InputError`.
    """
    source = fetch(video)
    if is_frames(source.path):
        return decode_images(source, positions, size=size, region=region, reduce=reduce)

    try:
        with open_video(source) as container:
            prepare(container, max_pixels=_limit(size))
            selected = _Selected(video_stream(container).codec_context, PacketReader(container), positions)
            return _collect(selected, positions, size, region, reduce)
    except UncertainError as error:
        fallback = str(error)
        # FFmpeg conceals missing frames, and reports them only in strict mode.
        is_strict = isinstance(error, MissingFrameError)
    with open_video(source) as container:
        prepare(container, is_strict=is_strict, max_pixels=_limit(size))
        everything = _Everything(container, positions)
        return _collect(everything, positions, size, region, reduce)._replace(fallback=fallback)


def decode_indexed(
    video: IndexedVideo,
    positions: np.ndarray,
    *,
    size: tuple[int, int],
    region: Region = _WHOLE,
    reduce: Reduce | None = None,
) -> Decoded:
    """`decode_frames` without a demuxer. Also raises `UncertainError`: `decode_frames` may still succeed."""
    context = video.stream.context()
    set_up(context, max_pixels=_limit(size))
    return _collect(_Selected(context, video, positions), positions, size, region, reduce)


def _limit(size: tuple[int, int]) -> int:
    """The most pixels that a frame may have if (height, width) `size` is expected; the decoder checks it again."""
    return max(MAX_PIXELS, size[0] * size[1])


class _Fed(Protocol):
    """Yields (position, frame) from the packets fed to a decoder, in output order."""

    @property
    def packets_read(self) -> int: ...

    @property
    def packets_kept(self) -> int: ...

    def __iter__(self) -> Iterator[tuple[int, av.VideoFrame]]: ...


def _collect(fed: _Fed, positions: np.ndarray, size: tuple[int, int], region: Region, reduce: Reduce | None) -> Decoded:
    """The frames at `positions` among those of `fed`."""
    wanted = {int(position): index for index, position in enumerate(positions)}
    found = 0
    frames = np.empty(0, np.uint8)
    for position, frame in _checked(fed):
        index = wanted.get(position)
        if index is not None:
            if difference := size_mismatch((frame.height, frame.width), size):
                raise InputError(difference)
            pixels = _rgb(frame)[region]
            pixels = reduce(pixels) if reduce else pixels
            if not found:
                frames = np.empty((len(positions), *pixels.shape), np.uint8)
            frames[index] = pixels
            found += 1
    if found < len(positions):
        raise UncertainError("a frame does not come out of its packets")
    return Decoded(frames, fed.packets_read, fed.packets_kept, "")


class ImageFile(NamedTuple):
    """One frame that is an image in a file of its own."""

    name: str
    data: bytes
    size: tuple[int, int]
    """(height, width) as stored, before its EXIF orientation."""


def read_image(files: FrameFiles, position: int, cache: str | None = None) -> ImageFile:
    """The file of the frame at `position`. `cache`: see `files.fetch`. Raises `InputError` that names the file."""
    check(position < len(files), f"frame {position} is needed, but its path names only {len(files)}; index it again")
    path = files.path(position)
    name = os.path.basename(path)
    try:
        data = read_bytes(fetch(path, cache, problem=_image_problem))
        return ImageFile(name, data, image_size(data))
    except InputError as error:
        raise InputError(f"{name}: {error}") from None


def read_images(
    source: Source, positions: np.ndarray, *, size: tuple[int, int], cache: str | None = None
) -> list[ImageFile]:
    """The files of the frames at `positions` of a source that `is_frames`, checked to have the (height, width) `size`,
    either way round, as EXIF may rotate them. `cache`: see `files.fetch`. Raises `InputError` that names the file."""
    files = frame_files(source.path)
    with ThreadPoolExecutor(_REQUESTS) if is_url(source.path) else contextlib.nullcontext() as threads:
        read = partial(read_image, files, cache=cache)
        images = list((threads.map if threads else map)(read, positions.tolist()))
    for image in images:
        if sorted(image.size) != sorted(size):
            raise InputError(f"{image.name}: {size_mismatch(image.size, size)}")
    return images


_REQUESTS = 8  # in flight at a time for the frames of one clip


def _image_problem(source: Source) -> str:
    try:
        image_size(read_bytes(source))
    except InputError as error:
        return str(error)
    return ""


def decode_images(
    source: Source,
    positions: np.ndarray,
    *,
    size: tuple[int, int],
    region: Region = _WHOLE,
    reduce: Reduce | None = None,
    cache: str | None = None,
) -> Decoded:
    """`decode_frames` for a source that `is_frames`. `cache`: see `files.fetch`."""
    frames, step = np.empty(0, np.uint8), batch_length(size)
    for first in range(0, len(positions), step):
        some = positions[first : first + step]
        images = read_images(source, some, size=size, cache=cache)
        batch = decode_batch([image.data for image in images], [image.name for image in images], size=size)
        for index, image in enumerate(batch, start=first):
            pixels = reduce(image[region]) if reduce else image[region]
            if not index:
                frames = np.empty((len(positions), *pixels.shape), np.uint8)
            frames[index] = pixels
    return Decoded(frames, len(positions), len(positions), "")


def decode_batch(
    images: Sequence[bytes | np.ndarray], names: Sequence[str], *, size: tuple[int, int] | None
) -> list[np.ndarray]:
    """The images, uint8 [H, W, 3] each, decoded on the CPU by DALI. Raises `InputError` with the name of one that
    cannot be decoded, or whose (height, width) is not `size`, unless that is None."""
    decoder = host_decoder()
    try:
        decoded = decoder.decode(images)
    except RuntimeError:  # it does not say which
        for image, name in zip(images, names, strict=True):
            try:
                decoder.decode([image])
            except RuntimeError:
                raise InputError(f"{name}: not an image that DALI can decode; damaged?") from None
        raise
    for image, name in zip(decoded, names, strict=True):
        if size and (difference := size_mismatch((image.shape[0], image.shape[1]), size)):
            raise InputError(f"{name}: {difference}")
    return decoded


def _all_images(source: Source, frames: int, size: tuple[int, int]) -> Iterator[av.VideoFrame]:
    step = batch_length(size)
    for first in range(0, frames, step):
        positions = np.arange(first, min(first + step, frames))
        for image in decode_images(source, positions, size=size).frames:
            yield av.VideoFrame.from_ndarray(image, format="rgb24")


def decode_all(video: VideoLike, *, frames: int, size: tuple[int, int]) -> Iterator[av.VideoFrame]:
    """All frames of a video with `frames` frames of `size`, with the checks of `decode_frames`. Raises `InputError`."""
    source = as_source(video)
    if is_frames(source.path):
        yield from _all_images(source, frames, size)
        return
    source = fetch(source)
    count = 0
    try:
        with open_video(source) as container:
            prepare(container, is_strict=_misses_frames(source), max_pixels=_limit(size))
            for position, frame in _checked(enumerate(decode_packets(demux(container)))):
                if difference := size_mismatch((frame.height, frame.width), size):
                    raise InputError(difference)
                count = position + 1
                yield frame
    except InputError:
        if count != frames:  # otherwise the file was cut off, and is good up to there
            raise
    if count != frames:
        raise InputError(f"it decodes to {count} frames, not {frames}; if the file was replaced, index it again")


def decode_packets(packets: Iterable[VideoPacket]) -> Iterator[av.VideoFrame]:
    """The frames of packets, in output order. Before the first key frame, a packet that cannot be decoded is not
    damaged: it refers to frames before the start of the file."""
    has_begun = False
    refused: av.error.FFmpegError | None = None
    for packet in packets:
        has_begun |= packet.is_keyframe
        try:
            frames = packet.decode()
        except av.error.FFmpegError as error:
            if has_begun:
                raise
            refused = error
            continue
        has_begun |= bool(frames)
        yield from frames
    if refused and not has_begun:
        raise refused


def size_mismatch(found: tuple[int, int], expected: tuple[int, int]) -> str:
    """The message for frames of (height, width) `found` instead of `expected`; "" if they are equal."""
    if found == expected:
        return ""
    return (
        f"a frame is {found[1]}x{found[0]}, not {expected[1]}x{expected[0]}: the size changes within the video; "
        "if the file was replaced, index it again"
    )


_CONCEALS = frozenset({"apng", "jpegls", "ljpeg", "mjpeg", "png"})
"""Still-image codecs whose decoders conceal missing data, and report it only in strict mode."""


def check_pixels(size: tuple[int, int], max_pixels: int) -> None:
    """Raises `InputError` for frames of (height, width) that are too large to decode."""
    height, width = size
    check(
        height * width <= max_pixels,
        f"its frames are {width}x{height}, more than {max_pixels} pixels: if they really are that large, set "
        "data.max_pixels, and --max-pixels of prepare.py",
    )


def prepare(container: av.container.InputContainer, *, is_strict: bool = False, max_pixels: int = MAX_PIXELS) -> None:
    """Sets up the decoder of its video stream: with one thread, as several would report damage at random places. Raises
    `InputError` for frames of more than `max_pixels`."""
    set_up(video_stream(container).codec_context, is_strict=is_strict, max_pixels=max_pixels)


def set_up(context: av.VideoCodecContext, *, is_strict: bool = False, max_pixels: int = MAX_PIXELS) -> None:
    """`prepare` for the decoder itself."""
    check_pixels((context.height, context.width), max_pixels)
    context.thread_count = 1
    options = {"max_pixels": str(max_pixels)}  # the frames' own headers may claim more than the container
    if is_strict or context.codec.canonical_name in _CONCEALS:
        options["err_detect"] = "crccheck+explode"
    context.options = options


def _misses_frames(source: Source) -> bool:
    """Whether reference frames seem to be missing, which FFmpeg reports only in strict mode."""
    try:
        with open_video(source) as container:
            PacketReader(container).shown()
    except MissingFrameError:
        return True
    except (UncertainError, av.error.FFmpegError):
        pass
    return False


def _checked(frames: Iterable[tuple[int, av.VideoFrame]]) -> Iterator[tuple[int, av.VideoFrame]]:
    """The same frames, checked to be undamaged and in order. Raises `InputError`, `UncertainError`."""
    last = -1
    try:
        for position, frame in frames:
            if frame.is_corrupt:
                raise InputError(f"frame {position} is damaged")
            if position <= last:
                raise UncertainError("frames come out in another order than their headers say")
            last = position
            yield position, frame
    except av.error.FFmpegError as error:
        where = f" after frame {last}" if last >= 0 else ""
        raise InputError(f"{reason(error)}{where}") from None


class _Reformatter(threading.local):
    """Keeps its tables from one frame to the next. One per thread: two threads that share one deadlock."""

    def __init__(self) -> None:
        self.reformat = av.video.reformatter.VideoReformatter().reformat


_reformatter = _Reformatter()


def _rgb(frame: av.VideoFrame) -> np.ndarray:
    """uint8 [H, W, 3], a view of memory that the next call in this thread may overwrite."""
    plane = _reformatter.reformat(frame, format="rgb24").planes[0]
    return np.ndarray((frame.height, frame.width, 3), np.uint8, memoryview(plane), strides=(plane.line_size, 3, 1))


class _Selected:
    """Yields (position, frame) from only the packets that `positions` need, in output order."""

    def __init__(self, context: av.VideoCodecContext, source: PacketSource, positions: np.ndarray):
        self._context, self._source, self._positions = context, source, positions
        self.packets_read = self.packets_kept = 0

    def __iter__(self) -> Iterator[tuple[int, av.VideoFrame]]:
        context, source = self._context, self._source
        selection = source.select(self._positions)
        self.packets_read, self.packets_kept = source.packets_read, sum(map(len, selection.runs))
        positions = {number: position for position, number in enumerate(selection.shown)}
        context.copy_opaque = True  # a frame comes out with the number of its packet
        codec = CODECS.get(context.codec.canonical_name)
        if codec and codec.learns_padding and (len(selection.runs) > 1 or selection.runs[0][0]):
            _learn_padding(context, source.first(_PADDED))
        for run, numbers in enumerate(selection.runs):
            if run:
                context.flush_buffers()
            for number in [*numbers, None]:
                packet = None
                if number is not None:
                    packet = source.packet(number)
                    packet.opaque = number
                for frame in context.decode(packet):
                    origin = frame.opaque
                    if not isinstance(origin, int):  # of an unknown packet
                        yield -1, frame
                    elif origin in positions or not source.flags[origin] & Flag.IS_DISCARDED:
                        yield positions.get(origin, -1), frame


_PADDED = 3
"""Frames from which FFmpeg learns the padding."""


def _learn_padding(context: av.VideoCodecContext, packets: Iterable[VideoPacket]) -> None:
    """Decodes the first frames of an MPEG-4 video. FFmpeg assumes that the encoder pads wrongly until some frames show
    that it does not, and until then it does not notice frames that end too early."""
    for packet in packets:
        with contextlib.suppress(av.error.FFmpegError):
            context.decode(packet)
    context.flush_buffers()


class _Everything:
    """Yields (position, frame) from the start of the file to the last of `positions`."""

    def __init__(self, container: av.container.InputContainer, positions: np.ndarray):
        self._container, self._last = container, int(positions[-1])
        self.packets_read = 0

    @property
    def packets_kept(self) -> int:
        return self.packets_read

    def __iter__(self) -> Iterator[tuple[int, av.VideoFrame]]:
        position = -1
        for position, frame in enumerate(decode_packets(self._packets())):
            yield position, frame
            if position == self._last:
                return
        raise InputError(
            f"frame {self._last} is needed, but it decodes to only {position + 1} frames; if the file was replaced, "
            "index it again"
        )

    def _packets(self) -> Iterator[VideoPacket]:
        for packet in demux(self._container):
            self.packets_read += bool(packet.size)
            yield packet
