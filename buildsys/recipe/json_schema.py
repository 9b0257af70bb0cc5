"""Pieces that JSON Schemas are put together from, and what `${...}` does to one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from buildsys.plan.graph import Json

EXPRESSION = {"type": "string", "pattern": r"\$\{", "description": "a text with ${...} in it"}
STRING: Json = {"type": "string"}
BOOLEAN: Json = {"type": "boolean"}
COUNT: Json = {"type": "integer", "minimum": 1}
# What a schema may contain schemas in.
INSIDE_MANY = ("anyOf", "oneOf", "allOf", "prefixItems")
INSIDE_NAMED = ("properties", "patternProperties")
INSIDE_ONE = ("items", "additionalProperties")


def described(schema: Json, doc: str) -> Json:
    return {**schema, "description": doc}


def table_of(properties: Mapping[str, Json], required: Iterable[str] = ()) -> Json:
    """A mapping with exactly these keys."""
    schema: Json = {
        "type": "object",
        "properties": dict(properties),
        "additionalProperties": False,
    }
    names = list(required)
    return {**schema, "required": names} if names else schema


def any_names(values: Json) -> Json:
    """A mapping from any names to values of one kind."""
    return {"type": "object", "additionalProperties": values}


def one_or_many(schema: Json) -> Json:
    return {"anyOf": [schema, {"type": "array", "items": schema}]}


def with_expressions(schema: Json) -> Json:
    """`schema`, and wherever it asks for a value that is no plain text, `${...}` as well.

    The branch that was asked for comes first: messages are about that one.
    """
    if not isinstance(schema, Mapping):
        return schema
    inner: dict[str, Json] = dict(schema)
    for word in INSIDE_MANY:
        if word in inner:
            inner[word] = [with_expressions(each) for each in inner[word]]
    for word in INSIDE_NAMED:
        if word in inner:
            inner[word] = {name: with_expressions(each) for name, each in inner[word].items()}
    for word in INSIDE_ONE:
        if word in inner:
            inner[word] = with_expressions(inner[word])
    if takes_any_text(inner) or "$ref" in inner:
        return inner
    outer = {key: inner[key] for key in ("description", "default") if key in inner}
    return {**outer, "anyOf": [inner, EXPRESSION]}


def takes_any_text(schema: Mapping[str, Json]) -> bool:
    kinds = schema.get("type", "string")
    limits = schema.keys() - {"type", "description", "default", "title"}
    return not limits and "string" in ([kinds] if isinstance(kinds, str) else kinds)


def unwrapped(schema: Json) -> Json:
    """The first branch, where `with_expressions` put a second beside it."""
    branches = schema.get("anyOf", ())
    if len(branches) == 2 and branches[1] is EXPRESSION:
        outer = {key: value for key, value in schema.items() if key != "anyOf"}
        return {**outer, **branches[0]}
    return schema
