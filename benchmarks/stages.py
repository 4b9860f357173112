"""CPU time per clip of each stage of our loader on the CPU, in one process."""

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.work import Work
from dali_pipelines.clip_source import bounds
from dali_pipelines.cpu_cut import cut_clips
from dali_pipelines.graph import Cut
from dali_pipelines.host_decoder import decode_indexed, set_up
from dali_pipelines.manifest import coded_size, key_of
from dali_pipelines.packet_index import IndexedVideo, StaleIndexError, open_index
from dali_pipelines.plan import plan_sample

_CLIPS, _TURNS = 32, 3


def stages(name: str, work: Work) -> dict[str, float]:
    """CPU ms per clip of each stage except handing over, which is the remainder. The first turn is a warm-up; the
    fastest of the others counts. {} if no clip is in the packet index. `name` is required by `attempt` and not used."""
    torch.set_num_threads(1)
    turns = [_turn(work) for _ in range(1 + _TURNS)][1:]
    return min(turns, key=lambda turn: sum(turn.values()))


def _turn(work: Work) -> dict[str, float]:
    spent: dict[str, float] = defaultdict(float)

    def timed(stage: str, function: Callable, *arguments: Any, **keywords: Any) -> Any:
        started = time.process_time()
        result = function(*arguments, **keywords)
        spent[stage] += time.process_time() - started
        return result

    size = work.view.crop_size
    cut = Cut(crop_size=size, clips=1, windows=1, mean=(0, 0, 0), std=(1, 1, 1), half=False)
    out = torch.empty((1, 3, work.view.num_frames, size, size))
    count = 0
    for place in range(_CLIPS):
        row = work.row(place)
        video = work.manifest[row]
        plan = timed("plan", plan_sample, video, work.view, seed=work.seed, epoch=0, sample_id=row)
        region = bounds(plan.rectangles, coded_size(video))
        try:
            indexed = timed("entry of the index", _open, work, row)
        except StaleIndexError:
            continue
        runs = timed("select and read", indexed.select, plan.positions).runs
        timed("decode", _decode, indexed, runs)
        again = _open(work, row)
        frames = timed(
            "all but cut", decode_indexed, again, plan.positions, size=coded_size(video), region=region
        ).frames
        corner = [region[0].start, region[1].start] * 2
        timed("resize and normalise", cut_clips, frames, plan.picks, plan.rectangles - corner, plan.transpose, cut, out)
        count += 1
    if not count:
        return {}
    # "all but cut" decodes again and does the rest as well; the difference is the conversion.
    whole = spent.pop("all but cut")
    spent["convert to RGB and crop"] = whole - spent["decode"] - spent["select and read"]
    return {stage: 1000 * seconds / count for stage, seconds in spent.items()}


def _open(work: Work, row: int) -> IndexedVideo:
    entry = open_index(str(work.manifest.index)).entry(key_of(work.manifest[row]))
    return IndexedVideo(work.manifest.source(row), entry)


def _decode(video: IndexedVideo, runs: list[list[int]]) -> int:
    """Decodes packets and returns the number of frames."""
    context = video.stream.context()
    set_up(context)
    count = 0
    for run, numbers in enumerate(runs):
        if run:
            context.flush_buffers()
        for packet in [*map(video.packet, numbers), None]:
            count += len(context.decode(packet))
    return count
