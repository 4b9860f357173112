"""What DALI's worker processes run for one sample: read it, decode it where DALI cannot, say what went wrong.

Nothing here imports torch, and nothing random happens here: the sample is decided by `plan`.
"""

import math
import os
from typing import NamedTuple

import numpy as np

from dali_pipelines.host_decoder import DecodeError, decode_frames
from dali_pipelines.manifest import Manifest, Video, coded_size
from dali_pipelines.plan import PADDING, Order, SamplePlan, View, plan_sample
from dali_pipelines.processes import end_with_parent

DALI_CPU_CODECS = frozenset({"mjpeg", "vp8", "vp9"})
DALI_GPU_CODECS = DALI_CPU_CODECS | {"av1", "h264", "hevc", "mpeg4"}
"""What `fn.decoders.video` reads (DALI 2.4 documentation)."""


class Sample(NamedTuple):
    """What the graph is fed for one sample; each field is an array. T frames, V views."""

    pictures: np.ndarray
    """uint8 [T, H, W, 3], decoded here; one black pixel where `is_host` is false."""
    encoded: np.ndarray
    """uint8 [bytes]: the file, for DALI's decoder; one zero byte where `is_host` is true."""
    positions: np.ndarray
    """int32 [T]: frames for DALI's decoder."""
    rectangles: np.ndarray
    """float32 [V, 4]: y0, x0, y1, x1 in pixels of the pictures."""
    is_host: np.ndarray
    """bool: the pictures are decoded already."""
    transpose: np.ndarray
    """bool: swap height and width after the resize."""
    sample_id: np.ndarray
    """int64: row of the manifest, -1 for padding."""
    packets: np.ndarray
    """int64 [2]: packets read and packets kept (fed to the decoder), where decoded here."""
    fault: np.ndarray
    """uint8 [bytes]: why the sample cannot be read, UTF-8; empty for a good one."""


class ClipSource:
    """DALI's external source: called with a running number, returns the fields of a `Sample`; never raises, never
    ends.

    `table` is a folder written by `Manifest.save_arrays`; `start` the place in `order` of the first call;
    `host_ids` are samples that DALI's decoder has failed on and that are decoded here instead.
    """

    def __init__(
        self,
        *,
        table: str,
        root: str,
        view: View,
        order: Order,
        start: int,
        dali_codecs: frozenset[str],
        host_ids: frozenset[int],
    ):
        self._table = table
        self._root = root
        self._view = view
        self._order = order
        self._start = start
        self._dali_codecs = dali_codecs
        self._host_ids = host_ids
        self._manifest = None

    def __call__(self, info) -> tuple[np.ndarray, ...]:
        return tuple(self.sample(self._start + info.idx_in_epoch))  # DALI rebuilds what it gets: no named tuple

    def sample(self, place: int) -> Sample:
        """The sample at `place` in the order; a black one with its fault where it cannot be read."""
        if self._manifest is None:  # in the worker: mapped, so that all workers share one copy
            end_with_parent()
            self._manifest = Manifest.map_arrays(self._table, self._root)
        epoch, sample_id = self._order.sample(place)
        if sample_id == PADDING:
            return self._black(PADDING, "")
        video = self._manifest[sample_id]
        path = os.path.join(self._root, video.path)
        try:
            plan = plan_sample(video, self._view, seed=self._order.seed, epoch=epoch, sample_id=sample_id)
            if video.codec in self._dali_codecs and sample_id not in self._host_ids:
                return self._encoded(path, plan, sample_id)
            return self._decoded(path, video, plan, sample_id)
        except DecodeError as error:
            return self._black(sample_id, str(error))
        except Exception as error:  # an exception here would end the pipeline: see `Sample.fault`
            return self._black(sample_id, f"{type(error).__name__}: {error}")

    def _encoded(self, path: str, plan: SamplePlan, sample_id: int) -> Sample:
        try:
            encoded = np.fromfile(path, np.uint8)
        except OSError as error:
            raise DecodeError(str(error.strerror or error).lower()) from None
        if not len(encoded):
            raise DecodeError("an empty file")
        return self._sample(plan, sample_id, encoded=encoded)

    def _decoded(self, path: str, video: Video, plan: SamplePlan, sample_id: int) -> Sample:
        distinct, repeats = np.unique(plan.positions, return_inverse=True)
        size = coded_size(video)
        region = _bounds(plan.rectangles, size)
        decoded = decode_frames(path, distinct, size=size, region=region)
        corner = [region[0].start, region[1].start]
        return self._sample(
            plan,
            sample_id,
            pictures=decoded.frames if len(repeats) == len(distinct) else decoded.frames[repeats],
            rectangles=plan.rectangles - [*corner, *corner],
            packets=(decoded.packets_read, decoded.packets_kept),
        )

    def _black(self, sample_id: int, fault: str) -> Sample:
        num_frames = self._view.num_frames
        plan = SamplePlan(np.zeros(num_frames), np.tile([0.0, 0, 1, 1], (self._view.count, 1)), False)
        pictures = np.zeros((num_frames, 1, 1, 3), np.uint8)
        return self._sample(plan, sample_id, pictures=pictures, fault=fault)

    @staticmethod
    def _sample(
        plan: SamplePlan,
        sample_id: int,
        *,
        pictures: np.ndarray | None = None,
        encoded: np.ndarray | None = None,
        rectangles: np.ndarray | None = None,
        packets: tuple[int, int] = (0, 0),
        fault: str = "",
    ) -> Sample:
        return Sample(
            pictures=np.zeros((1, 1, 1, 3), np.uint8) if pictures is None else pictures,
            encoded=np.zeros(1, np.uint8) if encoded is None else encoded,
            positions=plan.positions.astype(np.int32),
            rectangles=(plan.rectangles if rectangles is None else rectangles).astype(np.float32),
            is_host=np.array(pictures is not None),
            transpose=np.array(plan.transpose),
            sample_id=np.array(sample_id, np.int64),
            packets=np.array(packets, np.int64),
            fault=np.frombuffer(fault.encode(errors="replace"), np.uint8),
        )


def _bounds(rectangles: np.ndarray, size: tuple[int, int]) -> tuple[slice, slice]:
    """Rows and columns that the rectangles touch, and one more pixel for the bilinear filter."""
    bounds = []
    for axis in (0, 1):
        ends = rectangles[:, [axis, axis + 2]]
        bounds.append(slice(max(math.floor(ends.min()) - 1, 0), min(math.ceil(ends.max()) + 1, size[axis])))
    return tuple(bounds)
