"""numba as an option: kernels that give the same bytes as the numpy ones, faster.

Nothing here is imported unless numba is installed (extra `fast`); which kernel ran is in no
action key because the bytes do not depend on it.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import cache
from typing import ParamSpec, TypeVar, cast

P = ParamSpec("P")
T = TypeVar("T")


@cache
def available() -> bool:
    """Is numba installed?"""
    return importlib.util.find_spec("numba") is not None


def compiled(function: Callable[P, T]) -> Callable[P, T]:
    """The function as machine code: float32 as written, no contraction, the GIL released.

    Kept on disk between processes where numba finds a folder for it.
    """
    numba = importlib.import_module("numba")
    options = {"error_model": "numpy", "nogil": True, "fastmath": False}
    try:
        kernel = numba.njit(cache=True, **options)(function)
    except RuntimeError:  # numba found no folder that it may write its cache to
        kernel = numba.njit(**options)(function)
    return cast("Callable[P, T]", kernel)
