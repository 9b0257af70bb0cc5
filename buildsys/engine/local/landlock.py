"""Landlock: a program may read and run everything, and write only below named folders.

Source: Documentation/userspace-api/landlock.rst of the Linux kernel and landlock(7). The
kernel tells which version (ABI) of the interface it has; each adds rights, and a right that
a ruleset does not name stays unrestricted, as those to read and to run should. So all others that
the kernel knows are named, and granted only where they should hold:

    ABI 1 (5.13)  files and folders   2 (5.19)  moving between folders   3 (6.2)  truncating
    ABI 4 (6.7)   TCP (left free)     5 (6.10)  ioctl on devices         6 (6.12) signals and
                                                abstract sockets to processes outside
"""

from __future__ import annotations

import ctypes
import os
import stat
from collections.abc import Iterable
from functools import cache

from buildsys.engine.local.syscalls import PR_SET_NO_NEW_PRIVS, prctl, syscall

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # the same on every architecture
RULESET_VERSION = 1
RULE_PATH_BENEATH = 1

EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
REMOVE_DIR, REMOVE_FILE = 1 << 4, 1 << 5
MAKE_CHAR, MAKE_DIR, MAKE_REG, MAKE_SOCK = 1 << 6, 1 << 7, 1 << 8, 1 << 9
MAKE_FIFO, MAKE_BLOCK, MAKE_SYM = 1 << 10, 1 << 11, 1 << 12
REFER, TRUNCATE, IOCTL_DEV = 1 << 13, 1 << 14, 1 << 15
SCOPE_ABSTRACT_UNIX_SOCKET, SCOPE_SIGNAL = 1 << 0, 1 << 1

READ = EXECUTE | READ_FILE | READ_DIR
ON_FILES = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV
NULL = "/dev/null"


@cache
def abi() -> int:
    """The kernel's version of Landlock; 0 where it has none or it is switched off."""
    try:
        return syscall(CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(RULESET_VERSION))
    except OSError:
        return 0


def handled_rights(version: int) -> int:
    """Every right on files that this version of the interface can restrict."""
    rights = (1 << 13) - 1
    rights |= REFER if version >= 2 else 0
    rights |= TRUNCATE if version >= 3 else 0
    return rights | (IOCTL_DEV if version >= 5 else 0)


def ruleset(writable: Iterable[str]) -> int:
    """An open descriptor of the rules: read everything, write only below `writable`.

    OSError where the kernel refuses, or where a path of `writable` does not exist.
    """
    version = abi()
    rights = handled_rights(version) & ~READ
    made = _create_ruleset(version, rights)
    try:
        for path in writable:
            _allow(made, path, rights & ~(MAKE_CHAR | MAKE_BLOCK))
        _allow(made, NULL, rights & (WRITE_FILE | TRUNCATE | IOCTL_DEV))
    except OSError:
        os.close(made)
        raise
    return made


def confine(writable: Iterable[str]) -> None:
    """From now on this thread, and all that it starts, may write only below `writable`. What is
    open already stays as it is, and there is no way back."""
    rules = ruleset(writable)
    try:
        prctl(PR_SET_NO_NEW_PRIVS, 1)
        syscall(RESTRICT_SELF, ctypes.c_int(rules), ctypes.c_uint32(0))
    finally:
        os.close(rules)


def _create_ruleset(version: int, rights: int) -> int:
    """struct landlock_ruleset_attr grew with the versions; send the part that this one has."""
    scoped = SCOPE_ABSTRACT_UNIX_SOCKET | SCOPE_SIGNAL
    fields = (rights,) if version < 4 else (rights, 0) if version < 6 else (rights, 0, scoped)
    attributes = (ctypes.c_uint64 * len(fields))(*fields)
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    return syscall(CREATE_RULESET, attributes, size, ctypes.c_uint32(0))


class _PathBeneath(ctypes.Structure):
    """struct landlock_path_beneath_attr."""

    _pack_ = 1
    _fields_ = (("allowed_access", ctypes.c_uint64), ("parent_fd", ctypes.c_int32))


def _allow(rules: int, path: str, rights: int) -> None:
    opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        if not stat.S_ISDIR(os.fstat(opened).st_mode):
            rights &= ON_FILES
        attributes = _PathBeneath(rights, opened)
        rule = ctypes.c_int(RULE_PATH_BENEATH)
        beneath = ctypes.byref(attributes)
        syscall(ADD_RULE, ctypes.c_int(rules), rule, beneath, ctypes.c_uint32(0))
    finally:
        os.close(opened)
