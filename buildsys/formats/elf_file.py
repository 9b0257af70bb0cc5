"""Reads the header of an ELF file: for which machine it is. Source: the System V ABI, elf.h."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from buildsys.formats.errors import FormatError

MAGIC = b"\x7fELF"
HEXAGON = 164
_MACHINES = {
    3: "x86",
    40: "ARM",
    62: "x86-64",
    HEXAGON: "Hexagon",
    183: "AArch64",
    243: "RISC-V",
    258: "LoongArch",
}
_KINDS = {1: "relocatable object", 2: "executable", 3: "shared object", 4: "core dump"}
_HEXAGON_VERSION = 0x3FF  # bits of e_flags; 0x75 is v75


@dataclass(frozen=True)
class ElfHeader:
    """Machine ("AArch64", "Hexagon v75", ...), word size in bits, byte order and kind."""

    machine: str
    bits: int
    byte_order: str
    kind: str


def read_elf_header(path: str | PathLike[str]) -> ElfHeader:
    """Read the header of an ELF file. Raises FormatError for a file that is none."""
    file = Path(path)
    try:
        with file.open("rb") as stream:
            header = stream.read(64)
    except OSError as error:
        raise FormatError(f"cannot be read: {error.strerror}", file=file) from error
    wide = header[4:5] == b"\x02"
    order = {b"\x01": "<", b"\x02": ">"}.get(header[5:6])
    flags_at = 48 if wide else 36
    valid = header[:4] == MAGIC and header[4:5] in (b"\x01", b"\x02")
    if not valid or order is None or len(header) < flags_at + 4:
        raise FormatError("is no ELF file, or was cut short", file=file)
    kind, machine = struct.unpack_from(f"{order}HH", header, 16)
    (flags,) = struct.unpack_from(f"{order}I", header, flags_at)
    name = _MACHINES.get(machine, f"machine {machine}")
    if machine == HEXAGON:
        name += f" v{flags & _HEXAGON_VERSION:x}"
    return ElfHeader(
        machine=name,
        bits=64 if wide else 32,
        byte_order="little endian" if order == "<" else "big endian",
        kind=_KINDS.get(kind, f"type {kind}"),
    )
