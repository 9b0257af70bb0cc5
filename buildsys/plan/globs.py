"""Globs over output paths: `*` and `?` match any characters, a "/" too."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import translate

SIGNS = re.compile(r"[*?\[]")


def is_glob(text: str) -> bool:
    return SIGNS.search(text) is not None


def matching(pattern: str, names: Iterable[str]) -> list[str]:
    """The names that a glob matches, in their order."""
    expression = re.compile(translate(pattern))
    return [name for name in names if expression.match(name)]
