"""The standing answer: what a build after which nothing is to be done leaves for the next one.

Reading plan and journal takes most of the time of a build that has nothing to do. The answer
holds what of them still has to be looked at: the digests that every output must have, one step
for each different thing that staleness looks up (code, versions, templates, toolchain,
sources), and what was found there. It counts only for the same blueprint and the same journal,
nothing in it is trusted without a look at the files themselves, and where anything differs the
plan and the journal are asked: of what hangs on a few outputs and sources (see `cone`), else of
everything. It is disposable.
"""

from __future__ import annotations

import contextlib
import json
import os
from typing import TYPE_CHECKING, NamedTuple

from buildsys.engine.blueprint import find_cache, from_body, to_body
from buildsys.engine.folder import read_json, write_json
from buildsys.engine.gates import read_gates, ready_gates
from buildsys.engine.hub import with_fetched_models, without_snapshots
from buildsys.engine.index import make_index, write_index
from buildsys.engine.journal import Entries
from buildsys.engine.lock import BuildLock
from buildsys.engine.project import survey_in
from buildsys.engine.staleness import skipped
from buildsys.engine.stamps import stamp_of
from buildsys.errors import RecipeError

if TYPE_CHECKING:
    from collections.abc import Collection, Hashable

    from buildsys.engine.blueprint import Blueprint
    from buildsys.engine.folder import BuildFolder
    from buildsys.engine.index import Index
    from buildsys.engine.project import Place, Project, Scene
    from buildsys.engine.staleness import Survey
    from buildsys.plan.graph import Json, Step

VERSION = 1
NOTHING_READ = Entries({}, {}, (), 0)


class Answer(NamedTuple):
    """Nothing is to be done. fresh: how many steps are; skipped: their names and why."""

    fresh: int
    skipped: tuple[str, ...]


class Difference(NamedTuple):
    """What of an answer no longer holds, if all else does. The build folder's lock is held.

    small: the answer's condensed blueprint; scene: what was looked at; outputs: that are not
    what they must be; sources: that are not as they were.
    """

    place: Place
    lock: BuildLock
    content: Json
    small: Blueprint
    scene: Scene
    outputs: tuple[str, ...]
    sources: tuple[str, ...]


def leave_answer(project: Project, scene: Scene) -> None:
    """Leave the answer for the next build, if there is one: every step is fresh or skipped, and
    all gates hold. Silently not, where the disk does not take it.

    Call it under the build folder's lock, when every step was judged.
    """
    survey, folder = scene.survey, project.folder
    cached = find_cache(folder.own("plan"), project.recipe, project.defines)
    if scene.entries.damaged or cached is None:
        return
    if not may_be_left(project, scene, survey.verdicts):
        return
    small = condensed(survey)
    fresh = sum(verdict.state == "fresh" for verdict in survey.verdicts.values())
    content = {
        "version": VERSION,
        "cached": cached.key,
        "blueprint": to_body(small._replace(plan=without_snapshots(small.plan))),
        "evidence": evidence(survey, small),
        "outputs": promised(survey),
        "answer": [fresh, skipped(survey)],
    }
    index = make_index(survey, folder.own("plan"), cached.key, folder.own("journal"))
    write_answer(folder, content, index)


def may_be_left(project: Project, scene: Scene, names: Collection[str]) -> bool:
    """Is nothing to be done of these steps, and would the next look tell of any change since; and
    do the gates hold?"""
    survey = scene.survey
    states = {survey.verdicts[name].state for name in names}
    # A source may have been edited since the step that reads it was made: what is found now
    # must be what that step's line in the journal says.
    if not states <= {"fresh", "skipped"} or not all(map(survey.is_as_recorded, names)):
        return False
    try:
        readings = read_gates(ready_gates(project.plan, survey.verdicts), project.folder)
    except RecipeError:
        return False  # a gate on a figure that is not there: whoever checks the gates says so
    return all(reading.passed for reading in readings)


def write_answer(folder: BuildFolder, content: Json, index: Index | None) -> None:
    """Write an answer, of the journal as it is now, and first its index, if there is one."""
    journal = stamp(folder.own("journal"))
    with contextlib.suppress(OSError):
        if index is not None:
            write_index(folder.own("index"), index, [content["cached"], journal])
        write_json(folder.own("answer"), {**content, "journal": journal})


def look(place: Place) -> Answer | Difference | None:
    """The answer that was left, if all that it rests on is still so; else what differs, if that
    is no more than outputs and sources. None: ask the plan.

    Takes the build folder's lock for as long as it looks, and with a difference keeps it; None
    where somebody else builds, or where a killed build left something to be cleared away.
    """
    folder = place.folder
    content = read_json(folder.own("answer"))
    if not isinstance(content, dict) or content.get("version") != VERSION:
        return None
    try:
        lock = BuildLock(folder.own("lock"), lambda line: None)
        if os.listdir(folder.own("staging")) or not lock.try_acquire():
            return None
    except OSError:
        return None
    found: Answer | Difference | None = None
    try:
        found = _compared(content, place, lock)
    finally:
        if not isinstance(found, Difference):
            lock.release()
    return found


def _compared(content: Json, place: Place, lock: BuildLock) -> Answer | Difference | None:
    folder = place.folder
    if content["cached"] != place.cached.key or content["journal"] != stamp(folder.own("journal")):
        return None
    small = from_body(content["blueprint"])
    small = small._replace(plan=with_fetched_models(small.plan, folder))
    scene = survey_in(folder, small, NOTHING_READ)
    survey = scene.survey
    try:
        sources = changed_sources(small, content["evidence"], evidence(survey, small))
    except RecipeError:
        return None  # a source is not there: the plan knows how to say that
    if sources is None:
        return None
    promises = content["outputs"].items()
    outputs = tuple(path for path, digest in promises if survey.output_reasons(path, digest))
    scene.stamps.save()
    scene.code.save()
    if sources or outputs:
        return Difference(place, lock, content, small, scene, outputs, sources)
    fresh, lines = content["answer"]
    return Answer(fresh, tuple(lines))


def changed_sources(small: Blueprint, before: Json, now: Json) -> tuple[str, ...] | None:
    """The sources that differ between two evidences of a condensed blueprint; None where more
    than that does."""
    # Through JSON, as what was written has been.
    now = json.loads(json.dumps(now))
    changed: dict[str, None] = {}
    for name, step in small.plan.steps.items():
        old, new = before.get(name), now[name]
        if old == new:
            continue
        if not isinstance(old, list) or not isinstance(new, list) or old[0] != new[0]:
            return None
        for given, refs in step.inputs.items():
            for ref in refs:
                if old[1].get(f"{given} {ref.name}") != new[1][f"{given} {ref.name}"]:
                    changed[ref.name] = None
    return tuple(changed) if before.keys() == now.keys() else None


def condensed(survey: Survey) -> Blueprint:
    """The blueprint with one step for each different thing that was looked up."""
    blueprint = survey.blueprint
    chosen: dict[Hashable, Step] = {}
    for name, step in blueprint.plan.steps.items():
        if survey.is_skipped_for_others(name):
            continue
        sources = {
            given: tuple(ref for ref in refs if ref.kind == "source")
            for given, refs in step.inputs.items()
        }
        small = step._replace(inputs=sources)
        chosen.setdefault(_what_is_looked_up(small, blueprint), small)
    steps = {step.name: step for step in chosen.values()}
    producer = {step.outputs["out"]: step.name for step in chosen.values()}
    plan = blueprint.plan._replace(steps=steps, producer=producer, gates=(), devices={})
    return blueprint._replace(plan=plan, fixed={name: blueprint.fixed[name] for name in steps})


def _what_is_looked_up(step: Step, blueprint: Blueprint) -> Hashable:
    facts = blueprint.rules[step.rule]
    templates = tuple(str(step.options[option]) for option in facts.templates)
    reads = tuple((name, refs) for name, refs in step.inputs.items() if refs)
    return step.rule, step.toolchain, step.resources.get("gpu"), templates, reads


def evidence(survey: Survey, small: Blueprint) -> Json:
    """What the steps of a condensed blueprint look up, as it is now."""
    return {name: survey.looked_up(step) for name, step in small.plan.steps.items()}


def promised(survey: Survey) -> dict[str, str | None]:
    """The digest that every output must have; None: it must not be there (it was temporary, and
    was removed after use)."""
    return {
        path: None if survey.verdicts[name].absent else survey.digests[path]
        for name, step in survey.plan.steps.items()
        if survey.verdicts[name].state == "fresh"
        for path in step.outputs.values()
    }


def stamp(path: str) -> list[int] | None:
    """What stat says of a file; None where there is none."""
    try:
        return list(stamp_of(os.stat(path)))
    except FileNotFoundError:
        return None
