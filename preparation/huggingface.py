"""Lists the videos of a Hugging Face dataset: Parquet files, or the Arrow files of `Dataset.save_to_disk`.

A `Video` column is a struct of `bytes` and `path` (datasets/features/video.py). `datasets` 5 writes the bytes
uncompressed and in one piece, so a video is read in place, as a part of the Parquet file. Compressed or
dictionary-encoded videos of other writers are written out.
"""

import json
import mmap
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from dali_pipelines.errors import InputError, reason
from dali_pipelines.files import is_url
from dali_pipelines.folders import VIDEO_SUFFIXES
from preparation.datasets import SPLITS
from preparation.index import LARGEST_LABEL, Listed, Part

_ROWS = 8  # rows to hold in memory at a time
_LABEL_NAMES = ("label", "labels", "class", "action", "category")
_INSTALL = "install it with: .venv/bin/pip install -e '.[huggingface]'"


@dataclass
class FoundRows:
    """The videos of one split."""

    listed: list[Listed] = field(default_factory=list)
    """Names or paths of the videos, and their labels."""
    parts: dict[str, Part] = field(default_factory=dict)
    """Name -> the place of a video that is read in place."""
    written: int = 0
    """Number of videos written out, because their bytes are not in one piece in the file."""
    unlabelled: int = 0
    """Rows left out because they have no label, as those of many test splits."""
    without_video: int = 0
    """Rows left out because their video is null."""
    folders: dict[str, str] = field(default_factory=dict)
    """Folders of the files, relative to the dataset -> the pattern that reads only these. Several folders may be
    several configurations."""


class _Row(NamedTuple):
    """A row of a dataset."""

    listed: str | None
    """A path, or the name of a video that is read in place; None without a video."""
    part: Part | None
    label: int | str | None
    is_written: bool = False
    """Whether its video was written out."""


@dataclass
class _Table:
    """An open file. `batches` reads columns in batches, each with the range of the file that holds its videos."""

    schema: Any
    batches: Callable[[list[str]], Iterator[tuple[Any, int, int]]]


def download(name: str, pattern: str) -> Path:
    """Downloads the files of a dataset on the hub that match a pattern, into the cache of huggingface_hub, and returns
    their folder. Raises `InputError`."""
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    except ImportError:
        raise InputError(f"{name}: not a folder here; a dataset on the hub needs huggingface_hub: {_INSTALL}") from None
    try:
        return Path(snapshot_download(name, repo_type="dataset", allow_patterns=[pattern, "*.json"]))
    except (HFValidationError, HfHubHTTPError, OSError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{name}: neither a folder here nor a dataset that the hub gives out: {first}") from None


def read_dataset(
    root: Path,
    out: Path,
    *,
    pattern: str | None = None,
    video_column: str | None = None,
    label_column: str | None = None,
    classes: Sequence[str] = (),
) -> tuple[dict[str, FoundRows], tuple[str, ...]]:
    """Lists the videos of a dataset in the folder `root`, by split, and the class names.

    pattern: the files to read; default: *.parquet or, without any, *.arrow, in all folders. The split of a file is in
    its name, such as train-00000-of-00001.parquet, or in that of a folder; without one, it is train.
    out: videos that cannot be read in place are written into `out`/videos.
    video_column, label_column: default: the only column of videos, and of labels.
    classes: names that number the labels; default: those of the `ClassLabel`, or text labels in alphabetical order.

    Raises `InputError`, also for damaged files and for columns that do not exist.
    """
    splits: dict[str, FoundRows] = {}
    named: list[tuple[FoundRows, int, str]] = []  # rows whose label is a name
    for file in _files(root, pattern):
        table = _open(file)
        features = _features(table.schema)
        video = video_column or _only(file, table.schema, _videos(table.schema, features), "video")
        label = label_column or _only(file, table.schema, _labels(table.schema, features), "label")
        for column in (video, label):
            if column not in table.schema.names:
                raise InputError(f"{file}: no column {column}; its columns are {', '.join(table.schema.names)}")
        names = tuple(features.get(label, {}).get("names") or ())
        classes = tuple(classes) or names
        found = splits.setdefault(_split(file.relative_to(root)), FoundRows())
        folder = file.parent.relative_to(root)
        found.folders[str(folder)] = f"{folder}/*{file.suffix}"
        for listed, part, row_label, is_written in _read(file, table, video, label, root=root, out=out):
            if listed is None:
                found.without_video += 1
                continue
            if row_label is None or row_label == -1:
                found.unlabelled += 1
                continue
            most = len(names) - 1 if names else LARGEST_LABEL
            if isinstance(row_label, int) and not 0 <= row_label <= most:
                raise InputError(f"{file}: {listed} has label {row_label}; expected 0 to {most}")
            if names and isinstance(row_label, int) and names != classes:
                row_label = names[row_label]
            if isinstance(row_label, str):
                named.append((found, len(found.listed), row_label))
                row_label = 0
            if part:
                found.parts[listed] = part
            found.written += is_written
            found.listed.append((listed, row_label))
    classes = tuple(classes) or tuple(sorted({name for _, _, name in named}))
    numbers = {name: number for number, name in enumerate(classes)}
    for found, row, name in named:
        if name not in numbers:
            raise InputError(f"{root}: {name[:80]!r} is not one of the {len(classes)} classes, such as {classes[0]!r}")
        found.listed[row] = (found.listed[row][0], numbers[name])
    return splits, classes


def _files(root: Path, pattern: str | None) -> list[Path]:
    if pattern and os.path.isabs(pattern):
        raise InputError(f"--files {pattern}: expected a pattern relative to the dataset, such as data/train-*.parquet")
    for each in (pattern,) if pattern else ("*.parquet", "*.arrow"):
        # `datasets` keeps results of map() in cache-*.arrow
        files = [path for path in sorted(root.rglob(each)) if path.is_file() and not path.name.startswith("cache-")]
        if files:
            return files
    kinds = sorted({path.suffix or path.name for path in root.rglob("*") if path.is_file()})[:6]
    raise InputError(
        f"{root}: no {pattern or 'Parquet or Arrow files'} (found {', '.join(kinds) or 'no files'}); expected what "
        "`datasets` writes (to_parquet, push_to_hub, save_to_disk). For folders of videos: prepare.py folder"
    )


def _split(name: Path) -> str:
    for part in reversed(name.with_suffix("").parts):
        words = {SPLITS[word] for word in re.split("[^a-z]+", part.lower()) if word in SPLITS}
        if len(words) == 1:
            return words.pop()
    return "train"


def _features(schema: Any) -> dict[str, dict[str, Any]]:
    """The features that `datasets` notes in the schema; {} for other writers."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: each for name, each in features.items() if isinstance(each, dict)}
    except (AttributeError, KeyError, TypeError, ValueError):
        return {}


def _videos(schema: Any, features: dict[str, dict[str, Any]]) -> list[str]:
    typed = [name for name in schema.names if features.get(name, {}).get("_type") == "Video"]
    structs = [each.name for each in schema if "bytes" in {part.name for part in _fields(each.type)}]
    return typed or structs or [name for name in schema.names if name == "video"]


def _fields(kind: Any) -> list[Any]:
    return [kind.field(number) for number in range(kind.num_fields)]


def _labels(schema: Any, features: dict[str, dict[str, Any]]) -> list[str]:
    typed = [name for name in schema.names if features.get(name, {}).get("_type") == "ClassLabel"]
    return typed if len(typed) == 1 else [name for name in _LABEL_NAMES if name in schema.names][:1]


def _only(file: Path, schema: Any, columns: Sequence[str], what: str) -> str:
    if len(columns) != 1:
        is_nested = any(_fields(each.type) and each.name not in _videos(schema, {}) for each in schema)
        raise InputError(
            f"{file}: {len(columns) or 'no'} columns of {what}s among {', '.join(schema.names)}; "
            f"name one with --{what}-column"
            + (" (for a column within another, write the dataset with dataset.flatten())" if is_nested else "")
        )
    return columns[0]


def _read(file: Path, table: _Table, video: str, label: str, *, root: Path, out: Path) -> Iterator[_Row]:
    """Yields the rows, and writes out the videos that cannot be read in place."""
    name = str(file.relative_to(root))
    with open(file, "rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        number = place = 0
        for batch, start, end in _checked(file, table.batches([video, label])):
            videos, labels = (batch.column(batch.schema.get_field_index(each)) for each in (video, label))
            for value, row_label in zip(videos, labels.to_pylist()):
                number, value = number + 1, value.as_py()  # a batch of an Arrow file may be gigabytes
                if value is None or value == {"bytes": None, "path": None}:
                    yield _Row(None, None, None)
                    continue
                path, data = _path_and_bytes(file, video, value)
                if not isinstance(row_label, int | str | None):
                    raise InputError(f"{file}: {label} is {str(row_label)[:40]}; expected one whole number or name")
                listed, part = _row_name(file.relative_to(root), number - 1, path), None
                is_written = False
                if row_label in (None, -1):
                    pass
                elif data is None:
                    listed = _path(path, file, root)
                elif (found := _find(mapped, data, place, start, end)) >= 0:
                    place = found + len(data)
                    part = Part(name, found, len(data))
                else:
                    listed, is_written = _write(out / "videos" / listed, data), True
                yield _Row(listed, part, row_label, is_written)


def _path_and_bytes(file: Path, column: str, value: Any) -> tuple[str, bytes | None]:
    path, data = (value.get("path"), value.get("bytes")) if isinstance(value, dict) else (None, value)
    if isinstance(data, str):
        path, data = data, None
    if not isinstance(path, str | None) or not isinstance(data, bytes | None) or (path is None and data is None):
        raise InputError(f"{file}: {column} has a row without a video; expected its path or its bytes")
    return path or "", data


def _row_name(file: Path, number: int, path: str) -> str:
    """A unique name for the video of a row, such as train-00000-of-00001/000012_dog.mp4."""
    stem, suffix = os.path.splitext(os.path.basename(path.split("::")[0]))
    suffix = suffix.lower() if suffix.lower() in VIDEO_SUFFIXES else ".mp4"
    stem = re.sub("[^A-Za-z0-9_-]+", "_", stem)[:64]
    return f"{file.with_suffix('')}/{number:06}{f'_{stem}' if stem else ''}{suffix}"


def _find(mapped: mmap.mmap, data: bytes, place: int, start: int, end: int) -> int:
    """Where the bytes of a video are between `start` and `end` of its file, looking from `place` on first; -1 if they
    are not there in one piece. Comparing them needs no knowledge of pages, and no trust in the offsets of a file."""
    if not data or not 0 <= start < end <= len(mapped):
        return -1
    place = min(max(place, start), end)
    found = mapped.find(data, place, end)
    return found if found >= 0 else mapped.find(data, start, min(place + len(data), end))


def _write(path: Path, data: bytes) -> str:
    """Writes a video, unless it is there already, and returns its absolute path."""
    path = path.resolve()
    if not (path.is_file() and path.stat().st_size == len(data) and path.read_bytes() == data):
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"{path.name}.part")
        unfinished.write_bytes(data)
        unfinished.replace(path)
    return str(path)


def _path(path: str, file: Path, root: Path) -> str:
    """The path of a video that is a file of its own: relative to the Parquet file or to the dataset, or absolute."""
    if is_url(path) or os.path.isabs(path):
        return path
    for folder in (file.parent, root):
        if (folder / path).is_file():
            return os.path.relpath(folder / path, root)
    return path


def _open(file: Path) -> _Table:
    try:
        import pyarrow.parquet
    except ImportError:
        raise InputError(f"{file}: needs pyarrow; {_INSTALL}") from None
    try:
        if file.suffix == ".arrow":
            return _open_arrow(pyarrow.memory_map(str(file)))
        parquet = pyarrow.parquet.ParquetFile(file)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise InputError(f"{file}: not a Parquet or Arrow file that can be read: {reason(error)[:200]}") from None

    def batches(columns: list[str]) -> Iterator[tuple[Any, int, int]]:
        for group in range(parquet.num_row_groups):
            start, end = _range(parquet.metadata.row_group(group), columns[0])
            for batch in parquet.iter_batches(_ROWS, row_groups=[group], columns=columns):
                yield batch, start, end

    return _Table(parquet.schema_arrow, batches)


def _open_arrow(file: Any) -> _Table:
    """The stream that `datasets` writes, or the file format that others write (Feather)."""
    import pyarrow

    size = file.size()
    if file.read(6) == b"ARROW1":
        reader = pyarrow.ipc.open_file(file)
        numbers = range(reader.num_record_batches)
        return _Table(reader.schema, lambda _: ((reader.get_batch(number), 0, size) for number in numbers))
    file.seek(0)
    stream = pyarrow.ipc.open_stream(file)
    return _Table(stream.schema, lambda _: ((batch, 0, size) for batch in stream))


def _range(group: Any, column: str) -> tuple[int, int]:
    """Start and end of the bytes of a column of videos in its file; (0, 0) if they are compressed."""
    for number in range(group.num_columns):
        chunk = group.column(number)
        if chunk.path_in_schema in (column, f"{column}.bytes") and chunk.compression == "UNCOMPRESSED":
            start = chunk.dictionary_page_offset or chunk.data_page_offset
            return start, start + chunk.total_compressed_size
    return 0, 0


def _checked(file: Path, batches: Iterator[tuple[Any, int, int]]) -> Iterator[tuple[Any, int, int]]:
    import pyarrow

    try:
        yield from batches
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise InputError(f"{file}: damaged: {reason(error)[:200]}") from None
