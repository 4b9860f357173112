"""Measures the speed of the loader, the network and training, and compares it with alternatives.

python benchmark.py loader my_videos
python benchmark.py loader a.mp4 b.webm train.csv --workers 8 --clips 512 --out output/benchmark
python benchmark.py loader my_videos --quick            # on a GPU: three minutes
python benchmark.py soak my_videos --clips 10000
python benchmark.py model --size small --batch-size 4 --compile
python benchmark.py model --device cuda --quick         # on a GPU: four minutes
python benchmark.py model --device cuda --fit
python benchmark.py model --flops -c configs/timesformer_k400.yaml
python benchmark.py train -c configs/demo.yaml -o data.workers=2 --steps 30
torchrun --nproc-per-node 8 benchmark.py train -c configs/pptimesformer_k400.yaml
"""

import argparse
import os
from pathlib import Path

from common.command_line import add_override_argument
from dali_pipelines.errors import InputError


def main() -> None:
    """Parses the command line and runs a benchmark."""
    parser = argparse.ArgumentParser(description="Measure speed and memory.")
    commands = parser.add_subparsers(dest="command", required=True)
    loader = commands.add_parser("loader", help="clips per second of our loader, other loaders and decoding alone")
    loader.add_argument("videos", nargs="+", metavar="PATH", help="videos, folders of videos, manifests (.csv)")
    loader.add_argument("--contestants", nargs="+", metavar="NAME", help="contestants to time (default: all)")
    loader.add_argument("--device", choices=["cuda", "cpu"], help="default: cuda if there is a GPU")
    loader.add_argument("--workers", type=int, help="worker processes (default: 2; on a GPU one per core)")
    loader.add_argument("--clips", type=int, default=96, help="CPU: clips to time per run, rounded up (default 96)")
    loader.add_argument("--rounds", type=int, help="runs of each contestant (default 5; on a GPU 3)")
    loader.add_argument("--num-frames", type=int, default=8, help="frames per clip (default 8)")
    loader.add_argument("--crop-size", type=int, default=224, help="side of a clip in pixels (default 224)")
    loader.add_argument("--batch-size", type=int, help="clips per batch (default 8; on a GPU 32)")
    loader.add_argument("--gop", type=int, help="CPU: measure copies of the videos with GOP N", metavar="N")
    loader.add_argument("--threads", type=int, default=16, help="GPU: threads that feed NVDEC (default 16)")
    loader.add_argument(
        "--sizes", type=int, default=24, help="GPU: number of frame sizes in the third set (default 24)"
    )
    loader.add_argument("--seconds", type=float, default=10, help="GPU: length of a run in seconds (default 10)")
    loader.add_argument("--quick", action="store_true", help="GPU: one run of 3 seconds each, three minutes in all")
    loader.add_argument(
        "--out", type=Path, default=Path("output/benchmark"), metavar="DIR", help="folder for JSON and PNG"
    )
    soak = commands.add_parser(
        "soak", help="load many clips and check that memory, open files and shared memory do not grow"
    )
    soak.add_argument("videos", nargs="+", metavar="PATH", help="videos, folders of videos, manifests (.csv)")
    soak.add_argument("--clips", type=int, default=10_000, help="clips to load (default 10000)")
    soak.add_argument("--workers", type=int, default=2, help="worker processes (default 2)")
    soak.add_argument("--batch-size", type=int, default=8, help="clips per batch (default 8)")
    soak.add_argument("--crop-size", type=int, default=224, help="side of a clip in pixels (default 224)")
    soak.add_argument("--sizes", type=int, metavar="N", help="load copies of the videos in N frame sizes")
    model = commands.add_parser("model", help="time and memory of our network and of other implementations")
    model.add_argument("--size", default="base", help="base (default), small or tiny")
    model.add_argument("--batch-size", type=int, help="clips per batch (default 2; on a GPU 8 and 32)")
    model.add_argument("--num-frames", type=int, default=8, help="frames per clip (default 8)")
    model.add_argument("--image-size", type=int, default=224, help="side of a clip in pixels (default 224)")
    model.add_argument("--rounds", type=int, help="runs of each contestant (default 5)")
    model.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="cpu (default) or cuda")
    model.add_argument(
        "--compile", action="store_true", help="CPU: also time our network under torch.compile (takes minutes)"
    )
    model.add_argument("--quick", action="store_true", help="GPU: two runs of 2 seconds each, four minutes in all")
    model.add_argument("--fit", action="store_true", help="only determine how many clips fit in a GPU's memory")
    model.add_argument("--flops", action="store_true", help="only count parameters and multiply-adds, in seconds")
    model.add_argument(
        "-c", "--config", nargs="+", default=[], metavar="FILE", help="--flops: YAML files (default: all in configs/)"
    )
    add_override_argument(model)
    model.add_argument("--out", type=Path, default=Path("output/benchmark"), metavar="DIR", help="folder for JSON")
    train = commands.add_parser("train", help="clips per second of a run's loader, its network, and both together")
    train.add_argument("-c", "--config", required=True, help="YAML file, see configs/")
    add_override_argument(train)
    train.add_argument("--steps", type=int, default=30, help="optimizer steps per run (default 30)")
    train.add_argument("--rounds", type=int, default=5, help="runs of each contestant (default 5)")
    train.add_argument(
        "--split-cores", action="store_true", help="CPU: give half the cores to the loader, half to the network"
    )
    train.add_argument("--out", type=Path, default=Path("output/benchmark"), metavar="DIR", help="folder for JSON")
    arguments = vars(parser.parse_args())
    for name, value in arguments.items():
        if type(value) is int and value < 1:
            raise InputError(f"--{name.replace('_', '-')} is {value}; expected 1 or more")

    command = arguments.pop("command")
    if command == "loader":
        _benchmark_loader(**arguments)
    elif command == "model":
        _benchmark_model(**arguments)
    elif command == "train":
        from benchmarks.train import benchmark_train

        benchmark_train(**arguments)
    else:
        from benchmarks.soak import soak as soak_loader

        soak_loader(**arguments)


def _benchmark_model(
    *, device, batch_size, rounds, compile, quick, fit, flops, config, override, size, out, **shape
) -> None:
    if (config or override) and not flops:
        raise InputError("-c and -o are for --flops; the other measurements take --size, --num-frames, --image-size")
    if flops:
        from benchmarks.flops import flops_table

        print(flops_table(config, override))
        return
    import torch

    from benchmarks.networks import SIZES

    if size not in SIZES:
        raise InputError(f"--size {size}: expected one of {', '.join(SIZES)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch finds no GPU here")
    if fit:
        from benchmarks.fit import benchmark_fit

        benchmark_fit(size=size, image_size=shape["image_size"], device=device, out=out)
    elif device == "cpu":
        from benchmarks.model import benchmark_model

        benchmark_model(size=size, **shape, batch_size=batch_size or 2, rounds=rounds or 5, compile=compile, out=out)
    else:
        from benchmarks.gpu_model import BATCH_SIZES, benchmark_gpu_model

        benchmark_gpu_model(
            size=size,
            **shape,
            batch_sizes=[batch_size] if batch_size else BATCH_SIZES,
            rounds=2 if quick else rounds or 5,
            seconds=2 if quick else 5,
            out=out,
        )


def _benchmark_loader(
    *, device, workers, clips, rounds, batch_size, gop, threads, sizes, seconds, quick, **shared
) -> None:
    import torch

    if (device or ("cuda" if torch.cuda.is_available() else "cpu")) == "cpu":
        from benchmarks.loader import benchmark_loader

        benchmark_loader(
            **shared, workers=workers or 2, clips=clips, rounds=rounds or 5, batch_size=batch_size or 8, gop=gop or 0
        )
        return
    if not torch.cuda.is_available():
        raise InputError("--device cuda: torch finds no GPU here")
    from benchmarks.gpu_loader import benchmark_gpu_loader

    benchmark_gpu_loader(
        **shared,
        workers=workers or len(os.sched_getaffinity(0)),
        threads=threads,
        rounds=1 if quick else rounds or 3,
        seconds=3 if quick else seconds,
        gop=gop or 16,
        sizes=sizes,
        batch_size=batch_size or 32,
    )
