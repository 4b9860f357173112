"""The clips that all contestants decode, chosen beforehand."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dali_pipelines.bitstream.parser import UncertainError
from dali_pipelines.files import Source, open_video
from dali_pipelines.manifest import Manifest
from dali_pipelines.packet_index import write_index
from dali_pipelines.packets import PacketReader, video_stream
from dali_pipelines.plan import EntrySampler, View, plan_sample


class Clip(NamedTuple):
    """One clip to decode."""

    source: Source
    positions: np.ndarray
    """int64 [T], ascending: frame numbers in decoder output order, from 0."""
    rectangle: np.ndarray
    """float64 [4]: y0, x0, y1, x1 in pixels; flipped if x0 > x1."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """The endless list of clips of a training `ClipLoader`, and how to load them."""

    manifest: Manifest
    view: View
    seed: int
    batch_size: int
    workers: int
    """Processes or threads that decode."""

    def row(self, place: int) -> int:
        """Row of the manifest of the clip at `place`."""
        return self._sample(place)[1]

    def _sample(self, place: int) -> tuple[int, int]:
        """(epoch, row of the manifest)."""
        sampler = EntrySampler(
            rows=len(self.manifest),
            training=True,
            seed=self.seed,
            step_entries=self.batch_size,
            rank=0,
            world_size=1,
        )
        return sampler.sample(place)

    def clip(self, place: int) -> Clip:
        """The clip at `place`, from 0."""
        epoch, row = self._sample(place)
        plan = plan_sample(self.manifest[row], self.view, seed=self.seed, epoch=epoch, sample_id=row)
        return Clip(self.manifest.source(row), plan.positions[plan.picks[0]], plan.rectangles[0])


def repeated(found: Manifest, count: int, index: Path) -> Manifest:
    """The manifest of `found`, repeated until it has at least `count` rows. Writes its packet index to `index`."""
    manifest = Manifest(list(found) * -(-count // len(found)))
    write_index(index, found.entries)
    manifest.index = index
    return manifest


class Packets(NamedTuple):
    """The packets of a file that a clip needs. Numbers count the packets with data, in file order."""

    source: Source
    runs: list[list[int]]
    """Packets to feed; the decoder is flushed before each run except the first."""
    wanted: set[int]
    """The packets of the requested frames."""
    in_window: int
    """Number of packets from the start of the file to the last requested frame: those fed without selection."""


def needed_packets(clip: Clip) -> Packets:
    """The packets that our loader feeds: a selection if the headers allow it, otherwise all up to the last requested
    frame."""
    shown, fed_until = _decode_all(clip.source)
    in_window = fed_until[int(clip.positions[-1])]
    try:
        with open_video(clip.source) as container:
            runs, shown = PacketReader(container).select(np.unique(clip.positions))
    except UncertainError:
        runs = [list(range(in_window))]
    wanted = {shown[position] for position in clip.positions.tolist()}
    return Packets(clip.source, runs, wanted, in_window)


@lru_cache
def _decode_all(source: Source) -> tuple[list[int], list[int]]:
    """For every output frame: the number of its packet, and the number of packets fed by then."""
    shown: list[int] = []
    fed_until: list[int] = []
    fed = 0
    with open_video(source) as container:
        stream = video_stream(container)
        stream.codec_context.copy_opaque = True
        for packet in container.demux(stream):
            if packet.size:
                packet.opaque = fed
                fed += 1
            for frame in stream.decode(packet):
                assert isinstance(frame.opaque, int)
                shown.append(frame.opaque)
                fed_until.append(fed)
    return shown, fed_until
