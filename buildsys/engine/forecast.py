"""What a build would do, how long it would take and what it would write; nothing is changed.

A step's figures are those of its last run in this build folder, else those of a run whose
outputs are in the local store, else those of the other steps of its rule (a guess, and counted
as one), else unknown.
"""

from __future__ import annotations

import heapq
import os
from collections.abc import Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, Literal, NamedTuple

from buildsys.engine.key import key_digest
from buildsys.engine.schedule import Pool, claim_of
from buildsys.plan.targets import steps_read

if TYPE_CHECKING:
    from buildsys.engine.journal import Entries
    from buildsys.engine.key import Reason
    from buildsys.engine.project import Project, Scene
    from buildsys.engine.schedule import Capacity
    from buildsys.plan.graph import Plan
    from buildsys.store.actions import Action

Source = Literal["last run", "store", "rule", "none"]


class StepForecast(NamedTuple):
    """certain: it will run; else it depends on what comes of those before it. restored: its
    outputs are in the store. seconds, size (bytes of its outputs): None where nobody knows;
    known_from: who does."""

    step: str
    certain: bool
    restored: bool
    reasons: tuple[Reason, ...]
    seconds: float | None
    size: int | None
    known_from: Source


class Forecast(NamedTuple):
    """work: seconds of all steps; wall: at so many jobs; chain: of the longest chain alone;
    written: bytes; free: bytes that the disk has. What is unknown counts as nothing."""

    steps: tuple[StepForecast, ...]
    jobs: int
    work: float
    wall: float
    chain: float
    written: int
    free: int

    @property
    def unknown(self) -> tuple[str, ...]:
        """Steps that nobody has a figure for."""
        return tuple(each.step for each in self.steps if each.known_from == "none")

    @property
    def guessed(self) -> tuple[str, ...]:
        """Steps whose figures are those of others."""
        return tuple(each.step for each in self.steps if each.known_from == "rule")


def forecast(
    project: Project, scene: Scene, names: Sequence[str], capacity: Capacity, store: str | None
) -> Forecast:
    """What it takes to run these steps, which were judged, with so much at hand. store: the
    local one's root, None where it is not to be used."""
    plan, entries = project.plan, scene.entries
    by_rule = _figures_by_rule(plan, entries)
    steps = tuple(_step(scene, name, by_rule, store) for name in names)
    seconds = {each.step: each.seconds or 0.0 for each in steps}
    return Forecast(
        steps,
        capacity.jobs,
        sum(seconds.values()),
        simulated(plan, seconds, capacity, entries),
        max(chains(plan, seconds).values(), default=0.0),
        sum(each.size or 0 for each in steps),
        free_space(project.folder.root),
    )


def _step(
    scene: Scene, name: str, by_rule: Mapping[str, tuple[float, int]], store: str | None
) -> StepForecast:
    survey = scene.survey
    verdict, step = survey.verdicts[name], survey.plan.steps[name]
    certain = verdict.state == "stale"
    stored = None
    if (
        certain
        and store is not None
        and not any(r.text.startswith("forced") for r in verdict.reasons)
    ):
        stored = _stored(scene, name, store)
    if stored is not None:
        return StepForecast(name, certain, True, verdict.reasons, 0.0, stored.size, "store")
    record = scene.entries.done.get(name)
    if record is not None and record["wall"] > 0:
        size = sum(record["sizes"].values())
        return StepForecast(name, certain, False, verdict.reasons, record["wall"], size, "last run")
    seconds, size = by_rule.get(step.rule, (None, None))
    known: Source = "none" if seconds is None else "rule"
    return StepForecast(name, certain, False, verdict.reasons, seconds, size, known)


def _stored(scene: Scene, name: str, store: str) -> Action | None:
    """What the store has for a step; None also where its key cannot be told yet."""
    step = scene.survey.plan.steps[name]
    makers = steps_read(scene.survey.plan, step)
    if any(scene.survey.verdicts[each].state in ("stale", "unsure") for each in makers):
        return None
    if not os.path.isdir(f"{store}/ac"):
        return None  # to open a store would make it
    from buildsys.engine.storing import action_key
    from buildsys.store.local import Store

    return Store(store).action(action_key(key_digest(scene.survey.parts(step))))


def _figures_by_rule(plan: Plan, entries: Entries) -> dict[str, tuple[float, int]]:
    """Rule -> the median of seconds and of bytes of its steps that have run."""
    found: dict[str, list[tuple[float, int]]] = {}
    for name, step in plan.steps.items():
        record = entries.done.get(name)
        if record is not None and record["wall"] > 0:
            found.setdefault(step.rule, []).append((record["wall"], sum(record["sizes"].values())))
    return {
        rule: (median(wall for wall, _ in runs), int(median(size for _, size in runs)))
        for rule, runs in found.items()
        if rule != "command"  # what one program takes says nothing of another
    }


def chains(plan: Plan, seconds: Mapping[str, float]) -> dict[str, float]:
    """Seconds from the start of each step to the end of the longest chain that waits for it."""
    after: dict[str, float] = {}
    found: dict[str, float] = {}
    for name in reversed([name for name in plan.steps if name in seconds]):
        found[name] = seconds[name] + after.get(name, 0.0)
        for maker in steps_read(plan, plan.steps[name]):
            after[maker] = max(after.get(maker, 0.0), found[name])
    return found


def simulated(
    plan: Plan, seconds: Mapping[str, float], capacity: Capacity, entries: Entries
) -> float:
    """When the last step ends, if they start as the engine starts them: the longest chain
    first, as far as processors, memory, GPUs and licences go."""
    priority = chains(plan, seconds)
    missing = {
        name: {each for each in steps_read(plan, plan.steps[name]) if each in seconds}
        for name in seconds
    }
    pool = Pool(capacity)
    waiting = sorted((name for name in seconds if not missing[name]), key=priority.__getitem__)
    running: list[tuple[float, str]] = []
    now = 0.0
    while waiting or running:
        for name in [*reversed(waiting)]:
            claim = claim_of(plan.steps[name], entries)
            # What never fits (it would be refused) runs alone here: a forecast is no judge.
            if pool.fits(claim) or not running:
                pool.take(name, claim)
                waiting.remove(name)
                heapq.heappush(running, (now + seconds[name], name))
        now, over = heapq.heappop(running)
        pool.give_back(over)
        for name, wants in missing.items():
            if over in wants:
                wants.discard(over)
                if not wants:
                    waiting.append(name)
        waiting.sort(key=priority.__getitem__)
    return now


def free_space(folder: str) -> int:
    """Bytes that the disk of a folder, which may not be there yet, has left for us."""
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize
