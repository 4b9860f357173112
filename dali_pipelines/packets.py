"""Which packets of a video a decoder needs for the wanted frames, and how to remux them; decodes nothing.

Frames are numbered in the order in which a decoder puts them out, and that order is the codec's own: picture order
counts (H.264, HEVC), coding types (MPEG-4), hidden and shown frames (VP8, VP9, AV1). The file's timestamps play no
part, so missing, doubled or wrong ones change nothing.

Only these packets are needed:

- those of the groups of pictures that hold a wanted frame; a group starts where the codec says that nothing later
  refers to anything earlier (IDR and the like), never at the container's keyframe flag, which x264 also sets on
  open-GOP and intra-refresh frames;
- within a group, those up to the last wanted frame, in decoding order;
- of these, not those that no other frame refers to, unless they are wanted.

If the headers do not settle it, that is an `UncertainError`, and then everything is decoded and counted. What headers
say is read in `bitstream`.
"""

import enum
import io
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple, Protocol, TypeAlias

import av
import numpy as np
from av.stream import Disposition

from dali_pipelines.bitstream.codecs import CODECS, make_parser
from dali_pipelines.bitstream.parser import FrameHeader, MissingFrameError, Parser, UncertainError
from dali_pipelines.errors import InputError

VideoPacket: TypeAlias = "av.Packet[av.VideoStream]"

_MOST_HELD = 256 << 20
"""Bytes of packets in memory, from which on those that nobody will ask for are let go."""


class Flag(enum.IntFlag):
    """What decides, of a `FrameHeader` and its packet, which packets are fed."""

    STARTS_GROUP = 1
    IS_CLEAN = 2
    IS_LEADING = 4
    IS_DISPOSABLE = 8
    IS_SHOWN = 16
    IS_DISCARDED = 32
    """Decoded, but cut out by an edit list."""
    IS_KEYFRAME = 64
    """A keyframe to the container."""


class Selection(NamedTuple):
    """The packets to feed."""

    runs: list[list[int]]
    """Numbers of packets (in the order of the file, from 0), in decoding order; a decoder starts afresh at each run."""
    shown: list[int]
    """Number of the packet that holds frame 0, 1, 2, ... of the video, as far as it has been read."""


def choose_runs(flags: Sequence[int], starts: Sequence[int], wanted: set[int], *, in_one_go: bool) -> list[list[int]]:
    """`Selection.runs` for the frames in the packets `wanted`, by the `Flag`s of all packets and the numbers of those
    that start a group. `in_one_go`: see `PacketReader.select`."""
    runs: list[list[int]] = []
    is_continued = False  # the group that follows needs all of this one
    for first, end in reversed(list(zip(starts, [*starts[1:], len(flags)]))):
        here = wanted.intersection(range(first, end))
        if not here and not is_continued:
            continue
        continues = any(flags[number] & _LEADING for number in here)
        continues |= in_one_go and not flags[first] & _CLEAN
        last = end - 1 if is_continued else max(here)
        unneeded = _DISPOSABLE if continues else _DISPOSABLE | _LEADING
        run = [
            number
            for number, flag in enumerate(flags[first : last + 1], start=first)
            if not flag & unneeded or number in wanted
        ]
        if is_continued:
            runs[-1] = run + runs[-1]
        else:
            runs.append(run)
        is_continued = continues
    return runs[::-1]


# As plain numbers, which are much faster.
_STARTS, _CLEAN, _LEADING, _DISPOSABLE, _SHOWN, _DISCARDED, _KEYFRAME = (flag.value for flag in Flag)


class PacketSource(Protocol):
    """What packets are selected from: a `PacketReader`, or an `IndexedVideo` of the packet index."""

    @property
    def flags(self) -> Sequence[int]:
        """The `Flag`s of each packet."""

    @property
    def parser(self) -> Parser:
        """What reads the headers of the stream."""

    @property
    def packets_read(self) -> int:
        """Packets read so far."""

    def select(self, positions: np.ndarray, *, in_one_go: bool = False) -> Selection:
        """The packets for frames number `positions` (ascending, distinct).

        `in_one_go`: they are fed without a new start between two runs. Raises `UncertainError`.
        """

    def packet(self, number: int) -> VideoPacket:
        """One of the packets that `select` has chosen."""

    def first(self, count: int) -> list[VideoPacket]:
        """The first `count` packets of the file, except those that are no longer held."""

    def order(self, numbers: Sequence[int]) -> list[int]:
        """The same packets in the order in which their frames are shown."""


class PacketReader:
    """Reads the packets of a video up to the one that settles which are needed for some frames: a `PacketSource`.

        reader = PacketReader(container)
        selection = reader.select(positions)
        reader.packets[selection.runs[0][0]]     # feed this first

    `packets` are those with data that have been read, `headers` what they say of their frames, `flags` the `Flag`s of
    each, `times` their (pts, dts), in the stream's unit. Packets that nobody will ask for may be None: a long video
    need not fit into memory. `note` is called with every packet with data.
    """

    def __init__(self, container: av.container.InputContainer, note: Callable[[VideoPacket], None] | None = None):
        context = video_stream(container).codec_context
        self.packets: list[VideoPacket | None] = []
        self.headers: list[FrameHeader] = []
        self.flags = bytearray()
        self.times: list[tuple[int | None, int | None]] = []
        self._note = note
        self._begins_within = False  # a group
        self._entry: tuple[int, int] | None = None  # order of the frame at which the stream resumes after a gap
        self._has_edits = "mp4" in container.format.name
        self._position = -1  # of the last packet, in the file
        self._held_bytes = 0
        self._groups: list[tuple[int, int]] = []  # the first packet of each, and how many frames are shown before it
        self._let_go = 0  # groups that `_forget` has looked at
        self._packets = demux(container)
        self._held_back = context.reorder_depth  # frames, says the stream
        self.parser = make_parser(context.codec.canonical_name, bytes(context.extradata or b""))

    def select(self, positions: np.ndarray, *, in_one_go: bool = False) -> Selection:
        """See `PacketSource.select`."""
        self._read(int(positions[-1]) + 1, positions)
        shown = self._in_order()
        if positions[-1] >= len(shown):
            raise UncertainError("it has fewer frames than are wanted")
        wanted = {shown[position] for position in positions.tolist()}
        starts = [number for number, flag in enumerate(self.flags) if flag & _STARTS]
        runs = choose_runs(self.flags, starts, wanted, in_one_go=in_one_go)
        if any(self.packets[number] is None for run in runs for number in run):
            raise UncertainError("it is long, and its groups of pictures need each other")
        return Selection(runs, shown)

    @property
    def packets_read(self) -> int:
        """Packets with data read so far."""
        return len(self.packets)

    def packet(self, number: int) -> VideoPacket:
        """See `PacketSource.packet`."""
        packet = self.packets[number]
        assert packet is not None  # `select` has seen to it
        return packet

    def first(self, count: int) -> list[VideoPacket]:
        """See `PacketSource.first`."""
        return [packet for packet in self.packets[:count] if packet is not None]

    def order(self, numbers: Sequence[int]) -> list[int]:
        """See `PacketSource.order`."""
        return sorted(numbers, key=lambda number: self.headers[number].order)

    def shown(self) -> list[int]:
        """`Selection.shown` for the whole video. Raises `UncertainError`."""
        self._read(None, np.array([], np.int64))
        return self._in_order()

    def _in_order(self) -> list[int]:
        """The numbers of the packets whose frames are shown, in the order of these."""
        decoded = [number for number, header in enumerate(self.headers) if header.is_shown]
        shown = sorted(decoded, key=lambda number: self.headers[number].order)
        if len({self.headers[number].order for number in shown}) < len(shown):
            raise UncertainError("two frames have the same place in the order")
        ranks = {number: rank for rank, number in enumerate(shown)}
        if any(place - ranks[number] > self._held_back for place, number in enumerate(decoded)):
            # A decoder that was not told would throw them away.
            raise UncertainError("frames are held back for longer than the stream says")
        return shown

    def _read(self, count: int | None, wanted: np.ndarray) -> None:
        """Reads until `count` frames are read, and with them every one that is shown before the last of them. Frames
        number `wanted` (ascending) may be asked for."""
        missing = -1 if count is None else count + self.parser.reorder
        shown = 0
        for packet in self._packets:
            if not packet.size:
                continue
            if packet.has_sidedata("new_extradata"):
                raise UncertainError("the parameters of the stream change")
            try:
                header = self.parser.read(memoryview(packet))
            except IndexError:
                raise UncertainError("a header is cut off") from None
            if self._has_edits and packet.pos is not None:
                if packet.pos <= self._position:
                    raise UncertainError("an edit list repeats frames")
                self._position = packet.pos
            if not self._groups and not header.starts_group:
                if self.parser.waits_for_start:
                    header = header._replace(is_shown=False)
                else:  # read on all the same: frames may be missing further on, too
                    self._begins_within = True
            if packet.is_discard:  # an edit list cuts it out: it is decoded, never shown
                header = header._replace(is_shown=False)
            self._check_gap(header, packet)
            if header.starts_group:
                self._groups.append((len(self.packets), shown))
                if self._held_bytes > _MOST_HELD:
                    self._forget(wanted)
            is_of_use = bool(self._groups) and not self._begins_within
            self.packets.append(packet if is_of_use else None)
            self.headers.append(header)
            self.flags.append(
                _STARTS * header.starts_group
                | _CLEAN * header.is_clean
                | _LEADING * header.is_leading
                | _DISPOSABLE * header.is_disposable
                | _SHOWN * header.is_shown
                | _DISCARDED * packet.is_discard
                | _KEYFRAME * packet.is_keyframe
            )
            if self._note:
                self._note(packet)
            self.times.append((packet.pts, packet.dts))
            self._held_bytes += packet.size * is_of_use
            shown += header.is_shown
            missing -= header.is_shown
            if not missing:
                break
        if self._begins_within:
            raise UncertainError("the file does not begin with a frame that can be decoded alone")
        if self._entry is not None:
            raise UncertainError("an edit list leaves frames out that others refer to")

    def _check_gap(self, header: FrameHeader, packet: VideoPacket) -> None:
        """An edit list may resume at a key frame that is no IDR. Frames shown before that one need the missing ones."""
        if header.follows_gap and packet.is_keyframe and header.is_intra:
            self._entry = header.order
        elif header.follows_gap or (self._entry is not None and header.is_shown and header.order < self._entry):
            raise MissingFrameError("a frame that others refer to is missing")

    def _forget(self, wanted: np.ndarray) -> None:
        """Lets go of groups that have ended and hold nothing of `wanted`, unless the group after them does, which may
        need them. The places of a group's frames are known to within the reordering of the stream; `select` notices if
        that was wrong."""
        while self._let_go < len(self._groups) - 2:
            (first, before), (end, _), (_, after) = self._groups[self._let_go : self._let_go + 3]
            self._let_go += 1
            around = self._held_back + self.parser.reorder
            low, high = np.searchsorted(wanted, [before - around, after + around])
            if low == high:
                self._held_bytes -= sum(packet.size for packet in self.packets[first:end] if packet is not None)
                self.packets[first:end] = [None] * (end - first)


def video_stream(container: av.container.InputContainer) -> av.VideoStream:
    """The video stream that FFmpeg takes (marked default, most frames, highest bit rate), unless it is a cover picture.
    Raises `InputError` if there is none."""

    def is_cover(stream: av.VideoStream) -> bool:
        return bool(stream.disposition & Disposition.attached_pic)

    best = container.streams.best("video")
    if isinstance(best, av.VideoStream):
        for stream in (best, *container.streams.video):
            if not is_cover(stream):
                return stream
    raise InputError("no video stream in it")


def demux(container: av.container.InputContainer) -> Iterator[VideoPacket]:
    """The packets of its video stream, except one that the end of the file cuts off: many decoders make up the rest of
    its frame, and do not say so. Raises `InputError`."""
    packets, kind, size = container.demux(video_stream(container)), container.format.name, container.size
    while True:
        try:
            packet = next(packets, None)
        except IndexError:  # PyAV has no place for one that FFmpeg finds so late
            raise InputError("another stream begins within the file; encode it anew") from None
        if packet is None:
            return
        if not _is_cut(packet, kind, size):
            yield packet


def _is_cut(packet: VideoPacket, kind: str, size: int) -> bool:
    """Whether a file of format `kind` and `size` bytes ends before this packet does."""
    end = (packet.pos or 0) + packet.size
    if packet.is_corrupt:
        return kind != "mpegts"  # there it says that something is missing before the packet
    if kind == "dv":  # filled up with bytes of the frame before
        return 0 < size < end
    # The image data of a GIF ends with an empty block, and the file with a semicolon.
    return kind == "gif" and end == size and bytes(packet)[-1] not in b"\0;"


class Remuxed(NamedTuple):
    """The packets of some frames as a file of their own."""

    encoded: np.ndarray
    """uint8 [bytes]: a small file of the needed packets only."""
    size: tuple[int, int]
    """(height, width) of its frames."""
    positions: np.ndarray
    """int64: the wanted frames, as positions among those that it holds."""
    packets_read: int
    packets_kept: int
    reorder_delay: int
    """Frames that a decoder has to hold back to put these packets out in order."""
    parser: Parser
    """What has read the headers of the stream."""


REMUXED_FPS = 8
"""Frames/s of what `remux` makes, from 0 on: frame k is shown at k / `REMUXED_FPS` seconds. A power of two: then
durations are exact, from which torchcodec computes how many frames there are (1.16 s * 25 would be 28.999...)."""

_CONTAINER_OPTIONS: dict[str, dict[str, str]] = {
    # Without an edit list, which would say where the first frame is, the demuxer need not understand one.
    "mp4": {"movflags": "+negative_cts_offsets", "use_editlist": "0"},
    "matroska": {},
}


def remux(container: av.container.InputContainer, positions: np.ndarray, *, uncropped: bool = False) -> Remuxed:
    """The packets for frames number `positions` as a file of their own in memory: MP4, or Matroska if MP4 does not fit.

    `uncropped`: with parameter sets for frames as coded, for codecs whose row of `CODECS` says so (`Codec.uncrops`).

    Its frames are numbered anew from 0 and evenly spaced, whatever the timestamps were, and are not turned. Only the
    first is marked as a keyframe, so that no decoder seeks: after a seek to an I-VOP, MPEG-4's B-VOPs are lost. Raises
    `UncertainError`.
    """
    stream = video_stream(container)
    return remux_packets(PacketReader(container), stream, stream.codec_context, positions, uncropped=uncropped)


def remux_packets(
    source: PacketSource,
    template: av.VideoStream,
    context: av.VideoCodecContext,
    positions: np.ndarray,
    *,
    uncropped: bool = False,
) -> Remuxed:
    """`remux` for any source of packets. `template` is a stream with the codec's header in it, which is `context`'s."""
    selection = source.select(positions, in_one_go=True)
    numbers = [number for run in selection.runs for number in run]
    if any(not source.flags[number] & (_SHOWN | _DISCARDED) for number in numbers):
        raise UncertainError("some of its frames are not shown")
    ranks = {number: rank for rank, number in enumerate(source.order(numbers))}
    delay = max(place - ranks[number] for place, number in enumerate(numbers))
    parser, codec = source.parser, CODECS[context.codec.canonical_name]
    rewrite = parser.without_cropping() if uncropped and codec.uncrops else None
    size = rewrite.size if rewrite else (context.height, context.width)
    file = io.BytesIO()
    with av.open(file, "w", format=codec.remuxed_as, options=_CONTAINER_OPTIONS[codec.remuxed_as]) as out:
        stream = out.add_stream_from_template(template, opaque=True)
        stream.time_base = tick = Fraction(1, REMUXED_FPS)
        stream.set_display_rotation(0)
        if rewrite:
            stream.codec_context.extradata = rewrite.extradata(bytes(context.extradata or b""))
            stream.height, stream.width = size
        for place, number in enumerate(numbers):
            packet = source.packet(number)
            if rewrite or place == 0:
                before = data = bytes(packet)
                if rewrite:
                    data = rewrite.packet(data)
                if place == 0:
                    data = parser.with_header(data)
                if data != before:
                    packet = make_packet(data)
            packet.stream, packet.time_base, packet.duration = stream, tick, 1
            packet.pts, packet.dts = ranks[number], place - delay
            packet.is_keyframe = place == 0
            out.mux(packet)
    wanted = [ranks[selection.shown[position]] for position in positions.tolist()]
    return Remuxed(
        np.frombuffer(file.getbuffer(), np.uint8),
        size,
        np.array(wanted),
        source.packets_read,
        len(numbers),
        delay,
        parser,
    )


def make_packet(data: bytes | int) -> VideoPacket:
    """A packet of these bytes, or with room for a number of them and for the padding that decoders read."""
    return av.Packet(data)  # type: ignore[return-value]  # the stubs have no packet that is yet to get its stream
