"""Decides everything about a sample before a byte of its video is read.

A clip is a pure function of (seed, epoch, sample id): it does not depend on the number of processes, workers or clips
per batch, nor on where a run was resumed.

    entries of an epoch   a permutation of the manifest's rows (training) or the rows in order (evaluation)
    steps                 `step_entries` consecutive entries; training drops the tail, evaluation pads it with -1
    rank r of R           every R-th entry of a step, starting at r
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Required, TypedDict

import numpy as np

from dali_pipelines import crops
from dali_pipelines.errors import check
from dali_pipelines.manifest import Video, coded_size
from dali_pipelines.sampling import STRATEGIES, frame_positions

Mode = Literal["train", "validate", "test"]
MODES = ("train", "validate", "test")
PADDING = -1
"""Sample id of an entry that only fills the last step of an evaluation."""

_ORDER, _CLIP, _ENGINE = 0, 1, 2  # purposes of random streams
_SHORT_SIDES: dict[Mode, tuple[float, float]] = {
    "train": crops.JITTER,
    "validate": (crops.VALIDATION_SCALE, crops.VALIDATION_SCALE),
    "test": (1, 1),
}
"""Mode -> (low, high) of the short side, relative to the side of the crop."""


class ViewSettings(TypedDict, total=False):
    """Keyword arguments of `View`; see there."""

    mode: Required[Mode]
    num_frames: Required[int]
    crop_size: Required[int]
    stride: float | None
    target_fps: float
    past_end: str
    short_side: float | tuple[float, float] | None
    flip: bool
    views_per_decode: int
    num_windows: int
    windows_at_once: int | None


@dataclass(frozen=True, kw_only=True)
class View:
    """How clips are cut out of a video: the settings shared by all samples of a loader.

    Raises `InputError` for settings that cannot work.
    """

    mode: Mode
    """"train" (random windows and crops), "validate" (centre crop) or "test" (three crops along the long side)."""
    num_frames: int
    crop_size: int
    """Side of the square crop in pixels."""
    stride: float | None = 32
    """A window is `stride * num_frames / target_fps` seconds long: see `sampling.frame_positions`. None: the whole
    video, or an equal share of it if there are several windows."""
    target_fps: float = 30
    past_end: str = "fit"
    """What to do with a window longer than the video: see `sampling.STRATEGIES`."""
    short_side: float | tuple[float, float] | None = None
    """Pixels of the short side before the crop; a number, or (low, high) for training to draw from. Default: 8/7 to
    10/7 of the crop in training, 8/7 in validation, 1 in the test."""
    flip: bool = True
    """Training mirrors half of the clips at random; set to False if left and right differ in meaning."""
    views_per_decode: int = 1
    """Clips that training cuts out of one decode, each with its own window, crop and flip; 1 in evaluation."""
    num_windows: int = 1
    """Number of windows in the test, from the start of the video to its end; 1 in other modes."""
    windows_at_once: int | None = None
    """Windows per entry, for long videos whose frames would not all fit into memory: a video then has several entries,
    the last of which is filled up with its last window. Default: all."""

    def __post_init__(self) -> None:
        check(self.mode in MODES, f"mode is {self.mode!r}; expected one of {', '.join(MODES)}")
        check(self.past_end in STRATEGIES, f"past_end is {self.past_end!r}; expected one of {', '.join(STRATEGIES)}")
        check(self.num_frames >= 1, f"num_frames is {self.num_frames}; expected 1 or more")
        check(self.crop_size >= 1, f"crop_size is {self.crop_size}; expected 1 or more pixels")
        check(
            self.stride is None or self.stride > 0,
            f"stride is {self.stride}; expected more than 0, or None for whole videos",
        )
        check(self.target_fps > 0, f"target_fps is {self.target_fps}; expected more than 0")
        check(self.views_per_decode >= 1, f"views_per_decode is {self.views_per_decode}; expected 1 or more")
        check(self.num_windows >= 1, f"num_windows is {self.num_windows}; expected 1 or more")
        check(
            self.windows_at_once is None or 1 <= self.windows_at_once <= self.num_windows,
            f"windows_at_once is {self.windows_at_once}; expected 1 to the {self.num_windows} num_windows",
        )
        low, high = self.short_sides
        check(
            self.short_side is None or self.crop_size <= low <= high,
            f"short_side is {self.short_side}; expected at least the crop of {self.crop_size} pixels, and low <= high",
        )
        if self.mode != "train":
            object.__setattr__(self, "views_per_decode", 1)
        if self.mode != "test":
            object.__setattr__(self, "num_windows", 1)
            object.__setattr__(self, "windows_at_once", None)

    @property
    def short_sides(self) -> tuple[float, float]:
        """(low, high) in pixels: training draws the short side from this range, evaluation uses the low end."""
        if self.short_side is None:
            low, high = _SHORT_SIDES[self.mode]
            return low * self.crop_size, high * self.crop_size
        low, high = self.short_side if isinstance(self.short_side, Sequence) else (self.short_side, self.short_side)
        return low, high

    @property
    def entries_per_video(self) -> int:
        """Number of samples per video."""
        return -(-self.num_windows // (self.windows_at_once or self.num_windows))

    @property
    def windows_per_entry(self) -> int:
        """Number of windows per sample."""
        return self.views_per_decode * (self.windows_at_once or self.num_windows)

    @property
    def clips_per_entry(self) -> int:
        """Clips per sample: three crops of each window in the test, otherwise one."""
        return 3 * self.windows_per_entry if self.mode == "test" else self.views_per_decode


@dataclass(frozen=True)
class SamplePlan:
    """One sample, fully decided."""

    positions: np.ndarray
    """int64 [N], ascending, distinct: the frames to decode, numbered from 0 in the decoder's output order."""
    picks: np.ndarray
    """int64 [W, T]: frames of each window as indices into `positions`, ascending, repeated if the video is short.
    V / W clips are crops of the same window: 3 in the test, otherwise 1."""
    rectangles: np.ndarray
    """float64 [V, 4]: y0, x0, y1, x1 in pixels of the frame as coded; swapped ends flip."""
    transpose: bool
    """Swap height and width after the resize (videos rotated by 90 or 270 degrees)."""


def plan_sample(video: Video, view: View, *, seed: int, epoch: int, sample_id: int, part: int = 0) -> SamplePlan:
    """Decides the frames and pixels of an entry of `video`; `part` is 0 to `view.entries_per_video` - 1."""
    # PaddleVideo's `valid` draws its window at random; ours starts at 0, so that two validations see the same clips.
    windows = view.windows_per_entry
    if view.mode != "train":
        draws = np.zeros((windows, 5))
        numbers = part * windows + np.arange(windows)
        # The last part is filled up with the last window.
        draws[:, 0] = _test_starts(view)[np.minimum(numbers, view.num_windows - 1)]
    else:
        draws = np.stack([_generator(seed, epoch, _CLIP, sample_id, clip).random(5) for clip in range(windows)])
    window_positions = [_window(video, view, start) for start in draws[:, 0]]
    positions, picks = np.unique(window_positions, return_inverse=True)
    height, width, crop_size = video.height, video.width, view.crop_size
    if view.mode == "train":
        shown = np.concatenate(
            [
                crops.random_crop(
                    height=height,
                    width=width,
                    crop_size=crop_size,
                    short_sides=view.short_sides,
                    flip=view.flip,
                    draws=each[1:],
                )
                for each in draws
            ]
        )
    else:
        short_side = round(view.short_sides[0])
        if view.mode == "validate":
            shown = crops.centre_crop(height=height, width=width, crop_size=crop_size, short_side=short_side)
        else:
            three = crops.uniform_crops(height=height, width=width, crop_size=crop_size, short_side=short_side)
            shown = np.tile(three, (windows, 1))
    height, width = coded_size(video)
    rectangles, transpose = crops.to_coded(
        shown, rotation=video.rotation, mirrored=bool(video.mirrored), height=height, width=width
    )
    return SamplePlan(positions, picks.reshape(windows, view.num_frames), rectangles, transpose)


def windows_of_test(video: Video, view: View) -> np.ndarray:
    """Frame positions int64 [num_windows, T] of the test's windows."""
    return np.stack([_window(video, view, start) for start in _test_starts(view)])


def _test_starts(view: View) -> np.ndarray:
    """Start of each test window, 0 to 1; a single window starts at 0, as in PaddleVideo's test."""
    return np.linspace(0, 1, view.num_windows)


def _window(video: Video, view: View, start: float) -> np.ndarray:
    """Frame positions int64 [T] of one window."""
    stride = view.stride
    if stride is None and view.num_windows > 1:  # an equal share of the video, not all of it several times
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
class EntrySampler:
    """Maps places to the entries of one rank. A place counts this rank's entries over all epochs."""

    rows: int
    """Number of entries per epoch: videos times `View.entries_per_video`; a video's entries are consecutive."""
    training: bool
    seed: int
    step_entries: int
    rank: int
    world_size: int

    @property
    def steps(self) -> int:
        """Steps per epoch, the same on every rank."""
        whole, rest = divmod(self.rows, self.step_entries)
        return whole if self.training else whole + (rest > 0)

    @property
    def rank_entries(self) -> int:
        """Entries per epoch on this rank."""
        return self.steps * self.step_entries // self.world_size

    def sample(self, place: int) -> tuple[int, int]:
        """(epoch, entry) at `place`; an entry is a row, or `PADDING` past the last row of an evaluation."""
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
    """A random number in [0, 1) that chooses a video's engine, the same in every epoch, so that the video's pixels
    depend on nothing else."""
    return float(_generator(seed, 0, _ENGINE, sample_id).random())


def _generator(seed: int, epoch: int, purpose: int, sample_id: int, clip: int = 0) -> np.random.Generator:
    """A separate random stream for each clip of each epoch; counter-based, so none depends on another."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch], counter=[0, clip, sample_id, purpose]))
