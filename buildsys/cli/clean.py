"""`qbuild clean`: remove artifacts; never the store, never anything that is not ours."""

from __future__ import annotations

import argparse
import os

from buildsys.cli.build_words import add_folder_words, project_of, say
from buildsys.errors import UsageError


def configure(parser: argparse.ArgumentParser) -> None:
    add_folder_words(parser, targets=True)
    parser.epilog = "Without targets: every artifact of the recipe. Never anything else."
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
    from buildsys.engine import cleaning
    from buildsys.engine.build import locked
    from buildsys.engine.journal import read_journal
    from buildsys.plan.targets import targets

    project, words = project_of(args)
    if words and (args.stale or args.everything):
        raise UsageError("name targets, or give --stale or --all, not both")
    folder, plan = project.folder, project.plan
    if not os.path.isdir(folder.own("")):
        print("nothing to remove")
        return 0
    with locked(project, say) as lock_fd:
        if lock_fd < 0:
            raise UsageError(f"{folder.root} is read-only")
        entries = read_journal(folder.own("journal"))
        if args.everything:
            removed = cleaning.remove_all(folder, plan, entries)
        elif args.stale:
            removed = cleaning.remove_orphans(plan, entries, folder)
        else:
            steps = [plan.steps[name] for name in targets(plan, words)]
            paths = [path for step in steps for path in step.outputs.values()]
            removed = cleaning.remove_outputs(folder, paths)
    for path in removed:
        print(f"removed {path}")
    if not removed:
        print("nothing to remove")
    return 0
