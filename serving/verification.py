"""Checks an exported network against the original: clips to compare on, the comparison, and the atomic rename."""

import contextlib
import logging
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from common.config import Config, clip_settings, read_run_config
from common.distributed import DistributedContext
from common.labels import read_manifest
from common.weights import Weights, atomic_rename
from dali_pipelines import ClipLoader, InputError, Manifest
from dali_pipelines.manifest import Video
from dali_pipelines.probe import probe
from serving.exported import Precision

_MOST_VIDEOS = 16
"""Videos of a manifest to compare on, with three views each."""


class MismatchError(Exception):
    """The exported network differs from the original. The message names the clip, the difference and the kept file."""


class Classifier(nn.Module):
    """The network to export. views 1: clips [B, 3, T, S, S] -> logits [B, K]; 3: views [B, 3, 3, T, S, S] -> mean of
    their probabilities [B, K]. Input and output are float32; with precision float16, everything else except the head is
    float16."""

    def __init__(self, weights: Weights, *, views: int, precision: Precision):
        super().__init__()
        self.dtype = torch.float16 if precision == "float16" else torch.float32
        self.views = views
        self.network = weights.build().to(self.dtype)
        self.network.head.float()  # logits in float16 would tie
        self.requires_grad_(False).eval()

    def forward(self, clips: Tensor) -> Tensor:
        """Clips [B, 3, T, S, S], or [B, V, 3, T, S, S] with several views -> logits or probabilities [B, K]."""
        if self.views > 1:
            clips = clips.flatten(0, 1)
        logits = self.network.head(self.network.forward_features(clips.to(self.dtype)).float())
        return logits.softmax(1).unflatten(0, (-1, self.views)).mean(1) if self.views > 1 else logits


# -- clips to compare on --


@dataclass(frozen=True)
class Clips:
    """Real or synthetic clips to compare networks on."""

    views: Tensor
    """float32 [N, 3, 3, T, S, S]: three views of each of N videos, normalised."""
    names: list[str]
    origin: str
    """A description of their origin, to print."""

    def inputs(self, num_views: int) -> Tensor:
        """Reshapes the clips for a network that takes `num_views` views of a video."""
        return self.views if num_views > 1 else self.views.flatten(0, 1)


def clips_to_compare(
    weights: Weights, config: Config, videos: Sequence[str], process: DistributedContext, *, beside: Path
) -> Clips:
    """Returns three views each of `videos` (files or a manifest), by default of the run's validation videos.

    beside: the weights file; config.yaml in its folder names the manifest if `config` does not. Without a manifest, the
    clips are synthetic. Raises `InputError` if
    no video can be read.
    """
    manifest, origin = _manifest_of(config, videos, beside)
    if manifest is None:
        origin = f"{origin}compared on synthetic clips; name real ones with --videos"
        return Clips(synthetic_views(weights), [f"synthetic clip {number}" for number in range(4)], origin)
    loader = ClipLoader(
        manifest,
        **clip_settings(config.data, "test"),
        batch_size=min(4, len(manifest)),
        device="cpu",
        workers=process.workers(config.data.workers, len(manifest)),
    )
    views, names = [], []
    for batch in loader:
        views.append(batch.clips[batch.valid].clone())
        names += [manifest[row].path for row in batch.sample_ids[batch.valid].tolist()]
    if not names:
        fault = loader.stats.faults[0]
        raise InputError(f"{fault.path}: {fault.reason}; none of {origin} can be read: use --videos")
    unreadable = f" ({len(manifest) - len(names)} of them unreadable)" if len(names) < len(manifest) else ""
    return Clips(torch.cat(views), names, f"compared on {origin}{unreadable}")


def _manifest_of(config: Config, videos: Sequence[str], beside: Path) -> tuple[Manifest | None, str]:
    """Returns (the videos to compare on, their description), or (None, the reason) if there are none."""
    if videos and not videos[0].endswith(".csv"):
        return Manifest([_probe(path) for path in videos]), f"{len(videos)} video{'s' if len(videos) > 1 else ''}"
    if len(videos) > 1:
        raise InputError(f"--videos {' '.join(videos)}: expected video files, or one manifest")
    path = videos[0] if videos else config.data.test or config.data.val
    if path is None and (run := beside.with_name("config.yaml")).is_file():
        try:
            path = read_run_config(run).data.val
        except InputError as error:
            return None, f"{error}; "
        if path is not None and not Path(path).is_file():  # the run was on another machine, or its data is gone
            return None, f"{run} names {path}, which does not exist; "
    if path is None:
        return None, ""
    manifest = read_manifest(path, key="--videos")
    count = min(len(manifest), _MOST_VIDEOS)
    # Spread over the manifest, which is often sorted by class.
    chosen = [manifest[number * len(manifest) // count] for number in range(count)]
    return Manifest(chosen, root=manifest.root), f"{count} of the {len(manifest)} videos in {path}"


def _probe(path: str) -> Video:
    try:
        return probe(path)
    except InputError as error:
        raise InputError(f"--videos {path}: {error}") from None


def synthetic_views(weights: Weights) -> Tensor:
    """Three views each of four smooth random videos, float32 [4, 3, 3, T, S, S], normalised; the same every time."""
    frames, side = weights.preprocessing["num_frames"], weights.preprocessing["crop_size"]
    coarse = torch.rand(4 * 3 * 3, frames, 8, 8, generator=torch.Generator().manual_seed(0))
    pixels = interpolate(coarse, (side, side), mode="bilinear").view(4, 3, 3, frames, side, side)
    mean, std = (torch.tensor(weights.preprocessing[key]).view(3, 1, 1, 1) for key in ("mean", "std"))
    return (pixels - mean) / std


def example_input(weights: Weights, views: int) -> Tensor:
    """A batch of two to trace a network with: exporters would fix a batch size of one."""
    return synthetic_views(weights)[:2] if views > 1 else synthetic_views(weights)[:2, 0]


def any_batch_size() -> tuple[dict[int, torch.export.Dim]]:
    """Dynamic shapes with any batch size, for torch's exporters."""
    return ({0: torch.export.Dim("batch", min=1)},)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppresses the warnings of torch's exporters."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


# -- comparing --


def compare(
    reference: Callable[[Tensor], Tensor],
    exported: Callable[[Tensor], Tensor],
    clips: Clips,
    *,
    views: int,
    precision: Precision,
) -> str:
    """Runs both networks on all clips, first on one alone, then on batches of three. Returns the result to print;
    raises `MismatchError` if they differ. Prints how long it will take if that is more than half a minute.

    float32: no value may differ by more than 1e-3. float16: by more than a hundredth of the clip's largest logit, or of
    1 if that is larger. int8: values may differ. The top-1 must always be the same.
    """
    inputs = clips.inputs(views)
    unit = "probability" if views > 1 else "logit"
    count, largest = len(inputs), 0.0
    wrong: dict[int, str] = {}
    begin = time.perf_counter()
    for batch in [[0], *([(start + k) % count for k in range(3)] for start in range(0, count, 3))]:
        expected, found = reference(inputs[batch]), exported(inputs[batch])
        if batch == [0] and (minutes := (time.perf_counter() - begin) * count / 60) > 0.5:
            what = "videos" if views > 1 else "clips"
            print(f"comparing the export with the network on {count} {what}: about {minutes:.0f} min", flush=True)
        if found.shape != expected.shape or found.dtype != torch.float32:
            raise MismatchError(f"it gives {found.dtype} {tuple(found.shape)}; expected {tuple(expected.shape)}")
        for number, original, copy in zip(batch, expected, found, strict=True):
            difference, limit = (original - copy).abs().max().item(), _limit(precision, original)
            largest = max(largest, difference)
            if not difference <= limit:  # also true for NaN
                wrong.setdefault(number, f"a {unit} differs by {difference:.2g}, more than {limit:.2g}")
            elif original.argmax() != copy.argmax():
                top = f"the top-1 is class {copy.argmax()}, but {original.argmax()} in the original network"
                wrong.setdefault(number, f"{top}; a {unit} differs by {difference:.2g}")
    if wrong:
        number, difference_text = next(iter(wrong.items()))
        name = clips.names[number] if views > 1 else f"{clips.names[number // 3]}, view {number % 3 + 1} of 3"
        raise MismatchError(f"{name}: {difference_text} ({precision}; {len(wrong)} of {count} differ)")
    return f"largest difference of a {unit} {largest:.2g}, same top-1 for all {count}"


def _limit(precision: Precision, expected: Tensor) -> float:
    if precision == "float32":
        return 1e-3
    return 1e-2 * max(1.0, expected.abs().max().item()) if precision == "float16" else float("inf")


def time_in_turn(runs: Sequence[Callable[[Tensor], Tensor]], inputs: Tensor) -> list[float]:
    """Milliseconds per input of each of `runs`, which have run before, called on all inputs at once: the best of three,
    or of fewer if that takes more than half a minute. They alternate, so that other load on the machine slows all of
    them."""
    seconds: list[list[float]] = [[] for _ in runs]
    while len(seconds[0]) < 3 and sum(map(sum, seconds)) < 30:
        for run, its_seconds in zip(runs, seconds, strict=True):
            begin = time.perf_counter()
            run(inputs)
            its_seconds.append(time.perf_counter() - begin)
    return [min(its_seconds) * 1e3 / len(inputs) for its_seconds in seconds]


def compare_with_original(
    weights: Weights,
    run: Callable[[Tensor], Tensor],
    clips: Clips,
    *,
    views: int = 1,
    precision: Precision = "float32",
    runtime: str,
) -> str:
    """Compares `run` with the network of `weights` in float32, and times both; returns the result to print. Raises
    `MismatchError`."""
    network = Classifier(weights, views=views, precision="float32")

    def reference(inputs: Tensor) -> Tensor:
        with torch.inference_mode():
            return network(inputs)

    result = compare(reference, run, clips, views=views, precision=precision)
    inputs = clips.inputs(views)[:3]
    before, after = time_in_turn([reference, run], inputs)
    return (
        f"{clips.origin}: {result}\n"
        f"{'a video of 3 views' if views > 1 else 'a clip'}: {before:.4g} ms in torch (float32), {after:.4g} ms in "
        f"{runtime} ({precision}), {before / after:.2f}x as fast; batches of {len(inputs)}, "
        f"{torch.get_num_threads()} CPU threads"
    )


@contextlib.contextmanager
def verified(path: Path) -> Iterator[Path]:
    """Yields a path beside `path` to write to. It is renamed to `path` when the block ends, to NAME.mismatch if the
    block raises `MismatchError`, and deleted if it raises anything else. Until then, `path` does not change."""
    unverified, mismatch = (path.with_name(f"{path.stem}.{word}{path.suffix}") for word in ("unverified", "mismatch"))
    _delete(unverified)
    try:
        yield unverified
    except MismatchError as error:
        _delete(mismatch)
        unverified.rename(mismatch)
        kept = f"; {path} is unchanged" if path.is_file() else ""
        raise MismatchError(f"{error}. The export is kept as {mismatch}{kept}") from None
    except BaseException:
        _delete(unverified)
        raise
    atomic_rename(unverified, path)


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
