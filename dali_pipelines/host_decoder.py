"""Decodes chosen frames of a video with PyAV, for codecs that DALI has no decoder for on the device.

It also is the decoder that can say what is wrong with a file: DALI's own gives up on a whole batch.
"""

import os
from typing import NamedTuple

import av
import numpy as np

from dali_pipelines.manifest import ffmpeg_url, size_mismatch


class DecodeError(Exception):
    """The planned frames cannot be had from this file; the message is the reason, for a person."""


class Decoded(NamedTuple):
    frames: np.ndarray
    """uint8 [N, H, W, 3] RGB, one for each distinct position, as coded (not turned), within the region only."""
    packets_read: int
    packets_kept: int


def decode_frames(
    path: str | os.PathLike,
    positions: np.ndarray,
    *,
    size: tuple[int, int],
    region: tuple[slice, slice] = (slice(None), slice(None)),
) -> Decoded:
    """Pictures number `positions` (ascending, distinct) of those the decoder puts out when it is fed from the start.

    `size` is the (height, width) that the pictures must have, `region` the rows and columns to return. One thread:
    the processes around this one decode other samples. Raises `DecodeError`.
    """
    wanted = {int(position): index for index, position in enumerate(positions)}
    last = int(positions[-1])
    frames = None
    position = packets = 0
    try:
        with av.open(ffmpeg_url(path)) as container:
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1
            reformatter = av.video.reformatter.VideoReformatter()
            for packet in container.demux(stream):
                packets += bool(packet.size)
                for frame in stream.decode(packet):
                    if frame.is_corrupt:
                        raise DecodeError(f"frame {position} is damaged")
                    if position in wanted:
                        if reason := size_mismatch((frame.height, frame.width), size):
                            raise DecodeError(reason)
                        picture = reformatter.reformat(frame, format="rgb24").to_ndarray()[region]
                        if frames is None:
                            frames = np.empty((len(positions), *picture.shape), np.uint8)
                        frames[wanted[position]] = picture
                    position += 1
                    if position > last:
                        return Decoded(frames, packets, packets)
    except av.error.FFmpegError as error:
        where = f" after frame {position - 1}" if position else ""
        raise DecodeError(f"{error.strerror.lower()}{where}") from None
    except IndexError:
        raise DecodeError("no video stream in it") from None
    raise DecodeError(f"frame {last} is planned, but only {position} come out; index the file again")
