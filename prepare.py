"""Makes the manifests that training reads.

python prepare.py demo --out data/demo
python prepare.py index --list val.txt --root videos --out val.csv --labels configs/labels/kinetics400.txt
python prepare.py folder my_videos --val-fraction 0.1
python prepare.py pack -m my_videos/train.csv --out packed
"""

import argparse
import datetime
import functools
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from dali_pipelines.errors import InputError, run_command
from dali_pipelines.files import absolute, is_url
from dali_pipelines.manifest import Manifest
from preparation.demo import CLASSES, render_demo
from preparation.index import Listed, Rejected, check_is_ours, index, read_folder, read_list, split, write_rejected
from preparation.pack import pack
from preparation.work import Crew, finish
from training.labels import read_labels

_SHOWN = 10  # rejected videos that are printed; all are in the file


def main() -> int:
    parser = argparse.ArgumentParser(description="Make the manifests that training reads.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    workers = argparse.ArgumentParser(add_help=False)
    workers.add_argument("--workers", type=_count, metavar="N", help="processes (default: one a CPU core)")
    crew = argparse.ArgumentParser(add_help=False, parents=[workers])
    crew.add_argument("--timeout", type=_seconds, default=60, metavar="S", help="give a file up (default 60 s)")
    crew.add_argument("--executor", choices=["processes", "dask"], default="processes", help="who does the work")
    crew.add_argument("--scheduler", metavar="ADDRESS", help="of dask, such as tcp://node1:8786")
    crew.add_argument("--shard", type=_shard, default=(0, 1), metavar="i/n", help="only part i (from 0) of n")
    looking = argparse.ArgumentParser(add_help=False, parents=[crew])
    looking.add_argument("--verify", choices=["decode"], help="decode all of every file; default: headers and packets")

    demo = verbs.add_parser("demo", parents=[workers], help="render a small data set of eight motions")
    demo.add_argument("--out", type=Path, required=True, metavar="DIR")
    demo.add_argument("--train-videos", type=_count, default=2400, metavar="N")
    demo.add_argument("--val-videos", type=_count, default=400, metavar="N")
    demo.add_argument("--seed", type=int, default=0)
    demo.set_defaults(run=_demo, **vars(looking.parse_args([])) | {"workers": None})

    listed = verbs.add_parser("index", parents=[looking], help="a manifest from a list of `path label` lines")
    listed.add_argument("--list", type=Path, required=True, help="lines `path label`, as for PaddleVideo")
    listed.add_argument("--root", default=".", metavar="DIR", help="folder, or URL, the paths are relative to")
    listed.add_argument("--out", type=Path, required=True, metavar="FILE", help="manifest to write")
    listed.add_argument("--labels", metavar="FILE", help="class names, one a line")
    listed.set_defaults(run=_index)

    folder = verbs.add_parser("folder", parents=[looking], help="manifests from a folder of videos for each class")
    folder.add_argument("folder", type=Path, metavar="DIR")
    folder.add_argument(
        "--out", type=Path, help="folder for train.csv and val.csv (default: DIR), or one file NAME.csv"
    )
    folder.add_argument("--val-fraction", type=float, default=0.1, metavar="F", help="share for val.csv (default 0.1)")
    folder.set_defaults(run=_folder)

    packing = verbs.add_parser("pack", parents=[crew], help="a manifest's videos in few large files, for shared disks")
    packing.add_argument("-m", "--manifest", type=Path, required=True, metavar="FILE")
    packing.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the shards, and a manifest")
    packing.add_argument("--shard-size", type=_gigabytes, default=3e9, metavar="GB", help="of a shard (default 3)")
    packing.add_argument("--root", metavar="DIR", help="folder, or URL, where the shards will lie (default: --out)")
    packing.set_defaults(run=_pack)

    arguments = parser.parse_args()
    return arguments.run(arguments)


def _demo(arguments: argparse.Namespace) -> int:
    if not 0 <= arguments.seed < 2**64:
        raise InputError(f"--seed is {arguments.seed}; expected 0 or more, less than 2**64")
    total = arguments.train_videos + arguments.val_videos
    with tqdm(total=total, unit="video", desc="render", dynamic_ncols=True, disable=_quiet()) as bar:
        listed = render_demo(
            arguments.out,
            train_videos=arguments.train_videos,
            val_videos=arguments.val_videos,
            seed=arguments.seed,
            workers=arguments.workers or len(os.sched_getaffinity(0)),
            progress=lambda done, _: bar.update(done - bar.n),
        )
    for name, entries in listed.items():
        _write(entries, arguments.out / f"{name}.csv", arguments.out, CLASSES, arguments)
    return 0


def _index(arguments: argparse.Namespace) -> int:
    classes = read_labels(arguments.labels) if arguments.labels else ()
    _write(read_list(arguments.list), arguments.out, arguments.root, classes, arguments)
    return 0


def _folder(arguments: argparse.Namespace) -> int:
    if not 0 <= arguments.val_fraction < 1:
        raise InputError(f"--val-fraction is {arguments.val_fraction}; expected 0 or more, less than 1")
    out = arguments.out or arguments.folder
    if arguments.out and out.suffix not in ("", ".csv"):
        raise InputError(f"--out {out}: expected a folder, or a file name that ends in .csv")
    listed, classes = read_folder(arguments.folder)
    if out.suffix == ".csv":
        _write(listed, out, arguments.folder, classes, arguments)
        return 0
    for name, entries in zip(("train", "val"), split(listed, arguments.val_fraction), strict=True):
        if entries:
            _write(entries, out / f"{name}.csv", arguments.folder, classes, arguments)
        else:
            print(f"{out / name}.csv: not written; no class has a video to spare, or --val-fraction is 0")
    return 0


def _pack(arguments: argparse.Namespace) -> int:
    out = arguments.out / f"{arguments.manifest.stem}.csv"
    check_is_ours(out)
    crew = _crew(arguments, out.stem, unit="shard")
    manifest, rejected = pack(arguments.manifest, arguments.out, shard_bytes=arguments.shard_size, crew=crew)
    if manifest is None:
        _say_part(out, crew)
        return 0
    if arguments.root:
        manifest.root = arguments.root if is_url(arguments.root) else Path(arguments.root)
    _save(manifest, rejected, out, f"none of the videos of {arguments.manifest} can be packed")
    print(f"{out}: {len(manifest)} of {manifest.listed} videos in {len(manifest.shards)} shards")
    return 0


def _crew(arguments: argparse.Namespace, name: str, unit: str = "video") -> Crew:
    if arguments.scheduler and arguments.executor != "dask":
        raise InputError("--scheduler is for --executor dask")
    if arguments.executor == "dask" and not arguments.scheduler:
        raise InputError("--executor dask needs --scheduler ADDRESS, such as tcp://node1:8786")
    return Crew(
        workers=arguments.workers,
        scheduler=arguments.scheduler,
        timeout_s=arguments.timeout,
        shard=arguments.shard,
        progress=functools.partial(tqdm, unit=unit, desc=name, dynamic_ncols=True, disable=_quiet()),
    )


def _write(
    listed: Sequence[Listed], out: Path, root: str | Path, classes: Sequence[str], arguments: argparse.Namespace
) -> None:
    """Looks at the videos, writes the manifest and, beside it, what was rejected; says what was found."""
    check_is_ours(out)
    journal = out.with_name(f"{out.name}.journal")
    crew = _crew(arguments, out.name)
    decode = arguments.verify == "decode"
    manifest, rejected = index(listed, root=root, journal=journal, crew=crew, classes=classes, decode=decode)
    if not crew.is_whole:
        _say_part(out, crew)
        return
    if not len(manifest):
        finish(journal)  # a wrong --root, a disk that is not there: not to be remembered
    _save(manifest, rejected, out, f"none of the {len(listed)} listed videos can be read below {absolute(root)}")
    finish(journal)
    print(f"{out}: {len(manifest)} of {len(listed)} videos, {len(set(manifest.labels.tolist()))} classes")


def _say_part(out: Path, crew: Crew) -> None:
    print(
        f"{out}: part {crew.shard[0]} of {crew.shard[1]} is done; when all are, the same command without --shard "
        "writes it"
    )


def _save(manifest: Manifest, rejected: Sequence[Rejected], out: Path, if_none: str) -> None:
    """Writes the manifest and, beside it, what was rejected; says that. `InputError` `if_none` are left."""
    rejected_file = out.with_name(f"{out.stem}.rejected.csv")
    for entry in rejected[:_SHOWN]:
        print(f"{entry.path}: {entry.reason}")
    if len(rejected) > _SHOWN:
        print(f"... and {len(rejected) - _SHOWN} more, in {rejected_file}")
    if not len(manifest):
        raise InputError(f"{if_none}; nothing written")
    manifest.made_by = _command()
    manifest.write(out)
    write_rejected(rejected_file, rejected)


def _command() -> str:
    return f"{shlex.join(['prepare.py', *sys.argv[1:]])} ({datetime.date.today()})"


def _shard(text: str) -> tuple[int, int]:
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and int(part) < int(parts)):
        raise argparse.ArgumentTypeError(f"{text!r}; expected i/n with i from 0 to n - 1, such as 0/8")
    return int(part), int(parts)


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("expected 1 or more")
    return value


def _gigabytes(text: str) -> float:
    """Bytes."""
    value = float(text) * 1e9
    if not value > 0:
        raise argparse.ArgumentTypeError("expected more than 0 gigabytes")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError("expected more than 0 seconds")
    return value


def _quiet() -> bool:
    return not sys.stderr.isatty()


if __name__ == "__main__":
    run_command(main)
