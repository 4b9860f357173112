"""Evaluates weights on a manifest: three crops a video, mean of their probabilities, every video exactly once.

python evaluate.py -w output/demo/best.safetensors -c configs/demo.yaml
python evaluate.py -w best.safetensors -o data.test=my_videos.csv
python evaluate.py -w best.safetensors -o data.num_frames=16
torchrun --nproc-per-node 8 evaluate.py -w ppTimeSformer_k400_8f.pdparams -c configs/pptimesformer_k400.yaml

Exits with 1 where a video could not be read, unless --allow-missing is given; it counts as wrong either way.
"""

import argparse
import sys

from dali_pipelines.errors import run_command


def main() -> int:
    parser = argparse.ArgumentParser(description="Evaluate weights on the videos of a manifest.")
    parser.add_argument("-w", "--weights", required=True, help="a run's best.safetensors; with -c also those of others")
    parser.add_argument("-c", "--config", help="YAML file; default: what the weights file says")
    parser.add_argument(
        "-o", "--override", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="over the config's values"
    )
    parser.add_argument(
        "--allow-missing", action="store_true", help="exit with 0 although videos cannot be read, unless none can"
    )
    arguments = parser.parse_args()

    import torch

    from training.distributed import start_process
    from training.evaluation import evaluate, manifest_for, report
    from training.weights import open_weights

    weights, config, adapted = open_weights(arguments.weights, arguments.config, arguments.override)
    manifest = manifest_for(config, weights)
    with start_process(config.device) as process:
        if process.is_main and adapted:
            print(adapted, flush=True)
        torch.set_num_threads(process.cores)
        result = evaluate(config, weights, manifest, process, progress=process.is_main and sys.stderr.isatty())
        failed = not (result.valid.any() if arguments.allow_missing else result.valid.all())
        if process.is_main:
            print(report(result, weights.classes, manifest), flush=True)
            if failed:
                remedy = "makes it 0" if result.valid.any() else "does not help where none can"
                print(
                    f"evaluate.py: exit status 1: {len(result.faults)} of {len(manifest)} videos cannot be read and "
                    f"count as wrong; --allow-missing {remedy}",
                    file=sys.stderr,
                )
        process.barrier()  # torchrun ends the others with the first that fails: not before all is said
    return int(failed)


if __name__ == "__main__":
    run_command(main)
