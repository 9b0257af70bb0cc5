"""A plan as JSON and back: what a build that has nothing to do reads instead of a recipe.

Imports nothing but the plan's own values. Steps are rows, files and the recipe's lines are
written once: ten thousand steps are read in a fraction of a second.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from buildsys.errors import Location
from buildsys.plan.graph import Gate, Plan, Ref, Source, Step

if TYPE_CHECKING:
    from buildsys.plan.graph import Json

VERSION = 1


def to_json(plan: Plan) -> Json:
    """The plan as JSON values. The text of a step's line is left out (explain() shows no
    caret then); sources and gates keep theirs."""
    files: dict[str, int] = {}

    def place(where: Location, text: bool = True) -> Json:
        number = files.setdefault(where.file, len(files))
        return [number, where.line, where.column, where.text if text else ""]

    return {
        "version": VERSION,
        "name": plan.name,
        "recipe": plan.recipe,
        "defines": dict(plan.defines),
        "sources": [
            [
                *(s.name, s.kind, dict(s.paths), dict(s.options), place(s.where)),
                {part: place(where) for part, where in s.places.items()},
            ]
            for s in plan.sources.values()
        ],
        "steps": [step_row(step, place(step.where, text=False)) for step in plan.steps.values()],
        "producer": dict(plan.producer),
        "gates": [[g.artifact, g.figure, g.limit, place(g.where)] for g in plan.gates],
        "devices": dict(plan.devices),
        "files": list(files),
    }


def step_row(step: Step, where: Json) -> Json:
    inputs = {name: [ref_word(ref) for ref in refs] for name, refs in step.inputs.items()}
    row: list[Json] = list(step)
    row[2:5] = [inputs, dict(step.options), dict(step.outputs)]
    row[7] = list(step.tags)
    row[9] = dict(step.resources)
    row[12:] = [dict(step.environment), where]
    return row


def ref_word(ref: Ref) -> str:
    """A reference as one word: "s" or "a", "?" if it may be missing, ":" and its name."""
    return f"{ref.kind[0]}{'?' if ref.optional else ''}:{ref.name}"


KINDS: Mapping[str, tuple[str, bool]] = {
    "s": ("source", False),
    "a": ("artifact", False),
    "s?": ("source", True),
    "a?": ("artifact", True),
}


def from_json(data: Json) -> Plan:
    """The plan that `to_json` wrote. Raises ValueError for another version's."""
    if not isinstance(data, dict) or data.get("version") != VERSION:
        raise ValueError("not a plan of this version")
    files = data["files"]

    def place(row: Json) -> Location:
        return location(row, files)

    return Plan(
        name=data["name"],
        recipe=data["recipe"],
        defines=data["defines"],
        sources={
            row[0]: Source._make(
                [*row[:4], place(row[4]), {part: place(where) for part, where in row[5].items()}]
            )
            for row in data["sources"]
        },
        steps=steps_from(data["steps"], files),
        producer=data["producer"],
        gates=gates_from(data["gates"], files),
        devices=data["devices"],
    )


def steps_from(rows: Sequence[Json], files: Sequence[str]) -> dict[str, Step]:
    """The steps of these rows of a plan; the rows are theirs from then on. files: of the plan."""
    refs: dict[str, Ref] = {}

    def ref(word: str) -> Ref:
        if word not in refs:
            head, _, name = word.partition(":")
            kind, optional = KINDS[head]
            refs[word] = Ref(kind, name, optional)  # type: ignore[arg-type]  # KINDS holds both
        return refs[word]

    steps = {}
    for row in rows:
        inputs = {name: tuple([ref(word) for word in words]) for name, words in row[2].items()}
        row[2], row[7], row[13] = inputs, tuple(row[7]), location(row[13], files)
        steps[row[0]] = Step._make(row)
    return steps


def gates_from(rows: Sequence[Json], files: Sequence[str]) -> tuple[Gate, ...]:
    """The gates of these rows of a plan. files: of the plan."""
    return tuple(Gate(row[0], row[1], row[2], location(row[3], files)) for row in rows)


def location(row: Json, files: Sequence[str]) -> Location:
    return Location(files[row[0]], row[1], row[2], row[3])
