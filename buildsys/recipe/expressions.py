"""What stands between `${` and `}`: `name`, `name.field`, `function(argument, ...)`, 'text', 12."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from buildsys.errors import Location, RecipeError
from buildsys.recipe.mistakes import suggestion

if TYPE_CHECKING:
    from buildsys.plan.graph import Json

TOKEN = re.compile(
    r"""\s*(?:(?P<name>[A-Za-z_][A-Za-z0-9_-]*)|(?P<number>-?[0-9]{1,18}(?:\.[0-9]{1,18})?)
    |(?P<text>'[^']*'|"[^"]*")|(?P<sign>[.,()]))""",
    re.VERBOSE | re.ASCII,
)
MAX_NESTED_CALLS = 16


def basename(path: str) -> str:
    """The last part of a path."""
    return path.rstrip("/").rpartition("/")[2]


def stem(path: str) -> str:
    """The last part of a path without its suffix."""
    name = basename(path)
    return name.rpartition(".")[0] or name


def lower(text: str) -> str:
    """The text in lower case."""
    return text.lower()


def join(items: list[Json], separator: str) -> str:
    """The values of a list as one text."""
    if not isinstance(items, list):
        raise TypeError
    return separator.join(item if isinstance(item, str) else json.dumps(item) for item in items)


def default(value: Json, otherwise: Json) -> Json:
    """`value`, or `otherwise` where it is null or an empty text."""
    return otherwise if value is None or value == "" else value


def equals(one: Json, other: Json) -> bool:
    """Are two values the same, in type too?"""
    return type(one) is type(other) and bool(one == other)


FUNCTIONS: Mapping[str, tuple[Callable[..., Json], tuple[str, ...]]] = {
    "basename": (basename, ("path",)),
    "stem": (stem, ("path",)),
    "lower": (lower, ("text",)),
    "default": (default, ("value", "otherwise")),
    "join": (join, ("list", "separator")),
    "equals": (equals, ("one", "other")),
}


class Evaluator:
    """One expression, read from left to right."""

    def __init__(
        self,
        expression: str,
        lookup: Callable[[str], Json],
        names: Callable[[], list[str]],
        where: Location,
    ) -> None:
        self.shown = f"'${{{expression}}}'"
        self.lookup = lookup
        self.names = names
        self.where = where
        self.depth = 0
        self.tokens = self.split(expression.rstrip())

    def fail(self, message: str, remedy: str | None = None) -> RecipeError:
        return RecipeError(message, remedy=remedy, location=self.where)

    def split(self, text: str) -> list[tuple[str, str]]:
        """Kind and word of each token, the first one last."""
        tokens, at = [], 0
        while at < len(text):
            match = TOKEN.match(text, at)
            if match is None or match.lastgroup is None:
                raise self.fail(f"cannot read {self.shown}", "write $${ for a ${ of your own")
            tokens.append((match.lastgroup, match.group(match.lastgroup)))
            at = match.end()
        tokens.reverse()
        return tokens

    def peek(self) -> str:
        return self.tokens[-1][1] if self.tokens else ""

    def value(self) -> Json:
        """The value of the whole expression; RecipeError for one that has none."""
        value = self.term()
        if self.tokens:
            raise self.fail(f"cannot read {self.shown}: stray '{self.peek()}'")
        return value

    def term(self) -> Json:
        if not self.tokens:
            raise self.fail(f"cannot read {self.shown}: something is missing")
        kind, word = self.tokens.pop()
        if kind == "text":
            return word[1:-1]
        if kind == "number":
            return float(word) if "." in word else int(word)
        if kind != "name":
            raise self.fail(f"cannot read {self.shown}: stray '{word}'")
        return self.call(word) if self.peek() == "(" else self.variable(word)

    def variable(self, name: str) -> Json:
        try:
            value = self.lookup(name)
        except KeyError:
            remedy = suggestion(name, self.names(), "variables")
            raise self.fail(f"undefined variable '{name}'", remedy) from None
        path = name
        while self.peek() == ".":
            self.tokens.pop()
            field = self.tokens.pop()[1] if self.tokens else ""
            fields = list(value) if isinstance(value, Mapping) else []
            if field not in fields:
                remedy = suggestion(field, fields, "fields")
                raise self.fail(f"'{path}' has no field '{field}'", remedy)
            value, path = value[field], f"{path}.{field}"
        return value

    def call(self, name: str) -> Json:
        if name not in FUNCTIONS:
            raise self.fail(f"unknown function '{name}'", suggestion(name, FUNCTIONS, "functions"))
        self.depth += 1
        if self.depth > MAX_NESTED_CALLS:
            raise self.fail(f"calls nested more than {MAX_NESTED_CALLS} deep")
        self.tokens.pop()
        arguments = self.arguments()
        self.depth -= 1
        function, takes = FUNCTIONS[name]
        if len(arguments) != len(takes):
            raise self.fail(f"the function is {name}({', '.join(takes)})")
        try:
            return function(*arguments)
        except (TypeError, AttributeError):
            shown = ", ".join(json.dumps(argument) for argument in arguments)
            raise self.fail(f"{name} cannot work on {shown}") from None

    def arguments(self) -> list[Json]:
        found = []
        while self.peek() != ")":
            found.append(self.term())
            if self.peek() == ",":
                self.tokens.pop()
            elif self.peek() != ")":
                raise self.fail(f"cannot read {self.shown}: expected ')'")
        self.tokens.pop()
        return found
