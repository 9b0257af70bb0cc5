"""Versions, as far as choosing between them needs."""

from __future__ import annotations

import re
from collections.abc import Mapping


def version_of(text: str) -> tuple[int, ...]:
    """The numbers that a version begins with.

    >>> version_of("1.1.0+aries2")
    (1, 1, 0)
    """
    numbers = re.match(r"\d+(\.\d+)*", text)
    return tuple(map(int, numbers[0].split("."))) if numbers else ()


def fits(version: str, versions: Mapping[str, str]) -> bool:
    """Is it at least `from` and below `below`?"""
    mine = version_of(version)
    return not (
        ("from" in versions and mine < version_of(str(versions["from"])))
        or ("below" in versions and mine >= version_of(str(versions["below"])))
    )
