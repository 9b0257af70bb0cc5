"""Matrices multiplied out, variables replaced, `when` obeyed: nodes -> Recipe."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from buildsys.errors import Location, RecipeError
from buildsys.recipe.mistakes import raise_all
from buildsys.recipe.nodes import Items, Node, Scalar, Table, plain, table, text
from buildsys.recipe.quantities import memory_bytes, seconds
from buildsys.recipe.recipe import ArtifactEntry, GateEntry, InputEntry, SourceEntry, Wish
from buildsys.recipe.schema import artifact_schema, source_schema
from buildsys.recipe.sources import source_entry
from buildsys.recipe.substitution import (
    DEVICE,
    NAME,
    RESERVED,
    RUN_TIME,
    Scope,
    key_text,
    substitute,
)
from buildsys.recipe.validation import checker

if TYPE_CHECKING:
    from buildsys.plan.graph import Json
    from buildsys.rules.spec import Rule

MAX_INSTANCES = 10_000
MAX_ARTIFACTS = 100_000


def expand_sources(
    section: Table, scope: Scope
) -> tuple[dict[str, SourceEntry], dict[str, Location]]:
    """The sources that are on, and the places of those that are off."""
    check = checker(source_schema(expressions=False))
    found: dict[str, SourceEntry] = {}
    off: dict[str, Location] = {}
    errors: list[RecipeError] = []
    for name, node in section.entries.items():
        where = section.keys[name]
        raw = table(node, f"source '{name}'")
        if not is_on(raw, scope):
            off[name] = where
            continue
        substituted = substitute(without(raw, "when"), scope)
        assert isinstance(substituted, Table)
        mistakes = check(substituted)
        errors += mistakes
        if not mistakes:
            found[name] = source_entry(name, substituted, where)
    raise_all(errors)
    return found, off


def expand_artifacts(
    section: Table, scope: Scope, rules: Mapping[str, Rule]
) -> tuple[tuple[ArtifactEntry, ...], dict[str, Location]]:
    """Every instance of every artifact that is on, and the places of those that are off."""
    checks: dict[str, Callable[[Node], list[RecipeError]]] = {}
    found: list[ArtifactEntry] = []
    off: dict[str, Location] = {}
    errors: list[RecipeError] = []
    for raw_name, node in section.entries.items():
        where = section.keys[raw_name]
        raw = table(node, f"artifact '{raw_name}'")
        rule = text(raw.entries["rule"], "rule")
        if rule not in checks:
            checks[rule] = checker(artifact_schema(rules[rule]))
        for instance in instances(raw, scope):
            name = key_text(raw_name, instance, where)
            if not is_on(raw, instance):
                off[name] = where
                continue
            filled = fill(raw, instance, rules[rule])
            mistakes = checks[rule](filled)
            errors += mistakes
            if not mistakes:
                found.append(artifact_entry(name, filled, where))
        if len(found) > MAX_ARTIFACTS:
            raise RecipeError(f"more than {MAX_ARTIFACTS} artifacts", location=where)
    raise_all(errors)
    return tuple(found), off


def instances(raw: Table, scope: Scope) -> Iterator[Scope]:
    """The scope of each combination of the matrix; the scope itself where there is none."""
    node = raw.entries.get("matrix")
    if node is None:
        yield scope
        return
    axes = table(substitute(node, scope), "matrix")
    total = 1
    for name, values in axes.entries.items():
        if not isinstance(values, Items) or not values.items:
            raise RecipeError(f"matrix '{name}' must be a list of values", location=values.where)
        if name in RESERVED or name in scope.names() or not NAME.fullmatch(name):
            raise RecipeError(
                f"'{name}' cannot be the name of a matrix axis: "
                + ("it is a variable already" if name in scope.names() else "it is no free name"),
                location=axes.keys[name],
            )
        total *= len(values.items)
        if total > MAX_INSTANCES:
            raise RecipeError(f"a matrix of more than {MAX_INSTANCES}", location=node.where)
    lists = [plain(values) for values in axes.entries.values()]
    for combination in itertools.product(*lists):
        yield scope.inside(dict(zip(axes.entries, combination, strict=True)))


def is_on(raw: Table, scope: Scope) -> bool:
    """Is `when` absent or true? False, null, 0 and what is empty switch off."""
    node = raw.entries.get("when")
    return node is None or bool(plain(substitute(node, scope)))


def without(raw: Table, *names: str) -> Table:
    return raw._replace(
        entries={name: node for name, node in raw.entries.items() if name not in names}
    )


def fill(raw: Table, scope: Scope, rule: Rule) -> Table:
    """The artifact with its variables replaced, all but those of the running step."""
    entries = {
        key: substitute(node, scope)
        for key, node in raw.entries.items()
        if key not in ("matrix", "when", "rule", "options")
    }
    if "options" in raw.entries:
        options = table(raw.entries["options"], "options")
        values = {
            name: substitute(node, scope.leaving(RUN_TIME) if name in rule.rendered else scope)
            for name, node in options.entries.items()
        }
        entries["options"] = options._replace(entries=values)
    return raw._replace(entries={"rule": raw.entries["rule"], **entries})


def artifact_entry(name: str, node: Table, where: Location) -> ArtifactEntry:
    """One checked artifact, taken apart."""
    get = node.entries.get
    resources = plain(table(get("resources"), "resources"))
    outputs = table(get("outputs"), "outputs")
    inputs = table(get("inputs"), "inputs")
    toolchain = get("toolchain")
    return ArtifactEntry(
        name=name,
        rule=text(node.entries["rule"], "rule"),
        inputs={
            key: InputEntry(key, tuple(wishes(value)), inputs.keys[key])
            for key, value in inputs.entries.items()
        },
        options=table(get("options"), "options"),
        outputs={key: (text(value, key), value.where) for key, value in outputs.entries.items()},
        optional=bool(plain_or(get("optional"), False)),
        temporary=bool(plain_or(get("temporary"), False)),
        tags=tuple(plain_or(get("tags"), [])),
        threads=resources.get("threads"),
        resources=amounts(resources, get("resources")),
        timeout=time_limit(get("timeout")),
        toolchain=None if toolchain is None else text(toolchain, "toolchain"),
        environment=plain(table(get("environment"), "environment")),
        where=where,
    )


def plain_or(node: Node | None, otherwise: Json) -> Json:
    return otherwise if node is None else plain(node)


def wishes(node: Node, optional: bool = False) -> Iterator[Wish]:
    """What an input asks for: a name, a list, or {from: ..., optional: true}."""
    if isinstance(node, Scalar):
        yield Wish(text(node, "an input"), optional, node.where)
    elif isinstance(node, Items):
        for item in node.items:
            yield from wishes(item, optional)
    else:
        may_be_missing = bool(plain_or(node.entries.get("optional"), optional))
        yield from wishes(node.entries["from"], may_be_missing)


def amounts(resources: Mapping[str, Json], node: Node | None) -> dict[str, Json]:
    """memory in bytes, licences as a list; threads are no reservation."""
    found = {key: value for key, value in resources.items() if key != "threads"}
    if isinstance(found.get("licence"), str):
        found["licence"] = [found["licence"]]
    if "memory" in found and isinstance(node, Table):
        place = node.entries["memory"].where
        found["memory"] = converted(memory_bytes, found["memory"], place)
    return found


def time_limit(node: Node | None) -> float | None:
    if node is None or plain(node) is None:
        return None
    limit: float = converted(seconds, plain(node), node.where)
    return limit


def converted(convert: Callable[[Json], Json], value: Json, where: Location) -> Json:
    try:
        return convert(value)
    except ValueError as error:
        raise RecipeError(str(error), location=where) from error


def expand_gates(section: Table, scope: Scope) -> tuple[GateEntry, ...]:
    found = []
    for raw_name, node in section.entries.items():
        artifact = key_text(raw_name, scope, section.keys[raw_name])
        figures = substitute(table(node, f"gate '{artifact}'"), scope)
        assert isinstance(figures, Table)
        for figure, limit in figures.entries.items():
            value = plain(limit)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise RecipeError(f"the limit of '{figure}' must be a number", location=limit.where)
            found.append(GateEntry(artifact, figure, float(value), figures.keys[figure]))
    return tuple(found)


def expand_devices(section: Table, scope: Scope) -> dict[str, Json]:
    """The devices with variables replaced; `${device.arch}` is known when it is connected."""
    devices: dict[str, Json] = plain(substitute(section, scope.leaving(DEVICE)))
    return devices
