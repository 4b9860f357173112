"""The demo data set: small synthetic videos of eight classes that differ only in their motion.

    videos/train/00000_left.mp4     a textured shape crosses the frame from right to left
    videos/train/00001_right.mp4    the same distribution, played backwards
    videos/train/00002_up.webm ...  and so on, for every pair of opposites in CLASSES

Everything else (colours, textures, shape, frame size, length, frame rate, codec) is drawn independently of the
class, and each class is its opposite with time reversed. So neither a frame nor an unordered set of frames
distinguishes "left" from "right": a network that ignores time never exceeds 0.5.

The motion spans the whole video: 8 frames sampled from 5 frames or from 300 show the same path.

Coordinates are in units of the frame's short side, from its centre, x to the right, y downwards.
This module does not import torch, because its functions run in worker processes.
"""

import colorsys
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import av
import numpy as np

from dali_pipelines.processes import end_with_parent
from preparation.encoding import add_video_stream

# The position is the label. Each odd class is the one before it, reversed in time.
CLASSES = ("left", "right", "up", "down", "towards", "away", "clockwise", "anticlockwise")

_SPLITS = ("train", "val")
_MIN_FRAMES, _MEDIAN_FRAMES, _MAX_FRAMES = 5, 33, 300
_MIN_SIDE, _MAX_SIDE = 70, 110
_FRAME_RATES = tuple(map(Fraction, ("10", "12", "15", "24", "25", "30000/1001", "30", "50", "60")))


@dataclass(frozen=True)
class _Encoding:
    """A container and a codec."""

    share: float
    """Fraction of the videos."""
    container: str
    codec: str
    side_multiple: int
    """Both sides are a multiple of this number of pixels."""
    options: dict[str, str]


_ENCODINGS = {
    # Like Kinetics files: B-frames, and a keyframe every 250 frames.
    # b-adapt=0 places B-frames by position: adaptive placement may give a video of 5 frames none.
    # mbtree=0: with it, x264's assembly gives different bytes from run to run for frames this small
    # (tried: 8 of 11 videos differed within 8 runs; none without mbtree, none without assembly).
    ".mp4": _Encoding(
        share=0.84,
        container="mp4",
        codec="libx264",
        side_multiple=2,
        options={"preset": "veryfast", "crf": "20", "x264-params": "bframes=3:b-adapt=0:scenecut=0:mbtree=0"},
    ),
    ".webm": _Encoding(
        share=0.08,
        container="webm",
        codec="libvpx-vp9",
        side_multiple=1,
        options={"deadline": "realtime", "cpu-used": "8", "crf": "24", "b": "0"},
    ),
    ".avi": _Encoding(
        share=0.08,
        container="avi",
        codec="mpeg4",
        side_multiple=1,
        options={"qmin": "2", "qmax": "4", "b": "2M"},
    ),
}


@dataclass(frozen=True)
class _Scene:
    """All random choices for one video except its noise."""

    label: int
    suffix: str
    rate: Fraction
    width: int
    height: int
    path: np.ndarray
    """(frames, 4): x, y, radius and clockwise turn (radians) of the shape in every frame."""
    corners: int
    """Number of corners of the shape, a regular polygon; 0: a disc."""
    stripes: np.ndarray
    """(2,): radians per radius, and phase, of the stripes on the shape."""
    waves: np.ndarray
    """(4, waves): radians per length along x and y, phase, and amplitude, of the background's texture."""
    drift: np.ndarray
    """(2,): x and y by which the background moves over the whole video."""
    colours: np.ndarray
    """(2, 2, 3) float32: two RGB colours, 0 to 255, for the background, and two for the shape."""
    noise: float
    """Sensor noise is uniform within plus and minus this, on a scale of 0 to 255."""


def render_demo(
    out: Path,
    *,
    train_videos: int,
    val_videos: int,
    seed: int,
    workers: int,
    motions: Sequence[str] = CLASSES,
    progress: Callable[[int, int], object] | None = None,
) -> dict[str, list[tuple[str, int]]]:
    """Writes out/videos/train/00000_left.mp4 and so on.

    Returns {"train": [(path relative to out, label), ...], "val": [...]}. A label is an index into `motions`, which are
    some of `CLASSES`. Video i of a split has label i % len(motions), so every prefix is balanced. A video depends only
    on (seed, split, i) and its motion: the number of videos and of workers does not change a byte of it. `progress`
    gets (videos done, total).
    """
    tasks = [("train", index) for index in range(train_videos)]
    tasks += [("val", index) for index in range(val_videos)]
    listed: dict[str, list[tuple[str, int]]] = {split: [] for split in _SPLITS}
    for split in _SPLITS:
        (out / "videos" / split).mkdir(parents=True, exist_ok=True)
        for unfinished in (out / "videos" / split).glob("*.part"):  # left by a killed run
            if time.time() - unfinished.stat().st_mtime > 3600:
                unfinished.unlink(missing_ok=True)
    paths = _render_all(partial(_render_video, out, seed, tuple(motions)), tasks, workers=workers)
    for done, ((split, index), path) in enumerate(zip(tasks, paths, strict=True), start=1):
        listed[split].append((path, index % len(motions)))
        if progress is not None:
            progress(done, len(tasks))
    return listed


def _render_all(
    render: Callable[[tuple[str, int]], str], tasks: list[tuple[str, int]], *, workers: int
) -> Iterator[str]:
    """Yields the results in the order of the tasks, as they become available."""
    if workers == 1:
        yield from map(render, tasks)
        return
    # numpy reads it when a worker imports it. The workers already fill the cores, so more threads would wait for each
    # other (measured: 1.4 times slower, and far worse beside other programs).
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # Not "fork": the caller may have threads (torch, CUDA), which do not survive a fork.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=end_with_parent) as pool:
        yield from pool.map(render, tasks, chunksize=8)


def _render_video(out: Path, seed: int, motions: tuple[str, ...], task: tuple[str, int]) -> str:
    """Renders one video and returns its path relative to `out`."""
    split, index = task
    rng = _generator(seed=seed, split=split, index=index)
    scene = _draw_scene(rng, label=CLASSES.index(motions[index % len(motions)]))
    path = f"videos/{split}/{index:05d}_{CLASSES[scene.label]}{scene.suffix}"
    # A killed run leaves a file with this name, never half a video under the final name. Names are unique per process.
    unfinished = out / f"{path}.{os.getpid()}.part"
    _encode(unfinished, scene, _render_frames(rng, scene))
    os.replace(unfinished, out / path)
    return path


def _generator(*, seed: int, split: str, index: int) -> np.random.Generator:
    """An independent stream for every video: seed and split are the key, the index is the counter's top word."""
    key = np.array([seed, _SPLITS.index(split)], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, index]))


def _draw_scene(rng: np.random.Generator, *, label: int) -> _Scene:
    """Draws a scene. The label chooses the motion and affects no other draw."""
    suffix = str(rng.choice(list(_ENCODINGS), p=[encoding.share for encoding in _ENCODINGS.values()]))
    frames = int(np.clip(_MEDIAN_FRAMES * rng.lognormal(sigma=0.8), _MIN_FRAMES, _MAX_FRAMES))
    width, height = _draw_sides(rng, multiple=_ENCODINGS[suffix].side_multiple)
    room = np.array([width, height]) / min(width, height) - 1
    return _Scene(
        suffix=suffix,
        rate=_FRAME_RATES[rng.integers(len(_FRAME_RATES))],
        width=width,
        height=height,
        corners=int(rng.choice([0, 0, 3, 4, 5, 6])),
        stripes=rng.uniform((2.0, 0.0), (6.0, 2 * np.pi)),
        waves=_draw_waves(rng),
        drift=_polar(rng.uniform(0, 0.06), rng.uniform(0, 2 * np.pi)),
        colours=_draw_colours(rng),
        noise=rng.uniform(1.0, 5.0),
        label=label,
        path=_draw_path(rng, label=label, frames=frames, room=room),
    )


def _draw_sides(rng: np.random.Generator, *, multiple: int) -> tuple[int, int]:
    """Draws width and height in pixels: mostly small, some square, a few larger."""
    sides = rng.uniform(_MIN_SIDE, _MAX_SIDE, size=2)
    sides[1] = sides[rng.choice([0, 1], p=[0.15, 0.85])]
    sides *= rng.choice([1.0, 1.5], p=[0.95, 0.05])
    width, height = (int(side) // multiple * multiple for side in sides)
    return width, height


def _draw_waves(rng: np.random.Generator) -> np.ndarray:
    """Draws `_Scene.waves`, (4, 5): long waves are strong and short ones faint, as in natural images."""
    wavelengths = np.exp(rng.uniform(np.log(0.15), np.log(1.5), size=5))
    frequencies = _polar(2 * np.pi / wavelengths, rng.uniform(0, 2 * np.pi, size=5))
    return np.stack([*frequencies, rng.uniform(0, 2 * np.pi, size=5), 0.3 * np.sqrt(wavelengths)])


def _draw_colours(rng: np.random.Generator) -> np.ndarray:
    """Draws `_Scene.colours`: a bright shape on a dark background of another hue."""
    hues = rng.random() + np.array([0, rng.uniform(-0.15, 0.15), *rng.uniform(0.25, 0.75, size=2)])
    saturations = rng.uniform((0.4, 0.4, 0.2, 0.2), (0.9, 0.9, 0.7, 0.7))
    values = rng.uniform((0.1, 0.2, 0.85, 0.75), (0.3, 0.4, 1.0, 1.0))
    colours = [colorsys.hsv_to_rgb(*colour) for colour in zip(hues % 1, saturations, values, strict=True)]
    return 255 * np.array(colours, dtype=np.float32).reshape(2, 2, 3)


def _draw_path(rng: np.random.Generator, *, label: int, frames: int, room: np.ndarray) -> np.ndarray:
    """Draws `_Scene.path`, (frames, 4). `room`: how much longer width and height are than the short side."""
    time = np.linspace(-0.5, 0.5, frames)
    time = time + rng.uniform(-0.08, 0.08) * np.sin(2 * np.pi * time)
    x, y = rng.uniform(-0.08, 0.08, size=2) + rng.uniform(-0.25, 0.25, size=2) * room
    radius = rng.uniform(0.15, 0.22)
    turn = rng.uniform(0, 2 * np.pi)
    travel = rng.uniform(0.6, 0.8)
    across = rng.uniform(-0.12, 0.12)
    still = np.zeros(frames)
    if label < 2:
        columns = [x - travel * time, y + across * time, still + radius, still + turn]
    elif label < 4:
        columns = [x + across * time, y - travel * time, still + radius, still + turn]
    elif label < 6:
        growth = np.exp(2 * travel * time)
        columns = [x + across * time, y + still, 0.9 * radius * growth, still + turn]
    else:
        # Half a turn at most, over the top of the circle. The two directions of a full turn look so alike that a
        # small network stays at chance for this pair, and an accuracy of 0.875 hides that.
        angle = 1.25 * np.pi * travel * time + 2 * across
        orbit = 0.5 * travel
        columns = [x + orbit * np.sin(angle), y + orbit * (0.5 - np.cos(angle)), still + radius, turn + angle]
    path = np.stack(columns, axis=1)
    return path[::-1] if label % 2 else path


def _polar(length: np.ndarray | float, angle: np.ndarray | float) -> np.ndarray:
    return np.stack([length * np.cos(angle), length * np.sin(angle)])


def _render_frames(rng: np.random.Generator, scene: _Scene) -> Iterator[np.ndarray]:
    """Yields the frames of a video, (height, width, 3) uint8 RGB."""
    colours = np.concatenate([*scene.colours, np.full((1, 3), scene.noise, dtype=np.float32)])
    for number in range(len(scene.path)):
        texture = _background(scene, number)
        cover, stripe = _shape(scene, number)
        clear = 1 - cover
        noise = 2 * rng.random(cover.shape, dtype=np.float32) - 1
        layers = [clear * (1 - texture), clear * texture, cover * (1 - stripe), cover * stripe, noise]
        # One product for all layers: arithmetic on (height, width, 3) arrays costs several times as much.
        frame = np.tensordot(np.stack(layers), colours, axes=(0, 0))
        yield frame.clip(0, 255, out=frame).astype(np.uint8)


def _axes(scene: _Scene) -> tuple[np.ndarray, np.ndarray]:
    """x of every column and y of every row, at pixel centres."""
    short = min(scene.width, scene.height)
    x = (np.arange(scene.width) + 0.5 - scene.width / 2) / short
    y = (np.arange(scene.height) + 0.5 - scene.height / 2) / short
    return x.astype(np.float32), y.astype(np.float32)


def _background(scene: _Scene, number: int) -> np.ndarray:
    """(height, width) float32, 0 to 1: the share of the background's second colour."""
    x, y = _axes(scene)
    along_x, along_y, phase, amplitude = scene.waves.astype(np.float32)
    drift_x, drift_y = scene.drift * (number / (len(scene.path) - 1) - 0.5)
    x_waves = np.exp(1j * (along_x[:, None] * (x - drift_x) + phase[:, None]))
    y_waves = np.exp(1j * along_y[:, None] * (y - drift_y)) * amplitude[:, None]
    # cos(a + b) is the real part of exp(ia) exp(ib): every wave is a product of a row and a column.
    return (0.5 + (y_waves.T @ x_waves).real).clip(0, 1)


def _shape(scene: _Scene, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Two (height, width) float32, 0 to 1: how much of a pixel the shape covers, and the share of its second colour."""
    x, y = _axes(scene)
    centre_x, centre_y, radius, turn = scene.path[number].astype(np.float32)
    x, y = x[None, :] - centre_x, y[:, None] - centre_y
    if scene.corners:
        angles = turn + np.arange(scene.corners) * (2 * np.pi / scene.corners)
        normals = _polar(1.0, angles).astype(np.float32)
        # 1.15: a polygon looks smaller than the disc around it.
        distance = np.max([x * normal_x + y * normal_y for normal_x, normal_y in normals.T], axis=0)
        distance -= 1.15 * radius * np.cos(np.pi / scene.corners)
    else:
        distance = np.hypot(x, y) - radius
    frequency, phase = scene.stripes.astype(np.float32)
    along = (x * np.cos(turn) + y * np.sin(turn)) / radius
    short = min(scene.width, scene.height)
    return (0.5 - distance * short).clip(0, 1), (0.5 + np.sin(frequency * along + phase)).clip(0, 1)


def _encode(path: Path, scene: _Scene, frames: Iterable[np.ndarray]) -> None:
    encoding = _ENCODINGS[scene.suffix]
    # bitexact: otherwise WebM gets a random id.
    with av.open(path, "w", format=encoding.container, options={"fflags": "+bitexact"}) as container:
        stream = add_video_stream(container, encoding.codec, rate=scene.rate, options=encoding.options)
        stream.width, stream.height, stream.pix_fmt = scene.width, scene.height, "yuv420p"
        stream.codec_context.gop_size = 250
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
