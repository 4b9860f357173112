"""Where the bytes of a video are, and how to open them: a file, a part of a file (a member of a tar shard), or either
of these below an fsspec URL (s3://, gs://, https://, ...), with a cache on the local disk.

fsspec is an extra, imported on the first URL. Its file systems have threads, so each process creates its own.
"""

import asyncio
import contextlib
import glob
import hashlib
import io
import os
import re
import shutil
import stat
import threading
import time
import urllib.parse
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, TypeGuard

import av

from dali_pipelines.errors import InputError, check, reason
from dali_pipelines.frame_names import frame_files, is_frames
from dali_pipelines.packets import video_stream

_REFUSED = {
    "reference": "it is a list of other files, made of templates",
    **dict.fromkeys(("blockcache", "cached", "filecache", "simplecache"), "set data.cache instead"),
}
"""fsspec protocols that do more than read bytes, and why they are refused: manifests are not trusted. Caches write
whatever a server sends to the disk, however much it is."""
_URL = re.compile(r"([A-Za-z][\w+.-]*::)*[A-Za-z][\w+.-]*://")
_LISTS = ("concat", "dash", "hls", "imf", "sdp")
"""FFmpeg formats that refer to other files."""
_ATTEMPTS = 3  # at reading from a URL
_REQUESTS = 8  # in flight at a time for one video
_PAUSE_S = 0.5  # before the second attempt; four times as long before the third
_RESERVE = 1 << 30  # bytes that the cache leaves free on the disk
_MOST_BYTES = 1 << 30  # of a video below a URL, which is read into memory as a whole
_LOCAL_GAP, _REMOTE_GAP = 1 << 12, 1 << 14
"""Gaps of up to this many bytes between two ranges are read along with them, which costs less than a second read: a
page of a disk; what a server sends in the time of a request, with several in flight."""


class Source(NamedTuple):
    """The bytes of a video."""

    path: str
    """A local file, or a URL; or either of these for the frames of a video (`frame_names`)."""
    offset: int = 0
    """Start of the video in the file, in bytes."""
    size: int | None = None
    """Size of the video in bytes; None: the whole file."""
    data: bytes | None = None
    """The bytes themselves, once they have been fetched from a URL."""
    note: str = ""
    """Why the fetched file is not kept in the cache; "" if it is, or need not be."""


VideoLike: TypeAlias = str | os.PathLike[str] | Source
"""A path, a URL, or a `Source`."""


def is_url(path: str | os.PathLike[str]) -> TypeGuard[str]:
    """Whether fsspec opens it; includes chained URLs such as zip://a.mp4::s3://bucket/file.zip."""
    return isinstance(path, str) and _URL.match(path) is not None


def join(root: str | os.PathLike[str], path: str) -> str:
    """`path` below `root`, each a local path or a URL; `path` itself if it is absolute or a URL."""
    if is_url(path) or os.path.isabs(path):
        return path
    if not is_url(root):
        return os.path.join(root, path)
    links = root.split("::")
    place = next(number for number, link in enumerate(links) if "://" in link)  # zip://folder::s3://bucket/file.zip
    if links[place].startswith(("http://", "https://")):
        path = urllib.parse.quote(os.fsencode(path), safe="/{}," if is_frames(path) else "/")
    links[place] = f"{links[place].removesuffix('/')}/{path}"
    return "::".join(links)


def absolute(root: str | os.PathLike[str]) -> str:
    """The same root as an absolute path, for processes that run in another folder."""
    return root if is_url(root) else os.path.abspath(root)


def as_source(video: VideoLike) -> Source:
    """The source of a path; a `Source` is returned unchanged."""
    return video if isinstance(video, Source) else Source(os.fspath(video))


def open_video(video: VideoLike) -> av.container.InputContainer:
    """Opens a file that has a video stream of a known codec. Raises `InputError` with the reason if it cannot."""
    source = fetch(video)
    check(not is_frames(source.path), "its frames are images in files of their own, not a video file")
    try:
        if source.data is None:
            _check_file(source)
        file = ffmpeg_url(source) if source.data is None else io.BytesIO(source.data)
        # Titles need not be UTF-8. Playlists and session descriptions would open other files, and connections.
        options = {"protocol_whitelist": "file,subfile" if source.data is None else "data"}
        container = av.open(file, "r", metadata_errors="replace", options=options)
    except PermissionError:
        raise InputError("no permission to read it") from None
    except av.error.FFmpegError as error:
        what = ""
        with contextlib.suppress(OSError):  # the disk is bad, not the file
            what = _what_it_is(source)
        raise InputError(f"not a video that FFmpeg can read ({what or reason(error)})") from None
    except OSError as error:
        raise InputError(reason(error)) from None
    try:
        check(container.format.name not in _LISTS, "a list of other files")
        # PyAV's stubs are wrong: there is none for a codec that FFmpeg does not know.
        is_known = getattr(video_stream(container), "codec_context", None) is not None
        check(is_known, "FFmpeg does not know the codec of its video stream")
    except InputError:
        container.close()
        raise
    return container


def _what_it_is(source: Source) -> str:
    """Describes a file that is not a video in everyday words; "" if unknown."""
    with io.BytesIO(source.data) if source.data is not None else open(source.path, "rb") as file:
        file.seek(0 if source.data is not None else source.offset)
        start = file.read(512)
        if not start:
            return "an empty file"
        if start.lstrip()[:1] == b"<":
            return "a web page or XML: a download that failed"
        if start.startswith(b"version https://git-lfs"):
            return "a pointer of Git LFS: git lfs pull fetches the file"
        if start.isascii() and b"\0" not in start:
            return "a text file"
        if start[4:8] != b"ftyp":
            return ""
        file.seek(-len(start), io.SEEK_CUR)
        while len(header := file.read(16)) >= 8:  # the boxes of an MP4 file
            if header[4:8] == b"moov":
                return ""
            size = int.from_bytes(header[:4])
            if size == 1:
                size = int.from_bytes(header[8:])
            if not 8 <= size < 1 << 62:  # the limit of `seek`
                break
            file.seek(size - len(header), io.SEEK_CUR)
        return "cut off: it has no index (moov box)"


def unfinished(path: str | os.PathLike[str]) -> Path:
    """A name beside `path`, unique to this call, for a file that replaces it once complete. Removes files that killed
    calls left behind more than an hour ago."""
    path = Path(path)
    for left in path.parent.glob(f"{glob.escape(path.name)}.*.part"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > 3600:
                left.unlink()
    return path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}.part")


def find_below_url(root: str) -> Iterator[str]:
    """Paths, relative to the URL `root`, of all files below it. Raises `InputError`."""
    system, place = _file_system(root)
    try:
        for path in system.find(place):
            yield os.path.relpath(path, place)
    except Exception as error:  # every file system has its own errors
        raise InputError(f"{root}: {_text(error)}; check the address, the network and credentials") from None


def ffmpeg_url(video: VideoLike) -> str:
    """The URL with which FFmpeg opens exactly this local file, or this part of it: it would take a plain "a:b.mp4" for
    a protocol."""
    source = as_source(video)
    if source.size is None:
        return f"file:{source.path}"
    return f"subfile,,start,{source.offset},end,{source.offset + source.size},,:file:{source.path}"


def size_of(video: VideoLike) -> int:
    """Size of the video in bytes, without reading it. Raises `InputError`."""
    source = as_source(video)
    if is_frames(source.path):
        files = frame_files(source.path)
        return sum(size_of(files.path(position)) for position in range(len(files)))
    if source.data is not None:
        return len(source.data)
    try:
        if source.size is not None:
            return source.size
        if not is_url(source.path):
            return _check_file(source)
        system, path = _file_system(source.path)
        size: int | None = system.size(path)
    except FileNotFoundError:
        raise InputError("no such file or directory") from None
    except OSError as error:
        raise InputError(reason(error)) from None
    if size is None:
        raise InputError("its server does not report its size")
    return size


def read_bytes(video: VideoLike) -> bytes:
    """All bytes of the video. Raises `InputError`."""
    source = fetch(video)
    if source.data is not None:
        return source.data
    try:
        _check_file(source)
        with open(source.path, "rb") as file:
            file.seek(source.offset)
            return file.read(-1 if source.size is None else source.size)
    except OSError as error:
        raise InputError(reason(error)) from None


def read_ranges(
    video: VideoLike, ranges: Sequence[tuple[int, int]], *, size: int | None = None
) -> tuple[list[bytes], int]:
    """The bytes of the video in each of `ranges`, (first, end) ascending, and the number of bytes read for them.

    Below a URL, only these are transferred, in parallel requests. Raises `InputError`, also if the video ends before a
    range does, or if a web server reports a size other than `size` bytes.
    """
    source = as_source(video)
    is_remote = source.data is None and is_url(source.path)
    gap = _REMOTE_GAP if is_remote else _LOCAL_GAP
    spans: list[list[int]] = []
    for first, end in ranges:
        if spans and first - spans[-1][1] <= gap:
            spans[-1][1] = max(end, spans[-1][1])
        else:
            spans.append([first, end])
    if source.size is not None and spans[-1][1] > source.size:
        raise InputError("it ends before its packets do")
    if source.data is not None:
        data = [source.data[first:end] for first, end in spans]
    elif is_remote:
        size = size if source.size is None else None  # unknown for a shard
        data = _download(source.path, [_Span(source.offset + first, source.offset + end) for first, end in spans], size)
    else:
        data = _read_local(source, spans)
    if any(len(some) != end - first for some, (first, end) in zip(data, spans, strict=True)):
        raise InputError("it ends before its packets do")
    found, place = [], 0
    for first, end in ranges:
        while end > spans[place][1]:
            place += 1
        start = spans[place][0]
        found.append(data[place][first - start : end - start])
    return found, sum(map(len, data))


def _read_local(source: Source, spans: Sequence[Sequence[int]]) -> list[bytes]:
    try:
        _check_file(source)
        file = os.open(source.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return [os.pread(file, end - first, source.offset + first) for first, end in spans]
        finally:
            os.close(file)
    except OSError as error:
        raise InputError(reason(error)) from None


def fetch(
    video: VideoLike,
    cache: str | None = None,
    *,
    problem: Callable[[Source], str] | None = None,
) -> Source:
    """A source that opens without the network: local files unchanged; files below a URL from the folder `cache`, or
    read into memory. Raises `InputError`.

    `problem` returns why the file is not the one that was indexed, or "" if it is. Only an indexed file is kept in
    `cache`: a server may answer with a login page, or with half of the file. Any number of processes may share a cache.
    `Source.note` says why a file is not kept.
    """
    source = as_source(video)
    if source.data is not None or not is_url(source.path) or is_frames(source.path):
        return source  # of frames, only the files of a clip are fetched
    kept = cache and _place(cache, source)
    if kept and os.path.isfile(kept):
        return Source(kept)
    span = _Span(source.offset, source.offset + source.size) if source.size is not None else _ALL
    (data,) = _download(source.path, [span])
    source = source._replace(data=data)
    if kept and problem:
        if difference := problem(source):
            return source._replace(note=f"not kept in the cache ({difference})")
        try:
            _keep(kept, data)
        except OSError as error:
            return source._replace(note=f"not kept in the cache ({reason(error)})")
    return source


def check_reachable(source: Source, cache: str | None = None, *, timeout_s: float = 60) -> None:
    """Raises `InputError` if nothing below the URL of `source` can be read (a package or credentials are missing), or
    if its server does not answer within `timeout_s`. A missing file is not an error."""
    if not is_url(source.path) or (cache and os.path.isfile(_place(cache, source))):
        return
    system, path = _file_system(source.path)
    try:
        _within(timeout_s, lambda: system.info(path))
    except Exception as error:
        cause = error.__cause__ if isinstance(error, FileNotFoundError) else error  # HTTP raises it for any failure
        is_missing = isinstance(cause, FileNotFoundError) or getattr(cause, "status", 0) == 404
        if cause is not None and not is_missing:
            raise InputError(f"{source.path}: {_text(cause)}; check the address, the network and credentials") from None


def _within(timeout_s: float, call: Callable[[], Any]) -> Any:
    """The result of `call`. Raises TimeoutError if it takes longer; it then continues in a daemon thread."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        return future.result(timeout_s)
    except TimeoutError:
        if future.done():
            raise
        raise TimeoutError(f"its server has not answered within {timeout_s:g} s") from None


def _check_file(source: Source) -> int:
    """Size of the file in bytes. Raises `InputError` if it is not a file, or too short, and OSError."""
    if "\0" in source.path:
        raise InputError("a zero byte in its name")
    state = os.stat(source.path)
    if not stat.S_ISREG(state.st_mode):  # a pipe would block forever
        folder = "a folder, not a video file; if it holds the frames as images, see prepare.py frames"
        raise InputError(folder if stat.S_ISDIR(state.st_mode) else "not a regular file")
    if source.size is not None and state.st_size < source.offset + source.size:
        raise InputError(
            f"the shard ends at byte {state.st_size}, the video at {source.offset + source.size}: the shard is cut "
            "off, or not the one in the manifest"
        )
    return state.st_size


def _file_system(url: str) -> tuple[Any, str]:
    """(fsspec's file system, the path in it)."""
    for link in url.split("::"):
        if refusal := _REFUSED.get(link.partition("://")[0].lower()):
            raise InputError(f"{url}: {link.partition('://')[0]} is refused: {refusal}")
    try:
        import fsspec
    except ImportError:
        raise InputError(f"{url}: needs fsspec: pip install fsspec aiohttp (or '.[remote]' in a checkout)") from None
    try:
        system, path = fsspec.core.url_to_fs(url)
        return system, path
    except ImportError as error:
        raise InputError(f"{url}: {error}") from None
    except ValueError as error:
        raise InputError(f"{url}: not a URL that fsspec can open ({error})") from None


class _Span(NamedTuple):
    """Bytes of a file."""

    first: int
    end: int | None
    """None: the end of the file."""


_ALL = _Span(0, None)


def _download(url: str, spans: Sequence[_Span], size: int | None = None) -> list[bytes]:
    """The bytes of each span. `size`: see `read_ranges`."""
    for attempt in range(_ATTEMPTS):
        if attempt:
            time.sleep(_PAUSE_S * 4 ** (attempt - 1))
        try:
            system, path = _file_system(url)
            data = _read(system, path, spans, size)
        except InputError:
            raise
        except FileNotFoundError:
            raise InputError("no such file on its server") from None
        except PermissionError:
            raise InputError("its server denies permission to read it") from None
        except Exception as error:  # every file system has its own errors
            problem = _text(error)
            continue
        wanted = [len(some) if end is None else end - first for some, (first, end) in zip(data, spans, strict=True)]
        if list(map(len, data)) == wanted:
            return data
        if any(len(some) > count for some, count in zip(data, wanted)):
            raise _no_parts()
        problem = f"{sum(map(len, data))} of {sum(wanted)} bytes arrived: the file is cut off, or the connection was"
    raise InputError(f"cannot be read from its server, tried {_ATTEMPTS} times: {problem}")


def _read(system: Any, path: str, spans: Sequence[_Span], size: int | None) -> list[bytes]:
    """The bytes of each span, if there are not too many. Reads no more than that, whatever the server sends."""
    if sum(end - first for first, end in spans if end is not None) > _MOST_BYTES:
        raise _too_large()
    from fsspec.asyn import sync
    from fsspec.implementations.http import HTTPFileSystem

    if isinstance(system, HTTPFileSystem):
        data: list[bytes] = sync(system.loop, _read_http, system, path, spans, size)
    else:
        ends = [_MOST_BYTES + 1 if end is None else end for _, end in spans]
        data = system.cat_ranges([path] * len(spans), [first for first, _ in spans], ends, on_error="raise")
    if any(end is None and len(some) > _MOST_BYTES for some, (_, end) in zip(data, spans, strict=True)):
        raise _too_large()
    return data


def _too_large() -> InputError:
    return InputError(f"larger than {_MOST_BYTES >> 20} MiB, too large to be read from a URL; copy it to a disk")


def _no_parts() -> InputError:
    return InputError("its server sends only whole files; shards and packet indexes need parts of files (HTTP Range)")


async def _read_http(system: Any, url: str, spans: Sequence[_Span], size: int | None) -> list[bytes]:
    """Reads all spans, a few at a time."""
    slots = asyncio.Semaphore(_REQUESTS)

    async def read(span: _Span) -> bytes:
        async with slots:
            return await _read_http_span(system, url, span, size)

    return await asyncio.gather(*map(read, spans))


async def _read_http_span(system: Any, url: str, span: _Span, size: int | None) -> bytes:
    """Reads at most one byte more than asked for. fsspec would read the whole body, and decompress it."""
    start, end = span
    most = _MOST_BYTES if end is None else end - start
    options = dict(system.kwargs)
    headers = {**options.pop("headers", {}), "Accept-Encoding": "identity"}
    if end is not None:
        headers["Range"] = f"bytes={start}-{end - 1}"
    session = await system.set_session()
    async with session.get(system.encode_url(url), headers=headers, **options) as response:
        system._raise_not_found_for_status(response, url)
        if end is not None and response.status == 206:
            sent = response.headers.get("Content-Range", "")
            if not sent.startswith(f"bytes {start}-"):
                raise InputError(f"its server sends a part of the shard that was not requested ({sent[:80]!r})")
            if size is not None and sent.rpartition("/")[2] not in ("*", str(size)):
                raise InputError(f"the file on its server does not have {size} bytes ({sent[:80]!r})")
        elif start:
            raise _no_parts()
        data = bytearray()
        async for piece in response.content.iter_chunked(1 << 20):
            data += piece
            if len(data) > most:
                break
    return bytes(data[: most + 1])


def _text(error: BaseException) -> str:
    return " ".join(str(error).split())[:500] or type(error).__name__


def _place(cache: str, source: Source) -> str:
    name = hashlib.sha256(f"{source.path}\0{source.offset}\0{source.size}".encode(errors="surrogateescape")).hexdigest()
    return os.path.join(cache, name[:2], name)


def _keep(place: str, data: bytes) -> None:
    """Writes all of it or nothing, even if others write there at the same time."""
    folder = os.path.dirname(place)
    os.makedirs(folder, exist_ok=True)
    if shutil.disk_usage(folder).free < _RESERVE + len(data):
        raise OSError(f"its disk has less than {_RESERVE >> 20} MB left")
    unfinished = f"{place}.{uuid.uuid4().hex}.part"
    try:
        with open(unfinished, "xb") as file:
            file.write(data)
            file.flush()
            os.fdatasync(file.fileno())  # survives a power cut
        os.replace(unfinished, place)
    finally:
        with contextlib.suppress(OSError):
            os.remove(unfinished)
