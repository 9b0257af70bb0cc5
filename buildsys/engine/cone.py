"""What hangs on a few changes: the part of a plan that is judged and built where the standing
answer says that only these outputs and sources differ.

All else was fresh when the answer was left, and each thing that this rests on has just been
looked at. The part is a small plan with the lines that the journal has of it; the same survey
judges it and the same build makes it. It has the steps that make what differs and read what
differs, all that reads what they make, and at its edge, fresh, what these read besides. Where
anything in it is temporary or skipped the whole plan is asked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from buildsys.engine.blueprint import Blueprint, to_body
from buildsys.engine.build import build_stale_of
from buildsys.engine.hub import unfetched, without_snapshots
from buildsys.engine.index import moved_lines, read_index
from buildsys.engine.journal import Entries
from buildsys.engine.key import fixed_parts, key_digest
from buildsys.engine.own_file import remove_half_written
from buildsys.engine.project import Project
from buildsys.engine.staleness import Survey
from buildsys.engine.stamps import SIZE
from buildsys.engine.standing import changed_sources, evidence, may_be_left, write_answer
from buildsys.errors import RecipeError

if TYPE_CHECKING:
    from buildsys.engine.build import Outcome, Request, Tools
    from buildsys.engine.index import Index
    from buildsys.engine.journal import Line
    from buildsys.engine.project import Scene
    from buildsys.engine.standing import Difference
    from buildsys.plan.graph import Step


class Cone(NamedTuple):
    """project, scene: with the small plan. numbers: of the steps that are to be judged, by name,
    in the whole plan; in its order. table: the index that led to them."""

    project: Project
    scene: Scene
    numbers: Mapping[str, int]
    table: Index


class _Part(NamedTuple):
    """Steps of the whole plan by name, in its order. lines: what the journal says of those that
    are to be judged; the others are the edge."""

    steps: Mapping[str, Step]
    lines: dict[str, Line]
    numbers: Mapping[str, int]


def cone_of(difference: Difference) -> Cone | None:
    """What hangs on a difference; None where the whole plan must be asked."""
    place, content, small = difference.place, difference.content, difference.small
    index = read_index(place.folder.own("index"), [content["cached"], content["journal"]])
    if index is None or index.crowded or unfetched(small.plan):
        return None
    part = _part_of(difference, index)
    if part is None:
        return None
    producer = {path: name for name, step in part.steps.items() for path in step.outputs.values()}
    gates = index.gates_of_plan()
    plan = small.plan._replace(steps=part.steps, producer=producer, gates=gates)
    fixed = {
        name: key_digest(fixed_parts(part.steps[name], plan, small.rules[rule].templates))
        for name, rule in ((name, part.steps[name].rule) for name in part.numbers)
    }
    blueprint = Blueprint(plan, small.rules, fixed)
    entries = Entries(part.lines, {}, (), content["journal"][SIZE])
    before = difference.scene
    survey = Survey(blueprint, entries, before.stamps, before.code, before.machine)
    for name, step in part.steps.items():
        if name not in part.numbers:
            survey.known(name, {path: content["outputs"][path] for path in step.outputs.values()})
    scene = before._replace(survey=survey, entries=entries)
    project = Project(place.recipe, place.defines, place.folder, blueprint, ())
    return Cone(project, scene, part.numbers, index)


def _part_of(difference: Difference, index: Index) -> _Part | None:
    folder, outputs = difference.place.folder, difference.content["outputs"]
    if len(outputs) != len(index.columns.makers):
        return None
    makers = dict(zip(outputs, index.columns.makers, strict=True))
    sources = {name: index.length + at for at, name in enumerate(difference.small.plan.sources)}
    changed = {makers[path] for path in difference.outputs}
    changed |= {sources[name] for name in difference.sources}
    numbers = index.downstream(changed)
    with open(folder.own("plan"), "rb") as plan, open(folder.own("journal"), "rb") as journal:
        inner = index.steps(plan, numbers)
        if inner is None:
            return None
        lines = {}
        for number, name in zip(numbers, inner, strict=True):
            line = index.line(journal, number, name)
            if line is None:
                return None
            lines[name] = line
        edge = _edge(inner, [row[0] for row in index.gates], makers)
        around = index.steps(plan, edge) if edge is not None else None
    if edge is None or around is None or not all(map(index.is_plain, edge)):
        return None
    made = {path for step in inner.values() for path in step.outputs.values()}
    if not made.issuperset(difference.outputs):
        return None
    # Nobody asks what the edge reads: that is not in this plan.
    steps = {**inner, **{name: step._replace(inputs={}) for name, step in around.items()}}
    order = dict(sorted(zip([*numbers, *edge], [*inner, *around], strict=True)))
    judged = dict(zip(inner, numbers, strict=True))
    return _Part({name: steps[name] for name in order.values()}, lines, judged)


def _edge(
    inner: Mapping[str, Step], gates: Sequence[str], makers: Mapping[str, int]
) -> list[int] | None:
    """The numbers of the steps besides that make what these read, and what gates are on. None
    where one of them is not among the makers of fresh outputs."""
    made = {path for step in inner.values() for path in step.outputs.values()}
    given = (ref for step in inner.values() for refs in step.inputs.values() for ref in refs)
    read = {ref.name for ref in given if ref.kind == "artifact"}.union(gates) - made
    if not read <= makers.keys():
        return None
    return sorted({makers[path] for path in read})


def build_cone(
    cone: Cone, difference: Difference, request: Request, tools: Tools
) -> Outcome | None:
    """Bring the cone up to date, as `build_what_is_stale` does a plan, under the lock that the
    difference holds, and leave the answer for the next build."""
    folder = cone.project.folder
    remove_half_written(folder.own(""))
    tools.watch(cone.scene)
    outcome = build_stale_of(cone.project, cone.scene, request, tools, difference.lock.fd)
    _leave_answer(cone, difference)
    return outcome


def _leave_answer(cone: Cone, difference: Difference) -> None:
    """The answer as it was, but for what was made, and for the sources that had changed."""
    folder, content, small = cone.project.folder, difference.content, difference.small
    survey = cone.scene.survey
    survey.expire()
    difference.scene.survey.expire()
    if any(survey.verdicts[name].state != "fresh" for name in cone.numbers):
        return
    try:
        now = evidence(difference.scene.survey, small)
    except RecipeError:
        return  # a source is gone: the next build says so
    changed = changed_sources(small, content["evidence"], now)
    # Of the sources only those that the cone's steps read may be other than they were.
    if changed is None or not set(changed) <= set(difference.sources):
        return
    if not may_be_left(cone.project, cone.scene, cone.numbers):
        return
    start = content["journal"][SIZE]
    index = moved_lines(cone.table, cone.numbers, folder.own("journal"), start)
    if index is None:
        return
    made = [path for name in cone.numbers for path in survey.plan.steps[name].outputs.values()]
    outputs = {**content["outputs"], **{path: survey.digests[path] for path in made}}
    body = to_body(small._replace(plan=without_snapshots(small.plan)))
    new = {**content, "blueprint": body, "evidence": now, "outputs": outputs}
    write_answer(folder, new, index)
