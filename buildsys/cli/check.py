"""`qbuild check`: read the recipe, make the plan, look for the sources; build nothing."""

from __future__ import annotations

import argparse

from buildsys.cli.main import read_defines
from buildsys.cli.recipe_words import add_recipe_words


def configure(parser: argparse.ArgumentParser) -> None:
    add_recipe_words(parser, targets=False)


def run(args: argparse.Namespace) -> int:
    from buildsys.engine.folder import last_recipe
    from buildsys.plan.load import find_recipe, load_plan
    from buildsys.plan.missing import missing_sources
    from buildsys.recipe.mistakes import raise_all

    recipe = find_recipe(args.words, last_recipe(None))
    plan, _ = load_plan(recipe, read_defines(args.defines))
    raise_all(missing_sources(plan))
    print(
        f"{recipe}: no mistakes; {counted(len(plan.steps), 'artifact')} "
        f"from {counted(len(plan.sources), 'source')}"
    )
    return 0


def counted(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")
