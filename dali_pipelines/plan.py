"""Everything that is decided about a sample before a byte of its video is read.

A clip is a pure function of (seed, epoch, sample id): the number of processes, workers and clips a batch change
nothing, and neither does where a run was resumed.

    entries of an epoch   a permutation of the manifest's rows (training) or the rows in order (evaluation)
    steps                 `step_entries` consecutive entries; training drops the tail, evaluation pads it with -1
    rank r of R           every R-th entry of a step, starting at r
"""

import functools
from dataclasses import dataclass
from typing import Literal

import numpy as np

from dali_pipelines import crops
from dali_pipelines.manifest import Video, coded_size
from dali_pipelines.sampling import frame_positions

Mode = Literal["train", "validate", "test"]
MODES = ("train", "validate", "test")
PADDING = -1
"""Sample id of an entry that only fills the last step of an evaluation."""

_ORDER, _CLIP, _ENGINE = 0, 1, 2  # what a stream of random numbers is for


@dataclass(frozen=True, kw_only=True)
class View:
    """How a clip is cut out of a video: the settings shared by all samples of a loader."""

    mode: Mode
    num_frames: int
    crop_size: int
    stride: float | None
    target_fps: float
    past_end: Literal["fit", "hold"]
    short_sides: tuple[float, float]
    """Pixels: training draws the short side between them, evaluation uses the first."""
    flip: bool
    """Training only: mirror every second clip."""
    per_decode: int = 1
    """Clips that training cuts out of one decode, each with a window, crop and flip of its own; 1 in evaluation."""
    num_windows: int = 1
    """Windows of the test, the first at the start of the video, the last at its end; 1 in other modes."""
    windows_at_once: int | None = None
    """So many of them make a sample, a video then several; default: all."""

    @property
    def parts(self) -> int:
        """Samples a video."""
        return -(-self.num_windows // (self.windows_at_once or self.num_windows))

    @property
    def windows(self) -> int:
        """Windows a sample."""
        return self.per_decode * (self.windows_at_once or self.num_windows)

    @property
    def count(self) -> int:
        """Clips a sample: three crops of each window in the test, one of each otherwise."""
        return 3 * self.windows if self.mode == "test" else self.per_decode


@dataclass(frozen=True)
class SamplePlan:
    """One sample, fully decided."""

    positions: np.ndarray
    """int64 [N], ascending, distinct: the pictures to decode; k is the k-th that the decoder puts out."""
    picks: np.ndarray
    """int64 [W, T]: frames of each window as indices into `positions`, ascending, repeated where the video is short.
    V / W clips are crops of the same window: 3 in the test, otherwise 1."""
    rectangles: np.ndarray
    """float64 [V, 4]: y0, x0, y1, x1 in pixels of the frame as coded; swapped ends flip."""
    transpose: bool
    """Swap height and width after the resize (videos shown turned by 90 or 270 degrees)."""


def plan_sample(video: Video, view: View, *, seed: int, epoch: int, sample_id: int, part: int = 0) -> SamplePlan:
    """Which frames and which pixels of `video` make the sample; `part` 0 to `view.parts` - 1."""
    # PaddleVideo's `valid` draws its window at random; ours starts at 0, so that two validations see the same clips.
    if view.mode != "train":
        draws = np.zeros((view.windows, 5))
        numbers = part * view.windows + np.arange(view.windows)
        # The last part holds the last window as often as there is room.
        draws[:, 0] = _test_starts(view)[np.minimum(numbers, view.num_windows - 1)]
    else:
        draws = np.stack([_generator(seed, epoch, _CLIP, sample_id, clip).random(5) for clip in range(view.per_decode)])
    windows = [_window(video, view, start) for start in draws[:, 0]]
    positions, picks = np.unique(windows, return_inverse=True)
    frame = {"height": video.height, "width": video.width, "crop_size": view.crop_size}
    if view.mode == "train":
        settings = {"short_sides": view.short_sides, "flip": view.flip}
        shown = np.concatenate([crops.random_crop(**frame, **settings, draws=each[1:]) for each in draws])
    elif view.mode == "validate":
        shown = crops.centre_crop(**frame, short_side=round(view.short_sides[0]))
    else:
        shown = np.tile(crops.uniform_crops(**frame, short_side=round(view.short_sides[0])), (view.windows, 1))
    height, width = coded_size(video)
    orientation = {"rotation": video.rotation, "mirrored": bool(video.mirrored)}
    rectangles, transpose = crops.to_coded(shown, **orientation, height=height, width=width)
    return SamplePlan(positions, picks.reshape(len(windows), view.num_frames), rectangles, transpose)


def windows_of_test(video: Video, view: View) -> np.ndarray:
    """Frame positions int64 [num_windows, T] of the test's windows."""
    return np.stack([_window(video, view, start) for start in _test_starts(view)])


def _test_starts(view: View) -> np.ndarray:
    """0 where there is one window, as PaddleVideo's test."""
    return np.linspace(0, 1, view.num_windows)


def _window(video: Video, view: View, start: float) -> np.ndarray:
    stride = view.stride
    if stride is None and view.num_windows > 1:  # not the whole video several times, but an equal share of it
        stride = video.frames / view.num_windows / video.fps * view.target_fps / view.num_frames
    return frame_positions(
        frames=video.frames,
        fps=video.fps,
        num_frames=view.num_frames,
        stride=stride,
        target_fps=view.target_fps,
        past_end=view.past_end,
        start=start,
    )


@dataclass(frozen=True, kw_only=True)
class Order:
    """Which sample stands where, for one rank. A place is a number that counts this rank's entries over all epochs."""

    rows: int
    """Videos times `View.parts`, whose numbers follow each other."""
    training: bool
    seed: int
    step_entries: int
    rank: int
    world_size: int

    @property
    def steps(self) -> int:
        """Steps an epoch, the same on every rank."""
        whole, rest = divmod(self.rows, self.step_entries)
        return whole if self.training else whole + (rest > 0)

    @property
    def rank_entries(self) -> int:
        """Entries an epoch on this rank."""
        return self.steps * self.step_entries // self.world_size

    def sample(self, place: int) -> tuple[int, int]:
        """(epoch, sample id) at `place`; `PADDING` past the last row of an evaluation."""
        epoch, place = divmod(place, self.rank_entries)
        step, place = divmod(place, self.step_entries // self.world_size)
        entry = step * self.step_entries + place * self.world_size + self.rank
        if self.training:
            return epoch, int(_permutation(self.seed, epoch, self.rows)[entry])
        return epoch, entry if entry < self.rows else PADDING


@functools.lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, rows: int) -> np.ndarray:
    return _generator(seed, epoch, _ORDER, 0).permutation(rows)


def engine_draw(seed: int, sample_id: int) -> float:
    """In [0, 1), the same in every epoch: which of two engines decodes a video may depend on it, so that its pixels
    depend on nothing else."""
    return float(_generator(seed, 0, _ENGINE, sample_id).random())


def _generator(seed: int, epoch: int, purpose: int, sample_id: int, clip: int = 0) -> np.random.Generator:
    """A stream of its own for every clip of every epoch; counter-based, so none depends on another."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch], counter=[0, clip, sample_id, purpose]))
