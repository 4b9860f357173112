"""For test_benchmark.py: what the process imports from which contestants are forked.

Its forks have it as their parent, not pytest, so they must not end when they find that out.
"""

import contextlib

from dali_pipelines import processes


def end_with_parent(parent: int | None = None) -> None:
    pass


end_with_parent.__module__ = processes.__name__  # processes that a fork spawns get the real one
processes.end_with_parent = end_with_parent

import benchmarks.gpu_loader  # noqa: E402
import benchmarks.gpu_model  # noqa: E402
import benchmarks.loader  # noqa: E402, F401
from model.torchvision import let_torchvision_load  # noqa: E402

let_torchvision_load()
with contextlib.suppress(ImportError):
    from transformers import TimesformerForVideoClassification  # noqa: F401
