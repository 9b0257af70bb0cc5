"""A recipe's text as a tree in which every value knows its place.

Named tuples: immutable, and cheap to make by the ten thousand.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from buildsys.errors import Location, RecipeError

if TYPE_CHECKING:
    from buildsys.plan.graph import Json

MAX_DEPTH = 64


class Scalar(NamedTuple):
    """null, a bool, an int, a float or a string."""

    value: bool | int | float | str | None
    where: Location


class Items(NamedTuple):
    """A list."""

    items: tuple[Node, ...]
    where: Location


class Table(NamedTuple):
    """A mapping; `keys` has the place of each key, `where` that of the first one."""

    entries: Mapping[str, Node]
    keys: Mapping[str, Location]
    where: Location


Node: TypeAlias = Scalar | Items | Table


def plain(node: Node) -> Json:
    """The JSON value of a node."""
    if isinstance(node, Scalar):
        return node.value
    if isinstance(node, Items):
        return [plain(item) for item in node.items]
    return {name: plain(value) for name, value in node.entries.items()}


def located(value: Json, where: Location, depth: int = 0) -> Node:
    """A JSON value as a node: all of it stands at `where`."""
    if depth > MAX_DEPTH:
        raise RecipeError(f"nested more than {MAX_DEPTH} deep", location=where)
    if isinstance(value, Mapping):
        entries = {name: located(item, where, depth + 1) for name, item in value.items()}
        return Table(entries, dict.fromkeys(entries, where), where)
    if isinstance(value, list | tuple):
        return Items(tuple(located(item, where, depth + 1) for item in value), where)
    return Scalar(value, where)


def table(node: Node | None, what: str) -> Table:
    """`node` as a mapping: an empty one for None or null; RecipeError for anything else."""
    if node is None or (isinstance(node, Scalar) and node.value is None):
        return Table({}, {}, node.where if node is not None else Location("", 0, 0))
    if not isinstance(node, Table):
        raise RecipeError(f"{what} must be a mapping of names to values", location=node.where)
    return node


def text(node: Node, what: str) -> str:
    """`node` as a string; RecipeError for anything else."""
    if not isinstance(node, Scalar) or not isinstance(node.value, str):
        raise RecipeError(f"{what} must be a string", location=node.where)
    return node.value


def children(node: Node) -> Iterator[Node]:
    """The values directly below a node."""
    if isinstance(node, Items):
        yield from node.items
    elif isinstance(node, Table):
        yield from node.entries.values()


def follow(node: Node, path: tuple[str | int, ...]) -> tuple[Node, Location]:
    """The node at a JSON path, and the place to point at: of the value, or of its key where
    the value is a list or a mapping. Stops at the deepest node that exists."""
    where = node.where
    for step in path:
        if isinstance(node, Table) and isinstance(step, str) and step in node.entries:
            where, node = node.keys[step], node.entries[step]
        elif isinstance(node, Items) and isinstance(step, int) and step < len(node.items):
            node = node.items[step]
            where = node.where
        else:
            break
    return node, node.where if isinstance(node, Scalar) else where
