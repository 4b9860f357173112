"""torchvision beside a CPU build of torch."""

import torch


def let_torchvision_load() -> None:
    """transformers and timm import torchvision where it is installed. The package index has its CUDA build only, whose
    operators do not load beside a CPU build of torch: it stops at the names of two that nobody here calls."""
    try:
        import torchvision  # noqa: F401
    except ImportError:
        return
    except RuntimeError:
        for operator in ("nms", "qnms"):
            _OPERATORS.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


_OPERATORS = torch.library.Library("torchvision", "FRAGMENT")  # forgets its operators when it is forgotten
