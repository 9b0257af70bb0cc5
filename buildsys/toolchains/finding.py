"""Is a toolchain here, and which one: without starting any program."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from blake3 import blake3

from buildsys.identity import distribution_versions, hash_file, normal_name
from buildsys.store.place import store_root
from buildsys.toolchains.definitions import definition
from buildsys.toolchains.installed import installed_folder
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
    known = {part for name in names for part in name.split("+")}
    for name in sorted(known):
        described = definition(name, folders, memory)
        if described is None:
            missing[name] = f"nothing is known of it: there is no toolchains/{name}.yaml"
            continue
        outcome = find(described, environment, name)
        if isinstance(outcome, Found):
            found[name] = outcome
        else:
            missing[name] = outcome
    for name in sorted(name for name in names if "+" in name):
        parts = name.split("+")
        lacking = [f"{part}: {missing[part]}" for part in parts if part in missing]
        if lacking:
            missing[name] = "; ".join(lacking)
        else:
            found[name] = _together({part: found[part] for part in parts})
    return Toolchains(found, missing)


def _together(parts: Mapping[str, Found]) -> Found:
    """Several toolchains as one: `root` of the first, and `NAME.root` of each."""
    first = next(iter(parts.values()))
    fields = dict(first.fields)
    for name, part in parts.items():
        fields |= {f"{name}.{field}": value for field, value in part.fields.items()}
    return Found(fields, {name: part.fingerprint for name, part in parts.items()})


def find(described: Json, environment: Mapping[str, str], name: str = "") -> Found | str:
    """The first place that has the toolchain in a fitting version, or why none does.

    name: of the toolchain, under which `qbuild toolchain install` would have put it.
    """
    reasons: list[str] = []
    for place in described["find"]:
        wanted = place.get("versions") or described.get("versions") or {}
        own = installed_folder(name, described, environment) if place.get("installed") else None
        if place.get("installed") and own is None:
            outcome: Found | str = NOT_INSTALLED
        elif "python" in place:
            outcome = _in_python(place, wanted, environment, own)
            if isinstance(outcome, Found):
                return _with_cache(outcome, name, environment)
        elif "program" in place:
            outcome = _on_path(place, wanted, environment)
        else:
            outcome = _in_folder(place, wanted, environment, own)
        if isinstance(outcome, Found):
            return outcome
        reasons += [outcome] if outcome not in reasons else []
    # Where it is missing altogether, that nobody installed it for us says nothing new.
    told = [reason for reason in reasons if reason != NOT_INSTALLED] or reasons
    how = f". {how_to_get(described)}" if described.get("get") else ""
    return " and ".join(_without_repeats(told)) + how


def _without_repeats(reasons: Sequence[str]) -> list[str]:
    """Several variables that are not set make one reason."""
    unset = [reason.split(" ")[0] for reason in reasons if reason.endswith(UNSET)]
    if len(unset) < 2:
        return list(reasons)
    others = [reason for reason in reasons if not reason.endswith(UNSET)]
    return [f"none of {', '.join(unset)} is set", *others]


UNSET = " is not set"


def _with_cache(found: Found, name: str, environment: Mapping[str, str]) -> Found:
    """A folder below the store in which a toolchain's steps may keep what can be made again;
    empty where there is no store."""
    root = store_root(environment)
    cache = f"{root}/toolchains/{name}/cache" if root is not None and name else ""
    return found._replace(fields={**found.fields, "cache": cache})


NOT_INSTALLED = "it is not installed"


def how_to_get(described: Json) -> str:
    """What a person does about a toolchain that is missing, with the page where there is one."""
    get, page = str(described.get("get", "")), described.get("page")
    return f"{get}: {page}" if page else get


def _in_python(
    place: Json, versions: Mapping[str, str], environment: Mapping[str, str], own: str | None
) -> Found | str:
    """own: the environment that `qbuild toolchain install` made, if that is the place."""
    name, variable = place["python"], place.get("interpreter")
    interpreter = environment.get(variable, "") if variable else ""
    where = f"the Python of ${variable}" if interpreter else "qbuild's own Python"
    if own is not None:
        interpreter, where = f"{own}/bin/python", f"the environment {own}"
        if not os.access(interpreter, os.X_OK):
            return f"{where} has lost its Python"
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
    """A digest of the digests of the distribution's files, which its RECORD lists.

    Scripts in `bin` begin with the path of their Python, so theirs do not count; pip sorts the
    list, and "../" comes before everything else.
    """
    try:
        with open(f"{_info(folder, name, version)}/RECORD", "rb") as file:
            record = file.read()
    except OSError:
        return None
    at = 0
    while record.startswith(b"../", at):
        at = record.find(b"\n", at) + 1 or len(record)
    return blake3(memoryview(record)[at:]).hexdigest()


def _on_path(
    place: Json, versions: Mapping[str, str], environment: Mapping[str, str]
) -> Found | str:
    """A program whose name ends in its version, as Debian's clang-19."""
    names: list[str] = place["program"]
    for name in names:
        version = name.rpartition("-")[2]
        for folder in environment.get("PATH", "").split(os.pathsep):
            path = os.path.join(folder, name)
            if folder and os.access(path, os.X_OK) and fits(version, versions):
                fields = {"program": path, "version": version, "root": os.path.dirname(path)}
                return Found(fields, {"program": name, "build": _build_of(path)})
    return f"none of {', '.join(names)} is on PATH"


def _build_of(path: str) -> str:
    """What tells one build of a program from another: its beginning, in which linkers put the
    build ID, and its size."""
    with open(path, "rb", buffering=0) as file:
        return f"{blake3(file.read(BEGINNING)).hexdigest()}-{os.fstat(file.fileno()).st_size}"


BEGINNING = 65536


def _in_folder(
    place: Json, versions: Mapping[str, str], environment: Mapping[str, str], own: str | None
) -> Found | str:
    variable, file = place.get("variable"), place.get("file", "")
    root = environment.get(variable) if variable else own
    if not root:
        return f"${variable}{UNSET}"
    where = f"${variable} is {root}" if variable else f"it is installed in {root}"
    inside = os.path.join(root, file)
    if not os.path.exists(inside):
        return f"{where}, and there is no {file or 'such folder'}"
    told = hash_file(inside) if os.path.isfile(inside) else None
    fields = {"root": os.path.abspath(root)}
    fingerprint: dict[str, Json] = {"file": file, "digest": told}
    if "version" in place:
        version = _told_version(place["version"], fields["root"])
        if version is None:
            return f"{where}, and its version is not told by {_sources(place['version'])}"
        if not fits(version, versions):
            return f"{where}, of version {version}; {_wanted(versions)} is needed"
        fields["version"] = fingerprint["version"] = version
    if "names" in place:
        fingerprint["names"] = _names(fields["root"], place["names"])
    return Found(fields, fingerprint)


def _told_version(sources: Sequence[Mapping[str, str]], root: str) -> str | None:
    """The version as the first of `sources` tells it that does: a line of a file, or the name of
    the folder. Each has a pattern whose first group is the version."""
    for source in sources:
        if "folder" in source:
            told = re.search(source["folder"], os.path.basename(os.path.realpath(root)))
        else:
            try:
                with open(os.path.join(root, source["file"]), errors="replace") as file:
                    told = re.search(source["pattern"], file.read(MOST), re.MULTILINE)
            except OSError:
                continue
        if told is not None:
            return told[1]
    return None


MOST = 1 << 20  # bytes of a file that its version is looked for in


def _sources(sources: Sequence[Mapping[str, str]]) -> str:
    named = ("the folder's name" if "folder" in each else each["file"] for each in sources)
    return " or ".join(named)


def _names(root: str, pattern: str) -> list[str]:
    """The names in one folder below root: `folder/*`."""
    try:
        return sorted(os.listdir(os.path.join(root, os.path.dirname(pattern))))
    except OSError:
        return []


def _wanted(versions: Mapping[str, str]) -> str:
    return " and ".join(f"{word} {version}" for word, version in versions.items())
