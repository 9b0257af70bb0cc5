"""Found on PYTHONPATH by one qbuild: ends it right before its n-th operation on files.

    QBUILD_FAULT_LOG    a file that takes the name of every operation, one a line
    QBUILD_FAULT_KILL   n: SIGKILL before operation n; "n.5": after half of what it writes
    QBUILD_FAULT_CLOCK  seconds that its clock is ahead (or behind, below 0)

Both variables are gone from the environment before anything is started. Every call that
changes what a disk holds counts, and word to the supervisor: between two of them nothing
changes that a successor could see.
"""

from __future__ import annotations

import builtins
import ctypes
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

LOG = os.environ.pop("QBUILD_FAULT_LOG", "")
KILL = os.environ.pop("QBUILD_FAULT_KILL", "")
CLOCK = float(os.environ.pop("QBUILD_FAULT_CLOCK", "0"))
if sys.path and "PYTHONPATH" in os.environ:
    here = __file__.rpartition("/")[0]
    kept = [each for each in os.environ["PYTHONPATH"].split(":") if each != here]
    os.environ["PYTHONPATH"] = ":".join(kept)
    sys.path[:] = [each for each in sys.path if each != here]

WRITES = os.O_WRONLY | os.O_RDWR
NAMES = ["rename", "replace", "link", "unlink", "remove", "rmdir", "mkdir", "fsync"]
NAMES += ["ftruncate", "truncate", "chmod", "utime"]
real_write = os.write
log = os.open(LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND) if LOG else -1
number, _, half = KILL.partition(".")
left = int(number or 0)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def passes(name: str, subject: object) -> bool:
    """An operation is about to be done; is it to be done by half?"""
    global left
    if log >= 0:
        real_write(log, f"{name} {subject}\n".encode())
    left -= 1
    if left == 0 and KILL and not half:
        die()
    return left == 0 and bool(half)


def shown(word: object) -> str:
    """A path as it is; of a descriptor the path that it was opened by."""
    if isinstance(word, bytes):
        return os.fsdecode(word)
    try:
        return os.readlink(f"/proc/self/fd/{word}") if isinstance(word, int) else str(word)
    except OSError:
        return str(word)  # a mode


def counted(module: Any, name: str) -> None:
    real: Callable[..., Any] = getattr(module, name)

    def call(*words: Any, **more: Any) -> Any:
        passes(name, " ".join(map(shown, words)))
        return real(*words, **more)

    setattr(module, name, call)


def counted_write(name: str) -> None:
    real: Callable[..., int] = getattr(os, name)

    def call(fd: int, data: Any, *place: Any) -> int:
        if passes(name, f"{shown(fd)} {bytes(data[:60])!r}"):
            real(fd, data[: len(data) // 2], *place)
            die()
        return real(fd, data, *place)

    setattr(os, name, call)


def watch() -> None:
    for name in NAMES:
        counted(os, name)
    for name in ("write", "pwrite"):
        counted_write(name)
    counted(socket.socket, "sendall")
    os_open, any_open = os.open, builtins.open

    def opened(path: Any, flags: int, *words: Any, **more: Any) -> int:
        if flags & WRITES:
            passes("open", path)
        return os_open(path, flags, *words, **more)

    def file(path: Any, mode: str = "r", *words: Any, **more: Any) -> Any:
        if not mode.startswith("r"):
            passes("file", path)
        return any_open(path, mode, *words, **more)

    os.open, builtins.open = opened, file  # type: ignore[assignment]

    class Library(ctypes.CDLL):
        def __getattr__(self, name: str) -> Any:
            found = super().__getattr__(name)
            if name not in ("renameat2", "syncfs"):
                return found

            def call(*words: Any) -> Any:
                passes(name, " ".join(map(shown, words[1:4:2])))
                return found(*words)

            return call

    ctypes.CDLL = Library  # type: ignore[misc]


def shift_clock() -> None:
    seconds, nanoseconds = time.time, time.time_ns
    time.time = lambda: seconds() + CLOCK
    time.time_ns = lambda: nanoseconds() + int(CLOCK * 1e9)


if LOG or KILL:
    watch()
if CLOCK:
    shift_clock()
