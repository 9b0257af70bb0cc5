"""A build folder: where things are in it, and what it was made with.

Artifacts lie in it under their own names; all that qbuild needs for itself is in ".qbuild".
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

from buildsys.engine.blueprint import cached_recipe
from buildsys.engine.own_file import replace_file
from buildsys.errors import UsageError

if TYPE_CHECKING:
    from buildsys.plan.graph import Json

OWN = ".qbuild"
BUILD = "build"


class BuildFolder(NamedTuple):
    """root: absolute path of the folder."""

    root: str

    def own(self, name: str) -> str:
        """A file or folder of qbuild's: lock, journal, stamps, plan, made, staging, logs ..."""
        return f"{self.root}/{OWN}/{name}"

    def log(self, step: str) -> str:
        """Where the output of a step is kept."""
        return self.own(f"logs/{step.strip('/').replace('%', '%25').replace('/', '%2F')}.log")


class Made(NamedTuple):
    """What a build folder was made with: the recipe, and the -D words as they mean the same
    when they are given in the current folder."""

    recipe: str
    defines: Mapping[str, str]


def read_made(folder: BuildFolder) -> Made | None:
    """What the folder was made with; None where nothing was built in it."""
    content = read_json(folder.own("made"))
    if content is None:
        return None
    there = os.path.normpath(os.path.join(folder.root, content["here"]))
    defines = {name: _from_here(word, there) for name, word in content["defines"].items()}
    return Made(os.path.normpath(os.path.join(folder.root, content["recipe"])), defines)


def _from_here(word: str, there: str) -> str:
    """A -D word that was given in another folder: a path to something there stays that path."""
    path = os.path.normpath(os.path.join(there, word))
    return path if there != os.getcwd() and os.path.exists(path) else word


def write_made(folder: BuildFolder, made: Made) -> None:
    """Remember it; what lies near the folder is kept by its relative path, so that a tree that
    was moved still finds it."""
    path = os.path.abspath(made.recipe)
    here = os.getcwd() + "/"
    near = path.startswith(here) and folder.root.startswith(here)
    recipe = os.path.relpath(path, folder.root) if near else path
    where = os.path.relpath(here, folder.root) if near else here
    content = {"recipe": recipe, "here": where, "defines": dict(made.defines)}
    if read_json(folder.own("made")) != content:
        write_json(folder.own("made"), content)
        from buildsys.store.placing import fsync

        fsync(folder.own("made"))  # without it another -D would be taken after a loss of power


def agreed_defines(folder: BuildFolder, given: Mapping[str, str]) -> dict[str, str]:
    """The -D words that count: those that the folder was made with.

    Raises UsageError where another value is given.
    """
    made = read_made(folder)
    if made is None:
        return dict(given)
    for name, value in given.items():
        if made.defines.get(name) not in (value, os.path.abspath(value)):
            before = f"-D {name}={made.defines[name]}" if name in made.defines else f"no -D {name}"
            raise UsageError(
                f"{shown(folder.root)} was made with {before}, not with -D {name}={value}",
                remedy="build into another folder (--build-dir DIR), or empty this one first "
                "(qbuild clean --all)",
            )
    return dict(made.defines)


def candidates(recipe: str) -> Iterator[BuildFolder]:
    """Build folders below the current one that may be this recipe's, the likeliest first."""
    here = os.path.abspath(BUILD)
    likely = os.path.basename(recipe).removesuffix(".yaml")
    names = sorted(os.listdir(here)) if os.path.isdir(here) else []
    for name in sorted(names, key=lambda name: name != likely):
        folder = BuildFolder(f"{here}/{name}")
        if cached_recipe(folder.own("plan")) == os.path.abspath(recipe):
            yield folder


def folders_made_from(recipe: str) -> list[BuildFolder]:
    """Build folders below the current one in which this recipe was built last."""
    here = os.path.abspath(BUILD)
    names = sorted(os.listdir(here)) if os.path.isdir(here) else []
    folders = [BuildFolder(f"{here}/{name}") for name in names]
    made = [(folder, read_made(folder)) for folder in folders]
    path = os.path.abspath(recipe)
    return [each for each, said in made if said and os.path.abspath(said.recipe) == path]


def folder_named(name: str) -> BuildFolder:
    """Where the artifacts of a recipe of this name go."""
    return BuildFolder(f"{os.path.abspath(BUILD)}/{name}")


def last_recipe(build_dir: str | None) -> str | None:
    """The recipe of the last build in this folder (or in `build_dir`)."""
    if build_dir is not None:
        made = read_made(BuildFolder(os.path.abspath(build_dir)))
        return made.recipe if made is not None else None
    here = os.path.abspath(BUILD)
    names = os.listdir(here) if os.path.isdir(here) else []
    folders = [BuildFolder(f"{here}/{name}") for name in names]
    built = [each for each in folders if os.path.isfile(each.own("made"))]
    if not built:
        return None
    latest = max(built, key=lambda each: os.stat(each.own("lock")).st_mtime_ns)
    made = read_made(latest)
    return shown(made.recipe) if made is not None and os.path.isfile(made.recipe) else None


def shown(path: str) -> str:
    """A path as a person would write it here."""
    relative = os.path.relpath(path)
    return path if relative.startswith("..") else relative


def read_json(path: str) -> Json:
    """The content of one of qbuild's own small files; None where there is none."""
    try:
        with open(path, "rb") as file:
            return json.load(file)
    except (FileNotFoundError, ValueError):
        return None


def write_json(path: str, content: Json) -> None:
    """Replace one of qbuild's own small files in one step."""
    replace_file(path, json.dumps(content))
