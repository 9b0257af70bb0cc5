"""Process trees and their memory, read from /proc.

A step's process is a subreaper: what its descendants leave behind, daemons with a session of
their own included, becomes its child and not init's. So while it lives the tree below it is
the whole step, and when it ends all that is left of it becomes a child of the supervisor at
that instant. Nobody has to be found by name or by environment.
"""

from __future__ import annotations

import os
from typing import NamedTuple

KIB = 1024
PAGE = 4096


class Memory(NamedTuple):
    """Bytes that a tree holds and that the kernel cannot drop: anonymous, shared, swapped.

    Clean pages of mapped files (checkpoints, libraries) are not in it: they cost nobody else
    anything, and a step that maps a 15 GB model would look like one that needs 15 GB.
    proportional: pages that n processes share count 1/n each; `resident` counts them in full,
    and stands in for it where it was not read.
    """

    resident: int
    proportional: int


def children(pid: int) -> list[int]:
    """The direct children of all threads of a process; empty where it is gone."""
    try:
        threads = os.listdir(f"/proc/{pid}/task")
        found: list[int] = []
        for thread in threads:
            with open(f"/proc/{pid}/task/{thread}/children", "rb") as file:
                found.extend(map(int, file.read().split()))
        return found
    except FileNotFoundError:
        return [] if _kernel_lists_children() else children_by_search(pid)
    except (ProcessLookupError, PermissionError):
        return []


class OwnChildren:
    """The children of this process, which must have one thread; exact, since only this process
    can take one off the kernel's list by reaping it."""

    def __init__(self) -> None:
        pid = os.getpid()
        self._list = None
        if _kernel_lists_children():
            self._list = os.open(f"/proc/{pid}/task/{pid}/children", os.O_RDONLY | os.O_CLOEXEC)

    def __call__(self) -> list[int]:
        if self._list is None:
            return children_by_search(os.getpid())
        found = b""
        while part := os.pread(self._list, PAGE, len(found)):
            found += part
        return [int(pid) for pid in found.split()]


def _kernel_lists_children() -> bool:
    """False on a kernel that was built without CONFIG_PROC_CHILDREN."""
    pid = os.getpid()
    return os.path.exists(f"/proc/{pid}/task/{pid}/children")


def children_by_search(pid: int) -> list[int]:
    """The same for kernels without the list: looks at every process there is."""
    numbers = (int(name) for name in os.listdir("/proc") if name.isdigit())
    return [number for number in numbers if (state(number) or ("", 0))[1] == pid]


def state(pid: int) -> tuple[str, int] | None:
    """A process's state letter ("Z": ended, not yet reaped) and its parent; None: no such one."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            text = file.read()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The name may hold spaces and brackets; what follows its last bracket does not.
    fields = text[text.rindex(b")") + 2 :].split()
    return fields[0].decode(), int(fields[1])


def tree(pid: int) -> list[int]:
    """A process and all its descendants, parents first."""
    found = [pid]
    for member in found:
        found.extend(child for child in children(member) if child not in found)
    return found


def _fields(path: str, names: tuple[bytes, ...]) -> int:
    """The sum, in bytes, of fields of a /proc file in "Name:  123 kB" form; 0: process gone."""
    total = 0
    try:
        with open(path, "rb") as file:
            for line in file:
                if line.startswith(names):
                    total += int(line.split()[1]) * KIB
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return 0
    return total


def memory(members: list[int], floor: int) -> Memory:
    """What these processes hold together.

    The proportional figure makes the kernel walk every page, so it is read only where the
    cheap one, which can only be larger, has passed `floor` bytes.
    """
    names = (b"RssAnon:", b"RssShmem:", b"VmSwap:")
    resident = sum(_fields(f"/proc/{pid}/status", names) for pid in members)
    if resident <= floor:
        return Memory(resident, resident)
    names = (b"Pss_Anon:", b"Pss_Shmem:", b"SwapPss:")
    pss = sum(_fields(f"/proc/{pid}/smaps_rollup", names) for pid in members)
    return Memory(resident, pss or resident)


def oom_kills() -> int:
    """How often the kernel's out-of-memory killer struck since boot; 0 where it is not told."""
    try:
        with open("/proc/vmstat", "rb") as file:
            text = file.read()
    except FileNotFoundError:
        return 0
    at = text.find(b"\noom_kill ")
    return int(text[at:].split(None, 2)[1]) if at >= 0 else 0
