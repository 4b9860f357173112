"""Videos in tar shards and below URLs: the same clips as from plain files, a safe cache, faults with reasons."""

import builtins
import contextlib
import errno
import gzip
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import namedtuple
from pathlib import Path

import fsspec
import pytest
import torch

from common.worker_pool import WorkerPool
from dali_pipelines import ClipLoader, InputError, Manifest, files
from dali_pipelines.files import Source, check_reachable, fetch, is_url, join, open_video, read_bytes, size_of
from dali_pipelines.probe import probe
from preparation.pack import pack
from tests.videos import textured, write_video
from tests.web import fill, serve

KINDS = {
    "bframes.mp4": "h264",
    "bframes.mkv": "h264",
    "vp9.webm": "vp9",
    "mpeg4.avi": "mpeg4",
    "deep/a, 50% of #1? ü:,,x.mp4": "h264",
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Manifest:
    """Files of their own."""
    folder = tmp_path_factory.mktemp("plain")
    videos = []
    for number, (name, codec) in enumerate(KINDS.items()):
        (folder / name).parent.mkdir(exist_ok=True)
        path = write_video(folder / name, textured(30, height=72, width=96, seed=number), codec=codec)
        videos.append(probe(path)._replace(path=name, label=number))
    return Manifest(videos, root=folder, classes=tuple("abcde"))


@pytest.fixture(scope="module")
def packed(plain, tmp_path_factory) -> Manifest:
    """The same in a few shards."""
    folder = tmp_path_factory.mktemp("packed")
    plain.write(folder / "some.csv")
    manifest, rejected = pack(folder / "some.csv", folder / "a, b:c", shard_bytes=45_000, pool=WorkerPool(workers=1))
    assert not rejected and 1 < len(manifest.shards) < len(manifest)
    return manifest


def at(manifest: Manifest, root: str) -> Manifest:
    return Manifest([manifest[row] for row in range(len(manifest))], root=root)


def loader(manifest, mode="validate", **changes) -> ClipLoader:
    settings = dict(batch_size=len(KINDS), num_frames=4, crop_size=32, stride=4, workers=0, seed=5)
    return ClipLoader(manifest, mode=mode, **(settings | changes))


def epochs(made: ClipLoader, count: int = 1) -> list[torch.Tensor]:
    """The clips of some epochs, as they come; none may be missing."""
    try:
        batches = [batch for _ in range(count) for batch in made]
    finally:
        made.close()
    assert all(batch.valid.all() for batch in batches), made.stats.faults
    return [batch.clips for batch in batches]


def faults(made: ClipLoader) -> dict[int, str]:
    for _ in made:
        pass
    made.close()
    return {fault.sample_id: fault.reason for fault in made.stats.faults}


def same(some: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return len(some) == len(others) > 0 and all(map(torch.equal, some, others))


@pytest.fixture
def no_pause(monkeypatch):
    monkeypatch.setattr(files, "_PAUSE_S", 0)


@pytest.fixture
def web(plain, no_pause):
    with serve(plain.root) as server:
        yield server


@pytest.fixture
def shard_web(packed, no_pause):
    with serve(packed.root) as server:
        yield server


# -- tar shards --


@pytest.mark.slow
@pytest.mark.parametrize(
    "mode, workers, decode", [("train", 0, "host"), ("validate", 0, "dali"), ("test", 0, "auto"), ("train", 2, "dali")]
)
def test_clips_from_shards_equal_clips_from_files(plain, packed, mode, workers, decode):
    settings = dict(mode=mode, workers=workers, decode=decode)
    made = loader(packed, **settings)
    assert same(epochs(loader(plain, **settings), 2), epochs(made, 2))
    assert made.stats.fallbacks == {}


def test_rows_locate_videos_in_shards(plain, packed, tmp_path):
    packed.write(tmp_path / "list.csv")
    read = Manifest.read(tmp_path / "list.csv")
    assert [read[row] for row in range(len(read))] == [packed[row] for row in range(len(packed))]
    for row, name in enumerate(KINDS):
        assert read_bytes(read.source(row)) == (plain.root / name).read_bytes()
        assert size_of(read.source(row)) == os.path.getsize(plain.root / name)
        assert read.file(row) == f"{packed.root}/{packed[row].shard}: {name}"
        assert probe(read.source(row))[2:11] == plain[row][2:11]


def test_missing_or_truncated_shards_are_faults(packed, tmp_path):
    shutil.copytree(packed.root, tmp_path / "copy")
    first, second = sorted(packed.shards)[:2]
    os.remove(tmp_path / "copy" / first)
    last = max((video for video in map(packed.__getitem__, range(5)) if video.shard == second), key=lambda v: v.offset)
    os.truncate(tmp_path / "copy" / second, last.offset + last.size - 1)
    made = loader(at(packed, str(tmp_path / "copy")))
    reasons = faults(made)
    for row in range(len(packed)):
        video = packed[row]
        expected = "no such file" if video.shard == first else "the shard ends at byte" if video == last else ""
        assert bool(expected) == (row in reasons) and expected in reasons.get(row, "")
    assert made.stats.faults[0].path.startswith(str(tmp_path / "copy" / "some-0000"))


@pytest.mark.parametrize(
    "text",
    [
        "ffconcat version 1.0\nfile good.mp4\n",
        "ffconcat version 1.0\nfile /etc/passwd\n",
        "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{url}/secret.ts\n#EXT-X-ENDLIST\n",
        "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\ngood.mp4\n#EXT-X-ENDLIST\n",
        "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n"
        "a=rtpmap:96 H264/90000\n",
    ],
    ids=["concat", "concat elsewhere", "hls elsewhere", "hls", "sdp"],
)
def test_playlists_do_not_open_other_files(plain, web, tmp_path, text):
    shutil.copy(plain.root / "bframes.mp4", tmp_path / "good.mp4")
    path = tmp_path / "list.mp4"
    path.write_text(text.format(url=web.url))
    began = time.monotonic()
    for source in (Source(str(path)), Source(str(path), data=path.read_bytes())):
        with pytest.raises(InputError, match="a list of other files|not a video|no permission"):
            open_video(source)
    assert not web.requests and time.monotonic() - began < 5


# -- URLs --


def test_what_is_a_url():
    assert all(map(is_url, ["s3://b/a", "simplecache::https://h/a", "zip://*.mp4::s3://b/a.zip", "memory://a"]))
    assert not any(map(is_url, ["a/b", "/a/b", "a:b.mp4", "a::b.mp4", Path("s3://b"), "x/http://h", "1://"]))
    assert join("s3://b//k/", "a b/c.mp4") == "s3://b//k/a b/c.mp4"
    assert join("https://h/k", "a b#.mp4") == "https://h/k/a%20b%23.mp4"
    assert join("simplecache::http://h/k", "a%.mp4") == "simplecache::http://h/k/a%25.mp4"
    assert join("zip://in::s3://b/a.zip", "x.mp4") == "zip://in/x.mp4::s3://b/a.zip"
    assert join("s3://b", "/local.mp4") == "/local.mp4" and join("/root", "s3://b/x") == "s3://b/x"


@pytest.mark.parametrize("root", ["s3://bucket//k400", "simplecache::https://host/k400/"])
def test_a_url_root_is_kept_unchanged(plain, tmp_path, root):
    at(plain, root).write(tmp_path / "list.csv")
    assert f"# root: {root}\n" in (tmp_path / "list.csv").read_text()
    read = Manifest.read(tmp_path / "list.csv")
    assert read.root == root and read.file(0) == join(root, "bframes.mp4")
    read.write(tmp_path / "list.csv")
    assert Manifest.read(tmp_path / "list.csv").root == root


@pytest.mark.slow
@pytest.mark.parametrize("decode, workers", [("host", 0), ("dali", 2)])
def test_clips_over_http_equal_clips_from_files(plain, packed, web, tmp_path, decode, workers):
    settings = dict(mode="train", decode=decode, workers=workers)
    expected = epochs(loader(plain, **settings), 2)
    assert same(expected, epochs(loader(at(plain, web.url), **settings), 2))
    assert min(web.requests[name] for name in KINDS) >= 2
    web.requests.clear()
    made = loader(at(plain, web.url), **settings, cache=tmp_path / "cache")
    assert same(expected, epochs(made, 2)) and made.stats.fallbacks == {}
    if not workers:  # two may want a file at the same moment
        assert web.requests == dict.fromkeys(KINDS, 1)


@pytest.mark.slow
def test_only_the_bytes_of_a_video_are_read_from_a_shard(plain, packed, shard_web, tmp_path):
    expected = epochs(loader(plain), 2)
    made = loader(at(packed, shard_web.url), cache=tmp_path / "cache")
    assert same(expected, epochs(made, 2))
    assert shard_web.sent == sum(size_of(packed.source(row)) for row in range(len(packed)))
    shard_web.ranges = False
    reasons = faults(loader(at(packed, shard_web.url)))
    assert len(reasons) == len(KINDS) and all("HTTP Range" in reason for reason in reasons.values())


@pytest.mark.slow
def test_what_is_cached_needs_no_server(plain, web, tmp_path):
    settings = dict(cache=tmp_path / "cache")
    expected = epochs(loader(at(plain, web.url), **settings))
    made = loader(at(plain, web.url), **settings)
    web.stop()
    assert same(expected, epochs(made))
    assert same(expected, epochs(loader(at(plain, web.url), **settings)))  # one that starts without it
    shutil.rmtree(tmp_path / "cache")
    reasons = faults(made)
    assert len(reasons) == len(KINDS)
    assert all("cannot be read from its server, tried 3 times: Cannot connect" in reason for reason in reasons.values())


@pytest.mark.slow
def test_dropped_connections_are_retried_and_never_cached(plain, web, tmp_path):
    settings = dict(cache=tmp_path / "cache")
    web.cuts = 2
    assert same(epochs(loader(plain)), epochs(loader(at(plain, web.url), **settings)))
    assert sum(web.requests.values()) == len(KINDS) + 2
    shutil.rmtree(tmp_path / "cache")
    web.cuts = 3
    assert list(faults(loader(at(plain, web.url), **settings))) == [0]
    kept = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert len(kept) >= len(KINDS) - 1  # the next epoch has begun
    assert {path.read_bytes() for path in kept} <= {(plain.root / name).read_bytes() for name in KINDS}
    assert same(epochs(loader(plain)), epochs(loader(at(plain, web.url), **settings)))


def answer(body: bytes, status: int = 200, **headers: str):
    """The same, whatever is asked for; without a length, so its end is that of the connection."""

    def instead(handler) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body)

    return instead


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, body, reason",
    [
        ("bframes.mkv", lambda good, other: b"<html>log in</html>", "a web page or XML"),
        ("bframes.mkv", lambda good, other: good[: len(good) // 2], ""),
        ("mpeg4.avi", lambda good, other: good[: len(good) // 2], ""),
        ("bframes.mkv", lambda good, other: other, "codec is vp9, the manifest says h264"),
    ],
    ids=["login", "half an mkv", "half an avi", "another video"],
)
@pytest.mark.parametrize("decode", ["host", "dali"])
def test_a_file_that_differs_from_the_index_is_not_cached(plain, web, tmp_path, name, body, reason, decode):
    row = list(KINDS).index(name)
    manifest = Manifest([plain[row]], root=web.url)
    settings = dict(cache=tmp_path / "cache", batch_size=1, decode=decode)
    web.instead = answer(body((plain.root / name).read_bytes(), (plain.root / "vp9.webm").read_bytes()))
    made = loader(manifest, **settings)
    said = [*faults(made).values(), *made.stats.fallbacks]
    assert any(reason in each for each in said), said
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    web.instead = None
    expected = epochs(loader(Manifest([plain[row]], root=plain.root), batch_size=1, decode=decode))
    for requests in (1, 1):  # the second time from the cache
        assert same(expected, epochs(loader(manifest, **settings))) and web.requests[name] == requests


def test_a_file_that_was_never_indexed_is_not_cached(web, tmp_path):
    probe(fetch(f"{web.url}/vp9.webm", str(tmp_path)))
    assert not list(tmp_path.iterdir())


def test_an_endless_body_is_not_read_to_the_end(plain, packed, web, monkeypatch):
    sent = [0]

    def endless(handler) -> None:
        answer(b"")(handler)
        with contextlib.suppress(OSError):
            while True:
                handler.wfile.write(bytes(1 << 16))
                sent[0] += 1 << 16

    web.instead = endless
    monkeypatch.setattr(files, "_MOST_BYTES", 1 << 20)
    with pytest.raises(InputError, match="larger than 1 MiB, too large to be read from a URL; copy it to a disk"):
        fetch(f"{web.url}/a.mp4")
    with pytest.raises(
        InputError, match=r"sends only whole files; shards and packet indexes need parts of files \(HTTP Range\)"
    ):
        fetch(Source(f"{web.url}/a.tar", 512, 1000))
    with pytest.raises(InputError, match="larger than 1 MiB"):  # as a manifest may claim
        fetch(Source(f"{web.url}/a.tar", 512, 1 << 62))
    assert sent[0] < 1 << 26
    web.instead = answer(gzip.compress(bytes(1 << 26)), Content_Encoding="gzip")
    with pytest.raises(InputError, match="larger than 1 MiB"):
        fetch(f"{web.url}/a.mp4")
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/large/a.mp4", bytes((1 << 20) + 1))
    memory.pipe_file("/large/b.mp4", bytes(1 << 20))
    with pytest.raises(InputError, match="larger than 1 MiB"):
        fetch("memory://large/a.mp4")
    assert len(read_bytes("memory://large/b.mp4")) == 1 << 20
    memory.rm("/large", recursive=True)


@pytest.mark.parametrize(
    "status, headers, reason",
    [
        (206, {"Content_Range": "bytes 0-999/5000"}, "sends a part of the shard that was not requested"),
        (206, {}, "sends a part of the shard that was not requested"),
        (200, {}, "sends only whole files"),
        (302, {"Location": "/a.tar"}, "tried 3 times: .*a.tar"),
    ],
    ids=["another range", "no range", "full length, status 200", "redirects forever"],
)
def test_bytes_that_were_not_requested_are_rejected(web, no_pause, status, headers, reason):
    web.instead = answer(bytes(1000), status, **headers)
    with pytest.raises(InputError, match=reason):
        fetch(Source(f"{web.url}/a.tar", 512, 1000))


@pytest.mark.slow
def test_a_server_that_never_answers_is_reported_at_the_start(plain, web):
    over = threading.Event()
    web.instead = lambda handler: over.wait(30)
    began = time.monotonic()
    with pytest.raises(InputError, match="bframes.mp4: its server has not answered within 0.5 s; check the address"):
        loader(at(plain, web.url), timeout_s=0.5)
    assert time.monotonic() - began < 10
    over.set()


def test_parts_of_one_file_are_cached_separately(plain, web, tmp_path):
    data = (plain.root / "vp9.webm").read_bytes()
    for _ in range(2):
        for offset in (0, 100):
            part = fetch(Source(f"{web.url}/vp9.webm", offset, 1000), str(tmp_path), problem=lambda _: "")
            assert read_bytes(part) == data[offset : offset + 1000]
    assert web.requests == {"vp9.webm": 2}


def test_a_missing_file_is_only_a_fault(plain, web):
    rows = [plain[0], plain[1]._replace(path="gone.mp4"), plain[2]]
    for videos, row in ((rows, 1), (rows[1:], 0)):
        assert faults(loader(Manifest(videos, root=web.url), batch_size=3)) == {row: "no such file on its server"}


@pytest.mark.slow
def test_a_full_disk_or_bad_cache_folder_is_not_fatal(plain, web, tmp_path, monkeypatch):
    expected = epochs(loader(plain))
    (tmp_path / "file").touch()
    made = loader(at(plain, web.url), cache=tmp_path / "file")
    assert same(expected, epochs(made))
    assert made.stats.fallbacks == {"not kept in the cache (not a directory)": len(KINDS)}

    usage = namedtuple("usage", "total used free")(10, 10, files._RESERVE)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: usage)
    made = loader(at(plain, web.url), cache=tmp_path / "cache")
    assert same(expected, epochs(made))
    assert made.stats.fallbacks == {"not kept in the cache (its disk has less than 1024 mb left)": len(KINDS)}
    monkeypatch.undo()

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fdatasync", full)
    made = loader(at(plain, web.url), cache=tmp_path / "cache")
    assert same(expected, epochs(made))
    assert made.stats.fallbacks == {"not kept in the cache (no space left on device)": len(KINDS)}
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


@pytest.mark.slow
def test_two_processes_fill_one_cache_at_once(plain, tmp_path):
    context = multiprocessing.get_context("spawn")
    rounds, size = 30, os.path.getsize(plain.root / "vp9.webm")
    barrier = context.Barrier(2)
    with serve(plain.root) as server:
        arguments = (f"{server.url}/vp9.webm", size, str(tmp_path), rounds, barrier)
        processes = [context.Process(target=fill, args=arguments) for _ in range(2)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
            assert process.exitcode == 0
    data = (plain.root / "vp9.webm").read_bytes()
    kept = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert sorted(map(len, kept)) == [size - number for number in reversed(range(rounds))]
    assert all(data.endswith(each) for each in kept)


@pytest.mark.slow
def test_any_file_system_of_fsspec(plain, packed):
    memory = fsspec.filesystem("memory")
    for folder, names in ((plain.root, KINDS), (packed.root, packed.shards)):
        for name in names:
            memory.pipe_file(f"/some/{name}", (folder / name).read_bytes())
    expected = epochs(loader(plain, "test"))
    try:
        assert same(expected, epochs(loader(at(plain, "memory://some"), "test")))
        assert same(expected, epochs(loader(at(packed, "memory://some"), "test")))
        assert size_of("memory://some/bframes.mp4") == os.path.getsize(plain.root / "bframes.mp4")
    finally:
        memory.rm("/some", recursive=True)
    assert same(expected, epochs(loader(at(plain, f"file://{plain.root}"), "test")))


@pytest.mark.parametrize(
    "url, reason",
    [
        ("reference://a.mp4::{}/list.json", "reference is refused: it is a list of other files, made of templates"),
        ("zip://a.mp4::reference::file://{}/list.json", "reference is refused"),
        ("filecache::file://{}/a.mp4", "filecache is refused: set data.cache instead"),
        ("SimpleCache::file://{}/a.mp4", "SimpleCache is refused"),
    ],
)
def test_protocols_that_do_more_than_read_bytes_are_refused(tmp_path, monkeypatch, url, reason):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in ("list.json", "a.mp4"):
        (tmp_path / name).write_text('{"version": 1, "templates": {"u": "{{ 1 / 0 }}"}, "refs": {"a.mp4": ["{{u}}"]}}')
    for read in (fetch, size_of, lambda url: check_reachable(Source(url))):
        with pytest.raises(InputError, match=reason):
            read(url.format(tmp_path))
    assert len(list(tmp_path.iterdir())) == 2


def test_missing_packages_and_credentials_are_reported_at_the_start(plain, monkeypatch):
    with pytest.raises(InputError, match="nosuch://b/bframes.mp4: not a URL that fsspec can open.*nosuch"):
        loader(at(plain, "nosuch://b"))
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(InputError, match="s3://b/bframes.mp4: Install s3fs"):
        loader(at(plain, "s3://b"))
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        with pytest.raises(InputError, match="Cannot connect.*check the address, the network and credentials"):
            loader(at(plain, f"http://127.0.0.1:{nobody.getsockname()[1]}/k400"))

    class Denied(fsspec.filesystem("memory").__class__):
        protocol = "denied"
        cachable = False

        def info(self, path, **kwargs):
            raise PermissionError("Unable to locate credentials")

    fsspec.register_implementation("denied", Denied, clobber=True)
    with pytest.raises(InputError, match="denied://b/bframes.mp4: Unable to locate credentials; check"):
        loader(at(plain, "denied://b"))

    real = builtins.__import__

    def without(name, *arguments):
        if name == "fsspec":
            raise ImportError
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=r"needs fsspec: pip install fsspec aiohttp"):
        check_reachable(Source("s3://b/a.mp4"))


def test_a_box_larger_than_any_file(tmp_path):
    path = tmp_path / "a.mp4"
    path.write_bytes(b"\0\0\0\x10ftypisom\0\0\0\0" + b"\0\0\0\1free" + b"\xff" * 8)
    with pytest.raises(InputError, match="not a video that FFmpeg can read"):
        open_video(path)


@pytest.mark.slow
def test_fsspec_is_not_imported_for_files():
    code = (
        "import sys, dali_pipelines.clip_source, preparation.index, preparation.pack\n"
        "assert not {'fsspec', 'aiohttp', 'torch'} & set(sys.modules), sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


@pytest.mark.slow
def test_indexing_below_a_url(plain, web, tmp_path):
    from tests.commands import run

    (tmp_path / "list.txt").write_text("".join(f"{name} {n}\n" for n, name in enumerate(KINDS)) + "gone.mp4 0\n")
    done = run("prepare.py", "index", "--list", tmp_path / "list.txt", "--root", web.url, "--out", tmp_path / "v.csv")
    assert done.returncode == 0 and "gone.mp4: no such file on its server" in done.stdout, done.stderr
    read = Manifest.read(tmp_path / "v.csv")
    assert read.root == web.url and [read[row] for row in range(len(read))] == [plain[row] for row in range(len(plain))]
    assert web.requests == dict.fromkeys(KINDS, 1)
    done = run(
        "prepare.py", "index", "--list", tmp_path / "list.txt", "--root", "nosuch://b", "--out", tmp_path / "w.csv"
    )
    assert done.returncode == 2 and "not a URL that fsspec can open" in done.stderr
