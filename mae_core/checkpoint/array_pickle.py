"""Plain pickles of arrays, which Caffe2 and detectron2's model zoo write, read without numpy's own unpickling: that
trusts what a file says about types and sizes, and so does the memo of pickle's C code."""

import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch


class NotAllowed(pickle.UnpicklingError):
    """A pickle asks for something other than arrays."""


class _Dtype:
    """A type of plain numbers; `value` is None for any other."""

    def __init__(self, name: object, *_: object) -> None:
        plain = re.fullmatch(r"[<>=|]?[fiub]\d", str(name))
        self.value = np.dtype(str(name)) if plain else None

    def __setstate__(self, state: tuple) -> None:
        if self.value is not None and state[1] in ("<", ">"):
            self.value = self.value.newbyteorder(state[1])

    def numbers(self, content: object, shape: object, order: Any = "C") -> np.ndarray | None:
        """An array in this machine's byte order, in memory of its own."""
        if self.value is None:
            return None
        data = content.encode("latin1") if isinstance(content, str) else content  # text: from Python 2
        array = np.frombuffer(data, self.value).reshape(shape, order=order)  # type: ignore[call-overload]
        return array.astype(self.value.newbyteorder("="))


class _Array:
    """An array that gets its shape, its type and its numbers afterwards."""

    def __init__(self, *_: object) -> None:
        self.value: np.ndarray | None = None

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran, content = state
        self.value = dtype.numbers(content, shape, "F" if fortran else "C")


def _scalar(dtype: _Dtype, content: object) -> object:
    array = dtype.numbers(content, ())
    return None if array is None else array.item()


KNOWN: dict[tuple[str, str], Callable] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy.core.multiarray", "scalar"): _scalar,
}


class _Unpickler(pickle._Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        known = KNOWN.get((module.replace("numpy._core", "numpy.core"), name))
        if known is None:
            raise NotAllowed(f"{module}.{name}")
        return known


def load_arrays(path: Path) -> object:
    """What the pickle holds, with tensors for arrays of numbers. NotAllowed if it asks for anything but arrays; any
    other exception if it is damaged."""
    with open(path, "rb") as file:
        return _tensors(_Unpickler(file, encoding="latin1").load())


def _tensors(value: object) -> object:
    if isinstance(value, dict):
        return {name: _tensors(v) for name, v in value.items()}
    if isinstance(value, _Array):
        array = value.value
        return torch.from_numpy(array) if array is not None and array.dtype.kind in "fiu" else None
    return value
