"""Is a toolchain here, and which one: without starting any program."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from buildsys.engine.key import distribution_versions, normal_name
from buildsys.engine.stamps import hash_file
from buildsys.toolchains.definitions import definition
from buildsys.toolchains.versions import fits

if TYPE_CHECKING:
    from buildsys.plan.graph import Json


class Found(NamedTuple):
    """A toolchain that is here. fields: what a step gets (`${toolchain.root}`); fingerprint:
    what of it decides bytes, and no path."""

    fields: Mapping[str, str]
    fingerprint: Json


class Toolchains(NamedTuple):
    """found: name -> what was found; missing: name -> why not, and what to do."""

    found: Mapping[str, Found]
    missing: Mapping[str, str]


def find_toolchains(
    names: Collection[str],
    folders: Sequence[str],
    environment: Mapping[str, str],
    memory: str | None = None,
) -> Toolchains:
    """Look for toolchains by name. Raises RecipeError for a definition that is wrong."""
    found: dict[str, Found] = {}
    missing: dict[str, str] = {}
    for name in sorted(names):
        described = definition(name, folders, memory)
        if described is None:
            missing[name] = f"nothing is known of it: there is no toolchains/{name}.yaml"
            continue
        outcome = find(described, environment)
        if isinstance(outcome, Found):
            found[name] = outcome
        else:
            missing[name] = outcome
    return Toolchains(found, missing)


def find(described: Json, environment: Mapping[str, str]) -> Found | str:
    """The first place that has the toolchain in a fitting version, or why none does."""
    reasons: list[str] = []
    for place in described["find"]:
        look = _in_python if "python" in place else _in_folder
        outcome = look(place, described.get("versions") or {}, environment)
        if isinstance(outcome, Found):
            return outcome
        reasons += [outcome] if outcome not in reasons else []
    how = f". {described['get']}" if described.get("get") else ""
    return " and ".join(reasons) + how


def _in_python(
    place: Json, versions: Mapping[str, str], environment: Mapping[str, str]
) -> Found | str:
    name, variable = place["python"], place.get("interpreter")
    interpreter = environment.get(variable, "") if variable else ""
    where = f"the Python of ${variable}" if interpreter else "qbuild's own Python"
    if interpreter and not os.access(interpreter, os.X_OK):
        return f"${variable} names no program: {interpreter}"
    search = site_packages(interpreter) if interpreter else sys.path
    installed = distribution_versions(search)
    version = installed.get(normal_name(name))
    if version is None:
        return f"{name} is not in {where}"
    if not fits(version, versions):
        return f"{name} {version} is there; {_wanted(versions)} is needed"
    folder = _folder_of(name, version, search)
    others = {each: installed.get(normal_name(each)) for each in place.get("with", ())}
    fields = {
        "python": interpreter or sys.executable,
        "distribution": name,
        "version": version,
        "root": folder,
        "own": "" if interpreter else "1",
    }
    fingerprint = {"distribution": name, "version": version, "with": others}
    return Found(fields, {**fingerprint, "files": _record(folder, name, version)})


def site_packages(interpreter: str) -> list[str]:
    """The folders in which a Python keeps its distributions, told by the layout of its folder.

    A virtual environment's own come first; with `include-system-site-packages` those of the
    Python that it was made from follow.
    """
    root = os.path.dirname(os.path.dirname(os.path.abspath(interpreter)))
    folders = _libraries(root)
    settings = _settings(f"{root}/pyvenv.cfg")
    if settings.get("include-system-site-packages", "").lower() == "true":
        folders += _libraries(os.path.dirname(settings.get("home", "")))
    return folders


def _libraries(root: str) -> list[str]:
    try:
        names = sorted(os.listdir(f"{root}/lib"))
    except OSError:
        return []
    pythons = [name for name in names if re.fullmatch(r"python3(\.\d+)?", name)]
    inside = [f"{root}/lib/{name}/{each}" for name in pythons for each in PACKAGES]
    return [folder for folder in inside if os.path.isdir(folder)]


PACKAGES = ("site-packages", "dist-packages")


def _settings(path: str) -> dict[str, str]:
    try:
        with open(path, encoding="utf-8") as file:
            pairs = [line.partition("=") for line in file]
    except OSError:
        return {}
    return {key.strip().lower(): value.strip() for key, equals, value in pairs if equals}


def _folder_of(name: str, version: str, search: Iterable[str]) -> str:
    """The folder on the search path in which the distribution's own folder lies."""
    for folder in search:
        if _info(folder or ".", name, version):
            return os.path.abspath(folder or ".")
    raise LookupError(name)  # it was listed a moment ago


def _info(folder: str, name: str, version: str) -> str:
    try:
        entries = os.listdir(folder)
    except OSError:
        return ""
    for entry in entries:
        distribution, _, its = entry.removesuffix(".dist-info").rpartition("-")
        if entry.endswith(".dist-info") and normal_name(distribution) == normal_name(name):
            return f"{folder}/{entry}" if its == version else ""
    return ""


def _record(folder: str, name: str, version: str) -> str | None:
    """A digest of the digests of the distribution's files, which its RECORD lists."""
    record = f"{_info(folder, name, version)}/RECORD"
    return hash_file(record) if os.path.isfile(record) else None


def _in_folder(
    place: Json, versions: Mapping[str, str], environment: Mapping[str, str]
) -> Found | str:
    variable, file = place["variable"], place.get("file", "")
    root = environment.get(variable)
    if not root:
        return f"${variable} is not set"
    inside = os.path.join(root, file)
    if not os.path.exists(inside):
        return f"${variable} is {root}, and there is no {file or 'such folder'}"
    told = hash_file(inside) if os.path.isfile(inside) else None
    return Found({"root": os.path.abspath(root)}, {"file": file, "digest": told})


def _wanted(versions: Mapping[str, str]) -> str:
    return " and ".join(f"{word} {version}" for word, version in versions.items())
