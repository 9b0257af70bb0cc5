"""The plan: every step of a recipe with resolved options, and what each one reads.

Plain immutable values that can be written as JSON and read back, because a build that has
nothing to do reads the validated plan from a cache and imports nothing else. They are named
tuples, not dataclasses: `import dataclasses` alone would be an eighth of a null build.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

from buildsys.errors import Location

Json: TypeAlias = Any  # None | bool | int | float | str | list[Json] | dict[str, Json]
SourceKind = Literal["model", "text", "images", "file", "folder"]


class Source(NamedTuple):
    """Something that qbuild does not make; digested, never written.

    paths: "path" is the file or folder itself (absolute); an `images` source may also have
        "prompts" and "answers". A `model` that is a hub id has path "" and `options["hub"]`
        until it is fetched.
    options: what the recipe says of it (samples, tokens, seed, size, ...). Part of the key of
        every step that reads the source.
    where: the place of "path" in the recipe; places: those of the other paths.
    """

    name: str
    kind: SourceKind
    paths: Mapping[str, str]
    options: Mapping[str, Json]
    where: Location
    places: Mapping[str, Location] = {}  # a Mapping: nobody writes to it


class Ref(NamedTuple):
    """One thing that a step reads: a source, or an output of another step.

    name: a source's name, or an output path relative to the build folder.
    optional: it may be missing (skipped with its toolchain); the step then runs without it.
    """

    kind: Literal["source", "artifact"]
    name: str
    optional: bool = False


class Step(NamedTuple):
    """One run of a rule: all its inputs, options and outputs, resolved.

    name: the main output's path below the build folder; a folder's name ends in "/".
    inputs: input name -> references, in the recipe's order.
    options: complete, defaults filled in.
    outputs: "out" -> name, and every further named output -> its path.
    threads: fixed by the rule or given by the recipe, never by -j: it changes bytes.
    resources: memory (bytes), gpu (count), licence (names): reservations, in no key.
    """

    name: str
    rule: str
    inputs: Mapping[str, tuple[Ref, ...]]
    options: Mapping[str, Json]
    outputs: Mapping[str, str]
    optional: bool
    temporary: bool
    tags: tuple[str, ...]
    threads: int
    resources: Mapping[str, Json]
    timeout: float | None
    toolchain: str | None
    environment: Mapping[str, str]
    where: Location


class Gate(NamedTuple):
    """A limit on a figure of an artifact: `metrics.json["int8 ppl_increase"] <= limit`."""

    artifact: str
    figure: str
    limit: float
    where: Location


class Plan(NamedTuple):
    """The whole graph. `steps` is in topological order; `producer` maps every output path to
    the step that makes it; `devices` is the recipe's section, validated and otherwise as is."""

    name: str
    recipe: str
    defines: Mapping[str, str]
    sources: Mapping[str, Source]
    steps: Mapping[str, Step]
    producer: Mapping[str, str]
    gates: tuple[Gate, ...]
    devices: Mapping[str, Json]
