"""The compiled validator passes what jsonschema passes, and nothing that it would not."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from jsonschema_rs import Draft202012Validator as Compiled

from buildsys.errors import Location
from buildsys.plan.load import InstalledRules
from buildsys.recipe.loading import schema_for
from buildsys.recipe.nodes import Table, located, plain
from buildsys.recipe.reading import read_nodes
from buildsys.recipe.schema import artifact_schema, recipe_schema, source_schema
from buildsys.recipe.validation import checker

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
NOWHERE = Location("r.yaml", 1, 1)
ODD: list[Any] = [
    None, True, False, 0, 1, -1, 3.0, 0.5, 10**30, float("inf"), float("nan"), "", "x", "${n}",
    "12GiB", "12GiB\n", "10 m", "a\nb", "\ud800", "é" * 300, "0" * 64, [], [1, 1], [[]], {},
    {"a": 1}, {"from": "x", "optional": "yes"}, {"rule": "command"}, {"type": "string"},
]  # fmt: skip


def agree(schema: Any, value: Any) -> None:
    expected = Draft202012Validator(schema).is_valid(value)
    found = not checker(schema)(located(value, NOWHERE))
    assert found == expected, value


def test_there_are_recipes_to_compare_with() -> None:
    assert RECIPES


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_the_compiled_verdict_on_damaged_recipes_is_that_of_jsonschema(recipe: Path) -> None:
    nodes = read_nodes(str(recipe))
    rules = InstalledRules()
    schema = schema_for(nodes, rules)
    slow, fast = Draft202012Validator(schema), Compiled(schema)
    assert slow.is_valid(plain(nodes))
    assert fast.is_valid(plain(nodes))
    chance = random.Random(recipe.stem)
    wrong = 0
    for _ in range(60):
        value = damaged(plain(nodes), chance)
        expected = slow.is_valid(value)
        wrong += not expected
        try:
            found = fast.is_valid(value)
        except ValueError:
            continue  # jsonschema is asked instead
        # What the compiled one refuses is looked at again; only a false pass would be a fault.
        assert expected or not found
    assert wrong > 10, "the damage did not show"


def damaged(value: Any, chance: random.Random) -> Any:
    """The value with one thing in it replaced, removed, renamed or added."""
    if not isinstance(value, dict | list) or not value or chance.random() < 0.15:
        return chance.choice(ODD)
    if isinstance(value, list):
        at = chance.randrange(len(value))
        return [*value[:at], damaged(value[at], chance), *value[at + 1 :]]
    name = chance.choice(sorted(value))
    what = chance.random()
    rest = {key: each for key, each in value.items() if key != name}
    if what < 0.1:
        return rest
    if what < 0.2:
        return {**rest, f"{name}x": value[name]}
    if what < 0.3:
        return {**value, "more": chance.choice(ODD)}
    return {**value, name: damaged(value[name], chance)}


@pytest.mark.parametrize("place", range(len(ODD)))
def test_every_odd_value_is_judged_alike_wherever_it_stands(place: int) -> None:
    odd = ODD[place]
    rules = InstalledRules()
    rule = rules["command"]
    options = {"argv": ["true"]}
    for schema in (source_schema(expressions=False), source_schema(expressions=True)):
        for value in (odd, {"file": odd}, {"text": "t", "samples": odd, "seed": odd}):
            agree(schema, value)
    schema = artifact_schema(rule)
    for key in ("rule", "inputs", "options", "resources", "timeout", "tags", "environment"):
        agree(schema, {"rule": "command", "options": options, key: odd})
    agree(schema, {"rule": "command", "options": {**options, "argv": odd}})
    agree(schema, {"rule": "command", "options": {**options, "argv": [odd]}})
    whole = recipe_schema({"command": rule}, rules)
    for key in ("qbuild", "name", "extends", "vars", "sources", "artifacts", "devices", "more"):
        agree(whole, {"qbuild": 1, key: odd})


def test_a_recipe_without_artifacts_has_a_schema_that_is_one() -> None:
    nodes = located({"qbuild": 1, "name": "empty"}, NOWHERE)
    assert isinstance(nodes, Table)
    assert checker(schema_for(nodes, InstalledRules()))(nodes) == []
