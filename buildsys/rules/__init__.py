"""The registry: a rule is a module here, or one that a plugin names.

`find_rule("int8-checkpoint")` imports `buildsys.rules.int8_checkpoint` and nothing else. A
distribution adds rules with entry points in the group "qbuild.rules" (name -> module).
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from typing import TYPE_CHECKING

from buildsys.errors import RecipeError

if TYPE_CHECKING:
    from buildsys.rules.spec import Rule

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
    from importlib.metadata import entry_points  # 29 ms: never on the path of a null build

    plugins = {point.name: point.value for point in entry_points(group="qbuild.rules")}
    return {**plugins, **own}


def find_rule(name: str) -> Rule:
    """The rule called `name`.

    Raises RecipeError if there is none; the caller adds the place and the nearest name.
    """
    modules = rule_modules()
    if name not in modules:
        raise RecipeError(f"unknown rule '{name}'")
    rule: Rule = importlib.import_module(modules[name]).RULE
    return rule
