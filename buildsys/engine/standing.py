"""The standing answer: what a build after which nothing is to be done leaves for the next one.

Reading plan and journal takes most of the time of a build that has nothing to do. The answer
holds what of them still has to be looked at: the digests that every output must have, one step
for each different thing that staleness looks up (code, versions, templates, toolchain,
sources), and what was found there. It counts only for the same blueprint and the same journal,
nothing in it is trusted without a look at the files themselves, and where anything differs the
plan and the journal are asked. It is disposable.
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
from buildsys.engine.journal import Entries
from buildsys.engine.lock import BuildLock
from buildsys.engine.project import survey_in
from buildsys.engine.staleness import skipped
from buildsys.engine.stamps import stamp_of
from buildsys.errors import RecipeError

if TYPE_CHECKING:
    from collections.abc import Hashable

    from buildsys.engine.blueprint import Blueprint
    from buildsys.engine.project import Place, Project, Scene
    from buildsys.engine.staleness import Survey
    from buildsys.plan.graph import Json, Step

VERSION = 1
NOTHING_READ = Entries({}, {}, (), 0)


class Answer(NamedTuple):
    """Nothing is to be done. fresh: how many steps are; skipped: their names and why."""

    fresh: int
    skipped: tuple[str, ...]


def leave_answer(project: Project, scene: Scene) -> None:
    """Leave the answer for the next build, if there is one: every step is fresh or skipped, and
    all gates hold. Silently not, where the disk does not take it.

    Call it under the build folder's lock, when every step was judged.
    """
    survey, folder = scene.survey, project.folder
    states = {verdict.state for verdict in survey.verdicts.values()}
    cached = find_cache(folder.own("plan"), project.recipe, project.defines)
    if scene.entries.damaged or cached is None or not states <= {"fresh", "skipped"}:
        return
    # A source may have been edited since the step that reads it was made: what is found now
    # must be what that step's line in the journal says.
    if not all(survey.is_as_recorded(name) for name in survey.verdicts):
        return
    try:
        readings = read_gates(ready_gates(project.plan, survey.verdicts), folder)
    except RecipeError:
        return  # a gate on a figure that is not there: whoever checks the gates says so
    if not all(reading.passed for reading in readings):
        return
    small = condensed(survey)
    fresh = sum(verdict.state == "fresh" for verdict in survey.verdicts.values())
    content = {
        "version": VERSION,
        "cached": cached.key,
        "journal": stamp(folder.own("journal")),
        "blueprint": to_body(small._replace(plan=without_snapshots(small.plan))),
        "evidence": evidence(survey, small),
        "outputs": promised(survey),
        "answer": [fresh, skipped(survey)],
    }
    with contextlib.suppress(OSError):
        write_json(folder.own("answer"), content)


def read_answer(place: Place) -> Answer | None:
    """The answer that was left, if all that it rests on is still so; None: ask the plan.

    Takes the build folder's lock for as long as it looks; None where somebody else builds, or
    where a killed build left something to be cleared away.
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
    try:
        still = _still_holds(content, place)
    finally:
        lock.release()
    fresh, skipped = content["answer"]
    return Answer(fresh, tuple(skipped)) if still else None


def _still_holds(content: Json, place: Place) -> bool:
    folder = place.folder
    if content["cached"] != place.cached.key or content["journal"] != stamp(folder.own("journal")):
        return False
    small = from_body(content["blueprint"])
    small = small._replace(plan=with_fetched_models(small.plan, folder))
    scene = survey_in(folder, small, NOTHING_READ)
    survey = scene.survey
    try:
        found = evidence(survey, small)
    except RecipeError:
        return False  # a source is not there: the plan knows how to say that
    # Through JSON, as what was written has been.
    same = json.loads(json.dumps(found)) == content["evidence"]
    same = same and not any(survey.output_reasons(*each) for each in content["outputs"].items())
    scene.stamps.save()
    scene.code.save()
    return same


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
