"""The .mllm file of mllm v2 (`ModelFileV2`): reader and streamed writer.

Little endian, packed: a header of 532 bytes, then one descriptor of 352 bytes per tensor, then
the payloads without gaps or alignment. Source: mllm v2, ModelFileV2.hpp and pymllm/convertor.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
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
from buildsys.formats.ordered_writer import HeaderAndPayloads
from buildsys.formats.tensors import TensorSource, copy_tensor

MAGIC = 0x519A
VERSION = 2
MAX_DIMENSIONS = 16
MAX_NAME = 255  # bytes; the field has 256, and the runtime wants a zero at its end
_HEADER = struct.Struct("<ii512sIQ")
_DESCRIPTOR = struct.Struct("<IIQQQ16i256s")

# pymllm's table (bool is stored as uint8), and float64, which mllm does not have, as float32.
TYPES = {
    torch.float32: MllmType.F32,
    torch.float64: MllmType.F32,
    torch.float16: MllmType.F16,
    torch.bfloat16: MllmType.BF16,
    torch.bool: MllmType.U8,
    torch.uint8: MllmType.U8,
    torch.int8: MllmType.I8,
    torch.int16: MllmType.I16,
    torch.uint16: MllmType.U16,
    torch.int32: MllmType.I32,
    torch.uint32: MllmType.U32,
    torch.int64: MllmType.I64,
    torch.uint64: MllmType.U64,
}


class MllmV2Writer(HeaderAndPayloads):
    """Writes a v2 file. `model_name` is at most 511 bytes; mllm's own converter leaves it empty."""

    def __init__(
        self, path: str | PathLike[str], entries: Sequence[MllmEntry], *, model_name: str = ""
    ) -> None:
        header = _make_header(Path(path), entries, model_name)
        super().__init__(path, [entry.payload() for entry in entries], header)


def save_mllm_v2(path: str | PathLike[str], source: TensorSource, *, model_name: str = "") -> None:
    """Stream all tensors of a source into a v2 file, in its order, with the types of `TYPES`."""
    entries = mllm_entries(source, TYPES, VERSION)
    with MllmV2Writer(path, entries, model_name=model_name) as writer:
        for entry in entries:
            convert = conversion(source, entry.name, entry)
            copy_tensor(source, entry.name, writer, convert=convert)


def open_mllm_v2(path: str | PathLike[str]) -> MllmSource:
    """Open a v2 file. Raises FormatError, naming the tensor, when it is damaged."""
    file = MappedFile(path)
    if file.size < _HEADER.size:
        raise FormatError("is too short for a .mllm v2 file", file=file.path, remedy=DAMAGED)
    magic, version, raw_name, count, table = _HEADER.unpack(file.read(0, _HEADER.size))
    if (magic, version) != (MAGIC, VERSION):
        raise FormatError(f"has magic {magic:#x} version {version}, not .mllm v2", file=file.path)
    if table < _HEADER.size or table + count * _DESCRIPTOR.size > file.size:
        raise FormatError(
            f"the table of {count} tensors at byte {table} is outside the file of {file.size}",
            file=file.path,
            remedy=DAMAGED,
        )
    data_start = table + count * _DESCRIPTOR.size
    lines = _DESCRIPTOR.iter_unpack(file.read(table, count * _DESCRIPTOR.size))
    stored = [_read_descriptor(file, line, data_start) for line in lines]
    model_name = raw_name.split(b"\0")[0].decode("utf-8", errors="replace")
    return MllmSource(file, stored, {"format": "mllm v2", "model_name": model_name})


def _make_header(path: Path, entries: Sequence[MllmEntry], model_name: str) -> bytes:
    encoded = model_name.encode("utf-8")
    if len(encoded) > 511:
        raise FormatError("is longer than 511 bytes", file=path, field="model_name")
    offset = _HEADER.size + len(entries) * _DESCRIPTOR.size
    header = bytearray(_HEADER.pack(MAGIC, VERSION, encoded, len(entries), _HEADER.size))
    for number, entry in enumerate(entries):
        header += _make_descriptor(path, number, entry, offset)
        offset += entry.nbytes
    return bytes(header)


def _make_descriptor(path: Path, number: int, entry: MllmEntry, offset: int) -> bytes:
    name = entry.name.encode("utf-8")
    fault = None
    if len(name) > MAX_NAME:
        fault = f"the name has {len(name)} bytes, .mllm v2 holds {MAX_NAME}"
    elif len(entry.shape) > MAX_DIMENSIONS:
        fault = f"has {len(entry.shape)} dimensions, .mllm v2 holds {MAX_DIMENSIONS}"
    elif MllmType.IQ2_S < entry.type < MllmType.BF16:
        fault = f"version 2 has no {entry.type.name}"
    elif any(size >= 2**31 for size in entry.shape):
        fault = f"shape {list(entry.shape)} does not fit 32-bit sizes"
    if fault:
        raise FormatError(fault, file=path, tensor=entry.name)
    sizes = entry.shape + (0,) * (MAX_DIMENSIONS - len(entry.shape))
    shape_len = len(entry.shape)
    return _DESCRIPTOR.pack(number, entry.type, entry.nbytes, offset, shape_len, *sizes, name)


def _read_descriptor(
    file: MappedFile, line: tuple[int | bytes, ...], data_start: int
) -> StoredPayload:
    *numbers, raw_name = line
    number, code, nbytes, offset, dimensions, *sizes = (int(value) for value in numbers)
    assert isinstance(raw_name, bytes)
    try:
        name = raw_name.split(b"\0")[0].decode("utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(f"the name of tensor {number} is no UTF-8", file=file.path) from error
    shape = tuple(sizes[:dimensions])
    fault = None
    if not name:
        fault = f"tensor {number} has no name"
    elif dimensions > MAX_DIMENSIONS or any(size < 0 for size in shape):
        fault = f"shape {list(shape)} of {dimensions} dimensions is impossible"
    elif offset < data_start:
        fault = "its data lies in the table"
    if fault:
        raise FormatError(fault, file=file.path, tensor=name or None, remedy=DAMAGED)
    entry = MllmEntry(name, type_of_code(code, VERSION, name, file.path), shape, nbytes)
    if entry.type in PLAIN and entry.payload().dtype != PLAIN[entry.type]:
        fault = f"has {nbytes} bytes, which are no {entry.type.name} {list(shape)}"
        raise FormatError(fault, file=file.path, tensor=name, remedy=DAMAGED)
    return StoredPayload(entry, offset)
