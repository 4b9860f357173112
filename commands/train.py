"""Train a TimeSformer.

python train.py -c configs/demo.yaml
python train.py -c configs/pptimesformer_k400.yaml -o data.train=train.csv data.val=val.csv output=runs/one
torchrun --nproc-per-node 8 train.py -c configs/pptimesformer_k400.yaml --amp

Every setting: train.py --list-settings; those of a config with their meaning: train.py -c FILE --print-config.
On SIGTERM or SIGUSR1 (Slurm) it saves everything and exits with 75; --resume continues.
"""

import argparse
from typing import TYPE_CHECKING

from common.command_line import Parser, add_override_argument
from common.preemption import Preemption
from dali_pipelines.errors import InputError

if TYPE_CHECKING:
    from common.config import Config


def main() -> None:
    """Runs train.py."""
    parser = Parser(description="Train a TimeSformer.", epilog="Settings: --list-settings, or -c FILE --print-config.")
    parser.add_argument("-c", "--config", help="YAML file, see configs/")
    add_override_argument(parser)
    parser.add_argument(
        "--resume", action="store_true", help="continue from the newest checkpoint in the output folder"
    )
    parser.add_argument("--amp", action="store_true", help="mixed precision: bf16, or fp16 on a GPU without bf16")
    parser.add_argument("--profile", action="store_true", help="write a torch.profiler trace of four steps")
    parser.add_argument(
        "--print-config", action="store_true", help="print the resulting config with comments, as YAML, and exit"
    )
    parser.add_argument(
        "--list-settings", nargs="?", const="", metavar="PREFIX", help="explain the settings, such as optim., and exit"
    )
    parser.add_argument("--validate", action="store_true", help="accepted for users of PaddleVideo: training validates")
    parser.add_argument("--test", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("-w", "--weights", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.list_settings is not None:
        from common.settings import list_settings

        print(list_settings(arguments.list_settings))
        return
    if arguments.config is None:
        parser.error("expected -c FILE, a config such as configs/small.yaml")
    if arguments.test or arguments.weights:
        weights = arguments.weights or "WEIGHTS"
        raise InputError(
            f"training takes no -w and no --test. To test: evaluate.py -w {weights} -c {arguments.config}; to start "
            f"from these weights: train.py -c {arguments.config} -o train.pretrained={weights}"
        )
    if arguments.print_config:
        from common.settings import commented_yaml

        print(commented_yaml(_config(arguments)), end="")
        return
    with Preemption() as preemption:
        train(arguments, preemption)


def train(arguments: argparse.Namespace, preemption: Preemption) -> None:
    """Trains with the parsed arguments of train.py."""
    config = _config(arguments)  # before the imports, which take seconds

    import torch

    from common.distributed import start_process
    from training.engine import Trainer

    with start_process(config.device, timeout_s=2 * config.train.hang_timeout_s) as process:
        torch.set_num_threads(process.cores)
        Trainer(config, process, resume=arguments.resume, preemption=preemption, profile=arguments.profile).train()


def _config(arguments: argparse.Namespace) -> "Config":
    from common.config import load_config

    config = load_config(arguments.config, arguments.override)
    if arguments.amp and config.train.precision == "auto":
        config.train.precision = "amp"
    return config
