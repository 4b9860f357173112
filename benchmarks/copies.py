"""Copies videos for a benchmark, with short GOPs and any number of frame sizes."""

import concurrent.futures
import itertools
import multiprocessing
import os
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av

from dali_pipelines.errors import InputError
from dali_pipelines.files import open_video
from dali_pipelines.manifest import Manifest, Video, key_of, source_of
from dali_pipelines.packets import video_stream
from dali_pipelines.probe import probe_packets
from dali_pipelines.processes import end_with_parent
from preparation.encoding import add_video_stream
from preparation.transcode import CODECS, Settings, copy_size

_WIDTHS, _HEIGHTS = range(272, 449, 16), range(208, 273, 16)
"""Pixels, around the 340x256 and 426x240 of Kinetics. Each size has a different number of whole blocks, so a decoder
treats them all as different. Every second copy is 12 pixels narrower, as most widths are no multiple of 16."""
_NARROWER = 12


def copy_videos(videos: Manifest, folder: Path, *, gop: int, sizes: int | None = None) -> Manifest:
    """Copies videos to H.264 in closed GOPs of `gop` frames, encoded as `prepare.py transcode` does, on all cores.
    Returns their manifest, with packet index entries. Raises `InputError`.

    sizes: number of frame sizes, each with a copy of the next video; None: one copy of each video, with a short side of
    at most 256 pixels.
    """
    if sizes is None:
        sized = [(video, copy_size(video, Settings.short_side)) for video in videos]
    else:
        known = sorted(itertools.product(_HEIGHTS, _WIDTHS), key=lambda size: abs(size[0] * size[1] - 340 * 256))
        if sizes > len(known):
            raise InputError(f"--sizes is {sizes}; expected at most {len(known)}")
        sized = [
            (videos[number % len(videos)], (height, width - _NARROWER * (number % 2)))
            for number, (height, width) in enumerate(known[:sizes])
        ]
    folder.mkdir(parents=True, exist_ok=True)
    tasks = [_Task(video, size, str(folder / f"{number}.mp4"), gop) for number, (video, size) in enumerate(sized)]
    context = multiprocessing.get_context("spawn")
    cores = len(os.sched_getaffinity(0))
    with concurrent.futures.ProcessPoolExecutor(cores, context, initializer=end_with_parent) as pool:
        copies = list(pool.map(_copy, tasks))
    made = Manifest([video for video, _ in copies])
    made.entries = {key_of(video): entry for video, entry in copies}
    return made


class _Task(NamedTuple):
    video: Video
    size: tuple[int, int]
    """(height, width)."""
    path: str
    gop: int


def _copy(task: _Task) -> tuple[Video, bytes]:
    """Makes a copy; returns it as probed, and its packet index entry."""
    video, (height, width), path, gop = task
    codec, fps = CODECS["h264"], Fraction(video.fps).limit_denominator(1 << 16)
    with open_video(source_of(video, ".")) as original, av.open(path, "w") as container:
        stream = add_video_stream(container, codec.encoder, rate=fps, options=codec.options(gop, codec.crf))
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for number, frame in enumerate(original.decode(video_stream(original))):
            frame = frame.reformat(width=width, height=height, format="yuv420p")
            frame.pts, frame.time_base, frame.pict_type = number, 1 / fps, av.video.frame.PictureType.NONE
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return probe_packets(os.path.abspath(path))
