"""Three ways to give a file a second name or a second life: reflink, hard link, copy."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
from collections.abc import Sequence

from blake3 import blake3

FICLONE = 0x40049409  # linux/fs.h
BLOCK = 1 << 20
FEW_FILES = 8  # up to here fsync of each is cheaper than syncfs, which waits for everybody's
# What says "not here": other file system, no such operation, 65,000 links already, forbidden.
NOT_HERE = frozenset(
    {errno.EXDEV, errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL, errno.EMLINK, errno.EPERM}
    | {errno.ENOSYS, errno.ETXTBSY}
)

_libc = ctypes.CDLL(None, use_errno=True)


def reflink(source: str, target: str, mode: int) -> bool:
    """A new file that shares the blocks of `source` until either is written (Btrfs, XFS ...).
    False where the file system cannot."""
    with open(source, "rb", buffering=0) as given:
        fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        try:
            fcntl.ioctl(fd, FICLONE, given.fileno())
        except OSError as error:
            os.unlink(target)
            if error.errno in NOT_HERE:
                return False
            raise
        finally:
            os.close(fd)
    return True


def hard_link(source: str, target: str) -> bool:
    """A second name of the same file. False where there can be none; FileExistsError as usual."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno in NOT_HERE:
            return False
        raise
    return True


def copy(source: str, target: str, mode: int) -> str:
    """Copy into a new file; the BLAKE3 of what was copied."""
    hasher = blake3()
    with open(source, "rb", buffering=0) as given:
        fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        with open(fd, "wb", buffering=0) as taken:
            size = min(BLOCK, os.fstat(given.fileno()).st_size + 1)
            block = memoryview(bytearray(size))
            while count := given.readinto(block):
                hasher.update(block[:count])
                write_all(taken.fileno(), block[:count])
    return hasher.hexdigest()


def write_all(fd: int, data: bytes | memoryview) -> None:
    written = 0
    while written < len(data):
        written += os.write(fd, data[written:])


def flush(paths: Sequence[str], root: str) -> None:
    """These files, all on the file system of `root`, reach the disk."""
    if len(paths) > FEW_FILES:
        fd = os.open(root, os.O_RDONLY)
        try:
            if _libc.syncfs(fd) != 0:
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), root)
        finally:
            os.close(fd)
        return
    for path in paths:
        fsync(path)


def fsync(path: str) -> None:
    """A file's bytes, or a folder's names, reach the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
