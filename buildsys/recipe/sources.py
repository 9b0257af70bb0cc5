"""The section `sources`: what each one is and where it lies on this machine."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from buildsys.errors import Location, RecipeError
from buildsys.recipe import paths
from buildsys.recipe.nodes import Node, Table, plain, text
from buildsys.recipe.recipe import SourceEntry

if TYPE_CHECKING:
    from buildsys.plan.graph import Json, SourceKind

KINDS: tuple[SourceKind, ...] = ("model", "text", "images", "file", "folder")
PATHS = ("prompts", "answers")
NOT_OPTIONS = frozenset({*KINDS, *PATHS, "when", "doc", "package", "url", "sha256"})
HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9._-]+", re.ASCII)
# A file of a Python package that is not installed: "package:NAME/FILE" in place of its path.
NOT_INSTALLED = "package:"


def source_entry(name: str, table: Table, where: Location) -> SourceEntry:
    """One source whose variables are replaced and whose keys are checked."""
    if "url" in table.entries:
        raise RecipeError(
            "sources that qbuild fetches by `url` are not yet supported",
            remedy="download it, and name the file",
            location=table.keys["url"],
        )
    kind = next(kind for kind in KINDS if kind in table.entries)
    node = table.entries[kind]
    options: dict[str, Json] = {
        key: plain(value) for key, value in table.entries.items() if key not in NOT_OPTIONS
    }
    if kind == "model":
        path, hub = find_model(node)
        options.pop("revision", None)
        options |= {"hub": hub, "revision": revision(table)} if hub else {}
    elif kind == "file" and "package" in table.entries:
        path = find_in_package(table.entries["package"], node)
    else:
        path = source_path(node, kind)
    places = {"path": node.where}
    found = {"path": path}
    for part in PATHS:
        if part in table.entries and plain(table.entries[part]) is not None:
            found[part] = source_path(table.entries[part], part)
            places[part] = table.entries[part].where
    return SourceEntry(name, kind, found, options, where, places)


def revision(table: Table) -> Json:
    return plain(table.entries["revision"]) if "revision" in table.entries else None


def source_path(node: Node, what: str) -> str:
    """An absolute path, seen from the folder of the file in which it is written."""
    word = text(node, what)
    if not word or "\0" in word:
        raise RecipeError(f"'{what}' names no path", location=node.where)
    return paths.absolute(word, paths.folder_of(node.where.file))


def find_model(node: Node) -> tuple[str, str]:
    """The folder of a model, or "" and its hub id.

    A folder beside the recipe comes first, then a model that qbuild ships, then `org/name` on
    the hub. Raises RecipeError for a word that is none of these.
    """
    word = text(node, "model")
    folder = source_path(node, "model")
    if paths.is_folder(folder):
        return folder, ""
    shipped = paths.installed_model(word)
    if shipped is not None:
        return shipped, ""
    if HUB_ID.fullmatch(word):
        return "", word
    return folder, ""


def find_in_package(package_node: Node, file_node: Node) -> str:
    """The path of a file inside an installed Python package, which is not imported.

    "package:NAME/FILE" where there is none: a plan may be made, and nothing be built from it.
    """
    from importlib.machinery import PathFinder

    package, file = text(package_node, "package"), text(file_node, "file")
    if not package.isidentifier():
        message = f"'{package}' is no name of a Python package"
        raise RecipeError(message, location=package_node.where)
    if file.startswith("/") or ".." in file.split("/"):
        raise RecipeError(f"'{file}' is not inside a package", location=file_node.where)
    # A top-level name is looked for in the folders of sys.path; nothing of it is executed.
    spec = PathFinder.find_spec(package)
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    return paths.absolute(file, folders[0]) if folders else f"{NOT_INSTALLED}{package}/{file}"
