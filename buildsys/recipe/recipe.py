"""A recipe that has been read: sections laid out, variables replaced, matrices expanded.

What it means as a graph (which name is whose output, what comes first) is the plan's affair.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from buildsys.errors import Location
from buildsys.recipe.nodes import Table

if TYPE_CHECKING:
    from buildsys.plan.graph import Json, SourceKind


@dataclass(frozen=True)
class SourceEntry:
    """One source, with absolute paths ("path"; an `images` source may also have "prompts"
    and "answers"). places: where each of those is written."""

    name: str
    kind: SourceKind
    paths: Mapping[str, str]
    options: Mapping[str, Json]
    where: Location
    places: Mapping[str, Location]


@dataclass(frozen=True)
class Wish:
    """What the recipe writes as an input: a name or a glob, and whether it may be missing."""

    text: str
    optional: bool
    where: Location


@dataclass(frozen=True)
class InputEntry:
    """One named input as written."""

    name: str
    wishes: tuple[Wish, ...]
    where: Location


@dataclass(frozen=True)
class ArtifactEntry:
    """One artifact: an instance of its matrix where it has one.

    options: as given, no defaults. outputs: the further named outputs that the recipe names,
    with their places. resources: memory in bytes, gpu, licence (a list of names), jobs.
    threads: None for the rule's own number. timeout: seconds, None for no limit.
    """

    name: str
    rule: str
    inputs: Mapping[str, InputEntry]
    options: Table
    outputs: Mapping[str, tuple[str, Location]]
    optional: bool
    temporary: bool
    tags: tuple[str, ...]
    threads: int | None
    resources: Mapping[str, Json]
    timeout: float | None
    toolchain: str | None
    environment: Mapping[str, str]
    where: Location


@dataclass(frozen=True)
class GateEntry:
    """A limit on a figure of an artifact, as written."""

    artifact: str
    figure: str
    limit: float
    where: Location


@dataclass(frozen=True)
class Recipe:
    """A whole recipe. off: names of sources and artifacts that their `when` switches off.
    files: every file that was read, the recipe first. defines: the -D words as typed."""

    name: str
    path: str
    files: tuple[str, ...]
    defines: Mapping[str, str]
    sources: Mapping[str, SourceEntry]
    artifacts: tuple[ArtifactEntry, ...]
    off: Mapping[str, Location]
    gates: tuple[GateEntry, ...]
    devices: Mapping[str, Json]
