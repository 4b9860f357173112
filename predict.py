"""Says what is in videos: the likeliest classes by weights alone, no config needed.

python predict.py -w output/demo/best.safetensors video.mp4
python predict.py -w best.safetensors *.mp4 --json
python predict.py -w best.safetensors video.mp4 --picture out.png
python predict.py -w ppTimeSformer_k400_8f.pdparams -c configs/pptimesformer_k400.yaml video.mp4
"""

import argparse
import json
import sys
from pathlib import Path

from dali_pipelines.errors import InputError, run_command

_PICTURE_SUFFIXES = (".png", ".jpg", ".pdf", ".svg")


def main() -> int:
    parser = argparse.ArgumentParser(description="Predict the classes of videos.")
    parser.add_argument("-w", "--weights", required=True, help="a run's best.safetensors; with -c also those of others")
    parser.add_argument("-c", "--config", help="YAML file; default: what the weights file says")
    parser.add_argument(
        "-o", "--override", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="over the config's values"
    )
    parser.add_argument("videos", nargs="+", metavar="VIDEO")
    parser.add_argument("--top-k", type=int, default=5, metavar="K", help="classes to print (default 5)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line for each video")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw what the network saw and said (one video)")
    parser.add_argument("--device", help="auto, cpu, cuda or cuda:N (default: the config's, auto)")
    arguments = parser.parse_args()
    if arguments.top_k < 1:
        raise InputError(f"--top-k is {arguments.top_k}; expected 1 or more")
    if arguments.picture and len(arguments.videos) > 1:
        raise InputError(f"--picture draws one video, but {len(arguments.videos)} are named")
    if arguments.picture and not arguments.picture.parent.is_dir():
        raise InputError(f"--picture {arguments.picture}: no such folder; make it first")
    if arguments.picture and arguments.picture.suffix.lower() not in _PICTURE_SUFFIXES:
        raise InputError(f"--picture {arguments.picture}: expected a name that ends in {', '.join(_PICTURE_SUFFIXES)}")

    from training.distributed import start_process
    from training.prediction import predict
    from training.weights import open_weights

    weights, config, adapted = open_weights(arguments.weights, arguments.config, arguments.override)
    if adapted:
        print(adapted, file=sys.stderr)
    failed = 0
    with start_process(arguments.device or config.device) as process:
        for prediction in predict(weights, config, arguments.videos, process):
            if prediction.reason is not None:
                failed += 1
                print(f"{prediction.video}: {prediction.reason}", file=sys.stderr)
            best = prediction.top(arguments.top_k, weights.classes)
            if arguments.json:
                print(json.dumps({"video": prediction.video, "error": prediction.reason, "top": best}), flush=True)
            elif best:
                print(prediction.video)
                for entry in best:
                    print(f"    {entry['probability']:.4f}  {entry['class']} ({entry['label']})", flush=True)
            if arguments.picture and prediction.reason is None:
                from training.pictures import save_prediction_picture

                data = weights.preprocessing
                save_prediction_picture(
                    arguments.picture,
                    prediction.views,
                    prediction.probabilities.tolist(),
                    weights.classes,
                    title=f"{Path(prediction.video).name}: {best[0]['class']}",
                    mean=data["mean"],
                    std=data["std"],
                )
                print(f"picture in {arguments.picture}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    run_command(main)
