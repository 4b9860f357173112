"""The floor: what a loader that decodes with FFmpeg cannot do without, in as many processes as it has workers.

Open, demux, decode the packets kept and convert the wanted pictures to RGB; which packets these are is known
beforehand. No torch here: the processes are as small as our loader's own.
"""

import itertools
import multiprocessing
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection

import av

from benchmarks.work import Packets
from dali_pipelines.files import open_video
from dali_pipelines.packets import video_stream
from dali_pipelines.processes import end_with_parent


def decode_floor(tasks: Sequence[Packets], *, workers: int, batch_size: int) -> Iterator[None]:
    """Goes round `tasks` for ever; one item for every `batch_size` clips done."""
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


def _work(tasks: Sequence[Packets], places, lock, done: Connection) -> None:
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
