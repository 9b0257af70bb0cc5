"""The options that verbs about a build folder share, and the way from them to a project."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from buildsys.cli.main import read_defines
from buildsys.cli.recipe_words import add_recipe_words, split_words
from buildsys.engine.hub import with_fetched_models
from buildsys.engine.project import open_project

if TYPE_CHECKING:
    from collections.abc import Mapping

    from buildsys.engine.project import Project


def add_folder_words(parser: argparse.ArgumentParser, *, targets: bool) -> None:
    """[RECIPE] [TARGET...], -D and --build-dir."""
    add_recipe_words(parser, targets=targets)
    parser.add_argument(
        "--build-dir", metavar="DIR", help="where artifacts go (default: build/NAME of the recipe)"
    )


def project_of(args: argparse.Namespace) -> tuple[Project, tuple[str, ...]]:
    """The project that a command line means, and the targets that it names."""
    recipe, targets = folder_words(args)
    given = read_defines(args.defines)
    project = open_project(recipe, given, args.build_dir)
    say_kept(project.defines, given)
    plan = with_fetched_models(project.plan, project.folder)
    return project._replace(blueprint=project.blueprint._replace(plan=plan)), targets


def folder_words(args: argparse.Namespace) -> tuple[str | None, tuple[str, ...]]:
    """The recipe, if it is named, and the targets."""
    return split_words([args.words] if isinstance(args.words, str) else args.words or [])


def say_kept(defines: Mapping[str, str], given: Mapping[str, str]) -> None:
    """Say which of the -D words are those of an earlier build."""
    kept = {name: word for name, word in defines.items() if name not in given}
    if kept:
        listed = " ".join(f"-D {name}={word}" for name, word in kept.items())
        say(f"using {listed}, which this build folder was made with")


def say(text: str) -> None:
    """A line for the person, beside what the command prints."""
    print(text, file=sys.stderr, flush=True)
