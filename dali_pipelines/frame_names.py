"""Videos stored as one image per frame, as many older data sets are: a folder of numbered JPEG or PNG files.

A manifest names all of them in one path, much as a shell's braces do:

    archery/v1/img_{00001..00300}.jpg
    archery/v2/img_{00001..00120,00124..00300}.jpg      three numbers are missing

Frame k of the video is the k-th number, whatever it is. A clip reads only the files of its own frames.
"""

import functools
import os
import re
from collections.abc import Iterable
from typing import NamedTuple

_RANGE = r"\d{1,18}(?:\.\.\d{1,18})?"
_PATTERN = re.compile(
    rf"(?P<head>.*)\{{(?P<numbers>{_RANGE}(?:,{_RANGE})*)\}}(?P<tail>[^/{{}}]*\.(?:jpe?g|png))",
    re.IGNORECASE | re.DOTALL,
)
_NAME = re.compile(r"(?P<head>[^{}]*?)(?P<number>\d{1,18})(?P<tail>[^\d{}]*\.(?:jpe?g|png))", re.IGNORECASE | re.DOTALL)
_FLOW = re.compile(r"(?:.*[-_.])?(?:flow|x|y|u|v)[-_.]?(?:x|y|u|v)?[-_.]?", re.IGNORECASE)
"""Names of optical flow beside the frames: flow_x_00001.jpg, x_00001.jpg."""
CODECS = frozenset({"jpeg frames", "png frames"})
"""The values of `Video.codec` for frames in files."""


def is_frames(path: str) -> bool:
    """Whether a path or URL names the files of a video's frames."""
    return path[-4:].lower() in (".jpg", "jpeg", ".png") and _PATTERN.fullmatch(path) is not None


class FrameFiles(NamedTuple):
    """The files that a path names."""

    head: str
    """The path up to the number."""
    ranges: tuple[tuple[int, int, int], ...]
    """First and last number of each range, and the least number of digits."""
    tail: str

    def __len__(self) -> int:
        return sum(last - first + 1 for first, last, _ in self.ranges)

    def path(self, position: int) -> str:
        """The path of the frame at `position`, from 0. Raises IndexError if there are fewer."""
        for first, last, digits in self.ranges:
            if position <= last - first:
                return f"{self.head}{first + position:0{digits}}{self.tail}"
            position -= last - first + 1
        raise IndexError("fewer frames")

    @property
    def codec(self) -> str:
        """One of `CODECS`."""
        return "png frames" if self.tail.lower().endswith("png") else "jpeg frames"

    @property
    def gaps(self) -> int:
        """How many numbers are missing between the first and the last."""
        return self.ranges[-1][1] - self.ranges[0][0] + 1 - sum(last - first + 1 for first, last, _ in self.ranges)


@functools.lru_cache(maxsize=64)
def frame_files(path: str) -> FrameFiles:
    """The files of a path that `is_frames`."""
    match = _PATTERN.fullmatch(path)
    assert match, path
    ranges = []
    for text in match["numbers"].split(","):
        first, _, last = text.partition("..")
        ranges.append((int(first), int(last or first), len(first)))
    return FrameFiles(match["head"], tuple(ranges), match["tail"])


def name_frames(names: Iterable[str]) -> list[str]:
    """The paths that name all numbered images among the `names` of a folder's files: one, unless they are numbered in
    several ways. Optical flow beside the frames is left out."""
    groups: dict[tuple[str, str], list[tuple[int, str]]] = {}
    for name in names:
        if match := _NAME.fullmatch(name):
            groups.setdefault((match["head"], match["tail"]), []).append((int(match["number"]), match["number"]))
    frames = {key: found for key, found in groups.items() if not _FLOW.fullmatch(os.path.basename(key[0]))}
    return [f"{head}{{{_ranges(sorted(found))}}}{tail}" for (head, tail), found in sorted((frames or groups).items())]


def _ranges(numbers: list[tuple[int, str]]) -> str:
    """The text between the braces for sorted numbers, each with its digits in the file's name."""
    ranges: list[tuple[str, str]] = []
    before = None
    for number, digits in numbers:
        if ranges and before == number - 1 and digits == f"{number:0{len(ranges[-1][0])}}":
            ranges[-1] = ranges[-1][0], digits
        else:
            ranges.append((digits, digits))
        before = number
    return ",".join(first if first == last else f"{first}..{last}" for first, last in ranges)
