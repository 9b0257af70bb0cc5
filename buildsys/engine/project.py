"""From a command line to a project: which recipe, which build folder, which plan."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, NamedTuple

from buildsys.engine import blueprint as drawing
from buildsys.engine.code import RuleCode
from buildsys.engine.folder import (
    BuildFolder,
    agreed_defines,
    candidates,
    folder_named,
    last_recipe,
)
from buildsys.engine.hub import without_snapshots
from buildsys.engine.journal import Entries, read_journal
from buildsys.engine.key import processor_class
from buildsys.engine.staleness import Machine, Survey
from buildsys.engine.stamps import Stamps
from buildsys.errors import UsageError
from buildsys.gpus import gpu_count
from buildsys.identity import InstalledVersions
from buildsys.share import shared_folder

if TYPE_CHECKING:
    from buildsys.engine.blueprint import Blueprint, Cached
    from buildsys.engine.stamps import Stamp
    from buildsys.plan.graph import Json, Plan


class Project(NamedTuple):
    """recipe: as it was named; defines: the -D words that count; files: those that were read
    for the blueprint, none where it came from the cache."""

    recipe: str
    defines: Mapping[str, str]
    folder: BuildFolder
    blueprint: Blueprint
    files: tuple[str, ...]

    @property
    def plan(self) -> Plan:
        return self.blueprint.plan


class Scene(NamedTuple):
    """A build folder and this machine as they are now."""

    survey: Survey
    stamps: Stamps
    code: RuleCode
    entries: Entries
    machine: Machine


class Place(NamedTuple):
    """A recipe that was built before: its folder, and the blueprint that is remembered there
    and holds."""

    recipe: str
    defines: Mapping[str, str]
    folder: BuildFolder
    cached: Cached


def open_project(word: str | None, given: Mapping[str, str], build_dir: str | None) -> Project:
    """The project that a command line means; the recipe is read only where no cached plan holds.

    Raises UsageError and RecipeError; writes nothing.
    """
    recipe = named_recipe(word, build_dir)
    place = find_place(recipe, given, build_dir)
    if place is not None:
        found = drawing.read_cache(place.folder.own("plan"), place.cached)
        if found is not None:
            return Project(recipe, place.defines, place.folder, found, ())
    if build_dir is not None:
        folder = _at(build_dir)
        defines = agreed_defines(folder, given)
        return Project(recipe, defines, folder, *drawing.load(recipe, defines))
    return _read(recipe, given)


def find_place(recipe: str, given: Mapping[str, str], build_dir: str | None) -> Place | None:
    """Where this recipe was built before, if what is remembered of it there still holds.

    Raises UsageError where the folder `build_dir` was made with other -D words.
    """
    for folder in [_at(build_dir)] if build_dir is not None else candidates(recipe):
        try:
            defines = agreed_defines(folder, given)
        except UsageError:
            if build_dir is not None:
                raise
            continue
        cached = drawing.find_cache(folder.own("plan"), recipe, defines)
        # A recipe may also have been built with --build-dir: then that must be said again.
        if cached is not None and (build_dir is not None or folder == folder_named(cached.name)):
            return Place(recipe, defines, folder, cached)
    return None


def _read(recipe: str, given: Mapping[str, str]) -> Project:
    """The slow way: the recipe's own name says which folder, and the folder which -D words."""
    found, files = drawing.load(recipe, given)
    folder = folder_named(found.plan.name)
    defines = agreed_defines(folder, given)
    if defines != given:
        found, files = drawing.load(recipe, defines)
    return Project(recipe, defines, folder, found, files)


def _at(build_dir: str) -> BuildFolder:
    return BuildFolder(os.path.abspath(build_dir))


def named_recipe(word: str | None, build_dir: str | None) -> str:
    """The recipe that is meant: the one named, else that of the last build, else the only one.

    Raises UsageError.
    """
    if word is not None and os.path.isfile(word):
        return word
    last = last_recipe(build_dir) if word is None else None
    if last is not None:
        return last
    from buildsys.plan.load import find_recipe

    return find_recipe(word, last)


def survey_of(
    project: Project, forced: Collection[str] = (), machine: Machine | None = None
) -> Scene:
    """Everything that staleness depends on, as it is now. Needs no lock; no step is judged yet."""
    entries = read_journal(project.folder.own("journal"))
    return survey_in(project.folder, project.blueprint, entries, forced, machine)


def survey_in(
    folder: BuildFolder,
    blueprint: Blueprint,
    entries: Entries,
    forced: Collection[str] = (),
    machine: Machine | None = None,
) -> Scene:
    """As `survey_of`, of a journal that was read already."""
    stamps = Stamps(folder.root, folder.own("stamps"), vouched=store_vouches)
    code = RuleCode(stamps, folder.own("code"), tuple(sys.path))
    if machine is None:
        machine = this_machine(blueprint.plan, folder.own("toolchains"))
    survey = Survey(blueprint, entries, stamps, code, machine, forced)
    return Scene(survey, stamps, code, entries, machine)


def store_vouches(digest: str, stamp: Stamp) -> bool:
    """Does the local store know that a file of this stamp has the bytes of this digest?"""
    from buildsys.store.blob_stamps import vouches
    from buildsys.store.place import store_root

    root = store_root(os.environ)
    return root is not None and vouches(root, digest, stamp)


def this_machine(plan: Plan, memory: str) -> Machine:
    """What of this machine counts for a plan. memory: a disposable folder for what toolchain
    files say."""
    fingerprints: dict[str, Json] = {}
    fields: dict[str, Mapping[str, str]] = {}
    missing: Mapping[str, str] = {}
    names = {step.toolchain for step in plan.steps.values() if step.toolchain is not None}
    if names:
        from buildsys.toolchains.definitions import folders_for
        from buildsys.toolchains.finding import find_toolchains

        found, missing = find_toolchains(names, folders_for(plan.recipe), os.environ, memory)
        fingerprints = {name: each.fingerprint for name, each in found.items()}
        fields = {name: each.fields for name, each in found.items()}
    return Machine(
        versions=InstalledVersions(sys.path),
        toolchains=fingerprints,
        processor=processor_class(),
        gpus=gpu_count(),
        template=template_finder(plan.recipe),
        missing=missing,
        fields=fields,
    )


def template_finder(recipe: str) -> Callable[[str], str]:
    """Where a template lies: in the project's templates/, else in qbuild's own."""
    beside = os.path.dirname(os.path.abspath(recipe))
    around = os.path.dirname(beside) if os.path.basename(beside) == "recipes" else beside
    folders = [os.path.abspath("templates"), f"{around}/templates"]

    def find(name: str) -> str:
        for folder in folders:
            if os.path.isfile(f"{folder}/{name}"):
                return os.path.join(folder, name)
        return os.path.join(shared_folder("templates"), name)

    return find


def remember_plan(project: Project) -> None:
    """Write the plan cache, if the recipe was read and there is a build folder to keep it in."""
    if project.files and os.path.isdir(project.folder.own("")):
        blueprint = project.blueprint._replace(plan=without_snapshots(project.plan))
        drawing.write_cache(project.folder.own("plan"), blueprint, project.files, project.defines)
