"""Amounts with a unit: memory ("4GiB") and time ("600s", "10m")."""

from __future__ import annotations

import re

AMOUNT = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)", re.ASCII)
BYTES = {
    "": 1,
    "B": 1,
    "kB": 10**3,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}
SECONDS = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
# What the schema shows to editors; the two functions below decide.
BYTES_PATTERN = r"^[0-9]+(\.[0-9]+)? *([kKMGT]i?)?B$"
SECONDS_PATTERN = r"^[0-9]+(\.[0-9]+)? *(ms|s|m|min|h|d)$"


def memory_bytes(value: int | float | str) -> int:
    """Bytes of 1024, "4GiB" or "500MB". ValueError for anything else."""
    number, unit = split(value, BYTES, "4GiB")
    return int(number * BYTES[unit])


def seconds(value: int | float | str) -> float:
    """Seconds of 600, "600s", "10m" or "1.5h". ValueError for anything else."""
    number, unit = split(value, SECONDS, "600s or 10m")
    if number <= 0:
        raise ValueError("a time limit must be longer than nothing")
    return number * SECONDS[unit]


def split(
    value: int | float | str, units: dict[str, int] | dict[str, float], example: str
) -> tuple[float, str]:
    match = AMOUNT.fullmatch(str(value).strip()) if not isinstance(value, bool) else None
    if match is None:
        raise ValueError(f"'{value}' is not an amount: write for example {example}")
    if match.group(2) not in units:
        known = ", ".join(unit for unit in units if unit)
        raise ValueError(f"'{match.group(2)}' is not one of the units {known}")
    return float(match.group(1)), match.group(2)
