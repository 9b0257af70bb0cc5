"""`qbuild schema`: the JSON Schema of recipes, for editors; as a document with --markdown.

A recipe's first line `# yaml-language-server: $schema=qbuild.schema.json` makes an editor
check and complete it.
"""

from __future__ import annotations

import argparse


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--markdown", action="store_true", help="the same, for people to read")


def run(args: argparse.Namespace) -> int:
    import json

    from buildsys.plan.load import InstalledRules
    from buildsys.recipe.schema import recipe_schema

    rules = InstalledRules()
    if args.markdown:
        from buildsys.recipe.reference import reference

        print("\n".join(reference({name: rules[name] for name in sorted(rules)})))
        return 0
    print(json.dumps(recipe_schema(rules, rules), indent=2, ensure_ascii=False))
    return 0
