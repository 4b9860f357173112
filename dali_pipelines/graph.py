"""The DALI graphs: decode (where the source has not), one resize from each rectangle, one normalise.

Two ways lead from a source to clips. `clip_pipeline` does all of it in one pipeline, in which DALI decodes what the
source has not. In the other, `source_pipeline` only runs the source, and `cut_pipeline` cuts clips out of frames that
something else has decoded (`DecodeStage`). The same functions build them for the CPU and for a GPU.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from nvidia.dali import Pipeline, fn, pipeline_def, types

from dali_pipelines.clip_source import Sample

_FEEDS = Sample(
    pictures=(types.UINT8, 4, "FHWC"),
    encoded=(types.UINT8, 1, ""),
    size=(types.INT32, 1, ""),
    positions=(types.INT32, 1, ""),
    picks=(types.INT32, 2, ""),
    rectangles=(types.FLOAT, 2, ""),
    is_host=(types.BOOL, 0, ""),
    transpose=(types.BOOL, 0, ""),
    sample_id=(types.INT64, 0, ""),
    packets=(types.INT64, 1, ""),
    fault=(types.UINT8, 1, ""),
    fallback=(types.UINT8, 1, ""),
)
"""DALI type, number of dimensions and layout of every field of a `Sample`."""


class Cut(NamedTuple):
    """How clips are made of decoded frames: the same for all samples of a loader."""

    crop_size: int
    clips: int
    """Clips a sample: `clips / windows` crops of each of `windows` windows."""
    windows: int
    mean: Sequence[float]
    std: Sequence[float]
    half: bool
    """Clips are float16; otherwise float32."""


def clip_pipeline(
    source: Callable[..., Sample],
    *,
    cut: Cut,
    batch_size: int,
    device_id: int | None,
    workers: int,
    threads: int,
    prefetch: int,
) -> Pipeline:
    """A pipeline, not built yet, whose outputs are clips, sample_id, packets, fault, fallback, is_host, the shapes of
    the decoded frames, and size.

    Clips are (value / 255 - mean) / std: [C, T, H, W] a sample, or [V, C, T, H, W] where there are several.
    `device_id` None is the CPU. `workers` processes run the source; 0 runs it in this one. `threads` of this process
    decode, resize and normalise.
    """
    return _clip_pipeline(
        source,
        cut,
        "cpu" if device_id is None else "gpu",
        **_settings(batch_size=batch_size, device_id=device_id, workers=workers, threads=threads, prefetch=prefetch),
    )


def source_pipeline(source: Callable[..., Sample], *, batch_size: int, workers: int, prefetch: int) -> Pipeline:
    """A pipeline, not built yet, whose outputs are the fields of a `Sample`, on the CPU."""
    return _source_pipeline(
        source, **_settings(batch_size=batch_size, device_id=None, workers=workers, threads=1, prefetch=prefetch)
    )


def cut_pipeline(
    decoded: Callable[[int], Sequence],
    rest: Callable[[int], Sequence[Sequence]],
    cut: Cut,
    *,
    batch_size: int,
    device_id: int | None,
    threads: int,
    prefetch: int,
) -> Pipeline:
    """A pipeline, not built yet, whose output is clips, as those of `clip_pipeline`.

    For each batch it calls both with the number of the batch, from 0. `decoded` returns the frames of each sample
    (uint8 [N, H, W, 3], on the pipeline's device), `rest` the `picks`, `rectangles` and `transpose` of the same samples
    (see `Sample`).
    """
    return _cut_pipeline(
        decoded,
        rest,
        cut,
        "cpu" if device_id is None else "gpu",
        **_settings(batch_size=batch_size, device_id=device_id, workers=0, threads=threads, prefetch=prefetch),
    )


def _settings(*, batch_size: int, device_id: int | None, workers: int, threads: int, prefetch: int) -> dict:
    return {
        "batch_size": batch_size,
        "num_threads": threads,
        "device_id": device_id,
        "py_num_workers": workers,
        "py_start_method": "spawn",
        "prefetch_queue_depth": prefetch,
    }


@pipeline_def
def _clip_pipeline(source, cut, device):
    sample = _samples(source)
    pictures, _ = _split(sample.pictures, sample.is_host)
    _, encoded = _split(sample.encoded, sample.is_host)
    _, positions = _split(sample.positions, sample.is_host)
    # "none": what is past the end of its index is an error; the default would be black frames without one.
    decoded = fn.decoders.video(
        encoded, device="mixed" if device == "gpu" else "cpu", frames=positions, pad_mode="none"
    )
    frames = _merge(pictures.gpu() if device == "gpu" else pictures, decoded, sample.is_host)
    clips = _clips(frames, sample.picks, sample.rectangles, sample.transpose, cut)
    shapes, unused = frames.shape(), sample.size  # DALI warns of what a source gives and nobody takes
    return clips, sample.sample_id, sample.packets, sample.fault, sample.fallback, sample.is_host, shapes, unused


@pipeline_def
def _source_pipeline(source):
    return tuple(_samples(source))


@pipeline_def
def _cut_pipeline(decoded, rest, cut, device):
    frames = fn.external_source(source=decoded, device=device, dtype=types.UINT8, ndim=4, layout="FHWC")
    feeds = [_FEEDS.picks, _FEEDS.rectangles, _FEEDS.transpose]
    picks, rectangles, transpose = fn.external_source(
        source=rest, num_outputs=len(feeds), dtype=[feed[0] for feed in feeds], ndim=[feed[1] for feed in feeds]
    )
    return _clips(frames, picks, rectangles, transpose, cut)


def _samples(source) -> Sample:
    """The workers' samples; in a pipeline without workers, the source runs in this process."""
    parallel = Pipeline.current().py_num_workers > 0
    return Sample(
        *fn.external_source(
            source=source,
            num_outputs=len(_FEEDS),
            batch=False,
            parallel=parallel,
            # Samples are dealt to the workers batch by batch: with two batches under way, none waits for the slowest.
            **({"prefetch_queue_depth": 2} if parallel else {}),
            dtype=[feed[0] for feed in _FEEDS],
            ndim=[feed[1] for feed in _FEEDS],
            layout=[feed[2] for feed in _FEEDS],
        )
    )


def _clips(frames, picks, rectangles, transpose, cut):
    # Windows hold pictures again where a video is short, and share them where there are several.
    taken = [fn.sequence_rearrange(frames, new_order=picks[window]) for window in range(cut.windows)]
    clips = [
        _clip(taken[number * cut.windows // cut.clips], rectangles, number, transpose, cut)
        for number in range(cut.clips)
    ]
    return clips[0] if cut.clips == 1 else fn.stack(*clips)


def _clip(frames, rectangles, number, transpose, cut):
    clip = fn.resize(
        frames,
        size=[cut.crop_size, cut.crop_size],
        roi_start=rectangles[number, 0:2],
        roi_end=rectangles[number, 2:4],
        interp_type=types.INTERP_LINEAR,
        antialias=False,  # PaddleVideo's resize has none
        dtype=types.FLOAT,  # the default rounds to uint8
    )
    clip = _transpose_some(clip, transpose)
    return fn.crop_mirror_normalize(
        clip,
        output_layout="CFHW",
        mean=[255 * value for value in cut.mean],
        std=[255 * value for value in cut.std],
        dtype=types.FLOAT16 if cut.half else types.FLOAT,
    )


def _transpose_some(clip, transpose):
    turned, straight = _split(clip, transpose)
    turned = fn.transpose(turned, perm=[0, 2, 1, 3], transpose_layout=False)
    return _merge(turned, straight, transpose)


def _split(samples, predicate):
    """(those for which `predicate` is true, the others). DALI makes these operators of an `if`, but it also writes a
    source file into the temporary folder for that, which a process that is killed leaves there."""
    return fn._conditional.split(samples, predicate=predicate)


def _merge(if_true, if_false, predicate):
    return fn._conditional.merge(if_true, if_false, predicate=predicate)
