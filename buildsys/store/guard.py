"""Claiming and removing exclude each other: what a build picks up is not removed in that instant.

A lock file of the store, held for a few system calls. Where the file system has no locks (some
network disks), or the store is read-only, both go on without: what is lost then is a miss.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator


@contextlib.contextmanager
def claiming(root: str) -> Iterator[None]:
    """While something in the store is marked as used; any number at once."""
    with _locked(root, fcntl.LOCK_SH):
        yield


@contextlib.contextmanager
def removing(root: str) -> Iterator[None]:
    """While it is looked whether something is still unused, and removed."""
    with _locked(root, fcntl.LOCK_EX):
        yield


@contextlib.contextmanager
def _locked(root: str, how: int) -> Iterator[None]:
    fd = -1
    with contextlib.suppress(OSError):
        fd = os.open(f"{root}/lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(fd, how)
    try:
        yield
    finally:
        if fd >= 0:
            os.close(fd)
