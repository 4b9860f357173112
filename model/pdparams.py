"""Reads .pdparams, the pickles of `paddle.save`, without believing anything in them but numbers.

A pickle is a program. This one may put together dictionaries, tuples and what stands for numpy arrays. numpy itself
trusts the type and flags that a pickle gives an array: it comes in last, and sees bytes whose number has been checked.
"""

import collections
import math
import os
import pickle
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor


def read_pdparams(path: str | os.PathLike) -> dict[str, Tensor]:
    """A state dict as tensors under Paddle's names, the weights of linear layers turned to [out, in] from [in, out].

    Raises `ValueError` for everything else, a pickle that asks for more than arrays included.
    """
    try:
        with open(path, "rb") as file:
            content = _Unpickler(file, encoding="latin1").load()
        if isinstance(content, dict) and isinstance(content.get("model"), dict):
            content = content["model"]  # a checkpoint
        if not isinstance(content, dict):
            raise ValueError("it is no dictionary")
        tensors = _joined(dict(_tensors(content)), content.get("UnpackBigParamInfor@@", {}))
    except Exception as error:  # a damaged pickle raises any kind
        raise ValueError(f"{path}: not weights of PaddlePaddle, or damaged: {error}") from None
    return {
        name: value.T.contiguous() if value.ndim == 2 and name.endswith(".weight") else value
        for name, value in tensors.items()
    }


def _tensors(content: dict) -> Iterator[tuple[str, Tensor]]:
    for name, value in content.items():
        if isinstance(value, tuple) and len(value) == 2:  # its name inside Paddle, and itself
            value = value[1]
        if isinstance(value, _Array):
            yield name, value.tensor()
        elif not isinstance(value, int | float | str | None) and not str(name).endswith("@@"):
            raise ValueError(f"{name} is no array")


def _joined(tensors: dict[str, Tensor], split: dict[str, dict]) -> dict[str, Tensor]:
    """Before protocol 4, tensors of more than 1 GiB come in slices."""
    for name, how in split.items():
        tensors[name] = torch.cat([tensors.pop(part).flatten() for part in how["slices"]]).reshape(how["OriginShape"])
    return tensors


class _Array:
    """What a pickle says of a numpy array. Real arrays and dtypes trust their pickles too far."""

    __slots__ = ("state",)

    def __setstate__(self, state: object) -> None:
        self.state = state

    def tensor(self) -> Tensor:
        _, shape, dtype, is_fortran, data = self.state
        if dtype.name not in _TYPES:
            raise ValueError(f"an array of {dtype.name}")
        dtype = np.dtype(_TYPES[dtype.name])
        if isinstance(data, str):
            data = data.encode("latin1")
        count = math.prod(shape)
        if min(shape, default=0) < 0 or len(data) != count * dtype.itemsize:
            raise ValueError(f"an array of shape {shape} in {len(data)} bytes")
        array = np.frombuffer(data, dtype, count).reshape(shape, order="F" if is_fortran else "C")
        tensor = torch.from_numpy(np.array(array, order="C"))
        return tensor.view(torch.bfloat16) if dtype == np.uint16 else tensor  # numpy has no bfloat16


class _Dtype:
    __slots__ = ("name",)

    def __init__(self, name: str, *_: object):
        self.name = name

    def __setstate__(self, state: tuple) -> None:
        if state[1] not in ("<", "|", "="):
            raise ValueError(f"byte order {state[1]}")


class _Permitted:
    """A name that a pickle may use. It has nothing that a pickle could change."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable):
        object.__setattr__(self, "_function", function)

    def __call__(self, *arguments: object) -> object:
        return self._function(*arguments)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(name)

    def __setstate__(self, state: object) -> None:
        raise AttributeError("state")


_TYPES = {"u2": "<u2", "f2": "<f2", "f4": "<f4", "f8": "<f8", "i4": "<i4", "i8": "<i8"}
_NAMES = {
    "multiarray._reconstruct": lambda *_: _Array(),
    "ndarray": lambda *_: _Array(),
    "dtype": _Dtype,
    "encode": lambda text, coding: text.encode("latin1"),  # how protocol 2 writes bytes
    "OrderedDict": collections.OrderedDict,
    "tuple": tuple,
    "bytes": lambda *_: b"",
}
_MODULES = ("numpy", "numpy.core", "numpy._core", "_codecs", "collections", "builtins", "__builtin__")


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Callable:
        if module.endswith(".multiarray"):
            module, name = module.removesuffix(".multiarray"), f"multiarray.{name}"
        if module not in _MODULES or name not in _NAMES:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, and weights need no such thing")
        return _Permitted(_NAMES[name])
