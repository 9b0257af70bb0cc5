"""safetensors: a streamed reader (file, index or folder of shards) and a streamed writer.

Format: u64 length of the header, the header as JSON, then the payloads without gaps
(https://huggingface.co/docs/safetensors, "Format"). The header is parsed and checked here, so
that a damaged file is told by the name of the tensor that it damages.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TypeGuard

import torch

from buildsys.formats.errors import FormatError
from buildsys.formats.mapped_file import MappedFile
from buildsys.formats.ordered_writer import HeaderAndPayloads
from buildsys.formats.tensors import (
    TensorEntry,
    TensorSource,
    copy_tensor,
    entries_of,
    no_such_tensor,
)

# The limit of the reference implementation.
MAX_HEADER = 100_000_000
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
TYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
DOWNLOAD_AGAIN = "The file is damaged or was cut short: copy or download it again."


@dataclass(frozen=True)
class _Stored:
    type: str
    shape: tuple[int, ...]
    offset: int  # from the start of the file
    nbytes: int


class SafetensorsSource:
    """The tensors of one .safetensors file, mapped. Raises FormatError when it is damaged."""

    def __init__(self, path: str | PathLike[str]) -> None:
        self.path = Path(path)
        self._file = MappedFile(self.path)
        self._stored, self.metadata = _read_header(self._file)

    def names(self) -> Sequence[str]:
        return list(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._find(name).shape

    def dtype(self, name: str) -> torch.dtype:
        return DTYPES[self._find(name).type]

    def stored_type(self, name: str) -> str:
        return self._find(name).type

    def nbytes(self, name: str) -> int:
        return self._find(name).nbytes

    def read(self, name: str) -> torch.Tensor:
        stored = self._find(name)
        return self._file.tensor(stored.offset, DTYPES[stored.type], stored.shape)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        stored = self._find(name)
        return self._file.rows(stored.offset, DTYPES[stored.type], stored.shape, start, stop)

    def release(self, name: str) -> None:
        stored = self._find(name)
        self._file.release(stored.offset, stored.nbytes)

    def _find(self, name: str) -> _Stored:
        if name not in self._stored:
            raise no_such_tensor(name, self._stored, self.path)
        return self._stored[name]


class SafetensorsWriter(HeaderAndPayloads):
    """Writes one .safetensors file; equal tables and payloads give equal bytes.

    Payloads lie in the order of the table. The header is padded with spaces to a multiple of
    8 bytes. Every dtype of `DTYPES` is accepted; `metadata` is text to text.
    """

    def __init__(
        self,
        path: str | PathLike[str],
        entries: Sequence[TensorEntry],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        header = _make_header(Path(path), entries, metadata or {})
        super().__init__(path, entries, header)


def save_safetensors(
    path: str | PathLike[str],
    source: TensorSource,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Stream all tensors of a source into one .safetensors file."""
    with SafetensorsWriter(path, entries_of(source), metadata) as writer:
        for name in source.names():
            copy_tensor(source, name, writer)


def _make_header(path: Path, entries: Sequence[TensorEntry], metadata: Mapping[str, str]) -> bytes:
    table: dict[str, object] = {}
    if metadata:
        table["__metadata__"] = {key: metadata[key] for key in sorted(metadata)}
    offset = 0
    for entry in entries:
        if entry.dtype not in TYPE_NAMES or entry.name == "__metadata__":
            what = (
                f"dtype {entry.dtype}" if entry.dtype not in TYPE_NAMES else "tensor of this name"
            )
            raise FormatError(f"safetensors can hold no {what}", file=path, tensor=entry.name)
        table[entry.name] = {
            "dtype": TYPE_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.nbytes],
        }
        offset += entry.nbytes
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _read_header(file: MappedFile) -> tuple[dict[str, _Stored], dict[str, object]]:
    if file.size < 8:
        raise FormatError(
            f"{file.size} bytes are no safetensors file", file=file.path, remedy=DOWNLOAD_AGAIN
        )
    (length,) = struct.unpack("<Q", file.read(0, 8))
    if length > MAX_HEADER or 8 + length > file.size:
        raise FormatError(
            f"the header claims {length} bytes in a file of {file.size}",
            file=file.path,
            remedy="It is no safetensors file, or it was cut short: copy or download it again.",
        )
    table = _parse_json(file, length)
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise FormatError("is not an object", file=file.path, field="__metadata__")
    stored = {name: _read_entry(file, name, line, 8 + length) for name, line in table.items()}
    in_order = dict(sorted(stored.items(), key=lambda item: (item[1].offset, item[1].nbytes)))
    _check_layout(file, in_order, 8 + length)
    return in_order, metadata


def _parse_json(file: MappedFile, length: int) -> dict[str, object]:
    def refuse_twice(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise FormatError("is in the header twice", file=file.path, tensor=twice)
        return found

    try:
        table = json.loads(file.read(8, length).decode("utf-8"), object_pairs_hook=refuse_twice)
    except (ValueError, RecursionError) as error:
        raise FormatError(
            f"the header is not JSON ({error})", file=file.path, remedy=DOWNLOAD_AGAIN
        ) from error
    if not isinstance(table, dict):
        raise FormatError("the header is not a JSON object", file=file.path, remedy=DOWNLOAD_AGAIN)
    return table


def _read_entry(file: MappedFile, name: str, line: object, data_start: int) -> _Stored:
    def wrong(message: str) -> FormatError:
        return FormatError(message, file=file.path, tensor=name, remedy=DOWNLOAD_AGAIN)

    if not isinstance(line, dict):
        raise wrong("its header entry is not an object")
    kind, shape, offsets = line.get("dtype"), line.get("shape"), line.get("data_offsets")
    if not isinstance(kind, str) or kind not in DTYPES:
        raise FormatError(
            f"dtype {kind!r} is not supported",
            file=file.path,
            tensor=name,
            remedy=f"Supported: {', '.join(DTYPES)}.",
        )
    if not _is_sizes(shape):
        raise wrong(f"shape {shape!r} is not a list of sizes")
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise wrong(f"data_offsets {offsets!r} are not [begin, end]")
    begin, end = offsets
    needed = math.prod(shape) * DTYPES[kind].itemsize
    if end - begin != needed:
        raise wrong(f"{kind} {shape} needs {needed} bytes, data_offsets give {end - begin}")
    if data_start + end > file.size:
        raise wrong(f"its data ends at byte {data_start + end}, the file at {file.size}")
    return _Stored(kind, tuple(shape), data_start + begin, needed)


def _is_sizes(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)


def _check_layout(file: MappedFile, stored: Mapping[str, _Stored], data_start: int) -> None:
    """Payloads follow each other without gap or overlap and fill the file."""
    end = data_start
    for name, entry in stored.items():
        if entry.offset != end:
            fault = "overlaps the one before it" if entry.offset < end else "leaves a gap before it"
            raise FormatError(
                f"its data {fault}", file=file.path, tensor=name, remedy=DOWNLOAD_AGAIN
            )
        end += entry.nbytes
    if end != file.size:
        raise FormatError(
            f"{file.size - end} bytes follow the last tensor",
            file=file.path,
            remedy=DOWNLOAD_AGAIN,
        )
