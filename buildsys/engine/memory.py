"""How much memory there is: what the kernel says, and what the control groups around us allow."""

from __future__ import annotations

from collections.abc import Iterator

ENDLESS = 1 << 62
MOUNT = "/sys/fs/cgroup"
OWN_GROUPS = "/proc/self/cgroup"


def available_memory() -> int:
    """Bytes that can be had without swapping, as the kernel estimates, and within every control
    group that this process is in."""
    return min(_meminfo(b"MemAvailable"), *(limit - held for limit, held in _groups()), ENDLESS)


def total_memory() -> int:
    """Bytes that there would be if nothing else ran."""
    return min(_meminfo(b"MemTotal"), *(limit for limit, _ in _groups()), ENDLESS)


def _meminfo(field: bytes) -> int:
    try:
        with open("/proc/meminfo", "rb") as file:
            fields = dict(line.split(b":") for line in file)
    except OSError:
        return ENDLESS
    return int(fields[field].split()[0]) * 1024


def _groups() -> Iterator[tuple[int, int]]:
    """(limit, held) of each control group that limits this process, both in bytes.

    What the kernel would drop on demand (clean pages of files) is not held.
    """
    for folder, limit, current, inactive in _places():
        bound = _number(f"{folder}/{limit}")
        held = _number(f"{folder}/{current}")
        if bound is not None and held is not None and bound < ENDLESS:
            yield bound, max(held - _inactive(f"{folder}/memory.stat", inactive), 0)


def _places() -> Iterator[tuple[str, str, str, bytes]]:
    """Folders of the groups, innermost first, with the names of their files in either version."""
    try:
        with open(OWN_GROUPS) as file:
            lines = [line.rstrip("\n").split(":", 2) for line in file]
    except OSError:
        return
    for _, controllers, path in lines:
        if controllers == "":
            names = ("memory.max", "memory.current", b"inactive_file")
            root = MOUNT
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", b"total_inactive_file")
            root = f"{MOUNT}/memory"
        else:
            continue
        # In a container the path is the host's, and the mount shows its own group as the root.
        parts = path.strip("/").split("/") if path.strip("/") else []
        for count in range(len(parts), -1, -1):
            yield "/".join([root, *parts[:count]]), *names


def _number(path: str) -> int | None:
    try:
        with open(path) as file:
            return int(file.read())
    except (OSError, ValueError):
        return None  # not there, or "max"


def _inactive(path: str, field: bytes) -> int:
    try:
        with open(path, "rb") as file:
            lines = [line.split() for line in file]
    except OSError:
        return 0
    return sum(int(words[1]) for words in lines if words[0] == field)
