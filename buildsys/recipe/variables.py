"""The section `vars` and the `-D` words of the command line: typed, lazy, checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from buildsys.errors import Location, RecipeError, UsageError
from buildsys.recipe.mistakes import suggestion
from buildsys.recipe.nodes import Items, Node, Scalar, Table, plain, table
from buildsys.recipe.paths import absolute, folder_of, here, is_folder
from buildsys.recipe.scalars import resolve
from buildsys.recipe.substitution import NAME, RESERVED, Budget, Scope, substitute

if TYPE_CHECKING:
    from buildsys.plan.graph import Json

TYPES = ("model", "path", "int", "number", "bool", "string", "choice")
PYTHON_TYPES: Mapping[str, tuple[type, ...]] = {
    "model": (str,),
    "path": (str,),
    "int": (int,),
    "number": (int, float),
    "bool": (bool,),
    "string": (str,),
}
WORDS = {"int": "a whole number", "number": "a number", "bool": "true or false"}
MAX_CHAIN = 64


class Variable(NamedTuple):
    """One variable as declared. type: None for one that is given by its value alone."""

    name: str
    type: str | None
    default: Node | None
    choices: tuple[Json, ...]
    where: Location


class Variables:
    """What variables are worth. Values are worked out when they are first asked for, each
    once, so that one may refer to another in any order; a circle is an error."""

    def __init__(self, declared: Mapping[str, Variable], defines: Mapping[str, str]) -> None:
        self.declared = declared
        self.values: dict[str, Json] = {
            name: from_command_line(find(declared, name), word) for name, word in defines.items()
        }
        self.pending: list[str] = []
        self.scope = Scope(self.lookup, lambda: list(declared), Budget())

    def lookup(self, name: str) -> Json:
        """The value of `name`; KeyError if no variable is called that."""
        if name not in self.values:
            self.values[name] = self.work_out(self.declared[name])
        return self.values[name]

    def work_out(self, variable: Variable) -> Json:
        if variable.name in self.pending:
            circle = [*self.pending[self.pending.index(variable.name) :], variable.name]
            raise RecipeError(
                f"variables refer to each other in a circle: {' -> '.join(circle)}",
                location=variable.where,
            )
        if len(self.pending) >= MAX_CHAIN:
            raise RecipeError("variables refer to each other too deeply", location=variable.where)
        if variable.default is None:
            raise RecipeError(
                f"variable '{variable.name}' has no value",
                remedy=f"give it one: -D {variable.name}=...",
                location=variable.where,
            )
        self.pending.append(variable.name)
        try:
            value = plain(substitute(variable.default, self.scope))
        finally:
            self.pending.pop()
        return checked(variable, value)

    def work_out_all(self) -> None:
        """Find every mistake in `vars`, also in variables that nothing uses."""
        for name in self.declared:
            self.lookup(name)


def declare(section: Table) -> dict[str, Variable]:
    """The section `vars` -> variables by name."""
    return {
        name: declaration(name, node, section.keys[name]) for name, node in section.entries.items()
    }


def declaration(name: str, node: Node, where: Location) -> Variable:
    if not NAME.fullmatch(name):
        raise RecipeError(f"'{name}' cannot be the name of a variable", location=where)
    if name in RESERVED:
        raise RecipeError(
            f"'${{{name}}}' is filled in by qbuild itself",
            remedy="choose another name for this variable",
            location=where,
        )
    if not isinstance(node, Table) or "type" not in node.entries:
        return Variable(name, None, node, (), where)
    kind = plain(node.entries["type"])
    if kind not in TYPES:
        raise RecipeError(
            f"unknown type '{kind}'",
            remedy=suggestion(str(kind), TYPES, "types"),
            location=node.entries["type"].where,
        )
    for key in node.entries:
        if key not in ("type", "default", "choices", "doc"):
            remedy = suggestion(key, ("type", "default", "choices", "doc"))
            raise RecipeError(f"unknown key '{key}'", remedy=remedy, location=node.keys[key])
    return Variable(name, kind, node.entries.get("default"), choices(node, kind), where)


def choices(node: Table, kind: str) -> tuple[Json, ...]:
    given = node.entries.get("choices")
    if kind == "choice" and (not isinstance(given, Items) or not given.items):
        raise RecipeError(
            "a choice needs the list of its `choices`", location=node.entries["type"].where
        )
    if kind != "choice" and given is not None:
        raise RecipeError("only a `choice` has `choices`", location=node.keys["choices"])
    return tuple(plain(item) for item in given.items) if isinstance(given, Items) else ()


def checked(variable: Variable, value: Json) -> Json:
    """A default that has the declared type; a path, and a model that is a folder, become
    absolute, from their file's folder."""
    if variable.type is None or value is None:
        return value
    assert variable.default is not None
    where = variable.default.where
    if variable.type == "choice":
        if not any(type(value) is type(choice) and value == choice for choice in variable.choices):
            shown = ", ".join(str(choice) for choice in variable.choices)
            raise RecipeError(f"'{value}' is not one of {shown}", location=where)
        return value
    if not isinstance(value, PYTHON_TYPES[variable.type]) or (
        isinstance(value, bool) and variable.type != "bool"
    ):
        expected = WORDS.get(variable.type, "a text")
        raise RecipeError(
            f"variable '{variable.name}' must be {expected}, not {value!r}", location=where
        )
    folder = absolute(str(value), folder_of(where.file))
    if variable.type == "model":
        # Seen from the file that names it, which need not be the one with the source.
        return folder if str(value).startswith((".", "~", "/")) or is_folder(folder) else value
    return folder if variable.type == "path" else value


def find(declared: Mapping[str, Variable], name: str) -> Variable:
    """The variable that a -D names; UsageError with the nearest name if there is none."""
    if name in declared:
        return declared[name]
    raise UsageError(
        f"-D {name}=...: the recipe has no variable '{name}'",
        remedy=suggestion(name, declared, "variables"),
    )


def from_command_line(variable: Variable, word: str) -> Json:
    """The value of `-D name=word`, as the variable's type wants it.

    A path, and a model that is a folder, are seen from the current folder. A variable that is
    declared by its value alone takes values of that kind; one whose value is null takes any.
    """
    kind = variable.type or kind_of(variable.default)
    read = READERS.get(kind)
    try:
        if kind == "choice":
            return choice_from(variable.choices, word)
        return word if read is None else read(word)
    except ValueError as error:
        raise UsageError(f"-D {variable.name}={word}: {error}") from error


def kind_of(default: Node | None) -> str:
    if isinstance(default, Table | Items):
        return "value"
    value = default.value if isinstance(default, Scalar) else None
    if value is None:
        return "any"
    names = {bool: "bool", int: "int", float: "number", str: "string"}
    return names[type(value)]


def read_int(word: str) -> int:
    value = resolve(word) if word else None
    if type(value) is not int:
        raise ValueError("expected a whole number")
    return value


def read_number(word: str) -> int | float:
    value = resolve(word) if word else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("expected a number")
    return value


def read_bool(word: str) -> bool:
    value = resolve(word) if word else None
    if not isinstance(value, bool):
        raise ValueError("expected true or false")
    return value


def read_path(word: str) -> str | None:
    return None if word in ("", "null") else here(word)


def read_model(word: str) -> str:
    if not word:
        raise ValueError("expected a folder, a hub id (org/name), or a model that qbuild ships")
    folder = here(word)
    # No hub id begins like this: what is not there is missing here, not beside the recipe.
    return folder if word.startswith((".", "~", "/")) or is_folder(folder) else word


def read_value(word: str) -> Json:
    """A list or mapping, written as YAML on one line."""
    from buildsys.recipe.reading import parse

    try:
        return plain(parse(f"value: {word}", "-D").entries["value"])
    except RecipeError as error:
        raise ValueError(error.message) from error


def choice_from(known: tuple[Json, ...], word: str) -> Json:
    for choice in known:
        if word == (choice if isinstance(choice, str) else str(choice)):
            return choice
    raise ValueError(f"expected one of {', '.join(str(choice) for choice in known)}")


READERS: Mapping[str, Callable[[str], Json]] = {
    "int": read_int,
    "number": read_number,
    "bool": read_bool,
    "path": read_path,
    "model": read_model,
    "any": lambda word: resolve(word) if word else None,
    "value": read_value,
}


def read_variables(nodes: Table, defines: Mapping[str, str]) -> Variables:
    """The variables of a merged recipe, with the values that `-D` gives.

    Raises RecipeError for what is wrong in `vars`, UsageError for what is wrong in a -D.
    """
    section = nodes.entries.get("vars")
    variables = Variables(declare(table(section, "vars")), defines)
    variables.work_out_all()
    return variables
