"""`qbuild schema`: the JSON Schema of recipes, for editors.

A recipe's first line `# yaml-language-server: $schema=qbuild.schema.json` makes an editor
check and complete it.
"""

from __future__ import annotations

import argparse


def configure(parser: argparse.ArgumentParser) -> None:
    del parser  # the schema is of all recipes


def run(args: argparse.Namespace) -> int:
    import json

    from buildsys.plan.load import InstalledRules
    from buildsys.recipe.schema import recipe_schema

    rules = InstalledRules()
    print(json.dumps(recipe_schema(rules, rules), indent=2, ensure_ascii=False))
    return 0
