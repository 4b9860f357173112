"""Predictions for videos, by the same way from file to clip as evaluation."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.child_process import in_child
from common.config import Config, DataConfig, clip_settings
from common.distributed import DistributedContext
from common.precision import resolve_precision
from common.weights import Weights, agreeing_config, open_weights
from common.worker_pool import WorkerPool
from dali_pipelines import ClipLoader, InputError, Manifest
from dali_pipelines.manifest import Video, place_for_people
from dali_pipelines.probe import probe
from evaluation.evaluate import predict_views
from model import TimeSformer, attention_rollout
from serving.video_arguments import Chunk, chunks, count, find_videos

EXPORTED = (".onnx", ".pt2")
"""What export.py writes ends in one of these."""

_MOST_BYTES, _MOST_FRAMES = 128 << 20, 128
"""Of decoded pictures in one sample, which holds so many of a video's windows. Each picture may need a group of
pictures of its own in memory."""
_LOOKERS = 4  # processes at most that look at files
_ALONE_AREA, _ALONE_PIXELS = 1 << 23, 1 << 31
"""Pixels of a frame, and of all frames, up to which a single video is decoded in this process. A decoder may hold 17
frames, and there is nobody to end it when it takes too long."""
_AT_ONCE = 4
"""Windows, three crops each, that the network sees at once."""


Classify = Callable[[Tensor], dict[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What the network says of one video; `reason` says why it says nothing, and the tensors are None then."""

    video: str
    label: int | None = None
    """That of the manifest, where the video is from one."""
    reason: str | None = None
    probabilities: Tensor | None = None
    """float32 [K], mean over all views: three crops of each window."""
    views: Tensor | None = None
    """[3, 3, T, S, S]: the three crops of the first window as the network saw them, normalised."""
    seconds: np.ndarray | None = None
    """float64 [N, 2]: start and end of each of N windows."""
    window_probabilities: Tensor | None = None
    """float32 [N, K], mean over the three crops."""
    window_frames: Tensor | None = None
    """[N, 3, S, S]: a frame from the middle of each window, its middle crop, normalised."""
    features: Tensor | None = None
    """float32 [D], what the head sees, mean over all views; where asked for."""
    attention: Tensor | None = None
    """float32 [T, rows, columns]: attention rollout of the middle crop of the first window; where asked for."""


def top(probabilities: Tensor | None, k: int, classes: Sequence[str]) -> list[dict[str, Any]]:
    """The k likeliest classes of [K], best first: class, label, probability."""
    if probabilities is None:
        return []
    best = probabilities.topk(min(k, len(classes)))
    return [
        {"class": classes[label], "label": label, "probability": round(value, 6)}
        for value, label in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]


def open_model(path: str, config_path: str | None, overrides: Sequence[str]) -> tuple[Any, Config, str]:
    """`open_weights`, also for a file of export.py, which is then the first of what comes back: a
    `serving.exported.Exported` with the model, preprocessing and classes of a `Weights`."""
    if not path.endswith(EXPORTED):
        return open_weights(path, config_path, overrides)
    from serving.exported import open_exported

    exported = open_exported(path)
    told = Weights(exported.model, exported.preprocessing, tuple(exported.classes), {})
    config = agreeing_config(told, config_path, overrides)
    if config.data.num_frames != told.preprocessing["num_frames"]:
        raise InputError(
            f"{path}: was exported for {told.preprocessing['num_frames']} frames, data.num_frames is "
            f"{config.data.num_frames}; only weights can be given another number"
        )
    return exported, config, ""


def predict(
    weights: Any,
    config: Config,
    videos: Sequence[str],
    process: DistributedContext,
    *,
    num_windows: int = 1,
    features: bool = False,
    explain: bool = False,
) -> Iterator[Prediction]:
    """A prediction for each video in the order of the input, as it comes; `weights` and `config` by `open_model`.

    videos: files, folders, globs, manifests, "-" for a list on stdin: see `find_videos`, whose `InputError` it raises.
    num_windows: so many windows over each video; 1 is the test of evaluation.
    features, explain: compute `Prediction.features`, `Prediction.attention`; `InputError` for an exported network,
        which gives neither.
    """
    found = find_videos(videos)
    if callable(weights):
        if features or explain:
            raise InputError("an exported network gives probabilities only; for this, name the weights it is made from")
        network, classify = None, lambda clips: {"probabilities": weights(clips).float().cpu()}
    else:
        network = weights.build(process.device)
        classify = _classifier(network, resolve_precision(config.train.precision, process.device), features=features)
    lookers = process.workers(config.data.workers, _LOOKERS)
    is_alone = count(found) == 1
    with WorkerPool(workers=max(lookers, 1)).executor() as executor:
        for chunk in chunks(found):
            known = list(executor.map(partial(_known, chunk, config.data), chunk.videos))
            readable = Manifest([video for _, _, video in known if isinstance(video, Video)], root=chunk.root)
            # Closed, and its processes ended, before the next chunk is waited for.
            with contextlib.closing(
                _predict_readable(readable, config, classify, process, num_windows, is_alone=is_alone)
            ) as predicted:
                for path, label, video in known:
                    if isinstance(video, InputError):
                        yield Prediction(video=path, label=label, reason=str(video))
                        continue
                    fields = next(predicted)
                    if explain and "views" in fields:
                        fields["attention"] = attention_rollout(network, fields["views"][1:2]).patches[0].cpu()
                    yield Prediction(video=path, label=label, **fields)


def _known(chunk: Chunk, data: DataConfig, video: str | Video) -> tuple[str, int | None, Video | InputError]:
    """(path as it is shown, label, what is known of the video or why it is none). Files are looked at in a process that
    may hang or die."""
    if isinstance(video, Video):
        return place_for_people(video, chunk.root), video.label, video
    try:
        found = in_child(probe, [video, data.max_pixels, data.cache], data.timeout_s, setting="data.timeout_s")
        return video, None, Video(*found)._replace(path=video)
    except InputError as error:
        return video, None, error


def _classifier(network: TimeSformer, precision: str, *, features: bool) -> Classify:
    """Windows of three crops [M, 3, 3, T, S, S] -> float32 probabilities [M, K] and, where asked for, features [M, D]:
    means over the crops, on the CPU."""
    seen: list[Tensor] = []
    if features:
        network.head.register_forward_pre_hook(lambda _head, inputs: seen.append(inputs[0]))

    def classify(clips: Tensor) -> dict[str, Tensor]:
        answer = {"probabilities": predict_views(network, clips, precision).cpu()}
        if features:
            answer["features"] = seen.pop().float().unflatten(0, clips.shape[:2]).mean(1).cpu()
        return answer

    return classify


def _predict_readable(
    manifest: Manifest,
    config: Config,
    classify: Classify,
    process: DistributedContext,
    num_windows: int,
    *,
    is_alone: bool,
) -> Iterator[dict[str, Any]]:
    """Fields of a `Prediction` for each video of the manifest, in its order. A small one that `is_alone` in the whole
    input is decoded in this process, which is quicker."""
    if not len(manifest):
        return
    settings = clip_settings(config.data, "test")
    at_once = _windows_at_once(manifest, num_windows, settings["num_frames"])
    parts = -(-num_windows // at_once)
    samples = len(manifest) * parts
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
    parts_of_video: list[dict[str, Tensor]] = []
    for batch in loader:
        windows = batch.clips.unflatten(1, (-1, 3))  # [B, windows, 3, 3, T, S, S]
        pieces = [classify(some) for some in windows.flatten(0, 1).split(_AT_ONCE)]
        answers = {  # [B, windows, K or D]
            name: torch.cat([piece[name] for piece in pieces]).unflatten(0, windows.shape[:2]) for name in pieces[0]
        }
        for index, sample_id in enumerate(batch.sample_ids.tolist()):
            if sample_id < 0:
                continue
            part = {name: values[index] for name, values in answers.items()}
            if num_windows > 1:
                part["frames"] = windows[index, :, 1, :, settings["num_frames"] // 2].cpu()
            if not parts_of_video:
                views = windows[index, 0].clone() if parts > 1 else windows[index, 0]
            parts_of_video.append(part)
            if len(parts_of_video) == parts:
                reasons = [fault.reason for fault in loader.stats.faults if fault.sample_id == sample_id]
                seconds = loader.window_seconds(sample_id)
                fields = _joined(parts_of_video, num_windows, views=views, seconds=seconds)
                if not (reasons or fields["window_probabilities"].isfinite().all()):
                    reasons = ["the network's answer is not finite; try -o train.precision=float32"]
                yield {"reason": reasons[0]} if reasons else fields
                parts_of_video = []


def _windows_at_once(manifest: Manifest, num_windows: int, num_frames: int) -> int:
    """As many as fit, evenly over the parts."""
    frames = min(_MOST_BYTES // (3 * int(manifest.areas.max())), _MOST_FRAMES)
    most = max(frames // num_frames, 1)
    parts = -(-num_windows // most)
    return -(-num_windows // parts)


def _joined(parts: list[dict[str, Tensor]], num_windows: int, **fields: Any) -> dict[str, Any]:
    # The last part may hold the last window several times.
    whole = {name: torch.cat([part[name] for part in parts])[:num_windows] for name in parts[0]}
    return fields | {
        "probabilities": whole["probabilities"].mean(0),
        "window_probabilities": whole["probabilities"],
        "window_frames": whole.get("frames"),
        "features": whole["features"].mean(0) if "features" in whole else None,
    }
