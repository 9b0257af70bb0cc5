"""Is what is to be deployed what the recipe says? The engine's judgement, asked once more."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from buildsys.devices.errors import DeviceRefused
from buildsys.engine.gates import read_gates
from buildsys.engine.project import survey_of
from buildsys.plan.targets import upstream

if TYPE_CHECKING:
    from buildsys.engine.project import Project
    from buildsys.plan.graph import Json


def check_built(
    project: Project, artifacts: Sequence[str], say: Callable[[str], None]
) -> Mapping[str, Json]:
    """The journal of what is deployed: step -> its last line.

    Raises DeviceRefused for an artifact that was never finished, is not there, or is skipped
    here: what lies under its name then is from another time. A stale one is said to be.
    """
    plan = project.plan
    steps = tuple(dict.fromkeys(plan.producer[name] for name in artifacts))
    scene = survey_of(project)
    for name in upstream(plan, steps):
        scene.survey.judge(name)
    for name in steps:
        verdict = scene.survey.verdicts[name]
        reasons = "; ".join(str(reason) for reason in verdict.reasons)
        if verdict.state == "skipped" or verdict.absent or name not in scene.entries.done:
            raise DeviceRefused(
                f"{name} is not built: {reasons or 'it was removed after use'}",
                remedy="build it first (leave out --no-build)",
            )
        if verdict.state != "fresh":
            if name in scene.entries.open or "missing" in reasons:
                raise DeviceRefused(f"{name} is not whole: {reasons}", remedy="build it first")
            say(f"warning: {name} is stale: {reasons}")
    return scene.entries.done


def check_gates(project: Project) -> None:
    """Raises DeviceRefused where a gate fails, or its figures are not there. An optional artifact
    that was not made has no figures."""
    gates = [gate for gate in project.plan.gates if not _was_skipped(project, gate.artifact)]
    try:
        readings = read_gates(gates, project.folder)
    except FileNotFoundError as error:
        raise DeviceRefused(
            f"the gates cannot be read: {error.filename} is not built", remedy="build it first"
        ) from error
    failed = [str(reading) for reading in readings if not reading.passed]
    if failed:
        raise DeviceRefused("not sent: " + "; ".join(failed))


def _was_skipped(project: Project, artifact: str) -> bool:
    step = project.plan.steps[project.plan.producer[artifact]]
    return step.optional and not (Path(project.folder.root) / artifact).exists()
