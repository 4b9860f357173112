"""The manifest file, there and back, and what probing a file finds."""

import contextlib
import io
import re
from fractions import Fraction

import av
import numpy as np
import pytest
from av.stream import Disposition

from dali_pipelines import ClipLoader, InputError, Manifest
from dali_pipelines.manifest import Video
from dali_pipelines.probe import _gaps, frame_rate, probe
from preparation.index import probe_file
from tests.videos import decode_all, numbered, read_numbers, textured, write_video

HEADER = "path,label,frames,fps,width,height,codec,rotation\n"
VIDEOS = [
    Video("a.mp4", 0, 280, 28.0, 340, 256, "h264", 0),
    Video('b, "c"/ü \n.webm', 2, 1, 30000 / 1001, 256, 340, "vp9", 270),
    Video("x\udcff.avi", 1, 3, 25.0, 5, 7, "mpeg4", 180),  # a name that is not UTF-8
]


def test_round_trip(tmp_path):
    made = Manifest(VIDEOS, root=tmp_path / "videos", classes=("one", "zwei, ä", "3"), rejected=4)
    made.write(tmp_path / "new" / "list.csv")
    read = Manifest.read(tmp_path / "new" / "list.csv")
    assert [read[index] for index in range(len(read))] == VIDEOS
    assert read.classes == made.classes and read.rejected == 4 and read.listed == 7
    assert read.root == made.root and read.labels.tolist() == [0, 2, 1]
    with pytest.raises(IndexError):
        read[3]


def test_a_root_in_the_manifests_folder_is_written_relative(tmp_path):
    Manifest(VIDEOS, root=tmp_path / "here" / "videos").write(tmp_path / "here" / "list.csv")
    (tmp_path / "here").rename(tmp_path / "there")
    assert Manifest.read(tmp_path / "there" / "list.csv").file(0) == str(tmp_path / "there" / "videos" / "a.mp4")


def test_mapped_arrays_hold_the_same_rows(tmp_path):
    Manifest(VIDEOS).save_arrays(tmp_path)
    mapped = Manifest.map_arrays(tmp_path, "/somewhere")
    assert [mapped[index] for index in range(3)] == VIDEOS and isinstance(mapped._rows, np.memmap)


def test_columns_may_come_in_any_order_and_comments_may_be_missing(tmp_path):
    (tmp_path / "list.csv").write_text(
        "label,path,note,frames,fps,width,height,codec,rotation\n3,a,hi,1,25,2,2,vp9,0\n\n"
    )
    manifest = Manifest.read(tmp_path / "list.csv")
    assert manifest[0] == Video("a", 3, 1, 25.0, 2, 2, "vp9", 0) and manifest.root == tmp_path


def test_a_byte_order_mark_hides_nothing(tmp_path):
    Manifest(VIDEOS, root="/elsewhere", classes=("one", "two", "three")).write(tmp_path / "list.csv")
    (tmp_path / "list.csv").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "list.csv").read_bytes())
    manifest = Manifest.read(tmp_path / "list.csv")
    assert str(manifest.root) == "/elsewhere" and len(manifest.classes) == 3


@pytest.mark.parametrize(
    "text, message",
    [
        ("a.mp4 0\nb.mp4 1\n", "a list of videos and labels.*prepare.py index"),
        ("", "no column"),
        (HEADER + "a,0,1,25,2,2,vp9,0\na,-1,1,25,2,2,vp9,0\n", "list.csv:3: label is '-1'; expected a class number"),
        (HEADER + "a,0,1,25,2,2,vp9,0\na,0,zero,25,2,2,vp9,0\n", "list.csv:3: frames is 'zero'"),
        ("# root: .\n\n" + HEADER + "a,0,1,nan,2,2,vp9,0\n", "list.csv:4: fps is 'nan'"),
        (HEADER + "a,0,1,25,2,2,vp9,45\n", "rotation is '45'; expected 0, 90, 180 or 270"),
        (HEADER + "a,0,99999999999999999999,25,2,2,vp9,0\n", "list.csv:2: frames is '99999999999999999999'"),
        (HEADER + "a,0,1,25,9999999999,2,vp9,0\n", "list.csv:2: width is '9999999999'"),
        (HEADER + "a,0,1,inf,2,2,vp9,0\n", "list.csv:2: fps is 'inf'"),
        (HEADER + "a,0,1,25,2,2,vp\u00e9,0\n", "list.csv:2: codec is"),
        (HEADER + "a,0,1,25,2,2\n", "list.csv:2: 6 columns where the header names 8"),
        ("# classes: one, two\n" + HEADER, "JSON list"),
    ],
)
def test_a_bad_line_is_reported_with_file_and_number(tmp_path, text, message):
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(InputError, match=message):
        Manifest.read(tmp_path / "list.csv")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match="gone.csv: no such manifest"):
        Manifest.read(tmp_path / "gone.csv")


def test_probe_counts_frames_and_applies_rotation(numbered_videos):
    found = {numbered_videos[index].path: numbered_videos[index] for index in range(len(numbered_videos))}
    assert found["bframes.mp4"][2:] == (100, 25.0, 176, 144, "h264", 0, "yuv420p", 0, 100, "", 0, 0, 0)
    assert found["bframes.mkv"].frames == 100  # the header of a Matroska file claims 0
    assert found["av1.mp4"].codec == "av1"
    assert found["odd_size.webm"][4:6] == (127, 95)
    assert (found["turned_90.mp4"].width, found["turned_90.mp4"].height) == (144, 176)
    assert [found[f"turned_{r}.mp4"].rotation for r in (90, 180, 270)] == [90, 180, 270]
    assert found["uneven.mp4"].frames == 100 and found["uneven.mp4"].fps < 15
    assert [name for name, video in found.items() if video.vfr] == ["uneven.mp4", "uneven.webm"]


def test_probe_finds_the_shared_videos(shared_videos):
    found = [probe(path)[2:11] for path in sorted(shared_videos.iterdir())]
    assert found == [
        (280, 28.0, 340, 256, "h264", 0, "yuv420p", 0, 187),
        (300, 30.0, 340, 256, "h264", 0, "yuv420p", 0, 235),
        (117, 25.0, 640, 480, "h264", 0, "yuv420p", 0, 117),
        (131, 25.0, 320, 240, "mpeg4", 0, "yuv420p", 0, 131),
    ]


def test_probe_describes_files_that_are_not_videos(tmp_path):
    good = write_video(tmp_path / "good.mp4", numbered(5, height=32, width=32))
    (tmp_path / "text.mp4").write_text("not a video at all\n" * 50)
    (tmp_path / "page.mp4").write_text("<!DOCTYPE html><html>video unavailable</html>")
    (tmp_path / "lfs.mp4").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "cut.mp4").write_bytes(open(good, "rb").read()[:200])
    for name, reason in [
        ("text.mp4", "not a video that FFmpeg can read .a text file"),
        ("page.mp4", "a web page"),
        ("lfs.mp4", "a pointer of Git LFS: git lfs pull fetches the file"),
        ("empty.mp4", "an empty file"),
        ("cut.mp4", "cut off: it has no index"),
        ("gone.mp4", "no such file"),
        (".", "a folder"),
    ]:
        with pytest.raises(InputError, match=reason):
            probe(tmp_path / name)
    assert probe(good).frames == 5


@pytest.mark.parametrize("suffix", ["ts", "h264"])
def test_a_file_starting_mid_stream_has_the_frames_that_decode(tmp_path, suffix):
    options = {"x264-params": "keyint=20:scenecut=0:bframes=2"}
    whole = write_video(tmp_path / f"whole.{suffix}", textured(60, height=64, width=80), options=options)
    data = open(whole, "rb").read()
    # FFmpeg does not take every such file for what it is: one that begins with a start code it does.
    start = len(data) // 188 // 4 * 188 if suffix == "ts" else data.find(b"\0\0\1", len(data) // 4)
    (tmp_path / f"cut.{suffix}").write_bytes(data[start:])
    path = tmp_path / f"cut.{suffix}"
    assert 0 < probe(path).frames == len(decode_all(path)) < 60


def test_cover_art_is_not_the_video(tmp_path):
    """MP4 files may have it in front of the track."""

    def box(name, *parts):
        body = b"".join(parts)
        return (8 + len(body)).to_bytes(4) + name + body

    frame = io.BytesIO()
    with av.open(frame, "w", format="image2pipe") as out:
        stream = out.add_stream("png", rate=1)
        stream.width, stream.height, stream.pix_fmt = 80, 64, "rgb24"
        out.mux(stream.encode(av.VideoFrame.from_ndarray(textured(1, height=64, width=80)[0], format="rgb24")))
        out.mux(stream.encode())
    data = open(write_video(tmp_path / "a.mp4", numbered(30, height=64, width=80)), "rb").read()
    cover = box(b"covr", box(b"data", (14).to_bytes(4), bytes(4), frame.getvalue()))
    handler = box(b"hdlr", bytes(8), b"mdirappl", bytes(9))
    metadata = box(b"udta", box(b"meta", bytes(4), handler, box(b"ilst", cover)))
    moov, trak = data.rindex(b"moov") - 4, data.rindex(b"trak") - 4  # the index is at the end, nothing points behind it
    size = int.from_bytes(data[moov : moov + 4]) + len(metadata)
    with_cover = data[:moov] + size.to_bytes(4) + data[moov + 4 : trak] + metadata + data[trak:]
    (tmp_path / "cover.mp4").write_bytes(with_cover)
    with av.open(str(tmp_path / "cover.mp4")) as container:
        assert [stream.codec_context.name for stream in container.streams.video] == ["png", "h264"]
    video = probe(tmp_path / "cover.mp4")
    assert (video.codec, video.frames) == ("h264", 30)
    loader = ClipLoader(Manifest([video]), mode="validate", batch_size=1, num_frames=4, crop_size=32, workers=0)
    assert read_numbers(next(iter(loader)).clips[0].numpy()) == [0, 9, 19, 29]


def test_the_checksum_is_of_videos_and_labels_wherever_they_are():
    rows = [
        Video(f"x/{name}.mp4", label, 8, 25.0, 48, 32, "h264", 0) for label, name in enumerate(("a", "b", "c\udcff"))
    ]

    def checksum(*rows, **settings):
        return Manifest(rows, **settings).checksum()

    same = checksum(*rows)
    assert re.fullmatch("[0-9a-f]{64}", same) and checksum() != same
    assert checksum(*rows, root="/elsewhere", classes=("x", "y", "z"), rejected=3) == same
    for folder in ("/data/old/", "s3://bucket/", "../", ""):
        assert checksum(*(row._replace(path=folder + row.path) for row in rows)) == same
        assert checksum(*(row._replace(path=folder + row.path[2:]) for row in rows)) == same
    measured = {"fps": 30.0, "rotation": 90, "pixel_format": "yuv420p", "vfr": 1, "gop": 7}
    assert checksum(*(row._replace(**measured) for row in rows)) == same
    assert checksum(*(row._replace(shard="s.tar", offset=n, size=5) for n, row in enumerate(rows))) == same
    for change in ({"label": 5}, {"path": "x/d.mp4"}, {"frames": 9}, {"width": 50}, {"height": 50}, {"codec": "vp9"}):
        assert checksum(rows[0], rows[1]._replace(**change), rows[2]) != same
    assert checksum(rows[1], rows[0], rows[2]) != same and checksum(*rows[:2]) != same
    moved = [row._replace(path=f"{n}/{row.path[2:]}") for n, row in enumerate(rows)]
    assert checksum(*moved) != same


def test_names_with_any_character_round_trip(tmp_path):
    """Also a carriage return, which Python's csv does not quote by itself."""
    odd = ["a\rb.mp4", "c\nd.mp4", "e\r\nf.mp4", "g\u2028\x0b\x85\x1c.mp4", "h\udcff.mp4", ' i, "j".mp4']
    rows = [Video(name, 0, 8, 25.0, 48, 32, "h264", 0) for name in odd]
    classes = ("k\rl", "m\u2028n", "o\udcfe")
    Manifest(rows, root=tmp_path / "r\udcff", classes=classes).write(tmp_path / "m.csv")
    again = Manifest.read(tmp_path / "m.csv")
    assert [again[n].path for n in range(len(again))] == odd and again.classes == classes
    assert again.root == tmp_path / "r\udcff"
    (tmp_path / "w.csv").write_bytes((tmp_path / "m.csv").read_bytes().decode("utf-8", "replace").encode("utf-16"))
    assert len(Manifest.read(tmp_path / "w.csv")) == len(odd)


def test_a_zero_byte_in_a_name_does_not_crash():
    with pytest.raises(InputError, match="a zero byte in its name"):
        probe("a\0b.mp4")


# -- the rate by the times of the frames --


MS = Fraction(1, 1000)
STEADY = np.arange(120) * 1000 / 30
JITTERED = STEADY + np.random.default_rng(0).integers(-5, 6, 120)


@pytest.mark.parametrize(
    "times, rate",
    [
        (STEADY, 30),  # 33, 33, 34 ms: their median would be 30.3
        (np.arange(300) * 1001 / 30, 30000 / 1001),
        (JITTERED, 30),
        (np.append(STEADY[:-1], STEADY[-2] + 600_000), 30),  # ten minutes before the last frame
        (STEADY + 2000 * (np.arange(120) // 20), 30),  # a pause every 20 frames
        (np.delete(STEADY, np.arange(5, 120, 10)), 30),  # every tenth frame dropped
        (np.repeat(STEADY[::2], 2) + np.tile([0, 1], 60), 30),  # delivered in pairs
        (np.cumsum(np.tile([33, 50], 60)), 24),  # 3:2 pulldown
        (np.tile(STEADY[:60], 2), 30),  # joined recordings: times begin anew
        (np.arange(20) * 400.0, 2.5),
    ],
)
def test_the_rate_is_that_of_most_of_the_video(times, rate):
    """Whatever nonsense the header has; a header that agrees is taken as it is."""
    gaps = _gaps([(int(time), int(time)) for time in np.round(times)])
    for header in (None, Fraction(1000), Fraction(1, 10)):
        assert frame_rate(gaps, MS, header) == pytest.approx(rate, rel=1e-6)
    near = Fraction(rate * 1.002)
    assert frame_rate(gaps, MS, near) == float(near)


@pytest.mark.parametrize("times", [[], [(5, 5)], [(None, None)] * 9, [(0, 0)] * 9])
def test_useless_times_give_no_rate(times):
    assert frame_rate(_gaps(times), MS, Fraction(25)) is None


def test_times_are_in_display_order_with_dts_as_a_fallback():
    reordered = [(0, -40), (120, 0), (40, 40), (80, 80), (240, 120), (160, 160), (200, 200)]
    assert _gaps(reordered).tolist() == [40] * 6
    assert _gaps([(None, dts) for _, dts in reordered]).tolist() == [40] * 6


@pytest.mark.parametrize("codec, suffix", [("vp8", "webm"), ("h264", "flv"), ("h264", "mp4"), ("vp9", "mkv")])
def test_a_window_has_the_length_of_a_constant_rate_file(tmp_path, codec, suffix):
    """Browsers, RTMP recorders and cameras: 1000 frames/s by the header, or next to none after a long pause."""
    made = write_video(tmp_path / "steady.mp4", numbered(120, height=64, width=64), fps=30)
    times = np.round(JITTERED - JITTERED[0]).astype(int).tolist()
    if suffix == "mp4":
        times[100:] = [time + 600_000 for time in times[100:]]
    path = write_video(tmp_path / f"a.{suffix}", numbered(120, height=64, width=64), codec=codec, fps=1000, times=times)
    with av.open(path) as container:
        header = container.streams.video[0].average_rate
        assert header is None or not 20 < header < 40
    videos = [probe(made), probe(path)]
    assert [video.fps for video in videos] == [30, 30]
    settings = dict(batch_size=2, num_frames=8, crop_size=32, stride=4, num_windows=3, workers=0)
    loader = ClipLoader(Manifest(videos), mode="test", **settings)
    steady, other = next(iter(loader)).clips
    assert read_numbers(other[1].numpy()) == read_numbers(steady[1].numpy()) == [0, 4, 8, 13, 17, 22, 26, 31]
    assert (loader.window_seconds(0) == loader.window_seconds(1)).all()


def test_a_raw_stream_has_the_rate_of_its_own_headers(tmp_path):
    """FFmpeg takes 25 for all of them."""
    path = write_video(tmp_path / "a.h264", numbered(12, height=64, width=64), fps=30)
    assert probe(path).fps == 30


# -- which stream --


@pytest.mark.parametrize("suffix, marked", [("mkv", True), ("mkv", False), ("mp4", True), ("mov", True)])
def test_the_video_is_the_stream_that_ffmpeg_picks(tmp_path, suffix, marked):
    """Not the first: the one marked default, or the longer one. On every way."""
    parts = [
        write_video(tmp_path / "preview.mkv", numbered(2, height=48, width=64)[::-1], codec="mjpeg", fps=1),
        write_video(tmp_path / "video.mp4", numbered(40, height=64, width=96)),
    ]
    path = tmp_path / f"both.{suffix}"
    with contextlib.ExitStack() as stack:
        sources = [stack.enter_context(av.open(part)) for part in parts]
        with av.open(str(path), "w") as out:
            streams = [out.add_stream_from_template(source.streams.video[0]) for source in sources]
            streams[0].disposition = Disposition(0)
            streams[1].disposition = Disposition.default if marked else Disposition(0)
            for source, stream in zip(sources, streams, strict=True):
                for packet in source.demux(video=0):
                    if packet.size:
                        packet.stream = stream
                        out.mux(packet)
    with av.open(str(path)) as container:
        assert [stream.codec_context.codec.canonical_name for stream in container.streams.video] == ["mjpeg", "h264"]
    video = probe_file(str(path), True).video
    assert (video.codec, video.frames, video.width) == ("h264", 40, 96)
    for decode in ("host", "nvdec"):
        settings = dict(batch_size=1, num_frames=4, crop_size=32, stride=None, workers=0, decode=decode)
        batch = next(iter(ClipLoader(Manifest([video]), mode="validate", **settings)))
        assert batch.engines == (decode,) and read_numbers(batch.clips[0].numpy()) == [0, 13, 26, 39]


def test_a_video_without_an_undamaged_frame_is_refused(tmp_path, monkeypatch):
    """A row of no frames would make the manifest unreadable. Found in MPEG-4 that claims another height."""
    path = write_video(tmp_path / "a.avi", textured(4, height=48, width=64), codec="mpeg4")
    monkeypatch.setattr("dali_pipelines.probe._count_frames", lambda *_, **__: 0)
    with pytest.raises(InputError, match="all frames of its video stream are damaged"):
        probe(path)


@pytest.mark.parametrize(
    "text, message",
    [
        ("path,label\na.mp4,0\n", "a list of videos and labels, not a manifest.* prepare.py index --list .*l.csv"),
        ("a.mp4,0\nb.mp4,1\n", "prepare.py index --list .*l.csv --root DIR --out .*l.manifest.csv"),
        ("a b.mp4 0\n", "a list of videos and labels"),
        ("a.mp4;0\n", "a list of videos and labels"),
        ("path;label;frames;fps;width;height;codec;rotation\na.mp4;0;1;25;2;2;h264;0\n", "semicolons; expected commas"),
        ("name,city,age\n", "l.csv:1: not a manifest: no column path, label, frames"),
    ],
)
def test_other_tables_are_said_to_be_what_they_are(tmp_path, text, message):
    (tmp_path / "l.csv").write_text(text)
    with pytest.raises(InputError, match=message):
        Manifest.read(tmp_path / "l.csv")


def test_a_folder_is_not_a_manifest(tmp_path):
    with pytest.raises(InputError, match="a folder; expected a manifest.*python prepare.py folder"):
        Manifest.read(tmp_path)
    (tmp_path / "train.csv").touch()
    with pytest.raises(InputError, match="a folder; expected a manifest, such as .*/train.csv"):
        Manifest.read(tmp_path)
