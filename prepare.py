"""Makes the manifests that training reads.

python prepare.py demo --out data/demo
python prepare.py index --list val.txt --root videos --out val.csv --labels configs/labels/kinetics400.txt
python prepare.py folder my_videos --val-fraction 0.1
"""

import argparse
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from tqdm import tqdm

from dali_pipelines.errors import InputError, run_command
from preparation import index as indexing
from preparation.demo import CLASSES, render_demo
from training.labels import read_labels

_SHOWN = 10  # rejected videos that are printed; all are in the file


def main() -> int:
    parser = argparse.ArgumentParser(description="Make the manifests that training reads.")
    verbs = parser.add_subparsers(dest="verb", required=True)

    demo = verbs.add_parser("demo", help="render a small data set of eight motions")
    demo.add_argument("--out", type=Path, required=True, metavar="DIR")
    demo.add_argument("--train-videos", type=_count, default=2400, metavar="N")
    demo.add_argument("--val-videos", type=_count, default=400, metavar="N")
    demo.add_argument("--seed", type=int, default=0)

    index = verbs.add_parser("index", help="a manifest from a list of `path label` lines")
    index.add_argument("--list", type=Path, required=True, help="lines `path label`, as for PaddleVideo")
    index.add_argument("--root", type=Path, default=Path(), metavar="DIR", help="folder the paths are relative to")
    index.add_argument("--out", type=Path, required=True, metavar="FILE", help="manifest to write")
    index.add_argument("--labels", metavar="FILE", help="class names, one a line")

    folder = verbs.add_parser("folder", help="manifests from a folder that holds a folder of videos for each class")
    folder.add_argument("folder", type=Path, metavar="DIR")
    folder.add_argument(
        "--out", type=Path, help="folder for train.csv and val.csv (default: DIR), or one file NAME.csv"
    )
    folder.add_argument("--val-fraction", type=float, default=0.1, metavar="F", help="share for val.csv (default 0.1)")

    for verb in (demo, index, folder):
        verb.add_argument("--workers", type=_count, metavar="N", help="processes (default: one a CPU core)")
    arguments = parser.parse_args()
    return {"demo": _demo, "index": _index, "folder": _folder}[arguments.verb](arguments)


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
        _write(entries, arguments.out / f"{name}.csv", arguments.out, CLASSES, arguments.workers)
    return 0


def _index(arguments: argparse.Namespace) -> int:
    classes = read_labels(arguments.labels) if arguments.labels else ()
    _write(indexing.read_list(arguments.list), arguments.out, arguments.root, classes, arguments.workers)
    return 0


def _folder(arguments: argparse.Namespace) -> int:
    if not 0 <= arguments.val_fraction < 1:
        raise InputError(f"--val-fraction is {arguments.val_fraction}; expected 0 or more, less than 1")
    out = arguments.out or arguments.folder
    if arguments.out and out.suffix not in ("", ".csv"):
        raise InputError(f"--out {out}: expected a folder, or a file name that ends in .csv")
    listed, classes = indexing.read_folder(arguments.folder)
    if out.suffix == ".csv":
        _write(listed, out, arguments.folder, classes, arguments.workers)
        return 0
    for name, entries in zip(("train", "val"), indexing.split(listed, arguments.val_fraction), strict=True):
        if entries:
            _write(entries, out / f"{name}.csv", arguments.folder, classes, arguments.workers)
        else:
            print(f"{out / name}.csv: not written; no class has a video to spare, or --val-fraction is 0")
    return 0


def _write(
    listed: Sequence[indexing.Listed], out: Path, root: Path, classes: Sequence[str], workers: int | None
) -> None:
    """Probes the videos, writes the manifest and, beside it, what was rejected; says what was found."""

    def progress(results: Iterable) -> Iterable:
        return tqdm(results, total=len(listed), unit="video", desc=out.name, dynamic_ncols=True, disable=_quiet())

    manifest, rejected = indexing.index(listed, root=root, classes=classes, workers=workers, progress=progress)
    for entry in rejected[:_SHOWN]:
        print(f"{entry.path}: {entry.reason}")
    rejected_file = out.with_name(f"{out.stem}.rejected.csv")
    if len(rejected) > _SHOWN:
        print(f"... and {len(rejected) - _SHOWN} more, in {rejected_file}")
    if not len(manifest):
        raise InputError(f"none of the {len(listed)} listed videos can be read below {root.resolve()}; nothing written")
    manifest.write(out)
    indexing.write_rejected(rejected_file, rejected)
    print(f"{out}: {len(manifest)} of {len(listed)} videos, {len(set(manifest.labels.tolist()))} classes")


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("expected 1 or more")
    return value


def _quiet() -> bool:
    return not sys.stderr.isatty()


if __name__ == "__main__":
    run_command(main)
