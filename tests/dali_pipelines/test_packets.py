"""Selected packets must give exactly the frames that decoding everything gives, whatever the stream looks like."""

import contextlib
import io
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dali_pipelines import InputError, packets
from dali_pipelines.bitstream.bits import Bits
from dali_pipelines.bitstream.codecs import make_parser
from dali_pipelines.bitstream.parser import UncertainError
from dali_pipelines.files import Source, open_video
from dali_pipelines.host_decoder import decode_frames, decode_indexed
from dali_pipelines.packet_index import IndexedVideo, StaleIndexError, open_header
from dali_pipelines.packets import PacketReader, remux, remux_packets
from dali_pipelines.probe import probe, probe_packets
from tests.videos import decode_all, edit_packets, join_packets, textured, write_video

FRAMES = textured(60, height=64, width=80)

CONTAINERS = {
    "h264": ["mp4", "mkv", "mov", "avi", "ts", "h264"],
    "hevc": ["mp4", "mkv", "mov", "ts", "hevc"],
    "mpeg4": ["mp4", "mkv", "avi", "m4v"],
    "vp9": ["webm", "mkv", "mp4"],
    "vp8": ["webm", "mkv", "avi"],
    "mjpeg": ["avi", "mkv", "mov"],
    "av1": ["mp4", "mkv", "webm"],
}
IN_PIECES = {"ts"}
"""Containers that cut packets into pieces: no packet index."""


@st.composite
def streams(draw, codec):
    """(suffix, encoder options, frames, frames per second)."""

    def one_of(*values):
        return draw(st.sampled_from(values))

    group = one_of(1, 5, 12, 100)
    options = {"g": str(max(group, 2))}
    if codec == "h264":
        params = {
            "keyint": group,
            "bframes": one_of(0, 1, 3, 8),
            "b-pyramid": one_of("none", "strict", "normal"),
            "b-adapt": 0,
            "open-gop": one_of(0, 1),
            "intra-refresh": one_of(0, 0, 0, 1),
            "ref": one_of(1, 4),
            "slices": one_of(1, 3),
            "tff": one_of(0, 0, 0, 1),
            "scenecut": 0,
        }
        options = {"preset": "veryfast", "x264-params": ":".join(f"{key}={value}" for key, value in params.items())}
    elif codec == "hevc":
        params = {"log-level": "none", "keyint": max(group, 12), "bframes": one_of(0, 3), "b-pyramid": one_of(0, 1)}
        params |= {"open-gop": one_of(0, 1), "temporal-layers": one_of(0, 0, 3), "scenecut": 0}
        options = {"preset": "ultrafast", "x265-params": ":".join(f"{key}={value}" for key, value in params.items())}
    elif codec == "mpeg4":
        options |= {"bf": one_of("0", "1", "3"), "flags": one_of("+mv4", "+qpel", "+cgop")}
        options["g"] = str(group) if options["flags"] == "+cgop" else options["g"]
        if options["flags"] == "+cgop":
            options |= {"sc_threshold": "1000000000"}
    elif codec in ("vp8", "vp9"):
        options |= {"auto-alt-ref": one_of("0", "1"), "lag-in-frames": one_of("0", "16")}
        options |= {"deadline": one_of("realtime", "good")}
    elif codec == "mjpeg":
        options = {}
    fps = one_of(Fraction(25), Fraction(30000, 1001), Fraction(10))
    return one_of(*CONTAINERS[codec]), options, one_of(1, 2, 25, 60, 60), fps


@st.composite
def wanted(draw):
    """Shares of the length at which frames are wanted."""
    return draw(st.lists(st.floats(0, 1), min_size=1, max_size=8))


def check(path, shares, everything, entry=None):
    positions = np.unique([round(share * (len(everything) - 1)) for share in shares])
    if entry is not None:
        check_indexed(path, positions, everything, entry)
    decoded = decode_frames(path, positions, size=everything.shape[1:3])
    assert decoded.fallback == "" and (decoded.frames == everything[positions]).all()
    assert decoded.packets_kept <= decoded.packets_read
    with av.open(path) as container:
        small = remux(container, positions)
    with av.open(io.BytesIO(small.encoded.tobytes())) as container:
        again = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert len(again) <= small.packets_kept and (again[small.positions] == everything[positions]).all()
    return decoded


def check_indexed(path, positions, everything, entry):
    """Through the packet index: the same packets, the same frames, and the same packets in a file of their own."""
    video = IndexedVideo(Source(path), entry)
    indexed = decode_indexed(video, positions, size=everything.shape[1:3])
    assert indexed.packets_read == indexed.packets_kept and (indexed.frames == everything[positions]).all()
    with av.open(path) as container:
        assert video.select(positions).runs == PacketReader(container).select(positions).runs
    with av.open(path) as container:
        expected = remux(container, positions)
    again = IndexedVideo(Source(path), entry)
    template = open_header(again.stream).streams.video[0]
    small = remux_packets(again, template, again.stream.context(), positions)
    assert list(map(bytes, demuxed(small))) == list(map(bytes, demuxed(expected)))
    assert (small.positions == expected.positions).all()
    assert small.parser.formats() == expected.parser.formats()
    assert (small.size, small[4:-1]) == (expected.size, expected[4:-1])


def demuxed(file):
    with av.open(io.BytesIO(file.encoded.tobytes())) as container:
        return [packet for packet in container.demux(video=0) if packet.size]


@pytest.mark.slow
@pytest.mark.parametrize("codec, examples", [(codec, 40 if codec in ("h264", "hevc") else 20) for codec in CONTAINERS])
def test_any_frames_of_any_stream(tmp_path_factory, codec, examples):
    folder = tmp_path_factory.mktemp("streams")
    encoded = 0

    @settings(max_examples=examples, deadline=None, derandomize=True, database=None)
    @given(streams(codec), st.lists(wanted(), min_size=3, max_size=3))
    def check_one(stream, choices):
        nonlocal encoded
        suffix, options, count, fps = stream
        path = str(folder / f"video.{suffix}")
        try:
            write_video(path, FRAMES[:count], codec=codec, options=options, fps=fps)
        except av.error.FFmpegError:  # options that the encoder does not take together
            return
        encoded += 1
        everything = decode_all(path)
        entry = None if suffix in IN_PIECES else probe_packets(path)[1]
        for shares in choices:
            check(path, shares, everything, entry)

    check_one()
    assert encoded > examples // 2


@pytest.mark.parametrize("codec, suffix", [(codec, suffix) for codec in CONTAINERS for suffix in CONTAINERS[codec]])
def test_every_container_but_those_that_cut_packets_is_indexed(tmp_path, codec, suffix):
    path = write_video(tmp_path / f"video.{suffix}", FRAMES[:20], codec=codec)
    everything, entry = decode_all(path), probe_packets(path)[1]
    if suffix in IN_PIECES:
        with pytest.raises(StaleIndexError, match="are not stored in one piece"):
            IndexedVideo(Source(path), entry)
    else:
        check_indexed(path, np.array([3, 17]), everything, entry)


def test_a_stream_that_begins_within_the_file_is_named(tmp_path):
    """FFmpeg finds it, and PyAV would end in an IndexError."""
    path = tmp_path / "a.ts"
    data = bytearray(Path(write_video(path, FRAMES)).read_bytes())
    starts = [place for place in range(0, len(data), 188) if data[place + 1 : place + 3] == b"\x41\x00"]
    data[starts[-9] + 2] = 0x50  # the identifier of a stream that no table names
    path.write_bytes(data)
    with pytest.raises(InputError, match="another stream begins within the file"):
        probe(path)


# -- how little is decoded --


def kept(path, positions, **changes):
    with av.open(path) as container:
        return PacketReader(container).select(np.array(positions), **changes).runs


def test_only_groups_with_a_wanted_frame_and_only_up_to_it(tmp_path):
    path = write_video(tmp_path / "a.mp4", FRAMES, options={"x264-params": "keyint=10:bframes=0:scenecut=0"})
    assert kept(path, [12, 35]) == [[10, 11, 12], [30, 31, 32, 33, 34, 35]]


def test_frames_that_nothing_refers_to_are_left_out_unless_wanted(tmp_path):
    params = "keyint=100:bframes=2:b-adapt=0:b-pyramid=none:scenecut=0"
    path = write_video(tmp_path / "a.mp4", FRAMES, options={"x264-params": params})
    # In the file: I0 P3 b1 b2 P6 b4 b5 ...
    assert kept(path, [9]) == [[0, 1, 4, 7]]
    assert kept(path, [1, 8]) == [[0, 1, 2, 4, 7, 9]]


def test_an_intra_refresh_file_is_one_group(tmp_path):
    path = write_video(
        tmp_path / "a.mp4", FRAMES, options={"x264-params": "intra-refresh=1:keyint=10:bframes=0:scenecut=0"}
    )
    with av.open(path) as container:
        assert sum(packet.is_keyframe for packet in container.demux(video=0)) > 3
    assert kept(path, [50]) == [list(range(51))]


@pytest.mark.parametrize("codec, params", [("h264", "x264-params"), ("hevc", "x265-params")])
def test_an_open_group_starts_where_the_codec_allows(tmp_path, codec, params):
    """x264's open GOPs have no IDR: one group. HEVC's begin with a CRA: a frame shown before it needs the group
    before."""
    options = {params: "keyint=10:min-keyint=10:bframes=3:open-gop=1:scenecut=0:b-adapt=0:log-level=none"}
    path = write_video(tmp_path / f"{codec}.mp4", FRAMES, codec=codec, options=options)
    with av.open(path) as container:
        reader = PacketReader(container)
        selection = reader.select(np.array([59]))
    starts = [number for number, header in enumerate(reader.headers) if header.starts_group]
    if codec == "h264":
        assert starts == [0] and selection.runs[0][0] == 0
        return
    assert len(starts) > 4 and selection.runs[0][0] == starts[-1]
    leading = [number for number, header in enumerate(reader.headers) if header.is_leading]
    group = max(start for start in starts if start < leading[-1])
    runs = kept(path, [selection.shown.index(leading[-1])])
    assert len(runs) == 1 and runs[0][0] == starts[starts.index(group) - 1] and runs[0][-1] == leading[-1]
    assert len(kept(path, [59], in_one_go=True)[0]) > len(selection.runs[0])  # not without a reset: from the IDR on


@pytest.mark.slow
def test_frames_removed_by_an_edit_list_are_fed_but_never_shown(tmp_path):
    write_video(tmp_path / "whole.mp4", FRAMES, options={"x264-params": "keyint=100:bframes=2:scenecut=0"})
    with av.open(str(tmp_path / "whole.mp4")) as source, av.open(str(tmp_path / "cut.mp4"), "w") as out:
        stream = out.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:  # the edit list of the MP4 begins at time 0
                packet.pts -= 10 * packet.duration
                packet.dts -= 10 * packet.duration
                packet.stream = stream
                out.mux(packet)
    path = str(tmp_path / "cut.mp4")
    everything = decode_all(path)
    assert len(everything) == 50 and (everything == decode_all(tmp_path / "whole.mp4")[10:]).all()
    decoded = check(path, [0, 0.5, 1], everything)
    assert decoded.packets_read == 60


def raw_packets(path):
    with av.open(str(path)) as container:
        return [bytes(packet) for packet in container.demux(video=0) if packet.size]


@pytest.mark.slow
@pytest.mark.parametrize("codec, suffix", [("h264", "mp4"), ("h264", "mkv"), ("mpeg4", "mkv"), ("hevc", "mp4")])
@pytest.mark.parametrize("times", ["as decoded", "shuffled", "doubled"])
def test_timestamps_play_no_part(tmp_path, codec, suffix, times):
    """Remuxed without reordering (broken tools do), in any order, or all in pairs: the frames stay what they are."""
    options = {"h264": {}, "mpeg4": {"bf": "2"}, "hevc": {}}[codec]
    whole = write_video(tmp_path / f"whole.{suffix}", FRAMES, codec=codec, options=options)
    everything = decode_all(whole)
    order = np.random.default_rng(0).permutation(60) + 60
    path = str(tmp_path / f"times.{suffix}")
    with av.open(whole) as source, av.open(path, "w") as out:
        stream = out.add_stream_from_template(source.streams.video[0])
        stream.time_base = Fraction(1, 25)
        for number, packet in enumerate(p for p in source.demux(video=0) if p.size):
            packet.time_base = Fraction(1, 25)
            packet.dts = number
            packet.pts = {"as decoded": number, "shuffled": int(order[number]), "doubled": number // 2 * 2 + 2}[times]
            packet.stream = stream
            out.mux(packet)
    again = decode_all(path)
    if times != "shuffled":  # MP4 then has an edit list, which cuts some out
        assert again.shape == everything.shape and (again == everything).all()
    check(path, [0, 0.1, 0.35, 0.5, 0.77, 1], again)


def test_streams_without_timestamps(tmp_path):
    path = write_video(tmp_path / "a.h264", FRAMES)
    assert check(path, [0.2, 0.9], decode_all(path)).packets_kept < 50


# -- what the headers do not settle --


def fallback(path, share=0.7):
    """Why everything is decoded; the frames are those of a decoder that decodes everything all the same."""
    everything = decode_all(path)
    positions = np.unique([0, round(share * (len(everything) - 1))])
    decoded = decode_frames(path, positions, size=everything.shape[1:3])
    assert (decoded.frames == everything[positions]).all()
    with av.open(path) as container, pytest.raises(UncertainError, match=decoded.fallback):
        remux(container, positions)
    return decoded.fallback


@pytest.mark.slow
def test_packed_b_frames_and_not_coded_ones(tmp_path):
    """As in DivX files: a P and a B frame in one packet, then a packet that says "nothing new"."""
    whole = write_video(
        tmp_path / "whole.avi", FRAMES[:40], codec="mpeg4", options={"bf": "1", "b_strategy": "0", "g": "30"}
    )
    parts = raw_packets(whole)
    is_b = [part[:4] == b"\0\0\1\xb6" and part[4] >> 6 == 2 for part in parts]
    assert sum(is_b) > 10

    def not_coded(number):
        bits = f"0101{number % 25:05b}1001111"  # type P, no more seconds, time within this one, vop_coded 0
        return bytes([0, 0, 1, 0xB6, int(bits[:8], 2), int(bits[8:], 2)])

    def pack(number, data):
        if number == 0:
            return data.replace(b"\0\0\1\xb6", b"\0\0\1\xb2DivX503b1393p\0\0\1\xb6", 1)
        if is_b[number]:
            return not_coded(number)
        return data + parts[number + 1] if number + 1 < len(parts) and is_b[number + 1] else data

    assert fallback(edit_packets(whole, tmp_path / "packed.avi", pack)) == "packets of several frames"
    whole = write_video(tmp_path / "no_b.avi", FRAMES[:40], codec="mpeg4", options={"g": "30"})
    skips = edit_packets(whole, tmp_path / "skips.avi", lambda n, data: not_coded(n) if n % 10 == 8 else data)
    assert fallback(skips) == "frames that are not coded"


@pytest.mark.slow
def test_a_file_that_begins_in_the_middle(tmp_path):
    whole = write_video(tmp_path / "whole.ts", FRAMES, options={"x264-params": "keyint=20:scenecut=0:bframes=2"})
    data = open(whole, "rb").read()
    (tmp_path / "cut.ts").write_bytes(data[len(data) // 188 // 4 * 188 :])
    path = str(tmp_path / "cut.ts")
    everything = decode_all(path)
    decoded = decode_frames(path, np.array([0, 20]), size=(64, 80))
    assert decoded.fallback and (decoded.frames == everything[[0, 20]]).all()


@pytest.mark.slow
def test_parameters_that_change_within_the_file(tmp_path):
    parts = [
        raw_packets(write_video(tmp_path / f"{n}.h264", FRAMES[30 * n : 30 * n + 30], options={"x264-params": params}))
        for n, params in enumerate(["ref=1:bframes=0:keyint=10", "ref=4:bframes=2:keyint=10"])
    ]
    (tmp_path / "both.h264").write_bytes(b"".join(parts[0] + parts[1]))
    assert fallback(str(tmp_path / "both.h264")) == "the parameters of the stream change"


@pytest.mark.slow
def test_a_recording_continued_with_other_parameters(tmp_path):
    """FLV has them in a packet of its own, which the demuxer hands over beside the next."""

    def tags(data):
        place = 13
        while place < len(data):
            size = int.from_bytes(data[place + 1 : place + 4])
            yield data[place : place + 11], data[place + 11 : place + 11 + size]
            place += 11 + size + 4

    joined = b""
    for part, params in enumerate(["keyint=10:bframes=0", "keyint=250:bframes=3:ref=5:qp=30"]):
        path = write_video(tmp_path / "a.flv", FRAMES[30 * part :][:30], options={"x264-params": params})
        data = Path(path).read_bytes()
        joined = joined or data[:13]
        for head, body in tags(data):
            if head[0] == 9 and not (part == 0 and body[1] == 2):  # video, but for the end of the first
                time = int.from_bytes(head[4:7]) + 1300 * part
                joined += head[:4] + time.to_bytes(3) + head[7:] + body + (11 + len(body)).to_bytes(4)
    (tmp_path / "joined.flv").write_bytes(joined)
    assert fallback(str(tmp_path / "joined.flv")) == "the parameters of the stream change"


def test_colours_that_change_within_the_file(tmp_path):
    """torchcodec converts all frames as the first: 20/255 off. The host decoder goes by each frame."""
    few = [write_video(tmp_path / f"{full}.webm", FRAMES[:4], codec="vp9", full_range=full) for full in (False, True)]
    vp8 = write_video(tmp_path / "vp8.webm", FRAMES[:4], codec="vp8", options={"g": "2"})

    def change(number: int, data: bytes) -> bytes:
        return data[:10] + bytes([data[10] ^ 0x40]) + data[11:] if number == 2 else data

    changed = edit_packets(vp8, tmp_path / "changed.webm", change)
    for path in (changed, join_packets(*few, tmp_path / "joined.webm")):
        assert fallback(path) == "the colours of the frames change"


@pytest.mark.slow
def test_an_hevc_sequence_that_ends_within_the_file(tmp_path):
    params = "log-level=none:keyint=12:min-keyint=12:bframes=3:open-gop=1:scenecut=0"
    whole = write_video(tmp_path / "a.hevc", FRAMES, codec="hevc", options={"x265-params": params})
    units = [unit.rstrip(b"\0") for unit in Path(whole).read_bytes().split(b"\0\0\1")[1:]]
    third = [number for number, unit in enumerate(units) if unit[0] >> 1 == 21][2]
    units.insert(third, bytes([36 << 1, 1]))  # end of sequence: the frames before the next CRA have no references
    (tmp_path / "ended.hevc").write_bytes(b"".join(b"\0\0\0\1" + unit for unit in units))
    assert fallback(str(tmp_path / "ended.hevc")) == "a sequence ends within the file"


@pytest.mark.slow
def test_mpeg4_b_frames_that_were_not_announced(tmp_path):
    """Old encoders set low_delay in spite of them: FFmpeg then shows a reference before the B frames that follow."""
    whole = write_video(tmp_path / "a.m4v", FRAMES, codec="mpeg4", options={"bf": "2", "g": "100"})
    data = bytearray(Path(whole).read_bytes())
    start = data.index(b"\0\0\1\x20") + 4
    bits = Bits(bytes(data[start : start + 20]))
    bits.u(9)
    place = 10 + 7 * bits.u(1)
    bits.u(place - 10)
    assert bits.u(4) != 15 and bits.u(1) == 1  # no aspect ratio of its own; vol_control_parameters
    place += 4 + 1 + 2
    data[start + place // 8] |= 0x80 >> place % 8
    (tmp_path / "low_delay.m4v").write_bytes(data)
    assert fallback(str(tmp_path / "low_delay.m4v")) == "frames are held back for longer than the stream says"


def test_frames_that_are_held_back_for_longer_than_a_decoder_was_told(tmp_path):
    """FFmpeg throws late ones away where a stream claims to need no such delay."""
    with av.open(write_video(tmp_path / "a.mp4", FRAMES)) as container:
        reader = PacketReader(container)
        assert reader._held_back >= 1
        reader._held_back = 0
        with pytest.raises(UncertainError, match="held back"):
            reader.select(np.array([30]))


def test_a_codec_without_a_parser(tmp_path):
    path = str(tmp_path / "a.mpg")
    with av.open(path, "w") as out:
        stream = out.add_stream("mpeg2video", rate=25)
        stream.width, stream.height, stream.pix_fmt = 80, 64, "yuv420p"
        for rgb_frame in FRAMES[:20]:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(rgb_frame, format="rgb24")))
        out.mux(stream.encode())
    assert fallback(path) == "no parser for mpeg2video"


@pytest.mark.slow
@settings(
    max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.sampled_from(sorted(CONTAINERS)), st.integers(0, 2**32 - 1))
def test_headers_of_any_bytes_are_read_or_refused(small_packets, codec, seed):
    """Damage never ends in another error than the one that makes everything decoded."""
    extradata, packet = small_packets[codec]
    rng = np.random.default_rng(seed)
    for data in (bytearray(extradata), bytearray(packet)):
        for _ in range(3):
            if data:
                data[int(rng.integers(min(len(data), 60)))] = int(rng.integers(256))
    data = data[: int(rng.integers(1, len(data) + 1))]
    with contextlib.suppress(UncertainError, IndexError):  # what `PacketReader` expects
        make_parser(codec, bytes(extradata)).read(memoryview(bytes(data)))


@pytest.fixture(scope="session")
def small_packets(tmp_path_factory):
    """{codec: (extradata, the first packet)}."""
    folder = tmp_path_factory.mktemp("small")
    found = {}
    for codec, suffixes in CONTAINERS.items():
        path = write_video(folder / f"{codec}.{suffixes[1]}", FRAMES[:3], codec=codec)
        with av.open(path) as container:
            extradata = bytes(container.streams.video[0].codec_context.extradata or b"")
        found[codec] = extradata, raw_packets(path)[0]
    return found


def selected(file, positions, in_one_go):
    """(reader, selection), or (None, why not)."""
    with open_video(file) as container:
        try:
            reader = PacketReader(container)
            return reader, reader.select(np.array(positions), in_one_go=in_one_go)
        except UncertainError as error:
            return None, str(error)


@pytest.mark.slow
@pytest.mark.parametrize("in_one_go", [False, True])
def test_long_videos_are_not_held_in_memory_and_give_the_same_packets(numbered_videos, monkeypatch, in_one_go):
    """With a limit of nothing: what is held is what is needed, or, in one go, it may be said that it is not enough."""
    let_go, uncertain = 0, []
    for number in range(len(numbered_videos)):
        file, last = numbered_videos.file(number), numbered_videos[number].frames - 1
        for positions in ([0], [last // 2], [0, last]):
            reader, expected = selected(file, positions, in_one_go)
            monkeypatch.setattr(packets, "_MOST_HELD", 0)
            limited, selection = selected(file, positions, in_one_go)
            monkeypatch.undo()
            if reader is None or limited is not None:
                assert selection == expected
            else:
                uncertain.append(selection)
            if limited is not None:
                let_go += limited.packets.count(None)
                assert limited.times == reader.times
    assert let_go > 300
    assert set(uncertain) <= ({"it is long, and its groups of pictures need each other"} if in_one_go else set())


def test_probing_a_long_video_holds_little_of_it(numbered_videos, monkeypatch):
    number = next(n for n in range(len(numbered_videos)) if numbered_videos[n].path == "short_gop.mov")
    monkeypatch.setattr(packets, "_MOST_HELD", 0)
    with open_video(numbered_videos.file(number)) as container:
        reader = PacketReader(container)
        assert len(reader.shown()) == 100
    assert sum(packet is not None for packet in reader.packets) <= 3 * 12  # the last groups, of at most 12 frames
    probed = probe(numbered_videos.file(number))
    assert probed._replace(path="short_gop.mov", label=numbered_videos[number].label) == numbered_videos[number]
