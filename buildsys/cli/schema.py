"""`qbuild schema`: the JSON Schema of recipes, for editors; as a document with --markdown.

With --of NAME that of what another verb prints for programs.

A recipe's first line `# yaml-language-server: $schema=qbuild.schema.json` makes an editor
check and complete it.
"""

from __future__ import annotations

import argparse


def configure(parser: argparse.ArgumentParser) -> None:
    from buildsys.cli.json_forms import FORMS

    parser.add_argument(
        "--of", choices=tuple(FORMS), help="of what `status --json` and the like print"
    )
    parser.add_argument("--markdown", action="store_true", help="the same, for people to read")


def run(args: argparse.Namespace) -> int:
    import json

    if args.of is not None:
        from buildsys.cli.json_forms import schema_of

        print(json.dumps(schema_of(args.of), indent=2))
        return 0
    from buildsys.plan.load import InstalledRules
    from buildsys.recipe.schema import recipe_schema

    rules = InstalledRules()
    if args.markdown:
        from buildsys.recipe.reference import reference

        print("\n".join(reference({name: rules[name] for name in sorted(rules)})))
        return 0
    print(json.dumps(recipe_schema(rules, rules), indent=2, ensure_ascii=False))
    return 0
