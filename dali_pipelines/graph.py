"""The DALI graph: decode (where the source has not), one resize from each rectangle, one normalise.

The same function builds it for the CPU and for a GPU. On a GPU, NVDEC decodes, and everything after it stays there.
"""

from collections.abc import Callable, Sequence

from nvidia.dali import Pipeline, fn, pipeline_def, types

from dali_pipelines.clip_source import Sample

_FEEDS = Sample(
    pictures=(types.UINT8, 4, "FHWC"),
    encoded=(types.UINT8, 1, ""),
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


def clip_pipeline(
    source: Callable[..., Sample],
    *,
    batch_size: int,
    crop_size: int,
    clips: int,
    windows: int,
    mean: Sequence[float],
    std: Sequence[float],
    half: bool,
    device_id: int | None,
    workers: int,
    prefetch: int,
) -> Pipeline:
    """A pipeline, not built yet, whose outputs are clips, sample_id, packets, fault, fallback, is_host and the shapes
    of the decoded pictures.

    Clips are float32 (`half`: float16), (value / 255 - mean) / std: [C, T, H, W] a sample, or [V, C, T, H, W] where
    there are several, `clips / windows` crops of each of `windows` windows. `device_id` None is the CPU. `workers`
    processes run the source; 0 runs it in this one.
    """
    return _clip_pipeline(
        source,
        crop_size,
        clips,
        windows,
        [255 * value for value in mean],
        [255 * value for value in std],
        types.FLOAT16 if half else types.FLOAT,
        "cpu" if device_id is None else "gpu",
        workers > 0,
        batch_size=batch_size,
        num_threads=max(workers, 1),
        device_id=device_id,
        py_num_workers=workers,
        py_start_method="spawn",
        prefetch_queue_depth=prefetch,
    )


@pipeline_def(enable_conditionals=True)
def _clip_pipeline(source, crop_size, clips, windows, mean, std, dtype, device, parallel):
    sample = Sample(
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
    if sample.is_host:
        frames = sample.pictures.gpu() if device == "gpu" else sample.pictures
    else:
        # "none": what is past the end of its index is an error; the default would be black frames without one.
        frames = fn.decoders.video(
            sample.encoded,
            device="mixed" if device == "gpu" else "cpu",
            frames=sample.positions,
            pad_mode="none",
        )
    # Windows hold pictures again where a video is short, and share them where there are several.
    taken = [fn.sequence_rearrange(frames, new_order=sample.picks[window]) for window in range(windows)]
    cut = [_clip(taken[clip * windows // clips], sample, clip, crop_size, mean, std, dtype) for clip in range(clips)]
    stacked = cut[0] if clips == 1 else fn.stack(*cut)
    return stacked, sample.sample_id, sample.packets, sample.fault, sample.fallback, sample.is_host, frames.shape()


def _clip(frames, sample, number, crop_size, mean, std, dtype):
    clip = fn.resize(
        frames,
        size=[crop_size, crop_size],
        roi_start=sample.rectangles[number, 0:2],
        roi_end=sample.rectangles[number, 2:4],
        interp_type=types.INTERP_LINEAR,
        antialias=False,  # PaddleVideo's resize has none
        dtype=types.FLOAT,  # the default rounds to uint8
    )
    clip = _transpose_some(clip, sample.transpose)
    return fn.crop_mirror_normalize(clip, output_layout="CFHW", mean=mean, std=std, dtype=dtype)


def _transpose_some(clip, transpose):
    if transpose:
        turned = fn.transpose(clip, perm=[0, 2, 1, 3], transpose_layout=False)
    else:
        turned = clip
    return turned
