"""`qbuild why`: why an artifact would be built again, or was. Takes no lock, runs nothing."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from buildsys.cli.build_words import add_folder_words, project_of
from buildsys.cli.window import show
from buildsys.errors import UsageError

if TYPE_CHECKING:
    from buildsys.engine.project import Project, Scene
    from buildsys.plan.graph import Json


def configure(parser: argparse.ArgumentParser) -> None:
    add_folder_words(parser, targets=True)
    parser.add_argument("--json", action="store_true", help="for machines")


def run(args: argparse.Namespace) -> int:
    from buildsys.engine.build import judge_all
    from buildsys.engine.project import survey_of
    from buildsys.plan.targets import targets, upstream

    project, words = project_of(args)
    if not words:
        raise UsageError("why what?", remedy="qbuild why [RECIPE] TARGET")
    wanted = targets(project.plan, words)
    scene = survey_of(project)
    judge_all(scene.survey, upstream(project.plan, wanted))
    answers = [answer(project, scene, name) for name in wanted]
    if args.json:
        print(json.dumps(answers, indent=1))
        return 0
    for each in answers:
        show(lines(each))
    return 0


def answer(project: Project, scene: Scene, name: str) -> dict[str, Json]:
    """What is known about one step. causes: for a step that cannot be told yet, the steps
    before it that are stale themselves, with their reasons."""
    verdict = scene.survey.verdicts[name]
    record: Mapping[str, Json] = scene.entries.done.get(name) or {}
    causes = causes_of(project, scene, name) if verdict.state == "unsure" else {}
    return {
        "artifact": name,
        "state": verdict.state,
        "reasons": [reason._asdict() for reason in verdict.reasons],
        "causes": {each: [r._asdict() for r in reasons] for each, reasons in causes.items()},
        "key": record.get("key"),
        "built": record.get("at"),
        "last_built_because": record.get("why", []),
    }


def causes_of(project: Project, scene: Scene, name: str) -> dict[str, Json]:
    from buildsys.plan.targets import upstream

    verdicts = scene.survey.verdicts
    before = upstream(project.plan, [name])
    return {each: verdicts[each].reasons for each in before if verdicts[each].state == "stale"}


def lines(answer: dict[str, Json]) -> list[str]:
    from buildsys.engine.key import Reason

    name, state = answer["artifact"], answer["state"]
    reasons = [str(Reason(**each)) for each in answer["reasons"]]
    if state == "fresh":
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(answer["built"]))
        said = [f"{name} is up to date (built {when})"]
        return said + [f"  the reason then: {each}" for each in answer["last_built_because"]]
    word = {"stale": "would be built", "unsure": "may be built", "skipped": "is skipped"}[state]
    said = [f"{name} {word}:", *(f"  {reason}" for reason in reasons)]
    for cause, given in answer["causes"].items():
        said += [f"  {cause} would be built: {Reason(**each)}" for each in given]
    return said
