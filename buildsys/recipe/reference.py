"""The reference in Markdown: every key of a recipe and every rule, from the schema.

What is written down here is what the loader checks with (buildsys/recipe/schema.py), so that
the document cannot say anything else.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from buildsys.recipe.expressions import FUNCTIONS
from buildsys.recipe.schema import artifact_keys, device_schema, source_schemas
from buildsys.recipe.variables import TYPES

if TYPE_CHECKING:
    from buildsys.plan.graph import Json
    from buildsys.rules.spec import InputSpec, Rule

HEAD = """\
# Reference: every key and every rule

Printed by `qbuild schema --markdown`, from what recipes are checked with: do not edit it by
hand. [recipe.md](recipe.md) explains the language; `qbuild schema` prints the same as a JSON
Schema, with which an editor completes and checks recipes.
"""
KIND_WORDS = {"artifact": "an artifact", "file": "a file", "folder": "a folder"}
KIND_WORDS |= {"model": "a model", "text": "a text source", "images": "an images source"}
PLAIN = {"string": "text", "integer": "whole number", "number": "number", "boolean": "true, false"}
PLAIN |= {"null": "null", "object": "mapping", "array": "list"}


def reference(rules: Mapping[str, Rule]) -> Iterator[str]:
    """The lines of the document. rules: those that are described, in this order."""
    yield from HEAD.splitlines()
    yield from variables_and_functions()
    yield from keys_of_sources()
    yield from section("Keys of an artifact", artifact_keys())
    yield from section("Keys of a device", device_schema()["properties"])
    yield from ["", "## Rules", ""]
    yield from table(
        ("rule", "makes"),
        ((f"[`{name}`](#{name})", one_line(rule.doc)) for name, rule in rules.items()),
    )
    for rule in rules.values():
        yield from of_rule(rule)


def variables_and_functions() -> Iterator[str]:
    yield from ["", "## Variables and functions", ""]
    yield f"Types of variables: {', '.join(f'`{name}`' for name in TYPES)}."
    yield ""
    rows = ((f"`{name}({', '.join(takes)})`", doc_of(f)) for name, (f, takes) in FUNCTIONS.items())
    yield from table(("function", "value"), rows)


def doc_of(function: object) -> str:
    """The first line of a docstring; what Python itself says of its own functions will do."""
    return (function.__doc__ or "").strip().split("\n")[0]


def keys_of_sources() -> Iterator[str]:
    for kind, keys in source_schemas().items():
        yield from section(f"Keys of a source of kind `{kind}`", keys)


def section(title: str, keys: Mapping[str, Json]) -> Iterator[str]:
    yield from ["", f"## {title}", ""]
    yield from table(("key", "value", "meaning"), rows_of(keys))


def rows_of(keys: Mapping[str, Json], prefix: str = "") -> Iterator[tuple[str, ...]]:
    """One row for each key; the keys inside a mapping follow it."""
    for name, schema in keys.items():
        yield f"`{prefix}{name}`", kind_of(schema), doc_in(schema)
        yield from rows_of(schema.get("properties", {}), f"{prefix}{name}.")


def of_rule(rule: Rule) -> Iterator[str]:
    """Inputs, options and outputs of one rule."""
    yield from ["", f"### {rule.name}", "", one_line(rule.doc)]
    if rule.toolchain:
        several = " and ".join(f"`{name}`" for name in rule.toolchain.split("+"))
        s = "s" if "+" in rule.toolchain else ""
        more = ", and others as its options say" if rule.toolchain_for else ""
        yield from ["", f"Needs the toolchain{s} {several}{more}."]
    if rule.inputs:
        rows = (
            (f"`{name}`", takes(spec), one_line(spec.doc)) for name, spec in rule.inputs.items()
        )
        yield from ["", *table(("input", "takes", "what it is"), rows)]
    if rule.open_inputs:
        yield from ["", "Any further inputs and outputs, by any names."]
    if rule.options:
        yield from ["", *table(("option", "value", "default", "meaning"), options_of(rule))]
    if rule.open_options:
        yield from ["", "Any further options, by any names."]
    yield from ["", outputs_of(rule)]


def takes(spec: InputSpec) -> str:
    words = " or ".join(KIND_WORDS[kind] for kind in spec.kinds)
    more = ["several"] * spec.many + ["may be left out"] * (not spec.required)
    return "; ".join([words, *more])


def options_of(rule: Rule) -> Iterator[tuple[str, ...]]:
    for name, schema in rule.options.items():
        default = code(schema["default"]) if "default" in schema else "must be given"
        yield f"`{name}`", kind_of(schema), default, doc_in(schema)


def outputs_of(rule: Rule) -> str:
    """One sentence: the artifact itself, and what else is made."""
    main = "a folder (its name ends in `/`)" if rule.folder else "a file"
    others = [
        f"`{name}`: {one_line(spec.doc)} "
        + (f"Written to `{spec.default}` beside it." if spec.default else "Made where it is named.")
        for name, spec in rule.outputs.items()
    ]
    return "  \n".join([f"The artifact is {main}.", *others])


def kind_of(schema: Json) -> str:
    """What values a schema takes, in a few words."""
    if "enum" in schema or "const" in schema:
        return ", ".join(code(value) for value in schema.get("enum", [schema.get("const")]))
    for word in ("anyOf", "oneOf"):
        if word in schema:
            return " or ".join(dict.fromkeys(kind_of(branch) for branch in schema[word]))
    if "$ref" in schema:
        return "name, or `{from: ..., optional: true}`"
    given = schema.get("type")
    kinds = given if isinstance(given, list) else [given]
    return " or ".join(one_kind(kind, schema) for kind in kinds if kind) or "any value"


def one_kind(kind: str, schema: Json) -> str:
    if kind == "array" and "items" in schema:
        inside = kind_of(schema["items"])
        return f"list of {schema['minItems']} x {inside}" if pinned(schema) else f"list of {inside}"
    if kind == "object" and schema.get("properties"):
        return "mapping of " + ", ".join(f"`{name}`" for name in schema["properties"])
    if kind == "object" and isinstance(schema.get("additionalProperties"), dict):
        return f"names to {kind_of(schema['additionalProperties'])}"
    if kind in ("integer", "number"):
        return PLAIN[kind] + limits(schema)
    return PLAIN[kind]


def pinned(schema: Json) -> bool:
    return "minItems" in schema and schema["minItems"] == schema.get("maxItems")


def limits(schema: Json) -> str:
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤"}
    return "".join(f" {sign} {schema[word]}" for word, sign in signs.items() if word in schema)


def code(value: Json) -> str:
    """A value as it stands in a recipe."""
    return f"`{value}`" if isinstance(value, str) else f"`{json.dumps(value)}`"


def doc_in(schema: Json) -> str:
    """The description of a schema, or those of its branches."""
    if "description" in schema:
        return one_line(schema["description"])
    branches = schema.get("anyOf", ())
    return one_line("; ".join(b["description"] for b in branches if "description" in b))


def one_line(text: str) -> str:
    return " ".join(text.split())


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"
