"""Takes an artifact that was made elsewhere: in a colleague's container, on the vendor's server.

It is put in place and journalled as a step's outputs are, with the digests of what the step reads
here and now: that it was made from those is the word of whoever adopts it. From then on it is
fresh while they and the recipe's options stay as they are, with the toolchain or without.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from buildsys.engine import folder as folders
from buildsys.engine.build import locked
from buildsys.engine.commit import Committer, Finished
from buildsys.engine.journal import Journal
from buildsys.engine.project import survey_of
from buildsys.engine.staging import Output, Staging, collect, digest_output, sweep
from buildsys.engine.staleness import ADOPTED
from buildsys.errors import QbuildError, UsageError

if TYPE_CHECKING:
    from buildsys.engine.project import Project, Scene
    from buildsys.plan.graph import Json, Plan, Step


def adopt(
    project: Project, name: str, files: Mapping[str, str], say: Callable[[str], None]
) -> Mapping[str, Json]:
    """Take `files` (output name -> path) as the outputs of the step `name`; its journal line.

    Raises UsageError for outputs that are not given and inputs that are not here, QbuildError
    where nothing can be put in place.
    """
    step = project.plan.steps[name]
    _refuse_incomplete(step, files)
    with locked(project, say) as lock_fd:
        if lock_fd < 0:
            raise QbuildError(f"{project.folder.root} is read-only")
        scene = survey_of(project)
        _judge_inputs(scene, project.plan, step)
        sweep(project.folder.own("staging"))  # what a killed build has left
        staging = Staging(project.folder.own("staging"))
        place = staging.fresh(step.outputs.values())
        try:
            outputs = _copied(step, files, place)
            record = _record(scene, step, outputs)
            folders.write_made(project.folder, folders.Made(project.recipe, project.defines))
            _commit(project, scene, Finished(name, place, tuple(outputs), *record))
        finally:
            staging.close()
    return record[1]


def _refuse_incomplete(step: Step, files: Mapping[str, str]) -> None:
    missing = [name for name in step.outputs if name not in files]
    unknown = [name for name in files if name not in step.outputs]
    if missing or unknown:
        wanted = " ".join("FILE" if name == "out" else f"{name}=FILE" for name in step.outputs)
        wrong = f"no output '{unknown[0]}'" if unknown else f"also the output '{missing[0]}'"
        raise UsageError(f"{step.name} has {wrong}", remedy=f"qbuild adopt {step.name} {wanted}")
    for path in files.values():
        if not os.path.exists(path):
            raise UsageError(f"there is no {path}")


def _judge_inputs(scene: Scene, plan: Plan, step: Step) -> None:
    """Raises UsageError for what the step reads and is not fresh here."""
    needed = {step.name}
    for name in reversed(list(plan.steps)):
        if name in needed:
            refs = [ref for given in plan.steps[name].inputs.values() for ref in given]
            needed |= {plan.producer[ref.name] for ref in refs if ref.kind == "artifact"}
    for name in plan.steps:
        if name in needed:
            scene.survey.judge(name)
    reads = [ref.name for given in step.inputs.values() for ref in given if ref.kind == "artifact"]
    stale = [name for name in reads if scene.survey.digests.get(name) is None]
    if stale:
        raise UsageError(
            f"{step.name} is made from {', '.join(stale)}, which is not here, or stale",
            remedy="build it, or adopt it first: what an artifact was made from is recorded",
        )


def _copied(step: Step, files: Mapping[str, str], place: str) -> list[Output]:
    for name, path in step.outputs.items():
        target = f"{place}/{path.rstrip('/')}"
        if os.path.isdir(files[name]):
            shutil.copytree(files[name], target)
        else:
            shutil.copyfile(files[name], target)
    return collect(place, step.outputs.values())


def _record(
    scene: Scene, step: Step, outputs: list[Output]
) -> tuple[dict[str, str], dict[str, Json]]:
    """The digests of all files, and the journal line."""
    digests: dict[str, str] = {}
    for output in outputs:
        digests |= digest_output(output)
    return digests, {
        "kind": "done",
        "step": step.name,
        **scene.survey.adopted(step),
        "outputs": {output.path: digests[output.path] for output in outputs},
        "sizes": {output.path: output.size for output in outputs},
        "wall": 0.0,
        "cpu": 0.0,
        "memory": 0,
        "notes": {ADOPTED: True},
        "warnings": [],
        "at": round(time.time(), 3),
    }


def _commit(project: Project, scene: Scene, finished: Finished) -> None:
    journal = Journal(project.folder.own("journal"), scene.entries)
    try:
        committer = Committer(project.folder.root, journal, scene.stamps)
        committer.add(finished)
        _, refused = committer.commit(lambda name: [])
    finally:
        journal.close()
    scene.stamps.save()
    if refused:
        raise QbuildError(refused[0][1])
