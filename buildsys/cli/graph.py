"""`qbuild graph`: what depends on what, as a tree, as Graphviz dot, as Mermaid."""

from __future__ import annotations

import argparse

from buildsys.cli.main import read_defines
from buildsys.cli.recipe_words import add_recipe_words, split_words

FORMATS = ("text", "dot", "mermaid")


def configure(parser: argparse.ArgumentParser) -> None:
    add_recipe_words(parser, targets=True)
    parser.add_argument("--format", choices=FORMATS, default="text", help="default: text")


def run(args: argparse.Namespace) -> int:
    from buildsys.plan import drawing
    from buildsys.plan.load import find_recipe, load_plan
    from buildsys.plan.targets import targets, upstream

    word, wanted = split_words(args.words)
    plan, _ = load_plan(find_recipe(word), read_defines(args.defines))
    steps = upstream(plan, targets(plan, wanted))
    draw = {"text": drawing.tree, "dot": drawing.dot, "mermaid": drawing.mermaid}[args.format]
    for line in draw(plan, steps):
        print(line)
    return 0
