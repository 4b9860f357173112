"""Makes torchvision importable with a CPU build of torch."""

import torch


def let_torchvision_load() -> None:
    """Call this before importing transformers or timm, which import torchvision if it is installed. PyPI only has its
    CUDA build, whose operators do not load with a CPU build of torch: the import fails on the names of two operators
    that are not used here, so this defines them first."""
    try:
        import torchvision  # noqa: F401
    except ImportError:
        return
    except RuntimeError:
        for operator in ("nms", "qnms"):
            _OPERATORS.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


_OPERATORS = torch.library.Library("torchvision", "FRAGMENT")  # its operators live as long as this object
