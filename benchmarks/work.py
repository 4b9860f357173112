"""What every contestant is given: the same clips, decided beforehand."""

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
    """int64 [T], ascending: the k-th picture that the decoder puts out."""
    rectangle: np.ndarray
    """float64 [4]: y0, x0, y1, x1 in pixels; x0 > x1 flips."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """An endless list of clips, those of a training `ClipLoader`, and how they are to be had."""

    manifest: Manifest
    view: View
    seed: int
    batch_size: int
    workers: int
    """Processes, or threads, that decode."""

    def row(self, place: int) -> int:
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
        epoch, row = self._sample(place)
        plan = plan_sample(self.manifest[row], self.view, seed=self.seed, epoch=epoch, sample_id=row)
        return Clip(self.manifest.source(row), plan.positions[plan.picks[0]], plan.rectangles[0])


def repeated(found: Manifest, count: int, index: Path) -> Manifest:
    """The videos as often as makes `count` rows or more, with their packet index in the file `index`."""
    manifest = Manifest(list(found) * -(-count // len(found)))
    write_index(index, found.entries)
    manifest.index = index
    return manifest


class Packets(NamedTuple):
    """Which packets of a file give the pictures of a clip; numbers count those with data, as they lie in it."""

    source: Source
    runs: list[list[int]]
    """Those to feed; the decoder starts afresh at each run."""
    wanted: set[int]
    """Of these, the ones that hold the pictures."""
    in_window: int
    """Packets from the start of the file to the last wanted picture: what is fed without a selection."""


def needed_packets(clip: Clip) -> Packets:
    """What our loader feeds: a selection where the headers allow one, all up to the last wanted otherwise."""
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
    """For every picture that comes out: the number of its packet, and how many had been fed by then."""
    shown, fed_until = [], []
    fed = 0
    with open_video(source) as container:
        stream = video_stream(container)
        stream.codec_context.copy_opaque = True
        for packet in container.demux(stream):
            if packet.size:
                packet.opaque = fed
                fed += 1
            for frame in stream.decode(packet):
                shown.append(frame.opaque)
                fed_until.append(fed)
    return shown, fed_until
