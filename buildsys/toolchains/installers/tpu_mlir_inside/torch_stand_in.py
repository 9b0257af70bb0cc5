"""What TPU-MLIR's converter uses of torch, by numpy: names of types, and tensors that are read
from a file, widened to float32 or rounded to 16 bits. PyPI has no torch for Python 3.10 that
runs without a gigabyte of CUDA. Anything else that is asked of it is an AttributeError.

Installed as `torch`; `torch.nn` and `torch.nn.functional` are there to be imported.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import numpy


class dtype:  # noqa: N801  # the original's name
    """A type of numbers, equal only to itself. stored: what numpy keeps its bits in."""

    def __init__(self, name: str, stored: str) -> None:
        self.name, self.stored = name, numpy.dtype(stored)

    def __repr__(self) -> str:
        return f"torch.{self.name}"


class Tensor:
    """An array, and what its bits mean."""

    def __init__(self, array: Any, kind: dtype) -> None:
        self._array, self.dtype, self.shape = array, kind, array.shape

    def numel(self) -> int:
        return int(self._array.size)

    def numpy(self) -> Any:
        if self.dtype in NOT_IN_NUMPY:
            raise TypeError(f"numpy has no {self.dtype}")
        return self._array

    def float(self) -> Tensor:
        return self.to(float32)

    def to(self, kind: dtype) -> Tensor:
        if kind is bfloat16:
            bits = numpy.ascontiguousarray(self._wide(), "f4").view("u4")
            nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # ties to even
            is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
            return Tensor(numpy.where(is_nan, 0x7FC0, nearest).astype("u2"), kind)
        return Tensor(self._wide().astype(kind.stored, copy=False), kind)

    def _wide(self) -> Any:
        """The values as numpy can compute with them."""
        if self.dtype is bfloat16:
            return (self._array.astype("u4") << 16).view("f4")
        return self.numpy()

    def untyped_storage(self) -> Tensor:
        return self

    def data_ptr(self) -> int:
        return int(self._array.ctypes.data)


def from_numpy(array: Any) -> Tensor:
    return Tensor(array, next(kind for kind in PLAIN if kind.stored == array.dtype))


float64, float32, float16 = dtype("float64", "f8"), dtype("float32", "f4"), dtype("float16", "f2")
int64, int32, int16 = dtype("int64", "i8"), dtype("int32", "i4"), dtype("int16", "i2")
int8, uint8, boolean = dtype("int8", "i1"), dtype("uint8", "u1"), dtype("bool", "?")
PLAIN = (float64, float32, float16, int64, int32, int16, int8, uint8, boolean)
bfloat16 = dtype("bfloat16", "u2")  # the upper half of a float32
float8_e4m3fn, float8_e5m2 = dtype("float8_e4m3fn", "u1"), dtype("float8_e5m2", "u1")
NOT_IN_NUMPY = (bfloat16, float8_e4m3fn, float8_e5m2)

nn: Any = ModuleType("torch.nn")
nn.Module = type("Module", (), {})
nn.functional = ModuleType("torch.nn.functional")
sys.modules.update({"torch.nn": nn, "torch.nn.functional": nn.functional})
