"""Which packets of a video a decoder needs for the wanted pictures; reads headers, decodes nothing.

Pictures are numbered in the order in which a decoder puts them out, and that order is the codec's own: picture order
counts (H.264, HEVC), coding types (MPEG-4), hidden and shown frames (VP8, VP9, AV1). The file's timestamps play no
part, so missing, doubled or wrong ones change nothing.

Of the packets, only these are needed:

- those of the groups of pictures that hold a wanted one; a group starts where the codec says that nothing later refers
  to anything earlier (IDR and the like), never at the container's keyframe flag, which x264 also sets on open-GOP and
  intra-refresh pictures;
- within a group, those up to the last that is wanted, in decoding order;
- of these, not those that no other picture refers to, unless they are wanted.

What the headers do not settle is an `UncertainError`, and then everything is decoded and counted.

Sources: ITU-T H.264 7.3, 8.2.1; H.265 7.3, 8.3.1; ISO/IEC 14496-2 6.2; RFC 6386 9.1 (VP8); VP9 bitstream specification
6.2 and annex B; AV1 bitstream specification 5.5 and 5.9.
"""

import abc
import enum
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from typing import Any, ClassVar, NamedTuple

import av
import numpy as np
from av.stream import Disposition

from dali_pipelines.errors import InputError

_MOST_HELD = 256 << 20
"""Bytes of packets in memory, from which on those that nobody will ask for are let go."""


class UncertainError(Exception):
    """The headers do not say which picture a packet holds; the message is the reason."""


class MissingPictureError(UncertainError):
    """A picture that others refer to seems to be missing."""


class Picture(NamedTuple):
    """What the headers of one packet say of its picture."""

    order: tuple[int, int] = (0, 0)
    """Pictures are shown in ascending order of this."""
    starts_group: bool = False
    """Neither this picture nor a later one that is not `is_leading` refers to an earlier one."""
    is_clean: bool = True
    """Where it starts a group: a decoder that has just decoded another group need not be reset."""
    is_leading: bool = False
    """Refers, or may refer, to pictures before the start of its group."""
    is_disposable: bool = False
    """No other picture refers to it."""
    is_shown: bool = True
    is_intra: bool = False
    """Refers to no other. Only read in H.264."""
    follows_gap: bool = False
    """Pictures that others refer to are missing before it."""


class Flag(enum.IntFlag):
    """What of a `Picture` and its packet decides which packets are fed."""

    STARTS_GROUP = 1
    IS_CLEAN = 2
    IS_LEADING = 4
    IS_DISPOSABLE = 8
    IS_SHOWN = 16
    IS_DISCARDED = 32
    """It is decoded, but an edit list cuts it out."""
    IS_KEYFRAME = 64
    """To the container."""


class Selection(NamedTuple):
    """The packets to feed."""

    runs: list[list[int]]
    """Numbers of packets (in the order of the file, from 0), in decoding order; a decoder starts afresh at each run."""
    shown: list[int]
    """Number of the packet that holds picture 0, 1, 2, ... of the video, as far as it has been read."""


def choose_runs(flags: Sequence[int], starts: Sequence[int], wanted: set[int], *, in_one_go: bool) -> list[list[int]]:
    """`Selection.runs` for the pictures in the packets `wanted`, by the `Flag`s of all packets and the numbers of those
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


class PacketReader:
    """Reads the packets of a video up to the one that settles which are needed for some pictures.

        reader = PacketReader(container)
        selection = reader.select(positions)
        reader.packets[selection.runs[0][0]]     # feed this first

    `packets` are those with data that have been read, `pictures` what their headers say, `flags` the `Flag`s of each,
    `times` their (pts, dts), in the stream's unit. Packets that nobody will ask for may be None: a long video need not
    fit into memory. `note` is called with every packet with data.
    """

    def __init__(self, container: av.container.InputContainer, note: Callable[[av.Packet], None] | None = None):
        stream = video_stream(container)
        self.packets: list[av.Packet | None] = []
        self.pictures: list[Picture] = []
        self.flags = bytearray()
        self._note = note
        self.times: list[tuple[int | None, int | None]] = []
        self._begins_within = False  # a group
        self._entry: tuple[int, int] | None = None  # order of the picture at which the stream goes on after a gap
        self._has_edits = "mp4" in container.format.name
        self._position = -1  # of the last packet, in the file
        self._held_bytes = 0
        self._groups: list[tuple[int, int]] = []  # the first packet of each, and how many pictures are shown before it
        self._let_go = 0  # groups that `_forget` has looked at
        self._packets = demux(container)
        self._held_back = stream.codec_context.reorder_depth  # pictures, says the stream
        context = stream.codec_context
        self._codec = codec_headers(context.codec.canonical_name, bytes(context.extradata or b""))

    def select(self, positions: np.ndarray, *, in_one_go: bool = False) -> Selection:
        """The packets for pictures number `positions` (ascending).

        `in_one_go`: they are fed without a new start between two runs. Raises `UncertainError`.
        """
        self._read(int(positions[-1]) + 1, positions)
        shown = self._in_order()
        if positions[-1] >= len(shown):
            raise UncertainError("it has fewer pictures than are wanted")
        wanted = {shown[position] for position in positions.tolist()}
        starts = [number for number, flag in enumerate(self.flags) if flag & _STARTS]
        runs = choose_runs(self.flags, starts, wanted, in_one_go=in_one_go)
        if any(self.packets[number] is None for run in runs for number in run):
            raise UncertainError("it is long, and its groups of pictures need each other")
        return Selection(runs, shown)

    @property
    def packets_read(self) -> int:
        return len(self.packets)

    def packet(self, number: int) -> av.Packet:
        """One of those that `select` has chosen."""
        return self.packets[number]

    def first(self, count: int) -> list[av.Packet]:
        """The first `count` packets of the file, but for those that are let go."""
        return [packet for packet in self.packets[:count] if packet is not None]

    def order(self, numbers: Sequence[int]) -> list[int]:
        """The same packets in the order in which their pictures are shown."""
        return sorted(numbers, key=lambda number: self.pictures[number].order)

    def shown(self) -> list[int]:
        """`Selection.shown` for the whole video. Raises `UncertainError`."""
        self._read(None, np.array([], np.int64))
        return self._in_order()

    def _in_order(self) -> list[int]:
        """The numbers of the packets of the pictures that are shown, in their order."""
        decoded = [number for number, picture in enumerate(self.pictures) if picture.is_shown]
        shown = sorted(decoded, key=lambda number: self.pictures[number].order)
        if len({self.pictures[number].order for number in shown}) < len(shown):
            raise UncertainError("two pictures have the same place in the order")
        ranks = {number: rank for rank, number in enumerate(shown)}
        if any(place - ranks[number] > self._held_back for place, number in enumerate(decoded)):
            # A decoder that was not told would throw them away.
            raise UncertainError("pictures are held back for longer than the stream says")
        return shown

    def _read(self, count: int | None, wanted: np.ndarray) -> None:
        """Until `count` pictures are read, and with them every one that is shown before the last of them. Pictures
        number `wanted` (ascending) may be asked for."""
        missing = -1 if count is None else count + self._codec.reorder
        shown = 0
        for packet in self._packets:
            if not packet.size:
                continue
            if packet.has_sidedata("new_extradata"):
                raise UncertainError("the parameters of the stream change")
            try:
                picture = self._codec.picture(memoryview(packet))
            except IndexError:
                raise UncertainError("a header is cut off") from None
            if self._has_edits and packet.pos <= self._position:
                raise UncertainError("an edit list repeats frames")
            self._position = packet.pos
            if not self._groups and not picture.starts_group:
                if self._codec.waits_for_start:
                    picture = picture._replace(is_shown=False)
                else:  # read on all the same: frames may be missing further on, too
                    self._begins_within = True
            if packet.is_discard:  # an edit list cuts it out: it is decoded, never shown
                picture = picture._replace(is_shown=False)
            self._check_gap(picture, packet)
            if picture.starts_group:
                self._groups.append((len(self.packets), shown))
                if self._held_bytes > _MOST_HELD:
                    self._forget(wanted)
            is_of_use = bool(self._groups) and not self._begins_within
            self.packets.append(packet if is_of_use else None)
            self.pictures.append(picture)
            self.flags.append(
                _STARTS * picture.starts_group
                | _CLEAN * picture.is_clean
                | _LEADING * picture.is_leading
                | _DISPOSABLE * picture.is_disposable
                | _SHOWN * picture.is_shown
                | _DISCARDED * packet.is_discard
                | _KEYFRAME * packet.is_keyframe
            )
            if self._note:
                self._note(packet)
            self.times.append((packet.pts, packet.dts))
            self._held_bytes += packet.size * is_of_use
            shown += picture.is_shown
            missing -= picture.is_shown
            if not missing:
                break
        if self._begins_within:
            raise UncertainError("the file does not begin with a picture that stands alone")
        if self._entry is not None:
            raise UncertainError("an edit list leaves pictures out that others refer to")

    def _check_gap(self, picture: Picture, packet: av.Packet) -> None:
        """An edit list may go on at a key frame that is no IDR. What is shown before that needs the missing ones."""
        if picture.follows_gap and packet.is_keyframe and picture.is_intra:
            self._entry = picture.order
        elif picture.follows_gap or (self._entry is not None and picture.is_shown and picture.order < self._entry):
            raise MissingPictureError("a picture that others refer to is missing")

    def _forget(self, wanted: np.ndarray) -> None:
        """Lets go of groups that have ended and hold nothing of `wanted`, unless the group after them does, which may
        need them. Where pictures of a group are shown is known to within the reordering of the stream; `select` sees
        where that was wrong."""
        while self._let_go < len(self._groups) - 2:
            (first, before), (end, _), (_, after) = self._groups[self._let_go : self._let_go + 3]
            self._let_go += 1
            around = self._held_back + self._codec.reorder
            low, high = np.searchsorted(wanted, [before - around, after + around])
            if low == high:
                self._held_bytes -= sum(packet.size for packet in self.packets[first:end])
                self.packets[first:end] = [None] * (end - first)


def video_stream(container: av.container.InputContainer) -> av.video.stream.VideoStream | None:
    """The one that FFmpeg takes (marked default, most frames, highest bit rate), unless it is a cover picture."""

    def is_cover(stream: av.video.stream.VideoStream) -> bool:
        return bool(stream.disposition & Disposition.attached_pic)

    best = container.streams.best("video")
    if best is None or not is_cover(best):
        return best
    return next((stream for stream in container.streams.video if not is_cover(stream)), None)


def demux(container: av.container.InputContainer) -> Iterator[av.Packet]:
    """The packets of its video stream, but for one that the end of the file cuts off: many decoders make up the rest of
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


def _is_cut(packet: av.Packet, kind: str, size: int) -> bool:
    """Whether the file, of a format and bytes, ends before this packet does."""
    end = (packet.pos or 0) + packet.size
    if packet.is_corrupt:
        return kind != "mpegts"  # there it says that something is missing before the packet
    if kind == "dv":  # filled up with bytes of the frame before
        return 0 < size < end
    # The image data of a GIF ends with an empty block, and the file with a semicolon.
    return kind == "gif" and end == size and bytes(packet)[-1] not in b"\0;"


class Remuxed(NamedTuple):
    encoded: np.ndarray
    """uint8 [bytes]: a small file of the needed packets only."""
    size: tuple[int, int]
    """(height, width) of its frames."""
    positions: np.ndarray
    """int64: where the wanted pictures are among those that it holds."""
    packets_read: int
    packets_kept: int
    reorder_delay: int
    """Frames that a decoder has to hold back to put these packets out in order."""
    parameter_sets: list[bytes]
    """H.264 and HEVC: the NAL units of SPS and PPS. MPEG-4: the video object layer. Other codecs have none."""


REMUXED_FPS = 8
"""Frames/s of what `remux` makes, from 0 on: frame k is shown at k / `REMUXED_FPS` seconds. A power of two: then
durations are exact, from which torchcodec computes how many frames there are (1.16 s * 25 would be 28.999...)."""


class Rewrite(NamedTuple):
    """New parameter sets by those that they replace, and the resulting (height, width) of the frames."""

    sets: dict[bytes, bytes]
    size: tuple[int, int]


def remux(
    container: av.container.InputContainer,
    positions: np.ndarray,
    rewrite: Callable[[str, list[bytes]], Rewrite | None] | None = None,
) -> Remuxed:
    """The packets for `positions` as a file of their own in memory: MP4, or Matroska where MP4 does not fit.

    `rewrite` is called with the codec and `Remuxed.parameter_sets`.

    Its frames are numbered anew from 0 and evenly spaced, whatever the timestamps were, and are not turned. Only the
    first is marked as a keyframe, so that no decoder seeks: after a seek to an I-VOP, MPEG-4's B-VOPs are lost. Raises
    `UncertainError`.
    """
    stream = video_stream(container)
    return remux_packets(PacketReader(container), stream, stream.codec_context, positions, rewrite)


def remux_packets(
    reader: Any,
    template: av.video.stream.VideoStream,
    context: av.VideoCodecContext,
    positions: np.ndarray,
    rewrite: Callable[[str, list[bytes]], Rewrite | None] | None = None,
) -> Remuxed:
    """`remux` for a `PacketReader`, or what selects packets as it does, and a stream with the codec's header in it,
    which is `context`'s."""
    selection = reader.select(positions, in_one_go=True)
    numbers = [number for run in selection.runs for number in run]
    if any(not reader.flags[number] & (_SHOWN | _DISCARDED) for number in numbers):
        raise UncertainError("some of its pictures are not shown")
    ranks = {number: rank for rank, number in enumerate(reader.order(numbers))}
    delay = max(place - ranks[number] for place, number in enumerate(numbers))
    codec, header = context.codec.canonical_name, bytes(context.extradata or b"")
    headers = codec_headers(codec, header)
    in_matroska = codec in ("vp8", "vp9", "mjpeg")
    rewritten = rewrite(codec, headers.parameter_sets) if rewrite else None
    sets = rewritten.sets if rewritten else {}
    size = rewritten.size if rewritten else (context.height, context.width)
    file = io.BytesIO()
    # Without an edit list, which would say where the first picture is, the demuxer need not understand one.
    options = {} if in_matroska else {"movflags": "+negative_cts_offsets", "use_editlist": "0"}
    with av.open(file, "w", format="matroska" if in_matroska else "mp4", options=options) as out:
        stream = out.add_stream_from_template(template, opaque=True)
        stream.time_base = tick = Fraction(1, REMUXED_FPS)
        stream.set_display_rotation(0)
        if sets:
            stream.codec_context.extradata = _replaced(header, sets, in_header=True)
            stream.height, stream.width = size
        for place, number in enumerate(numbers):
            packet = reader.packet(number)
            if sets and any(old in memoryview(packet).tobytes() for old in sets):
                packet = av.Packet(_replaced(bytes(packet), sets, length_size=getattr(headers, "length_size", 0)))
            if codec == "mpeg4" and place == 0:
                packet = _with_layer(packet, header)
            packet.stream, packet.time_base, packet.duration = stream, tick, 1
            packet.pts, packet.dts = ranks[number], place - delay
            packet.is_keyframe = place == 0
            out.mux(packet)
    wanted = [ranks[selection.shown[position]] for position in positions.tolist()]
    return Remuxed(
        np.frombuffer(file.getbuffer(), np.uint8),
        size,
        np.array(wanted),
        reader.packets_read,
        len(numbers),
        delay,
        headers.parameter_sets,
    )


def _replaced(data: bytes, sets: dict[bytes, bytes], *, length_size: int = 0, in_header: bool = False) -> bytes:
    """`data` with other parameter sets, in a packet or in a codec's header: each with its length in front (2 bytes in a
    header), or after a start code. Raises `UncertainError` if a header does not hold them as they are."""
    if in_header and data[:1] == b"\1":
        length_size = 2
    for old, new in sets.items():
        before, after = (len(each).to_bytes(length_size) + each if length_size else each for each in (old, new))
        if before not in data:
            if in_header:
                raise UncertainError("parameter sets that cannot be rewritten")
            continue
        data = data.replace(before, after)
    return data


def _with_layer(packet: av.Packet, extradata: bytes) -> av.Packet:
    """The packet with MPEG-4's stream header in front of it, for decoders that do not read the container's."""
    data = bytes(packet)
    return packet if any(map(_is_mpeg4_layer, _annex_b(data))) else av.Packet(extradata + data)


# -- reading bits --


class Bits:
    """Unsigned numbers from the start of some bytes."""

    def __init__(self, data: bytes):
        self._value = int.from_bytes(data)
        self._count = self._left = 8 * len(data)

    @property
    def place(self) -> int:
        """Bits read so far."""
        return self._count - self._left

    def u(self, count: int) -> int:
        """The next `count` bits."""
        self._left -= count
        if self._left < 0:
            raise UncertainError("a header is cut off")
        return self._value >> self._left & ((1 << count) - 1)

    def ue(self) -> int:
        """An Exp-Golomb number."""
        rest = self._value & ((1 << self._left) - 1)
        zeros = self._left - rest.bit_length()
        self.u(zeros)
        return self.u(zeros + 1) - 1


def rbsp(nal: bytes) -> bytes:
    """Without the bytes that keep start codes from appearing in it."""
    return nal.replace(b"\0\0\3", b"\0\0")


def _annex_b(data: bytes) -> Iterator[bytes]:
    """The units between start codes."""
    start = data.find(b"\0\0\1")
    while start >= 0:
        end = data.find(b"\0\0\1", start + 3)
        yield data[start + 3 : end if end >= 0 else None].rstrip(b"\0")
        start = end


def _length_prefixed(data: memoryview, size: int) -> Iterator[memoryview]:
    place = 0
    while place < len(data):
        end = place + size + int.from_bytes(data[place : place + size])
        if end > len(data):
            raise UncertainError("a packet is cut off")
        yield data[place + size : end]
        place = end


_SLICE_HEADER = 32  # bytes, more than those read of one


class _NalCodec:
    """What H.264 and HEVC share: packets of NAL units, parameter sets, picture order counts."""

    reorder = 16  # pictures that a decoder may hold back: the size of its buffer at most
    waits_for_start = False

    def __init__(self, extradata: bytes):
        self._sets: dict[tuple[str, int], Any] = {}  # ("sps" or "pps", id) -> what is needed of it
        self._known: set[bytes] = set()
        self._active_sps: int | None = None  # its number
        self._sequence = -1  # number of the last picture that restarted the order count
        self._previous = 0  # order count that the next one is relative to
        self.length_size = 0  # 0: start codes
        units = _annex_b(extradata)
        if extradata[:1] == b"\1":
            self.length_size, units = self._read_configuration(extradata)
        for unit in units:
            self._keep_set(unit)

    @property
    def parameter_sets(self) -> list[bytes]:
        return sorted(self._known)

    def _units(self, data: memoryview) -> Iterable[memoryview | bytes]:
        return _length_prefixed(data, self.length_size) if self.length_size else _annex_b(bytes(data))

    def _check_set(self, unit: bytes) -> None:
        """A set within the stream must be one of those before it: a decoder that skips packets could miss it."""
        if unit.rstrip(b"\0") not in self._known:
            raise UncertainError("the parameters of the stream change")

    def _parameters(self, number: int) -> tuple[Any, Any]:
        """(PPS, its SPS)."""
        try:
            pps = self._sets["pps", number]
            sps = self._sets["sps", pps.sps]
        except KeyError:
            raise UncertainError("a picture without its parameters") from None
        if self._active_sps not in (None, pps.sps):  # the size may be another
            raise UncertainError("the parameters of the stream change")
        self._active_sps = pps.sps
        return pps, sps

    def _order_count(self, lsb: int, bits: int) -> int:
        """The full count from its low bits: the one near the previous (H.264 8.2.1.1, H.265 8.3.1)."""
        period = 1 << bits
        previous_lsb = self._previous % period
        count = self._previous - previous_lsb + lsb
        if previous_lsb - lsb >= period // 2:
            return count + period
        if lsb - previous_lsb > period // 2:
            return count - period
        return count


def _read_sets(data: bytes, place: int, count: int) -> Iterator[bytes]:
    """`count` units with 16-bit lengths."""
    for _ in range(count):
        end = place + 2 + int.from_bytes(data[place : place + 2])
        yield data[place + 2 : end]
        place = end


class H264Sps(NamedTuple):
    frame_number_bits: int
    gaps_allowed: int
    order_type: int
    order_bits: int
    width: int
    """Coded, in macroblocks."""
    map_units: int
    """Coded height, in macroblocks of a frame (`frames_only`) or of a field."""
    frames_only: int


class _H264Pps(NamedTuple):
    sps: int


class _H264(_NalCodec):
    def __init__(self, extradata: bytes):
        super().__init__(extradata)
        self._count = 0
        self._is_intra = self._follows_gap = False  # the picture that is being read
        self._frame_number: int | None = None  # of the last picture that others may refer to

    @staticmethod
    def _read_configuration(data: bytes) -> tuple[int, list[bytes]]:
        """avcC: bytes of a length, parameter sets."""
        sps = list(_read_sets(data, 6, data[5] & 31))
        place = 6 + sum(2 + len(unit) for unit in sps)
        return (data[4] & 3) + 1, sps + list(_read_sets(data, place + 1, data[place]))

    def _keep_set(self, unit: bytes) -> None:
        self._known.add(unit.rstrip(b"\0"))
        bits = Bits(rbsp(unit[1:]))
        if unit[0] & 31 == 7:
            profile = bits.u(24) >> 16
            number = bits.ue()
            self._sets["sps", number] = h264_sps(profile, bits)
        elif unit[0] & 31 == 8:
            number = bits.ue()
            self._sets["pps", number] = _H264Pps(bits.ue())

    def picture(self, data: memoryview) -> Picture:
        starts_group = is_reference = self._follows_gap = False
        self._is_intra = True
        counts, fields = [], 0
        for unit in self._units(data):
            kind = unit[0] & 31 if len(unit) > 1 else 0
            if kind in (1, 5):
                is_reference |= unit[0] & 0x60 > 0
                if unit[1] & 0x80:  # first_mb_in_slice 0: a frame or field begins
                    if kind == 5 and not counts:
                        starts_group = True
                        self._sequence += 1
                        self._previous = self._frame_number = 0
                    count, is_field = self._read_slice(unit)
                    counts.append(count)
                    fields += is_field
            elif kind in (7, 8):
                self._check_set(bytes(unit))
            elif kind in (2, 3, 4):
                raise UncertainError("data partitions")
        if not counts:
            raise UncertainError("a packet without the beginning of a picture")
        if fields == 1:
            raise UncertainError("packets of one field each")
        if len(counts) > max(fields, 1) or fields > 2:
            raise UncertainError("packets of several pictures")
        return Picture(
            (self._sequence, min(counts)),
            starts_group=starts_group,
            is_disposable=not is_reference,
            is_intra=self._is_intra,
            follows_gap=self._follows_gap,
        )

    def _read_slice(self, unit: memoryview | bytes) -> tuple[int, int]:
        """(order count, 1 where it is of one field)."""
        bits = Bits(rbsp(bytes(unit[1:_SLICE_HEADER])))
        bits.ue()  # first_mb_in_slice
        self._is_intra &= bits.ue() in _H264_I_SLICES
        _, sps = self._parameters(bits.ue())
        frame_number = bits.u(sps.frame_number_bits)
        if self._frame_number is None:  # the file begins within a group
            self._frame_number = frame_number
        gap = (frame_number - self._frame_number) % (1 << sps.frame_number_bits)
        self._follows_gap |= gap > 1 and not sps.gaps_allowed
        if unit[0] & 0x60:
            self._frame_number = frame_number
        is_field = 0 if sps.frames_only else bits.u(1)
        bits.u(is_field)  # bottom_field_flag
        if unit[0] & 31 == 5:
            bits.ue()  # idr_pic_id
        self._count += 1
        if sps.order_type == 2:  # shown as decoded
            return self._count, is_field
        count = self._order_count(bits.u(sps.order_bits), sps.order_bits)
        if unit[0] & 0x60:
            self._previous = count
        return count, is_field


_H264_I_SLICES = (2, 7)
_H264_HIGH = (100, 110, 122, 244, 44, 83, 86, 118, 128, 138, 139, 134, 135)


def h264_sps(profile: int, bits: Bits) -> H264Sps:
    """`bits` begin after seq_parameter_set_id; they are read up to frame_mbs_only_flag."""
    if profile in _H264_HIGH:
        chroma = bits.ue()
        if chroma == 3:  # FFmpeg decodes it by the version of x264 that only the first packet names
            raise UncertainError("4:4:4")
        bits.ue(), bits.ue(), bits.u(1)  # bit depths, lossless
        if bits.u(1):  # scaling matrices
            for index in range(8):
                if bits.u(1):
                    _skip_scaling_list(bits, 16 if index < 6 else 64)
    frame_number_bits = bits.ue() + 4
    order_type = bits.ue()
    if order_type == 1:
        raise UncertainError("picture order count type 1")
    order_bits = bits.ue() + 4 if order_type == 0 else 0
    bits.ue()  # reference frames
    gaps_allowed = bits.u(1)
    width, map_units = bits.ue() + 1, bits.ue() + 1
    return H264Sps(frame_number_bits, gaps_allowed, order_type, order_bits, width, map_units, bits.u(1))


def _skip_scaling_list(bits: Bits, size: int) -> None:
    last = following = 8
    for _ in range(size):
        if following:
            code = bits.ue()
            following = (last + (code + 1) // 2 * (1 if code % 2 else -1)) % 256
        last = following or last


class HevcSps(NamedTuple):
    is_interlaced: bool
    """The source was, and the frames may be fields."""
    top_layer: int
    separate_planes: int
    width: int
    """Coded, in pixels."""
    height: int
    window: tuple[int, int, int, int]
    """Left, right, top, bottom of the conformance window, in units of chroma samples."""
    order_bits: int


class _HevcPps(NamedTuple):
    sps: int
    has_output_flag: int
    extra_bits: int


class _Hevc(_NalCodec):
    def __init__(self, extradata: bytes):
        super().__init__(extradata)
        self._ended = False
        self._skips_leading = True  # RASL pictures of the last start of a group refer to what a decoder never had

    @staticmethod
    def _read_configuration(data: bytes) -> tuple[int, list[bytes]]:
        """hvcC: bytes of a length, parameter sets."""
        units: list[bytes] = []
        place = 23
        for _ in range(data[22]):
            array = list(_read_sets(data, place + 3, int.from_bytes(data[place + 1 : place + 3])))
            place += 3 + sum(2 + len(unit) for unit in array)
            units += array
        return (data[21] & 3) + 1, units

    def _keep_set(self, unit: bytes) -> None:
        if unit[0] & 1 or unit[1] >> 3:  # of another layer
            return
        self._known.add(unit.rstrip(b"\0"))
        bits = Bits(rbsp(unit[2:]))
        if unit[0] >> 1 == 33:
            number, sps = hevc_sps(bits)
            self._sets["sps", number] = sps
        elif unit[0] >> 1 == 34:
            number, sps_number = bits.ue(), bits.ue()
            self._sets["pps", number] = _HevcPps(sps_number, bits.u(2) & 1, bits.u(3))

    def picture(self, data: memoryview) -> Picture:
        found = None
        for unit in self._units(data):
            if len(unit) < 2 or unit[0] & 1 or unit[1] >> 3:  # of another layer
                continue
            kind = unit[0] >> 1
            if kind < 32:
                if unit[2] & 0x80:  # first_slice_segment_in_pic_flag
                    if found:
                        raise UncertainError("packets of several pictures")
                    found = self._read_slice(kind, unit)
            elif kind in (33, 34):
                self._check_set(bytes(unit))
            elif kind in (36, 37):
                self._ended = True
        if found is None:
            raise UncertainError("a packet without the beginning of a picture")
        return found

    def _read_slice(self, kind: int, unit: memoryview | bytes) -> Picture:
        if self._ended:
            raise UncertainError("a sequence ends within the file")
        if 10 <= kind < 16 or kind > 21:
            raise UncertainError("a reserved kind of picture")
        is_first, is_idr, is_rasl = self._sequence < 0, kind in (19, 20), kind in (8, 9)
        bits = Bits(rbsp(bytes(unit[2:_SLICE_HEADER])))
        bits.u(1)
        if kind >= 16 and bits.u(1) and not is_first:
            raise UncertainError("pictures that are decoded and thrown away")
        pps, sps = self._parameters(bits.ue())
        bits.u(pps.extra_bits)
        bits.ue()  # slice_type
        is_shown = bits.u(1) if pps.has_output_flag else 1
        bits.u(2 * sps.separate_planes)
        restarts = is_first or 16 <= kind <= 20  # IDR, BLA: the order count begins anew
        if restarts:
            self._sequence += 1
            self._previous = 0
        if kind >= 16:
            self._skips_leading = restarts
        lsb = 0 if is_idr else bits.u(sps.order_bits)
        count = lsb if restarts else self._order_count(lsb, sps.order_bits)
        layer = (unit[1] & 7) - 1
        is_unreferenced = kind < 16 and kind % 2 == 0  # by pictures of its own temporal layer
        if layer == 0 and not is_unreferenced and not 6 <= kind <= 9:
            self._previous = count
        is_skipped = is_rasl and self._skips_leading
        return Picture(
            (self._sequence, count),
            starts_group=kind >= 16,
            is_clean=restarts,
            is_leading=is_rasl,
            is_disposable=is_skipped or (is_unreferenced and layer == sps.top_layer),
            is_shown=bool(is_shown) and not is_skipped,
        )


def hevc_sps(bits: Bits) -> tuple[int, HevcSps]:
    """(its number, its values); `bits` are read up to log2_max_pic_order_cnt_lsb_minus4."""
    number, is_interlaced, top_layer, separate_planes, (height, width) = hevc_up_to_window(bits)
    window = (bits.ue(), bits.ue(), bits.ue(), bits.ue()) if bits.u(1) else (0, 0, 0, 0)
    bits.ue(), bits.ue()  # bit depths
    return number, HevcSps(is_interlaced, top_layer, separate_planes, width, height, window, bits.ue() + 4)


def hevc_up_to_window(bits: Bits) -> tuple[int, bool, int, int, tuple[int, int]]:
    """(number, whether it is interlaced, top layer, separate planes, coded (height, width)) of an SPS; `bits` are read
    up to conformance_window_flag."""
    bits.u(4)
    top_layer = bits.u(3)
    bits.u(1)
    bits.u(2 + 1 + 5 + 32)  # profile: space, tier, number, compatibility
    progressive_source_flag, interlaced_source_flag = bits.u(1), bits.u(1)
    bits.u(46 + 8)  # constraints, level
    present = [(bits.u(1), bits.u(1)) for _ in range(top_layer)]
    if top_layer:
        bits.u(2 * (8 - top_layer))
    for has_profile, has_level in present:
        bits.u(88 * has_profile + 8 * has_level)
    number = bits.ue()
    separate_planes = bits.u(1) if bits.ue() == 3 else 0
    width, height = bits.ue(), bits.ue()
    is_interlaced = bool(interlaced_source_flag and not progressive_source_flag)
    return number, is_interlaced, top_layer, separate_planes, (height, width)


class _Mpeg4:
    """MPEG-4 part 2. A reference picture is shown when the next one is decoded, a B picture at once."""

    reorder = 1
    waits_for_start = False

    def __init__(self, extradata: bytes):
        self._layer = next(filter(_is_mpeg4_layer, _annex_b(extradata)), None)
        if self._layer is None:
            raise UncertainError("no header of the stream")
        self._resolution, self._has_b = _mpeg4_layer(Bits(self._layer[1:]))
        self._references = self._count = 0
        self._follows_start = False
        self._seconds = self._previous_seconds = 0  # that times of the next reference, and of B pictures, count from
        self._times = (0, 0)  # of the last two references

    @property
    def parameter_sets(self) -> list[bytes]:
        return [self._layer]

    def picture(self, data: memoryview) -> Picture:
        units = list(_annex_b(bytes(data)))
        pictures = [unit for unit in units if unit[:1] == b"\xb6"]
        if any(_is_mpeg4_layer(unit) and unit != self._layer for unit in units):
            raise UncertainError("the parameters of the stream change")
        if len(pictures) != 1:
            raise UncertainError("packets of several pictures" if pictures else "a packet without a picture")
        bits = Bits(pictures[0][1:_SLICE_HEADER])
        kind = bits.u(2)
        for unit in units:
            if unit[:1] == b"\xb3":
                self._seconds = _mpeg4_seconds(Bits(unit[1:]))
        self._read_time(bits, is_b=kind == 2)
        if not bits.u(1):
            raise UncertainError("pictures that are not coded")
        self._count += 1
        if kind == 2:
            if self._references < 2:
                raise UncertainError("the file does not begin with a picture that stands alone")
            # Shown before the reference that was decoded last.
            order = (2 * self._references, self._count)
            return Picture(order, is_leading=self._follows_start, is_disposable=True)
        self._references += 1
        self._follows_start = kind == 0
        return Picture((2 * self._references + 1, 0), starts_group=kind == 0)

    def _read_time(self, bits: Bits, *, is_b: bool) -> None:
        """FFmpeg throws B pictures away whose times are not between those of the two references, and shows references
        at once where no B pictures are announced."""
        seconds = 0
        while bits.u(1):
            seconds += 1
        bits.u(1)
        increment = bits.u(max((self._resolution - 1).bit_length(), 1))
        bits.u(1)
        if not is_b:
            self._previous_seconds, self._seconds = self._seconds, self._seconds + seconds
            self._times = self._times[1], self._seconds * self._resolution + increment
            return
        before, after = self._times
        time = (self._previous_seconds + seconds) * self._resolution + increment
        if not (before < time < after < before + 65536):
            raise UncertainError("the times of its pictures disagree with their order")
        if not self._has_b:
            raise UncertainError("pictures are held back for longer than the stream says")


def _is_mpeg4_layer(unit: bytes) -> bool:
    return len(unit) > 1 and 0x20 <= unit[0] <= 0x2F


def _mpeg4_seconds(bits: Bits) -> int:
    """The time code of a group of pictures."""
    hours, minutes = bits.u(5), bits.u(6)
    bits.u(1)
    return bits.u(6) + 60 * (minutes + 60 * hours)


def _mpeg4_layer(bits: Bits) -> tuple[int, bool]:
    """(units of time a second, whether B pictures are announced), from a video object layer."""
    bits.u(1 + 8)
    if bits.u(1):
        bits.u(4 + 3)
    if bits.u(4) == 15:  # aspect ratio
        bits.u(16)
    has_b = False
    if bits.u(1):
        bits.u(2)
        has_b = not bits.u(1)
        if bits.u(1):
            bits.u(79)
    if bits.u(2):
        raise UncertainError("pictures that are no rectangles")
    bits.u(1)
    return bits.u(16), has_b


class _InOrder(abc.ABC):
    """Codecs that show pictures in the order of their packets."""

    reorder = 0
    waits_for_start = True
    """A decoder puts nothing out before the first group starts."""
    parameter_sets: ClassVar[list[bytes]] = []

    def __init__(self, extradata: bytes):
        self._count = 0
        self._size: tuple[int, int] | None = None
        self._colours: Any = None

    def _check_colours(self, colours: Any) -> None:
        """Raises `UncertainError` if a key frame has another range or matrix than the first: torchcodec does not
        follow."""
        if self._colours not in (None, colours):
            raise UncertainError("the colours of the frames change")
        self._colours = colours

    def _check_size(self, size: tuple[int, int]) -> None:
        """Raises `UncertainError` if a frame has another size than those before it: hardware decoders do not follow."""
        if self._size not in (None, size):
            raise UncertainError("the size of the frames changes")
        self._size = size

    def picture(self, data: memoryview) -> Picture:
        self._count += 1
        return self._read(data)._replace(order=(0, self._count))

    @abc.abstractmethod
    def _read(self, data: memoryview) -> Picture:
        """The picture of a packet, but for its order."""


class _Mjpeg(_InOrder):
    _place, _header = 0, b""  # of the last header of a frame: most packets have the same one at the same place

    def _read(self, data: memoryview) -> Picture:
        if not self._header or data[self._place : self._place + len(self._header)] != self._header:
            self._read_size(data)
        return Picture(starts_group=True, is_disposable=True)

    def _read_size(self, data: memoryview) -> None:
        place = 2  # after the marker of the start
        while data[place] == 0xFF:
            if data[place + 1] in _JPEG_FRAMES:
                self._place, self._header = place, bytes(data[place : place + 9])
                self._check_size((int.from_bytes(self._header[7:9]), int.from_bytes(self._header[5:7])))
                return
            place += 2 + int.from_bytes(data[place + 2 : place + 4])


_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
"""Markers of headers of a frame (SOF): the others in this range define tables."""


class _Vp8(_InOrder):
    def _read(self, data: memoryview) -> Picture:
        if not data[0] & 1:
            width, height = (int.from_bytes(data[at : at + 2], "little") & 0x3FFF for at in (6, 8))
            self._check_size((width, height))
            self._check_colours(data[10] >> 6)  # color_space and clamping_type, which FFmpeg takes for the range
        return Picture(starts_group=not data[0] & 1, is_shown=bool(data[0] & 0x10))


class _Vp9(_InOrder):
    """Every picture may change the probabilities that the next ones are coded with: none is disposable."""

    _has_begun = False

    def _read(self, data: memoryview) -> Picture:
        frames = [self._read_frame(frame) for frame in self._frames(data)]
        shown = sum(is_shown for _, is_shown in frames)
        if shown > 1:
            raise UncertainError("packets of several pictures")
        return Picture(starts_group=frames[0][0], is_shown=bool(shown))

    @staticmethod
    def _frames(data: memoryview) -> Iterator[memoryview]:
        """Those of a superframe: its index, the last bytes, has their sizes."""
        marker = data[-1]
        count, width = (marker & 7) + 1, (marker >> 3 & 3) + 1
        index = data[-2 - count * width : -1]
        if marker >> 5 != 6 or len(index) != 1 + count * width or index[0] != marker:
            yield data
            return
        place = 0
        for number in range(count):
            size = int.from_bytes(index[1 + number * width : 1 + (number + 1) * width], "little")
            if size:
                yield data[place : place + size]
            place += size

    def _read_frame(self, data: memoryview) -> tuple[bool, bool]:
        """(is a key frame, is shown)."""
        bits = Bits(bytes(data[:20]))
        bits.u(2)  # frame_marker
        profile = bits.u(1) + 2 * bits.u(1)
        if profile == 3:
            bits.u(1)
        if bits.u(1):  # show_existing_frame
            return False, True
        is_key, is_shown, is_resilient = not bits.u(1), bool(bits.u(1)), bits.u(1)
        self._has_begun |= is_key
        if is_key:
            bits.u(24)  # frame_sync_code
            self._check_colours(self._read_colours(bits, profile))
            self._check_size((bits.u(16) + 1, bits.u(16) + 1))
        else:
            self._read_inter_size(bits, profile, is_resilient, is_shown)
        return is_key, is_shown

    @staticmethod
    def _read_colours(bits: Bits, profile: int) -> tuple[int, ...]:
        is_deep = bits.u(1) if profile >= 2 else 0  # ten_or_twelve_bit
        matrix = bits.u(3)  # color_space
        has_sampling = profile in (1, 3)  # subsampling_x, subsampling_y, reserved; after color_range, but for sRGB
        return profile, is_deep, matrix, bits.u(has_sampling if matrix == 7 else 1 + 3 * has_sampling)

    def _read_inter_size(self, bits: Bits, profile: int, is_resilient: int, is_shown: bool) -> None:
        intra_only = 0 if is_shown else bits.u(1)
        if intra_only and not self._has_begun:
            raise UncertainError("the file does not begin with a picture that stands alone")
        if not is_resilient:
            bits.u(2)  # reset_frame_context
        if intra_only:
            bits.u(24)  # frame_sync_code
            if profile:
                self._read_colours(bits, profile)
            bits.u(8)  # refresh_frame_flags
            self._check_size((bits.u(16) + 1, bits.u(16) + 1))
            return
        bits.u(8)  # refresh_frame_flags
        bits.u(3 * (3 + 1))  # ref_frame_idx, ref_frame_sign_bias
        if not any(bits.u(1) for _ in range(3)):  # found_ref: that of a reference, which is the same so far
            self._check_size((bits.u(16) + 1, bits.u(16) + 1))


class _Av1Sequence(NamedTuple):
    order_bits: int
    screen_content: int
    integer_vectors: int


class _Av1(_InOrder):
    """A packet is a temporal unit: one picture that is shown, and hidden ones."""

    _header: bytes | None = None
    _sequence: _Av1Sequence

    def _read(self, data: memoryview) -> Picture:
        frames, has_header = [], False
        for kind, unit in _obus(data):
            if kind == 1:
                has_header = True
                self._keep_header(bytes(unit))
            elif kind in (3, 6):
                frames.append(self._read_frame(unit))
        shown = sum(frame.is_shown for frame in frames)
        if shown != 1:
            raise UncertainError("packets of several pictures" if shown else "a packet without a picture")
        return Picture(
            starts_group=has_header and frames[0].starts_group,
            is_disposable=all(frame.is_disposable for frame in frames),
        )

    def _keep_header(self, header: bytes) -> None:
        """The stream's own; that of the file may say other things (SVT-AV1's does)."""
        if self._header is None:
            self._header, self._sequence = header, _av1_sequence(Bits(header))
        elif header != self._header:
            raise UncertainError("the parameters of the stream change")

    def _read_frame(self, data: memoryview) -> Picture:
        if self._header is None:
            raise UncertainError("the file does not begin with a picture that stands alone")
        bits = Bits(bytes(data[:16]))
        if bits.u(1):  # shows an earlier one
            return Picture()
        kind, is_shown = bits.u(2), bits.u(1)
        bits.u(not is_shown)
        is_key, is_switch = kind == 0 and is_shown, kind == 3
        is_resilient = 1 if is_key or is_switch else bits.u(1)
        bits.u(1)
        choose = 2
        allows = bits.u(1) if self._sequence.screen_content == choose else self._sequence.screen_content
        bits.u(allows and self._sequence.integer_vectors == choose)
        if is_switch or bits.u(1):  # frame_size_override_flag
            raise UncertainError("the size of the frames changes")
        bits.u(self._sequence.order_bits)
        bits.u(3 * (kind == 1 and not is_resilient))  # primary reference
        refreshed = 255 if is_key or is_switch else bits.u(8)
        return Picture(starts_group=bool(is_key), is_disposable=not refreshed, is_shown=bool(is_shown))


def _obus(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """(type, payload) of the units of an AV1 packet."""
    place = 0
    while place < len(data):
        head = data[place]
        place += 1 + (head >> 2 & 1)
        size, shift = len(data) - place, 0
        if head & 2:
            size = 0
            while place < len(data):
                byte = data[place]
                place += 1
                size |= (byte & 127) << shift
                shift += 7
                if byte < 128:
                    break
        if place + size > len(data):
            raise UncertainError("a packet is cut off")
        yield head >> 3 & 15, data[place : place + size]
        place += size


def _av1_sequence(bits: Bits) -> _Av1Sequence:
    bits.u(3)
    if bits.u(2):
        raise UncertainError("a still picture")
    if bits.u(1):
        raise UncertainError("timing in the header of the stream")
    has_delay = bits.u(1)
    if bits.u(5):
        raise UncertainError("several layers")
    bits.u(12)
    if bits.u(5) > 7:
        bits.u(1)
    if has_delay and bits.u(1):
        bits.u(4)
    width_bits, height_bits = bits.u(4) + 1, bits.u(4) + 1
    bits.u(width_bits + height_bits)
    if bits.u(1):
        raise UncertainError("numbers of frames in their headers")
    bits.u(3 + 4)
    has_order = bits.u(1)
    bits.u(2 * has_order)
    screen_content = 2 if bits.u(1) else bits.u(1)
    integer_vectors = 2
    if screen_content:
        integer_vectors = 2 if bits.u(1) else bits.u(1)
    return _Av1Sequence(bits.u(3) + 1 if has_order else 0, screen_content, integer_vectors)


_CODECS = {
    "av1": _Av1,
    "h264": _H264,
    "hevc": _Hevc,
    "mjpeg": _Mjpeg,
    "mpeg4": _Mpeg4,
    "vp8": _Vp8,
    "vp9": _Vp9,
}


def codec_headers(codec: str, extradata: bytes) -> Any:
    """What reads the headers of a stream's packets. Raises `UncertainError` where there are no rules for its codec."""
    if codec not in _CODECS:
        raise UncertainError(f"no rules for {codec}")
    try:
        return _CODECS[codec](extradata)
    except IndexError:
        raise UncertainError("a header is cut off") from None
