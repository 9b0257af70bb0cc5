"""Checks nodes against a JSON Schema and says what is wrong in the recipe's own words."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from buildsys.errors import Location, RecipeError
from buildsys.recipe.json_schema import EXPRESSION
from buildsys.recipe.mistakes import suggestion
from buildsys.recipe.nodes import Node, Table, follow, plain

if TYPE_CHECKING:
    from buildsys.plan.graph import Json

TYPE_NAMES = {
    "object": "a mapping",
    "array": "a list",
    "string": "a text",
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "null": "null",
}
LIMITS = {
    "minimum": "at least",
    "maximum": "at most",
    "exclusiveMinimum": "more than",
    "exclusiveMaximum": "less than",
}
COUNTS = {
    "minItems": "{limit} or more values",
    "maxItems": "at most {limit} values",
    "minLength": "{limit} or more characters",
    "maxLength": "at most {limit} characters",
}


def checker(schema: Json) -> Callable[[Node], list[RecipeError]]:
    """A function that lists what is wrong with a node; the schema is prepared once.

    A compiled validator only says that all is well, which it nearly always is; whatever it does
    not like is looked at again by the one that says what is wrong and where.
    """
    from jsonschema_rs import Draft202012Validator

    is_valid = Draft202012Validator(schema).is_valid
    find = cache(lambda: faults(schema))

    def check(node: Node) -> list[RecipeError]:
        value = plain(node)
        try:
            if is_valid(value):
                return []
        except ValueError:  # a text or a number that Rust has no form for
            pass
        return [
            translated for error in find()(value) for translated in translate(deepest(error), node)
        ]

    return check


def faults(schema: Json) -> Callable[[Json], Iterable[Any]]:
    """What makes the errors of a value."""
    from jsonschema import Draft202012Validator

    found: Callable[[Json], Iterable[Any]] = Draft202012Validator(schema).iter_errors
    return found


def deepest(error: Any) -> Any:
    """Of a value that may be one of several things, the complaint about the likeliest one:
    the only thing that it can be besides a text with ${...}, else the one of its own kind."""
    while error.validator == "anyOf":
        branches: dict[int, list[Any]] = {}
        for inner in error.context or ():
            if inner.schema != EXPRESSION:
                branches.setdefault(inner.schema_path[0], []).append(inner)
        of_kind = [
            found for found in branches.values() if not any(is_kind(e, error) for e in found)
        ]
        if len(branches) == 1:
            of_kind = list(branches.values())
        if not of_kind:
            return error
        error = of_kind[0][0]
    return error


def is_kind(inner: Any, outer: Any) -> bool:
    """Does this complaint say that the value itself is of the wrong kind?"""
    return bool(inner.validator == "type" and inner.absolute_path == outer.absolute_path)


def translate(error: Any, root: Node) -> Iterator[RecipeError]:
    """A jsonschema error -> what to tell the person, with its place."""
    path = tuple(error.absolute_path)
    node, where = follow(root, path)
    name = str(path[-1]) if path else ""
    keyword, expected, value = error.validator, error.validator_value, error.instance
    if keyword == "additionalProperties":
        yield from unknown_keys(error, node)
    elif keyword == "required":
        yield from missing_keys(error, name, where)
    elif keyword == "enum":
        remedy = suggestion(str(value), [str(item) for item in expected], "one of")
        what = (
            f"unknown {name} '{value}'"
            if name == "rule"
            else f"{named(path)} cannot be {shown(value)}"
        )
        yield RecipeError(what, remedy=remedy, location=where)
    elif keyword == "oneOf":
        yield kindless(error, node, where)
    elif keyword == "type":
        kinds = [expected] if isinstance(expected, str) else expected
        words = " or ".join(TYPE_NAMES[kind] for kind in kinds if kind != "null") or "null"
        # "${n}" alone keeps the type of n, so that quotes around it do not help.
        number = isinstance(value, int | float) and "string" in kinds
        remedy = "put it in quotes, or declare its variable with {type: string}" if number else None
        what = f"{named(path)} must be {words}, not {shown(value)}"
        yield RecipeError(what, remedy=remedy, location=where)
    elif keyword in LIMITS:
        yield RecipeError(
            f"{named(path)} must be {LIMITS[keyword]} {expected}, not {value}", location=where
        )
    elif keyword in COUNTS:
        wants = COUNTS[keyword].format(limit=expected)
        yield RecipeError(f"{named(path)} must have {wants}", location=where)
    elif keyword == "anyOf":
        yield RecipeError(
            f"{named(path)} cannot be {shown(value)}", remedy=wanted(expected), location=where
        )
    else:
        wants = error.schema.get("description") or f"{keyword} {expected}"
        yield RecipeError(
            f"{named(path)} cannot be {shown(value)}", remedy=f"expected: {wants}", location=where
        )


def missing_keys(error: Any, name: str, where: Location) -> Iterator[RecipeError]:
    for key in error.validator_value:
        if key in error.instance:
            continue
        remedy = None
        if key == "options":
            inner = error.schema["properties"]["options"]["required"]
            remedy = f"this rule needs {', '.join(inner)}"
        what = f"option '{key}'" if name == "options" else f"'{key}'"
        yield RecipeError(f"{what} is missing here", remedy=remedy, location=where)


def unknown_keys(error: Any, node: Node) -> Iterator[RecipeError]:
    """One error for each key that should not be there, at that key."""
    known = list(error.schema.get("properties", ()))
    if not isinstance(node, Table):
        return
    what = {"options": "option", "inputs": "input", "outputs": "output"}.get(
        str(error.absolute_path[-1]) if error.absolute_path else "", "key"
    )
    for key in node.entries:
        if key not in known:
            yield RecipeError(
                f"unknown {what} '{key}'",
                remedy=suggestion(key, known, f"known {what}s") or f"this takes no {what}s at all",
                location=node.keys[key],
            )


def kindless(error: Any, node: Node, where: Location) -> RecipeError:
    """A source that does not say what it is, or says two things."""
    kinds = [branch["required"][0] for branch in error.validator_value if "required" in branch]
    given = [key for key in kinds if isinstance(node, Table) and key in node.entries]
    if given:
        return RecipeError(f"this is both {' and '.join(given)}: choose one", location=where)
    keys: Iterable[str] = node.entries if isinstance(node, Table) else ()
    remedy = next((near for key in keys if (near := suggestion(key, kinds)) and "mean" in near), "")
    return RecipeError(
        f"a source is one of {', '.join(kinds)}", remedy=remedy or None, location=where
    )


def named(path: tuple[str | int, ...]) -> str:
    """What a message calls the value at this path."""
    words = [str(step) for step in path if not isinstance(step, int)]
    return f"'{words[-1]}'" if words else "this"


def shown(value: Json) -> str:
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = f"'{value}'" if isinstance(value, str) else str(value)
    return text if len(text) <= 60 else text[:57] + "...'"


def wanted(branches: Iterable[Mapping[str, Json]]) -> str | None:
    words = [
        branch.get("description") or TYPE_NAMES.get(str(branch.get("type")), "")
        for branch in branches
    ]
    found = [word for word in dict.fromkeys(words) if word]
    return f"expected: {', or '.join(found)}" if found else None
