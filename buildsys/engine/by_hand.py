"""A step's place without the step: its staging folder, inputs and environment, for a person.

Nothing that is made there is committed. The folder is not among the build's staging folders,
which the next build sweeps; it stays until the step's place is asked for again, or `clean --all`.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from buildsys.engine import staging as stage
from buildsys.engine.folder import write_json
from buildsys.engine.local import interpreter
from buildsys.engine.local.spawn import environment_of
from buildsys.engine.local.wire import order_to_json
from buildsys.engine.ordering import make_order
from buildsys.errors import UsageError
from buildsys.plan.targets import upstream

if TYPE_CHECKING:
    from buildsys.engine.executor import Order
    from buildsys.engine.folder import BuildFolder
    from buildsys.engine.project import Project, Scene
    from buildsys.plan.graph import Step

PASSED_ON = ("TERM", "COLORTERM", "LANG")  # what a terminal needs; steps see none of it


class Place(NamedTuple):
    """order: what the executor would be given; folder: around its staging folder; script: runs
    the step there."""

    order: Order
    folder: str
    script: str


def prepare(project: Project, scene: Scene, name: str) -> Place:
    """Lay out the step's place; what was in it is removed.

    Raises UsageError where something that the step reads is not there as it should be.
    """
    plan, survey = project.plan, scene.survey
    step = plan.steps[name]
    for each in upstream(plan, [name]):
        survey.judge(each)
    _refuse_unready(scene, step)
    folder = _folder(project.folder, name)
    if os.path.lexists(folder):
        stage.remove_tree(folder)
    staging = f"{folder}/staging"
    os.makedirs(staging)
    for path in step.outputs.values():
        os.makedirs(os.path.dirname(f"{staging}/{path.rstrip('/')}"), exist_ok=True)
    facts = survey.blueprint.rules[step.rule]
    order = make_order(
        step,
        plan,
        facts._replace(resumable=False),  # what a killed run has kept is not for trying out
        project.folder,
        staging,
        survey.parts(step),
        scene.machine.template,
        scene.machine.fields.get(step.toolchain or ""),
    )
    if facts.resumable:
        os.makedirs(f"{folder}/kept")
        order = order._replace(context={**order.context, "kept": f"{folder}/kept"})
    order = order._replace(log=f"{folder}/log")
    return Place(order, folder, _script(order, folder))


def _script(order: Order, folder: str) -> str:
    words = order.argv
    if not words:
        write_json(f"{folder}/order.json", order_to_json(order))
        module = "buildsys.engine.local.run_by_hand"
        words = tuple(interpreter.command(module, [f"{folder}/order.json"]))
    path = f"{folder}/run"
    with open(path, "w") as file:
        file.write(f"#!/bin/sh\ncd {shlex.quote(order.staging)} && exec {shlex.join(words)}\n")
    os.chmod(path, 0o755)
    return path


def environment(order: Order, outside: Mapping[str, str]) -> dict[str, str]:
    """What the step would see, and what a terminal needs."""
    kept = {name: outside[name] for name in PASSED_ON if name in outside}
    return {**kept, **environment_of(order)}


def leave(place: Place) -> bool:
    """Remove the place if nothing was made in it; was it kept?"""
    files = [name for _, _, names in os.walk(place.order.staging) for name in names]
    if not files:
        stage.remove_tree(place.folder)
    return bool(files)


def _refuse_unready(scene: Scene, step: Step) -> None:
    wanting = [
        ref.name
        for given in step.inputs.values()
        for ref in given
        if ref.kind == "artifact"
        and scene.survey.digests.get(ref.name) is None
        and not (ref.optional and ref.name in scene.survey.digests)
    ]
    if wanting:
        raise UsageError(
            f"{step.name} reads {', '.join(wanting)}, which is not here, or stale",
            remedy=f"qbuild build {' '.join(wanting)}",
        )
    verdict = scene.survey.verdicts[step.name]
    if verdict.state == "skipped":
        raise UsageError(f"{step.name} cannot run here: {verdict.reasons[0]}")


def _folder(folder: BuildFolder, step: str) -> str:
    return folder.own("shell/" + step.strip("/").replace("%", "%25").replace("/", "%2F"))
