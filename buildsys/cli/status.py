"""`qbuild status`: what is fresh, stale, skipped or orphaned. Takes no lock, runs nothing."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from buildsys.cli.build_words import add_folder_words, project_of
from buildsys.cli.window import folded, width_of

if TYPE_CHECKING:
    from buildsys.engine.project import Project, Scene
    from buildsys.plan.graph import Json

WORDS = {"unsure": "may run"}


def configure(parser: argparse.ArgumentParser) -> None:
    add_folder_words(parser, targets=True)
    parser.add_argument("--json", action="store_true", help="for machines")


def run(args: argparse.Namespace) -> int:
    from buildsys.engine.build import judge_all
    from buildsys.engine.project import survey_of
    from buildsys.plan.targets import targets

    project, words = project_of(args)
    scene = survey_of(project)
    judge_all(scene.survey, tuple(project.plan.steps))
    rows = [row(project, scene, name) for name in targets(project.plan, words)]
    rows += [] if words else orphan_rows(project, scene)
    if args.json:
        print(json.dumps(rows, indent=1))
    else:
        print_table(rows)
    return 0


def row(project: Project, scene: Scene, name: str) -> dict[str, Json]:
    verdict = scene.survey.verdicts[name]
    record = scene.entries.done.get(name)
    return {
        "artifact": name,
        "state": verdict.state,
        "reasons": [reason._asdict() for reason in verdict.reasons],
        "outputs": list(project.plan.steps[name].outputs.values()),
        "removed_after_use": verdict.absent,
        "built": record["at"] if record is not None else None,
        "wall": record["wall"] if record is not None else None,
        "memory": record["memory"] if record is not None else None,
    }


def orphan_rows(project: Project, scene: Scene) -> list[dict[str, Json]]:
    from buildsys.engine.cleaning import orphans

    reason = {"text": "the recipe no longer makes it", "old": None, "new": None}
    found = orphans(project.plan, scene.entries, project.folder)
    return [
        {
            "artifact": name,
            "state": "orphan",
            "reasons": [reason],
            "outputs": paths,
            "removed_after_use": False,
            "built": scene.entries.done[name]["at"],
            "wall": scene.entries.done[name]["wall"],
            "memory": scene.entries.done[name]["memory"],
        }
        for name, paths in found.items()
        if paths
    ]


def print_table(rows: list[dict[str, Json]]) -> None:
    from buildsys.engine.key import Reason
    from buildsys.engine.progress import shortened

    columns = width_of()
    names = max((len(each["artifact"]) for each in rows), default=0)
    width = names if columns is None else min(names, max(16, columns // 2 - 9))
    for each in rows:
        reasons = "; ".join(str(Reason(**reason)) for reason in each["reasons"])
        state = WORDS.get(each["state"], each["state"])
        note = "removed after use" if each["removed_after_use"] else reasons
        head = f"{state:8} {shortened(each['artifact'], width):{width}}"
        print(folded(f"{head}  {note}".rstrip(), columns, indent=len(head) + 2))
