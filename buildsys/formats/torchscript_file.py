"""Reads the tensors of a TorchScript archive without running it.

`torch.jit.load` is deprecated and interprets the code in the archive; a rotation is data. The
archive is a stored zip: `data.pkl` pickles one module object, whose attributes are tensors
(`torch._utils._rebuild_tensor_v2` over storages `data/N`). The pickle is read with stand-ins
for the few names that such a module needs; any other name is refused.
Source: torch/csrc/jit/serialization (pickler.cpp, export_module.cpp); libtorch's
`torch::save(tensor)` writes one attribute named "0".
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import torch

from buildsys.formats.errors import FormatError

_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_DAMAGED = (
    zipfile.BadZipFile,
    pickle.UnpicklingError,
    EOFError,
    KeyError,
    IndexError,
    ValueError,
    TypeError,
    AttributeError,
    NotImplementedError,  # a zip whose compression zipfile does not know
    OverflowError,
)


@dataclass(frozen=True)
class _Storage:
    dtype: torch.dtype
    key: str
    numel: int


@dataclass(frozen=True)
class _View:
    """A tensor as the pickle describes it: a strided view of a storage."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def is_torchscript(path: str | PathLike[str]) -> bool:
    """Is this a TorchScript archive (rather than what `torch.save` writes)?"""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False


def read_torchscript(path: str | PathLike[str]) -> dict[str, torch.Tensor]:
    """The tensor attributes of the archive's module, by name, on the CPU.

    Raises FormatError for a damaged archive and for one that holds more than plain tensors.
    """
    file = Path(path)
    try:
        with zipfile.ZipFile(file) as archive:
            top = next(n for n in archive.namelist() if n.endswith("/data.pkl")).partition("/")[0]
            module = _Unpickler(io.BytesIO(archive.read(f"{top}/data.pkl"))).load()
            views = {name: value for name, value in vars(module).items() if _is_view(value)}
            return {name: _tensor(archive, top, view) for name, view in views.items()}
    except OSError as error:
        raise FormatError(f"cannot be read: {error.strerror or error}", file=file) from error
    except (StopIteration, *_DAMAGED) as error:
        raise FormatError(
            f"is damaged, or no TorchScript archive of plain tensors: {error}",
            file=file,
            remedy="Save the tensor alone, as libtorch's torch::save(tensor, path) does.",
        ) from error


def _is_view(value: object) -> bool:
    return isinstance(value, _View)


class _Unpickler(pickle.Unpickler):
    """Builds inert stand-ins only: no name of the pickle reaches a real module."""

    def find_class(self, module: str, name: str) -> type | Callable[..., object]:
        if module == "__torch__" or module.startswith("__torch__."):
            return type(name, (), {})
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch" and name in _DTYPES:
            return type(name, (), {"dtype": _DTYPES[name]})
        raise pickle.UnpicklingError(f"it needs {module}.{name}")

    def persistent_load(self, pid: object) -> _Storage:
        if not isinstance(pid, tuple) or len(pid) != 5 or pid[0] != "storage":
            raise pickle.UnpicklingError("it refers to something that is no storage")
        return _Storage(pid[1].dtype, str(pid[2]), int(pid[4]))


def _rebuild(
    storage: _Storage, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], *_: object
) -> _View:
    return _View(storage, int(offset), tuple(map(int, shape)), tuple(map(int, stride)))


def _tensor(archive: zipfile.ZipFile, top: str, view: _View) -> torch.Tensor:
    info = archive.getinfo(f"{top}/data/{view.storage.key}")
    nbytes = view.storage.numel * view.storage.dtype.itemsize
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != nbytes or nbytes == 0:
        raise ValueError(f"storage {view.storage.key} has not the {nbytes} bytes it claims")
    steps = zip(view.shape, view.stride, strict=True)
    reach = view.offset + sum((size - 1) * step for size, step in steps)
    if min(view.offset, *view.shape, *view.stride, 0) < 0 or reach >= view.storage.numel:
        raise ValueError(f"a tensor reaches outside storage {view.storage.key}")
    flat = torch.frombuffer(bytearray(archive.read(info)), dtype=view.storage.dtype)
    return torch.as_strided(flat, view.shape, view.stride, view.offset).contiguous()
