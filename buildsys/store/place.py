"""Where the store is."""

from __future__ import annotations

import os
from collections.abc import Mapping


def store_root(environment: Mapping[str, str]) -> str | None:
    """$QBUILD_CACHE, else ~/.cache/qbuild ($XDG_CACHE_HOME). None where $QBUILD_CACHE is empty:
    then there is no store."""
    given = environment.get("QBUILD_CACHE")
    if given is not None:
        return os.path.abspath(os.path.expanduser(given)) if given else None
    base = environment.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return os.path.join(base, "qbuild")
