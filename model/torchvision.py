"""Makes torchvision importable beside a CPU build of torch."""

import torch


def let_torchvision_load() -> None:
    """Call this before importing transformers or timm, which import torchvision if it is installed. PyPI has only its
    CUDA build, whose operators do not load beside a CPU build of torch: the import fails at the names of two operators
    that are not used here, so they are defined first."""
    try:
        import torchvision  # noqa: F401
    except ImportError:
        return
    except RuntimeError:
        for operator in ("nms", "qnms"):
            _OPERATORS.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


_OPERATORS = torch.library.Library("torchvision", "FRAGMENT")  # its operators live as long as this object
