"""`qbuild clean`: remove artifacts; never the store, never anything that is not ours."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from buildsys.cli.build_words import add_folder_words, folder_words, project_of, say
from buildsys.errors import RecipeError, UsageError

if TYPE_CHECKING:
    from buildsys.engine.folder import BuildFolder
    from buildsys.engine.journal import Entries
    from buildsys.plan.graph import Plan


def configure(parser: argparse.ArgumentParser) -> None:
    add_folder_words(parser, targets=True)
    parser.epilog = (
        "Without targets: every artifact of the recipe. Never anything else. Where the recipe "
        "cannot be read, what was built from it is known from the build folder."
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--stale", action="store_true", help="only what the recipe no longer makes (orphans)"
    )
    which.add_argument(
        "--all",
        dest="everything",
        action="store_true",
        help="every artifact, and all that qbuild remembers of the build folder",
    )


def run(args: argparse.Namespace) -> int:
    """Remove, and say what; returns 0."""
    plan: Plan | None
    try:
        project, words = project_of(args)
        folder, plan = project.folder, project.plan
    except RecipeError as error:
        folder, words = folder_without_recipe(args, error)
        plan = None
    if words and (args.stale or args.everything):
        raise UsageError("name targets, or give --stale or --all, not both")
    removed = remove(args, folder, plan, words) if os.path.isdir(folder.own("")) else []
    for path in removed:
        print(f"removed {path}")
    if not removed:
        print("nothing to remove")
    return 0


def folder_without_recipe(
    args: argparse.Namespace, error: RecipeError
) -> tuple[BuildFolder, tuple[str, ...]]:
    """The build folder of a recipe that cannot be read, and the targets.

    Raises the error itself where that does not do.
    """
    from buildsys.engine.folder import BuildFolder, folders_made_from, last_recipe, shown

    recipe, words = folder_words(args)
    recipe = recipe or last_recipe(args.build_dir)
    if args.stale or recipe is None:
        raise error
    if args.build_dir is not None:
        folders = [BuildFolder(os.path.abspath(args.build_dir))]
    else:
        folders = folders_made_from(recipe)
    if len(folders) != 1:
        raise error
    say(str(error))
    say(f"removing what the journal of {shown(folders[0].root)} says was built from it")
    return folders[0], words


def remove(
    args: argparse.Namespace, folder: BuildFolder, plan: Plan | None, words: tuple[str, ...]
) -> list[str]:
    """Remove what is asked for, under the folder's lock; what was removed."""
    from buildsys.engine import cleaning
    from buildsys.engine.journal import read_journal
    from buildsys.engine.lock import BuildLock

    lock = BuildLock(folder.own("lock"), say)
    try:
        lock.acquire()
    except OSError as error:
        raise UsageError(f"{folder.root} cannot be written: {error.strerror}") from error
    try:
        entries = read_journal(folder.own("journal"))
        if args.everything:
            return cleaning.remove_all(folder, plan, entries)
        if args.stale and plan is not None:
            return cleaning.remove_orphans(plan, entries, folder)
        return cleaning.remove_outputs(folder, paths_of(plan, entries, words))
    finally:
        lock.release()


def paths_of(plan: Plan | None, entries: Entries, words: tuple[str, ...]) -> list[str]:
    """The outputs that the words mean: by the recipe, else by what was built from it."""
    from buildsys.engine.cleaning import recorded
    from buildsys.plan.targets import targets

    if plan is not None:
        steps = [plan.steps[name] for name in targets(plan, words)]
        return [path for step in steps for path in step.outputs.values()]
    known = recorded(entries)
    for word in words:
        if word not in known:
            raise UsageError(f"nothing was built that is called '{word}'")
    return list(words) or known
