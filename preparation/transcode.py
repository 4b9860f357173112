"""Makes copies of videos that decode fast: small pictures, short closed groups, and few that others refer to.

Picture k of the copy is picture k of the original as a decoder puts it out, turned as it is shown, evenly timed.
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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np

from common.child_process import in_child
from common.worker_pool import Failed, WorkerPool, remove_journals, run
from dali_pipelines.crops import resized_size
from dali_pipelines.errors import InputError
from dali_pipelines.files import Source, absolute, fetch, ffmpeg_url, open_video, size_of
from dali_pipelines.folders import VIDEO_SUFFIXES
from dali_pipelines.host_decoder import decode_all, decode_frames
from dali_pipelines.manifest import Manifest, Video, coded_size, key_of, probe, probe_packets
from dali_pipelines.sampling import frame_positions
from preparation.index import Rejected

_SAMPLED = 16  # videos that tell how large and how slow the others will be
_COMPARED = 32  # videos whose decoding is timed, before and after
_SPARE = 1.1  # of the estimated size: it is one of a sample
_DISK_FULL = "no space is left on the disk"
_UNFINISHED = ".transcode-*.part"
_MADE_BY = "prepare.py transcode"
_UNKNOWN, _BT601 = 2, (5, 6)  # FFmpeg's numbers of colour spaces
_LIMITED, _FULL = 1, 2  # and of ranges


class _Codec(NamedTuple):
    encoder: str
    suffix: str
    container: str
    crf: int
    """Where one is not asked for: about the same quality with every codec."""
    crfs: tuple[int, int]
    """The lowest and the highest."""
    options: Callable[[int, int], dict[str, str]]
    """Of the encoder, for (pictures a group, crf)."""
    pixel_format: str = "yuv420p"


def _x264(gop: int, crf: int) -> dict[str, str]:
    # Without b-pyramid no B picture is referred to. Entropy decoding by CABAC takes more time than all else does.
    groups = f"keyint={gop}:min-keyint={gop}:scenecut=0:open-gop=0:bframes=3:b-adapt=0:b-pyramid=none"
    return {"preset": "medium", "crf": str(crf), "x264-params": f"{groups}:cabac=0"}


def _x265(gop: int, crf: int) -> dict[str, str]:
    groups = f"keyint={gop}:min-keyint={gop}:scenecut=0:open-gop=0:bframes=3:b-adapt=0:b-pyramid=0"
    one_thread = "pools=none:frame-threads=1:wpp=0"
    return {"preset": "medium", "crf": str(crf), "x265-params": f"{groups}:{one_thread}:log-level=none"}


def _vp9(gop: int, crf: int) -> dict[str, str]:
    # Alternate reference pictures are hidden ones: they would have to be decoded as well.
    groups = {"g": str(gop), "keyint_min": str(gop), "auto-alt-ref": "0"}
    return groups | {"crf": str(crf), "b": "0", "deadline": "good", "cpu-used": "4"}


def _mjpeg(gop: int, crf: int) -> dict[str, str]:
    return {"qmin": str(crf), "qmax": str(crf)}


CODECS = {
    "h264": _Codec("libx264", ".mp4", "mp4", 20, (0, 51), _x264),
    "hevc": _Codec("libx265", ".mp4", "mp4", 20, (0, 51), _x265),
    "vp9": _Codec("libvpx-vp9", ".webm", "webm", 28, (0, 63), _vp9),
    # The only format that all readers of MJPEG agree on: full range.
    "mjpeg": _Codec("mjpeg", ".mkv", "matroska", 4, (1, 31), _mjpeg, "yuvj420p"),
}


@dataclass(frozen=True)
class Settings:
    """What the copies are like."""

    short_side: int = 256
    """Pixels; smaller videos keep theirs, but for an odd one that becomes even."""
    gop: int = 16
    """Pictures of a group; mjpeg has none."""
    codec: str = "h264"
    crf: int = CODECS["h264"].crf
    """Quality on the encoder's own scale, lower is better; for mjpeg it is the quantizer."""

    def __post_init__(self):
        low, high = CODECS[self.codec].crfs
        if not low <= self.crf <= high:
            raise InputError(f"--crf is {self.crf}; expected {low} to {high} for {self.codec}")
        if self.short_side < 2:
            raise InputError(f"--short-side is {self.short_side}; expected 2 pixels or more")


class Task(NamedTuple):
    """One video to transcode: the arguments of `transcode`."""

    source: Source
    video: Video
    out: str
    """Absolute path of the folder of the copies."""
    name: str
    """Path of the copy within `out`."""
    settings: dict[str, Any]
    """The fields of `Settings`."""

    @property
    def target(self) -> Path:
        return Path(self.out, self.name)

    @property
    def pixels(self) -> int:
        """Pixels of all frames of the copy."""
        height, width = copy_size(self.video, self.settings["short_side"])
        return self.video.frames * height * width

    @property
    def work(self) -> int:
        """Pixels to read and to write."""
        return self.video.frames * self.video.height * self.video.width + self.pixels


class Copy(NamedTuple):
    """What became of one video."""

    video: Video
    """As it was found in the new file; its path is the one it is given, its label 0."""
    source_bytes: int
    copy_bytes: int
    modified_ns: int
    """When the file was written: it tells a journal that is out of date."""
    seconds: float
    """That it took; 0 where the copy was there."""
    entry: str = ""
    """For the packet index, in base64; "" from a journal of earlier versions."""


@dataclass(frozen=True)
class Estimate:
    """Of what is to be made yet."""

    needed_bytes: int
    seconds: float
    sampled: int
    """Videos that were transcoded for it."""
    workers: int
    """Processes that the time is counted for; 1 with dask, which does not say how many there will be."""


class Job:
    """The copies of a manifest's videos below the folder `out`. Raises `InputError` where they would be in the way of
    the originals."""

    def __init__(self, manifest: Manifest, out: Path, settings: Settings, *, journal: Path, crew: WorkerPool):
        self._manifest, self._out, self._journal, self._crew = manifest, out, journal, crew
        rows = [manifest[row] for row in range(len(manifest))]
        paths = [_below(video.path, manifest.root) for video in rows]
        names = target_names(zip([video.shard for video in rows], paths), CODECS[settings.codec].suffix)
        tasks = {}  # a video that is listed twice is transcoded once
        for row, (video, path) in enumerate(zip(rows, paths)):
            key = video.shard, path
            source = video._replace(path=path, label=0)
            name = names[key]
            place, offset, size, *_ = manifest.source(row)
            place = Source(absolute(place), offset, size)  # workers elsewhere have another working folder
            tasks.setdefault(key, Task(place, source, os.path.abspath(out), name, asdict(settings)))
        self._tasks = [tasks[video.shard, path] for video, path in zip(rows, paths)]
        part, parts = crew.shard
        self._own = list(tasks.values())[part::parts]
        self._check_originals()
        if crew.is_whole:
            self._remove_unfinished()

    def _check_originals(self) -> None:
        there = [target for target in (task.target for task in self._own) if target.exists()]
        if not there:
            return
        originals = {}
        for file in {task.source.path for task in self._tasks}:
            if os.path.isfile(file):
                status = os.stat(file)
                originals[status.st_dev, status.st_ino] = file
        for target in there:
            status = target.stat()
            if original := originals.get((status.st_dev, status.st_ino)):
                raise InputError(f"{target}: would overwrite the original {original}; name another --out")

    def estimate(self) -> Estimate | None:
        """Transcodes a few videos of this part of the work, and tells what the others need; None where none of the few
        can be transcoded."""
        there, todo = [], []
        for task in self._own:
            (there if task.target.exists() else todo).append(task)
        if not all(self._is_done(task) for task in there[:: max(len(there) // 4, 1)]):
            todo += there  # made with other settings: they are made anew
        todo.sort(key=lambda task: task.pixels)
        if not todo:
            return Estimate(0, 0.0, 0, 0)
        count = min(_SAMPLED, -(-len(todo) // 4))
        places = {(2 * number + 1) * len(todo) // (2 * count) for number in range(count)}
        sample = [todo[place] for place in sorted(places)]
        todo = [task for place, task in enumerate(todo) if place not in places]
        crew = self._crew
        copies = self._run(sample, crew.journal(self._journal), replace(crew, shard=(0, 1)))
        good = [(task, copy) for task, copy in zip(sample, copies, strict=True) if isinstance(copy, Copy)]
        if not good:
            return None
        bytes_a_pixel = sum(copy.copy_bytes for _, copy in good) / sum(task.pixels for task, _ in good)
        seconds_a_pixel = sum(copy.seconds for _, copy in good) / sum(task.work for task, _ in good)
        needed = bytes_a_pixel * sum(task.pixels for task in todo) - sum(_size(task.target) for task in todo)
        seconds = seconds_a_pixel * sum(task.work for task in todo)
        workers = 1 if crew.scheduler else crew.workers or len(os.sched_getaffinity(0))
        return Estimate(max(round(needed), 0), seconds / workers, len(good), workers)

    def _is_done(self, task: Task) -> bool:
        try:
            return in_child(is_done, task, self._crew.timeout_s)
        except InputError:
            return False

    def check_disk(self, estimate: Estimate) -> int:
        """Bytes that are free where the copies go. Raises `InputError` where they are not enough."""
        free = shutil.disk_usage(self._out).free
        needed = estimate.needed_bytes * _SPARE
        if needed > free:
            raise InputError(
                f"{self._out}: about {size_text(needed)} are needed, {size_text(free)} are free; make room, or name "
                "another --out, a smaller --short-side or a larger --crf. What was transcoded for this estimate stays"
            )
        return free

    def transcode(self) -> tuple[Manifest, list[Rejected], list[Copy]]:
        """Makes what is missing: the new manifest, in the order of the old one, what is not in it, and the copies.

        Of a part of the work (`crew.shard`), those of this part.
        """
        copies = self._run(self._tasks, self._journal, self._crew)
        if self._crew.is_whole and any(_is_stale(task, copy) for task, copy in zip(self._tasks, copies)):
            remove_journals(
                self._journal
            )  # somebody has changed or removed copies since; the others are found to be done
            copies = self._run(self._tasks, self._journal, self._crew)
        if any(_DISK_FULL in copy for copy in copies if isinstance(copy, Failed)):
            remove_journals(self._journal)  # it would remember the failures
            raise InputError(f"{self._out}: {_DISK_FULL}; make room and run the command again: what is done stays done")
        if self._crew.is_whole:
            self._remove_unfinished()
        videos, entries, rejected, good = [], {}, [], []
        for row, copy in enumerate(copies):
            path, label = self._manifest[row][:2]
            if isinstance(copy, Failed):
                rejected.append(Rejected(path, label, copy))
            else:
                videos.append(copy.video._replace(label=label))
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
        """(ms of CPU time to decode a clip of 8 frames of the originals, of the copies, videos that were tried)."""
        tasks = [task for task in self._tasks if task.target.exists()]
        tasks = [tasks[number] for number in np.linspace(0, len(tasks) - 1, min(_COMPARED, len(tasks))).astype(int)]
        times = run(time_decoding, tasks, journal=self._journal, pool=self._crew)
        times = [each for each in times if not isinstance(each, Failed)]
        before, after = np.mean(times, axis=0).tolist() if times else (0.0, 0.0)
        return before, after, len(times)

    def _run(self, tasks: Sequence[Task], journal: Path, crew: WorkerPool) -> list[Copy | Failed]:
        found = run(transcode, tasks, journal=journal, pool=crew)
        return [each if isinstance(each, Failed) else Copy(Video(*each[0]), *each[1:]) for each in found]

    def _remove_unfinished(self) -> None:
        """What kills have left; another run that is under way keeps a lock on its own."""
        for path in self._out.rglob(_UNFINISHED):
            with contextlib.suppress(OSError), open(path, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()


def target_names(sources: Iterable[tuple[str, str]], suffix: str) -> dict[tuple[str, str], str]:
    """(shard, path) of every video -> the path of its copy: with `suffix` for its own, or after its own where two
    would have the same."""
    names = dict.fromkeys(sources, 0)  # -> how much of the old name is kept
    while True:
        made = {source: _name(*source, suffix, kept) for source, kept in names.items()}
        taken = Counter(made.values())
        doubled = [source for source, name in made.items() if taken[name] > 1]
        if not doubled:
            return made
        for source in doubled:
            names[source] += 1


def _name(shard: str, path: str, suffix: str, kept: int) -> str:
    stem, old = os.path.splitext(path)
    if old.lower() == suffix and kept < 2:
        return path
    if kept == 0 and old.lower() in VIDEO_SUFFIXES:
        return stem + suffix
    return (os.path.join(os.path.splitext(shard)[0], path) if kept > 1 else path) + suffix


def _below(path: str, root: Path) -> str:
    """`path` as one below a folder, wherever it is."""
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
    """(height, width) of the copy, as shown: even, and not larger than the video."""
    side = min(short_side, video.height, video.width)
    height, width = (max(each // 2 * 2, 2) for each in resized_size(video.height, video.width, side))
    return height, width


def size_text(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


# -- in a child process --


def transcode(source: list, video: list, out: str, name: str, settings: dict) -> Copy:
    """Makes the copy `name` of the video in `source` (a `Source`), unless it is there. Raises `InputError`."""
    started = time.monotonic()
    video, settings, target = Video(*video), Settings(**settings), Path(out, name)
    tag = _tag(Source(*source), video, settings)
    is_there = False
    if target.exists():
        found = _read_tag(target)
        if found.get("made_by") != _MADE_BY:
            raise InputError(f"{target} exists, and is no copy made by {_MADE_BY}; it is not overwritten")
        if found.get("source") != tag["source"]:
            raise InputError(f"{target} exists, and is a copy of {found.get('source')}; name another --out")
        is_there = found == tag
    if not is_there:
        _write(Source(*source), video, target, settings, json.dumps(tag))
    copy, entry = probe_packets(target)
    copy = copy._replace(path=name)
    height, width = copy_size(video, settings.short_side)
    if (copy.frames, copy.height, copy.width, copy.rotation, copy.mirrored) != (video.frames, height, width, 0, 0):
        target.unlink()
        raise InputError(f"{copy.frames} of its {video.frames} pictures are in the copy, or they are turned or cut")
    status = target.stat()
    seconds = 0.0 if is_there else time.monotonic() - started
    packed = base64.b64encode(entry).decode()
    return Copy(copy, tag["bytes"], status.st_size, status.st_mtime_ns, seconds, packed)


def is_done(source: list, video: list, out: str, name: str, settings: dict) -> bool:
    """Whether the copy is there, of this video and with these settings."""
    return _read_tag(Path(out, name)) == _tag(Source(*source), Video(*video), Settings(**settings))


def _tag(source: Source, video: Video, settings: Settings) -> dict:
    """What a copy says of how it was made."""
    return {
        "made_by": _MADE_BY,
        "source": os.path.join(video.shard, video.path),
        "bytes": size_of(source),
        "frames": video.frames,
        "fps": video.fps,
        "rotation": video.rotation,
        **({"mirrored": 1} if video.mirrored else {}),  # not in others: copies of before there was one stay good
        **asdict(settings),
    }


def _read_tag(path: Path) -> dict:
    """What an earlier run has noted in a copy; {} in other files."""
    try:
        with open_video(path) as container:
            tags = {name.lower(): text for name, text in container.metadata.items()}
        tag = json.loads(tags.get("comment", ""))
    except (InputError, av.error.FFmpegError, json.JSONDecodeError):
        return {}
    return tag if isinstance(tag, dict) else {}


def _write(source: Source, video: Video, target: Path, settings: Settings, tag: str) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(_UNFINISHED.replace("*", uuid.uuid4().hex))
    try:
        with open(unfinished, "wb") as lock:  # see `_remove_unfinished`
            fcntl.flock(lock, fcntl.LOCK_EX)
            _encode(_pictures(source, video, settings), unfinished, video, settings, tag)
            unfinished.replace(target)
    except (OSError, av.error.FFmpegError) as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(_DISK_FULL) from None
        raise InputError(f"cannot be encoded as {settings.codec} ({error.strerror.lower()})") from None
    finally:
        unfinished.unlink(missing_ok=True)


def _encode(pictures: Iterable[av.VideoFrame], path: Path, video: Video, settings: Settings, tag: str) -> None:
    codec = CODECS[settings.codec]
    fps = Fraction(video.fps).limit_denominator(1 << 16)
    options = {"fflags": "+bitexact"} | ({"movflags": "+faststart"} if codec.container == "mp4" else {})
    with av.open(ffmpeg_url(path), "w", format=codec.container, options=options) as container:
        container.metadata["comment"] = tag
        stream = container.add_stream(codec.encoder, rate=fps, options=codec.options(settings.gop, settings.crf))
        encoder = stream.codec_context
        stream.height, stream.width = copy_size(video, settings.short_side)
        stream.pix_fmt = codec.pixel_format
        encoder.thread_count = 1  # the processes around it encode others
        encoder.time_base = 1 / fps
        for number, picture in enumerate(pictures):
            if number == 0:
                encoder.color_range, encoder.colorspace = picture.color_range, picture.colorspace
                encoder.color_primaries, encoder.color_trc = picture.color_primaries, picture.color_trc
            picture.pts, picture.time_base, picture.duration = number, 1 / fps, 1
            picture.pict_type = av.video.frame.PictureType.NONE  # the original's would be forced on it
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))


def _pictures(source: Source, video: Video, settings: Settings) -> Iterator[av.VideoFrame]:
    """Those of the original, as they are to be encoded. Raises `InputError` where one is damaged or missing."""
    return map(_Scaler(video, settings).scale, decode_all(source, frames=video.frames, size=coded_size(video)))


class _Scaler:
    """Gives pictures the size, the format and the direction of the copy; the colours stay what they are."""

    def __init__(self, video: Video, settings: Settings):
        shown = copy_size(video, settings.short_side)
        self._height, self._width = shown if video.rotation in (0, 180) else shown[::-1]
        self._turns, self._mirrored = video.rotation // 90, video.mirrored
        self._format = CODECS[settings.codec].pixel_format
        self._reformatter = av.video.reformatter.VideoReformatter()
        flags = av.video.reformatter.Interpolation
        self._flags = flags.BICUBIC | flags.ACCURATE_RND | flags.FULL_CHR_H_INP

    def scale(self, picture: av.VideoFrame) -> av.VideoFrame:
        wants_full = self._format == "yuvj420p"
        if picture.format.is_rgb or len(picture.format.components) < 3:
            is_full = wants_full
        else:
            is_full = picture.color_range == _FULL or picture.format.name.startswith("yuvj")
        # MJPEG has no tag for another matrix.
        to_601 = picture.format.is_rgb or (wants_full and picture.colorspace not in (_UNKNOWN, *_BT601))
        scaled = self._reformatter.reformat(
            picture,
            width=self._width,
            height=self._height,
            format="yuvj420p" if is_full else "yuv420p",
            interpolation=self._flags,
            dst_colorspace="itu601" if to_601 else None,
            dst_color_range="JPEG" if is_full else "MPEG",
            threads=1,
        )
        colorspace = scaled.colorspace if to_601 else picture.colorspace
        if is_full != wants_full or self._turns or self._mirrored:
            scaled = self._rebuild(scaled, _range_tables(wants_full) if is_full != wants_full else None)
            scaled.color_primaries, scaled.color_trc = picture.color_primaries, picture.color_trc
        scaled.colorspace, scaled.color_range = colorspace, _FULL if wants_full else _LIMITED
        return scaled

    def _rebuild(self, picture: av.VideoFrame, tables: Sequence[np.ndarray] | None) -> av.VideoFrame:
        planes = [np.ndarray((p.height, p.width), np.uint8, p, strides=(p.line_size, 1)) for p in picture.planes]
        if tables:
            planes = [table[plane] for table, plane in zip(tables, planes, strict=True)]
        planes = [np.rot90(plane[:, :: -1 if self._mirrored else 1], self._turns) for plane in planes]
        data = np.concatenate([plane.ravel() for plane in planes]).reshape(-1, planes[0].shape[1])
        return av.VideoFrame.from_ndarray(data, format=self._format)


@functools.cache
def _range_tables(to_full: bool) -> list[np.ndarray]:
    """New values of Y, U and V from limited to full range, or back. FFmpeg's own conversion rounds down: half a level
    of chroma, one of green."""
    old = np.arange(256.0)
    luma, chroma = ((old - 16) / 219, (old - 128) / 224) if to_full else (old / 255, (old - 128) / 255)
    luma, chroma = (luma * 255, chroma * 255 + 128) if to_full else (luma * 219 + 16, chroma * 224 + 128)
    return [np.rint(each).clip(0, 255).astype(np.uint8) for each in (luma, chroma, chroma)]


def time_decoding(source: list, video: list, out: str, name: str, settings: dict) -> tuple[float, float]:
    """ms of CPU time for a clip of 8 frames, as training draws them, out of the original and out of its copy."""
    video, original = Video(*video), fetch(Source(*source))
    copy = probe(Path(out, name))
    best = [np.inf, np.inf]
    for start in (0.2, 0.7):
        window = {"num_frames": 8, "stride": 32, "target_fps": 30, "past_end": "fit", "start": start}
        positions = np.unique(frame_positions(frames=video.frames, fps=video.fps, **window))
        for _ in range(3):  # in turn: what else the machine does meets both
            for which, (path, each) in enumerate(((original, video), (os.path.join(out, name), copy))):
                began = time.process_time()
                decode_frames(path, positions, size=coded_size(each))
                best[which] = min(best[which], time.process_time() - began)
    return best[0] * 1000, best[1] * 1000
