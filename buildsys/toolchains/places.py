"""Where a toolchain may be: in a Python, on PATH, in a folder. No program is started to look."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from blake3 import blake3

from buildsys.identity import distribution_versions, hash_file, normal_name
from buildsys.toolchains.versions import fits

if TYPE_CHECKING:
    from buildsys.plan.graph import Json

UNSET = " is not set"


class Found(NamedTuple):
    """A toolchain that is here. fields: what a step gets (`${toolchain.root}`); fingerprint:
    what of it decides bytes, and no path."""

    fields: Mapping[str, str]
    fingerprint: Json


def in_python(
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


def on_path(
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


def in_folder(
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
