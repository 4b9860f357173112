"""The packet index: the same clips with less read; an index or a file that is not what it was never gives wrong frames.

That any frames of any stream come out right through the index is tested beside the same without it, in
`test_packets.py`.
"""

import json
import os
import shutil
import zlib

import fsspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.worker_pool import WorkerPool
from dali_pipelines import ClipLoader, InputError, Manifest
from dali_pipelines.cpu_cut import BatchMemory
from dali_pipelines.files import Source, read_ranges
from dali_pipelines.manifest import key_of
from dali_pipelines.packet_index import (
    IndexedVideo,
    PacketIndex,
    StaleIndexError,
    Stream,
    hash_of,
    index_path,
    open_header,
    open_index,
    write_index,
)
from dali_pipelines.plan import plan_sample
from dali_pipelines.probe import probe, probe_packets
from preparation.index import check_overwritable, index
from preparation.pack import pack
from preparation.transcode import Job, Settings
from tests.videos import set_edits, textured, write_video
from tests.web import serve

FRAMES = 60
NAMES = ("a.mp4", "b.mkv", "c.avi", "d.webm")
READ_ALL = "read without the packet index: "


@pytest.fixture(scope="module")
def indexed(tmp_path_factory) -> Manifest:
    """Videos of short groups, indexed as `prepare.py` does."""
    folder = tmp_path_factory.mktemp("indexed")
    options = {"x264-params": "keyint=12:bframes=2:scenecut=0"}
    for number, (name, codec) in enumerate(zip(NAMES, ("h264", "h264", "mpeg4", "vp9"), strict=True)):
        frames = textured(FRAMES, height=72, width=96, seed=number)
        write_video(folder / name, frames, codec=codec, options=options if codec == "h264" else {"g": "12"})
    listed = [(name, number) for number, name in enumerate(NAMES)]
    manifest, rejected = index(listed, root=folder, journal=folder / "journal", pool=WorkerPool(workers=1))
    assert not rejected and len(manifest.entries) == len(NAMES)
    manifest.write(folder / "some.csv")
    return Manifest.read(folder / "some.csv")


def clips(manifest: Manifest, **changes):
    """(the batch of all videos, the loader's statistics)."""
    arguments = dict(mode="validate", batch_size=len(manifest), num_frames=4, stride=3, crop_size=32, workers=0)
    loader = ClipLoader(manifest, **arguments | changes)
    (batch,) = loader
    return batch, loader.stats


def without_index(manifest: Manifest) -> Manifest:
    plain = Manifest(list(manifest), root=manifest.root)
    assert plain.index is None
    return plain


def same(batch, other) -> bool:
    return bool(batch.valid.all() and other.valid.all()) and torch.equal(batch.clips, other.clips)


@pytest.mark.slow
@pytest.mark.parametrize("workers, decode", [(0, "auto"), (1, "auto"), (1, "nvdec"), (0, "dali")])
def test_the_same_clips_and_no_demuxer(indexed, workers, decode):
    batch, stats = clips(indexed, workers=workers, decode=decode)
    expected, read_through = clips(without_index(indexed), workers=workers, decode=decode)
    assert same(batch, expected) and batch.engines == expected.engines
    assert stats.fallbacks == read_through.fallbacks
    assert stats.packets_read == stats.packets_kept == read_through.packets_kept < read_through.packets_read


@pytest.mark.slow
def test_rotated_and_trimmed_by_an_edit_list(tmp_path):
    """What an edit list cuts out is decoded and not shown, also where no demuxer says so."""
    options = {"x264-params": "keyint=60:bframes=2:scenecut=0"}
    write_video(tmp_path / "whole.mp4", textured(FRAMES, height=72, width=96), options=options)
    set_edits(tmp_path / "whole.mp4", tmp_path / "a.mp4", [(1600, 10 * 512)])
    write_video(tmp_path / "b.mp4", textured(FRAMES, height=72, width=96), rotation=90)
    manifest, _ = index([("a.mp4", 0), ("b.mp4", 0)], root=tmp_path, journal=tmp_path / "j", pool=WorkerPool(workers=1))
    assert manifest[0].frames < FRAMES and manifest[1].rotation == 90
    manifest.write(tmp_path / "some.csv")
    batch, stats = clips(manifest)
    assert same(batch, clips(without_index(manifest))[0]) and stats.fallbacks == {}
    assert stats.packets_read == stats.packets_kept


def changed(indexed: Manifest, folder, change) -> Manifest:
    shutil.copytree(indexed.root, folder, dirs_exist_ok=True)
    for name in NAMES[:2]:
        path = folder / name
        path.write_bytes(change(path.read_bytes()))
    return Manifest.read(folder / "some.csv")


def without_its_end(data: bytes) -> bytes:
    return data[: len(data) * 3 // 4]


def one_byte_longer(data: bytes) -> bytes:
    return data + b"\0"


def another_head(data: bytes) -> bytes:
    """The brand of MP4; the version of the muxer in Matroska."""
    return data.replace(b"isom", b"iso6", 1) if b"isom" in data else data.replace(b"Lavf", b"Lave", 1)


@pytest.mark.parametrize(
    "change, reason",
    [
        (without_its_end, "the file's size has changed since it was indexed"),
        (one_byte_longer, "the file's size has changed since it was indexed"),
        (another_head, "the file is not the one that was indexed"),
    ],
)
def test_a_changed_file_is_read_without_the_index(indexed, tmp_path, change, reason):
    manifest = changed(indexed, tmp_path, change)
    batch, stats = clips(manifest)
    expected, plain = clips(without_index(manifest))
    assert torch.equal(batch.clips, expected.clips) and torch.equal(batch.valid, expected.valid)
    assert [fault.reason for fault in stats.faults] == [fault.reason for fault in plain.faults]
    good = int(batch.valid[:2].sum())
    assert stats.fallbacks.get(READ_ALL + reason, 0) == good and batch.valid[2:].all()
    assert good or change is without_its_end


@pytest.mark.slow
def test_a_file_that_was_replaced_by_one_of_the_same_size(indexed, tmp_path):
    """Only the packets' content reveals the change; the new file is decoded."""
    manifest = changed(indexed, tmp_path, lambda data: data)
    old = indexed.root / NAMES[0]
    new = write_video(tmp_path / "new.mp4", textured(FRAMES, height=72, width=96, seed=9), options={"crf": "40"})
    data = open(new, "rb").read()
    assert len(data) < old.stat().st_size
    free = old.stat().st_size - len(data)
    (tmp_path / NAMES[0]).write_bytes(data + free.to_bytes(4) + b"free" + bytes(free - 8))
    os.remove(new)
    batch, stats = clips(manifest)
    assert same(batch, clips(without_index(manifest))[0]) and not torch.equal(batch.clips, clips(indexed)[0].clips)
    assert sum(stats.fallbacks.values()) == 1 and next(iter(stats.fallbacks)).startswith(READ_ALL)


@pytest.mark.slow
def test_an_edit_list_that_has_changed_is_noticed(tmp_path):
    """It decides which frames are shown. The size, the first 4 KiB and the packets are the same."""
    write_video(tmp_path / "whole.mp4", textured(FRAMES, height=72, width=96))
    set_edits(tmp_path / "whole.mp4", tmp_path / "a.mp4", [(1600, 10 * 512)])
    manifest, _ = index([("a.mp4", 0)], root=tmp_path, journal=tmp_path / "j", pool=WorkerPool(workers=1))
    manifest.write(tmp_path / "some.csv")
    before, stats = clips(manifest)
    assert stats.fallbacks == {}
    data = (tmp_path / "a.mp4").read_bytes()
    edits = np.array([1600, 10 * 512], ">i4").tobytes()
    assert data.count(edits) == 1 and data.index(edits) > 4096
    (tmp_path / "a.mp4").write_bytes(data.replace(edits, np.array([1600, 20 * 512], ">i4").tobytes()))
    after, stats = clips(manifest)
    assert same(after, clips(without_index(manifest))[0]) and not torch.equal(after.clips, before.clips)
    assert stats.fallbacks == {READ_ALL + "the file is not the one that was indexed": 1}
    (tmp_path / "a.mp4").write_bytes(data)  # another time of change is no reason
    assert same(clips(manifest)[0], before) and clips(manifest)[1].fallbacks == {}


def test_a_packet_that_has_changed_is_noticed(indexed, tmp_path):
    path = indexed.root / NAMES[0]
    _, entry = probe_packets(path)
    video = IndexedVideo(Source(str(path)), entry)
    runs = video.select(np.array([20])).runs
    data = bytearray(path.read_bytes())
    place = int(video._ends[runs[0][-1]]) - 1
    data[place] ^= 1
    (tmp_path / "a.mp4").write_bytes(data)
    with pytest.raises(StaleIndexError, match="the file has changed since it was indexed"):
        IndexedVideo(Source(str(tmp_path / "a.mp4")), entry).select(np.array([20]))
    IndexedVideo(Source(str(tmp_path / "a.mp4")), entry).select(np.array([40]))  # reads another group


def test_videos_missing_from_the_index_are_counted(indexed, tmp_path):
    shutil.copytree(indexed.root, tmp_path, dirs_exist_ok=True)
    whole = PacketIndex(indexed.index)
    entries = {key_of(video): whole.entry(key_of(video)) for video in list(indexed)[1:]}
    write_index(tmp_path / "some.packets", entries)
    batch, stats = clips(Manifest.read(tmp_path / "some.csv"))
    assert same(batch, clips(without_index(indexed))[0])
    assert stats.fallbacks == {READ_ALL + "this video is not in the index": 1}


@pytest.mark.slow
def test_containers_that_cut_packets_say_so(tmp_path):
    write_video(tmp_path / "a.ts", textured(30, height=72, width=96))
    manifest, _ = index([("a.ts", 0)], root=tmp_path, journal=tmp_path / "j", pool=WorkerPool(workers=1))
    manifest.write(tmp_path / "some.csv")
    batch, stats = clips(manifest)
    assert same(batch, clips(without_index(manifest))[0])
    assert stats.fallbacks == {READ_ALL + "its packets are not stored in one piece": 1}


@pytest.mark.slow
@settings(max_examples=20, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_a_damaged_index_never_gives_wrong_frames(indexed, tmp_path_factory, data):
    """Any bytes of it changed, cut off or repeated: each clip is right, whichever way it was read."""
    content = bytearray(indexed.index.read_bytes())
    expected = clips(without_index(indexed))[0]
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        kind = data.draw(st.sampled_from(["flip", "cut", "repeat", "zero"]))
        if kind == "flip":
            content[place] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "cut":
            del content[place : place + data.draw(st.integers(1, 100))]
        elif kind == "repeat":
            content[place:place] = content[place : place + 8]
        else:
            content[place : place + 40] = bytes(len(content[place : place + 40]))
        if not content:
            return
    path = tmp_path_factory.mktemp("damaged") / "some.packets"
    path.write_bytes(content)
    manifest = Manifest(list(indexed), root=indexed.root)
    manifest.index = path
    batch, stats = clips(manifest)
    assert same(batch, expected)
    assert all(reason.startswith(READ_ALL) for reason in stats.fallbacks)


@pytest.mark.slow
def test_entries_that_claim_too_much(indexed):
    """Sizes, places and counts that no file has, made with a good checksum: each is a reason, and takes no memory."""
    source = Source(str(indexed.root / NAMES[0]))
    entry = PacketIndex(indexed.index).entry(key_of(indexed[0]))
    head, _, columns = zlib.decompress(entry).partition(b"\n")
    count = len(columns) // 19
    huge = bytearray(columns)
    huge[7 * count] = 0x7F  # the highest byte of the place of the first packet
    for wrong in (b"", columns[:-1], bytes(huge), bytes(len(columns)), columns + columns[:19]):
        with pytest.raises(StaleIndexError, match="damaged|changed"):
            IndexedVideo(source, zlib.compress(head + b"\n" + wrong)).select(np.array([0]))
    wrong_heads = [b"[]", b"{}", head.replace(b'"size"', b'"sise"'), b'{"stream": [1], "size": 1, "checked": []}']
    wrong_heads += [head.replace(b'"size": ', b'"size": 1e999, "": '), b"[" * 100_000]
    wrong_heads += [head.replace(b"[[0, ", b"[[-9, "), head.replace(b"[[0, 4096", b"[[0, 99999999999")]
    assert len({*wrong_heads, head}) == len(wrong_heads) + 1
    for wrong in wrong_heads:
        with pytest.raises(StaleIndexError, match="damaged"):
            IndexedVideo(source, zlib.compress(wrong + b"\n" + columns))
    with pytest.raises(StaleIndexError, match="damaged"):
        IndexedVideo(source, zlib.compress(bytes(300 << 20)))
    for old, new in ((b'["h264"', b'["h266x"'), (b", 96, 72,", b", 96, 7200000000000000000000,")):
        assert old in head
        changed = IndexedVideo(source, zlib.compress(head.replace(old, new) + b"\n" + columns))
        with pytest.raises(StaleIndexError, match="FFmpeg here has no decoder"):
            changed.stream.context()


@pytest.mark.slow
def test_an_unforeseen_entry_is_not_a_fault(indexed, tmp_path):
    """One with a good checksum, and without a type that anything expects."""
    entries = {}
    for video in indexed:
        head, _, columns = zlib.decompress(PacketIndex(indexed.index).entry(key_of(video))).partition(b"\n")
        head = json.loads(head)
        head["stream"][Stream._fields.index("extradata")] = []
        entries[key_of(video)] = zlib.compress(json.dumps(head).encode() + b"\n" + columns)
    write_index(tmp_path / "some.packets", entries)
    manifest = Manifest(list(indexed), root=indexed.root)
    manifest.index = tmp_path / "some.packets"
    for decode in ("auto", "nvdec"):
        batch, stats = clips(manifest, decode=decode)
        assert same(batch, clips(without_index(indexed), decode=decode)[0])
        assert any(reason.startswith(READ_ALL) for reason in stats.fallbacks) and not stats.faults


def test_a_header_has_colours_that_only_the_container_knows(indexed):
    """A decoder of the small file would otherwise take others than one of the video."""
    _, entry = probe_packets(indexed.root / NAMES[0])
    known = {"colorspace": 1, "color_range": 2, "color_primaries": 9, "color_trc": 13}
    stream = IndexedVideo(Source(str(indexed.root / NAMES[0])), entry).stream._replace(**known)
    context = open_header(stream).streams.video[0].codec_context
    assert {name: int(getattr(context, name)) for name in known} == known


def test_a_file_that_is_not_an_index_is_not_overwritten(indexed, tmp_path):
    path = tmp_path / "some.packets"
    path.write_text("somebody's notes")
    with pytest.raises(InputError, match=r"some\.packets: would be overwritten"):
        check_overwritable(tmp_path / "some.csv")
    path.write_bytes(indexed.index.read_bytes().replace(b"packets 2", b"packets 1"))  # of an earlier version
    with pytest.raises(StaleIndexError, match="another version"):
        PacketIndex(path)
    check_overwritable(tmp_path / "some.csv")


@pytest.mark.slow
def test_copies_and_shards_have_their_own_index(indexed, tmp_path):
    job = Job(
        indexed, tmp_path / "copies", Settings(64, 8, "h264", 30), journal=tmp_path / "j", pool=WorkerPool(workers=1)
    )
    copies, rejected, _ = job.transcode()
    assert not rejected and len(copies.entries) == len(copies)
    packed, rejected = pack(indexed.root / "some.csv", tmp_path / "shards", shard_bytes=1e9, pool=WorkerPool(workers=1))
    assert not rejected and len(packed.entries) == len(packed)
    for manifest, path in ((copies, tmp_path / "copies/some.csv"), (packed, tmp_path / "shards/some.csv")):
        manifest.write(path)
        batch, stats = clips(Manifest.read(path))
        assert same(batch, clips(without_index(manifest))[0])
        assert stats.fallbacks == {} and stats.packets_read == stats.packets_kept


@pytest.mark.slow
def test_a_rebuilt_index_is_used_at_once(indexed, tmp_path):
    """Also in the process that has read the old one."""
    shutil.copytree(indexed.root, tmp_path, dirs_exist_ok=True)
    assert clips(Manifest.read(tmp_path / "some.csv"))[1].fallbacks == {}
    write_video(tmp_path / NAMES[0], textured(FRAMES, height=72, width=96, seed=11))
    listed = [(name, number) for number, name in enumerate(NAMES)]
    manifest, _ = index(listed, root=tmp_path, journal=tmp_path / "again", pool=WorkerPool(workers=1))
    manifest.write(tmp_path / "some.csv")
    assert clips(Manifest.read(tmp_path / "some.csv"))[1].fallbacks == {}


def test_writing_a_manifest_writes_its_index(indexed, tmp_path):
    shutil.copytree(indexed.root, tmp_path, dirs_exist_ok=True)
    manifest = Manifest.read(tmp_path / "some.csv")
    assert manifest.index == index_path(tmp_path / "some.csv")
    manifest.write(tmp_path / "other.csv")
    copy = Manifest.read(tmp_path / "other.csv")
    assert clips(copy)[1].fallbacks == {} and len(PacketIndex(copy.index)) == len(NAMES)
    assert copy.hint == "" and "no packet index beside it" in without_index(copy).hint
    Manifest([probe(tmp_path / NAMES[0])]).write(tmp_path / "some.csv")
    assert not index_path(tmp_path / "some.csv").exists() and Manifest.read(tmp_path / "some.csv").index is None


def test_the_index_is_mapped_by_the_workers(indexed):
    """One mapping for all videos; none of its arrays is a copy."""
    opened = open_index(str(indexed.index))
    assert all(isinstance(array, np.memmap) for array in (opened._keys, opened._ends, opened._entries))
    assert opened is open_index(str(indexed.index)) and len(opened) == len(indexed)
    assert opened._keys.flags.aligned and opened._ends.flags.aligned  # or every search would copy them
    with pytest.raises(StaleIndexError, match="not in the index"):
        opened.entry(hash_of("other.mp4", "", 0))


# -- over the network --


@pytest.mark.slow
@pytest.mark.parametrize("shards", [False, True], ids=["files", "shards"])
@pytest.mark.parametrize("decode", ["auto", "nvdec"])
def test_only_the_packets_of_a_clip_are_transferred(indexed, tmp_path, decode, shards):
    manifest = Manifest.read(indexed.root / "some.csv")
    if shards:
        manifest, _ = pack(indexed.root / "some.csv", tmp_path, shard_bytes=1e9, pool=WorkerPool(workers=1))
        manifest.write(tmp_path / "some.csv")
    expected = clips(without_index(manifest), decode=decode)[0]
    with serve(manifest.root) as server:
        manifest.root = server.url
        batch, stats = clips(manifest, decode=decode)
        assert same(batch, expected) and stats.fallbacks.keys() <= {"not by NVDEC: no parser for vp9"}
        assert server.sent == sum(bytes_of(indexed, row) for row in range(len(indexed)))
        few = server.sent
        clips(without_index(manifest), decode=decode)
        assert few < (server.sent - few) / 2


def bytes_of(manifest: Manifest, row: int) -> int:
    """What `clips` reads of a video over a network: by the entry, with gaps that are not worth a request."""
    view = ClipLoader(manifest, mode="validate", batch_size=1, num_frames=4, stride=3, crop_size=32, workers=0)._view
    plan = plan_sample(manifest[row], view, seed=0, epoch=0, sample_id=row)
    video = IndexedVideo(manifest.source(row), PacketIndex(manifest.index).entry(key_of(manifest[row])))
    numbers = sorted(number for run in video.select(plan.positions).runs for number in run)
    spans: list[list[int]] = []
    for number in numbers:
        first, end = int(video._firsts[number]), int(video._ends[number])
        if spans and first - spans[-1][1] <= 1 << 14:
            spans[-1][1] = end
        else:
            spans.append([first, end])
    return sum(end - first for first, end in spans)


def test_any_file_system_of_fsspec(indexed):
    system = fsspec.filesystem("memory")
    for name in NAMES:
        system.pipe(f"/index/{name}", (indexed.root / name).read_bytes())
    manifest = Manifest(list(indexed), root="memory://index")
    manifest.index = indexed.index
    batch, stats = clips(manifest)
    assert same(batch, clips(indexed)[0]) and stats.fallbacks == {} and stats.packets_read == stats.packets_kept


@pytest.mark.slow
def test_a_cache_keeps_whole_files_and_is_read_by_the_index(indexed, tmp_path):
    with serve(indexed.root) as server:
        manifest = Manifest(list(indexed), root=server.url)
        manifest.index = indexed.index
        batch, stats = clips(manifest, cache=tmp_path)
        assert same(batch, clips(indexed)[0]) and stats.packets_read == stats.packets_kept
        assert server.sent == sum((indexed.root / name).stat().st_size for name in NAMES)
        sent = server.sent
        assert same(clips(manifest, cache=tmp_path)[0], batch) and server.sent == sent


@pytest.mark.slow
@pytest.mark.parametrize("change", ["replaced", "longer"])
def test_a_file_that_has_changed_on_its_server_is_fetched(indexed, tmp_path, change):
    """Also if its packets are what they were: a server says how long a file is."""
    shutil.copytree(indexed.root, tmp_path, dirs_exist_ok=True)
    if change == "replaced":
        write_video(tmp_path / NAMES[0], textured(FRAMES, height=72, width=96, seed=11))
    else:
        (tmp_path / NAMES[0]).write_bytes(one_byte_longer((tmp_path / NAMES[0]).read_bytes()))
    with serve(tmp_path) as server:
        manifest = Manifest(list(indexed), root=server.url)
        manifest.index = indexed.index
        batch, stats = clips(manifest)
    plain = Manifest(list(indexed), root=tmp_path)
    assert same(batch, clips(plain)[0]) and sum(stats.fallbacks.values()) == 1


@pytest.mark.slow
def test_ranges_are_joined_if_that_is_cheaper(tmp_path):
    data = np.random.default_rng(0).bytes(200_000)
    (tmp_path / "a").write_bytes(data)
    ranges = [(10, 20), (20, 30), (5000, 6000), (100_000, 100_001)]
    for source, count in ((Source(str(tmp_path / "a")), 30 - 10 + 1000 + 1), (Source("a", data=data), 1021)):
        found, read = read_ranges(source, ranges)
        assert found == [data[first:end] for first, end in ranges] and read == count
    with serve(tmp_path) as server:
        found, read = read_ranges(Source(f"{server.url}/a"), ranges)
        assert found == [data[first:end] for first, end in ranges] and read == server.sent == 5991
        assert server.requests == {"a": 2}
        server.cuts = 1
        found, _ = read_ranges(Source(f"{server.url}/a"), ranges)
        assert found == [data[first:end] for first, end in ranges]


# -- clips out of frames --


def test_the_memory_of_a_batch_is_used_again_once_nobody_needs_it():
    memory = BatchMemory((2, 3), np.float32)
    first = memory.take()
    place = first.data_ptr()
    part = first[1]
    del first
    assert memory.take().data_ptr() != place  # a view of it is left
    part.fill_(7)
    other = memory.take()
    other.zero_()
    assert (part == 7).all()
    del part
    assert place in {memory.take().data_ptr() for _ in range(2)} | {other.data_ptr()}
