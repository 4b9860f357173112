"""Files that are bad or odd, of every kind that data sets are known to hold, and what must come of each.

for kind in make_kinds(folder): kind.path, kind.row, kind.probe, kind.loader
"""

import os
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np

from dali_pipelines.manifest import Video
from dali_pipelines.probe import probe
from tests.videos import textured, write_video

GOOD = ""
"""An outcome: the right number of frames for `probe`, exactly the planned ones for the loader."""


class Kind(NamedTuple):
    name: str
    path: str
    row: Video
    """The manifest's: of what stood at `path` when it was indexed, or of the file itself where that is probed."""
    probe: str
    """`GOOD`, or what the reason of probe's refusal must match."""
    loader: str
    """`GOOD`, or what the reason of the fault must match."""


def make_kinds(folder: Path) -> list[Kind]:
    """Writes the files; rows are absolute."""
    maker = _Maker(folder)
    maker.make_no_files()
    maker.make_cut()
    maker.make_damaged()
    maker.make_odd()
    maker.make_odd_times()
    maker.make_odd_names()
    return maker.kinds


def flip_bits(data: bytes, places: Sequence[int]) -> bytes:
    """`data` with all bits of the bytes at `places` inverted."""
    flipped = np.frombuffer(data, np.uint8).copy()
    flipped[list(places)] ^= 255
    return flipped.tobytes()


class _Maker:
    def __init__(self, folder: Path):
        self.kinds: list[Kind] = []
        self._folder = folder
        self._frames = textured(40, height=96, width=128)
        originals = [("h264", "mp4"), ("h264", "mkv"), ("mpeg4", "avi"), ("vp9", "webm")]
        self._original = {
            suffix: Path(write_video(folder / f"original.{suffix}", self._frames, codec=codec))
            for codec, suffix in originals
        }
        self._row = {suffix: probe(path) for suffix, path in self._original.items()}

    def _add_replaced(self, name: str, content: bytes | None, *, probe: str, loader: str, suffix: str = "mp4") -> Path:
        """A file that has changed since it was indexed; None: whatever is there."""
        path = self._folder / f"{name}.{suffix}"
        if content is not None:
            path.write_bytes(content)
        row = self._row[suffix]._replace(path=str(path))
        self.kinds.append(Kind(name, str(path), row, probe, loader))
        return path

    def _add_as_indexed(self, name: str, path: str | Path, *, loader: str = GOOD) -> None:
        """A file that was indexed as it is."""
        self.kinds.append(Kind(name, str(path), probe(path), GOOD, loader))

    def make_no_files(self) -> None:
        for suffix in ("mp4", "webm"):  # the host decoder's and DALI's
            what = "not a video|no such|invalid data|empty"
            self._add_replaced(f"missing_{suffix}", None, probe="no such file", loader="no such file", suffix=suffix)
            self._add_replaced(f"empty_{suffix}", b"", probe=what, loader=what, suffix=suffix)
            self._add_replaced(f"text_{suffix}", b"no video " * 200, probe=what, loader=what, suffix=suffix)
            folder = self._add_replaced(
                f"folder_{suffix}", None, probe="folder", loader="folder|directory", suffix=suffix
            )
            folder.mkdir()
            fifo = self._add_replaced(f"fifo_{suffix}", None, probe="regular", loader="regular file", suffix=suffix)
            os.mkfifo(fifo)
            links = "too many levels of symbolic links"
            loop = self._add_replaced(f"symlink_loop_{suffix}", None, probe=links, loader=links, suffix=suffix)
            loop.symlink_to(loop.name)
            dead = self._add_replaced(f"dead_link_{suffix}", None, probe="no such", loader="no such", suffix=suffix)
            dead.symlink_to("nowhere")
            if os.geteuid():  # root may read anything
                closed = self._add_replaced(
                    f"closed_{suffix}", b"x", probe="permission", loader="permission", suffix=suffix
                )
                closed.chmod(0)
        path = self._folder / "audio_only.mp4"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("aac", rate=8000)
            sound = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="fltp", layout="mono")
            sound.sample_rate = 8000
            container.mux(stream.encode(sound))
            container.mux(stream.encode())
        self._add_replaced("audio_only", None, probe="no video stream", loader="no video stream")

    def make_cut(self) -> None:
        whole = self._original["mp4"].read_bytes()
        for share in (10, 50, 90):  # the index is at the end
            self._add_replaced(
                f"cut_at_{share}", whole[: len(whole) * share // 100], probe="no index", loader="no index"
            )
        self._add_replaced("no_moov", whole[: whole.index(b"moov") - 4], probe="no index", loader="no index")
        fast = copy_packets(self._original["mp4"], self._folder / "fast.mp4", options={"movflags": "faststart"})
        for name, file, suffix in (
            ("cut_faststart", fast, "mp4"),
            ("cut_mkv", self._original["mkv"], "mkv"),
            ("cut_avi", self._original["avi"], "avi"),
            ("cut_webm", self._original["webm"], "webm"),
        ):
            half = file.read_bytes()[: file.stat().st_size // 2]
            self._add_replaced(name, half, probe=GOOD, loader="only|invalid data|damaged", suffix=suffix)
        mkv = self._original["mkv"].read_bytes()
        header = mkv[: mkv.index(b"\x1f\x43\xb6\x75")]  # up to the first cluster
        self._add_replaced("no_frames", header, probe="no picture|not a video", loader="end of file", suffix="mkv")
        one = write_video(self._folder / "one.mp4", self._frames[:1])
        self._add_as_indexed("one_frame", one)
        self._add_replaced("one_frame_left", Path(one).read_bytes(), probe=GOOD, loader="only 1")

    def make_damaged(self) -> None:
        whole = self._original["mp4"].read_bytes()
        self._add_replaced(
            "bits_in_the_index",
            flip_bits(whole, _around(whole, b"stbl")),
            probe="not a video|no picture|codec",
            loader=".",
        )
        self._add_replaced(
            "bits_in_the_stream_header",
            flip_bits(whole, _around(whole, b"avcC")),
            probe="not a video",
            loader="invalid data",
        )
        # Packets of H.264 are counted, the others' decoded.
        for suffix, said in (("mp4", GOOD), ("mkv", GOOD), ("avi", "not a video"), ("webm", "not a video")):
            whole = self._original[suffix].read_bytes()
            with av.open(str(self._original[suffix])) as container:
                packets = [bytes(packet) for packet in container.demux(video=0) if packet.size > 40]
            places = [whole.index(packet) + at for packet in packets for at in range(20, 40)]
            self._add_replaced(
                f"bits_in_every_packet_{suffix}",
                flip_bits(whole, places),
                probe=said,
                loader="damaged|invalid data",
                suffix=suffix,
            )

    def make_odd(self) -> None:
        folder, frames = self._folder, self._frames
        wrong = folder / "mp4_named.avi"
        wrong.write_bytes(self._original["mp4"].read_bytes())
        self._add_as_indexed("wrong_suffix", wrong)
        avi = self._original["avi"].read_bytes()
        claims = folder / "claims_600.avi"
        at = avi.index(b"avih") + 8 + 16
        length = avi.index(b"strh") + 8 + 32
        assert avi[at : at + 4] == avi[length : length + 4] == (40).to_bytes(4, "little")
        wrong = (600).to_bytes(4, "little")
        claims.write_bytes(avi[:at] + wrong + avi[at + 4 : length] + wrong + avi[length + 4 :])
        self._add_as_indexed("header_claims_600_frames", claims)
        frame = av.VideoFrame.from_ndarray(frames[0], format="rgb24")
        encoder = av.CodecContext.create("png", "w")
        encoder.width, encoder.height, encoder.pix_fmt, encoder.time_base = 128, 96, "rgb24", Fraction(1, 25)
        png = folder / "png_named.mp4"
        png.write_bytes(b"".join(map(bytes, encoder.encode(frame) + encoder.encode(None))))
        self._add_as_indexed("picture_named_mp4", png)
        for rotation in (90, 180, 270):
            for codec in ("h264", "vp9"):
                path = write_video(
                    folder / f"turned_{rotation}_{codec}.mp4", frames[:12], codec=codec, rotation=rotation
                )
                self._add_as_indexed(f"turned_{rotation}_{codec}", path)
        for name, codec, suffix, size in (
            ("odd_size_vp9", "vp9", "webm", (95, 127)),
            ("odd_size_mpeg4", "mpeg4", "avi", (127, 95)),
            ("tiny", "h264", "mp4", (16, 16)),
            ("tiny_vp9", "vp9", "webm", (16, 16)),
        ):
            made = textured(12, height=size[0], width=size[1])
            self._add_as_indexed(name, write_video(folder / f"{name}.{suffix}", made, codec=codec))
        for codec, suffix, pix_fmt in (
            ("h264", "mp4", "yuv420p10le"),
            ("hevc", "mp4", "yuv420p10le"),
            ("h264", "mp4", "yuv444p"),
            ("h264", "mp4", "yuv422p"),
            ("vp9", "webm", "yuv444p"),
            ("mjpeg", "avi", "yuvj422p"),
        ):
            name = f"{codec}_{pix_fmt}"
            path = write_video(folder / f"{name}.{suffix}", frames[:12], codec=codec, pix_fmt=pix_fmt)
            self._add_as_indexed(name, path)
        large = [np.kron(frame, np.ones((20, 20, 1), np.uint8)) for frame in textured(3, height=108, width=192)]
        path = write_video(folder / "4k.mp4", large, options={"preset": "ultrafast"})
        self._add_as_indexed("4k", path)
        small = write_video(folder / "small.mp4", textured(12, height=64, width=96))
        streams = [
            copy_packets(file, Path(file).with_suffix(".h264")).read_bytes() for file in (self._original["mp4"], small)
        ]
        for name, suffix in (("size_changes", "h264"), ("size_changes_ts", "ts")):
            path = folder / f"{name}.{suffix}"
            raw = folder / "both.h264"
            raw.write_bytes(b"".join(streams))
            path.write_bytes(raw.read_bytes()) if suffix == "h264" else copy_packets(raw, path)
            self._add_as_indexed(name, path, loader="96x64")

    def make_odd_times(self) -> None:
        folder = self._folder
        uneven = np.cumsum(np.random.default_rng(0).integers(1, 5, 40)).tolist()
        self._add_as_indexed("uneven_times", write_video(folder / "uneven.mp4", self._frames, times=uneven))
        path = write_video(folder / "uneven.webm", self._frames, times=uneven, codec="vp9")
        self._add_as_indexed("uneven_times_vp9", path)
        self._add_as_indexed("no_times", copy_packets(self._original["mp4"], folder / "no_times.h264"))
        for codec, options in (("h264", None), ("mpeg4", {"bf": "2"})):
            path = write_video(folder / f"no_times_{codec}.avi", self._frames, codec=codec, options=options)
            self._add_as_indexed(f"no_times_avi_{codec}", path)
        for suffix in ("mkv", "webm"):
            for name, change in (
                ("duplicate", lambda number: number // 2 * 80),
                ("equal", lambda number: 0),
                ("backwards", lambda number: 40 * (40 - number)),
                ("shuffled", lambda number: 40 * (number * 17 % 40)),
            ):
                path = folder / f"{name}.{suffix}"
                path.write_bytes(_with_times(self._original[suffix], change))
                self._add_as_indexed(f"{name}_times_{suffix}", path)
        mp4 = self._original["mp4"].read_bytes()
        path = folder / "equal.mp4"
        at = mp4.index(b"stts") + 16
        path.write_bytes(mp4[:at] + bytes(4) + mp4[at + 4 :])
        self._add_as_indexed("equal_times_mp4", path)
        at = mp4.index(b"ctts") + 8
        count = int.from_bytes(mp4[at : at + 4])
        table = np.frombuffer(mp4, ">u4", 2 * count, at + 4).copy().reshape(count, 2)
        table[:, 1] = np.roll(table[:, 1], 3)
        path = folder / "shuffled.mp4"
        path.write_bytes(mp4[: at + 4] + table.tobytes() + mp4[at + 4 + table.nbytes :])
        self._add_as_indexed("shuffled_times_mp4", path)

    def make_odd_names(self) -> None:
        path = Path(copy_packets(self._original["mp4"], self._folder / "latin1_title.mkv", title="TITLE"))
        path.write_bytes(path.read_bytes().replace(b"TITLE", "Café!".encode("latin-1")))
        self._add_as_indexed("title_not_utf8", path)
        for name in ("ü 視頻 🎥", "line\nbreak", "100%d %20", "a:b", "-i", "#1 'quoted' \"twice\"", "not_utf8\udcff"):
            path = self._folder / f"{name}.mp4"
            path.write_bytes(self._original["mp4"].read_bytes())
            self._add_as_indexed(f"named {name!r}", path)


def _around(data: bytes, name: bytes) -> range:
    """Places after the name of a box of an MP4 file."""
    start = data.index(name) + 4
    return range(start + 1, start + 24)


def copy_packets(
    source: str | Path, path: Path, *, options: dict[str, str] | None = None, title: str = "", lost: int | None = None
) -> Path:
    """The packets of `source` in another container, but for number `lost`."""
    with av.open(str(source)) as original, av.open(str(path), "w", options=options) as container:
        container.metadata["title"] = title
        stream = container.add_stream_from_template(original.streams.video[0])
        for number, packet in enumerate(original.demux(video=0)):
            if packet.size and number != lost:
                if packet.dts is None:  # a stream without a container
                    packet.time_base = Fraction(1, 25)
                    packet.dts = packet.pts = number
                packet.stream = stream
                container.mux(packet)
    return path


def _with_times(source: Path, time: Callable[[int], int]) -> bytes:
    """A Matroska file of one cluster with the time of packet n, in ms, set to `time(n)`."""
    data = bytearray(source.read_bytes())
    with av.open(str(source)) as container:
        for number, packet in enumerate(container.demux(video=0)):
            if packet.size:
                at = data.index(bytes(packet)) - 3  # int16 time, flags, data
                data[at : at + 2] = time(number).to_bytes(2, signed=True)
    return bytes(data)
