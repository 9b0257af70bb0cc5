"""The one entry to plans: recipe file -> Plan, and which recipe a command line means."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from buildsys.errors import UsageError
from buildsys.recipe.paths import installed_recipe, is_file, recipes_in
from buildsys.rules import find_rule, rule_modules
from buildsys.share import shared_folder

if TYPE_CHECKING:
    from buildsys.plan.graph import Plan
    from buildsys.rules.spec import Rule

FOLDER = "recipes"


class InstalledRules(Mapping[str, "Rule"]):
    """Every rule there is, by name; one is imported when it is first looked at."""

    def __getitem__(self, name: str) -> Rule:
        if name not in rule_modules():
            raise KeyError(name)
        return find_rule(name)

    def __iter__(self) -> Iterator[str]:
        return iter(rule_modules())

    def __len__(self) -> int:
        return len(rule_modules())


def load_plan(
    recipe: str, defines: Mapping[str, str], rules: Mapping[str, Rule] | None = None
) -> tuple[Plan, tuple[str, ...]]:
    """The plan of a recipe file, and every file that was read for it, the recipe first.

    Raises RecipeError and UsageError. Executes nothing, writes nothing; whether the sources
    exist is `missing.missing_sources`'s question.
    """
    from buildsys.gpus import torch_has_cuda
    from buildsys.plan.planning import make_plan
    from buildsys.recipe.loading import read_recipe

    known = InstalledRules() if rules is None else rules
    read = read_recipe(recipe, defines, known)
    return make_plan(read, known, cuda=torch_has_cuda()), read.files


def find_recipe(word: str | None, last: str | None = None) -> str:
    """The recipe file that a command line means.

    word: as typed, or None; a file that is not here is looked for among the recipes that
    qbuild ships. Without a word it is the recipe of the last build, else the only one in
    recipes/. Raises UsageError if that leaves none, or several.
    """
    if word is not None:
        return word if is_file(word) else shipped(word)
    if last is not None:
        return last
    here = recipes_in(FOLDER)
    if len(here) == 1:
        return f"{FOLDER}/{here[0]}"
    if here:
        listed = ", ".join(f"{FOLDER}/{name}" for name in here)
        raise UsageError("which recipe?", remedy=f"name one of {listed}")
    raise UsageError(
        f"there is no {FOLDER}/ folder here, and no recipe is named",
        remedy=f"name one, for example one that qbuild ships: {', '.join(shipped_recipes())}",
    )


def shipped(word: str) -> str:
    path = installed_recipe(word)
    if path is not None:
        return path
    from buildsys.recipe.mistakes import suggestion

    known = [*(f"{FOLDER}/{name}" for name in recipes_in(FOLDER)), *shipped_recipes()]
    raise UsageError(
        f"there is no recipe '{word}', here or among those that qbuild ships",
        remedy=suggestion(word, known, "recipes"),
    )


def shipped_recipes() -> list[str]:
    return [f"{FOLDER}/{name}" for name in recipes_in(shared_folder(FOLDER))]
