"""From a video file to a batch of clips.

`ClipLoader` is imported on first use: DALI's worker processes import modules of this package, and each of them
would otherwise load torch for nothing (about 200 MB and two seconds).
"""

from typing import Any

from dali_pipelines.errors import InputError
from dali_pipelines.manifest import Manifest

__all__ = ["ClipLoader", "InputError", "Manifest"]


def __getattr__(name: str) -> Any:
    if name == "ClipLoader":
        from dali_pipelines.loader import ClipLoader

        globals()[name] = ClipLoader
        return ClipLoader
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
