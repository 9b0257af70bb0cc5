"""Writes torch's zip archives (.pth, .bin) record by record, with bytes that can be repeated.

`torch.save` needs every tensor in memory at once, and puts the file's own name into the
archive. Here the archive is written by hand (a stored zip of `data.pkl`, `byteorder`, `version`
and one record per storage: torch/serialization.py, `_save`), with fixed times and the fixed top
folder `archive`: equal content gives equal bytes under any file name, and `torch.load`
(`weights_only=True`, mapped or not) reads it.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import IO, TypeAlias

import torch
from torch._utils import _rebuild_tensor_v2, _rebuild_tensor_v3

from buildsys.formats.ordered_writer import OrderedWriter, check_names, open_for_writing
from buildsys.formats.tensors import TensorEntry

TOP = "archive"
ALIGNMENT = 64  # of the payloads, as torch.save has it, so that a mapping is aligned
_LOCAL_HEADER = 30  # bytes of a zip member's local header before name and extra field
_ZIP64_EXTRA = 20  # bytes that zipfile adds to the extra field of a member above 2 GiB
_PADDING_ID = b"FB"  # the extra field that torch pads with
_STORAGES = {
    torch.float64: torch.DoubleStorage,
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.int64: torch.LongStorage,
    torch.int32: torch.IntStorage,
    torch.int16: torch.ShortStorage,
    torch.int8: torch.CharStorage,
    torch.uint8: torch.ByteStorage,
    torch.bool: torch.BoolStorage,
    torch.complex64: torch.ComplexFloatStorage,
    torch.complex128: torch.ComplexDoubleStorage,
}

# What may stand in the tree around the tensors.
Tree: TypeAlias = (
    "TensorEntry | str | int | float | bool | Sequence[Tree] | Mapping[str, Tree] | None"
)


class TorchArchiveWriter(OrderedWriter):
    """Writes a tree of dicts and lists whose leaves are `TensorEntry`s or plain values.

    Tuples become lists. The payloads are then taken in the order in which the entries stand in
    the tree (their names must differ; they name the payload, and are not stored).
    """

    def __init__(self, path: str | PathLike[str], tree: Tree) -> None:
        super().__init__(path, _entries_in(tree))
        self._stream = open_for_writing(self.path)
        # Closed in _finish and _abandon.
        self._zip = zipfile.ZipFile(self._stream, "w", zipfile.ZIP_STORED)
        self._member: IO[bytes] | None = None
        self._store("data.pkl", _pickled(tree))
        self._store("byteorder", b"little")

    def _begin(self, index: int) -> None:
        self._member = self._open_member(f"data/{index}", self.entries[index].nbytes)

    def _put(self, data: memoryview) -> None:
        assert self._member is not None
        self._member.write(data)

    def _end(self) -> None:
        assert self._member is not None
        self._member.close()
        self._member = None

    def _finish(self) -> None:
        self._store("version", b"3\n")
        self._zip.close()
        self._stream.close()

    def _abandon(self) -> None:
        if self._member is not None:
            self._member.close()
        self._zip.close()
        self._stream.close()
        self.path.unlink(missing_ok=True)

    def _store(self, name: str, content: bytes) -> None:
        with self._open_member(name, len(content)) as member:
            member.write(content)

    def _open_member(self, name: str, nbytes: int) -> IO[bytes]:
        info = zipfile.ZipInfo(f"{TOP}/{name}", date_time=(1980, 1, 1, 0, 0, 0))
        info.create_system = 3  # the same on every system
        info.file_size = nbytes
        zip64 = nbytes * 1.05 > zipfile.ZIP64_LIMIT
        start = self._stream.tell() + _LOCAL_HEADER + len(info.filename) + 4
        padding = -(start + (_ZIP64_EXTRA if zip64 else 0)) % ALIGNMENT
        info.extra = _PADDING_ID + padding.to_bytes(2, "little") + b"Z" * padding
        return self._zip.open(info, "w", force_zip64=zip64)


class StateDictWriter(TorchArchiveWriter):
    """Writes a state dict: names to tensors, in the order of the table, strides kept."""

    def __init__(self, path: str | PathLike[str], entries: Sequence[TensorEntry]) -> None:
        check_names(Path(path), entries)
        super().__init__(path, {entry.name: entry for entry in entries})


def save_state_dict(path: str | PathLike[str], tensors: Mapping[str, torch.Tensor]) -> None:
    """Write tensors that are already in memory, each with the stride that it has.

    Dense strides (any permutation of axes) are kept; others become C order.
    """
    entries = [entry_like(name, tensor) for name, tensor in tensors.items()]
    with StateDictWriter(path, entries) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


def entry_like(name: str, tensor: torch.Tensor) -> TensorEntry:
    """The table entry that keeps dtype, shape and (where it is dense) the stride of a tensor."""
    shape, stride = tuple(tensor.shape), tuple(tensor.stride())
    keep = not tensor.is_contiguous() and _is_dense(shape, stride)
    return TensorEntry(name, tensor.dtype, shape, stride if keep else None)


def _is_dense(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    return (
        torch.empty_strided(shape, stride, device="meta")
        .permute(sorted(range(len(stride)), key=lambda axis: -stride[axis]))
        .is_contiguous()
    )


@dataclass(frozen=True)
class _Storage:
    """Stands for storage `key` in the pickle; the pickler writes a persistent id for it."""

    dtype: torch.dtype
    key: int
    numel: int


class _Tensor:
    """Stands for a tensor in the pickle: reduces to torch's own rebuilding function."""

    def __init__(self, entry: TensorEntry, key: int) -> None:
        self.entry = entry
        self.storage = _Storage(entry.dtype, key, entry.nbytes // entry.dtype.itemsize)

    def __reduce__(self) -> tuple[object, ...]:
        entry = self.entry
        stride = entry.stride if entry.stride is not None else _c_stride(entry.shape)
        # Fresh tuples: pickle writes one object twice as a reference, and bytes must not
        # depend on which objects the caller shares.
        sizes, strides = (*entry.shape,), (*stride,)
        hooks: OrderedDict[str, object] = OrderedDict()
        if entry.dtype in _STORAGES:
            return _rebuild_tensor_v2, (self.storage, 0, sizes, strides, False, hooks)
        extra: dict[str, object] = {}
        rebuilt = (self.storage, 0, sizes, strides, False, hooks, entry.dtype, extra)
        return _rebuild_tensor_v3, rebuilt


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: object) -> object:
        if not isinstance(obj, _Storage):
            return None
        kind = _STORAGES.get(obj.dtype)
        if kind is None:
            # Dtypes younger than the typed storages are stored as bytes.
            nbytes = obj.numel * obj.dtype.itemsize
            return ("storage", torch.UntypedStorage, str(obj.key), "cpu", nbytes)
        return ("storage", kind, str(obj.key), "cpu", obj.numel)


def _pickled(tree: Tree) -> bytes:
    buffer = io.BytesIO()
    keys: dict[str, int] = {}
    _Pickler(buffer, protocol=2).dump(_stand_in(tree, keys))
    return buffer.getvalue()


def _stand_in(tree: Tree, keys: dict[str, int]) -> object:
    """The tree with fresh objects only, and stand-ins for its tensors."""
    if isinstance(tree, TensorEntry):
        return _Tensor(tree, keys.setdefault(tree.name, len(keys)))
    if isinstance(tree, str):
        return _fresh(tree)
    if isinstance(tree, Mapping):
        return {_fresh(key): _stand_in(value, keys) for key, value in tree.items()}
    if isinstance(tree, Sequence):
        return [_stand_in(value, keys) for value in tree]
    return tree


def _fresh(text: str) -> str:
    return text.encode("utf-8").decode("utf-8")


def _entries_in(tree: Tree) -> list[TensorEntry]:
    if isinstance(tree, TensorEntry):
        return [tree]
    if isinstance(tree, Mapping):
        return [entry for value in tree.values() for entry in _entries_in(value)]
    if isinstance(tree, Sequence) and not isinstance(tree, str):
        return [entry for value in tree for entry in _entries_in(value)]
    return []


def _c_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    return torch.empty(shape, device="meta").stride()
