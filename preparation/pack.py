"""Packs the videos of a manifest into tar shards as WebDataset reads them: few large files for shared file systems.

A video is three members of a shard: KEY.mp4 (or whatever its suffix is), KEY.cls and KEY.json. Which videos lie in
which shard, and in which order, is random, and the same every time: who reads shard by shard meets all classes.
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
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from common.worker_pool import Failed, WorkerPool, run
from dali_pipelines.errors import InputError
from dali_pipelines.files import check_reachable, read_bytes, size_of
from dali_pipelines.folders import VIDEO_SUFFIXES
from dali_pipelines.manifest import Manifest, key_of
from dali_pipelines.packet_index import StaleIndexError, open_index
from preparation.index import Rejected

_OVERHEAD = 4096  # bytes of a shard for each video, beside its own: three headers, padding, label and facts
_ROWS = 1000  # whose sizes are one task
_THREADS = 16  # that ask for sizes at once: shared file systems answer late


class Shard(NamedTuple):
    """A shard to write: the arguments of `write`."""

    manifest: str
    digest: str
    """SHA-256 of the manifest."""
    file: str
    rows: list[int]
    sizes: list[int]
    """Bytes of each row's video."""


Member = list[int] | str
"""[offset, size] of a video in its shard; or why it is in none."""


def pack(
    path: str | os.PathLike, out: str | os.PathLike, *, shard_bytes: float, crew: WorkerPool
) -> tuple[Manifest | None, list[Rejected]]:
    """Packs the videos of the manifest at `path` into `out`/NAME-000000.tar and so on, NAME being the manifest's.

    The manifest of the shards, its root `out`, and the videos that are not in them; None where `crew` does a part only.
    `out`/NAME.journal remembers what is done: later runs write only what is missing. Raises `InputError`.
    """
    path, out = Path(path).resolve(), Path(out).resolve()
    manifest = Manifest.read(path)
    if path.parent == out or any(os.path.dirname(manifest.place(shard)) == str(out) for shard in manifest.shards):
        raise InputError(f"{out}: holds what is to be packed, and would be overwritten: name another folder with --out")
    if not len(manifest):
        raise InputError(f"{path}: no videos in it")
    check_reachable(manifest.source(0), timeout_s=crew.timeout_s)
    journal = out / f"{path.stem}.journal"
    ours = re.compile(re.escape(path.stem) + r"-\d{6}\.tar(\.\w+\.part)?")
    there = os.listdir(out) if out.exists() else []
    if not any(name == f"{path.stem}.csv" or name.startswith(journal.name) for name in there):
        for other in filter(ours.fullmatch, there):
            if (out / other).is_file():
                raise InputError(f"{out / other}: exists, and was not packed from {path}; name another --out")
    source = [str(path), hashlib.sha256(path.read_bytes()).hexdigest()]
    lengths = _all_sizes(source, len(manifest), journal, crew)
    shards = _plan(lengths, shard_bytes)
    files = [f"{out / path.stem}-{number:06}.tar" for number in range(len(shards))]
    tasks = [
        Shard(*source, file, rows, [lengths[row] for row in rows]) for file, rows in zip(files, shards, strict=True)
    ]
    _check_disk(out, tasks[crew.shard[0] :: crew.shard[1]])
    done = run(
        write,
        tasks,
        journal=journal,
        pool=crew,
        timeout_s=crew.timeout_s * max(map(len, shards), default=1),
        is_good=lambda result: not isinstance(result, Failed) and _length(result["file"]) == result["bytes"],
    )
    for file, result in list(zip(files, done, strict=True))[crew.shard[0] :: crew.shard[1]]:
        if isinstance(result, Failed):
            raise InputError(f"{file}: {result}; the same command goes on from here")
    if not crew.is_whole:
        return None, []
    members: dict[int, tuple[str, Member]] = {
        row: ("", size) for row, size in enumerate(lengths) if isinstance(size, str)
    }
    for file, rows, result in zip(files, shards, done, strict=True):
        members |= {row: (file, member) for row, member in zip(rows, result["members"], strict=True)}
    for other in out.iterdir():  # of another --shard-size
        if ours.fullmatch(other.name) and str(other) not in files:
            other.unlink()
    packed, entries, rejected = [], {}, []
    for row in range(len(manifest)):
        video, (file, member) = manifest[row], members[row]
        if isinstance(member, str):
            rejected.append(Rejected(video.path, video.label, member))
        else:
            packed.append(video._replace(shard=os.path.basename(file), offset=member[0], size=member[1]))
            with contextlib.suppress(StaleIndexError):  # its places count from the start of the video
                if manifest.index is not None:
                    entries[key_of(packed[-1])] = open_index(str(manifest.index)).entry(key_of(video))
    left_out = manifest.rejected + len(rejected)
    packed = Manifest(packed, root=out, classes=manifest.classes, rejected=left_out)
    packed.entries = entries
    return packed, rejected


def sizes(path: str, digest: str, first: int, last: int) -> list[int | str]:
    """Bytes of the videos in these rows of a manifest, or why there are none."""
    manifest = _read(path, digest)

    def size(row: int) -> int | str:
        try:
            return size_of(manifest.source(row))
        except InputError as error:
            return str(error)

    with ThreadPoolExecutor(_THREADS) as threads:
        return list(threads.map(size, range(first, last)))


def write(path: str, digest: str, file: str, rows: Sequence[int], sizes: Sequence[int]) -> dict[str, Any]:
    """Writes the videos in these rows of a manifest, which are of these sizes, to the shard `file`, all of it or
    nothing; one that is there already is looked at instead. What `Member` each became."""
    manifest = _read(path, digest)
    members = _look(file, manifest, rows, sizes)
    if members is None:
        name, _, _ = os.path.basename(file).rpartition("-")
        Path(file).with_name(f"{name}.csv").unlink(missing_ok=True)  # it would speak of another shard
        for other in _unfinished(file):  # of a run that was killed; its process may be at it still
            os.remove(other)
        unfinished = f"{file}.{uuid.uuid4().hex}.part"
        try:
            with open(unfinished, "w+b") as shard:
                members = _fill(shard, manifest, rows, sizes)
            os.replace(unfinished, file)
        finally:
            Path(unfinished).unlink(missing_ok=True)
    return {"file": file, "bytes": _length(file), "members": members}


def _fill(shard: BinaryIO, manifest: Manifest, rows: Sequence[int], sizes: Sequence[int]) -> list[Member]:
    """Writes a shard, and reads it back."""
    members: list[Member] = []
    written = []
    for row, size in zip(rows, sizes, strict=True):
        try:
            data = _video(manifest, row, size)
        except InputError as error:
            members.append(str(error))
            continue
        key, suffix, facts = _describe(manifest, row)
        facts["sha256"] = hashlib.sha256(data).hexdigest()
        members.append([_add(shard, key + suffix, data), size])
        written.append((*members[-1], facts["sha256"]))
        _add(shard, f"{key}.cls", str(manifest[row].label).encode())
        _add(shard, f"{key}.json", json.dumps(facts).encode())
    shard.write(bytes(2 * tarfile.BLOCKSIZE))
    shard.write(bytes(-shard.tell() % tarfile.RECORDSIZE))
    shard.flush()
    os.fsync(shard.fileno())
    for offset, size, checksum in written:
        shard.seek(offset)
        if hashlib.sha256(shard.read(size)).hexdigest() != checksum:
            raise InputError(f"what was written at byte {offset} reads back otherwise: is the disk in order?")
    return members


def _look(file: str, manifest: Manifest, rows: Sequence[int], sizes: Sequence[int]) -> list[Member] | None:
    """The members of a shard, as after a kill that came before they were noted; None where it is not what `write`
    would make."""
    if not os.path.isfile(file):  # a pipe would block for ever
        return None
    try:
        with tarfile.open(file, "r:") as tar:  # places in a compressed one are not those of its bytes
            infos = list(tar)
            found = {info.name: info for info in infos}
            if len(found) < len(infos) or any(not info.isreg() or info.issparse() for info in infos):
                return None
            members = []
            for row, size in zip(rows, sizes, strict=True):
                key, suffix, facts = _describe(manifest, row)
                info = found.get(key + suffix)
                if info is None:
                    try:
                        _video(manifest, row, size)
                        return None
                    except InputError as error:
                        members.append(str(error))
                        continue
                facts["sha256"] = hashlib.sha256(tar.extractfile(info).read()).hexdigest()
                if info.size != size or json.load(tar.extractfile(found[f"{key}.json"])) != facts:
                    return None
                members.append([info.offset_data, size])
    except (OSError, tarfile.TarError, KeyError, ValueError):
        return None
    return members if len(found) == 3 * sum(isinstance(member, list) for member in members) else None


def _describe(manifest: Manifest, row: int) -> tuple[str, str, dict[str, Any]]:
    """(key, suffix, what the JSON says but for the checksum) of a video."""
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


def _video(manifest: Manifest, row: int, size: int) -> bytes:
    data = read_bytes(manifest.source(row))
    if len(data) != size:
        raise InputError(f"changed while it was packed: {size} bytes before, {len(data)} now")
    return data


def _add(shard: BinaryIO, name: str, data: bytes) -> int:
    """Where the member's bytes begin. No time and no owner: equal videos make equal shards."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    shard.write(info.tobuf(tarfile.GNU_FORMAT))
    offset = shard.tell()
    shard.write(data)
    shard.write(bytes(-len(data) % tarfile.BLOCKSIZE))
    return offset


def _all_sizes(source: list[str], count: int, journal: Path, crew: WorkerPool) -> list[int | str]:
    """Of all rows, whichever part of the shards is to be written; one journal a part, as two may be at it at once."""
    found = run(
        sizes,
        [[*source, first, min(first + _ROWS, count)] for first in range(0, count, _ROWS)],
        journal=crew.journal(journal, "sizes-"),
        pool=replace(crew, shard=(0, 1), progress=None),
        timeout_s=crew.timeout_s * _ROWS,
        is_good=lambda result: not isinstance(result, Failed),
    )
    for some in found:
        if isinstance(some, Failed):
            raise InputError(f"{source[0]}: {some}")
    return [size for some in found for size in some]


def _plan(sizes: Sequence[int | str], shard_bytes: float) -> list[list[int]]:
    """The rows of each shard, in their order there; at least one, however large."""
    shards: list[list[int]] = []
    room = 0.0
    for row in np.random.default_rng(0).permutation(len(sizes)).tolist():
        if isinstance(sizes[row], str):
            continue
        needed = sizes[row] + _OVERHEAD
        if not shards or needed > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(row)
        room -= needed
    return shards


def _check_disk(out: Path, shards: Sequence[Shard]) -> None:
    missing = [shard for shard in shards if _length(shard.file) is None]
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


def _length(file: str) -> int | None:
    """Bytes; None where there is no such file."""
    try:
        return os.stat(file).st_size
    except FileNotFoundError:
        return None


@functools.lru_cache(maxsize=1)
def _read(path: str, digest: str) -> Manifest:
    if hashlib.sha256(Path(path).read_bytes()).hexdigest() != digest:
        raise InputError(f"{path}: changed while it was packed; run the same command again")
    return Manifest.read(path)
