"""Packs the videos of a manifest into tar shards in WebDataset's layout: few large files suit shared file systems.

Each video is three members of a shard: KEY.mp4 (or its own suffix), KEY.cls and KEY.json. Videos are spread over the
shards in a random order, which is always the same, so each shard holds a mixture of classes.
"""

import contextlib
import functools
import glob
import hashlib
import json
import os
import re
import shutil
import tarfile
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypedDict

import numpy as np

from common.worker_pool import Failed, WorkerPool, run
from dali_pipelines.errors import InputError
from dali_pipelines.files import check_reachable, read_bytes, size_of
from dali_pipelines.folders import VIDEO_SUFFIXES
from dali_pipelines.frame_names import CODECS as FRAME_CODECS
from dali_pipelines.manifest import Manifest, Video, key_of
from dali_pipelines.packet_index import StaleIndexError, open_index
from preparation.index import Rejected

_OVERHEAD = 4096  # bytes per video besides its own: three headers, padding, label and JSON
_ROWS = 1000  # rows per task that reads sizes
_THREADS = 16  # threads that read sizes at once: shared file systems have a high latency


class Shard(NamedTuple):
    """A shard to write: the arguments of `write`."""

    manifest: str
    digest: str
    """SHA-256 of the manifest."""
    file: str
    rows: list[int]
    sizes: list[int]
    """Size of each row's video in bytes."""


Member = list[int] | str
"""[offset, size] of a video in its shard, or the reason that it could not be packed."""


class Written(TypedDict):
    """The result of `write`, as stored in the journal."""

    file: str
    bytes: int
    members: list[Member]


def pack(
    path: str | os.PathLike, out: str | os.PathLike, *, shard_bytes: float, pool: WorkerPool
) -> tuple[Manifest | None, list[Rejected]]:
    """Packs the videos of the manifest NAME.csv at `path` into `out`/NAME-000000.tar and so on.

    Returns the manifest of the shards, with `out` as its root, and the videos that could not be packed; (None, []) if
    `pool` does only a part of the work. `out`/NAME.journal records progress, so later runs write only missing shards.
    Raises `InputError`.
    """
    path, out = Path(path).resolve(), Path(out).resolve()
    manifest = Manifest.read(path)
    if path.parent == out or any(os.path.dirname(manifest.place(shard)) == str(out) for shard in manifest.shards):
        raise InputError(f"{out}: holds the videos to pack, which would be overwritten; name another folder with --out")
    if not len(manifest):
        raise InputError(f"{path}: no videos in it")
    if FRAME_CODECS.intersection(manifest.codecs):
        raise InputError(
            f"{path}: has videos that are folders of frames, which are not packed; make them files first: "
            f"prepare.py transcode -m {path} --out DIR"
        )
    check_reachable(manifest.source(0), timeout_s=pool.timeout_s)
    journal = out / f"{path.stem}.journal"
    shard_name = re.compile(re.escape(path.stem) + r"-\d{6}\.tar(\.\w+\.part)?")
    existing = os.listdir(out) if out.exists() else []
    if not any(name == f"{path.stem}.csv" or name.startswith(journal.name) for name in existing):
        for other in filter(shard_name.fullmatch, existing):
            if (out / other).is_file():
                raise InputError(f"{out / other}: exists, and was not packed from {path}; name another --out")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    sizes = _all_sizes(path, digest, len(manifest), journal, pool)
    tasks = [
        Shard(str(path), digest, f"{out / path.stem}-{number:06}.tar", list(rows), list(rows.values()))
        for number, rows in enumerate(_plan(sizes, shard_bytes))
    ]
    part, parts = pool.shard
    _check_disk(out, tasks[part::parts])
    results = run(
        write,
        tasks,
        journal=journal,
        pool=pool,
        timeout_s=pool.timeout_s * max((len(task.rows) for task in tasks), default=1),
        is_good=lambda result: not isinstance(result, Failed) and _file_size(result["file"]) == result["bytes"],
    )
    for task, result in list(zip(tasks, results, strict=True))[part::parts]:
        if isinstance(result, Failed):
            raise InputError(f"{task.file}: {result}; run the same command again to resume")
    if not pool.is_whole:
        return None, []
    members: dict[int, tuple[str, Member]] = {
        row: ("", reason) for row, reason in enumerate(sizes) if isinstance(reason, str)
    }
    for task, result in zip(tasks, results, strict=True):
        members |= {row: (task.file, member) for row, member in zip(task.rows, result["members"], strict=True)}
    files = {task.file for task in tasks}
    for existing_file in out.iterdir():
        if shard_name.fullmatch(existing_file.name) and str(existing_file) not in files:
            existing_file.unlink()  # from a run with another --shard-size
    videos: list[Video] = []
    entries: dict[int, bytes] = {}
    rejected: list[Rejected] = []
    for row, video in enumerate(manifest):
        file, member = members[row]
        if isinstance(member, str):
            rejected.append(Rejected(video.path, video.label, member))
        else:
            videos.append(video._replace(shard=os.path.basename(file), offset=member[0], size=member[1]))
            with contextlib.suppress(StaleIndexError):  # its offsets are relative to the video
                if manifest.index is not None:
                    entries[key_of(videos[-1])] = open_index(str(manifest.index)).entry(key_of(video))
    packed = Manifest(videos, root=out, classes=manifest.classes, rejected=manifest.rejected + len(rejected))
    packed.entries = entries
    return packed, rejected


# -- in a child process --


def sizes(path: str, digest: str, first: int, last: int) -> list[int | str]:
    """Size in bytes of the video of each row in range(first, last) of a manifest, or the reason it cannot be read."""
    manifest = _read(path, digest)

    def size(row: int) -> int | str:
        try:
            return size_of(manifest.source(row))
        except InputError as error:
            return str(error)

    with ThreadPoolExecutor(_THREADS) as threads:
        return list(threads.map(size, range(first, last)))


def write(path: str, digest: str, file: str, rows: Sequence[int], sizes: Sequence[int]) -> Written:
    """Writes the videos of these rows of a manifest, of `sizes` bytes, to the shard `file`, atomically. An existing
    complete shard is kept. Raises `InputError`."""
    manifest = _read(path, digest)
    members = _read_members(file, manifest, rows, sizes)
    if members is None:
        name, _, _ = os.path.basename(file).rpartition("-")
        Path(file).with_name(f"{name}.csv").unlink(missing_ok=True)  # it describes another shard
        for other in _unfinished(file):  # of a killed run, whose process may still be writing
            os.remove(other)
        unfinished = f"{file}.{uuid.uuid4().hex}.part"
        try:
            with open(unfinished, "w+b") as shard:
                members = _fill(shard, manifest, rows, sizes)
            os.replace(unfinished, file)
        finally:
            Path(unfinished).unlink(missing_ok=True)
    return {"file": file, "bytes": os.stat(file).st_size, "members": members}


def _fill(shard: BinaryIO, manifest: Manifest, rows: Sequence[int], sizes: Sequence[int]) -> list[Member]:
    """Writes a shard, then reads it back to check it."""
    members: list[Member] = []
    written: list[tuple[int, int, str]] = []
    for row, size in zip(rows, sizes, strict=True):
        try:
            data = _read_video(manifest, row, size)
        except InputError as error:
            members.append(str(error))
            continue
        key, suffix, facts = _names_and_facts(manifest, row)
        facts["sha256"] = hashlib.sha256(data).hexdigest()
        offset = _add(shard, key + suffix, data)
        members.append([offset, size])
        written.append((offset, size, facts["sha256"]))
        _add(shard, f"{key}.cls", str(manifest[row].label).encode())
        _add(shard, f"{key}.json", json.dumps(facts).encode())
    shard.write(bytes(2 * tarfile.BLOCKSIZE))
    shard.write(bytes(-shard.tell() % tarfile.RECORDSIZE))
    shard.flush()
    os.fsync(shard.fileno())
    for offset, size, checksum in written:
        shard.seek(offset)
        if hashlib.sha256(shard.read(size)).hexdigest() != checksum:
            raise InputError(f"the data written at byte {offset} differs when read back; check the disk")
    return members


def _read_members(file: str, manifest: Manifest, rows: Sequence[int], sizes: Sequence[int]) -> list[Member] | None:
    """Reads the members of a shard that a killed run wrote but did not record; None if the shard is not what `write`
    would make."""
    if not os.path.isfile(file):  # a pipe would block for ever
        return None
    members: list[Member] = []
    try:
        with tarfile.open(file, "r:") as tar:  # uncompressed, so that offsets are file offsets
            infos = list(tar)
            found = {info.name: info for info in infos}
            if len(found) < len(infos) or any(not info.isreg() or info.issparse() for info in infos):
                return None
            for row, size in zip(rows, sizes, strict=True):
                key, suffix, facts = _names_and_facts(manifest, row)
                info = found.get(key + suffix)
                if info is None:
                    try:
                        _read_video(manifest, row, size)
                        return None
                    except InputError as error:
                        members.append(str(error))
                        continue
                facts["sha256"] = hashlib.sha256(_content(tar, info)).hexdigest()
                if info.size != size or json.loads(_content(tar, found[f"{key}.json"])) != facts:
                    return None
                members.append([info.offset_data, size])
    except (OSError, tarfile.TarError, KeyError, ValueError):
        return None
    return members if len(found) == 3 * sum(isinstance(member, list) for member in members) else None


def _content(tar: tarfile.TarFile, info: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(info)
    assert file is not None  # never None for regular files
    return file.read()


def _names_and_facts(manifest: Manifest, row: int) -> tuple[str, str, dict[str, Any]]:
    """Returns (key, suffix, content of the JSON file without the checksum) of a video."""
    video = manifest[row]
    stem, suffix = os.path.splitext(os.path.basename(video.path))
    # WebDataset ends a key at the first dot; names that are too long for a tar header would need another format.
    key = f"{row:08}_{re.sub('[^A-Za-z0-9_-]+', '_', stem)[:64]}"
    suffix = suffix.lower() if suffix.lower() in VIDEO_SUFFIXES else ".mp4"
    facts = video._asdict()
    for name in ("shard", "offset", "size"):
        del facts[name]
    facts["class"] = manifest.classes[video.label] if video.label < len(manifest.classes) else None
    return key, suffix, facts


def _read_video(manifest: Manifest, row: int, size: int) -> bytes:
    data = read_bytes(manifest.source(row))
    if len(data) != size:
        raise InputError(f"changed while it was packed: {size} bytes before, {len(data)} now")
    return data


def _add(shard: BinaryIO, name: str, data: bytes) -> int:
    """Appends a member and returns the offset of its data. Without time and owner, equal videos give equal shards."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    shard.write(info.tobuf(tarfile.GNU_FORMAT))
    offset = shard.tell()
    shard.write(data)
    shard.write(bytes(-len(data) % tarfile.BLOCKSIZE))
    return offset


def _all_sizes(path: Path, digest: str, count: int, journal: Path, pool: WorkerPool) -> list[int | str]:
    """Sizes of all rows, even if `pool` does only a part. Each part has its own journal, as parts may run in
    parallel."""
    results = run(
        sizes,
        [(str(path), digest, first, min(first + _ROWS, count)) for first in range(0, count, _ROWS)],
        journal=pool.journal(journal, "sizes-"),
        pool=replace(pool, shard=(0, 1), progress=None),
        timeout_s=pool.timeout_s * _ROWS,
        is_good=lambda result: not isinstance(result, Failed),
    )
    for result in results:
        if isinstance(result, Failed):
            raise InputError(f"{path}: {result}")
    return [size for result in results for size in result]


def _plan(sizes: Sequence[int | str], shard_bytes: float) -> list[dict[int, int]]:
    """Plans the shards: row -> size of the videos in each, in order. A shard holds at least one video, however
    large."""
    shards: list[dict[int, int]] = []
    room = 0.0
    for row in np.random.default_rng(0).permutation(len(sizes)).tolist():
        size = sizes[row]
        if isinstance(size, str):
            continue
        needed = size + _OVERHEAD
        if not shards or needed > room:
            shards.append({})
            room = shard_bytes
        shards[-1][row] = size
        room -= needed
    return shards


def _check_disk(out: Path, shards: Sequence[Shard]) -> None:
    missing = [shard for shard in shards if _file_size(shard.file) is None]
    needed = sum(sum(shard.sizes) + _OVERHEAD * len(shard.sizes) for shard in missing)
    parts = [part for shard in missing for part in _unfinished(shard.file)]
    free = shutil.disk_usage(out).free + sum(map(os.path.getsize, parts))
    if needed > free:
        raise InputError(
            f"{out}: the shards need {needed / 1e9:.1f} GB, its disk has {free / 1e9:.1f} GB free; name a folder on "
            "another disk with --out"
        )


def _unfinished(file: str) -> list[str]:
    return glob.glob(f"{glob.escape(file)}.*.part")


def _file_size(file: str) -> int | None:
    """Size in bytes; None if there is no such file."""
    try:
        return os.stat(file).st_size
    except FileNotFoundError:
        return None


@functools.lru_cache(maxsize=1)
def _read(path: str, digest: str) -> Manifest:
    if hashlib.sha256(Path(path).read_bytes()).hexdigest() != digest:
        raise InputError(f"{path}: changed while it was packed; run the same command again")
    return Manifest.read(path)
