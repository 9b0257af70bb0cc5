"""`qbuild graph`: what depends on what, as a tree, as Graphviz dot, as Mermaid."""

from __future__ import annotations

import argparse

from buildsys.cli.build_words import add_folder_words
from buildsys.cli.main import read_defines
from buildsys.cli.recipe_words import split_words

FORMATS = ("text", "dot", "mermaid")


def configure(parser: argparse.ArgumentParser) -> None:
    add_folder_words(parser, targets=True)
    parser.add_argument("--format", choices=FORMATS, default="text", help="default: text")


def run(args: argparse.Namespace) -> int:
    from buildsys.engine.project import open_project
    from buildsys.plan import drawing
    from buildsys.plan.targets import targets, upstream

    word, wanted = split_words(args.words)
    plan = open_project(word, read_defines(args.defines), args.build_dir).plan
    steps = upstream(plan, targets(plan, wanted))
    draw = {"text": drawing.tree, "dot": drawing.dot, "mermaid": drawing.mermaid}[args.format]
    for line in draw(plan, steps):
        print(line)
    return 0
