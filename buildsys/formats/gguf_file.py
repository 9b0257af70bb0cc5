"""Reads GGUF files through the `gguf` package: metadata, and tensors dequantized to float32.

Shapes are given as torch has them, [out, in]; GGUF writes the axes the other way round.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from buildsys.formats.errors import FormatError
from buildsys.formats.tensors import no_such_tensor

if TYPE_CHECKING:
    import gguf

_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "F64": torch.float64,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
}


class GGUFSource:
    """The tensors of a GGUF file. Block types (and BF16) are read as float32, others as stored.

    `metadata` holds the key-value pairs with Python values; arrays are lists.
    Raises FormatError when the file is damaged or the package `gguf` is missing.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        self.path = Path(path)
        reader = _open_reader(self.path)
        self._stored = {str(tensor.name): tensor for tensor in reader.tensors}
        self.metadata: Mapping[str, object] = _metadata(reader, self.path)
        for name, tensor in self._stored.items():
            _check_inside(self.path, name, tensor)

    def names(self) -> Sequence[str]:
        return list(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(int(size) for size in reversed(self._find(name).shape.tolist()))

    def dtype(self, name: str) -> torch.dtype:
        return _DTYPES.get(self.stored_type(name), torch.float32)

    def stored_type(self, name: str) -> str:
        return str(self._find(name).tensor_type.name)

    def nbytes(self, name: str) -> int:
        return int(self._find(name).n_bytes)

    def read(self, name: str) -> torch.Tensor:
        return self._dequantized(name, self._find(name).data).reshape(self.shape(name))

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        data = self._find(name).data
        part = self._dequantized(name, data[start:stop])
        return part.reshape(-1, *self.shape(name)[1:])

    def release(self, name: str) -> None:
        """Nothing to do: what `read` gives is a copy, and the mapping is the package's."""

    def _dequantized(self, name: str, data: Any) -> torch.Tensor:
        import numpy as np
        from gguf import quants

        if self.stored_type(name) in _DTYPES:
            return torch.from_numpy(np.array(data))
        try:
            values = quants.dequantize(np.ascontiguousarray(data), self._find(name).tensor_type)
        except NotImplementedError as error:  # what gguf raises for a type that it cannot read
            raise FormatError(
                f"the package gguf cannot dequantize {self.stored_type(name)}",
                file=self.path,
                tensor=name,
                remedy="Use a GGUF file of another type, such as Q8_0 or F16.",
            ) from error
        return torch.from_numpy(values.astype(np.float32, copy=False))

    def _find(self, name: str) -> Any:
        if name not in self._stored:
            raise no_such_tensor(name, self._stored, self.path)
        return self._stored[name]


def _open_reader(path: Path) -> gguf.GGUFReader:
    try:
        import gguf
    except ImportError as error:
        raise FormatError(
            "reading GGUF needs the package gguf", file=path, remedy="pip install gguf"
        ) from error
    try:
        return gguf.GGUFReader(path)
    except FileNotFoundError as error:
        raise FormatError("does not exist", file=path) from error
    except (ValueError, LookupError, TypeError, OverflowError, ArithmeticError) as error:
        # The package does not check bounds: a short file ends in one of these.
        raise FormatError(
            f"is damaged, or no GGUF file: {error}",
            file=path,
            remedy="Copy or download it again.",
        ) from error


def _metadata(reader: gguf.GGUFReader, path: Path) -> dict[str, object]:
    try:
        return {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, LookupError) as error:
        raise FormatError(f"the metadata are damaged: {error}", file=path) from error


def _check_inside(path: Path, name: str, tensor: Any) -> None:
    size = path.stat().st_size
    end = int(tensor.data_offset) + int(tensor.n_bytes)
    if end > size or int(tensor.data.nbytes) != int(tensor.n_bytes):
        raise FormatError(
            f"its data ends at byte {end}, the file at {size}",
            file=path,
            tensor=name,
            remedy="Copy or download it again.",
        )
    if int(tensor.n_elements) != math.prod(tensor.shape.tolist()):
        raise FormatError("its shape does not fit its size", file=path, tensor=name)
