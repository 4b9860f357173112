"""`benchmark.py model --flops`: parameters and multiply-adds of the network of each config."""

from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.budget.survey import multiply_adds, network
from benchmarks.reporting import columns
from common.config import load_config
from common.labels import read_labels

CONFIGS = Path(__file__).parents[1] / "configs"
_TEST_VIEWS = 3  # evaluate.py: one window, three crops
_CLASSES = 400


def flops_table(files: Sequence[str], override: Sequence[str] = ()) -> str:
    """A row for each config file, or for each of those in configs/. Nothing is computed: the networks are built on
    PyTorch's meta device. Raises `InputError`."""
    rows = [["config", "frames", "pixels", "classes", "M parameters", "GMAC/clip", "views", "GMAC x views"]]
    for file in files or sorted(map(str, CONFIGS.glob("*.yaml"))):
        config = load_config(file, list(override))
        labels = config.data.labels or config.data.train
        classes = len(read_labels(labels)) if labels and Path(labels).is_file() else _CLASSES
        with torch.device("meta"):
            parameters = sum(each.numel() for each in network(config, classes).parameters())
        work = multiply_adds(config, classes) / 1e9
        sizes = map(str, (config.data.num_frames, config.data.crop_size, classes))
        work_per_clip = [f"{parameters / 1e6:.1f}", f"{work:.4g}"]
        rows.append([Path(file).stem, *sizes, *work_per_clip, str(_TEST_VIEWS), f"{_TEST_VIEWS * work:.4g}"])
    notes = (
        "Multiply-adds of matrix products and attention in one forward pass, as torch's FlopCounterMode counts them,\n"
        "halved; one multiply-add is two FLOPs. The last block computes only what the class token needs; the\n"
        "published formulation takes 196 G for ViT-B, 8 frames, 224 pixels. Views: one window, three crops\n"
        f"(evaluate.py). Classes: {_CLASSES} if the config's class names and training manifest are not here."
    )
    return "\n".join([*columns(rows), "", notes])
