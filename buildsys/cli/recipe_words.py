"""The words that verbs about a recipe share: [RECIPE] [TARGET...] and -D NAME=VALUE."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

SUFFIX = ".yaml"


def add_recipe_words(parser: argparse.ArgumentParser, *, targets: bool) -> None:
    """Declare the positional words and -D."""
    doc = "the recipe (a name that ends in .yaml), then targets" if targets else "the recipe"
    metavar = "WORD" if targets else "RECIPE"
    parser.add_argument("words", nargs="*" if targets else "?", metavar=metavar, help=doc)
    parser.add_argument(
        "-D",
        dest="defines",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="give a variable of the recipe another value",
    )


def split_words(words: Sequence[str]) -> tuple[str | None, tuple[str, ...]]:
    """The recipe, if the first word is one, and the targets."""
    if words and words[0].endswith(SUFFIX):
        return words[0], tuple(words[1:])
    return None, tuple(words)
