"""Says what is in videos: the likeliest classes by weights alone, no config needed.

python predict.py -w output/demo/best.safetensors video.mp4
python predict.py -w best.safetensors folder 'more/*.mp4' val.csv --json
find . -name '*.mp4' | python predict.py -w best.safetensors - --csv > predictions.csv
python predict.py -w best.safetensors long.mp4 --windows 20 --picture timeline.png
python predict.py -w best.safetensors video.mp4 --explain where.png
python predict.py -w best.safetensors val.csv --features val.npz
python predict.py -w ppTimeSformer_k400_8f.pdparams -c configs/pptimesformer_k400.yaml video.mp4

Answers come in the order of the videos. Those that cannot be read are named on stderr and make the exit status 1.
"""

import argparse
import sys
from pathlib import Path

from dali_pipelines.errors import InputError
from dali_pipelines.text import csv_writer, for_data

_PICTURE_SUFFIXES = (".png", ".jpg", ".pdf", ".svg")


def main() -> int:
    parser = argparse.ArgumentParser(description="Predict the classes of videos.")
    parser.add_argument(
        "-w", "--weights", required=True, help="a run's best.safetensors, .onnx or .pt2; with -c also those of others"
    )
    parser.add_argument("-c", "--config", help="YAML file; default: what the weights file says")
    parser.add_argument(
        "-o", "--override", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="over the config's values"
    )
    parser.add_argument(
        "videos",
        nargs="+",
        metavar="VIDEO",
        help="files, folders, quoted globs, manifests (.csv); - for paths on stdin, one a line",
    )
    parser.add_argument("--top-k", type=int, default=5, metavar="K", help="classes to print (default 5)")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="one JSON object a line for each video")
    form.add_argument("--csv", action="store_true", help="one row for each video, and for each window of --windows")
    parser.add_argument(
        "--windows", type=int, default=1, metavar="N", help="N windows over each video, with a timeline"
    )
    parser.add_argument(
        "--picture", type=Path, metavar="FILE", help="draw what the network saw and said, or the timeline (one video)"
    )
    parser.add_argument(
        "--explain",
        type=Path,
        metavar="PATH",
        help="draw where the network looks: a picture of one video, or a folder for one of each",
    )
    parser.add_argument("--features", type=Path, metavar="FILE.npz", help="write what the head sees of each video")
    parser.add_argument("--device", help="auto, cpu, cuda or cuda:N (default: the config's, auto)")
    arguments = parser.parse_args()
    _check(arguments)

    from common.distributed import start_process
    from serving.features import Features
    from serving.formats import as_json, as_text, csv_columns, csv_rows
    from serving.prediction import open_model, predict

    weights, config, adapted = open_model(arguments.weights, arguments.config, arguments.override)
    if adapted:
        print(adapted, file=sys.stderr)
    shown = (arguments.top_k, weights.classes)
    windows = arguments.windows > 1
    features = Features(arguments.features) if arguments.features else None
    draw = _Pictures(arguments, weights)
    if arguments.csv:
        table = csv_writer(for_data(sys.stdout))
        table.writerow(csv_columns(*shown, windows=windows))
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
            if prediction.reason is not None:
                failed += 1
                print(f"{prediction.video}: {prediction.reason}", file=sys.stderr)
            if arguments.csv:
                table.writerows(csv_rows(prediction, *shown, windows=windows))
            elif arguments.json:
                print(as_json(prediction, *shown, windows=windows))
            elif prediction.reason is None:
                print(as_text(prediction, *shown, windows=windows))
            sys.stdout.flush()
            if features:
                features.add(prediction)
            if prediction.reason is None:
                draw(prediction)
    if features:
        features.save(weights)
    if failed:
        print(f"predict.py: exit status 1: {failed} of {count} videos cannot be read", file=sys.stderr)
    return int(failed > 0)


def _check(arguments: argparse.Namespace) -> None:
    """What can be said before anything is opened."""
    from serving.video_arguments import count, find_videos

    for name, value in (("--top-k", arguments.top_k), ("--windows", arguments.windows)):
        if value < 1:
            raise InputError(f"{name} is {value}; expected 1 or more")
    for name, path in (("--picture", arguments.picture), ("--explain", arguments.explain)):
        if path is None or (name == "--explain" and path.suffix.lower() not in _PICTURE_SUFFIXES):
            continue
        found = count(find_videos(arguments.videos, warn=lambda _: None))
        if found != 1:
            raise InputError(f"{name} draws one video, but {'a list is' if found is None else f'{found} are'} named")
        if not path.parent.is_dir():
            raise InputError(f"{name} {path}: no such folder; make it first")
        if path.suffix.lower() not in _PICTURE_SUFFIXES:
            raise InputError(f"{name} {path}: expected a name that ends in {', '.join(_PICTURE_SUFFIXES)}")
    if arguments.explain and arguments.windows > 1:
        raise InputError("--explain draws the first window; leave out --windows")
    if arguments.features and arguments.features.suffix != ".npz":
        raise InputError(f"--features {arguments.features}: expected a name that ends in .npz")
    if arguments.features and not arguments.features.parent.is_dir():
        raise InputError(f"--features {arguments.features}: no such folder; make it first")


class _Pictures:
    """Draws what was asked for of a prediction."""

    def __init__(self, arguments: argparse.Namespace, weights):
        self._picture, self._explain, self._windows = arguments.picture, arguments.explain, arguments.windows > 1
        self._weights = weights
        self._look = {key: weights.preprocessing[key] for key in ("mean", "std")}
        self._names: dict[str, int] = {}  # how many pictures in the folder have this name
        if self._explain and self._explain.suffix.lower() not in _PICTURE_SUFFIXES:
            self._explain.mkdir(exist_ok=True)

    def __call__(self, prediction) -> None:
        if not (self._picture or self._explain):
            return
        from serving.pictures import save_explanation, save_prediction_picture, save_timeline
        from serving.prediction import top

        classes, probabilities = self._weights.classes, prediction.probabilities
        best = top(probabilities, 1, classes)[0]
        title = f"{Path(prediction.video).name}: {best['class']}"
        if self._picture:
            if self._windows:
                said = prediction.window_probabilities.numpy()
                title = f"{Path(prediction.video).name}: {len(said)} windows"
                save_timeline(
                    self._picture,
                    prediction.window_frames,
                    prediction.seconds,
                    said,
                    classes,
                    title=title,
                    **self._look,
                )
            else:
                views = prediction.views
                save_prediction_picture(
                    self._picture, views, probabilities.tolist(), classes, title=title, **self._look
                )
            print(f"picture in {self._picture}", file=sys.stderr)
        if self._explain:
            path = self._path_of(prediction.video)
            title = f"{title} {best['probability']:.2f}"
            save_explanation(path, prediction.views[1], prediction.attention, title=title, **self._look)
            print(f"picture in {path}", file=sys.stderr)

    def _path_of(self, video: str) -> Path:
        if self._explain.suffix.lower() in _PICTURE_SUFFIXES:
            return self._explain
        name = Path(video).stem
        self._names[name] = self._names.get(name, 0) + 1
        return self._explain / (f"{name}.png" if self._names[name] == 1 else f"{name}_{self._names[name]}.png")
