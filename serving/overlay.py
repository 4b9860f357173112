"""Writes a video again with its prediction burnt in."""

from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import av
import numpy as np
from av.video.stream import VideoStream

from dali_pipelines.errors import InputError
from dali_pipelines.files import VideoLike, unfinished
from dali_pipelines.host_decoder import decode_all
from dali_pipelines.manifest import Video, coded_size
from dali_pipelines.probe import probe
from serving.formats import clock
from serving.prediction import Prediction

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont

_FORMATS = {".mp4": "mp4", ".mkv": "matroska", ".mov": "mov"}
SUFFIXES = tuple(_FORMATS)
_COLOURS = ((31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40), (148, 103, 189), (140, 86, 75))
_DIM = 0.35
"""Brightness of the picture behind the text."""


def require_pillow() -> None:
    """Raises `InputError` if matplotlib (for its font) or Pillow, which comes with it, is not installed."""
    try:
        import matplotlib  # noqa: F401
        import PIL  # noqa: F401
    except ImportError:
        raise InputError("--overlay needs matplotlib: pip install matplotlib") from None


def write_overlay(path: Path, video: VideoLike, prediction: Prediction, classes: Sequence[str]) -> int:
    """Writes all frames of `video` to `path` with a strip at the top: the most likely class and its probability. With
    several windows, these are of the window whose centre is nearest, and a timeline at the bottom shows the class of
    each window and the current time. Returns the number of frames. The file gets its name once it is complete.

    Size, frame times and orientation are those of the video as it is shown; audio is left out. One frame at a time is
    in memory. Raises `InputError` if the video cannot be decoded or `path` cannot be written.
    """
    row = probe(video)
    strips = _Strips(prediction, classes, row)
    part = unfinished(path)
    try:
        with av.open(str(part), "w", format=_FORMATS[path.suffix.lower()]) as output:
            stream: VideoStream | None = None
            last, position = -1, -1
            for position, (frame, pixels) in enumerate(_upright(video, row)):
                if stream is None:
                    stream = _add_stream(output, row, frame.time_base)
                strips.draw(pixels, position / row.fps)
                drawn = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                tick = stream.codec_context.time_base
                given = frame.pts if frame.time_base and frame.pts is not None else None
                last = max(last + 1, round(position / row.fps / tick) if given is None else given)
                drawn.pts, drawn.time_base = last, tick
                output.mux(stream.encode(drawn))
            if stream is not None:
                output.mux(stream.encode(None))
        part.replace(path)
    except (OSError, av.error.FFmpegError) as error:
        raise InputError(f"--overlay {path}: cannot be written: {error.strerror}") from None
    finally:
        part.unlink(missing_ok=True)
    return position + 1


def _add_stream(output: av.container.OutputContainer, row: Video, time_base: Fraction | None) -> VideoStream:
    encoder = "libx264" if _has_encoder("libx264") else "mpeg4"
    stream = output.add_stream(encoder, rate=Fraction(row.fps).limit_denominator(100_000))
    assert isinstance(stream, VideoStream)
    is_even = row.width % 2 == row.height % 2 == 0
    stream.width, stream.height = row.width, row.height
    stream.pix_fmt = "yuv420p" if is_even or encoder == "mpeg4" else "yuv444p"
    stream.codec_context.time_base = time_base or Fraction(1, 90_000)
    stream.options = {"crf": "18", "preset": "veryfast"} if encoder == "libx264" else {"qmin": "2", "qmax": "5"}
    return stream


def _has_encoder(name: str) -> bool:
    try:
        av.Codec(name, "w")
    except av.codec.codec.UnknownCodecError:
        return False
    return True


def _upright(video: VideoLike, row: Video) -> Iterator[tuple[av.VideoFrame, np.ndarray]]:
    """Yields each frame with its pixels as they are shown, uint8 [H, W, 3]."""
    for frame in decode_all(video, frames=row.frames, size=coded_size(row)):
        pixels = frame.to_ndarray(format="rgb24")
        pixels = pixels[:, ::-1] if row.mirrored else pixels  # before it is rotated
        yield frame, np.array(np.rot90(pixels, row.rotation // 90))


class _Strips:
    """The label strip of each window, drawn once, and the timeline."""

    def __init__(self, prediction: Prediction, classes: Sequence[str], row: Video):
        from matplotlib import get_data_path
        from PIL import ImageFont

        self._height = max(min(row.height // 12, 48), 14)
        font_file = Path(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
        self._font = ImageFont.truetype(font_file, round(self._height * 0.62))
        self._centres = prediction.seconds.mean(1)
        several = len(self._centres) > 1
        probabilities = prediction.window_probabilities if several else prediction.probabilities[None]
        labels = probabilities.argmax(1).tolist()
        self._colours = [_COLOURS[list(dict.fromkeys(labels)).index(label) % len(_COLOURS)] for label in labels]
        self._masks = []
        for window, label in enumerate(labels):
            text = f"{classes[label]} {probabilities[window, label]:.2f}"
            if several:
                start, end = map(clock, prediction.seconds[window])
                text += f"   {start} - {end}"
            self._masks.append(_text_mask(text, self._font, self._height, row.width))
        self._bar = self._timeline(row) if several else None
        self._duration = row.frames / row.fps

    def _timeline(self, row: Video) -> np.ndarray:
        """uint8 [h, W, 3]: for each column, the colour of the window that is nearest in time."""
        times = (np.arange(row.width) + 0.5) / row.width * (row.frames / row.fps)
        nearest = np.abs(times[:, None] - self._centres).argmin(1)
        colours = np.array(self._colours, np.uint8)[nearest]
        return np.broadcast_to(colours, (max(self._height // 3, 4), row.width, 3))

    def draw(self, pixels: np.ndarray, seconds: float) -> None:
        """Draws what belongs to the time `seconds` into a frame, uint8 [H, W, 3]."""
        window = int(np.abs(self._centres - seconds).argmin())
        mask, top = self._masks[window][..., None], pixels[: self._height]
        top[:] = top * (_DIM * (1 - mask)) + 255 * mask
        if self._bar is not None:
            top[:, : max(self._height // 4, 3)] = self._colours[window]
            bottom = pixels[-len(self._bar) :]
            bottom[:] = self._bar
            now = min(int(seconds / self._duration * pixels.shape[1]), pixels.shape[1] - 1)
            bottom[:, max(now - 1, 0) : now + 2] = 255


def _text_mask(text: str, font: "FreeTypeFont", height: int, width: int) -> np.ndarray:
    """Opacity of `text`, float32 [height, width], 0 to 1; cut off with an ellipsis to fit."""
    from PIL import Image, ImageDraw

    text = text.encode("utf-8", "backslashreplace").decode()
    left, shown = height // 2, text
    while text and left + font.getlength(shown) > width:
        text = text[:-1]
        shown = f"{text}…"
    image = Image.new("L", (width, height))
    ImageDraw.Draw(image).text((left, height / 2), shown, fill=255, font=font, anchor="lm")
    return np.asarray(image, np.float32) / 255
