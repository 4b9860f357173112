"""For test_evaluation.py: evaluates with several batch sizes in the processes that torchrun starts.

torchrun --nproc-per-node N tests/training/sharing.py WEIGHTS MANIFEST OUT
"""

import sys
import time

import torch

from common.distributed import start_process
from common.weights import open_weights
from dali_pipelines import Manifest
from evaluation.evaluate import build_results, evaluate
from evaluation.results import Protocol

BATCH_SIZES = (1, 5, 8)


def evaluations(weights_file, manifest_file, process) -> list[dict]:
    """What `evaluate` and `build_results` say, one for each of the batch sizes."""
    found = []
    for batch_size in BATCH_SIZES:
        overrides = ["device=cpu", "data.workers=0", f"data.test={manifest_file}", f"data.batch_size={batch_size}"]
        weights, config, _ = open_weights(str(weights_file), None, overrides)
        given = [weights], Manifest.read(manifest_file), process
        result = evaluate(config, *given)
        started, names = time.monotonic(), [str(weights_file)]
        results = build_results(result, config, given[0], names, *given[1:], protocol=Protocol(), started=started)
        said = results.summary | {"date": None, "seconds": None, "config": None}
        faults = [(fault.sample_id, fault.path, fault.reason) for fault in result.faults]
        found.append(vars(result) | {"faults": faults, "top": results.top.tolist(), "summary": said})
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    with start_process("cpu") as process:
        found = evaluations(*sys.argv[1:3], process)
        if process.is_main:
            torch.save(found, sys.argv[3])
