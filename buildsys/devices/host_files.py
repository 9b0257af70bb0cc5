"""What is known of files here: sha256, and what an ELF file is for.

Both are remembered under the file's stat, so that deploying what is there already reads nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from buildsys.formats.elf_file import MAGIC, read_elf_header
from buildsys.formats.errors import FormatError

if TYPE_CHECKING:
    from buildsys.plan.graph import Json

VERSION = 1
BLOCK = 1 << 20
# A file that was written this shortly before it was read may be written again unseen.
SETTLED = 2_000_000_000
# The build of a Qualcomm AI Engine Direct library, as it calls itself: v2.31.0.250130151446
QNN_BUILD = re.compile(rb"v?(\d\.\d{1,3}\.\d{1,2}\.\d{12})(?:_\d+)?\0")


class HostFile(NamedTuple):
    """size: bytes. machine: of an ELF file, else "". program: an ELF file that can be run, or a
    script. qnn: the build of a QNN library, else ""."""

    sha256: str
    size: int
    machine: str
    program: bool
    qnn: str


class HostFiles:
    """Facts about files by path. Invariant: what is remembered was read from a file with the
    same stat, which had not been written in the two seconds before."""

    def __init__(self, memory: str) -> None:
        """memory: the file that facts are kept in."""
        self._memory = memory
        self._facts: dict[str, Json] = _read(memory)
        self._changed = False

    def of(self, path: str) -> HostFile:
        """Raises OSError for a file that cannot be read."""
        key = str(Path(path).absolute())
        found = Path(key).stat()
        stamp = [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]
        known = self._facts.get(key)
        if known is not None and known["stat"] == stamp:
            return HostFile(*known["facts"])
        now = time.time_ns()
        facts = look(key)
        if now - max(found.st_mtime_ns, found.st_ctime_ns) > SETTLED:
            self._facts[key] = {"stat": stamp, "facts": list(facts)}
            self._changed = True
        return facts

    def save(self) -> None:
        """Keep what was learnt; not where the disk takes nothing."""
        if not self._changed:
            return
        temporary = Path(f"{self._memory}.{os.getpid()}")
        try:
            temporary.write_text(json.dumps({"version": VERSION, "files": self._facts}))
            temporary.replace(self._memory)
        except OSError:
            return  # they are read again next time
        self._changed = False


def _read(path: str) -> dict[str, Json]:
    try:
        content = json.loads(Path(path).read_bytes())
    except (OSError, ValueError):
        return {}
    if not isinstance(content, dict) or content.get("version") != VERSION:
        return {}
    files: dict[str, Json] = content["files"]
    return files


def look(path: str) -> HostFile:
    """Read a file once and say what it is."""
    hasher = hashlib.sha256()
    size, head, tail, qnn = 0, b"", b"", ""
    with Path(path).open("rb") as file:
        while block := file.read(BLOCK):
            hasher.update(block)
            head = head or block[:4]
            size += len(block)
            if head == MAGIC and not qnn:
                found = QNN_BUILD.search(tail + block)
                qnn = found[1].decode() if found else ""
                tail = block[-64:]
    machine, runs = _elf(path) if head == MAGIC else ("", head[:2] == b"#!")
    return HostFile(hasher.hexdigest(), size, machine, runs, qnn)


def _elf(path: str) -> tuple[str, bool]:
    try:
        header = read_elf_header(path)
    except FormatError:
        return "", False
    is_library = ".so" in Path(path).suffixes
    return header.machine, not is_library and header.kind in ("executable", "shared object")
