"""Makes the manifests that training reads, and estimates whether decoding will keep up with training.

python prepare.py demo --out data/demo
python prepare.py index --list val.txt --root videos --out val.csv --labels configs/labels/kinetics400.txt
python prepare.py folder my_videos --val-fraction 0.1
python prepare.py frames --list train_frames.txt --root rawframes --out train.csv
python prepare.py huggingface my_dataset --out data/my_dataset
python prepare.py budget -c configs/pptimesformer_k400.yaml --gpus 8
python prepare.py budget -m train.csv -c configs/pptimesformer_k400.yaml --gpu a100 --gpus 8
python prepare.py transcode -m my_videos/train.csv --out small_videos
python prepare.py pack -m my_videos/train.csv --out packed
"""

import argparse
import contextlib
import copy
import datetime
import functools
import json
import math
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from tqdm import tqdm

from common.command_line import add_override_argument
from common.labels import read_labels
from common.locking import FolderLock
from common.worker_pool import WorkerPool, remove_journals
from dali_pipelines.errors import InputError
from dali_pipelines.files import is_url
from dali_pipelines.folders import frame_folders_below, videos_below
from dali_pipelines.gpus import find_gpu
from dali_pipelines.host_decoder import MAX_PIXELS
from dali_pipelines.manifest import Manifest
from preparation.datasets import (
    Expected,
    FoundSplit,
    Store,
    check_class_order,
    hmdb51_annotations,
    kinetics_classes,
    read_annotations,
    ssv2_annotations,
    ucf101_annotations,
)
from preparation.demo import CLASSES, render_demo
from preparation.frames import read_frame_list
from preparation.huggingface import download, read_dataset
from preparation.index import (
    Listed,
    Part,
    Rejected,
    check_overwritable,
    check_root,
    copies_between,
    few_for_validation,
    index,
    names_alike,
    odd_labels,
    read_folder,
    read_listed,
    split_train_val,
    summary,
    write_rejected,
    write_table,
)
from preparation.pack import pack
from preparation.transcode import CODECS as ENCODERS
from preparation.transcode import Job, Settings, size_text

_SHOWN = 10  # rejected videos to print; the file lists all


def main() -> None:
    """Parses the command line and runs a subcommand."""
    parser = argparse.ArgumentParser(description="Make the manifests that training reads.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    workers = argparse.ArgumentParser(add_help=False)
    workers.add_argument("--workers", type=_count, metavar="N", help="processes (default: one per CPU core)")
    pool = argparse.ArgumentParser(add_help=False, parents=[workers])
    pool.add_argument(
        "--timeout",
        type=_seconds,
        default=60,
        metavar="S",
        help="reject a file that takes longer (default %(default)g s)",
    )
    pool.add_argument(
        "--executor", choices=["processes", "dask"], default="processes", help="run on this machine, or on dask workers"
    )
    pool.add_argument("--scheduler", metavar="ADDRESS", help="address of the dask scheduler, such as tcp://node1:8786")
    pool.add_argument("--shard", type=_shard, default=(0, 1), metavar="i/n", help="process only part i (from 0) of n")
    probing = argparse.ArgumentParser(add_help=False, parents=[pool])
    probing.add_argument(
        "--max-pixels",
        type=_count,
        default=MAX_PIXELS,
        metavar="N",
        help="reject videos with larger frames (default: twice 8K)",
    )
    probing.add_argument(
        "--verify", choices=["decode"], help="decode every file completely; default: headers and packets"
    )
    probing.set_defaults(fps=None, find=videos_below)

    demo = verbs.add_parser("demo", parents=[workers], help="render a small data set of eight motions")
    demo.add_argument("--out", type=Path, required=True, metavar="DIR")
    demo.add_argument("--train-videos", type=_count, default=2400, metavar="N")
    demo.add_argument("--val-videos", type=_count, default=400, metavar="N")
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument(
        "--motions",
        nargs="+",
        choices=CLASSES,
        default=CLASSES,
        metavar="MOTION",
        help=f"classes, of which there are {', '.join(CLASSES)} (default: all)",
    )
    demo.set_defaults(run=_demo, **vars(probing.parse_args([])) | {"workers": None})

    listed = verbs.add_parser("index", parents=[probing], help="make a manifest from a list of videos and labels")
    listed.add_argument(
        "--list",
        type=Path,
        required=True,
        help="lines `path label`, as for PaddleVideo, or CSV `path,label`; in CSV, labels may be class names",
    )
    listed.add_argument("--root", default=".", metavar="DIR", help="folder or URL that paths are relative to")
    listed.add_argument(
        "--out", type=Path, required=True, help="manifest NAME.csv to write, or a folder for train.csv and val.csv"
    )
    listed.add_argument(
        "--val-fraction", type=float, default=0.1, metavar="F", help="with a folder: share for val.csv (default 0.1)"
    )
    listed.add_argument(
        "--classes",
        "--labels",
        metavar="FROM",
        help="class names: a file with one per line, or a manifest with the same classes",
    )
    listed.set_defaults(run=_index)

    folder = verbs.add_parser(
        "folder", parents=[probing], help="make manifests from a folder with one folder of videos per class"
    )
    folder.add_argument("folder", type=Path, metavar="DIR")
    folder.add_argument(
        "--out", type=Path, help="folder for train.csv and val.csv (default: DIR), or a single manifest NAME.csv"
    )
    folder.add_argument("--val-fraction", type=float, default=0.1, metavar="F", help="share for val.csv (default 0.1)")
    folder.add_argument(
        "--classes",
        metavar="FROM",
        help="for more splits: a manifest, or a file of class names, that defines the labels (default: the folders)",
    )
    folder.set_defaults(run=_folder)

    frames = verbs.add_parser(
        "frames", parents=[probing], help="make manifests of videos that are folders of JPEG or PNG frames"
    )
    frames.add_argument(
        "folder", type=Path, nargs="?", metavar="DIR", help="folder with one folder per class, with frame folders in it"
    )
    frames.add_argument("--list", type=Path, metavar="FILE", help="or a list of `frame_dir total_frames label` lines")
    frames.add_argument("--root", default=".", metavar="DIR", help="with --list: what its folders are relative to")
    frames.add_argument(
        "--out", type=Path, help="manifest NAME.csv; with DIR also a folder for train.csv and val.csv (default: DIR)"
    )
    frames.add_argument("--fps", type=_positive, default=30, metavar="N", help="frames per second (default 30)")
    frames.add_argument(
        "--val-fraction", type=float, default=0.1, metavar="F", help="with DIR: share for val.csv (default 0.1)"
    )
    frames.add_argument(
        "--classes", "--labels", metavar="FROM", help="class names: a file with one per line, or a manifest"
    )
    frames.set_defaults(run=_frames, find=frame_folders_below)

    for count, name in ((400, "k400"), (600, "k600"), (700, "k700")):
        kinetics = verbs.add_parser(
            f"kinetics{count}", parents=[probing], help=f"make manifests of Kinetics-{count} from its annotations"
        )
        kinetics.add_argument(
            "--annotations",
            type=Path,
            nargs="+",
            required=True,
            metavar="FILE",
            help="official CSV files, or lists of `path label`",
        )
        kinetics.add_argument("--videos", required=True, metavar="DIR", help="folder or URL that holds all videos")
        kinetics.add_argument(
            "--out", type=Path, default=Path("data", name), metavar="DIR", help=f"default: data/{name}"
        )
        kinetics.add_argument("--labels", metavar="FILE", help="class names, one per line")
        kinetics.set_defaults(run=_kinetics, classes=count)

    for name, lists, annotations in (
        ("ucf101", "ucfTrainTestlist", ucf101_annotations),
        ("hmdb51", "of CLASS_test_splitN.txt", hmdb51_annotations),
    ):
        splits = verbs.add_parser(name, parents=[probing], help=f"make manifests of {name.upper()} from its splits")
        splits.add_argument("--splits", type=Path, required=True, metavar="DIR", help=f"the folder {lists}")
        splits.add_argument("--videos", required=True, metavar="DIR", help="folder or URL that holds all videos")
        splits.add_argument("--split", type=int, choices=[1, 2, 3], default=1, help="split to use (default 1)")
        splits.add_argument(
            "--out", type=Path, metavar="DIR", help=f"default: data/{name} for split 1, data/{name}_split2, ..."
        )
        splits.set_defaults(run=functools.partial(_splits, name, annotations))

    ssv2 = verbs.add_parser("ssv2", parents=[probing], help="make manifests of Something-Something V2")
    ssv2.add_argument(
        "--annotations",
        type=Path,
        nargs="+",
        required=True,
        metavar="FILE",
        help="something-something-v2-train.json and -validation.json",
    )
    ssv2.add_argument("--labels", type=Path, required=True, metavar="FILE", help="something-something-v2-labels.json")
    ssv2.add_argument("--videos", required=True, metavar="DIR", help="folder or URL that holds all videos")
    ssv2.add_argument("--out", type=Path, default=Path("data/ssv2"), metavar="DIR", help="default: data/ssv2")
    ssv2.set_defaults(run=_ssv2)

    hugging_face = verbs.add_parser("huggingface", parents=[probing], help="make manifests of a Hugging Face dataset")
    hugging_face.add_argument("dataset", metavar="NAME_OR_DIR", help="a dataset on the hub, or a folder with its files")
    hugging_face.add_argument("--out", type=Path, metavar="DIR", help="folder for the manifests (default: data/NAME)")
    hugging_face.add_argument(
        "--files", metavar="PATTERN", help="files to read, such as 'data/train-*.parquet' (default: all)"
    )
    hugging_face.add_argument("--video-column", metavar="NAME", help="default: the only column of videos")
    hugging_face.add_argument("--label-column", metavar="NAME", help="default: the only ClassLabel, or `label`")
    hugging_face.add_argument(
        "--val-fraction",
        type=float,
        default=0.1,
        metavar="F",
        help="share of train for val.csv if neither a validation nor a test split has labels (default 0.1)",
    )
    hugging_face.add_argument(
        "--classes", metavar="FROM", help="class names: a file with one per line, or a manifest with the same classes"
    )
    hugging_face.set_defaults(run=_hugging_face)

    budget = verbs.add_parser(
        "budget", help="estimate hours, GPU memory and disk of a run, and whether decoding keeps up with it"
    )
    budget.add_argument(
        "-m", "--manifest", metavar="FILE", help="manifest of the training videos, to sample (default: Kinetics-400)"
    )
    budget.add_argument("--videos", type=_count, metavar="N", help="without -m: number of training videos")
    budget.add_argument("-c", "--config", metavar="FILE", help="YAML file of the run (default: ViT-B, 8 frames)")
    add_override_argument(budget)
    budget.add_argument("--gpu", metavar="NAME", help="training GPU: a100, h100, h200, ... (default: measure here)")
    budget.add_argument("--gpus", type=_count, default=1, metavar="N", help="number of GPUs (default 1)")
    budget.add_argument(
        "--cores", type=_count, metavar="N", help="CPU cores of the training machine (default: as here)"
    )
    budget.add_argument("--network-clips", type=_positive, metavar="N", help="measured clips/s of training on one GPU")
    budget.add_argument("--samples", type=_count, default=200, metavar="N", help="videos to sample (default 200)")
    budget.add_argument("--json", action="store_true", help="print the numbers as JSON")
    budget.set_defaults(run=_budget)

    patient = copy.deepcopy(pool)
    patient.set_defaults(timeout=600)
    transcode = verbs.add_parser("transcode", parents=[patient], help="make copies of the videos that decode fast")
    transcode.add_argument("-m", "--manifest", type=Path, required=True, metavar="FILE")
    transcode.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder for the copies and their manifest"
    )
    transcode.add_argument(
        "--short-side",
        type=_count,
        default=256,
        metavar="PIXELS",
        help="largest short side of the copies (default 256)",
    )
    transcode.add_argument("--gop", type=_count, default=16, metavar="N", help="frames per GOP (default 16)")
    transcode.add_argument("--codec", choices=list(ENCODERS), default="h264")
    crfs = ", ".join(f"{name} {codec.crf}" for name, codec in ENCODERS.items())
    transcode.add_argument(
        "--crf", type=int, metavar="N", help=f"quality; lower is better, with larger files (default: {crfs})"
    )
    transcode.set_defaults(run=_transcode)

    packing = verbs.add_parser("pack", parents=[pool], help="pack the videos into a few large files, for shared disks")
    packing.add_argument("-m", "--manifest", type=Path, required=True, metavar="FILE")
    packing.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder for the shards and their manifest"
    )
    packing.add_argument("--shard-size", type=_gigabytes, default=3e9, metavar="GB", help="size of a shard (default 3)")
    packing.add_argument("--root", metavar="DIR", help="folder or URL where the shards will be (default: --out)")
    packing.set_defaults(run=_pack)

    arguments = parser.parse_args()
    with contextlib.ExitStack() as arguments.locks:
        arguments.run(arguments)


def _lock(arguments: argparse.Namespace, *manifests: Path) -> None:
    """Keeps others from writing these manifests, or the same part of them, until this command ends: their copies,
    shards and splits would be mixed. Raises `InputError`."""
    part, parts = arguments.shard
    suffix = ".lock" if parts == 1 else f".{part}-of-{parts}.lock"
    for out in manifests:
        lock = FolderLock(
            out.parent, name=f"{out.name}{suffix}", remedy="wait until it has ended, or name another --out"
        )
        arguments.locks.callback(lock.release)
        if lock.note:
            print(lock.note)


def _demo(arguments: argparse.Namespace) -> None:
    if not 0 <= arguments.seed < 2**64:
        raise InputError(f"--seed is {arguments.seed}; expected 0 or more, less than 2**64")
    motions = tuple(dict.fromkeys(arguments.motions))
    _lock(arguments, *(arguments.out / f"{name}.csv" for name in ("train", "val")))
    total = arguments.train_videos + arguments.val_videos
    with tqdm(total=total, unit="video", desc="render", dynamic_ncols=True, disable=_quiet()) as bar:
        listed = render_demo(
            arguments.out,
            train_videos=arguments.train_videos,
            val_videos=arguments.val_videos,
            seed=arguments.seed,
            workers=arguments.workers or len(os.sched_getaffinity(0)),
            motions=motions,
            progress=lambda done, _: bar.update(done - bar.n),
        )
    for name, entries in listed.items():
        _write_manifest(entries, arguments.out / f"{name}.csv", arguments.out, motions, arguments)


def _index(arguments: argparse.Namespace) -> None:
    _check_fraction(arguments)
    named = read_labels(arguments.classes) if arguments.classes else ()
    listed, classes = read_listed(arguments.list, arguments.root, named)
    _check_root(arguments, [path for path, _ in listed])
    if classes != named:
        print(f"{arguments.list}: {len(classes)} class names; label 0 is {classes[0]!r}, in alphabetical order")
    _warn(arguments, listed, classes)
    _write_split(listed, arguments.out, arguments.root, classes, arguments, classes_from=arguments.classes or "")


def _check_root(arguments: argparse.Namespace, listed: Sequence[str]) -> None:
    if arguments.executor == "processes":  # the workers of dask may see other disks
        check_root(listed, arguments.root, [Path(), arguments.list.parent])


def _warn(arguments: argparse.Namespace, listed: Sequence[Listed], classes: Sequence[str]) -> None:
    for note in odd_labels(listed, classes):
        print(f"warning: {arguments.list}: {note}")


def _check_fraction(arguments: argparse.Namespace) -> None:
    if not 0 <= arguments.val_fraction < 1:
        raise InputError(f"--val-fraction is {arguments.val_fraction}; expected 0 or more, less than 1")


def _folder(arguments: argparse.Namespace) -> None:
    _check_fraction(arguments)
    out = arguments.out or arguments.folder
    if arguments.out and out.suffix not in ("", ".csv"):
        raise InputError(f"--out {out}: expected a folder, or a file name that ends in .csv")
    classes = read_labels(arguments.classes) if arguments.classes else ()
    listed, classes, note = read_folder(arguments.folder, classes, arguments.find)
    if note:
        print(f"{arguments.folder}: {note}")
    _write_split(listed, out, arguments.folder, classes, arguments)


def _write_split(
    listed: Sequence[Listed],
    out: Path,
    root: str | os.PathLike,
    classes: Sequence[str],
    arguments: argparse.Namespace,
    classes_from: str = "",
) -> None:
    """Writes the manifest `out`, or if that is a folder, train.csv and val.csv in it; prints warnings about the data.
    See `_write_manifest`."""
    parts = {out: listed}
    if out.is_dir() or not out.suffix:
        train, val = split_train_val(listed, arguments.val_fraction)
        parts = {out / "train.csv": train, out / "val.csv": val}
    for file in parts:
        check_overwritable(file)
    _lock(arguments, *parts)
    manifests: dict[str, Manifest] = {}
    for file, entries in parts.items():
        if not entries:
            print(f"{file}: not written; no class has a video to spare, or --val-fraction is 0")
        elif manifest := _write_manifest(entries, file, root, classes, arguments, classes_from=classes_from):
            manifests[file.stem] = manifest
    warnings = [names_alike(classes), copies_between(manifests)]
    if len(manifests) == 2:
        train, val = ([(video.path, video.label) for video in manifest] for manifest in manifests.values())
        names = classes or range(1 + max(label for _, label in listed))
        warnings.append(few_for_validation(train, val, names))
    for warning in filter(None, warnings):
        print(f"warning: {warning}")


def _frames(arguments: argparse.Namespace) -> None:
    if (arguments.folder is None) == (arguments.list is None) or (arguments.list and not arguments.out):
        raise InputError("expected: prepare.py frames DIR, or: prepare.py frames --list LIST --root DIR --out FILE.csv")
    print(f"taken as {arguments.fps:g} frames/s, as image files have no frame rate; set it with --fps")
    if arguments.list is None:
        _folder(arguments)
        return
    check_overwritable(arguments.out)
    classes = read_labels(arguments.classes) if arguments.classes else ()
    listed, rejected, differing = read_frame_list(arguments.list, arguments.root)
    if not listed:
        _check_root(arguments, [each.path for each in rejected])
    _warn(arguments, listed, classes)
    _lock(arguments, arguments.out)
    _write_manifest(
        listed,
        arguments.out,
        arguments.root,
        classes,
        arguments,
        rejected=rejected,
        classes_from=arguments.classes or "",
    )
    if differing:
        file = arguments.out.with_name(f"{arguments.out.stem}.differing.csv")
        write_table(file, ("folder", "listed", "found"), differing)
        folder, expected, count = differing[0]
        print(
            f"{len(differing)} of {len(listed)} folders have more or fewer frames than the list says, and are used as "
            f"they are: {folder} has {count}, not {expected}; all in {file}"
        )


def _kinetics(arguments: argparse.Namespace) -> None:
    classes = kinetics_classes(arguments.classes, arguments.annotations, arguments.labels)
    expected = [each for path in arguments.annotations for each in read_annotations(path, classes)]
    _write_splits(expected, classes, arguments.out, arguments, longest_s=12)  # Kinetics clips last 10 s


def _splits(
    name: str,
    annotations: Callable[[Path, int], tuple[list[Expected], tuple[str, ...]]],
    arguments: argparse.Namespace,
) -> None:
    """UCF101 and HMDB51, which come with three splits."""
    expected, classes = annotations(arguments.splits, arguments.split)
    folder = name if arguments.split == 1 else f"{name}_split{arguments.split}"
    _write_splits(expected, classes, arguments.out or Path("data", folder), arguments)


def _ssv2(arguments: argparse.Namespace) -> None:
    expected, classes = ssv2_annotations(arguments.annotations, arguments.labels)
    _write_splits(expected, classes, arguments.out, arguments)
    print("Some classes differ only in left and right: train with -o data.flip=false")


def _hugging_face(arguments: argparse.Namespace) -> None:
    _check_fraction(arguments)
    root = Path(arguments.dataset)
    if root.is_file():
        root, arguments.files = root.parent, root.name
    out = arguments.out or Path("data", root.resolve().name)
    if not root.is_dir():
        root = download(arguments.dataset, arguments.files or "*.parquet")
        print(f"{arguments.dataset}: in {root}")
    splits, classes = read_dataset(
        root,
        out,
        pattern=arguments.files,
        video_column=arguments.video_column,
        label_column=arguments.label_column,
        classes=read_labels(arguments.classes) if arguments.classes else (),
    )
    manifests = {}
    for name, rows in splits.items():
        others = len(rows.listed) - len(rows.parts) - rows.written
        print(
            f"{name}: {len(rows.parts)} videos read in place, {rows.written} written into {out / 'videos'}, "
            f"{others} files of their own, {rows.unlabelled} left out for having no label"
            + (f", {rows.without_video} for having no video" if rows.without_video else "")
        )
        if len(rows.folders) > 1:
            first = shlex.quote(next(iter(rows.folders.values())))
            print(
                f"warning: {name}: videos of {len(rows.folders)} folders: {', '.join(rows.folders)}; if these are "
                f"configurations of the dataset, read one: --files {first}"
            )
        manifests[name] = rows.listed
    if [name for name, listed in manifests.items() if listed] == ["train"] and arguments.val_fraction:
        manifests["train"], manifests["val"] = split_train_val(splits["train"].listed, arguments.val_fraction)
        print(
            f"no validation or test split with labels: {len(manifests['val'])} videos of train are val (--val-fraction)"
        )
    parts = {name: part for rows in splits.values() for name, part in rows.parts.items()}
    files = {name: out / f"{name}.csv" for name, listed in manifests.items() if listed}
    for file in files.values():
        check_overwritable(file)
    _lock(arguments, *files.values())
    for name, file in files.items():
        _write_manifest(manifests[name], file, root, classes, arguments, parts=parts)
    if not files:
        raise InputError(f"{arguments.dataset}: no row has a video and a label, so there is nothing to write")
    if "val" not in files and "test" in files:
        print(f"no validation split: to validate on the test split, train with -o data.val={files['test']}")


def _write_splits(
    expected: list[Expected],
    classes: Sequence[str],
    out: Path,
    arguments: argparse.Namespace,
    longest_s: float = math.inf,
) -> None:
    """Finds the expected videos and writes a manifest per split, with lists of missing and duplicated videos. Raises
    `InputError` if a split has no videos at all."""
    store = Store(arguments.videos)
    if store.passed_over:
        print(f"{store.root}: {store.passed_over}")
    splits = store.find(list(dict.fromkeys(expected)))
    for name in splits:
        check_overwritable(out / f"{name}.csv")
    _lock(arguments, *(out / f"{name}.csv" for name in splits))
    used = {path for found in splits.values() for path, _ in found.listed}
    used.update(copy for found in splits.values() for copies in found.copies.values() for copy in copies)
    for name, found in splits.items():
        check_class_order(found, classes, name)
        manifest, missing, more = (out / f"{name}{suffix}.csv" for suffix in ("", ".missing", ".duplicated"))
        print(
            f"{name}: {found.expected} expected, {len(found.listed)} found ({len(found.copies)} more than once), "
            f"{len(found.missing)} missing"
        )
        out.mkdir(parents=True, exist_ok=True)
        write_table(missing, ("name", "class"), [(each.name, classes[each.label]) for each in found.missing])
        write_table(more, ("path", "copy"), [(path, copy) for path, all in found.copies.items() for copy in all])
        if found.missing:
            print(f"  listed in {missing}")
        if found.copies:
            print(f"  listed in {more}")
        if found.listed:
            _write_manifest(found.listed, manifest, store.root, classes, arguments, found, longest_s)
    if others := len(store.paths - used):
        print(f"{others} other videos below {store.root} are not in these annotations")
    empty = [name for name, found in splits.items() if not found.listed]
    if empty:
        raise InputError(
            f"none of the {' and '.join(empty)} videos is below {store.root}; expected names such as {expected[0].name}"
        )


def _budget(arguments: argparse.Namespace) -> None:
    gpu = find_gpu(arguments.gpu)
    if arguments.manifest and arguments.videos:
        raise InputError("--videos is the number of videos without a manifest; leave it or -m out")
    from benchmarks.budget.cost import KINETICS_400, cost_table, run_cost  # imports torch and DALI, which takes seconds
    from benchmarks.budget.report import budget
    from benchmarks.budget.text import table
    from common.config import load_config

    config = load_config(arguments.config, arguments.override)
    if not arguments.manifest:
        videos, classes = arguments.videos or KINETICS_400, 400
        gpus, network_clips = arguments.gpus, arguments.network_clips
        cost = run_cost(config, videos=videos, classes=classes, gpus=gpus, gpu=gpu, network_clips=network_clips)
        print(json.dumps(cost, indent=2) if arguments.json else cost_table(cost))
        return
    report = budget(
        arguments.manifest,
        config,
        samples=arguments.samples,
        gpu=gpu,
        gpus=arguments.gpus,
        cores=arguments.cores,
        network_clips=arguments.network_clips,
    )
    print(json.dumps(report, indent=2) if arguments.json else table(report))
    if "run" in report and not arguments.json:
        print(f"\n{cost_table(report['run'])}")


def _transcode(arguments: argparse.Namespace) -> None:
    out = arguments.out / f"{arguments.manifest.stem}.csv"
    crf = ENCODERS[arguments.codec].crf if arguments.crf is None else arguments.crf
    settings = Settings(arguments.short_side, arguments.gop, arguments.codec, crf)
    manifest = Manifest.read(arguments.manifest)
    if out.exists() and out.samefile(arguments.manifest):
        raise InputError(f"--out {arguments.out}: would overwrite {out}, the manifest itself; name another folder")
    check_overwritable(out)
    _lock(arguments, out)
    journal, pool = out.with_name(f"{out.name}.journal"), _worker_pool(arguments, out.name)
    job = Job(manifest, arguments.out, settings, journal=journal, pool=pool)
    estimate = job.estimate()
    if estimate and estimate.sampled:
        free = job.check_disk(estimate)
        duration = datetime.timedelta(seconds=round(estimate.seconds))
        print(
            f"{arguments.out}: about {size_text(estimate.needed_bytes)} and {duration} h more with {estimate.workers} "
            f"processes, estimated from {estimate.sampled} videos; {size_text(free)} are free",
            flush=True,
        )
    copies, rejected, made = job.transcode()
    if not pool.is_whole:
        _print_part_done(out, pool)
        return
    _save(copies, rejected, out, journal, nothing=f"none of the {len(manifest)} videos can be transcoded")
    distinct = {each.video.path: each for each in made}.values()
    before = sum(each.source_bytes for each in distinct)
    after = sum(each.copy_bytes for each in distinct)
    print(f"{out}: {len(copies)} of {len(manifest)} videos")
    print(f"size: {size_text(before)} before, {size_text(after)} now, {after / before:.2f} times as much")
    before_ms, after_ms, compared = job.compare()
    if compared:
        print(
            f"decoding 8 frames: {before_ms:.1f} ms before, {after_ms:.1f} ms now, {before_ms / after_ms:.1f} times "
            f"as fast (CPU time, mean of {compared} videos)"
        )
    remove_journals(journal)  # left by the comparison


def _pack(arguments: argparse.Namespace) -> None:
    out = arguments.out / f"{arguments.manifest.stem}.csv"
    check_overwritable(out)
    _lock(arguments, out)
    pool = _worker_pool(arguments, out.stem, unit="shard")
    manifest, rejected = pack(arguments.manifest, arguments.out, shard_bytes=arguments.shard_size, pool=pool)
    if manifest is None:
        _print_part_done(out, pool)
        return
    if arguments.root:
        manifest.root = arguments.root if is_url(arguments.root) else Path(arguments.root)
    _save(manifest, rejected, out, None, nothing=f"none of the videos of {arguments.manifest} can be packed")
    print(f"{out}: {len(manifest)} of {manifest.listed} videos in {len(manifest.shards)} shards")


def _worker_pool(arguments: argparse.Namespace, name: str, unit: str = "video") -> WorkerPool:
    if arguments.scheduler and arguments.executor != "dask":
        raise InputError("--scheduler needs --executor dask")
    if arguments.executor == "dask" and not arguments.scheduler:
        raise InputError("--executor dask needs --scheduler ADDRESS, such as tcp://node1:8786")
    return WorkerPool(
        workers=arguments.workers,
        scheduler=arguments.scheduler,
        timeout_s=arguments.timeout,
        shard=arguments.shard,
        progress=functools.partial(tqdm, unit=unit, desc=name, dynamic_ncols=True, disable=_quiet()),
    )


def _write_manifest(
    listed: Sequence[Listed],
    out: Path,
    root: str | os.PathLike,
    classes: Sequence[str],
    arguments: argparse.Namespace,
    found: FoundSplit | None = None,
    longest_s: float = math.inf,
    rejected: Sequence[Rejected] = (),
    classes_from: str = "",
    parts: Mapping[str, Part] = MappingProxyType({}),
) -> Manifest | None:
    """Probes the videos, writes their manifest and the list of rejected ones, and prints a summary.

    Returns the manifest; None if this command only does a part of it (--shard).

    rejected: listed videos that cannot even be probed.
    found: the split of the listed videos; its missing videos count as rejected.
    longest_s: longer videos (in seconds) are reported.
    classes_from: the file that names the classes, for messages.
    parts: listed videos that are a part of a file.
    """
    found = found or FoundSplit()
    check_overwritable(out)
    journal = out.with_name(f"{out.name}.journal")
    pool = _worker_pool(arguments, out.name)
    manifest, unreadable = index(
        listed,
        root=root,
        journal=journal,
        pool=pool,
        classes=classes,
        classes_from=classes_from,
        copies=found.copies,
        parts=parts,
        decode=arguments.verify == "decode",
        max_pixels=arguments.max_pixels,
        frames_fps=arguments.fps,
    )
    if not pool.is_whole:
        _print_part_done(out, pool)
        return None
    manifest.rejected += len(found.missing) + len(rejected)
    rejected = [*rejected, *unreadable]
    nothing = (
        f"none of the {len(listed) + len(rejected) - len(unreadable)} listed videos can be read below {manifest.root}"
    )
    _save(manifest, rejected, out, journal, nothing=nothing)
    print(f"{out}: {len(manifest)} of {manifest.listed} videos, {len(set(manifest.labels.tolist()))} classes")
    print(f"  {summary(manifest)}")
    longer = int((manifest.column("frames") > longest_s * manifest.column("fps")).sum())
    if longer:
        print(f"  {longer} are longer than {longest_s:g} s: never trimmed?")
    return manifest


def _print_part_done(out: Path, pool: WorkerPool) -> None:
    part, parts = pool.shard
    print(f"{out}: part {part} of {parts} is done; when all are, run the same command without --shard to write it")


def _save(manifest: Manifest, rejected: Sequence[Rejected], out: Path, journal: Path | None, *, nothing: str) -> None:
    """Writes a manifest and the list of rejected videos, and removes the journal. Raises `InputError` with the message
    `nothing` if the manifest is empty."""
    rejected_file = out.with_name(f"{out.stem}.rejected.csv")
    for entry in rejected[:_SHOWN]:
        print(f"{entry.path}: {entry.reason}")
    if len(rejected) > _SHOWN:
        print(f"... and {len(rejected) - _SHOWN} more, in {rejected_file}")
    if not len(manifest):
        if journal:
            remove_journals(journal)  # so that the next run tries the videos again
        raise InputError(f"{nothing}; nothing written")
    manifest.made_by = _command()
    manifest.write(out)
    write_rejected(rejected_file, rejected)
    if journal:
        remove_journals(journal)


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


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError("expected more than 0")
    return value


def _gigabytes(text: str) -> float:
    """Parses gigabytes into bytes."""
    return 1e9 * _positive(text)


def _seconds(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError("expected more than 0 seconds")
    return value


def _quiet() -> bool:
    return not sys.stderr.isatty()
