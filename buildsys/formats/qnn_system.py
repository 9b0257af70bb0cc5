"""python qnn_system.py LIBRARY FILE: what a QNN context binary says of itself, as JSON.

Asks Qualcomm's own libQnnSystem by ctypes, through its public interface, and reads the record of
version 3 that it hands out. A program of its own with nothing but the standard library: a damaged
file could take down the process that reads it.
"""

from __future__ import annotations

import ctypes
import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RECORD_VERSION = 3
DATA_TYPES = {
    0x0008: "int8", 0x0016: "int16", 0x0032: "int32", 0x0108: "uint8", 0x0116: "uint16",
    0x0132: "uint32", 0x0216: "float16", 0x0232: "float32", 0x0308: "sfxp8", 0x0316: "sfxp16",
    0x0332: "sfxp32", 0x0408: "ufxp8", 0x0416: "ufxp16", 0x0432: "ufxp32", 0x0508: "bool8",
}  # fmt: skip
SCALE_OFFSET = 0  # the encoding with one scale and one offset for the tensor
TENSOR_SIZE = 144


class Record:
    """The bytes at an address of this process, as little-endian fields."""

    def __init__(self, address: int) -> None:
        self._address = address

    def u32(self, offset: int) -> int:
        return int(self._field("I", offset))

    def i32(self, offset: int) -> int:
        return int(self._field("i", offset))

    def f32(self, offset: int) -> float:
        return float(self._field("f", offset))

    def address(self, offset: int) -> int:
        return int(self._field("Q", offset))

    def text(self, offset: int) -> str:
        place = self.address(offset)
        return ctypes.string_at(place).decode("utf-8", "replace") if place else ""

    def version(self, offset: int) -> str:
        return ".".join(str(self.u32(offset + 4 * part)) for part in range(3))

    def _field(self, code: str, offset: int) -> Any:
        size = struct.calcsize(code)
        return struct.unpack(f"<{code}", ctypes.string_at(self._address + offset, size))[0]


def read(library: str, file: str) -> dict[str, Any]:
    """The record as plain values. Raises SystemExit with what the library says."""
    system = _functions(library)
    content = Path(file).read_bytes()
    buffer = ctypes.create_string_buffer(content, len(content))
    handle, info, size = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_uint64()
    create = ctypes.CFUNCTYPE(ctypes.c_uint64, ctypes.c_void_p)(system[0])
    if create(ctypes.byref(handle)):
        raise SystemExit("libQnnSystem gives no context")
    get = ctypes.CFUNCTYPE(
        ctypes.c_uint64,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_uint64,
        ctypes.c_void_p,
        ctypes.c_void_p,
    )(system[1])
    error = get(handle, buffer, len(content), ctypes.byref(info), ctypes.byref(size))
    if error or not info.value:
        raise SystemExit(f"libQnnSystem refuses it (error {error})")
    return _binary(Record(info.value))


def _functions(library: str) -> tuple[int, ...]:
    """The addresses of systemContextCreate and systemContextGetBinaryInfo."""
    providers, count = ctypes.POINTER(ctypes.c_void_p)(), ctypes.c_uint32()
    get = ctypes.CDLL(library).QnnSystemInterface_getProviders
    get.restype = ctypes.c_uint64
    if get(ctypes.byref(providers), ctypes.byref(count)) or not count.value:
        raise SystemExit("libQnnSystem has no interface")
    interface = Record(int(providers[0] or 0))
    if interface.u32(16) != 1:
        raise SystemExit(f"libQnnSystem has interface {interface.version(16)}, not 1.x")
    return interface.address(32), interface.address(40)


def _binary(record: Record) -> dict[str, Any]:
    if record.u32(0) != RECORD_VERSION:
        raise SystemExit(f"its record has version {record.u32(0)}, not {RECORD_VERSION}")
    graphs = record.u32(96)
    return {
        "backend": record.u32(8),
        "build": record.text(16),
        "core_api": record.version(24),
        "backend_api": record.version(36),
        "blob": record.version(56),
        "soc_model": record.u32(136),
        "graphs": [_graph(each) for each in _items(record.address(104), graphs, GRAPH_SIZE)],
    }


GRAPH_SIZE = 112


def _graph(record: Record) -> dict[str, Any]:
    return {
        "name": record.text(8),
        "inputs": [_tensor(t) for t in _items(record.address(24), record.u32(16), TENSOR_SIZE)],
        "outputs": [_tensor(t) for t in _items(record.address(40), record.u32(32), TENSOR_SIZE)],
    }


def _tensor(record: Record) -> dict[str, Any]:
    kind = record.u32(32)
    quantized = record.u32(44) == SCALE_OFFSET and record.f32(48) != 0.0
    shape = ctypes.string_at(record.address(88), 4 * record.u32(80))
    return {
        "name": record.text(16),
        "type": DATA_TYPES.get(kind, f"0x{kind:04x}"),
        "shape": list(struct.unpack(f"<{record.u32(80)}I", shape)),
        "scale": record.f32(48) if quantized else None,
        # QNN's offset is the negative zero point.
        "zero_point": -record.i32(52) if quantized else None,
    }


def _items(address: int, count: int, size: int) -> Iterator[Record]:
    return (Record(address + index * size) for index in range(count))


if __name__ == "__main__":
    print(json.dumps(read(sys.argv[1], sys.argv[2])))
