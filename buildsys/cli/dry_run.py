"""`-n`: what would run, why, how long it would take and what it would write. Changes nothing."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from buildsys.cli.build_steps import place_of, request_of
from buildsys.cli.build_words import project_of
from buildsys.cli.inspect import size
from buildsys.cli.window import listed, show
from buildsys.engine.build import closing_place, judge_all, to_run
from buildsys.engine.forecast import Forecast, StepForecast, forecast
from buildsys.engine.progress import duration
from buildsys.engine.project import survey_of
from buildsys.engine.schedule import machine_capacity
from buildsys.engine.staleness import skipped
from buildsys.engine.temporary import Temporaries
from buildsys.errors import UsageError
from buildsys.store.place import store_root

if TYPE_CHECKING:
    from buildsys.plan.graph import Json


def run(args: argparse.Namespace) -> int:
    """Say what would run; returns 0."""
    if args.trace is not None:
        raise UsageError("-n runs nothing that could be traced")
    project, words = project_of(args)
    request = request_of(args, project, words)
    place = place_of(args, request)
    with closing_place(place):
        machine = None if place is None else place.machine(project)
        scene = survey_of(project, request.forced, machine)
        at_once = partial(machine_capacity, memory=request.memory)
        capacity = (at_once if place is None else place.at_once)(request.jobs, scene.machine.gpus)
    judge_all(scene.survey, request.selection)
    temporaries = Temporaries(project.folder.root, scene.survey, request.named)
    names = to_run(scene.survey, request.selection, temporaries)
    store = None if args.no_cache else store_root(os.environ)
    found = forecast(project, scene, names, capacity, store)
    if args.log_format == "json":
        print(json.dumps(as_json(found, skipped(scene.survey)), indent=1))
        return 0
    show(skipped(scene.survey))
    show(lines(found))
    return 0


def lines(found: Forecast) -> Iterator[str]:
    """A line for each step, then the sums."""
    for each in found.steps:
        yield f"{word_of(each)} {each.step}: {'; '.join(map(str, each.reasons))}"
    if not found.steps:
        yield "nothing to do"
        return
    yield from sums(found)


def word_of(step: StepForecast) -> str:
    if step.restored:
        return "would take from the store"
    return "would run" if step.certain else "may run"


def sums(found: Forecast) -> Iterator[str]:
    """Time, disk, and what is not known."""
    least = "at least " if found.unknown else "about "
    if len(found.unknown) < len(found.steps):
        yield (
            f"time: {least}{duration(found.wall)} with -j {found.jobs} "
            f"({duration(found.work)} of work, longest chain {duration(found.chain)})"
        )
        yield f"disk: {least}{size(found.written)} to write; {size(found.free)} are free"
    if found.guessed:
        yield f"guessed by other steps of the same rule: {listed(found.guessed)}"
    if found.unknown:
        yield f"never run here, so of unknown time and size: {listed(found.unknown)}"
    if found.written > found.free:
        yield "warning: the disk has no room for that"


def as_json(found: Forecast, skips: list[str]) -> dict[str, Json]:
    """`qbuild schema --of forecast` has its schema."""
    return {
        "steps": [
            {
                "artifact": each.step,
                "certain": each.certain,
                "restored": each.restored,
                "reasons": [reason._asdict() for reason in each.reasons],
                "seconds": each.seconds,
                "bytes": each.size,
                "known_from": each.known_from,
            }
            for each in found.steps
        ],
        "skipped": skips,
        "jobs": found.jobs,
        "work_seconds": found.work,
        "wall_seconds": found.wall,
        "chain_seconds": found.chain,
        "written_bytes": found.written,
        "free_bytes": found.free,
    }
