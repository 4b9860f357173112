"""Encodes frames with FFmpeg."""

from fractions import Fraction

from av.container import OutputContainer
from av.video.stream import VideoStream


def add_video_stream(
    container: OutputContainer, encoder: str, *, rate: Fraction, options: dict[str, str]
) -> VideoStream:
    """Adds a video stream that is encoded in one thread: videos are encoded in parallel, and their bytes do not depend
    on the number of cores."""
    stream = container.add_stream(encoder, rate=rate, options=options)
    assert isinstance(stream, VideoStream)
    stream.codec_context.thread_count = 1
    return stream
