"""Evaluates weights on a manifest: three crops a video, mean of their probabilities, every video exactly once.

python evaluate.py -w output/demo/best.safetensors -c configs/demo.yaml
python evaluate.py -w best.safetensors -o data.test=my_videos.csv
torchrun --nproc-per-node 8 evaluate.py -w best.safetensors -c configs/pptimesformer_k400.yaml
"""

import argparse
import sys

from dali_pipelines.errors import run_command


def main() -> int:
    parser = argparse.ArgumentParser(description="Evaluate weights on the videos of a manifest.")
    parser.add_argument("-w", "--weights", required=True, help="best.safetensors or last.safetensors of a run")
    parser.add_argument("-c", "--config", help="YAML file; default: what the weights file says")
    parser.add_argument(
        "-o", "--override", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="over the config's values"
    )
    arguments = parser.parse_args()

    import torch

    from training.checkpoints import load_weights
    from training.distributed import start_process
    from training.evaluation import config_for, evaluate, manifest_for, report

    weights = load_weights(arguments.weights)
    config = config_for(weights, arguments.config, arguments.override)
    manifest = manifest_for(config, weights)
    with start_process(config.device) as process:
        torch.set_num_threads(process.cores)
        result = evaluate(config, weights, manifest, process, progress=process.is_main and sys.stderr.isatty())
        if process.is_main:
            print(report(result, weights.classes, manifest))
    return 0 if result.valid.any() else 1


if __name__ == "__main__":
    run_command(main)
