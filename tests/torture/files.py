"""2,000 structurally damaged video files, each indexed and read by the real loader.

    python -m tests.torture.files                                   # about 10 minutes on 2 cores
    python -m tests.torture.files --files 200 --only vp9 --seed 1

For each codec and kind of damage, it prints what came of the files:

refused   by indexing (`prepare.py`), with a reason
fault     indexed, or indexed before the damage, and named by the loader
equal     the loader's frames are those of a full plain decode of the damaged file
crash     the process ended, such as by a segmentation fault
hang      more than `--timeout` seconds
unnamed   an exception that names no reason, or a refusal that is one
wrong     the loader says valid, and its frames are others; or indexing counts other frames
memory    more than 2 GiB above the usual size of the process that does all of this

Exit status 1 if there is one of the last five: these files are kept in `--out`/failed, with a JSON file that says why.
The same seed damages the same way.
"""

import argparse
import csv
import json
import multiprocessing
import os
import re
import resource
import shutil
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
import torch

from dali_pipelines import ClipLoader, InputError, Manifest
from dali_pipelines.manifest import Video, coded_size, key_of
from dali_pipelines.packet_index import write_index
from dali_pipelines.packets import video_stream
from dali_pipelines.probe import probe, probe_packets
from dali_pipelines.processes import end_with_parent
from preparation.index import probe_file
from tests.bad_files import copy_packets
from tests.torture.damage import KINDS, damage, find_fields
from tests.videos import textured, write_video

GOOD = ("refused", "fault", "equal")
BAD = ("crash", "hang", "unnamed", "wrong", "memory")
HEIGHT, WIDTH, FRAMES = 48, 64, 30
WINDOWS, WINDOW_FRAMES = 3, 4  # the clips that are read of a file
MOST_MEMORY = 2 << 30
ADDRESS_SPACE = 16 << 30  # of a process that reads files: the machine survives
GROUP = 40  # files that are also read by a loader with worker processes, at once
CASES = Path(__file__).parents[3] / "shared" / "cases"

_H264 = "bframes=3:keyint=12:scenecut=0:b-adapt=0:mbtree=0"
_FRAGMENTS = {"movflags": "frag_keyframe+empty_moov+default_base_moof"}
_IN_MP4 = ("h264", "hevc", "mpeg4", "mpeg2video")  # Matroska has no decoding times
_FAST = {"movflags": "faststart"}
_OPEN = "bframes=3:keyint=12:min-keyint=12:scenecut=0:b-adapt=0:mbtree=0:open-gop=1:b-pyramid=normal"
_HIDDEN = {"g": "12", "auto-alt-ref": "1", "lag-in-frames": "16", "deadline": "good"}
ORIGINALS: Sequence[tuple[str, dict[str, Any], Sequence[tuple[str, dict[str, str]]]]] = (
    # codec, how it is encoded, (container, its options) ...
    ("h264", {"options": {"x264-params": _H264}}, [("mp4", {}), ("mp4", _FAST), ("mp4", _FRAGMENTS), ("mkv", {}),
        ("ts", {}), ("flv", {}), ("avi", {}), ("h264", {})]),
    ("h264", {"options": {"x264-params": _OPEN}}, [("mp4", {}), ("mkv", {})]),
    ("h264", {"options": {"x264-params": _H264 + ":tff=1:slices=3"}}, [("mp4", {}), ("ts", {})]),
    ("hevc", {"options": {"x265-params": "log-level=none:bframes=2:keyint=12:repeat-headers=1"}},
        [("mp4", {}), ("mp4", _FRAGMENTS), ("mkv", {}), ("ts", {})]),
    ("mpeg4", {"options": {"bf": "2", "g": "12"}}, [("avi", {}), ("mp4", {}), ("mkv", {}), ("mov", {})]),
    ("vp8", {"options": {"g": "12"}}, [("webm", {}), ("ivf", {}), ("ogg", {})]),
    ("vp8", {"options": _HIDDEN}, [("webm", {})]),
    ("vp9", {"options": {"g": "12"}}, [("webm", {}), ("mp4", {}), ("ivf", {})]),
    ("vp9", {"options": _HIDDEN}, [("webm", {})]),
    ("av1", {"options": {"g": "12"}}, [("mp4", {}), ("webm", {}), ("obu", {})]),
    ("mjpeg", {}, [("avi", {}), ("mov", {}), ("mkv", {})]),
    ("mpeg2video", {"options": {"g": "12"}}, [("ts", {}), ("mpg", {}), ("mkv", {}), ("m2v", {})]),
    ("mpeg1video", {}, [("mpg", {})]),
    ("prores", {"pix_fmt": "yuv422p10le"}, [("mov", {})]),
    ("ffv1", {"options": {"slicecrc": "1", "level": "3"}, "pix_fmt": "yuv420p"}, [("mkv", {})]),
    ("png", {"pix_fmt": "rgb24"}, [("mov", {})]),
    ("gif", {"pix_fmt": "rgb8"}, [("gif", {})]),
    ("flv", {}, [("flv", {})]),
    ("wmv2", {}, [("asf", {})]),
    ("qtrle", {"pix_fmt": "rgb24"}, [("mov", {})]),
)  # fmt: skip


class Original(NamedTuple):
    codec: str
    path: Path
    row: Video


def make_originals(folder: Path, only: str | None) -> list[Original]:
    """Encodes small videos of every codec in its containers. Theora, which FFmpeg cannot encode, comes from shared/."""
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["SVT_LOG"] = "0"
    frames = textured(FRAMES, height=HEIGHT, width=WIDTH)
    made = []
    for kind, (codec, settings, containers) in enumerate(ORIGINALS):
        if only not in (None, codec):
            continue
        whole = folder / f"{codec}_{kind}.{'mp4' if codec in _IN_MP4 else 'mkv'}"
        if len(containers) > 1:
            write_video(whole, frames, codec=codec, **settings)
        for number, (suffix, options) in enumerate(containers):
            path = folder / f"{codec}_{kind}_{number}.{suffix}"
            if codec == "av1" or suffix == "avi" or len(containers) == 1:  # copies of packets do not fit
                write_video(path, frames, codec=codec, **settings)
            else:
                copy_packets(whole, path, options=options)
            made.append(Original(codec, path, probe(path)))
    theora = CASES / "07_wikipedia.ogv"
    if only in (None, "theora") and theora.exists():
        made.append(Original("theora", theora, probe(theora)))
    return made


# -- in a child process --


def judge(path: str, row: Video, seed: int) -> dict[str, Any]:
    """What comes of a damaged file; `row` is the manifest's of before the damage, with the path of the original.

    {"outcome": one of GOOD and BAD, "detail": why}, and for `judge_group` {"rows": that row, and one of indexing now,
    "valid": of each row, "stride": that both were read with}.
    """
    original = row.path
    rows, refusal, is_verified = [row._replace(path=path)], "", False
    for decode in (False, True):
        try:
            video = probe_file(path, decode).video
        except InputError as error:
            refusal = str(error)
        except Exception as error:
            return _answer("unnamed", f"indexing: {type(error).__name__}: {error}")
        else:
            folder, name = os.path.split(path)
            rows[1:] = [video._replace(path=f"{folder}/./{name}")]  # a key of its own in the packet index
            is_verified = decode
        if _is_unnamed(refusal):
            return _answer("unnamed", f"indexing: {refusal!r}")
    rng = np.random.default_rng(seed)
    stride = float(rng.choice([0.5, 1, 2, 3]))
    decoded, valid, faults = Plain(path, original=original), [], []
    if is_verified and not decoded.errors and rows[1].frames != decoded.count:
        return _answer("wrong", f"{rows[1].frames} frames are indexed, {decoded.count} come out of a plain decode")
    entries = {key_of(row): probe_packets(place)[1] for row, place in zip(rows, (original, path))}
    index = Path(f"{path}.{os.getpid()}.packets")
    write_index(index, entries)
    for engine, by_index in (("host", False), ("host", True), ("nvdec", True), ("dali", False)):
        try:
            loader = make_loader(rows, stride=stride, decode=engine, index=index if by_index else None)
            (batch,) = loader
        except Exception as error:
            return _answer("unnamed", f"{engine}: {type(error).__name__}: {error}")
        finally:
            loader.close()
        reasons = [fault.reason for fault in loader.stats.faults]
        if len(reasons) != (~batch.valid).sum() or any(map(_is_unnamed, reasons)):
            return _answer("unnamed", f"{engine}: {reasons}")
        for number, video in enumerate(rows):
            # Damage that hardware decoders conceal is found by --verify decode: see docs/data.md.
            if not batch.valid[number] or not (engine == "host" or (is_verified and number)):
                continue
            is_close = batch.engines[number] == "dali"
            is_older = by_index and not number  # by the index of before the damage: packets that are intact count
            if reason := decoded.differs(video, batch.clips[number], stride, is_close=is_close, is_older=is_older):
                return _answer("wrong", f"{engine}, {'indexed now' if number else 'indexed before'}: {reason}")
        if engine == "host" and by_index:
            # With the index of before, a container that is damaged need not be understood.
            if any(before and not now for before, now in zip(valid, batch.valid.tolist(), strict=True)):
                return _answer("wrong", f"by the packet index, valid is {batch.valid.tolist()}, without it {valid}")
        elif engine == "host":
            valid, faults = batch.valid.tolist(), reasons
    index.unlink()
    outcome = "refused" if len(rows) == 1 and not valid[0] else "equal" if any(valid) else "fault"
    return _answer(outcome, "; ".join([refusal, *faults])) | {"rows": rows, "valid": valid, "stride": stride}


def _answer(outcome: str, detail: str) -> dict[str, Any]:
    return {"outcome": outcome, "detail": detail}


def _is_unnamed(reason: str) -> bool:
    return bool(re.match(r"[A-Z]\w*(Error|Exception)\b", reason))


def make_loader(
    rows: Sequence[Video], *, stride: float, decode: str, workers: int = 0, batch: int = 0, index: Path | None = None
) -> ClipLoader:
    manifest = Manifest(rows)
    manifest.index = index
    return ClipLoader(
        manifest,
        mode="test",
        batch_size=batch or len(rows),
        num_frames=WINDOW_FRAMES,
        num_windows=WINDOWS,
        crop_size=HEIGHT,
        stride=stride,
        workers=workers,
        decode=decode,
        decode_threads=1,
        timeout_s=20,
    )


class Plain:
    """A full plain decode, as FFmpeg does it: what cannot be decoded is passed over and counted."""

    def __init__(self, path: str, *, original: str):
        self._path, self._original = path, original
        self.errors = 0
        self.count = sum(1 for _ in self._frames(path))

    def _frames(self, path: str) -> Iterator[av.VideoFrame]:
        self.errors = 0
        try:
            with av.open(path, metadata_errors="replace") as container:
                try:
                    stream = video_stream(container)
                except InputError:
                    return
                stream.codec_context.thread_count = 1
                if stream.codec_context.codec.canonical_name in ("mjpeg", "png"):  # they make up what is missing
                    stream.codec_context.options = {"err_detect": "crccheck+explode"}
                for packet in container.demux(stream):
                    if packet.is_corrupt and container.format.name != "mpegts":  # cut off: documented as not counted
                        continue
                    try:
                        frames = packet.decode()
                    except av.error.FFmpegError:
                        self.errors += 1
                        continue
                    self.errors += sum(frame.is_corrupt for frame in frames)
                    yield from frames
        except (av.error.FFmpegError, AttributeError):  # no decoder
            self.errors += 1

    def differs(
        self, video: Video, clip: torch.Tensor, stride: float, *, is_close: bool, is_older: bool = False
    ) -> str:
        """How the clips [V, C, T, S, S] of a file differ; "" if every frame is the one at its position, or as many
        places before it as frames were lost, or the one of the file before the damage: a plain decode may not recover.
        `is_close`: colours may be rounded in another way; `is_older`: it may be the one of before the damage anyway."""
        loader = make_loader([video], stride=stride, decode="host")
        seconds = loader.window_seconds(0)
        positions = self._positions(loader, video)
        loader.close()
        assert len(seconds) == WINDOWS
        missing = {int(position): clip[3 * window, :, place] for window, row in enumerate(positions)
                   for place, position in enumerate(row)}  # fmt: skip
        best: dict[int, float] = {}
        lost = self.errors + max(video.frames - self.count, 0)
        for path, most in ((self._path, lost), *([(self._original, 0)] if lost or is_older else [])):
            for number, frame in enumerate(self._frames(path)):
                for position, wanted in missing.items():
                    if number <= position <= number + most and best.get(position, 9) > 1e-3:
                        best[position] = min(best.get(position, 9), _distance(frame, video, wanted, is_close=is_close))
        limit = 4 / 255 if is_close else 1e-3
        bad = {position: best.get(position) for position in missing if best.get(position, 9) > limit}
        return f"frames that differ, by at most: {bad}; {self.count} frames, {lost} lost" if bad else ""

    @staticmethod
    def _positions(loader: ClipLoader, video: Video) -> np.ndarray:
        from dali_pipelines.plan import windows_of_test

        return windows_of_test(video, loader._view)


def _distance(frame: av.VideoFrame, video: Video, wanted: torch.Tensor, *, is_close: bool) -> float:
    """Of values in 0..1: the largest, or the mean if `is_close`; 9 for another size."""
    if (frame.height, frame.width) != coded_size(video):
        return 9.0
    whole = frame.to_ndarray(format="rgb24")
    whole = whole[:, ::-1] if video.mirrored else whole
    whole = np.rot90(whole, video.rotation // 90)
    whole = torch.from_numpy(np.ascontiguousarray(whole)).permute(2, 0, 1)[None]
    height, width = whole.shape[2:]
    size = tuple(max(height, width) * HEIGHT // min(height, width) if side > other else HEIGHT
                 for side, other in ((height, width), (width, height)))  # fmt: skip
    expected = _resized_corner(_resized_corner(whole[0], size[1]).transpose(1, 2), size[0]).transpose(1, 2)
    error = (expected / 255 - wanted).abs()
    is_reduced = 3 * height * width * WINDOWS * WINDOW_FRAMES > 64 << 20  # by the workers, in 8 bits
    return float(error.mean() if is_close else max(error.max() - 0.52 / 255 * is_reduced, 0))


def _resized_corner(frame: torch.Tensor, width: int) -> torch.Tensor:
    """The first columns, HEIGHT of them, of [C, H, W] if it were resized to `width`: the whole may be very wide."""
    places = (torch.arange(HEIGHT) + 0.5) * frame.shape[2] / width - 0.5
    places = places.clamp(0, frame.shape[2] - 1)
    low = places.long()
    high = (low + 1).clamp(max=frame.shape[2] - 1)
    return torch.lerp(frame[:, :, low].float(), frame[:, :, high].float(), places - low)


def judge_group(judged: list[dict[str, Any]]) -> dict[str, Any]:
    """Whether loaders with worker processes say the same of many files at once as `judge` did of each."""
    for stride in {each["stride"] for each in judged}:
        some = [each for each in judged if each["stride"] == stride]
        rows = [row for each in some for row in each["rows"]]
        expected = [is_valid for each in some for is_valid in each["valid"]]
        loader = make_loader(rows, stride=stride, decode="host", workers=1, batch=8)
        try:
            batches = list(loader)
        except Exception as error:
            return _answer("unnamed", f"with workers: {type(error).__name__}: {error}")
        finally:
            loader.close()
        if "workers" in str(loader.stats.fallbacks):
            return _answer("crash", f"in a worker: {loader.stats.fallbacks}")
        found = torch.cat([batch.valid for batch in batches])[: len(rows)].tolist()
        other = [row.path for row, one, two in zip(rows, expected, found, strict=True) if one != two]
        if other:
            return _answer("wrong", f"with workers, valid differs: {other}")
    return _answer("equal", "")


def _serve(pipe: multiprocessing.connection.Connection) -> None:
    end_with_parent()
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    av.logging.set_level(None)
    usual = 0
    functions = {"judge": judge, "judge_group": judge_group}
    while True:
        try:
            name, *arguments = pipe.recv()
        except EOFError:
            return
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        answer = functions[name](*arguments)
        peak = int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) << 10
        usual = usual or peak  # of a good file
        answer["memory"] = peak - usual
        if answer["memory"] > MOST_MEMORY and answer["outcome"] in GOOD:
            answer |= {"outcome": "memory", "detail": f"{answer['memory'] >> 20} MiB; {answer['detail']}"}
        pipe.send(answer)


# -- around it --


class Child:
    """A process that judges files, and is started again once it has ended or hung."""

    def __init__(self, warm_up: Original, timeout_s: float):
        self._warm_up = warm_up
        self._timeout_s = timeout_s
        self._process = None

    def ask(self, name: str, *arguments: Any, timeout_s: float | None = None) -> dict[str, Any]:
        if self._process is None:
            self._start()
        return self._ask(name, *arguments, timeout_s=timeout_s or self._timeout_s)

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,))
        self._process.start()
        theirs.close()
        answer = self._ask("judge", str(self._warm_up.path), self._warm_up.row, 0, timeout_s=120)
        if answer["outcome"] != "equal":
            raise SystemExit(f"{self._warm_up.path} is not damaged, and yet: {answer}")

    def _ask(self, *message: Any, timeout_s: float) -> dict[str, Any]:
        try:
            self._pipe.send(message)
            if self._pipe.poll(timeout_s):
                return self._pipe.recv()
            outcome, detail = "hang", f"more than {timeout_s:g} s"
        except (EOFError, OSError):
            self._process.join(10)
            outcome, detail = "crash", f"exit status {self._process.exitcode}"
        self.end()
        return _answer(outcome, detail)

    def end(self) -> None:
        if self._process is not None:
            self._pipe.close()
            self._process.kill()
            self._process.join()
            self._process = None


class Torture:
    """Damages files, and collects what comes of them."""

    def __init__(self, arguments: argparse.Namespace):
        self.out = Path(arguments.out)
        self.results: list[dict[str, Any]] = []
        self._arguments = arguments
        self._originals = make_originals(self.out / "originals", arguments.only)
        if not self._originals:
            raise SystemExit(f"--only {arguments.only}: no such codec")
        self._fields = {original.path: find_fields(original.path) for original in self._originals}
        self._lock = threading.Lock()
        self._numbers = iter(range(arguments.files))
        (self.out / "failed").mkdir(exist_ok=True)

    def run(self) -> None:
        threads = [threading.Thread(target=self._work, args=(each,)) for each in range(self._arguments.jobs)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _work(self, thread: int) -> None:
        folder = self.out / f"files-{thread}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        child = Child(self._originals[0], self._arguments.timeout)
        group: list[dict[str, Any]] = []
        while True:
            with self._lock:
                number = next(self._numbers, None)
            if number is not None:
                path, original, kind = self._make(number, folder)
                answer = child.ask("judge", str(path), original.row, number)
                self._record(answer, path, original.codec, kind)
                if answer["outcome"] in GOOD:
                    group.append(answer)
            if group and (len(group) == GROUP or number is None):
                answer = child.ask("judge_group", group, timeout_s=20 * GROUP)
                if answer["outcome"] in BAD:
                    self._record(answer, None, "all", "with workers")
                group = []
                shutil.rmtree(folder)
                folder.mkdir()
            if number is None:
                break
        child.end()

    def _make(self, number: int, folder: Path) -> tuple[Path, Original, str]:
        original = self._originals[number % len(self._originals)]
        kind = KINDS[number // len(self._originals) % len(KINDS)]
        kind = kind if self._fields[original.path].get(kind, True) else "bits"
        rng = np.random.default_rng([self._arguments.seed, number])
        other = self._originals[int(rng.integers(len(self._originals)))].path.read_bytes()
        damaged = damage(original.path.read_bytes(), self._fields[original.path], kind, rng, other=other)
        path = folder / f"{number}_{kind}_{original.path.name}"
        path.write_bytes(damaged)
        return path, original, kind

    def _record(self, answer: dict[str, Any], path: Path | None, codec: str, kind: str) -> None:
        with self._lock:
            self.results.append({"codec": codec, "kind": kind, "file": path.name if path else ""} | answer)
            if answer["outcome"] in BAD:
                print(f"{answer['outcome']}: {path.name if path else ''} {answer['detail'][:300]}", flush=True)
                if path:
                    shutil.copy(path, self.out / "failed" / path.name)
                    (self.out / "failed" / f"{path.name}.json").write_text(json.dumps(answer, default=str))


def table(results: Sequence[dict[str, Any]], by: Sequence[str]) -> str:
    """A Markdown table of how often each outcome was, a row for each value of the columns `by`."""
    outcomes = [*GOOD, *BAD]
    counts: dict[tuple[str, ...], Counter] = {}
    for result in results:
        counts.setdefault(tuple(result[name] for name in by), Counter())[result["outcome"]] += 1
    lines = [[*by, "files", *outcomes], ["---"] * (len(by) + 1 + len(outcomes))]
    lines += [[*key, each.total(), *(each[outcome] for outcome in outcomes)] for key, each in sorted(counts.items())]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.torture.files", description=__doc__.partition("\n")[0])
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="processes that read files at once (2)")
    parser.add_argument("--only", metavar="CODEC", help="such as h264")
    parser.add_argument("--timeout", type=float, default=60, help="seconds for a file (60)")
    parser.add_argument("--out", default="output/torture/files", help="folder for failing files and results.csv")
    torture = Torture(parser.parse_args(arguments))
    torture.run()
    results = torture.results
    with open(torture.out / "results.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["codec", "kind", "file", "outcome", "memory", "detail"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(results)
    everything = [result | {"all": "all"} for result in results]
    for by in (["codec", "kind"], ["kind"], ["codec"], ["all"]):
        print(table(everything, by) + "\n")
    print(f"memory: at most {max(result.get('memory', 0) for result in results) >> 20} MiB above the usual size")
    return int(any(result["outcome"] in BAD for result in results))


if __name__ == "__main__":
    sys.exit(main())
