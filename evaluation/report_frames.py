"""Frames of the evaluated videos for the report, decoded again from the manifest."""

from fractions import Fraction

import av
import numpy as np

from dali_pipelines.errors import InputError
from dali_pipelines.host_decoder import decode_frames
from dali_pipelines.manifest import Manifest, coded_size
from dali_pipelines.plan import View, plan_sample
from evaluation.results import Summary

_FRAMES = 8
_THUMBNAIL = 112  # pixels a side


def first_window(summary: Summary) -> View:
    """How the evaluation cut its clips."""
    data = summary["config"]["data"]
    return View(
        mode="test",
        num_frames=data["num_frames"],
        crop_size=data["crop_size"],
        stride=data["stride"],
        target_fps=data["target_fps"],
        past_end=data["past_end"],
        short_side=data["crop_size"],
        flip=False,
        num_windows=summary["windows"],
    )


def thumbnails(manifest: Manifest, row: int, path: str, view: View) -> list[tuple[float, bytes]]:
    """Up to 8 frames of the first window of the video at `row`: (seconds, JPEG of the middle crop). Raises `InputError`
    if that row now has another video than `path`."""
    video = manifest[row] if row < len(manifest) else None
    if video is None or path not in (video.path, manifest.file(row)):
        raise InputError("the manifest has changed since then")
    plan = plan_sample(video, view, seed=0, epoch=0, sample_id=row)
    shown = np.unique(plan.picks[0])
    shown = shown[np.linspace(0, len(shown) - 1, min(len(shown), _FRAMES)).astype(int)]
    positions = plan.positions[shown]
    frames = decode_frames(manifest.source(row), positions, size=coded_size(video)).frames
    side = min(_THUMBNAIL, view.crop_size)
    return [
        (position / video.fps, _jpeg(_crop(frame, plan.rectangles[1], plan.transpose), side))
        for position, frame in zip(positions, frames, strict=True)
    ]


def _crop(frame: np.ndarray, rectangle: np.ndarray, transpose: bool) -> np.ndarray:
    """Crops a frame, uint8 [H, W, 3], to `rectangle`, in whole pixels and displayed orientation."""
    ends = np.round(rectangle).astype(int).reshape(2, 2).T
    for axis, (start, end) in enumerate(ends.tolist()):
        low = min(start, end, frame.shape[axis] - 1)
        part = np.arange(low, max(start, end, low + 1))
        frame = frame.take(part if start <= end else part[::-1], axis)
    return frame.swapaxes(0, 1) if transpose else frame


def _jpeg(pixels: np.ndarray, side: int) -> bytes:
    """Encodes uint8 [H, W, 3] as a JPEG of side x side pixels."""
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
    frame = frame.reformat(side, side, "yuvj420p", interpolation="AREA", dst_color_range="JPEG")
    context = av.CodecContext.create("mjpeg", "w")
    context.width, context.height, context.pix_fmt, context.time_base = side, side, "yuvj420p", Fraction(1)
    context.options = {"qmin": "4", "qmax": "4"}
    return b"".join(bytes(packet) for packet in [*context.encode(frame), *context.encode(None)])
