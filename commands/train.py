"""Train a TimeSformer.

python train.py -c configs/demo.yaml
python train.py -c configs/pptimesformer_k400.yaml -o data.train=train.csv data.val=val.csv output=runs/one
torchrun --nproc-per-node 8 train.py -c configs/pptimesformer_k400.yaml --amp

On SIGTERM or SIGUSR1 (Slurm) it saves everything and exits with 75; --resume continues.
"""

import argparse

from common.command_line import add_override_argument
from common.preemption import Preemption


def main() -> None:
    """Runs train.py."""
    parser = argparse.ArgumentParser(description="Train a TimeSformer.")
    parser.add_argument("-c", "--config", required=True, help="YAML file, see configs/")
    add_override_argument(parser)
    parser.add_argument(
        "--resume", action="store_true", help="continue from the newest checkpoint in the output folder"
    )
    parser.add_argument("--amp", action="store_true", help="mixed precision: bf16, or fp16 on a GPU without bf16")
    parser.add_argument("--profile", action="store_true", help="write a torch.profiler trace of four steps")
    arguments = parser.parse_args()
    with Preemption() as preemption:
        train(arguments, preemption)


def train(arguments: argparse.Namespace, preemption: Preemption) -> None:
    """Trains with the parsed arguments of train.py."""
    import torch

    from common.config import load_config
    from common.distributed import start_process
    from training.engine import Trainer

    config = load_config(arguments.config, arguments.override)
    if arguments.amp and config.train.precision == "auto":
        config.train.precision = "amp"
    with start_process(config.device, timeout_s=2 * config.train.hang_timeout_s) as process:
        torch.set_num_threads(process.cores)
        Trainer(config, process, resume=arguments.resume, preemption=preemption, profile=arguments.profile).train()
