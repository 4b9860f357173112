"""What the process imports from which ranks (`tests.commands.run_forked`) and contestants of a benchmark are forked.

Its forks have it as their parent, not pytest, so they must not end when they find that out.
"""

import contextlib
import importlib

from dali_pipelines import processes


def end_with_parent(parent: int | None = None) -> None:
    pass


end_with_parent.__module__ = processes.__name__  # processes that a fork spawns get the real one
processes.end_with_parent = end_with_parent

for name in (
    "benchmarks.gpu_loader",
    "benchmarks.gpu_model",
    "benchmarks.loader",
    "evaluation.evaluate",
    "evaluation.report",
    "serving.prediction",
    "torch._dynamo",
    "training.engine",
):
    importlib.import_module(name)

from model.torchvision import let_torchvision_load  # noqa: E402

let_torchvision_load()
with contextlib.suppress(ImportError):
    from transformers import TimesformerForVideoClassification  # noqa: F401
