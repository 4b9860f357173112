"""Averages or converts weights files.

python weights.py average output/k400/epoch_18.safetensors output/k400/epoch_19.safetensors --out swa.safetensors
python weights.py convert ppTimeSformer_k400_8f.pdparams -c configs/pptimesformer_k400.yaml --out k400.safetensors
"""

import argparse
from pathlib import Path

from common.command_line import add_override_argument
from dali_pipelines.errors import InputError


def main() -> None:
    """Runs weights.py."""
    parser = argparse.ArgumentParser(description="Average or convert weights files.")
    commands = parser.add_subparsers(dest="command", required=True)
    average = commands.add_parser("average", help="average the weights of one network (SWA)")
    average.add_argument("weights", nargs="+", metavar="FILE", help="weights files of train.py, all of one network")
    convert = commands.add_parser("convert", help="save third-party weights and their config in one file")
    convert.add_argument("weights", metavar="FILE", help="weights as for train.pretrained, including the head")
    convert.add_argument("-c", "--config", required=True, help="YAML file; needs data.labels")
    add_override_argument(convert)
    for command in (average, convert):
        command.add_argument("--out", required=True, type=Path, metavar="FILE", help="a new .safetensors file")
    arguments = parser.parse_args()
    if arguments.out.suffix != ".safetensors":
        raise InputError(f"--out {arguments.out}: expected a name that ends in .safetensors")
    if arguments.out.exists():
        raise InputError(f"--out {arguments.out}: already exists; name a new file")

    from common.weights import average_weights, open_weights, save_weights

    if arguments.command == "average":
        weights = average_weights(arguments.weights)
        origin = f"mean of {len(arguments.weights)} files"
    else:
        weights, _, origin = open_weights(arguments.weights, arguments.config, arguments.override)
    save_weights(arguments.out, weights)
    print(origin or "already in the format of train.py")
    print(f"saved to {arguments.out}: {len(weights.classes)} classes")
