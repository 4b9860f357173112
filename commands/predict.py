"""Predicts the most likely classes of videos; needs only weights, no config.

python predict.py -w output/demo/best.safetensors video.mp4
python predict.py -w best.safetensors folder 'more/*.mp4' val.csv --json
find . -name '*.mp4' | python predict.py -w best.safetensors - --csv > predictions.csv
python predict.py -w best.safetensors long.mp4 --windows 20 --picture timeline.png
python predict.py -w best.safetensors long.mp4 --windows 20 --overlay labelled.mp4
python predict.py -w best.safetensors video.mp4 --explain attention.png
python predict.py -w best.safetensors rtsp://camera/stream --live --every 2 --json
python predict.py -w best.safetensors val.csv --features val.npz
python predict.py -w ppTimeSformer_k400_8f.pdparams -c configs/pptimesformer_k400.yaml video.mp4

Predictions come in the order of the videos. Videos that cannot be read are named on stderr; the exit status is then 1.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.command_line import Parser, add_override_argument, add_provider_argument
from dali_pipelines.errors import InputError
from dali_pipelines.text import csv_writer, for_data, hide_passwords

if TYPE_CHECKING:
    from common.config import Config
    from common.weights import Weights
    from serving.exported import Exported
    from serving.prediction import Prediction, TopClass

_IMAGE_SUFFIXES = (".png", ".jpg", ".pdf", ".svg")


def main() -> int:
    """Runs predict.py; returns its exit status."""
    parser = Parser(description="Predict the classes of videos.")
    parser.add_argument(
        "-w",
        "--weights",
        required=True,
        help="best.safetensors of a run, an .onnx or .pt2 of export.py, or with -c third-party weights",
    )
    parser.add_argument("-c", "--config", help="YAML file (default: the settings in the weights file)")
    add_override_argument(parser)
    parser.add_argument(
        "videos",
        nargs="+",
        metavar="VIDEO",
        help="files, folders, quoted globs, manifests (.csv); - for paths on stdin, one per line",
    )
    parser.add_argument("--top-k", type=int, default=5, metavar="K", help="classes to print (default 5)")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print one JSON object per video and line")
    form.add_argument("--csv", action="store_true", help="print one row per video and, with --windows, one per window")
    parser.add_argument(
        "--windows", type=int, default=1, metavar="N", help="predict N windows of each video, as a timeline"
    )
    parser.add_argument(
        "--picture",
        type=Path,
        metavar="FILE",
        help="plot the crops and the prediction, or with --windows the timeline (one video)",
    )
    parser.add_argument(
        "--overlay",
        type=Path,
        metavar="FILE.mp4",
        help="write the video again with the prediction burnt in, and with --windows the timeline (one video)",
    )
    parser.add_argument(
        "--live",
        action="store_true",
        help="predict a camera or stream (rtsp://, https://.../x.m3u8, /dev/video0) until it ends or Ctrl-C",
    )
    parser.add_argument(
        "--every", type=float, default=1.0, metavar="SECONDS", help="time between predictions with --live (default 1)"
    )
    parser.add_argument(
        "--explain",
        type=Path,
        metavar="PATH",
        help="plot attention maps: an image file for one video, or a folder for several",
    )
    parser.add_argument(
        "--features", type=Path, metavar="FILE.npz", help="write the features of each video (the inputs of the head)"
    )
    parser.add_argument("--device", help="auto, cpu, cuda or cuda:N (default: from the config, where it is auto)")
    add_provider_argument(parser)
    arguments = parser.parse_args()
    _check_arguments(arguments)

    from common.distributed import start_process
    from serving.exported import Exported
    from serving.features import Features
    from serving.formats import as_json, as_text, csv_columns, csv_rows
    from serving.prediction import Prediction, Unreadable, open_model, predict

    weights, config, adapted = open_model(
        arguments.weights, arguments.config, arguments.override, provider=arguments.provider
    )
    if isinstance(weights, Exported):
        adapted = weights.runtime
    if adapted:
        print(adapted, file=sys.stderr)
    k, classes = arguments.top_k, weights.classes
    if arguments.live:
        return _predict_live(arguments, weights, config)
    windows = arguments.windows > 1
    features = Features(arguments.features) if arguments.features else None
    draw = _Plots(arguments, weights.classes, weights.preprocessing)
    if arguments.csv:
        table = csv_writer(for_data(sys.stdout))
        table.writerow(csv_columns(k, classes, windows=windows))
    count = failed = 0
    with start_process(arguments.device or config.device) as process:
        for prediction in predict(
            weights,
            config,
            arguments.videos,
            process,
            num_windows=arguments.windows,
            features=features is not None,
            explain=arguments.explain is not None,
        ):
            count += 1
            if isinstance(prediction, Unreadable):
                failed += 1
                print(f"{prediction.video}: {prediction.reason}", file=sys.stderr)
            if arguments.csv:
                table.writerows(csv_rows(prediction, k, classes, windows=windows))
            elif arguments.json:
                print(as_json(prediction, k, classes, windows=windows), file=for_data(sys.stdout))
            elif isinstance(prediction, Prediction):
                print(as_text(prediction, k, classes, windows=windows))
            sys.stdout.flush()
            if features:
                features.add(prediction)
            if isinstance(prediction, Prediction):
                draw(prediction)
    if features:
        features.save(weights)
    if failed:
        print(f"predict.py: exit status 1: {failed} of {count} videos cannot be read", file=sys.stderr)
    return int(failed > 0)


def _predict_live(arguments: argparse.Namespace, weights: "Weights | Exported", config: "Config") -> int:
    """Prints a prediction every --every seconds until the stream ends."""
    import torch

    from common.distributed import start_process
    from serving.live import live_columns, live_json, live_row, live_text, watch

    [source] = arguments.videos
    name = hide_passwords(source)
    k, classes = arguments.top_k, weights.classes
    if arguments.csv:
        table = csv_writer(for_data(sys.stdout))
        table.writerow(live_columns(k, classes))
    with start_process(arguments.device or config.device) as process:
        torch.set_num_threads(process.cores)
        for prediction in watch(
            source, weights, config, process, every=arguments.every, report=lambda line: print(line, file=sys.stderr)
        ):
            if arguments.csv:
                table.writerow(live_row(name, prediction, k, classes))
            elif arguments.json:
                print(live_json(name, prediction, k, classes))
            else:
                print(live_text(prediction, k, classes))
            sys.stdout.flush()
    return 0


def _check_arguments(arguments: argparse.Namespace) -> None:
    """Checks the arguments before weights are loaded. Raises `InputError`."""
    from serving.overlay import SUFFIXES as OVERLAY_SUFFIXES
    from serving.overlay import require_pillow
    from serving.pictures import require_matplotlib
    from serving.video_arguments import count, find_videos

    for name, value in (("--top-k", arguments.top_k), ("--windows", arguments.windows)):
        if value < 1:
            raise InputError(f"{name} is {value}; expected 1 or more")
    if arguments.live:
        options = ("picture", "overlay", "explain", "features")
        given = [f"--{name}" for name in options if getattr(arguments, name)]
        given += ["--windows"] * (arguments.windows > 1)
        if given:
            raise InputError(f"{given[0]} needs a video that ends; omit --live")
        if len(arguments.videos) != 1:
            raise InputError(f"--live predicts one source, but {len(arguments.videos)} are named")
        if not arguments.every > 0:
            raise InputError(f"--every is {arguments.every:g}; expected seconds, more than 0")
        return
    if arguments.picture or arguments.explain:
        require_matplotlib("--picture" if arguments.picture else "--explain")
    if arguments.overlay:
        require_pillow()
    outputs = {"--picture": arguments.picture, "--explain": arguments.explain, "--overlay": arguments.overlay}
    for name, path in outputs.items():
        if path is None or (name == "--explain" and path.suffix.lower() not in _IMAGE_SUFFIXES):
            continue
        found = count(find_videos(arguments.videos, warn=lambda _: None))
        if found != 1:
            raise InputError(f"{name} draws one video, but {'a list is' if found is None else f'{found} are'} named")
        if not path.parent.is_dir():
            raise InputError(f"{name} {path}: no such folder; make it first")
        suffixes = OVERLAY_SUFFIXES if name == "--overlay" else _IMAGE_SUFFIXES
        if path.suffix.lower() not in suffixes:
            raise InputError(f"{name} {path}: expected a name that ends in {', '.join(suffixes)}")
        if any(Path(video).exists() and path.exists() and path.samefile(video) for video in arguments.videos):
            raise InputError(f"{name} {path}: is the video itself; name another file")
    if arguments.explain and arguments.windows > 1:
        raise InputError("--explain draws only the first window; omit --windows")
    if arguments.features and arguments.features.suffix != ".npz":
        raise InputError(f"--features {arguments.features}: expected a name that ends in .npz")
    if arguments.features and not arguments.features.parent.is_dir():
        raise InputError(f"--features {arguments.features}: no such folder; make it first")


class _Plots:
    """Draws the plots for --picture and --explain, and the video for --overlay."""

    def __init__(self, arguments: argparse.Namespace, classes: Sequence[str], preprocessing: Mapping[str, Any]):
        self._picture: Path | None = arguments.picture
        self._explain: Path | None = arguments.explain
        self._overlay: Path | None = arguments.overlay
        self._videos: list[str] = arguments.videos
        self._classes = classes
        self._normalisation = {key: preprocessing[key] for key in ("mean", "std")}
        self._names: dict[str, int] = {}  # name -> number of plots with it in the folder
        if self._explain and self._explain.suffix.lower() not in _IMAGE_SUFFIXES:
            self._explain.mkdir(exist_ok=True)

    def __call__(self, prediction: "Prediction") -> None:
        if self._picture:
            self._draw_prediction(self._picture, prediction)
            print(f"saved {self._picture}", file=sys.stderr)
        if self._overlay:
            from serving.overlay import write_overlay
            from serving.video_arguments import one_source

            count = write_overlay(self._overlay, one_source(self._videos), prediction, self._classes)
            print(f"saved {self._overlay}: {count} frames", file=sys.stderr)
        if self._explain:
            path = self._path_in(self._explain, prediction.video)
            self._draw_explanation(path, prediction)
            print(f"saved {path}", file=sys.stderr)

    def _draw_prediction(self, path: Path, prediction: "Prediction") -> None:
        from serving.pictures import save_prediction_picture, save_timeline

        name = Path(prediction.video).name
        if prediction.window_frames is not None:
            windows = prediction.window_probabilities.numpy()
            title = f"{name}: {len(windows)} windows"
            frames, seconds = prediction.window_frames, prediction.seconds
            save_timeline(path, frames, seconds, windows, self._classes, title=title, **self._normalisation)
        else:
            title = f"{name}: {self._best(prediction)['class']}"
            views, probabilities = prediction.views, prediction.probabilities.tolist()
            save_prediction_picture(path, views, probabilities, self._classes, title=title, **self._normalisation)

    def _draw_explanation(self, path: Path, prediction: "Prediction") -> None:
        from serving.pictures import save_explanation

        assert prediction.attention is not None  # --explain computes it
        best = self._best(prediction)
        title = f"{Path(prediction.video).name}: {best['class']} {best['probability']:.2f}"
        save_explanation(path, prediction.views[1], prediction.attention, title=title, **self._normalisation)

    def _best(self, prediction: "Prediction") -> "TopClass":
        from serving.prediction import top_classes

        return top_classes(prediction.probabilities, 1, self._classes)[0]

    def _path_in(self, explain: Path, video: str) -> Path:
        """Returns `explain` if it names an image file, otherwise a new name in that folder."""
        if explain.suffix.lower() in _IMAGE_SUFFIXES:
            return explain
        name = Path(video).stem
        self._names[name] = self._names.get(name, 0) + 1
        return explain / (f"{name}.png" if self._names[name] == 1 else f"{name}_{self._names[name]}.png")
