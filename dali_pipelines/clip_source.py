"""What DALI's worker processes do for one sample: read it, decode it if DALI does not, report what went wrong.

Nothing here imports torch, and nothing here is random: `plan` decides the sample.
"""

import contextlib
import functools
import math
from typing import Any, NamedTuple

import av
import numpy as np

from dali_pipelines.bitstream.parser import UncertainError
from dali_pipelines.crops import Reducer
from dali_pipelines.engines import Routing
from dali_pipelines.errors import InputError, reason
from dali_pipelines.files import Source, fetch, open_video
from dali_pipelines.frame_names import is_frames
from dali_pipelines.host_decoder import (
    check_pixels,
    decode_frames,
    decode_images,
    decode_indexed,
    read_images,
    size_mismatch,
)
from dali_pipelines.manifest import Manifest, Video, coded_size, key_of
from dali_pipelines.packet_index import IndexedVideo, PacketIndex, StaleIndexError, open_header
from dali_pipelines.packets import Remuxed, remux, remux_packets, video_stream
from dali_pipelines.plan import PADDING, EntrySampler, SamplePlan, View, plan_sample
from dali_pipelines.probe import probe
from dali_pipelines.processes import end_with_parent
from dali_pipelines.watch import NOTHING, Progress

MOST_BYTES = 64 << 20
"""Bytes of a clip's frames up to which the graph crops them: 24 frames of 720p, 2 of 4K. The workers crop larger ones,
so that a batch fits into memory whatever its videos."""
_MOST_BYTES_ON_GPU = 1 << 30
"""Bytes of a clip's frames up to which NVDEC decodes them: 32 frames of 4K, or 8 of 8K."""


class Sample(NamedTuple):
    """The graph's input for one sample; each field is an array. N frames; W windows of T frames; V clips."""

    frames: np.ndarray
    """uint8 [N, H, W, 3], decoded here; one black pixel if `is_host` is false."""
    encoded: np.ndarray
    """uint8 [bytes]: a small file with the packets it needs, or images one after the other; one zero byte if `is_host`
    is true."""
    image_ends: np.ndarray
    """int32 [N]: where in `encoded` each image ends; empty if it holds none."""
    size: np.ndarray
    """int32 [2]: height and width of the frames in that file; the video's frame may be a part of them, top left."""
    positions: np.ndarray
    """int32 [N]: which frames of that file to decode."""
    picks: np.ndarray
    """int32 [W, T]: see `SamplePlan`."""
    rectangles: np.ndarray
    """float32 [V, 4]: y0, x0, y1, x1 in pixels of the frames."""
    is_host: np.ndarray
    """bool: the frames are already decoded."""
    transpose: np.ndarray
    """bool: swap height and width after the resize."""
    sample_id: np.ndarray
    """int64: row of the manifest, -1 for padding."""
    packets: np.ndarray
    """int64 [2]: packets read and packets kept (fed to a decoder)."""
    fault: np.ndarray
    """uint8 [bytes]: why the sample cannot be read, UTF-8; empty if it can."""
    fallback: np.ndarray
    """uint8 [bytes]: why it used a fallback, UTF-8; empty if it did not."""


class ClipSource:
    """DALI's external source: called with a running number, it returns the fields of a `Sample`. It never raises and
    never ends.

    table: a folder written by `Manifest.save_arrays`, which also gets the notes for the `Watchdog`.
    index: the packet index file, or None.
    cache: see `files.fetch`.
    start, end: the first call's place in `sampler`, and the first place that nobody will ask for, or None (DALI works
        ahead; from `end` on it gets padding).
    routing: decides which samples are decoded here.
    host_ids: samples that DALI failed on, and that are decoded here instead.
    given_up: samples that are not tried (again), and why.
    max_pixels: the most pixels that a frame may have.
    """

    def __init__(
        self,
        *,
        table: str,
        root: str,
        index: str | None,
        cache: str | None,
        view: View,
        sampler: EntrySampler,
        start: int,
        end: int | None,
        routing: Routing,
        host_ids: frozenset[int],
        given_up: dict[int, str],
        max_pixels: int,
    ):
        self._table = table
        self._root = root
        self._index = index
        self._cache = cache
        self._view = view
        self._sampler = sampler
        self._start, self._end = start, end
        self._routing = routing
        self._host_ids = host_ids
        self._given_up = given_up
        self._max_pixels = max_pixels
        self._opened_index: PacketIndex | None = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A worker starts here, and may never be asked for a sample."""
        end_with_parent()
        self.__dict__.update(state)

    def __call__(self, info: Any) -> tuple[np.ndarray, ...]:
        """The sample at DALI's position `info.idx_in_epoch`."""
        return tuple(self.sample(self._start + info.idx_in_epoch))  # DALI rebuilds what it gets: no named tuple

    def sample(self, place: int) -> Sample:
        """The sample at `place`; black, with its fault, if it cannot be read."""
        epoch, entry = self._sampler.sample(place)
        if self._end is not None and place >= self._end:
            entry = PADDING
        if entry == PADDING:
            return self._black(PADDING, "")
        sample_id, part = divmod(entry, self._view.entries_per_video)
        if why := self._given_up.get(sample_id):
            return self._black(sample_id, why)
        self._progress.at(sample_id)
        try:
            return self._read(epoch, sample_id, part)
        except InputError as error:
            return self._black(sample_id, str(error))
        except MemoryError:
            return self._black(sample_id, "out of memory while reading it")
        except Exception as error:  # an exception here would end the pipeline: see `Sample.fault`
            return self._black(sample_id, f"{type(error).__name__}: {error}")
        finally:
            self._progress.at(NOTHING)

    @functools.cached_property
    def _manifest(self) -> Manifest:
        """The manifest, mapped by the worker, so that all workers share one copy."""
        return Manifest.map_arrays(self._table, self._root)

    @functools.cached_property
    def _progress(self) -> Progress:
        """The worker's own notes."""
        return Progress(self._table)

    def _open_index(self, path: str) -> PacketIndex:
        """The packet index, mapped by the process that reads it. Raises `StaleIndexError`."""
        if self._opened_index is None:
            self._opened_index = PacketIndex(path)
        return self._opened_index

    def _read(self, epoch: int, sample_id: int, part: int) -> Sample:
        video = self._manifest[sample_id]
        check_pixels((video.height, video.width), self._max_pixels)
        plan = plan_sample(video, self._view, seed=self._sampler.seed, epoch=epoch, sample_id=sample_id, part=part)
        source, note = self._manifest.source(sample_id), ""
        if is_frames(source.path):
            return self._from_images(source, video, plan, sample_id)
        if self._index is None or self._cache is not None:  # a cache keeps whole files
            source = self._fetch(source, video)
        if self._index is not None:
            try:
                indexed = IndexedVideo(source, self._open_index(self._index).entry(key_of(video)))
                return self._make(indexed, video, plan, sample_id, note=source.note)
            except (UncertainError, InputError) as error:
                note = f"read without the packet index: {error}"
            except Exception as error:  # nothing in an index may become a fault of the video
                note = f"read without the packet index: {type(error).__name__}: {error}"
        source = self._fetch(source, video)
        return self._make(source, video, plan, sample_id, note=note or source.note)

    def _from_images(self, source: Source, video: Video, plan: SamplePlan, sample_id: int) -> Sample:
        size, fallback = coded_size(video), ""
        if self._routing.engine_for(video, sample_id) == "nvdec":
            if _decoded_bytes(plan, size) <= _MOST_BYTES_ON_GPU:
                images = [image.data for image in read_images(source, plan.positions, size=size, cache=self._cache)]
                return self._sample(
                    plan,
                    sample_id,
                    encoded=np.frombuffer(b"".join(images), np.uint8),
                    image_ends=np.cumsum(list(map(len, images))),
                    size=size,
                    packets=(len(images), len(images)),
                )
            fallback = "not by nvJPEG: its frames would take too much memory"
        return self._decoded(source, video, plan, sample_id, fallback=fallback, note="")

    def _fetch(self, source: Source, video: Video) -> Source:
        return fetch(source, self._cache, problem=lambda found: _other_video(found, video))

    def _make(
        self, source: Source | IndexedVideo, video: Video, plan: SamplePlan, sample_id: int, *, note: str
    ) -> Sample:
        """`note` is the `fallback` if there is no other. Also raises `UncertainError` for an indexed video: then the
        demuxer must find its packets."""
        fallback = ""
        engine = self._routing.engine_for(video, sample_id)
        if engine != "host" and sample_id not in self._host_ids:
            refusal = self._routing.refusal(video.codec, video.pixel_format, coded_size(video))
            most = _MOST_BYTES_ON_GPU if self._routing.on_gpu else MOST_BYTES
            if not refusal and _decoded_bytes(plan, coded_size(video)) > most:
                refusal = "its frames would take too much memory"
            if not refusal:
                try:
                    file = self._remux(source, video, plan.positions)
                    return self._encoded(file, plan, sample_id, note)
                except StaleIndexError:
                    raise
                except UncertainError as error:
                    refusal = str(error)
            fallback = f"not by {'DALI' if engine == 'dali' else 'NVDEC'}: {refusal}"
        return self._decoded(source, video, plan, sample_id, fallback=fallback, note=note)

    def _remux(self, source: Source | IndexedVideo, video: Video, positions: np.ndarray) -> Remuxed:
        uncropped = self._routing.engine == "nvdec"
        with contextlib.ExitStack() as stack:
            try:
                if isinstance(source, IndexedVideo):
                    context = source.stream.context()
                    template = video_stream(open_header(source.stream))
                    file = remux_packets(source, template, context, positions, uncropped=uncropped)
                else:
                    container = stack.enter_context(open_video(source))
                    context = video_stream(container).codec_context
                    file = remux(container, positions, uncropped=uncropped)
            except av.error.FFmpegError as error:
                raise InputError(reason(error)) from None
            self._routing.check(file, context)
            if difference := size_mismatch((context.height, context.width), coded_size(video)):
                raise UncertainError(difference)
        return file

    def _encoded(self, file: Remuxed, plan: SamplePlan, sample_id: int, fallback: str) -> Sample:
        return self._sample(
            plan,
            sample_id,
            encoded=file.encoded,
            size=file.size,
            positions=file.positions,
            packets=(file.packets_read, file.packets_kept),
            fallback=fallback,
        )

    def _decoded(
        self,
        source: Source | IndexedVideo,
        video: Video,
        plan: SamplePlan,
        sample_id: int,
        *,
        fallback: str,
        note: str,
    ) -> Sample:
        size = coded_size(video)
        region = bounds(plan.rectangles, size)
        corner = [region[0].start, region[1].start]
        rectangles, reduce = plan.rectangles - [*corner, *corner], None
        cut_size = region[0].stop - region[0].start, region[1].stop - region[1].start
        if _decoded_bytes(plan, cut_size) > MOST_BYTES:
            reduce = Reducer(rectangles, crop_size=self._view.crop_size, size=cut_size)
            rectangles = reduce.rectangles
        if isinstance(source, IndexedVideo):
            decoded = decode_indexed(source, plan.positions, size=size, region=region, reduce=reduce)
        elif is_frames(source.path):
            decoded = decode_images(source, plan.positions, size=size, region=region, reduce=reduce, cache=self._cache)
        else:
            decoded = decode_frames(source, plan.positions, size=size, region=region, reduce=reduce)
        return self._sample(
            plan,
            sample_id,
            frames=decoded.frames,
            rectangles=rectangles,
            packets=(decoded.packets_read, decoded.packets_kept),
            fallback=fallback or decoded.fallback or note,
        )

    def _black(self, sample_id: int, fault: str) -> Sample:
        plan = SamplePlan(
            positions=np.zeros(1),
            picks=np.zeros((self._view.windows_per_entry, self._view.num_frames)),
            rectangles=np.tile([0.0, 0, 1, 1], (self._view.clips_per_entry, 1)),
            transpose=False,
        )
        return self._sample(plan, sample_id, frames=np.zeros((1, 1, 1, 3), np.uint8), fault=fault)

    @staticmethod
    def _sample(
        plan: SamplePlan,
        sample_id: int,
        *,
        frames: np.ndarray | None = None,
        encoded: np.ndarray | None = None,
        image_ends: np.ndarray | None = None,
        size: tuple[int, int] = (1, 1),
        positions: np.ndarray | None = None,
        rectangles: np.ndarray | None = None,
        packets: tuple[int, int] = (0, 0),
        fault: str = "",
        fallback: str = "",
    ) -> Sample:
        return Sample(
            frames=np.zeros((1, 1, 1, 3), np.uint8) if frames is None else frames,
            encoded=np.zeros(1, np.uint8) if encoded is None else encoded,
            image_ends=np.empty(0, np.int32) if image_ends is None else image_ends.astype(np.int32),
            size=np.array(size, np.int32),
            positions=(plan.positions if positions is None else positions).astype(np.int32),
            picks=plan.picks.astype(np.int32),
            rectangles=(plan.rectangles if rectangles is None else rectangles).astype(np.float32),
            is_host=np.array(frames is not None),
            transpose=np.array(plan.transpose),
            sample_id=np.array(sample_id, np.int64),
            packets=np.array(packets, np.int64),
            fault=np.frombuffer(fault.encode(errors="replace"), np.uint8),
            fallback=np.frombuffer(fallback.encode(errors="replace"), np.uint8),
        )


def _other_video(source: Source, expected: Video) -> str:
    """How the fetched file differs from its row of the manifest; "" if it does not."""
    try:
        found = probe(source, max_pixels=2**31 - 1)  # decoding checks the limit
    except InputError as error:
        return str(error)
    for name in ("codec", "width", "height", "frames"):
        if getattr(found, name) != getattr(expected, name):
            return f"its {name} is {getattr(found, name)}, the manifest says {getattr(expected, name)}"
    return ""


def _decoded_bytes(plan: SamplePlan, size: tuple[int, int]) -> int:
    return 3 * size[0] * size[1] * max(len(plan.positions), plan.picks.size)


def bounds(rectangles: np.ndarray, size: tuple[int, int]) -> tuple[slice, slice]:
    """Rows and columns that the rectangles touch, and one more pixel for the bilinear filter."""
    rows, columns = (
        slice(max(math.floor(ends.min()) - 1, 0), min(math.ceil(ends.max()) + 1, side))
        for ends, side in zip((rectangles[:, [0, 2]], rectangles[:, [1, 3]]), size, strict=True)
    )
    return rows, columns
