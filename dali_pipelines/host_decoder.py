"""Decodes chosen frames of a video with PyAV, from the packets that they need.

It decodes where DALI has no decoder for the codec on the device, and where somebody must say what is wrong with a
file: DALI's own decoder gives up on a whole batch.
"""

import os
import threading
from collections.abc import Iterator
from typing import NamedTuple

import av
import numpy as np

from dali_pipelines.errors import InputError
from dali_pipelines.files import Source, fetch, open_video
from dali_pipelines.manifest import size_mismatch
from dali_pipelines.packets import MissingPictureError, PacketReader, UncertainError, video_stream


class Decoded(NamedTuple):
    frames: np.ndarray
    """uint8 [N, H, W, 3] RGB, one for each distinct position, as coded (not turned), within the region only."""
    packets_read: int
    packets_kept: int
    """Those fed to the decoder."""
    fallback: str
    """Why everything up to the last frame was decoded; "" where only the packets that the frames need were."""


def decode_frames(
    video: str | os.PathLike | Source,
    positions: np.ndarray,
    *,
    size: tuple[int, int],
    region: tuple[slice, slice] = (slice(None), slice(None)),
) -> Decoded:
    """Pictures number `positions` (ascending, distinct) of those the decoder puts out when it is fed from the start.

    `size` is the (height, width) that the pictures must have, `region` the rows and columns to return. One thread:
    the processes around this one decode other samples. Raises `InputError`.
    """
    source = fetch(video)
    try:
        return _decode(source, positions, size, region, _Selected)
    except MissingPictureError as error:
        # FFmpeg puts something in its place, and only says so when it is told to be strict.
        return _decode(source, positions, size, region, _Everything, fallback=str(error), is_strict=True)
    except UncertainError as error:
        return _decode(source, positions, size, region, _Everything, fallback=str(error))


def _decode(source, positions, size, region, feed, *, fallback: str = "", is_strict: bool = False) -> Decoded:
    wanted = {int(position): index for index, position in enumerate(positions)}
    frames, found, last = None, 0, -1
    with open_video(source) as container:
        context = video_stream(container).codec_context
        context.thread_count = 1
        if is_strict:
            context.options = {"err_detect": "explode"}
        try:
            pictures = feed(container, positions)
            for position, frame in pictures:
                if frame.is_corrupt:
                    raise InputError(f"frame {position} is damaged")
                if position <= last:
                    raise UncertainError("pictures come out in another order than their headers say")
                last = position
                index = wanted.get(position)
                if index is not None:
                    if reason := size_mismatch((frame.height, frame.width), size):
                        raise InputError(reason)
                    picture = _rgb(frame)[region]
                    if frames is None:
                        frames = np.empty((len(positions), *picture.shape), np.uint8)
                    frames[index] = picture
                    found += 1
        except av.error.FFmpegError as error:
            where = f" after frame {last}" if last >= 0 else ""
            raise InputError(f"{error.strerror.lower()}{where}") from None
    if found < len(positions):
        raise UncertainError("a picture does not come out of its packets")
    return Decoded(frames, pictures.packets_read, pictures.packets_kept, fallback)


class _Reformatter(threading.local):
    """Keeps its tables from one frame to the next. Two threads that share one wait for each other for ever."""

    def __init__(self):
        self.reformat = av.video.reformatter.VideoReformatter().reformat


_reformatter = _Reformatter()


def _rgb(frame: av.VideoFrame) -> np.ndarray:
    """uint8 [H, W, 3], a view of memory that the next call in this thread may overwrite."""
    plane = _reformatter.reformat(frame, format="rgb24").planes[0]
    return np.ndarray((frame.height, frame.width, 3), np.uint8, plane, strides=(plane.line_size, 3, 1))


class _Selected:
    """(position, picture) from the packets that `positions` need, in the order in which they come out."""

    def __init__(self, container: av.container.InputContainer, positions: np.ndarray):
        self._context = video_stream(container).codec_context
        self._reader = PacketReader(container)
        self._selection = self._reader.select(positions)
        self.packets_read = len(self._reader.packets)
        self.packets_kept = sum(map(len, self._selection.runs))

    def __iter__(self) -> Iterator[tuple[int, av.VideoFrame]]:
        positions = {number: position for position, number in enumerate(self._selection.shown)}
        self._context.copy_opaque = True  # a picture comes out with the number of its packet
        for run, numbers in enumerate(self._selection.runs):
            if run:
                self._context.flush_buffers()
            for number in numbers:
                packet = self._reader.packets[number]
                packet.opaque = number
                for frame in self._context.decode(packet):
                    yield positions.get(frame.opaque, -1), frame
            for frame in self._context.decode(None):
                yield positions.get(frame.opaque, -1), frame


class _Everything:
    """(position, picture) from the start of the file to the last of `positions`."""

    def __init__(self, container: av.container.InputContainer, positions: np.ndarray):
        self._container = container
        self._last = int(positions[-1])
        self.packets_read = 0

    @property
    def packets_kept(self) -> int:
        return self.packets_read

    def __iter__(self) -> Iterator[tuple[int, av.VideoFrame]]:
        stream = video_stream(self._container)
        position = 0
        for packet in self._container.demux(stream):
            self.packets_read += bool(packet.size)
            for frame in stream.decode(packet):
                yield position, frame
                position += 1
                if position > self._last:
                    return
        raise InputError(f"frame {self._last} is planned, but only {position} come out; index the file again")
