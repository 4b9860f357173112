"""Reads .pdparams files, the pickles of `paddle.save`, and trusts only the numbers in them.

A pickle is a program. It may only use the operations found in Paddle's files: build dictionaries, lists and tuples, and
call a few array constructors, all replaced by stand-ins. numpy trusts the dtype and flags in a pickle; here it only
gets bytes after a check of their number.
"""

import collections
import functools
import io
import math
import os
import pickle
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

_MOST_DIMENSIONS = 8


def read_pdparams(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Reads a state dict: tensors by Paddle's names, with the weights of linear layers transposed from [in, out] to
    [out, in].

    Raises `ValueError` for anything else, such as a pickle that contains more than arrays.
    """
    try:
        with open(path, "rb") as file:
            content = _Unpickler(io.BytesIO(file.read()), encoding="latin1").load()
        tensors = _state_dict(content)
    except Exception as error:  # a damaged pickle may raise any error, with a message of any length
        reason = str(error)[:200] or type(error).__name__
        raise ValueError(f"{path}: not weights of PaddlePaddle, or damaged: {reason}") from None
    return {name: value.T if value.ndim == 2 and name.endswith(".weight") else value for name, value in tensors.items()}


def _state_dict(content: Any) -> dict[str, Tensor]:
    """The tensors of a state dict, or of the model in a checkpoint."""
    if not isinstance(content, dict):
        raise ValueError("it is not a dictionary")
    if isinstance(content.get("model"), dict):  # a checkpoint
        if any(isinstance(_unnamed(value), _Array) for value in content.values()):
            raise ValueError("it has arrays beside its model")
        content = content["model"]
    tensors = dict(_tensors(content))
    # Before pickle protocol 4, tensors larger than 1 GiB are split into slices.
    for name, how in content.get("UnpackBigParamInfor@@", {}).items():
        tensors[name] = torch.cat([tensors.pop(part).flatten() for part in how["slices"]]).reshape(how["OriginShape"])
    return tensors


def _tensors(content: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    for name, value in content.items():
        value = _unnamed(value)
        if isinstance(value, _Array):
            yield name, value.tensor
        elif not isinstance(value, int | float | str | None) and not name.endswith("@@"):
            raise ValueError(f"{name} is not an array")


def _unnamed(value: object) -> object:
    """The tensor; some versions save a pair of the tensor's name in Paddle and the tensor."""
    return value[1] if isinstance(value, tuple) and len(value) == 2 else value


class _Dtype:
    """Stands in for a numpy dtype."""

    def __init__(self, name: str):
        self.name = name

    def set_state(self, state: tuple[Any, ...]) -> None:
        if not isinstance(state[1], str) or state[1] not in ("<", "|", "="):
            raise ValueError("an array has another byte order")


class _Array:
    """Stands in for a numpy array."""

    def __init__(self) -> None:
        self._state: tuple[Any, ...] = ()

    def set_state(self, state: tuple[Any, ...]) -> None:
        self._state = state

    @functools.cached_property
    def tensor(self) -> Tensor:
        """The numbers. Raises `ValueError` if the state is not an array of numbers."""
        _, shape, dtype, is_fortran, data = self._state
        if len(shape) > _MOST_DIMENSIONS or not all(type(size) is int and size >= 0 for size in shape):
            raise ValueError("an array has no valid shape")
        if not isinstance(dtype, _Dtype) or dtype.name not in _TYPES:
            raise ValueError("an array does not hold numbers")
        dtype = np.dtype(_TYPES[dtype.name])
        data = data.encode("latin1") if isinstance(data, str) else data
        count = math.prod(shape)
        if len(data) != count * dtype.itemsize:
            raise ValueError(f"an array of {count} numbers in {len(data)} bytes")
        array = np.frombuffer(data, dtype, count).reshape(shape, order="F" if is_fortran else "C")
        tensor = torch.from_numpy(np.array(array, order="C"))
        return tensor.view(torch.bfloat16) if dtype == np.uint16 else tensor  # numpy has no bfloat16


_TYPES = {"u2": "<u2", "f2": "<f2", "f4": "<f4", "f8": "<f8"}


class _Constructor(NamedTuple):
    """A constructor that a pickle may call."""

    name: str


_MODULES = {
    "_reconstruct": ("numpy.core.multiarray", "numpy._core.multiarray"),
    "ndarray": ("numpy",),
    "dtype": ("numpy",),
    "encode": ("_codecs",),
    "OrderedDict": ("collections",),
    "tuple": ("builtins", "__builtin__"),
    "bytes": ("builtins", "__builtin__"),
}
_OPERATIONS = (
    "PROTO FRAME STOP MARK GLOBAL STACK_GLOBAL NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 BINFLOAT BINUNICODE "
    "SHORT_BINUNICODE BINBYTES SHORT_BINBYTES BINBYTES8 BINSTRING SHORT_BINSTRING EMPTY_DICT EMPTY_LIST EMPTY_TUPLE "
    "TUPLE TUPLE1 TUPLE2 TUPLE3 APPEND APPENDS BINPUT LONG_BINPUT BINGET LONG_BINGET MEMOIZE"
)


class _Unpickler(pickle._Unpickler):
    """Based on the Python implementation: its operations are in a dictionary, which can be restricted, and its memo
    never holds more than was put there."""

    stack: list[Any]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]

    dispatch: ClassVar[dict[int, Callable[..., None]]] = {
        code[0]: pickle._Unpickler.dispatch[code[0]] for code in (getattr(pickle, n) for n in _OPERATIONS.split())
    }

    def __init__(self, *arguments: Any, **keywords: Any):
        super().__init__(*arguments, **keywords)
        self._encoded: dict[int, tuple[str, bytes]] = {}

    def find_class(self, module: str, name: str) -> _Constructor:
        if module not in _MODULES.get(name, ()):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which weights do not need")
        return _Constructor(name)

    def load_reduce(self) -> None:
        arguments = self.stack.pop()
        constructor = self.stack.pop()
        if not isinstance(constructor, _Constructor) or not isinstance(arguments, tuple):
            raise pickle.UnpicklingError("it calls something other than array constructors")
        self.append(self._construct(constructor.name, arguments))

    def _construct(self, name: str, arguments: tuple[Any, ...]) -> object:
        if name == "_reconstruct":
            return _Array()
        if name == "dtype" and isinstance(arguments[0], str):
            return _Dtype(arguments[0])
        if name == "encode" and isinstance(arguments[0], str):  # how protocol 2 writes bytes; each string once
            return self._encoded.setdefault(id(arguments[0]), (arguments[0], arguments[0].encode("latin1")))[1]
        if name == "tuple" and isinstance(arguments[0], tuple):
            return arguments[0]
        if name in ("OrderedDict", "bytes") and not arguments:
            return collections.OrderedDict() if name == "OrderedDict" else b""
        raise pickle.UnpicklingError(f"it calls {name} in a way that Paddle does not")

    def load_build(self) -> None:
        state = self.stack.pop()
        if not isinstance(self.stack[-1], _Array | _Dtype):
            raise pickle.UnpicklingError("it changes something other than an array")
        self.stack[-1].set_state(state)

    def load_setitems(self) -> None:
        self._set_items(self.pop_mark())

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set_items([key, value])

    def _set_items(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], dict) or not all(isinstance(key, str) for key in items[::2]):
            raise pickle.UnpicklingError("its names are not strings")
        self.stack[-1].update(zip(items[::2], items[1::2], strict=True))

    dispatch[pickle.REDUCE[0]] = load_reduce
    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems
