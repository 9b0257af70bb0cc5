"""doit's tasks and the walk over them, without the rest of doit.

`import doit` loads its command line, its databases, a debugger, pickles and process pools: more
time than a build with one stale step needs for all else. Here two of its modules are loaded
alone, and the standard library's that they only use for what qbuild replaces (actions, state)
are loaded when somebody asks them for something, which nobody does.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

PACKAGE = "doit"
UNUSED = ("copy", "dbm", "getopt", "hashlib", "inspect", "pdb", "subprocess", "traceback")


class Later(ModuleType):
    """Stands for a module until somebody asks for something in it."""

    def __getattr__(self, name: str) -> Any:
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(importlib.import_module(self.__name__), name)


def load() -> tuple[Any, Any]:
    """doit's `Task` and `TaskControl`. Who imports doit later loads all of it, anew."""
    with _alone():
        task = importlib.import_module(f"{PACKAGE}.task")
        control = importlib.import_module(f"{PACKAGE}.control")
    return task.Task, control.TaskControl


@contextmanager
def _alone() -> Iterator[None]:
    """While this lasts, doit's modules can be imported without their package's own code, and
    what is in UNUSED is not loaded."""
    spec = importlib.util.find_spec(PACKAGE)
    if PACKAGE in sys.modules or spec is None:
        yield  # it was loaded already, or there is none: then the import says so
        return
    package = ModuleType(PACKAGE)
    package.__path__ = list(spec.submodule_search_locations or ())
    stands_in: dict[str, ModuleType] = {PACKAGE: package}
    stands_in |= {name: Later(name) for name in UNUSED if name not in sys.modules}
    sys.modules.update(stands_in)
    try:
        yield
    finally:
        ours = {name for name in sys.modules if name.partition(".")[0] == PACKAGE}
        ours |= {name for name, module in stands_in.items() if sys.modules.get(name) is module}
        for name in ours:
            del sys.modules[name]
