"""Evaluates weights on a manifest: averages the probabilities of three crops per video; each video counts once.

python evaluate.py -w output/demo/best.safetensors          # on the data.test or data.val of the run
python evaluate.py -w best.safetensors -o data.test=my_videos.csv --windows 4 --average score
python evaluate.py -w best.safetensors -w swa.safetensors -o data.test=my_videos.csv --out both     # an ensemble
python evaluate.py -w best.onnx -o data.test=my_videos.csv   # or .pt2: the numbers of an export
python evaluate.py --compare output/a/evaluation output/b/evaluation
torchrun --nproc-per-node 8 evaluate.py -w ppTimeSformer_k400_8f.pdparams -c configs/pptimesformer_k400.yaml

Writes results.json, predictions.csv, per_class.csv and report.html into the folder --out: docs/evaluate.md.
Exits with 1 if a video cannot be read, unless --allow-missing is given; the video counts as wrong either way.
"""

import sys
import time
from pathlib import Path

from common.command_line import Parser, add_override_argument, add_provider_argument


def main() -> int:
    """Runs evaluate.py; returns its exit status."""
    parser = Parser(description="Evaluate weights on the videos of a manifest.")
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument(
        "-w",
        "--weights",
        action="append",
        help="best.safetensors of a run, an .onnx or .pt2 of export.py, or with -c third-party weights; several -w: an "
        "ensemble",
    )
    mode.add_argument("--compare", nargs=2, metavar=("A", "B"), help="two results folders, or their results.json")
    mode.add_argument("--report", type=Path, metavar="DIR", help="only rewrite report.html in a results folder")
    parser.add_argument(
        "-c",
        "--config",
        help="YAML file (default: the settings in the weights file, and the videos of the config.yaml beside it)",
    )
    add_override_argument(parser)
    parser.add_argument(
        "--allow-missing", action="store_true", help="exit with 0 even if videos cannot be read, unless none can"
    )
    parser.add_argument("--windows", type=int, default=1, metavar="N", help="temporal windows per video (default 1)")
    parser.add_argument(
        "--crops", type=int, default=3, metavar="1|3", help="crops per window (default 3); 1: the centre crop"
    )
    parser.add_argument(
        "--average", default="prob", metavar="prob|score", help="average probabilities or logits (default prob)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder for the results (default: `evaluation` beside the first weights)",
    )
    add_provider_argument(parser)
    arguments = parser.parse_args()

    from evaluation.comparison import compare, comparison_text
    from evaluation.report import REPORT, write_report
    from evaluation.result_files import FILES, prepare_folder, read_results, results_folder, write_results
    from evaluation.results import Protocol

    if arguments.compare:
        names = arguments.compare
        print(comparison_text(compare(*map(read_results, names), names=names), names=names))
        return 0
    if arguments.report:
        print(write_report(arguments.report))
        return 0
    protocol = Protocol(arguments.windows, arguments.crops, arguments.average)

    import torch

    from common.distributed import start_process
    from common.locking import FolderLock
    from evaluation.evaluate import (
        build_results,
        check_members,
        evaluate,
        manifest_for,
        results_text,
        with_videos_of_run,
    )
    from serving.exported import Exported, check_protocol
    from serving.prediction import open_model

    started, names = time.monotonic(), arguments.weights
    opened = [open_model(name, arguments.config, arguments.override, provider=arguments.provider) for name in names]
    members, config = [weights for weights, _, _ in opened], with_videos_of_run(opened[0][1], names[0])
    check_members(members, names)
    for name, model in zip(names, members, strict=True):
        if isinstance(model, Exported):
            check_protocol(model, name, protocol)
    manifest = manifest_for(config, members[0])
    out = arguments.out or results_folder(names[0])
    with start_process(config.device) as process:
        if process.is_main:
            prepare_folder(out)  # fails before hours of work
            lock = FolderLock(out, remedy="wait until it ends, or name another folder with --out")
            for model, _, adapted in opened:
                if adapted:
                    print(adapted, flush=True)
                if isinstance(model, Exported):
                    print(model.runtime, file=sys.stderr)
        torch.set_num_threads(process.cores)
        progress = process.is_main and sys.stderr.isatty()
        predictions = evaluate(config, members, manifest, process, protocol=protocol, progress=progress)
        failed = not (predictions.valid.any() if arguments.allow_missing else predictions.valid.all())
        if process.is_main:
            results = build_results(
                predictions, config, members, names, manifest, process, protocol=protocol, started=started
            )
            try:
                write_results(results, out)
                write_report(out)
                lock.release()
                print(f"{out}: {', '.join((*FILES, REPORT))}")
            finally:  # a full disk must not lose the numbers
                print(results_text(results), flush=True)
            if failed:
                remedy = "makes it 0" if predictions.valid.any() else "does not help if none can"
                print(
                    f"evaluate.py: exit status 1: {len(predictions.faults)} of {len(manifest)} videos cannot be read "
                    f"and count as wrong; --allow-missing {remedy}",
                    file=sys.stderr,
                )
        process.barrier()  # torchrun ends all processes once one fails, so first print everything
    return int(failed)
