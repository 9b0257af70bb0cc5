"""Sophgo's .bmodel: what a compiled model holds, and its bytes without the accidents of a build.

A header of 64 bytes (magic, sizes), a flatbuffer that describes the model, then what it points
to: weights, commands, kernels. The description's schema, bmodel.fbs, is published with TPU-MLIR;
the tables and fields below carry its names.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import BinaryIO

from buildsys.formats.errors import FormatError
from buildsys.formats.flatbuffer import Table, root_table

BMODEL_MAGIC = b"\xee\xaa\x55\xff"
HEADER = struct.Struct("<4sIII48x")
# Numbers of fields, as bmodel.fbs gives them.
MODEL = {"version": 1, "time": 2, "chip": 3, "net": 4, "neuron_size": 5, "kernel_module": 6,
         "device_num": 7}  # fmt: skip
NET = {"name": 0, "parameter": 3}
PARAMETER = {"input": 0, "output": 1, "ctx_size": 3, "coeff_mem": 4, "is_dynamic": 5,
             "binary_ir": 11, "ctx_sizes": 14, "core_num": 16}  # fmt: skip
TENSOR = {"name": 0, "data_type": 1, "shape": 5}
COEFF_BINARY, KERNEL_BINARY, SHAPE_DIM = 2, 1, 0
TYPES = ("float32", "float16", "int8", "uint8", "int16", "uint16", "int32", "uint32",
         "bfloat16", "int4", "uint4")  # fmt: skip
# The layer that picks the most likely token is described by an instruction that begins like this;
# then come a flag of one byte and three bytes that the compiler leaves as it found them.
TOPK = bytes.fromhex("00000000 01000000 01000000 00000100 ff010222")
NO_TIME = b"Thu Jan  1 00:00:00 1970"


@dataclass(frozen=True)
class NetTensor:
    """An input or an output of a net."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Net:
    """One net, in its first stage. weights: bytes of coefficients that it reads (nets may share
    them). memory: bytes for what it computes in between."""

    name: str
    dynamic: bool
    stages: int
    cores: int
    inputs: tuple[NetTensor, ...]
    outputs: tuple[NetTensor, ...]
    weights: int
    memory: int


@dataclass(frozen=True)
class BModel:
    """What a .bmodel says of itself. weights: bytes, shared ones once. kernels: bytes of the
    program for the chip that every bmodel carries. time: as the compiler wrote it."""

    path: Path
    size: int
    chip: str
    version: str
    time: str
    devices: int
    nets: tuple[Net, ...]
    weights: int
    memory: int
    kernels: int


def read_bmodel(path: str | PathLike[str]) -> BModel:
    """The description of a .bmodel. Raises FormatError for what is none, or is damaged."""
    place = Path(path)
    with place.open("rb") as file:
        size, _ = _read_header(file.read(HEADER.size), place)
        description = file.read(size)
    try:
        return _describe(place, root_table(description))
    except (struct.error, IndexError, UnicodeDecodeError) as error:
        raise FormatError(f"its description is damaged: {error}", file=place) from error


def _read_header(header: bytes, path: Path) -> tuple[int, int]:
    """(size of the description, start of the binary data)."""
    if len(header) < HEADER.size or not header.startswith(BMODEL_MAGIC):
        raise FormatError("is no bmodel", file=path)
    _, begins, size, binary = HEADER.unpack(header)
    if begins != HEADER.size or begins + size + binary != path.stat().st_size:
        raise FormatError("is not as long as its header says", file=path)
    return size, begins + size


def _describe(path: Path, model: Table) -> BModel:
    nets = tuple(_net(each) for each in model.tables(MODEL["net"]))
    coefficients = dict(_coefficients(model))
    kernel = model.table(MODEL["kernel_module"])
    return BModel(
        path=path,
        size=path.stat().st_size,
        chip=model.text(MODEL["chip"]),
        version=model.text(MODEL["version"]),
        time=model.text(MODEL["time"]),
        devices=model.u32(MODEL["device_num"]) or 1,
        nets=nets,
        weights=sum(coefficients.values()),
        memory=model.u64(MODEL["neuron_size"]),
        kernels=0 if kernel is None else kernel.u64_pair(KERNEL_BINARY)[1],
    )


def _coefficients(model: Table) -> Iterator[tuple[int, int]]:
    """(place in the file, bytes) of what nets read; two nets may name one place."""
    for net in model.tables(MODEL["net"]):
        for stage in net.tables(NET["parameter"]):
            memory = stage.table(PARAMETER["coeff_mem"])
            if memory is not None:
                yield memory.u64_pair(COEFF_BINARY)


def _net(table: Table) -> Net:
    stages = table.tables(NET["parameter"])
    first = stages[0]
    memory = first.table(PARAMETER["coeff_mem"])
    sizes = first.u64s(PARAMETER["ctx_sizes"])
    return Net(
        name=table.text(NET["name"]),
        dynamic=first.u32(PARAMETER["is_dynamic"]) != 0,
        stages=len(stages),
        cores=first.u32(PARAMETER["core_num"]) or 1,
        inputs=tuple(map(_tensor, first.tables(PARAMETER["input"]))),
        outputs=tuple(map(_tensor, first.tables(PARAMETER["output"]))),
        weights=0 if memory is None else memory.u64_pair(COEFF_BINARY)[1],
        memory=sum(sizes) if sizes else first.u64(PARAMETER["ctx_size"]),
    )


def _tensor(table: Table) -> NetTensor:
    kind = table.u32(TENSOR["data_type"])
    shapes = table.tables(TENSOR["shape"])
    return NetTensor(
        name=table.text(TENSOR["name"]),
        dtype=TYPES[kind] if kind < len(TYPES) else f"type {kind}",
        shape=shapes[0].u64s(SHAPE_DIM) if shapes else (),
    )


def without_accidents(path: str | PathLike[str]) -> int:
    """Blank, in place, what differs between two compilations of one thing; returns how many
    bytes that changed.

    That is the time of creation, and the padding in the instruction of a top-k layer.
    Raises FormatError for what is no bmodel.
    """
    place = Path(path)
    changed = 0
    with place.open("r+b") as file:
        size, start = _read_header(file.read(HEADER.size), place)
        model = root_table(file.read(size))
        at, length = model.text_place(MODEL["time"])
        changed += _put(file, HEADER.size + at, NO_TIME.ljust(length)[:length])
        for begins, size in _instructions(model):
            file.seek(start + begins)
            if size > len(TOPK) + 4 and file.read(len(TOPK)) == TOPK:
                changed += _put(file, start + begins + len(TOPK) + 1, bytes(3))
    return changed


def _instructions(model: Table) -> Iterator[tuple[int, int]]:
    """(place, bytes) of the instructions that nets have for what is not fixed commands."""
    for net in model.tables(MODEL["net"]):
        for stage in net.tables(NET["parameter"]):
            yield stage.u64_pair(PARAMETER["binary_ir"])


def _put(file: BinaryIO, at: int, value: bytes) -> int:
    """Write `value`; returns how many bytes were others."""
    file.seek(at)
    was = file.read(len(value))
    file.seek(at)
    file.write(value)
    return sum(old != new for old, new in zip(was, value, strict=True))


def summary(model: BModel) -> dict[str, object]:
    """What `inspect` and metrics show of a bmodel, as plain values; sizes in bytes."""
    return {
        "chip": model.chip,
        "version": model.version,
        "devices": model.devices,
        "bytes": model.size,
        "memory": {
            "weights": model.weights,
            "computing": model.memory,
            "kernels": model.kernels,
        },
        "nets": [
            {
                "name": net.name,
                "dynamic": net.dynamic,
                "cores": net.cores,
                "weights": net.weights,
                "memory": net.memory,
                "inputs": [_shown(tensor) for tensor in net.inputs],
                "outputs": [_shown(tensor) for tensor in net.outputs],
            }
            for net in model.nets
        ],
    }


def _shown(tensor: NetTensor) -> str:
    return f"{tensor.name} {tensor.dtype} {list(tensor.shape)}"
