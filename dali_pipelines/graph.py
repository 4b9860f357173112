"""The DALI graphs: decode (unless the source has done so), one resize per rectangle, one normalisation.

There are two ways from a source to clips. `clip_pipeline` does everything in one pipeline, in which DALI decodes what
the source has not. Otherwise `source_pipeline` only runs the source, and `cut_pipeline` cuts clips out of frames
decoded elsewhere (`DecodeStage`). The same functions build them for the CPU and for a GPU.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from nvidia.dali import Pipeline, fn, pipeline_def
from nvidia.dali.data_node import DataNode
from nvidia.dali.types import DALIDataType, DALIInterpType

from dali_pipelines.clip_source import ClipSource, Sample


class _Feed(NamedTuple):
    """How DALI gets a field of a `Sample`."""

    dtype: DALIDataType
    ndim: int
    layout: str = ""


_FEEDS = {
    "frames": _Feed(DALIDataType.UINT8, 4, "FHWC"),
    "encoded": _Feed(DALIDataType.UINT8, 1),
    "image_ends": _Feed(DALIDataType.INT32, 1),
    "size": _Feed(DALIDataType.INT32, 1),
    "positions": _Feed(DALIDataType.INT32, 1),
    "picks": _Feed(DALIDataType.INT32, 2),
    "rectangles": _Feed(DALIDataType.FLOAT, 2),
    "is_host": _Feed(DALIDataType.BOOL, 0),
    "transpose": _Feed(DALIDataType.BOOL, 0),
    "sample_id": _Feed(DALIDataType.INT64, 0),
    "packets": _Feed(DALIDataType.INT64, 1),
    "fault": _Feed(DALIDataType.UINT8, 1),
    "fallback": _Feed(DALIDataType.UINT8, 1),
}
assert tuple(_FEEDS) == Sample._fields


class Cut(NamedTuple):
    """How clips are cut out of decoded frames: the same for all samples of a loader."""

    crop_size: int
    clips: int
    """Clips per sample: `clips / windows` crops of each of `windows` windows."""
    windows: int
    mean: Sequence[float]
    std: Sequence[float]
    half: bool
    """Clips are float16; otherwise float32."""


def clip_pipeline(
    source: ClipSource,
    *,
    cut: Cut,
    batch_size: int,
    device_id: int | None,
    workers: int,
    threads: int,
    prefetch: int,
) -> Pipeline:
    """A pipeline, not built yet, with the outputs clips, sample_id, packets, fault, fallback, is_host, shapes of the
    decoded frames, and two that nothing needs.

    Clips are (value / 255 - mean) / std: [C, T, H, W] per sample, or [V, C, T, H, W] if there are several.
    `device_id` None is the CPU. `workers` processes run the source; with 0, this process does. `threads` threads of
    this process decode, resize and normalise.
    """
    return _clip_pipeline(
        source,
        cut,
        "cpu" if device_id is None else "gpu",
        **_settings(batch_size=batch_size, device_id=device_id, workers=workers, threads=threads, prefetch=prefetch),
    )


def source_pipeline(source: ClipSource, *, batch_size: int, workers: int, prefetch: int) -> Pipeline:
    """A pipeline, not built yet, that outputs the fields of a `Sample`, on the CPU."""
    return _source_pipeline(
        source, **_settings(batch_size=batch_size, device_id=None, workers=workers, threads=1, prefetch=prefetch)
    )


def cut_pipeline(
    decoded: Callable[[int], Sequence[Any]],
    rest: Callable[[int], Sequence[Sequence[Any]]],
    cut: Cut,
    *,
    batch_size: int,
    device_id: int | None,
    threads: int,
    prefetch: int,
) -> Pipeline:
    """A pipeline, not built yet, that outputs clips like those of `clip_pipeline`.

    For each batch it calls `decoded` and `rest` with the batch number, from 0. `decoded` returns the frames of each
    sample (uint8 [N, H, W, 3], on the pipeline's device), `rest` the `picks`, `rectangles` and `transpose` of the same
    samples (see `Sample`).
    """
    return _cut_pipeline(
        decoded,
        rest,
        cut,
        "cpu" if device_id is None else "gpu",
        **_settings(batch_size=batch_size, device_id=device_id, workers=0, threads=threads, prefetch=prefetch),
    )


def _settings(*, batch_size: int, device_id: int | None, workers: int, threads: int, prefetch: int) -> dict[str, Any]:
    return {
        "batch_size": batch_size,
        "num_threads": threads,
        "device_id": device_id,
        "py_num_workers": workers,
        "py_start_method": "spawn",
        "prefetch_queue_depth": prefetch,
    }


@pipeline_def
def _clip_pipeline(source: ClipSource, cut: Cut, device: str) -> tuple[DataNode, ...]:
    sample = _samples(source)
    is_host = sample["is_host"]
    frames, _ = _split(sample["frames"], is_host)
    _, encoded = _split(sample["encoded"], is_host)
    _, positions = _split(sample["positions"], is_host)
    # "none" makes frames past the end an error; the default would silently return black frames.
    decoded = fn.decoders.video(
        encoded, device="mixed" if device == "gpu" else "cpu", frames=positions, pad_mode="none"
    )
    frames = _merge(frames.gpu() if device == "gpu" else frames, decoded, is_host)
    clips = _clips(frames, sample["picks"], sample["rectangles"], sample["transpose"], cut)
    shapes = frames.shape()
    unused = sample["size"], sample["image_ends"]  # DALI warns about source outputs that nothing uses
    results = (sample[name] for name in ("sample_id", "packets", "fault", "fallback"))
    return clips, *results, is_host, shapes, *unused


@pipeline_def
def _source_pipeline(source: ClipSource) -> tuple[DataNode, ...]:
    return tuple(_samples(source).values())


@pipeline_def
def _cut_pipeline(
    decoded: Callable[[int], Sequence[Any]], rest: Callable[[int], Sequence[Sequence[Any]]], cut: Cut, device: str
) -> DataNode:
    feed = _FEEDS["frames"]
    frames = fn.external_source(source=decoded, device=device, dtype=feed.dtype, ndim=feed.ndim, layout=feed.layout)
    feeds = [_FEEDS[name] for name in ("picks", "rectangles", "transpose")]
    picks, rectangles, transpose = fn.external_source(
        source=rest, num_outputs=len(feeds), dtype=[feed.dtype for feed in feeds], ndim=[feed.ndim for feed in feeds]
    )
    return _clips(frames, picks, rectangles, transpose, cut)


def _samples(source: ClipSource) -> dict[str, DataNode]:
    """The fields of the workers' samples; in a pipeline without workers, the source runs in this process."""
    parallel = Pipeline.current().py_num_workers > 0
    feeds = _FEEDS.values()
    settings: dict[str, Any] = {
        "batch": False,
        "parallel": parallel,
        "dtype": [feed.dtype for feed in feeds],
        "ndim": [feed.ndim for feed in feeds],
        "layout": [feed.layout for feed in feeds],
    }
    if parallel:
        # Samples are dealt to the workers batch by batch: with two batches in flight, none waits for the slowest.
        settings["prefetch_queue_depth"] = 2
    fields = fn.external_source(source=source, num_outputs=len(feeds), **settings)
    return dict(zip(_FEEDS, fields, strict=True))


def _clips(frames: DataNode, picks: DataNode, rectangles: DataNode, transpose: DataNode, cut: Cut) -> DataNode:
    # A window repeats frames if its video is short, and several windows may share frames.
    windows = [fn.sequence_rearrange(frames, new_order=picks[window]) for window in range(cut.windows)]
    crops_per_window = cut.clips // cut.windows
    clips = [
        _clip(frames_of_window, rectangles, window * crops_per_window + crop, transpose, cut)
        for window, frames_of_window in enumerate(windows)
        for crop in range(crops_per_window)
    ]
    return clips[0] if cut.clips == 1 else fn.stack(*clips)


def _clip(frames: DataNode, rectangles: DataNode, number: int, transpose: DataNode, cut: Cut) -> DataNode:
    clip: Any = fn.resize(  # the stub's return type includes lists
        frames,
        size=[cut.crop_size, cut.crop_size],
        roi_start=rectangles[number, 0:2],
        roi_end=rectangles[number, 2:4],
        interp_type=DALIInterpType.INTERP_LINEAR,
        antialias=False,  # PaddleVideo's resize has none
        dtype=DALIDataType.FLOAT,  # the default rounds to uint8
    )
    clip = _transpose_some(clip, transpose)
    normalized: DataNode = fn.crop_mirror_normalize(
        clip,
        output_layout="CFHW",
        mean=[255 * value for value in cut.mean],
        std=[255 * value for value in cut.std],
        dtype=DALIDataType.FLOAT16 if cut.half else DALIDataType.FLOAT,
    )
    return normalized


def _transpose_some(clip: DataNode, transpose: DataNode) -> DataNode:
    turned, straight = _split(clip, transpose)
    turned = fn.transpose(turned, perm=[0, 2, 1, 3], transpose_layout=False)
    return _merge(turned, straight, transpose)


def _split(samples: DataNode, predicate: DataNode) -> tuple[DataNode, DataNode]:
    """(samples for which `predicate` is true, the rest). DALI compiles an `if` to the same operators, but for that it
    writes a source file into the temporary folder, which a killed process leaves there."""
    true, false = fn._conditional.split(samples, predicate=predicate)  # type: ignore[attr-defined]  # no stub
    return true, false


def _merge(if_true: DataNode, if_false: DataNode, predicate: DataNode) -> DataNode:
    merged: DataNode = fn._conditional.merge(  # type: ignore[attr-defined]  # no stub
        if_true, if_false, predicate=predicate
    )
    return merged
