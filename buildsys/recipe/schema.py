"""The JSON Schema of recipes: what `qbuild schema` prints and what the loader checks with.

Each rule contributes the schema of its options, inputs and outputs. In a recipe a text with
`${...}` may stand for any value; after substitution the same definitions hold without it
(`expressions=False`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from buildsys.recipe.expressions import FUNCTIONS
from buildsys.recipe.json_schema import (
    BOOLEAN,
    COUNT,
    STRING,
    any_names,
    described,
    one_or_many,
    table_of,
    unwrapped,
    with_expressions,
)
from buildsys.recipe.quantities import BYTES_PATTERN, SECONDS_PATTERN
from buildsys.recipe.variables import TYPES

if TYPE_CHECKING:
    from buildsys.plan.graph import Json
    from buildsys.rules.spec import Rule

DIALECT = "https://json-schema.org/draft/2020-12/schema"
HOLD_NAMES = frozenset(
    {"rule", "inputs", "options", "outputs", "matrix", "resources", "environment"}
)
REFERENCE: Json = {"$ref": "#/$defs/reference"}
DOC: Json = {"type": "string", "description": "for people; counts for nothing"}
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


def source_schemas() -> dict[str, Json]:
    """Source kind -> its keys."""
    path = described(STRING, "relative to the recipe file")
    every: dict[str, Json] = {
        "when": described({}, "leave this source out where the value is false, null, 0 or empty"),
        "doc": DOC,
    }
    fetched: dict[str, Json] = {
        "url": described(STRING, "fetch it from here (not yet supported)"),
        "sha256": described(
            {"type": "string", "pattern": "^[0-9a-f]{64}$"}, "64 hexadecimal digits"
        ),
    }
    maybe_text: Json = {"type": ["string", "null"]}
    seed: Json = {"type": "integer"}
    size: Json = {"type": "array", "items": COUNT, "minItems": 2, "maxItems": 2}
    return {
        "model": {
            "model": described(STRING, "a folder, a model that qbuild ships, or a hub id"),
            "revision": described(maybe_text, "a hub revision (a commit, to be exact)"),
            **every,
        },
        "text": {
            "text": described(path, "a text file, or lines of JSON (.jsonl, .jsonl.zst)"),
            "field": described(maybe_text, "the field of a JSON line that holds the text"),
            "samples": described(COUNT, "how many windows of text"),
            "tokens": described(COUNT, "tokens per window"),
            "seed": described(seed, "choose the windows at random, with this seed"),
            **fetched,
            **every,
        },
        "images": {
            "images": described(path, "a folder of images"),
            "prompts": described(maybe_text, "a file with the prompt of each image"),
            "answers": described(maybe_text, "a file with the answer to each prompt"),
            "samples": described(COUNT, "how many images"),
            "size": described(size, "height and width in pixels"),
            "seed": described(seed, "choose the images at random, with this seed"),
            **fetched,
            **every,
        },
        "file": {
            "file": described(path, "a file; inside `package`, where that is given"),
            "package": described(STRING, "the installed Python package that the file is in"),
            **fetched,
            **every,
        },
        "folder": {"folder": path, **fetched, **every},
    }


def source_schema(*, expressions: bool) -> Json:
    """Any source: what it is, is the key that all others of its kind hang on."""
    kinds = source_schemas()
    if expressions:
        kinds = {
            kind: {name: with_expressions(value) for name, value in keys.items()}
            for kind, keys in kinds.items()
        }
    branches: list[Json] = [
        {"if": {"required": [kind]}, "then": table_of(keys)} for kind, keys in kinds.items()
    ]
    one_kind: Json = {"oneOf": [{"required": [kind]} for kind in kinds]}
    checked: Json = {"if": one_kind, "then": {"allOf": branches}, "else": one_kind}
    return {"type": "object", "if": {"type": "object"}, "then": checked}


def reference_schema() -> Json:
    one: Json = {
        "anyOf": [
            described(STRING, "a source, an output path, or a glob over output paths"),
            described(
                table_of({"from": one_or_many(STRING), "optional": BOOLEAN}, ["from"]),
                "{from: ..., optional: true}",
            ),
        ]
    }
    return one_or_many(one)


def artifact_keys() -> dict[str, Json]:
    """The keys that every artifact may have, whatever its rule."""
    amount: Json = {"type": "string", "pattern": BYTES_PATTERN}
    memory: Json = {"anyOf": [described(amount, "an amount such as 12GiB"), COUNT]}
    time: Json = {"type": "string", "pattern": SECONDS_PATTERN}
    limit: Json = {
        "anyOf": [
            described(time, "a time such as 600s or 10m"),
            {"type": "number", "exclusiveMinimum": 0},
        ]
    }
    resources = {
        "memory": described(memory, "the most it needs, e.g. 12GiB"),
        "gpu": described({"type": "integer", "minimum": 0}, "how many"),
        "licence": described(one_or_many(STRING), "licences it holds while it runs"),
        "threads": described(COUNT, "instead of the rule's own number; changes bytes"),
        "jobs": described(COUNT, "how many of the -j places it takes"),
    }
    return {
        "rule": described(STRING, "how it is made: one of the rules"),
        "inputs": described(any_names(REFERENCE), "what it is made from, by the rule's names"),
        "options": described({"type": "object"}, "the rule's own"),
        "outputs": described(any_names(STRING), "paths of further outputs, by name"),
        "matrix": described(
            any_names({"type": "array", "items": {}, "minItems": 1}),
            "one artifact for each combination of these values",
        ),
        "when": described({}, "leave it out where the value is false, null, 0 or empty"),
        "tags": described({"type": "array", "items": STRING}, "`qbuild build tag:NAME`"),
        "optional": described(BOOLEAN, "skip it, and say so, where its toolchain is missing"),
        "temporary": described(BOOLEAN, "remove it after its last consumer"),
        "resources": described(table_of(resources), "what it holds while it runs"),
        "timeout": described(limit, "e.g. 600s or 10m"),
        "toolchain": described(STRING, "use this toolchain"),
        "environment": described(any_names(STRING), "variables for the step; part of its key"),
        "doc": DOC,
    }


def rule_keys(rule: Rule) -> dict[str, Json]:
    """What one rule adds: its own inputs, options and outputs."""
    options: Json = {
        "type": "object",
        "properties": {name: dict(schema) for name, schema in rule.options.items()},
        "additionalProperties": rule.open_options,
    }
    required = [name for name, schema in rule.options.items() if "default" not in schema]
    if required:
        options["required"] = required
    inputs: Json = {
        "type": "object",
        "properties": {name: described(REFERENCE, spec.doc) for name, spec in rule.inputs.items()},
        "additionalProperties": REFERENCE if rule.open_inputs else False,
    }
    outputs: Json = {
        "type": "object",
        "properties": {name: described(STRING, spec.doc) for name, spec in rule.outputs.items()},
        "additionalProperties": STRING if rule.open_inputs else False,
    }
    return {"options": options, "inputs": inputs, "outputs": outputs}


def artifact_schema(rule: Rule) -> Json:
    """One artifact of this rule, complete, after substitution."""
    keys = {**artifact_keys(), **rule_keys(rule), "rule": {"const": rule.name}}
    return {**table_of(keys, required_keys(keys)), "$defs": {"reference": reference_schema()}}


def required_keys(keys: Mapping[str, Json]) -> list[str]:
    return ["rule", "options"] if "required" in keys["options"] else ["rule"]


def spelled_out(rule: Rule) -> Json:
    """What holds for artifacts of one rule beyond what holds for every artifact."""
    keys = rule_keys(rule)
    schema = {"type": "object", "properties": keys, "required": required_keys(keys)}
    return {**with_expressions_inside(schema), "description": rule.doc}


def with_expressions_inside(schema: Json) -> Json:
    """`${...}` may stand for the value of a key; where the key holds names of its own, for
    the value of one of those."""
    inner = {}
    for name, value in schema["properties"].items():
        changed = with_expressions(value)
        inner[name] = unwrapped(changed) if name in HOLD_NAMES else changed
    return {**schema, "properties": inner}


def variable_schema() -> Json:
    typed = table_of(
        {
            "type": {"enum": list(TYPES)},
            "default": {},
            "choices": {"type": "array", "minItems": 1},
            "doc": STRING,
        },
        ["type"],
    )
    return {"if": {"type": "object", "required": ["type"]}, "then": typed}


def device_schema() -> Json:
    mode = described({"type": "string", "pattern": "^[0-7]{3,4}$"}, "e.g. '755'")
    target: Json = {"anyOf": [STRING, table_of({"to": STRING, "mode": mode}, ["to"])]}
    run = table_of(
        {
            "argv": described(
                {"type": "array", "items": STRING, "minItems": 1}, "the program and its arguments"
            ),
            "timeout": artifact_keys()["timeout"],
            "expect": table_of(
                {
                    "exit": described(
                        {"type": "integer", "minimum": 0, "maximum": 255}, "its exit code"
                    ),
                    "output": described(STRING, "a text that it must print"),
                }
            ),
            "environment": described(any_names(STRING), "variables of the program"),
        },
        ["argv"],
    )
    return table_of(
        {
            "transport": described({"enum": ["adb", "ssh", "local"]}, "how it is reached"),
            "root": described(STRING, "the folder on the device"),
            "require": described(any_names({}), "facts that the device must have"),
            "push": described(any_names(target), "artifact -> folder or file below root"),
            "invalidates": described(
                any_names({"type": "array", "items": STRING}),
                "file on the device -> what makes it stale",
            ),
            "run": run,
            "pull": described(any_names(STRING), "file on the device -> file here"),
            "doc": DOC,
        },
        ["transport", "root"],
    )


def section(values: Json) -> Json:
    """A part of the recipe: names of the user's to values of one kind. A null is an empty one,
    or removes that of the extended recipe."""
    return {**any_names(values), "type": ["object", "null"]}


def recipe_schema(rules: Mapping[str, Rule], names: Iterable[str]) -> Json:
    """The schema of a whole recipe. rules: those whose keys are spelled out; names: every
    rule that there is.

    A recipe that extends another may leave out what it takes from there.
    """
    general = with_expressions_inside(
        table_of({**artifact_keys(), "rule": {"enum": sorted(names)}})
    )
    del general["type"]  # a null removes what the extended recipe has
    if_any: Json = section({"type": ["object", "null"]})
    spelled: list[Json] = [
        {
            "if": {"required": ["rule"], "properties": {"rule": {"const": name}}},
            "then": {"$ref": f"#/$defs/rule-{name}"},
        }
        for name in sorted(rules)
    ]
    one: Json = {"type": "object", "required": ["rule"]}
    whole: Json = {
        "artifacts": section({**one, "allOf": spelled} if spelled else one),
        "sources": section({"$ref": "#/$defs/source"}),
    }
    limit = with_expressions({"type": "number"})
    return {
        "$schema": DIALECT,
        "title": "qbuild recipe",
        "description": f"functions in ${{...}}: {', '.join(sorted(FUNCTIONS))}",
        **table_of(
            {
                "qbuild": described({"const": 1}, "the version of the recipe language"),
                "name": described(
                    {"type": "string", "pattern": NAME_PATTERN},
                    "letters, digits, '.', '_' and '-': the build folder's name",
                ),
                "extends": described(STRING, "lay this recipe over another"),
                "vars": section(variable_schema()),
                "sources": section({}),
                "artifacts": section({"$ref": "#/$defs/artifact"}),
                "gates": section(section(limit)),
                "devices": section(unwrapped(with_expressions(device_schema()))),
                "doc": STRING,
            },
            ["qbuild"],
        ),
        "if": {"required": ["extends"]},
        "then": {"properties": {"artifacts": if_any, "sources": if_any}},
        "else": {"properties": whole},
        "$defs": {
            "artifact": general,
            "source": source_schema(expressions=True),
            "reference": reference_schema(),
            **{f"rule-{name}": spelled_out(rule) for name, rule in sorted(rules.items())},
        },
    }
