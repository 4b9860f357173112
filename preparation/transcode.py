"""Makes copies of videos that decode fast: small frames in short closed GOPs with few reference frames.

Frame k of a copy is frame k of the decoded original, in displayed orientation; frames are evenly spaced.
"""

import base64
import contextlib
import errno
import fcntl
import functools
import json
import os
import shutil
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter

from common.child_process import in_child
from common.worker_pool import Failed, WorkerPool, remove_journals, run
from dali_pipelines.crops import resized_size
from dali_pipelines.errors import InputError
from dali_pipelines.files import Source, absolute, fetch, ffmpeg_url, open_video, size_of
from dali_pipelines.folders import VIDEO_SUFFIXES
from dali_pipelines.frame_names import is_frames
from dali_pipelines.host_decoder import decode_all, decode_frames
from dali_pipelines.manifest import Manifest, Video, coded_size, key_of
from dali_pipelines.probe import probe, probe_packets
from dali_pipelines.sampling import frame_positions
from preparation.encoding import add_video_stream
from preparation.index import Rejected

_SAMPLED = 16  # videos to estimate size and time from
_COMPARED = 32  # videos to time, original and copy
_SPARE = 1.1  # required free space / estimated size, as the estimate may be off
_DISK_FULL = "no space is left on the disk"
_UNFINISHED = ".transcode-*.part"
_MADE_BY = "prepare.py transcode"
_UNKNOWN, _BT601 = 2, (5, 6)  # FFmpeg's numbers of colour spaces
_LIMITED, _FULL = 1, 2  # FFmpeg's numbers of colour ranges


class _Codec(NamedTuple):
    encoder: str
    suffix: str
    container: str
    crf: int
    """The default, with about the same quality for every codec."""
    crfs: tuple[int, int]
    """The lowest and highest allowed value."""
    options: Callable[[int, int], dict[str, str]]
    """(frames per GOP, crf) -> options of the encoder."""
    pixel_format: str = "yuv420p"


def _x264(gop: int, crf: int) -> dict[str, str]:
    # Without b-pyramid, B frames are never references. CABAC entropy decoding would take longer than all other steps.
    groups = f"keyint={gop}:min-keyint={gop}:scenecut=0:open-gop=0:bframes=3:b-adapt=0:b-pyramid=none"
    return {"preset": "medium", "crf": str(crf), "x264-params": f"{groups}:cabac=0"}


def _x265(gop: int, crf: int) -> dict[str, str]:
    groups = f"keyint={gop}:min-keyint={gop}:scenecut=0:open-gop=0:bframes=3:b-adapt=0:b-pyramid=0"
    one_thread = "pools=none:frame-threads=1:wpp=0"
    return {"preset": "medium", "crf": str(crf), "x265-params": f"{groups}:{one_thread}:log-level=none"}


def _vp9(gop: int, crf: int) -> dict[str, str]:
    # Alternate reference frames are hidden but still have to be decoded.
    groups = {"g": str(gop), "keyint_min": str(gop), "auto-alt-ref": "0"}
    return groups | {"crf": str(crf), "b": "0", "deadline": "good", "cpu-used": "4"}


def _mjpeg(gop: int, crf: int) -> dict[str, str]:
    return {"qmin": str(crf), "qmax": str(crf)}


CODECS = {
    "h264": _Codec("libx264", ".mp4", "mp4", 20, (0, 51), _x264),
    "hevc": _Codec("libx265", ".mp4", "mp4", 20, (0, 51), _x265),
    "vp9": _Codec("libvpx-vp9", ".webm", "webm", 28, (0, 63), _vp9),
    # Full range is the only format that all readers of MJPEG agree on.
    "mjpeg": _Codec("mjpeg", ".mkv", "matroska", 4, (1, 31), _mjpeg, "yuvj420p"),
}


@dataclass(frozen=True)
class Settings:
    """Size and encoding of the copies."""

    short_side: int = 256
    """Maximum in pixels. Videos are never enlarged; odd sides are rounded down to even."""
    gop: int = 16
    """Frames per GOP; mjpeg has no GOPs."""
    codec: str = "h264"
    crf: int = CODECS["h264"].crf
    """Quality on the encoder's own scale, lower is better; for mjpeg, the quantizer."""

    def __post_init__(self):
        low, high = CODECS[self.codec].crfs
        if not low <= self.crf <= high:
            raise InputError(f"--crf is {self.crf}; expected {low} to {high} for {self.codec}")
        if self.short_side < 2:
            raise InputError(f"--short-side is {self.short_side}; expected 2 pixels or more")


class Task(NamedTuple):
    """One video to transcode."""

    source: Source
    video: Video
    out: str
    """Absolute path of the folder for the copies."""
    name: str
    """Path of the copy within `out`."""
    settings: Settings

    @classmethod
    def from_json(cls, source: Sequence, video: Sequence, out: str, name: str, settings: Mapping) -> "Task":
        """Builds a task from the fields of `to_json`."""
        return cls(Source(*source), Video(*video), out, name, Settings(**settings))

    def to_json(self) -> list[Any]:
        """The arguments of the functions below that run in a child process."""
        return [*self[:-1], asdict(self.settings)]

    @property
    def target(self) -> Path:
        """Path of the copy."""
        return Path(self.out, self.name)

    @property
    def pixels(self) -> int:
        """Number of pixels of all frames of the copy."""
        height, width = copy_size(self.video, self.settings.short_side)
        return self.video.frames * height * width

    @property
    def work(self) -> int:
        """Number of pixels to read and write."""
        return self.video.frames * self.video.height * self.video.width + self.pixels


class Copy(NamedTuple):
    """A finished copy."""

    video: Video
    """The copy as probed. Its path is `Task.name`, its label 0."""
    source_bytes: int
    copy_bytes: int
    modified_ns: int
    """Modification time of the file; it differs if the journal is out of date."""
    seconds: float
    """Time to make it; 0 if the copy already existed."""
    entry: str = ""
    """The packet index entry, in base64; "" from a journal of earlier versions."""


@dataclass(frozen=True)
class Estimate:
    """Estimated size and time of the missing copies."""

    needed_bytes: int
    seconds: float
    sampled: int
    """Number of videos transcoded for the estimate."""
    workers: int
    """Number of processes that `seconds` assumes; 1 with dask, where it is unknown."""


class Job:
    """Transcodes the videos of a manifest into the folder `out`.

    Raises `InputError` if a copy would overwrite an original.
    """

    def __init__(self, manifest: Manifest, out: Path, settings: Settings, *, journal: Path, pool: WorkerPool):
        self._manifest, self._out, self._journal, self._pool = manifest, out, journal, pool
        paths = [_path_below(video.path, manifest.root) for video in manifest]
        shards = [video.shard for video in manifest]
        names = target_names(zip(shards, paths), CODECS[settings.codec].suffix)
        tasks: dict[tuple[str, str], Task] = {}  # a video listed twice is transcoded once
        for row, (video, path) in enumerate(zip(manifest, paths)):
            key = video.shard, path
            source = manifest.source(row)
            source = source._replace(path=absolute(source.path))  # remote workers have a different working directory
            original = video._replace(path=path, label=0)
            tasks.setdefault(key, Task(source, original, os.path.abspath(out), names[key], settings))
        self._tasks = [tasks[key] for key in zip(shards, paths)]
        part, parts = pool.shard
        self._own = list(tasks.values())[part::parts]
        self._check_originals()
        if pool.is_whole:
            self._remove_unfinished()

    def _check_originals(self) -> None:
        existing = [target for target in (task.target for task in self._own) if target.exists()]
        if not existing:
            return
        originals = {}
        for file in {task.source.path for task in self._tasks}:
            if os.path.isfile(file):
                status = os.stat(file)
                originals[status.st_dev, status.st_ino] = file
        for target in existing:
            status = target.stat()
            if original := originals.get((status.st_dev, status.st_ino)):
                raise InputError(f"{target}: would overwrite the original {original}; name another --out")

    def estimate(self) -> Estimate | None:
        """Transcodes a sample of this part's videos and extrapolates to the rest. Returns None if none of the sample
        can be transcoded."""
        existing: list[Task] = []
        todo: list[Task] = []
        for task in self._own:
            (existing if task.target.exists() else todo).append(task)
        if not all(self._is_done(task) for task in existing[:: max(len(existing) // 4, 1)]):
            todo += existing  # made with other settings, so make them again
        todo.sort(key=lambda task: task.pixels)
        if not todo:
            return Estimate(0, 0.0, 0, 0)
        count = min(_SAMPLED, -(-len(todo) // 4))
        places = {(2 * number + 1) * len(todo) // (2 * count) for number in range(count)}
        sample = [todo[place] for place in sorted(places)]
        todo = [task for place, task in enumerate(todo) if place not in places]
        pool = self._pool
        copies = _transcode_all(sample, pool.journal(self._journal), replace(pool, shard=(0, 1)))
        good = [(task, copy) for task, copy in zip(sample, copies, strict=True) if isinstance(copy, Copy)]
        if not good:
            return None
        bytes_a_pixel = sum(copy.copy_bytes for _, copy in good) / sum(task.pixels for task, _ in good)
        seconds_a_pixel = sum(copy.seconds for _, copy in good) / sum(task.work for task, _ in good)
        needed = bytes_a_pixel * sum(task.pixels for task in todo) - sum(_size(task.target) for task in todo)
        seconds = seconds_a_pixel * sum(task.work for task in todo)
        workers = 1 if pool.scheduler else pool.workers or len(os.sched_getaffinity(0))
        return Estimate(max(round(needed), 0), seconds / workers, len(good), workers)

    def _is_done(self, task: Task) -> bool:
        try:
            return in_child(is_done, task.to_json(), self._pool.timeout_s)
        except InputError:
            return False

    def check_disk(self, estimate: Estimate) -> int:
        """Returns the free space in bytes on the disk of the copies. Raises `InputError` if it is not enough."""
        free = shutil.disk_usage(self._out).free
        needed = estimate.needed_bytes * _SPARE
        if needed > free:
            raise InputError(
                f"{self._out}: needs about {size_text(needed)}, but only {size_text(free)} are free; make room, "
                "or choose another --out, a smaller --short-side or a larger --crf. Copies made for the estimate "
                "are kept"
            )
        return free

    def transcode(self) -> tuple[Manifest, list[Rejected], list[Copy]]:
        """Makes the missing copies of this part of the work. Returns their manifest, in the order of the original one,
        the videos that could not be transcoded, and the copies.

        Raises `InputError` if the disk is full.
        """
        copies = _transcode_all(self._tasks, self._journal, self._pool)
        if self._pool.is_whole and any(_is_stale(task, copy) for task, copy in zip(self._tasks, copies)):
            remove_journals(self._journal)  # copies have changed or gone since; the run below finds the good ones
            copies = _transcode_all(self._tasks, self._journal, self._pool)
        if any(_DISK_FULL in copy for copy in copies if isinstance(copy, Failed)):
            remove_journals(self._journal)  # it would keep the failures
            raise InputError(
                f"{self._out}: {_DISK_FULL}; make room and run the command again; finished copies are kept"
            )
        if self._pool.is_whole:
            self._remove_unfinished()
        videos: list[Video] = []
        entries: dict[int, bytes] = {}
        rejected: list[Rejected] = []
        good: list[Copy] = []
        for original, copy in zip(self._manifest, copies):
            if isinstance(copy, Failed):
                rejected.append(Rejected(original.path, original.label, copy))
            else:
                videos.append(copy.video._replace(label=original.label))
                good.append(copy)
                if copy.entry:
                    entries[key_of(copy.video)] = base64.b64decode(copy.entry)
        manifest = Manifest(
            videos,
            root=self._out,
            classes=self._manifest.classes,
            rejected=self._manifest.rejected + len(rejected),
        )
        manifest.entries = entries
        return manifest, rejected, good

    def compare(self) -> tuple[float, float, int]:
        """Returns (CPU ms to decode a clip of 8 frames of the originals, of the copies, number of videos timed)."""
        tasks = [task for task in self._tasks if task.target.exists()]
        tasks = [tasks[number] for number in np.linspace(0, len(tasks) - 1, min(_COMPARED, len(tasks))).astype(int)]
        results = run(time_decoding, [task.to_json() for task in tasks], journal=self._journal, pool=self._pool)
        times = [each for each in results if not isinstance(each, Failed)]
        before, after = np.mean(times, axis=0).tolist() if times else (0.0, 0.0)
        return before, after, len(times)

    def _remove_unfinished(self) -> None:
        """Removes files that killed runs left; a run still in progress holds a lock on its own."""
        for path in self._out.rglob(_UNFINISHED):
            with contextlib.suppress(OSError), open(path, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()


def _transcode_all(tasks: Sequence[Task], journal: Path, pool: WorkerPool) -> list[Copy | Failed]:
    results = run(transcode, [task.to_json() for task in tasks], journal=journal, pool=pool)
    return [each if isinstance(each, Failed) else Copy(Video(*each[0]), *each[1:]) for each in results]


def target_names(sources: Iterable[tuple[str, str]], suffix: str) -> dict[tuple[str, str], str]:
    """Maps (shard, path) of every video to the path of its copy. `suffix` replaces that of the video, or is appended if
    two copies would otherwise have the same path."""
    names = dict.fromkeys(sources, 0)  # -> how much of the old name to keep
    while True:
        made = {source: _target_name(*source, suffix, kept) for source, kept in names.items()}
        taken = Counter(made.values())
        doubled = [source for source, name in made.items() if taken[name] > 1]
        if not doubled:
            return made
        for source in doubled:
            names[source] += 1


def _target_name(shard: str, path: str, suffix: str, kept: int) -> str:
    if is_frames(path) and kept == 0:  # archery/v1/img_{00001..00300}.jpg
        return (os.path.dirname(path) or "frames") + suffix
    stem, old = os.path.splitext(path)
    if old.lower() == suffix and kept < 2:
        return path
    if kept == 0 and old.lower() in VIDEO_SUFFIXES:
        return stem + suffix
    return (os.path.join(os.path.splitext(shard)[0], path) if kept > 1 else path) + suffix


def _path_below(path: str, root: str | os.PathLike) -> str:
    """A relative path without "..": relative to `root` if the video is below it, otherwise to /."""
    path = os.path.normpath(path)
    if os.path.isabs(path) or path.startswith(".."):
        whole, home = os.path.abspath(os.path.join(root, path)), os.path.abspath(root)
        path = os.path.relpath(whole, home if whole.startswith(os.path.join(home, "")) else "/")
    return path


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _is_stale(task: Task, copy: Copy | Failed) -> bool:
    if isinstance(copy, Failed):
        return False
    target = task.target
    return not target.exists() or (target.stat().st_size, target.stat().st_mtime_ns) != (
        copy.copy_bytes,
        copy.modified_ns,
    )


def copy_size(video: Video, short_side: int) -> tuple[int, int]:
    """Displayed (height, width) of the copy in pixels: even, and not larger than the video."""
    side = min(short_side, video.height, video.width)
    height, width = (max(each // 2 * 2, 2) for each in resized_size(video.height, video.width, side))
    return height, width


def size_text(size: float) -> str:
    """Formats a number of bytes in MiB or GiB."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


# -- in a child process; `task` are the fields of `Task.to_json` --


def transcode(*task: Any) -> Copy:
    """Makes the copy of a task, unless it exists. Raises `InputError`."""
    source, video, _, name, settings = parsed = Task.from_json(*task)
    started, target = time.monotonic(), parsed.target
    tag = _tag(parsed)
    is_there = False
    if target.exists():
        found = _read_tag(target)
        if found.get("made_by") != _MADE_BY:
            raise InputError(f"{target} exists and was not made by {_MADE_BY}, so it is not overwritten")
        if found.get("source") != tag["source"]:
            raise InputError(f"{target} exists and is a copy of {found.get('source')}; name another --out")
        is_there = found == tag
    if not is_there:
        _write_copy(source, video, target, settings, json.dumps(tag))
    copy, entry = probe_packets(target)
    copy = copy._replace(path=name)
    height, width = copy_size(video, settings.short_side)
    if (copy.frames, copy.height, copy.width, copy.rotation, copy.mirrored) != (video.frames, height, width, 0, 0):
        target.unlink()
        raise InputError(f"the copy has {copy.frames} of {video.frames} frames, or their size or orientation is wrong")
    status = target.stat()
    seconds = 0.0 if is_there else time.monotonic() - started
    packed = base64.b64encode(entry).decode()
    return Copy(copy, tag["bytes"], status.st_size, status.st_mtime_ns, seconds, packed)


def is_done(*task: Any) -> bool:
    """Whether the copy exists and was made from this video with these settings."""
    parsed = Task.from_json(*task)
    return _read_tag(parsed.target) == _tag(parsed)


def _tag(task: Task) -> dict[str, Any]:
    """Describes how a copy was made; written into its metadata."""
    video = task.video
    return {
        "made_by": _MADE_BY,
        "source": os.path.join(video.shard, video.path),
        "bytes": size_of(task.source),
        "frames": video.frames,
        "fps": video.fps,
        "rotation": video.rotation,
        **({"mirrored": 1} if video.mirrored else {}),  # omitted if 0, so that copies from older versions stay valid
        **asdict(task.settings),
    }


def _read_tag(path: Path) -> dict[str, Any]:
    """The tag of a copy; {} for other files."""
    try:
        with open_video(path) as container:
            tags = {name.lower(): text for name, text in container.metadata.items()}
        tag = json.loads(tags.get("comment", ""))
    except (InputError, av.error.FFmpegError, json.JSONDecodeError):
        return {}
    return tag if isinstance(tag, dict) else {}


def _write_copy(source: Source, video: Video, target: Path, settings: Settings, tag: str) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(_UNFINISHED.replace("*", uuid.uuid4().hex))
    frames = decode_all(source, frames=video.frames, size=coded_size(video))  # raises `InputError` for a damaged frame
    try:
        with open(unfinished, "wb") as lock:  # see `_remove_unfinished`
            fcntl.flock(lock, fcntl.LOCK_EX)
            _encode(map(_Scaler(video, settings).scale, frames), unfinished, video, settings, tag)
            unfinished.replace(target)
    except (OSError, av.error.FFmpegError) as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(_DISK_FULL) from None
        raise InputError(f"cannot be encoded as {settings.codec} ({str(error.strerror).lower()})") from None
    finally:
        unfinished.unlink(missing_ok=True)


def _encode(frames: Iterable[av.VideoFrame], path: Path, video: Video, settings: Settings, tag: str) -> None:
    codec = CODECS[settings.codec]
    fps = Fraction(video.fps).limit_denominator(1 << 16)
    options = {"fflags": "+bitexact"} | ({"movflags": "+faststart"} if codec.container == "mp4" else {})
    with av.open(ffmpeg_url(path), "w", format=codec.container, options=options) as container:
        container.metadata["comment"] = tag
        encoder_options = codec.options(settings.gop, settings.crf)
        stream = add_video_stream(container, codec.encoder, rate=fps, options=encoder_options)
        encoder = stream.codec_context
        stream.height, stream.width = copy_size(video, settings.short_side)
        stream.pix_fmt = codec.pixel_format
        encoder.time_base = 1 / fps
        for number, frame in enumerate(frames):
            if number == 0:
                encoder.color_range, encoder.colorspace = frame.color_range, frame.colorspace
                encoder.color_primaries, encoder.color_trc = frame.color_primaries, frame.color_trc
            frame.pts, frame.time_base, frame.duration = number, 1 / fps, 1
            frame.pict_type = av.video.frame.PictureType.NONE  # otherwise the encoder would keep the original's type
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


class _Scaler:
    """Converts decoded frames to the size, pixel format and orientation of the copy; colours do not change."""

    def __init__(self, video: Video, settings: Settings):
        shown = copy_size(video, settings.short_side)
        self._height, self._width = shown if video.rotation in (0, 180) else shown[::-1]
        self._turns, self._mirrored = video.rotation // 90, video.mirrored
        self._format = CODECS[settings.codec].pixel_format
        self._reformatter = VideoReformatter()
        self._flags = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INP

    def scale(self, frame: av.VideoFrame) -> av.VideoFrame:
        wants_full = self._format == "yuvj420p"
        if frame.format.is_rgb or len(frame.format.components) < 3:
            is_full = wants_full
        else:
            is_full = frame.color_range == _FULL or frame.format.name.startswith("yuvj")
        # MJPEG has no tag for another matrix.
        to_601 = frame.format.is_rgb or (wants_full and frame.colorspace not in (_UNKNOWN, *_BT601))
        scaled = self._reformatter.reformat(
            frame,
            width=self._width,
            height=self._height,
            format="yuvj420p" if is_full else "yuv420p",
            interpolation=self._flags,
            dst_colorspace=Colorspace.ITU601 if to_601 else None,
            dst_color_range=ColorRange.JPEG if is_full else ColorRange.MPEG,
            threads=1,
        )
        colorspace = scaled.colorspace if to_601 else frame.colorspace
        if is_full != wants_full or self._turns or self._mirrored:
            scaled = self._rebuild(scaled, _range_tables(wants_full) if is_full != wants_full else None)
            scaled.color_primaries, scaled.color_trc = frame.color_primaries, frame.color_trc
        scaled.colorspace, scaled.color_range = colorspace, _FULL if wants_full else _LIMITED
        return scaled

    def _rebuild(self, frame: av.VideoFrame, tables: Sequence[np.ndarray] | None) -> av.VideoFrame:
        planes = [
            np.ndarray((plane.height, plane.width), np.uint8, memoryview(plane), strides=(plane.line_size, 1))
            for plane in frame.planes
        ]
        if tables:
            planes = [table[plane] for table, plane in zip(tables, planes, strict=True)]
        planes = [np.rot90(plane[:, :: -1 if self._mirrored else 1], self._turns) for plane in planes]
        data = np.concatenate([plane.ravel() for plane in planes]).reshape(-1, planes[0].shape[1])
        return av.VideoFrame.from_ndarray(data, format=self._format)


@functools.cache
def _range_tables(to_full: bool) -> list[np.ndarray]:
    """Lookup tables for Y, U and V from limited to full range, or back. FFmpeg's own conversion rounds down, which
    shifts chroma by half a level and green by one."""
    old = np.arange(256.0)
    luma, chroma = ((old - 16) / 219, (old - 128) / 224) if to_full else (old / 255, (old - 128) / 255)
    luma, chroma = (luma * 255, chroma * 255 + 128) if to_full else (luma * 219 + 16, chroma * 224 + 128)
    return [np.rint(each).clip(0, 255).astype(np.uint8) for each in (luma, chroma, chroma)]


def time_decoding(*task: Any) -> tuple[float, float]:
    """CPU ms to decode a clip of 8 frames as in training: (from the original, from its copy)."""
    parsed = Task.from_json(*task)
    original, video, target = fetch(parsed.source), parsed.video, parsed.target
    decodes: list[tuple[Source | Path, Video]] = [(original, video), (target, probe(target))]
    best = [np.inf, np.inf]
    for start in (0.2, 0.7):
        window = frame_positions(
            frames=video.frames, fps=video.fps, num_frames=8, stride=32, target_fps=30, past_end="fit", start=start
        )
        positions = np.unique(window)
        for _ in range(3):  # alternately, so that other load on the machine affects both
            for which, (file, each) in enumerate(decodes):
                began = time.process_time()
                decode_frames(file, positions, size=coded_size(each))
                best[which] = min(best[which], time.process_time() - began)
    return best[0] * 1000, best[1] * 1000
