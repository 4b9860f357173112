"""Predicts videos. Clips are decoded and cut exactly as in an evaluation."""

import contextlib
import dataclasses
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, TypedDict

import numpy as np
import torch
from torch import Tensor

from common.child_process import in_child
from common.config import Config, DataConfig, clip_settings
from common.distributed import DistributedContext
from common.precision import resolve_precision
from common.weights import Weights, agreeing_config, check_not_swapped, open_weights
from common.worker_pool import WorkerPool
from dali_pipelines import ClipLoader, InputError, Manifest
from dali_pipelines.manifest import Video, place_for_people
from dali_pipelines.probe import probe
from evaluation.evaluate import predict_views
from model import TimeSformer, attention_rollout
from serving.export_formats import is_exported, open_exported
from serving.exported import Exported
from serving.video_arguments import Chunk, chunks, count, find_videos

_MOST_BYTES, _MOST_FRAMES = 128 << 20, 128
"""Limits for the decoded frames of one sample, and so for its number of windows. Each frame may need its own GOP in
memory."""
_MOST_PROBES = 4  # processes that probe files
_ALONE_AREA, _ALONE_PIXELS = 1 << 23, 1 << 31
"""Largest number of pixels of a frame, and of all frames, of a single video that this process decodes itself. A decoder
may hold 17 frames, and nothing here could stop a decoder that takes too long."""
_WINDOWS_AT_ONCE = 4
"""Windows (three crops each) in a batch of the network."""

Classify = Callable[[Tensor], dict[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Unreadable:
    """A video without a prediction."""

    video: str
    label: int | None = None
    """From the manifest, if the video was named by one."""
    reason: str


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The prediction for one video."""

    video: str
    label: int | None = None
    """From the manifest, if the video was named by one."""
    probabilities: Tensor
    """float32 [K]: mean over all views (three crops per window)."""
    views: Tensor = dataclasses.field(repr=False)
    """float32 [3, 3, T, S, S]: the three crops of the first window as the network saw them, normalised."""
    seconds: np.ndarray
    """float64 [N, 2]: start and end of each of N windows."""
    window_probabilities: Tensor
    """float32 [N, K]: mean over the three crops."""
    window_frames: Tensor | None = dataclasses.field(default=None, repr=False)
    """float32 [N, 3, S, S]: the middle crop of the middle frame of each window, normalised; None for one window."""
    features: Tensor | None = dataclasses.field(default=None, repr=False)
    """float32 [D]: the input of the head, mean over all views; None unless requested."""
    attention: Tensor | None = dataclasses.field(default=None, repr=False)
    """float32 [T, rows, columns]: attention rollout of the middle crop of the first window; None unless requested."""
    reason: ClassVar[None] = None
    """None; `Unreadable` has the reason here."""


TopClass = TypedDict("TopClass", {"class": str, "label": int, "probability": float})
"""One of the most likely classes."""


def top_classes(probabilities: Tensor, k: int, classes: Sequence[str]) -> list[TopClass]:
    """The k most likely classes of probabilities [K], best first."""
    best = probabilities.topk(min(k, len(classes)))
    return [
        {"class": classes[label], "label": label, "probability": round(value, 6)}
        for value, label in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]


def open_model(
    path: str, config_path: str | None, overrides: Sequence[str], *, provider: str = "auto"
) -> tuple[Weights | Exported, Config, str]:
    """Extends `common.weights.open_weights` to files of export.py. Returns (weights or exported network, config, how
    the weights were adapted). `provider`: see `onnx_format.start_session`. Raises `InputError`."""
    check_not_swapped(path, config_path)
    if not is_exported(path):
        if provider not in ("auto", "cpu"):
            raise InputError(f"--provider {provider} is for .onnx files; weights run in torch: use -o device=cuda")
        return open_weights(path, config_path, overrides)
    exported = open_exported(path, provider)
    header = Weights(exported.model, exported.preprocessing, exported.classes, {})
    config = agreeing_config(header, config_path, overrides)
    num_frames = exported.preprocessing["num_frames"]
    if config.data.num_frames != num_frames:
        raise InputError(
            f"{path}: was exported for {num_frames} frames, data.num_frames is {config.data.num_frames}; only weights "
            "can be adapted to another number"
        )
    return exported, config, ""


def predict(
    weights: Weights | Exported,
    config: Config,
    videos: Sequence[str],
    process: DistributedContext,
    *,
    num_windows: int = 1,
    features: bool = False,
    explain: bool = False,
) -> Iterator[Prediction | Unreadable]:
    """Yields a prediction for each video as soon as it is available, in input order; `weights` and `config` come from
    `open_model`.

    videos: files, folders, globs, manifests, "-" for a list on stdin: see `find_videos`, whose `InputError` it raises.
    num_windows: temporal windows over each video; 1, as in an evaluation by default.
    features, explain: compute `Prediction.features`, `Prediction.attention`; an exported network has neither and
        raises `InputError`.
    """
    found = find_videos(videos)
    network: TimeSformer | None = None
    if isinstance(weights, Exported):
        if features or explain:
            raise InputError("an exported network gives only probabilities; name the weights it was exported from")
        classify = _classifier_of_exported(weights)
    else:
        network = weights.build(process.device)
        classify = _classifier(network, resolve_precision(config.train.precision, process.device), features=features)
    probes = process.workers(config.data.workers, _MOST_PROBES)
    is_alone = count(found) == 1
    with WorkerPool(workers=max(probes, 1)).executor() as executor:
        for chunk in chunks(found):
            probed = list(executor.map(partial(_probe, chunk, config.data), chunk.videos))
            readable = Manifest([video for _, _, video in probed if isinstance(video, Video)], root=chunk.root)
            # Close it and its processes before waiting for the next chunk.
            with contextlib.closing(
                _predict_readable(readable, config, classify, process, num_windows, is_alone=is_alone)
            ) as predicted:
                for path, label, video in probed:
                    if isinstance(video, InputError):
                        yield Unreadable(video=path, label=label, reason=str(video))
                        continue
                    prediction = dataclasses.replace(next(predicted), video=path, label=label)
                    if explain and network is not None and isinstance(prediction, Prediction):
                        rollout = attention_rollout(network, prediction.views[1:2])
                        prediction = dataclasses.replace(prediction, attention=rollout.patches[0].cpu())
                    yield prediction


def _probe(chunk: Chunk, data: DataConfig, video: str | Video) -> tuple[str, int | None, Video | InputError]:
    """Returns (path to show, label, the probed video or why it cannot be read). Files are probed in a process that may
    hang or die."""
    if isinstance(video, Video):
        return place_for_people(video, chunk.root), video.label, video
    try:
        found = in_child(probe, [video, data.max_pixels, data.cache], data.timeout_s, setting="data.timeout_s")
        return video, None, Video(*found)._replace(path=video)
    except InputError as error:
        return video, None, error


def _classifier(network: TimeSformer, precision: str, *, features: bool) -> Classify:
    """Maps windows of three crops [M, 3, 3, T, S, S] to float32 probabilities [M, K] and, if requested, features
    [M, D]: means over the crops, on the CPU."""
    seen: list[Tensor] = []
    if features:
        network.head.register_forward_pre_hook(lambda _head, inputs: seen.append(inputs[0]))

    def classify(clips: Tensor) -> dict[str, Tensor]:
        outputs = {"probabilities": predict_views(network, clips, precision).cpu()}
        if features:
            outputs["features"] = seen.pop().float().unflatten(0, clips.shape[:2]).mean(1).cpu()
        return outputs

    return classify


def _classifier_of_exported(exported: Exported) -> Classify:
    return lambda clips: {"probabilities": exported(clips).float().cpu()}


def _predict_readable(
    manifest: Manifest,
    config: Config,
    classify: Classify,
    process: DistributedContext,
    num_windows: int,
    *,
    is_alone: bool,
) -> Generator[Prediction | Unreadable, None, None]:
    """Yields a prediction without label for each video of the manifest, in order. If the input is one small video
    (`is_alone`), this process decodes it, which is faster."""
    if not len(manifest):
        return
    settings = clip_settings(config.data, "test")
    at_once = _windows_per_sample(manifest, num_windows, settings["num_frames"])
    num_parts = -(-num_windows // at_once)
    samples = len(manifest) * num_parts
    largest = int(manifest.areas.max())
    is_small = largest <= _ALONE_AREA and largest * int(manifest.column("frames").max()) <= _ALONE_PIXELS
    loader = ClipLoader(
        manifest,
        **settings,
        batch_size=min(4, len(manifest)) if num_windows == 1 else 1,
        device=process.device,
        num_windows=num_windows,
        windows_at_once=at_once,
        workers=0 if is_alone and is_small and samples == 1 else process.workers(config.data.workers, samples),
    )
    parts: list[dict[str, Tensor]] = []  # of one video
    for batch in loader:
        windows = batch.clips.unflatten(1, (-1, 3))  # [B, windows, 3, 3, T, S, S]
        pieces = [classify(some) for some in windows.flatten(0, 1).split(_WINDOWS_AT_ONCE)]
        outputs = {  # [B, windows, K or D]
            name: torch.cat([piece[name] for piece in pieces]).unflatten(0, windows.shape[:2]) for name in pieces[0]
        }
        for index, row in enumerate(batch.sample_ids.tolist()):
            if row < 0:
                continue
            part = {name: values[index] for name, values in outputs.items()}
            if num_windows > 1:
                part["frames"] = windows[index, :, 1, :, settings["num_frames"] // 2].cpu()
            if not parts:
                views = windows[index, 0].clone() if num_parts > 1 else windows[index, 0]
            parts.append(part)
            if len(parts) == num_parts:
                reasons = [fault.reason for fault in loader.stats.faults if fault.sample_id == row]
                # The last part may repeat the last window.
                joined = {name: torch.cat([each[name] for each in parts])[:num_windows] for name in parts[0]}
                if not reasons and not joined["probabilities"].isfinite().all():
                    reasons = ["the network's output is not finite; try -o train.precision=float32"]
                if reasons:
                    yield Unreadable(video=manifest[row].path, reason=reasons[0])
                else:
                    yield Prediction(
                        video=manifest[row].path,
                        probabilities=joined["probabilities"].mean(0),
                        views=views,
                        seconds=loader.window_seconds(row),
                        window_probabilities=joined["probabilities"],
                        window_frames=joined.get("frames"),
                        features=joined["features"].mean(0) if "features" in joined else None,
                    )
                parts = []


def _windows_per_sample(manifest: Manifest, num_windows: int, num_frames: int) -> int:
    """As many windows as fit into memory, spread evenly over the samples of a video."""
    frames = min(_MOST_BYTES // (3 * int(manifest.areas.max())), _MOST_FRAMES)
    most = max(frames // num_frames, 1)
    num_parts = -(-num_windows // most)
    return -(-num_windows // num_parts)
