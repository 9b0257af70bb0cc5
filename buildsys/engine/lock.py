"""The lock on a build folder: one builder at a time.

It is a flock, held by an open file and not by a process: the executor's supervisor inherits
the descriptor and keeps it until the last process that a step has started is gone. So a
qbuild that was killed leaves no lock behind, and its last children never write beside its
successor. The file itself stays: it is in no folder that `clean` empties.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Callable


class BuildLock:
    """`fd` is what a supervisor inherits; -1 while the lock is not held."""

    def __init__(self, path: str, say: Callable[[str], None]) -> None:
        self._path = path
        self._say = say
        self.fd = -1

    def acquire(self) -> None:
        """Wait until nobody else holds it, and say for whom.

        Raises OSError where the folder takes no file (a disk that is read-only).
        """
        while True:
            fd = self._open()
            self._wait(fd)
            if self._is_still_there(fd):
                break
            os.close(fd)
        self._hold(fd)

    def try_acquire(self) -> bool:
        """Take it unless somebody else holds it. Raises OSError as `acquire` does."""
        fd = self._open()
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return False
        if not self._is_still_there(fd):
            os.close(fd)
            return False
        self._hold(fd)
        return True

    def _open(self) -> int:
        return os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def _is_still_there(self, fd: int) -> bool:
        """Somebody may have removed the file while we waited: then we hold nothing."""
        try:
            return os.path.samestat(os.fstat(fd), os.stat(self._path))
        except FileNotFoundError:
            return False

    def _hold(self, fd: int) -> None:
        self.fd = fd
        owner = {"pid": os.getpid(), "host": os.uname().nodename, "since": time.time()}
        # The lock is held whether or not a full disk takes the name of its holder.
        with contextlib.suppress(OSError):
            os.ftruncate(fd, 0)
            os.pwrite(fd, json.dumps(owner).encode(), 0)

    def release(self) -> None:
        """Let go of it; a supervisor that inherited the descriptor still holds it. (LOCK_UN
        would take it from that one too.)"""
        os.close(self.fd)
        self.fd = -1

    def _wait(self, fd: int) -> None:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._say(f"waiting for {describe_owner(self._path)}")
            fcntl.flock(fd, fcntl.LOCK_EX)


def describe_owner(path: str) -> str:
    """Who holds the lock: process, machine, since when."""
    try:
        with open(path, "rb") as file:
            owner = json.load(file)
    except (FileNotFoundError, ValueError):
        return "another qbuild that has just started in this build folder"
    since = time.strftime("%H:%M:%S", time.localtime(owner["since"]))
    who = f"qbuild (process {owner['pid']} on {owner['host']}, since {since})"
    here = owner["host"] == os.uname().nodename
    if here and not os.path.exists(f"/proc/{owner['pid']}") and os.path.isdir("/proc/self"):
        return f"the last processes of a {who} that was killed"
    return who
