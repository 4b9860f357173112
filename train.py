"""Trains a TimeSformer.

python train.py -c configs/demo.yaml
python train.py -c configs/pptimesformer_k400.yaml -o data.train=train.csv data.val=val.csv output=runs/one
torchrun --nproc-per-node 8 train.py -c configs/pptimesformer_k400.yaml --amp
"""

import argparse

from dali_pipelines.errors import run_command


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a TimeSformer.")
    parser.add_argument("-c", "--config", required=True, help="YAML file, see configs/")
    parser.add_argument(
        "-o", "--override", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="over the file's values"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in the output folder")
    parser.add_argument("--amp", action="store_true", help="mixed precision: bf16, or fp16 on a GPU without it")
    arguments = parser.parse_args()

    import torch

    from training.config import load_config
    from training.distributed import start_process
    from training.engine import Trainer

    config = load_config(arguments.config, arguments.override)
    if arguments.amp and config.train.precision == "auto":
        config.train.precision = "amp"
    with start_process(config.device) as process:
        torch.set_num_threads(process.cores)
        Trainer(config, process, resume=arguments.resume).train()


if __name__ == "__main__":
    run_command(main)
