"""toolchains/NAME.yaml, checked, and remembered as JSON: a null build has no time for YAML."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from buildsys.errors import RecipeError
from buildsys.identity import hash_file
from buildsys.share import shared_folder

if TYPE_CHECKING:
    from buildsys.plan.graph import Json

KEYS = frozenset({"doc", "unlocks", "get", "page", "versions", "find", "install", "enter"})
KINDS = {
    "python": frozenset({"python", "interpreter", "installed", "with", "versions"}),
    "variable": frozenset({"variable", "file", "version", "names", "versions"}),
    "installed": frozenset({"installed", "file", "version", "names", "versions"}),
    "program": frozenset({"program", "versions"}),
}
ENTER = frozenset({"source", "pass", "environment"})
INSTALL = frozenset({"requirements", "python", "imports", "installer", "options"})


def folders_for(recipe: str) -> tuple[str, ...]:
    """Where definitions are looked for: the project's own folder first."""
    beside = os.path.dirname(os.path.abspath(recipe))
    around = os.path.dirname(beside) if os.path.basename(beside) == "recipes" else beside
    own = [os.path.abspath("toolchains"), f"{around}/toolchains"]
    return (*dict.fromkeys(own), shared_folder("toolchains"))


def definition(name: str, folders: Sequence[str], memory: str | None = None) -> Json:
    """The definition of a toolchain; None where no folder has one.

    memory: a folder for the parsed form, which is disposable. Raises RecipeError naming the
    file and the key that is wrong.
    """
    for folder in folders:
        path = f"{folder}/{name}.yaml"
        if os.path.isfile(path):
            return _remembered(path, memory) if memory else parse(path)
    return None


def _remembered(path: str, memory: str) -> Json:
    place = f"{memory}/{os.path.basename(path)}.json"
    digest = hash_file(path)
    try:
        with open(place, "rb") as file:
            known = json.load(file)
        if known["digest"] == digest and known["path"] == path:
            return known["definition"]
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not there, or damaged: it is made anew
    found = parse(path)
    temporary = f"{place}.{os.getpid()}"
    try:
        os.makedirs(memory, exist_ok=True)
        with open(temporary, "w") as out:
            json.dump({"digest": digest, "path": path, "definition": found}, out)
        os.replace(temporary, place)
    except OSError:
        pass  # read-only: it is parsed again next time, and that is all
    return found


def parse(path: str) -> Json:
    """A definition file. Raises RecipeError."""
    import yaml

    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.safe_load(file)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("find"), list):
        raise RecipeError(f"{path}: a toolchain is a table with `find`, a list of places")
    _refuse_unknown(path, content, KEYS)
    for place in content["find"]:
        kind = next((kind for kind in KINDS if isinstance(place, dict) and kind in place), None)
        if kind is None:
            raise RecipeError(f"{path}: each place in `find` is one of: {', '.join(KINDS)}")
        _refuse_unknown(path, place, KINDS[kind])
    if "install" in content:
        _check_install(path, content["install"])
    if "enter" in content:
        _check_enter(path, content["enter"])
    return content


def _check_enter(path: str, enter: Json) -> None:
    if not isinstance(enter, dict) or ("source" in enter) != ("pass" in enter):
        raise RecipeError(
            f"{path}: `enter` has `environment`, or `source` and `pass`, the variables that it sets"
        )
    _refuse_unknown(path, enter, ENTER)


def _check_install(path: str, install: Json) -> None:
    if not isinstance(install, dict) or ("requirements" in install) == ("installer" in install):
        raise RecipeError(f"{path}: `install` has either `requirements` or `installer`")
    _refuse_unknown(path, install, INSTALL)


def known_names(folders: Sequence[str]) -> list[str]:
    """Every toolchain that some folder has a definition of."""
    names = set()
    for folder in folders:
        if os.path.isdir(folder):
            names |= {each[:-5] for each in os.listdir(folder) if each.endswith(".yaml")}
    return sorted(names)


def _refuse_unknown(path: str, table: Json, known: frozenset[str]) -> None:
    unknown = sorted(set(table) - known)
    if unknown:
        remedy = f"known here: {', '.join(sorted(known))}"
        raise RecipeError(f"{path}: unknown key '{unknown[0]}'", remedy=remedy)
