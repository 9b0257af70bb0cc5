"""The registry: a rule is a module here, or one that a plugin names.

`find_rule("int8-checkpoint")` imports `buildsys.rules.int8_checkpoint` and nothing else. A
distribution adds rules with entry points in the group "qbuild.rules" (name -> module).
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from typing import TYPE_CHECKING

from buildsys.errors import RecipeError

if TYPE_CHECKING:
    from buildsys.rules.spec import Rule

GROUP = "qbuild.rules"
NOT_RULES = frozenset(
    {
        "block_calibration",
        "int8_ladder",
        "int8_runtime",
        "lineage",
        "model_inputs",
        "python_quoting",
        "shell_quoting",
        "spec",
    }
)


@cache
def rule_modules() -> dict[str, str]:
    """Every known rule's name -> the module that holds it."""
    own = {
        info.name.replace("_", "-"): f"{__name__}.{info.name}"
        for info in pkgutil.iter_modules(__path__)
        if info.name not in NOT_RULES and not info.ispkg
    }
    return {**dict(plugins(GROUP, sys.path)), **own}


def plugins(group: str, search: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Name -> module of the entry points of a group, the first on the path last.

    importlib.metadata says the same after 30 to 70 ms.
    """
    for folder in reversed(list(search)):
        try:
            names = sorted(os.listdir(folder or "."), reverse=True)  # noqa: PTH208 (pathlib is slow to start)
        except OSError:
            continue  # a zip file, or a folder that is not there: no rules are looked for in it
        for name in names:
            if name.endswith((".dist-info", ".egg-info")):
                yield from _points(f"{folder or '.'}/{name}/entry_points.txt", group)


def _points(path: str, group: str) -> Iterator[tuple[str, str]]:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:  # noqa: PTH123 (as above)
            text = file.read()
    except OSError:
        return
    if group not in text:
        return
    inside = False
    for line in map(str.strip, text.splitlines()):
        if line.startswith("["):
            inside = line == f"[{group}]"
        elif inside and "=" in line and line[0] not in "#;":
            name, _, value = line.partition("=")
            yield name.strip(), value.partition("[")[0].strip()


def find_rule(name: str) -> Rule:
    """The rule called `name`.

    Raises RecipeError if there is none; the caller adds the place and the nearest name.
    """
    modules = rule_modules()
    if name not in modules:
        raise RecipeError(f"unknown rule '{name}'")
    module = sys.modules.get(modules[name]) or importlib.import_module(modules[name])
    rule: Rule = module.RULE
    return rule
