"""The .mllm file of mllm v1 (`ModelFileV1`): reader and streamed writer.

Little endian, packed: i32 magic 20012, u64 bytes of the index, then per tensor i32 length of
the name, name, u64 bytes, u64 absolute offset, i32 type code; then the payloads without gaps.
There are no shapes. Source: mllm v1, tools/convertor/converter.py and ParamLoader.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path

import torch

from buildsys.formats.errors import FormatError
from buildsys.formats.mapped_file import MappedFile
from buildsys.formats.mllm_source import (
    DAMAGED,
    MllmSource,
    StoredPayload,
    conversion,
    mllm_entries,
    type_of_code,
)
from buildsys.formats.mllm_types import PLAIN, MllmEntry, MllmType
from buildsys.formats.ordered_writer import HeaderAndPayloads, check_names
from buildsys.formats.tensors import TensorEntry, TensorSource, copy_tensor

MAGIC = 20012
_HEAD = struct.Struct("<iQ")
_TAIL = struct.Struct("<QQi")

# What mllm's converter makes of each dtype, but for int32 and int16, which it turns into
# float32 although the runtime reads an int32 bias as int32.
TYPES = {
    torch.float32: MllmType.F32,
    torch.float64: MllmType.F32,
    torch.float16: MllmType.F32,
    torch.bfloat16: MllmType.F32,
    torch.bool: MllmType.I8,
    torch.int8: MllmType.I8,
    torch.uint8: MllmType.KLEIDIAI_Q4_0,
    torch.int16: MllmType.I16,
    torch.int32: MllmType.I32,
    torch.int64: MllmType.F32,
}


class MllmV1Writer(HeaderAndPayloads):
    """Writes a v1 file. Payloads are given under the names of `entries`.

    `rename` writes every "_weight" and "_bias" of a name as ".weight" and ".bias" in the
    index, as mllm's converter does.
    """

    def __init__(
        self, path: str | PathLike[str], entries: Sequence[MllmEntry], *, rename: bool = True
    ) -> None:
        index = _make_index(Path(path), entries, rename)
        super().__init__(path, [entry.payload() for entry in entries], index)


def save_mllm_v1(path: str | PathLike[str], source: TensorSource, *, rename: bool = True) -> None:
    """Stream all tensors of a source into a v1 file, in its order, with the types of `TYPES`."""
    entries = mllm_entries(source, TYPES, 1)
    with MllmV1Writer(path, entries, rename=rename) as writer:
        for entry in entries:
            convert = conversion(source, entry.name, entry)
            copy_tensor(source, entry.name, writer, convert=convert)


def open_mllm_v1(
    path: str | PathLike[str], shapes: Mapping[str, Sequence[int]] | None = None
) -> MllmSource:
    """Open a v1 file. Plain tensors have the given shape, or `(numel,)` where none is given.

    Raises FormatError, naming the tensor, for a damaged file and for a shape that its bytes
    do not fill.
    """
    file = MappedFile(path)
    if file.size < _HEAD.size:
        raise FormatError("is too short for a .mllm file", file=file.path, remedy=DAMAGED)
    magic, index_bytes = _HEAD.unpack(file.read(0, _HEAD.size))
    if magic != MAGIC:
        raise FormatError(f"has magic {magic}, not {MAGIC} (.mllm v1)", file=file.path)
    if _HEAD.size + index_bytes > file.size:
        raise FormatError(
            f"the index claims {index_bytes} bytes in a file of {file.size}",
            file=file.path,
            remedy=DAMAGED,
        )
    stored = _parse_index(file, index_bytes, shapes or {})
    return MllmSource(file, stored, {"format": "mllm v1"})


def runtime_name(name: str) -> str:
    """The name that mllm's converter writes for a tensor of this name."""
    return name.replace("_weight", ".weight").replace("_bias", ".bias")


def _make_index(path: Path, entries: Sequence[MllmEntry], rename: bool) -> bytes:
    names = [runtime_name(entry.name) if rename else entry.name for entry in entries]
    check_names(path, [TensorEntry(name, torch.uint8, ()) for name in names])
    # The length in bytes, not in characters: a name may be any UTF-8.
    encoded = [name.encode("utf-8") for name in names]
    index_bytes = sum(4 + len(name) + _TAIL.size for name in encoded)
    offset = _HEAD.size + index_bytes
    index = bytearray(_HEAD.pack(MAGIC, index_bytes))
    for entry, name in zip(entries, encoded, strict=True):
        if not _exists(entry.type):
            raise FormatError(f"version 1 has no {entry.type.name}", file=path, tensor=entry.name)
        index += struct.pack("<i", len(name)) + name
        index += _TAIL.pack(entry.nbytes, offset, entry.type)
        offset += entry.nbytes
    return bytes(index)


def _exists(kind: MllmType) -> bool:
    return kind < MllmType.BF16


def _parse_index(
    file: MappedFile, index_bytes: int, shapes: Mapping[str, Sequence[int]]
) -> list[StoredPayload]:
    index = file.read(_HEAD.size, index_bytes)
    data_start = _HEAD.size + index_bytes
    stored: list[StoredPayload] = []
    at = 0
    while at < len(index):
        after = f" after {stored[-1].entry.name!r}" if stored else ""
        broken = FormatError(f"the index is damaged{after}", file=file.path, remedy=DAMAGED)
        if at + 4 > len(index):
            raise broken
        (length,) = struct.unpack_from("<i", index, at)
        at += 4
        if length <= 0 or at + length + _TAIL.size > len(index):
            raise broken
        try:
            name = index[at : at + length].decode("utf-8")
        except UnicodeDecodeError as error:
            raise broken from error
        nbytes, offset, code = _TAIL.unpack_from(index, at + length)
        at += length + _TAIL.size
        if offset < data_start:
            raise FormatError("its data lies in the index", file=file.path, tensor=name)
        kind = type_of_code(code, 1, name, file.path)
        stored.append(StoredPayload(_shaped(name, kind, nbytes, shapes.get(name), file), offset))
    return stored


def _shaped(
    name: str, kind: MllmType, nbytes: int, shape: Sequence[int] | None, file: MappedFile
) -> MllmEntry:
    if kind not in PLAIN:
        return MllmEntry(name, kind, tuple(shape) if shape is not None else (nbytes,), nbytes)
    itemsize = PLAIN[kind].itemsize
    entry = MllmEntry(name, kind, (nbytes // itemsize,) if shape is None else tuple(shape), nbytes)
    if entry.payload().dtype != PLAIN[kind]:
        raise FormatError(
            f"has {nbytes} bytes, which are no {kind.name} {list(entry.shape)}",
            file=file.path,
            tensor=name,
            remedy="The file belongs to another model, or is damaged.",
        )
    return entry
