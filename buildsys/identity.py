"""What tells one file from another, and one installed distribution: the engine's keys and the
toolchains' fingerprints are made of both. Imports nothing of qbuild."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

from blake3 import blake3

# What was read is digested while it is in the second-level cache: half a megabyte or more of it
# per core. Not mmap, which is faster where memory is slow: a file that somebody cuts short while
# it is read would end the process (SIGBUS).
BLOCK = 1 << 18
SETTLED_NS = 2_000_000_000  # no file system's clock is as coarse
_blocks: list[memoryview] = []  # used ones: the pages of a new one cost as much as 100 kB of BLAKE3


def hash_file(path: str) -> str:
    """BLAKE3 of a file's bytes, in hexadecimal. May be called by several threads at once."""
    hasher = blake3()
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        block = _blocks.pop()
    except IndexError:
        block = memoryview(bytearray(BLOCK))
    try:
        into = [block]
        while count := os.readv(fd, into):
            hasher.update(block if count == BLOCK else block[:count])
    finally:
        os.close(fd)
        _blocks.append(block)
    return hasher.hexdigest()


def distribution_versions(search: Sequence[str]) -> dict[str, str]:
    """Every installed distribution, by normalised name -> its version, from the names of the
    .dist-info folders alone (importlib.metadata costs 29 ms)."""
    found: dict[str, str] = {}
    for folder in search:
        try:
            names = os.listdir(folder or ".")
        except OSError:
            continue  # a zip file, or a folder that is not there: the import system skips it too
        for name in names:
            if name.endswith(".dist-info"):
                distribution, _, version = name[: -len(".dist-info")].rpartition("-")
                found.setdefault(normal_name(distribution), version)
    return found


class InstalledVersions:
    """What `distribution_versions` says, asked again only where one of the folders has changed.
    One that changed less than two seconds before it was listed may change again unseen."""

    def __init__(self, search: Sequence[str]) -> None:
        self._search = tuple(search)
        self._stamps: list[tuple[int, int, int] | None] = []
        self._found: dict[str, str] = {}

    def __call__(self) -> dict[str, str]:
        now = time.time_ns()
        stamps = [_stamp(folder or ".") for folder in self._search]
        if not stamps or stamps != self._stamps:
            self._found = distribution_versions(self._search)
            latest = max((max(each[1:]) for each in stamps if each is not None), default=0)
            self._stamps = stamps if now - latest >= SETTLED_NS else []
        return self._found


def _stamp(folder: str) -> tuple[int, int, int] | None:
    try:
        found = os.stat(folder)
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_ctime_ns


def normal_name(distribution: str) -> str:
    """PEP 503, with "_" for "-"."""
    return distribution.lower().replace("-", "_").replace(".", "_")
