"""`${name}` in a recipe: names, fields and a handful of pure functions.

No template language: a recipe from a stranger can neither loop nor reach an object. A text
that is nothing but one `${...}` keeps the type of its value; `$${` stands for `${` itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from buildsys.errors import Location, RecipeError
from buildsys.recipe.expressions import Evaluator
from buildsys.recipe.nodes import Items, Node, Scalar, Table, located

if TYPE_CHECKING:
    from buildsys.plan.graph import Json

PIECE = re.compile(r"\$\$\{|\$\{([^{}]*)(\}?)")
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*", re.ASCII)
MAX_TEXT = 64 * 1024
MAX_EXPANDED = 20_000_000
VALUE = 100  # what a value of a list or mapping weighs, in characters

# Filled in when a step runs or a device is known; no variable may take these names.
RUN_TIME = frozenset({"in", "out", "toolchain", "jobs"})
DEVICE = frozenset({"device"})
RESERVED = RUN_TIME | DEVICE
LATER = "it is filled in where a step runs (rule `command`) or where a device is known"
OWN_DOLLAR = "write $${ for a ${ of your own"


class Budget:
    """How much a recipe may still grow by substitution: characters and values."""

    def __init__(self, limit: int = MAX_EXPANDED) -> None:
        self.left = limit

    def spend(self, amount: int, where: Location) -> None:
        self.left -= amount
        if self.left < 0:
            raise RecipeError("the recipe expands to something enormous", location=where)


class Scope(NamedTuple):
    """What names mean. lookup: a variable's value, KeyError if there is none. names: all of
    them, for suggestions. later: first names that are left as they are, to be filled in when
    the step runs."""

    lookup: Callable[[str], Json]
    names: Callable[[], list[str]]
    budget: Budget
    later: frozenset[str] = frozenset()

    def leaving(self, later: frozenset[str]) -> Scope:
        return self._replace(later=later)

    def inside(self, values: Mapping[str, Json]) -> Scope:
        """The same with more names (an instance of a matrix)."""

        def lookup(name: str) -> Json:
            return values[name] if name in values else self.lookup(name)

        return self._replace(lookup=lookup, names=lambda: [*self.names(), *values])


def substitute(node: Node, scope: Scope) -> Node:
    """`node` with every `${...}` in its values replaced; its keys too."""
    if isinstance(node, Scalar):
        if not isinstance(node.value, str) or "${" not in node.value:
            return node
        return located(substitute_text(node.value, scope, node.where), node.where)
    if isinstance(node, Items):
        return Items(tuple(substitute(item, scope) for item in node.items), node.where)
    entries: dict[str, Node] = {}
    keys: dict[str, Location] = {}
    for raw, value in node.entries.items():
        name = key_text(raw, scope, node.keys[raw])
        if name in entries:
            raise RecipeError(f"the key '{name}' is here twice", location=node.keys[raw])
        entries[name], keys[name] = substitute(value, scope), node.keys[raw]
    return Table(entries, keys, node.where)


def key_text(raw: str, scope: Scope, where: Location) -> str:
    """A key with its `${...}` replaced: always a text."""
    if "${" not in raw:
        return raw
    return as_text(substitute_text(raw, scope, where), raw, where)


def substitute_text(text: str, scope: Scope, where: Location) -> Json:
    """A text with its `${...}` replaced; one that is nothing but `${...}` keeps the type."""
    whole = PIECE.fullmatch(text)
    if whole is not None and whole.group(1) is not None:
        value = evaluate(whole, scope, where)
        scope.budget.spend(size(value), where)
        return value
    length = 0

    def replace(match: re.Match[str]) -> str:
        nonlocal length
        if match.group(1) is None:
            # What renders the rest of the text later also turns this into `${`.
            return match.group() if scope.later else "${"
        piece = as_text(evaluate(match, scope, where), match.group(), where)
        length += len(piece)
        if length > MAX_TEXT:
            raise RecipeError(f"a text of more than {MAX_TEXT >> 10} KiB", location=where)
        return piece

    result = PIECE.sub(replace, text)
    scope.budget.spend(len(result), where)
    return result


def size(value: Json) -> int:
    """The weight of a JSON value, in characters."""
    if isinstance(value, str):
        return VALUE + len(value)
    if isinstance(value, Mapping):
        return VALUE + sum(size(item) for item in value.values())
    if isinstance(value, list):
        return VALUE + sum(size(item) for item in value)
    return VALUE


def as_text(value: Json, expression: str, where: Location) -> str:
    """How a value reads inside a longer text. Raises RecipeError for null and collections."""
    if isinstance(value, str):
        return value
    if value is None:
        raise RecipeError(f"{expression} is null here: it has no text", location=where)
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    raise RecipeError(f"{expression} is a list or a mapping: it has no text", location=where)


def evaluate(match: re.Match[str], scope: Scope, where: Location) -> Json:
    where = pointing_at(match.group(), where)
    if not match.group(2):
        raise RecipeError("'${' without its '}'", remedy=OWN_DOLLAR, location=where)
    head = NAME.match(match.group(1).strip())
    if head is not None and head.group() in scope.later:
        return match.group()

    def lookup(name: str) -> Json:
        try:
            return scope.lookup(name)
        except KeyError:
            if name in RESERVED:
                message = f"${{{name}}} is not known here"
                raise RecipeError(message, remedy=LATER, location=where) from None
            raise

    return Evaluator(match.group(1), lookup, scope.names, where).value()


def pointing_at(expression: str, where: Location) -> Location:
    """The place of `expression` itself, where the text stands in the recipe as it is."""
    at = where.text.find(expression, where.column - 1)
    return where if at < 0 else where._replace(column=at + 1)
