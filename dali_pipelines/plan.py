"""Everything that is decided about a sample before a byte of its video is read.

A clip is a pure function of (seed, epoch, sample id): the number of processes, workers and clips a batch changes
nothing, nor does the place at which a run was resumed.

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

_ORDER, _CLIP, _ENGINE = 0, 1, 2  # what a stream of random numbers is for
_SHORT_SIDES: dict[Mode, tuple[float, float]] = {
    "train": crops.JITTER,
    "validate": (crops.VALIDATION_SCALE, crops.VALIDATION_SCALE),
    "test": (1, 1),
}
"""(low, high) of the short side, in sides of the crop, by mode."""


class ViewSettings(TypedDict, total=False):
    """Keyword arguments of `View`, which describes them."""

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
    """Pixels a side of the square crop."""
    stride: float | None = 32
    """A window is `stride * num_frames / target_fps` seconds long: see `sampling.frame_positions`. None: the whole
    video, or with several windows an equal share of it."""
    target_fps: float = 30
    past_end: str = "fit"
    """What happens in a window longer than the video: see `sampling.STRATEGIES`."""
    short_side: float | tuple[float, float] | None = None
    """Pixels of the short side before the crop; a number, or (low, high) for training to draw from. Default: 8/7 to
    10/7 of the crop in training, 8/7 in validation, 1 in the test."""
    flip: bool = True
    """Training mirrors every second clip; False if left and right differ in meaning."""
    views_per_decode: int = 1
    """Clips that training cuts out of one decode, each with a window, crop and flip of its own; 1 in evaluation."""
    num_windows: int = 1
    """Windows of the test, the first at the start of the video, the last at its end; 1 in other modes."""
    windows_at_once: int | None = None
    """Windows that make an entry, for long videos, whose frames would not all fit into memory: a video then has several
    entries. The last repeats the last window if it has room. Default: all."""

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
        """Pixels: training draws the short side between them, evaluation uses the first."""
        if self.short_side is None:
            low, high = _SHORT_SIDES[self.mode]
            return low * self.crop_size, high * self.crop_size
        low, high = self.short_side if isinstance(self.short_side, Sequence) else (self.short_side, self.short_side)
        return low, high

    @property
    def entries_per_video(self) -> int:
        """Samples that a video is spread over."""
        return -(-self.num_windows // (self.windows_at_once or self.num_windows))

    @property
    def windows_per_entry(self) -> int:
        """Windows in each of these samples."""
        return self.views_per_decode * (self.windows_at_once or self.num_windows)

    @property
    def clips_per_entry(self) -> int:
        """Three crops of each window in the test, one of each otherwise."""
        return 3 * self.windows_per_entry if self.mode == "test" else self.views_per_decode


@dataclass(frozen=True)
class SamplePlan:
    """One sample, fully decided."""

    positions: np.ndarray
    """int64 [N], ascending, distinct: the frames to decode; k is the k-th that the decoder puts out."""
    picks: np.ndarray
    """int64 [W, T]: frames of each window as indices into `positions`, ascending, repeated if the video is short.
    V / W clips are crops of the same window: 3 in the test, otherwise 1."""
    rectangles: np.ndarray
    """float64 [V, 4]: y0, x0, y1, x1 in pixels of the frame as coded; swapped ends flip."""
    transpose: bool
    """Swap height and width after the resize (videos shown turned by 90 or 270 degrees)."""


def plan_sample(video: Video, view: View, *, seed: int, epoch: int, sample_id: int, part: int = 0) -> SamplePlan:
    """Which frames and which pixels of `video` make the entry; `part` 0 to `view.entries_per_video` - 1."""
    # PaddleVideo's `valid` draws its window at random; ours starts at 0, so that two validations see the same clips.
    windows = view.windows_per_entry
    if view.mode != "train":
        draws = np.zeros((windows, 5))
        numbers = part * windows + np.arange(windows)
        # The last part holds the last window as often as there is room.
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
    """Where each window of the test starts, 0 to 1; a single one at 0, as in PaddleVideo's test."""
    return np.linspace(0, 1, view.num_windows)


def _window(video: Video, view: View, start: float) -> np.ndarray:
    """Frame positions int64 [T] of one window."""
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
class EntrySampler:
    """Gives the entries of one rank, in order. A place is a number that counts this rank's entries over all epochs."""

    rows: int
    """Videos times `View.entries_per_video`, whose numbers follow each other."""
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
        """(epoch, entry) at `place`, an entry being a row, or `PADDING` past the last row of an evaluation."""
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
    """A random number in [0, 1), the same in every epoch: the engine that decodes a video may depend on it, so that the
    video's pixels depend on nothing else."""
    return float(_generator(seed, 0, _ENGINE, sample_id).random())


def _generator(seed: int, epoch: int, purpose: int, sample_id: int, clip: int = 0) -> np.random.Generator:
    """A stream of its own for every clip of every epoch; counter-based, so none depends on another."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch], counter=[0, clip, sample_id, purpose]))
