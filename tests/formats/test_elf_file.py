"""ELF headers: the machine that a library is for."""

from __future__ import annotations

import platform
import struct
import sys
from pathlib import Path

import pytest

from buildsys.formats.elf_file import read_elf_header
from buildsys.formats.errors import FormatError

MACHINES = {"x86_64": "x86-64", "aarch64": "AArch64"}


def header(bits: int, order: str, kind: int, machine: int, flags: int) -> bytes:
    """An ELF header as elf.h lays it out (Elf32_Ehdr, Elf64_Ehdr)."""
    ident = b"\x7fELF" + bytes([bits // 32, 1 if order == "<" else 2, 1]) + bytes(9)
    address = "Q" if bits == 64 else "I"
    fields = struct.pack(f"{order}HHI3{address}I", kind, machine, 1, 0, 0, 0, flags)
    return ident + fields + struct.pack(f"{order}6H", *[0] * 6)


@pytest.mark.skipif(platform.machine() not in MACHINES, reason="another machine than the table has")
@pytest.mark.skipif(sys.platform != "linux", reason="the interpreter is no ELF file")
def test_pythons_own_executable_is_for_this_machine() -> None:
    read = read_elf_header(Path(sys.executable).resolve())
    assert read.machine == MACHINES[platform.machine()]
    assert (read.bits, read.byte_order) == (64, "little endian")


@pytest.mark.parametrize(
    ("content", "machine", "bits", "kind"),
    [
        (header(32, "<", 3, 164, 0x75), "Hexagon v75", 32, "shared object"),
        (header(32, "<", 3, 164, 0x68), "Hexagon v68", 32, "shared object"),
        (header(64, "<", 3, 183, 0), "AArch64", 64, "shared object"),
        (header(64, "<", 2, 62, 0), "x86-64", 64, "executable"),
        (header(64, ">", 1, 21, 0), "machine 21", 64, "relocatable object"),
    ],
)
def test_machine_is_read_from_the_header(
    tmp_path: Path, content: bytes, machine: str, bits: int, kind: str
) -> None:
    (tmp_path / "a.so").write_bytes(content)
    read = read_elf_header(tmp_path / "a.so")
    assert (read.machine, read.bits, read.kind) == (machine, bits, kind)


@pytest.mark.parametrize("length", [0, 3, 15, 40])
def test_short_file_is_refused(tmp_path: Path, length: int) -> None:
    (tmp_path / "a.so").write_bytes(header(64, "<", 3, 183, 0)[:length])
    with pytest.raises(FormatError, match="no ELF file"):
        read_elf_header(tmp_path / "a.so")


def test_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="cannot be read"):
        read_elf_header(tmp_path / "nothing")
