"""What `clean` removes: artifacts of the recipe, or what it no longer makes, or everything."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

from buildsys.engine.folder import OWN, BuildFolder
from buildsys.engine.journal import Entries, Journal
from buildsys.engine.staging import remove_tree

if TYPE_CHECKING:
    from buildsys.plan.graph import Plan

KEPT = frozenset({"lock"})  # somebody may be waiting for it


def orphans(plan: Plan, entries: Entries, folder: BuildFolder) -> dict[str, list[str]]:
    """Steps in the journal whose outputs the plan no longer makes -> those that still exist."""
    found: dict[str, list[str]] = {}
    for name, record in entries.done.items():
        gone = [path for path in record["outputs"] if path not in plan.producer]
        there = [path for path in gone if os.path.lexists(place_of(folder, path))]
        if there or (gone and name not in plan.steps):
            found[name] = there
    return found


def place_of(folder: BuildFolder, path: str) -> str:
    return f"{folder.root}/{path.rstrip('/')}"


def remove_outputs(folder: BuildFolder, paths: Iterable[str]) -> list[str]:
    """Remove artifacts and the folders that are empty then; what was there to remove."""
    removed = []
    for path in paths:
        place = place_of(folder, path)
        if os.path.lexists(place):
            remove_tree(place)
            removed.append(path)
        remove_empty(folder, os.path.dirname(place))
    return removed


def remove_empty(folder: BuildFolder, place: str) -> None:
    """Remove a folder inside the build folder if it is empty, and those around it."""
    while place.startswith(folder.root + "/"):
        try:
            os.rmdir(place)
        except FileNotFoundError:
            pass
        except OSError:
            return  # not empty
        place = os.path.dirname(place)


def remove_orphans(plan: Plan, entries: Entries, folder: BuildFolder) -> list[str]:
    """Remove what the recipe no longer makes, and forget it; a live artifact inside an orphaned
    folder stays."""
    found = orphans(plan, entries, folder)
    removed: list[str] = []
    for paths in found.values():
        for path in paths:
            live = [each for each in plan.producer if path[-1] == "/" and each.startswith(path)]
            if not live:
                removed += remove_outputs(folder, [path])
            else:
                removed += _remove_around(folder, path, live)
    gone = [name for name in found if name not in plan.steps]
    if gone:
        journal = Journal(folder.own("journal"), entries)
        journal.append({"kind": "forget", "step": name} for name in gone)
        journal.sync()
        journal.close()
    return removed


def _remove_around(folder: BuildFolder, path: str, live: Collection[str]) -> list[str]:
    kept = {place_of(folder, each) for each in live}
    around = {os.path.dirname(place) for place in kept}
    removed = []
    for name in os.listdir(place_of(folder, path)):
        inside = f"{place_of(folder, path)}/{name}"
        if inside in kept or any(
            each == inside or each.startswith(inside + "/") for each in around
        ):
            continue
        remove_tree(inside)
        removed.append(f"{path}{name}")
    return removed


def recorded(entries: Entries) -> list[str]:
    """The outputs of every step that the journal knows, of this recipe or of an earlier state
    of it."""
    return [path for record in entries.done.values() for path in record["outputs"]]


def remove_all(folder: BuildFolder, plan: Plan | None, entries: Entries) -> list[str]:
    """Remove every artifact, of this recipe or of an earlier state of it, and all that qbuild
    remembers of the folder, its -D words included. plan: None where the recipe is not to be
    read."""
    made = plan.producer if plan is not None else ()
    removed = remove_outputs(folder, dict.fromkeys([*made, *recorded(entries)]))
    own = f"{folder.root}/{OWN}"
    for name in os.listdir(own):
        if name not in KEPT:
            remove_tree(f"{own}/{name}")
    return removed
