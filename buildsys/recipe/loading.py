"""Recipe file -> Recipe: read, merge, check, expand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from buildsys.recipe.expansion import (
    expand_artifacts,
    expand_devices,
    expand_gates,
    expand_sources,
)
from buildsys.recipe.merging import read_extended
from buildsys.recipe.mistakes import raise_all
from buildsys.recipe.nodes import Scalar, Table, plain, table
from buildsys.recipe.paths import base
from buildsys.recipe.recipe import Recipe
from buildsys.recipe.schema import recipe_schema
from buildsys.recipe.validation import checker
from buildsys.recipe.variables import read_variables

if TYPE_CHECKING:
    from buildsys.rules.spec import Rule


def read_recipe(path: str, defines: Mapping[str, str], rules: Mapping[str, Rule]) -> Recipe:
    """The recipe at `path` with the values of -D, checked and expanded.

    rules: every rule by name; only those that the recipe uses are loaded. Raises RecipeError
    (RecipeMistakes for several) and UsageError. Executes nothing and writes nothing.
    """
    nodes, files = read_extended(path)
    raise_all(checker(schema_for(nodes, rules))(nodes))
    variables = read_variables(nodes, defines)

    def section(name: str) -> Table:
        return table(nodes.entries.get(name), name)

    sources, sources_off = expand_sources(section("sources"), variables.scope)
    artifacts, artifacts_off = expand_artifacts(section("artifacts"), variables.scope, rules)
    name = nodes.entries.get("name")
    return Recipe(
        name=base(path).removesuffix(".yaml") if name is None else str(plain(name)),
        path=path,
        files=files,
        defines=dict(defines),
        sources=sources,
        artifacts=artifacts,
        off={**sources_off, **artifacts_off},
        gates=expand_gates(section("gates"), variables.scope),
        devices=expand_devices(section("devices"), variables.scope),
    )


def schema_for(nodes: Table, rules: Mapping[str, Rule]) -> object:
    """The schema of recipes with the keys of just the rules that this one uses spelled out."""
    section = nodes.entries.get("artifacts")
    artifacts = section.entries.values() if isinstance(section, Table) else ()
    rule_nodes = [each.entries.get("rule") for each in artifacts if isinstance(each, Table)]
    used = {node.value for node in rule_nodes if isinstance(node, Scalar)}
    names = [name for name in rules if name in used]
    return recipe_schema({name: rules[name] for name in names}, rules)
