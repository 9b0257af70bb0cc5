"""`extends`: a recipe laid over another. Deep merge; the child wins; null removes."""

from __future__ import annotations

from buildsys.errors import Location, RecipeError
from buildsys.recipe.mistakes import suggestion
from buildsys.recipe.nodes import Node, Scalar, Table, text
from buildsys.recipe.paths import (
    base,
    beside,
    folder_of,
    installed_recipe,
    is_file,
    real,
    recipes_in,
)
from buildsys.recipe.reading import read_nodes
from buildsys.share import shared_folder

VERSION = 1


def merge(parent: Node, child: Node) -> Node:
    """`child` laid over `parent`.

    Mappings merge key by key; anything else in the child replaces what the parent has. A null
    removes the parent's key, and stays a null where the parent has none.
    """
    if not isinstance(parent, Table) or not isinstance(child, Table):
        return child
    entries = dict(parent.entries)
    keys = dict(parent.keys)
    for name, value in child.entries.items():
        if name not in entries:
            entries[name], keys[name] = value, child.keys[name]
        elif isinstance(value, Scalar) and value.value is None:
            del entries[name], keys[name]
        else:
            merged = merge(entries[name], value)
            entries[name] = merged
            if merged is value:
                keys[name] = child.keys[name]
    return Table(entries, keys, child.where)


def read_extended(path: str) -> tuple[Table, tuple[str, ...]]:
    """The recipe at `path` merged over everything it extends, and the files that were read.

    Raises RecipeError for a circle of `extends`, a missing file, or another recipe version.
    """
    layers: list[Table] = []
    files: list[str] = []
    seen: list[str] = []
    where: Location | None = None
    current: str | None = path
    while current is not None:
        identity = real(current)
        if identity in seen:
            chain = " -> ".join([*files[seen.index(identity) :], current])
            raise RecipeError(f"recipes extend each other in a circle: {chain}", location=where)
        seen.append(identity)
        files.append(current)
        nodes = read_nodes(current)
        check_version(nodes)
        layers.append(nodes)
        parent = nodes.entries.get("extends")
        current = None if parent is None else find_parent(parent, current)
        where = parent.where if parent is not None else None
    return lay_over(layers), tuple(files)


def lay_over(layers: list[Table]) -> Table:
    """Child first. `name` and `extends` belong to the file they stand in: a recipe that
    inherited its parent's name would build into its parent's folder."""
    merged: Node = without(layers[-1], {"extends"} if len(layers) == 1 else {"extends", "name"})
    for number, layer in reversed(list(enumerate(layers[:-1]))):
        merged = merge(merged, without(layer, {"extends"} if number == 0 else {"extends", "name"}))
    assert isinstance(merged, Table)
    return merged


def without(node: Table, names: set[str]) -> Table:
    return Table(
        {name: value for name, value in node.entries.items() if name not in names},
        {name: where for name, where in node.keys.items() if name not in names},
        node.where,
    )


def check_version(nodes: Table) -> None:
    version = nodes.entries.get("qbuild")
    if version is None:
        raise RecipeError(
            "this file does not say which recipe language it is written in",
            remedy=f"begin it with `qbuild: {VERSION}`",
            location=nodes.where,
        )
    if not isinstance(version, Scalar) or version.value != VERSION or version.value is True:
        raise RecipeError(f"this qbuild reads recipes of version {VERSION}", location=version.where)


def find_parent(node: Node, child: str) -> str:
    """The file that `extends` names: beside the recipe, else one that qbuild ships."""
    word = text(node, "extends")
    path = beside(child, word)
    if is_file(path):
        return path
    installed = installed_recipe(word)
    if installed is not None:
        return installed
    known = [*recipes_in(folder_of(path)), *recipes_in(shared_folder("recipes"))]
    raise RecipeError(
        f"there is no recipe '{word}' here, and qbuild ships none of that name",
        remedy=suggestion(base(word), known, "recipes"),
        location=node.where,
    )
