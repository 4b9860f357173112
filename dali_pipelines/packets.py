"""Selects the packets of a video that a decoder needs for the wanted frames, and remuxes them; decodes nothing.

Frames are numbered in the order in which a decoder outputs them, which the codec itself defines: picture order counts
(H.264, HEVC), coding types (MPEG-4), hidden and shown frames (VP8, VP9, AV1). The file's timestamps play no part, so
missing, duplicate or wrong ones do not matter.

Only these packets are needed:

- groups of pictures with a wanted frame; a group starts where the codec says that nothing later refers to anything
  earlier (IDR and the like), not at the container's keyframe flag, which x264 also sets on open-GOP and intra-refresh
  frames;
- within a group, the packets up to the last wanted frame, in decoding order;
- among these, only wanted frames and frames that others refer to.

If the headers do not settle this, `UncertainError` is raised, and everything is decoded and counted instead.
`bitstream` parses the headers.
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
"""Bytes of packets in memory above which those that nobody will ask for are dropped."""


class Flag(enum.IntFlag):
    """The properties of a `FrameHeader` and its packet that decide which packets to feed."""

    STARTS_GROUP = 1
    IS_CLEAN = 2
    IS_LEADING = 4
    IS_DISPOSABLE = 8
    IS_SHOWN = 16
    IS_DISCARDED = 32
    """Decoded, but removed by an edit list."""
    IS_KEYFRAME = 64
    """Marked as a keyframe by the container."""


class Selection(NamedTuple):
    """The packets to feed to a decoder."""

    runs: list[list[int]]
    """Packet numbers (in file order, from 0), in decoding order; the decoder is reset before each run."""
    shown: list[int]
    """The number of the packet that holds frame 0, 1, 2, ... of the video, as far as it has been read."""


def choose_runs(flags: Sequence[int], starts: Sequence[int], wanted: set[int], *, in_one_go: bool) -> list[list[int]]:
    """`Selection.runs` for the frames in the packets `wanted`, given the `Flag`s of all packets and the numbers of
    those that start a group. `in_one_go`: see `PacketSource.select`."""
    runs: list[list[int]] = []
    is_continued = False  # whether the next group needs all of this one
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


# Plain numbers are much faster than flags.
_STARTS, _CLEAN, _LEADING, _DISPOSABLE, _SHOWN, _DISCARDED, _KEYFRAME = (flag.value for flag in Flag)


class PacketSource(Protocol):
    """Where packets are selected from: a `PacketReader`, or an `IndexedVideo` of the packet index."""

    @property
    def flags(self) -> Sequence[int]:
        """The `Flag`s of each packet."""

    @property
    def parser(self) -> Parser:
        """The parser of the stream's headers."""

    @property
    def packets_read(self) -> int:
        """Packets read so far."""

    def select(self, positions: np.ndarray, *, in_one_go: bool = False) -> Selection:
        """Selects the packets for the frames at `positions` (ascending, distinct).

        `in_one_go`: the decoder is not reset between two runs. Raises `UncertainError`.
        """

    def packet(self, number: int) -> VideoPacket:
        """One of the packets chosen by `select`."""

    def first(self, count: int) -> list[VideoPacket]:
        """The first `count` packets of the file, without those already dropped."""

    def order(self, numbers: Sequence[int]) -> list[int]:
        """The same packet numbers in the display order of their frames."""


class PacketReader:
    """A `PacketSource` that reads the packets of a video only until it knows which ones the wanted frames need.

        reader = PacketReader(container)
        selection = reader.select(positions)
        reader.packets[selection.runs[0][0]]     # feed this first

    `packets` are the packets with data read so far, `headers` their frame headers, `flags` their `Flag`s, `times` their
    (pts, dts) in the stream's time base. Packets that nobody will ask for may be None: a long video need not fit into
    memory. `note` is called with every packet with data.
    """

    def __init__(self, container: av.container.InputContainer, note: Callable[[VideoPacket], None] | None = None):
        context = video_stream(container).codec_context
        self.packets: list[VideoPacket | None] = []
        self.headers: list[FrameHeader] = []
        self.flags = bytearray()
        self.times: list[tuple[int | None, int | None]] = []
        self._note = note
        self._begins_within = False  # the file begins within a group
        self._entry: tuple[int, int] | None = None  # order of the frame at which the stream resumes after a gap
        self._has_edits = "mp4" in container.format.name
        self._position = -1  # of the last packet, in the file
        self._held_bytes = 0
        self._groups: list[tuple[int, int]] = []  # the first packet of each, and the number of frames shown before it
        self._let_go = 0  # groups already checked by `_forget`
        self._packets = demux(container)
        self._held_back = context.reorder_depth  # frames, according to the stream
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
        assert packet is not None  # `select` ensures it
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
        """The numbers of the packets with shown frames, in display order."""
        decoded = [number for number, header in enumerate(self.headers) if header.is_shown]
        shown = sorted(decoded, key=lambda number: self.headers[number].order)
        if len({self.headers[number].order for number in shown}) < len(shown):
            raise UncertainError("two frames have the same place in the order")
        ranks = {number: rank for rank, number in enumerate(shown)}
        if any(place - ranks[number] > self._held_back for place, number in enumerate(decoded)):
            # Otherwise a decoder would drop them.
            raise UncertainError("frames are held back for longer than the stream says")
        return shown

    def _read(self, count: int | None, wanted: np.ndarray) -> None:
        """Reads until `count` frames are read, along with all frames shown before the last of them. The caller may ask
        for the frames at `wanted` (ascending)."""
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
                else:  # keep reading: frames may be missing later, too
                    self._begins_within = True
            if packet.is_discard:  # an edit list removes it: it is decoded, but never shown
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
            raise UncertainError("an edit list leaves out frames that others refer to")

    def _check_gap(self, header: FrameHeader, packet: VideoPacket) -> None:
        """Raises `MissingFrameError` if a reference frame is missing. An edit list may resume at a key frame that is
        not an IDR; then only frames shown before that one need the missing ones."""
        if header.follows_gap and packet.is_keyframe and header.is_intra:
            self._entry = header.order
        elif header.follows_gap or (self._entry is not None and header.is_shown and header.order < self._entry):
            raise MissingFrameError("a frame that others refer to is missing")

    def _forget(self, wanted: np.ndarray) -> None:
        """Drops finished groups with no frame in `wanted`, unless the next group has one, as it may need them. The
        positions of a group's frames are known to within the stream's reordering; `select` notices if that was
        wrong."""
        while self._let_go < len(self._groups) - 2:
            (first, before), (end, _), (_, after) = self._groups[self._let_go : self._let_go + 3]
            self._let_go += 1
            around = self._held_back + self.parser.reorder
            low, high = np.searchsorted(wanted, [before - around, after + around])
            if low == high:
                self._held_bytes -= sum(packet.size for packet in self.packets[first:end] if packet is not None)
                self.packets[first:end] = [None] * (end - first)


def video_stream(container: av.container.InputContainer) -> av.VideoStream:
    """The video stream that FFmpeg picks (marked default, most frames, highest bit rate), unless it is cover art.
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
    """The packets of its video stream, except one that the end of the file cuts off: many decoders silently make up the
    rest of its frame. Raises `InputError`."""
    packets, kind, size = container.demux(video_stream(container)), container.format.name, container.size
    while True:
        try:
            packet = next(packets, None)
        except IndexError:  # PyAV cannot handle a stream that FFmpeg finds so late
            raise InputError("another stream begins within the file; re-encode it") from None
        if packet is None:
            return
        if not _is_cut(packet, kind, size):
            yield packet


def _is_cut(packet: VideoPacket, kind: str, size: int) -> bool:
    """Whether a file of format `kind` and `size` bytes ends before this packet does."""
    end = (packet.pos or 0) + packet.size
    if packet.is_corrupt:
        return kind != "mpegts"  # where it means that something is missing before the packet
    if kind == "dv":  # padded with bytes of the previous frame
        return 0 < size < end
    # The image data of a GIF ends with an empty block, and the file with a semicolon.
    return kind == "gif" and end == size and bytes(packet)[-1] not in b"\0;"


class Remuxed(NamedTuple):
    """The packets of some frames as a separate file."""

    encoded: np.ndarray
    """uint8 [bytes]: a small file with only the needed packets."""
    size: tuple[int, int]
    """(height, width) of its frames."""
    positions: np.ndarray
    """int64 [N]: positions of the wanted frames among those of the file."""
    packets_read: int
    packets_kept: int
    reorder_delay: int
    """Frames that a decoder must hold back to output these packets in order."""
    parser: Parser
    """The parser that has read the stream's headers."""


REMUXED_FPS = 8
"""Frame rate of the output of `remux`: frame k, from 0, is shown at k / `REMUXED_FPS` seconds. With a power of two,
durations are exact; torchcodec computes the number of frames from them (1.16 s * 25 would be 28.999...)."""

_CONTAINER_OPTIONS: dict[str, dict[str, str]] = {
    # No edit list for the start of the first frame, so that the demuxer need not understand one.
    "mp4": {"movflags": "+negative_cts_offsets", "use_editlist": "0"},
    "matroska": {},
}


def remux(container: av.container.InputContainer, positions: np.ndarray, *, uncropped: bool = False) -> Remuxed:
    """The packets for the frames at `positions` as a separate file in memory: MP4, or Matroska if MP4 does not fit.

    `uncropped`: with parameter sets for uncropped frames, for codecs with `Codec.uncrops` in `CODECS`.

    Its frames are renumbered from 0 and evenly spaced, whatever the timestamps were, and are not rotated. Only the
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
    """`remux` for any source of packets. `template` is a stream with the codec's header, that of `context`."""
    selection = source.select(positions, in_one_go=True)
    numbers = [number for run in selection.runs for number in run]
    if any(not source.flags[number] & (_SHOWN | _DISCARDED) for number in numbers):
        raise UncertainError("some of its frames are hidden")
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
    """A packet with these bytes, or with room for `data` bytes plus the padding that decoders read."""
    return av.Packet(data)  # type: ignore[return-value]  # the stubs know no packet without a stream
