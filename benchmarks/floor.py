"""The floor: the minimum work of a loader that decodes with FFmpeg, in as many processes as our loader has workers.

It opens files, demuxes, decodes packets that were selected beforehand and converts the requested frames to RGB. Does
not import torch, so the processes are as small as our workers.
"""

import itertools
import multiprocessing
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Lock
from typing import Any

import av

from benchmarks.work import Packets
from dali_pipelines.files import open_video
from dali_pipelines.packets import video_stream
from dali_pipelines.processes import end_with_parent


def decode_floor(tasks: Sequence[Packets], *, workers: int, batch_size: int) -> Iterator[None]:
    """Repeats `tasks` for ever, and yields once for every `batch_size` decoded clips."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    places, lock = context.Value("q", 0), context.Lock()
    processes = [context.Process(target=_work, args=(tasks, places, lock, sender), daemon=True) for _ in range(workers)]
    for process in processes:
        process.start()
    try:
        while True:
            for _ in range(batch_size):
                receiver.recv_bytes()
            yield
    finally:
        for process in processes:
            process.kill()


def _work(tasks: Sequence[Packets], places: Any, lock: Lock, done: Connection) -> None:
    end_with_parent()
    while True:
        with places.get_lock():
            place = places.value
            places.value += 1
        _decode(tasks[place % len(tasks)])
        with lock:
            done.send_bytes(b"1")


def _decode(task: Packets) -> None:
    reformatter = av.video.reformatter.VideoReformatter()
    left = len(task.wanted)
    with open_video(task.source) as container:
        stream = video_stream(container)
        decoder = stream.codec_context
        decoder.thread_count = 1
        decoder.copy_opaque = True
        packets = enumerate(packet for packet in container.demux(stream) if packet.size)
        for run in task.runs:
            for packet in itertools.chain(_pick(packets, run), [None]):
                for frame in decoder.decode(packet):
                    if frame.opaque in task.wanted:
                        reformatter.reformat(frame, format="rgb24")
                        left -= 1
                if not left:
                    return
            decoder.flush_buffers()


def _pick(packets: Iterator[tuple[int, av.Packet]], numbers: Sequence[int]) -> Iterator[av.Packet]:
    for number in numbers:
        packet = next(packet for place, packet in packets if place == number)
        packet.opaque = number
        yield packet
