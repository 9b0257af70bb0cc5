"""Is a shared object what it should be?"""

from __future__ import annotations

from pathlib import Path

from buildsys.errors import StepError


def check_library(path: Path, machine: str) -> None:
    """Raises StepError unless the file is a shared object for `machine` ("AArch64",
    "Hexagon v75", as formats/elf_file.py names it)."""
    from buildsys.formats.elf_file import read_elf_header

    if not path.is_file():
        raise StepError(f"the compiler ended well and wrote no {path.name}")
    header = read_elf_header(path)
    if header.machine != machine or header.kind != "shared object":
        raise StepError(
            f"{path.name} should be a shared object for {machine}, and is a "
            f"{header.kind} for {header.machine}",
            remedy="The toolchain compiled for another target: see the log.",
        )
