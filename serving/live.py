"""Predictions for cameras and streams: RTSP, HLS, webcams, through PyAV, as long as they last."""

import datetime
import json
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import av
import numpy as np
import torch
from torch import Tensor

from common.config import Config, clip_settings
from common.distributed import DistributedContext
from common.precision import resolve_precision
from common.weights import Weights
from dali_pipelines.cpu_cut import cut_clips
from dali_pipelines.crops import Reducer
from dali_pipelines.errors import InputError, reason
from dali_pipelines.graph import Cut
from dali_pipelines.host_decoder import check_pixels
from dali_pipelines.manifest import Video
from dali_pipelines.plan import View, plan_sample
from dali_pipelines.probe import orientation
from dali_pipelines.text import hide_passwords
from evaluation.evaluate import predict_views
from serving.exported import Exported
from serving.formats import clock
from serving.prediction import TopClass, top_classes
from serving.video_arguments import STREAMS

T = TypeVar("T")

_LONGEST_WAIT, _MOST_TRIES = 30.0, 8
"""Seconds between two tries to reconnect, at most, and tries without a frame before it gives up: two minutes."""
_TIMEOUT = (10.0, 10.0)
"""Seconds to wait for a connection, and for data."""


@dataclass(frozen=True)
class LivePrediction:
    """The prediction for one window of a stream."""

    wall: datetime.datetime
    """When the window's last frame was decoded, in UTC."""
    seconds: tuple[float, float]
    """Start and end of the window in the stream's own time, from the times of its frames."""
    probabilities: Tensor
    """float32 [K]: mean over the three crops."""


def watch(
    source: str,
    weights: Weights | Exported,
    config: Config,
    process: DistributedContext,
    *,
    every: float,
    report: Callable[[str], None],
    wait: Callable[[float], None] = time.sleep,
) -> Iterator[LivePrediction]:
    """Yields a prediction for the last window of `source` every `every` seconds of its frames, until it ends.

    source: a URL (RTSP, HLS, HTTP), a webcam (/dev/video0) or a file, which is read as fast as it can be predicted.
    A window is as long as in training, or `every` seconds for weights that look at whole videos (`data.stride` null).
    Its clips are cut as those of a video that consists of the window, within 0.5/255 of the loader's.
    report: gets a line about each lost connection. The source is then opened again, after 1, 2, 4, ... seconds, and
    windows start anew. Only the pixels that the next windows need are kept. Lines and errors hide passwords in the URL.

    Raises `InputError` if the source cannot be opened at first, or cannot be reached again.
    """
    name = hide_passwords(source)
    network = weights.build(process.device)
    predicted = False
    precision = resolve_precision(config.train.precision, process.device)
    tries, seen = 0, False
    while True:
        problem = ""
        try:
            windows = None
            for frame, fps in _in_thread(_frames(source)):
                tries, seen = 0, True
                windows = windows or _Windows(config, fps, every)
                clips, seconds = windows.add(frame)
                if clips is not None:
                    wall = datetime.datetime.now(datetime.UTC)
                    probabilities = predict_views(network, clips[None].to(process.device), precision)[0].cpu()
                    predicted = True
                    yield LivePrediction(wall, seconds, probabilities)
        except av.error.ExitError:  # FFmpeg's name for `_TIMEOUT`
            problem = f"no data for {_TIMEOUT[1]:.0f} s"
        except (av.error.FFmpegError, OSError) as error:
            problem = reason(error) if isinstance(error, av.error.FFmpegError) else str(error)
        if not seen:
            raise InputError(f"{name}: cannot be opened ({problem or 'it has no frames'})")
        if not problem and not source.startswith(STREAMS):
            if windows and not predicted:
                report(f"{name}: ended before the first window of {windows.seconds:.1f} s was complete: no prediction")
            return
        if tries == _MOST_TRIES:
            raise InputError(f"{name}: lost ({problem or 'the stream ended'}), and not back after {tries} tries")
        seconds_to_wait = min(2.0**tries, _LONGEST_WAIT)
        tries += 1
        report(f"{name}: lost ({problem or 'the stream ended'}); trying again in {seconds_to_wait:.0f} s")
        wait(seconds_to_wait)


def _frames(source: str) -> Generator[tuple[av.VideoFrame, float]]:
    """Yields each frame with the stream's frames per second. Raises PyAV's errors, and `InputError`."""
    with _opened(source) as container:
        if not container.streams.video:
            raise InputError(f"{hide_passwords(source)}: no video stream in it")
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        fps = float(stream.average_rate or stream.guessed_rate or 30)
        for frame in container.decode(stream):
            yield frame, fps


def _in_thread(items: Generator[T]) -> Iterator[T]:
    """Yields the items, each of which is computed in a thread when it is asked for.

    FFmpeg blocks for seconds if a source sends nothing. PyAV (18.1) then loses Ctrl-C in the thread that waits.
    """
    wanted: queue.SimpleQueue[bool] = queue.SimpleQueue()
    results: queue.SimpleQueue[tuple[T | None, Exception | None]] = queue.SimpleQueue()

    def run() -> None:
        while wanted.get():
            try:
                results.put((next(items, None), None))
            except Exception as error:
                results.put((None, error))
        items.close()

    threading.Thread(target=run, daemon=True).start()
    try:
        while True:
            wanted.put(True)
            item, error = results.get()
            if error is not None:
                raise error
            if item is None:
                return
            yield item
    finally:
        wanted.put(False)


def _opened(source: str) -> Any:
    if source.startswith("/dev/"):
        if "video4linux2,v4l2" not in av.formats_available:
            raise InputError(f"{source}: this build of PyAV has no v4l2, which webcams need; install av with it")
        return av.open(source, format="video4linux2", timeout=_TIMEOUT)
    options = {"rtsp_flags": "prefer_tcp"} if source.startswith("rtsp") else {}  # else UDP
    return av.open(source, options=options, timeout=_TIMEOUT)


class _Windows:
    """Cuts windows out of a stream. Keeps, of each frame that a coming window needs, the pixels of the three crops."""

    def __init__(self, config: Config, fps: float, every: float):
        data = config.data
        self._step = max(round(every * fps), 1)
        stride = data.stride if data.stride is not None else every * data.target_fps / data.num_frames
        settings = clip_settings(data, "test")
        names = ("mode", "num_frames", "crop_size", "short_side", "target_fps", "past_end")
        self._view = View(**{name: settings[name] for name in names}, stride=stride, flip=False)
        self._length = max(round(stride * data.num_frames / data.target_fps * fps), 1)
        self.seconds = self._length / fps
        self._cut = Cut(data.crop_size, clips=3, windows=1, mean=data.mean, std=data.std, half=False)
        self._fps, self._max_pixels = fps, data.max_pixels
        self._size: tuple[int, int] | None = None
        self._kept: dict[int, np.ndarray] = {}
        self._times: dict[int, float] = {}
        self._start = self._count = 0

    def add(self, frame: av.VideoFrame) -> tuple[Tensor | None, tuple[float, float]]:
        """Adds the next frame. Returns (the clips [3, 3, T, S, S] of the window that it completes, else None; start and
        end of that window in seconds)."""
        size = frame.height, frame.width
        if size != self._size:  # the first, or the source has changed its resolution: windows start anew
            check_pixels(size, self._max_pixels)
            self._plan_for(frame, size)
            self._kept.clear()
            self._times.clear()
            self._start, self._size = self._count, size
        number = self._count
        self._count += 1
        self._times[number] = frame.time if frame.time is not None else number / self._fps
        if self._is_needed(number):
            self._kept[number] = self._reduce(frame.to_ndarray(format="rgb24"))
        if self._count < self._start + self._length:
            return None, (0.0, 0.0)
        start, self._start = self._start, self._start + self._step
        frames = np.stack([self._kept[start + position] for position in self._plan.positions.tolist()])
        clips = torch.empty(3, 3, self._view.num_frames, self._cut.crop_size, self._cut.crop_size)
        cut_clips(frames, self._plan.picks, self._reduce.rectangles, self._plan.transpose, self._cut, clips)
        seconds = self._times[start], self._times[number] + 1 / self._fps
        for old in [each for each in self._times if each < self._start]:
            del self._times[old]
            self._kept.pop(old, None)
        return clips, seconds

    def _plan_for(self, frame: av.VideoFrame, size: tuple[int, int]) -> None:
        rotation, mirrored = orientation(frame)
        height, width = size if rotation in (0, 180) else size[::-1]
        window = Video("", 0, self._length, self._fps, width, height, "", rotation, mirrored=mirrored)
        self._plan = plan_sample(window, self._view, seed=0, epoch=0, sample_id=0)
        self._reduce = Reducer(self._plan.rectangles, crop_size=self._view.crop_size, size=size)
        self._wanted = frozenset(self._plan.positions.tolist())

    def _is_needed(self, number: int) -> bool:
        """Whether a coming window needs frame `number`."""
        return any((number - start) in self._wanted for start in range(self._start, number + 1, self._step))


# -- output --


def live_text(prediction: LivePrediction, k: int, classes: Sequence[str]) -> str:
    """One line: wall time, time in the stream, the k most likely classes."""
    start, end = map(clock, prediction.seconds)
    listed = ", ".join(
        f"{entry['class']} ({entry['label']}) {entry['probability']:.2f}" for entry in _top(prediction, k, classes)
    )
    return f"{prediction.wall.isoformat(timespec='seconds')}  {start} - {end}  {listed}"


def live_json(source: str, prediction: LivePrediction, k: int, classes: Sequence[str]) -> str:
    """A JSON object on one line: video, wall (ISO 8601, UTC), start, end (seconds in the stream) and top."""
    start, end = prediction.seconds
    entry = {"video": source, "wall": prediction.wall.isoformat(), "start": round(start, 3), "end": round(end, 3)}
    return json.dumps(entry | {"top": _top(prediction, k, classes)})


def live_row(source: str, prediction: LivePrediction, k: int, classes: Sequence[str]) -> list[Any]:
    """The cells of `live_columns`."""
    best = [
        cell for each in _top(prediction, k, classes) for cell in (each["label"], each["class"], each["probability"])
    ]
    return [source, prediction.wall.isoformat(), *(round(each, 3) for each in prediction.seconds), *best]


def live_columns(k: int, classes: Sequence[str]) -> list[str]:
    """The header of a CSV file of live predictions."""
    best = [f"{name}{place + 1}" for place in range(min(k, len(classes))) for name in ("label", "class", "probability")]
    return ["video", "wall", "start", "end", *best]


def _top(prediction: LivePrediction, k: int, classes: Sequence[str]) -> list[TopClass]:
    return top_classes(prediction.probabilities, k, classes)
