"""doit walks the graph; what is stale, where steps run and what is trusted is ours.

Only steps that may run become doit tasks. A temporary artifact that was removed after use
has a second task, which makes it again: the setup task of those that read it, so that doit
runs it only if one of them must run. Of doit's Runner the walk is kept and everything else
replaced: its up-to-date test, database, capture of output and pool of processes.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from buildsys.engine import walking
from buildsys.engine.estimate import estimate
from buildsys.engine.key import Reason
from buildsys.engine.schedule import claim_of, longest_paths
from buildsys.plan.targets import steps_read

if TYPE_CHECKING:
    from buildsys.engine.display import Display
    from buildsys.engine.schedule import Claim, Pool
    from buildsys.engine.staleness import Survey
    from buildsys.engine.temporary import Temporaries
    from buildsys.engine.work import Work
    from buildsys.plan.graph import Step

Task, TaskControl = walking.load()
AGAIN = "again"
HOLD_ON = "hold on"


def make_tasks(survey: Survey, names: Collection[str]) -> list[Any]:
    """doit tasks for the steps that may run, and for the temporary artifacts that they may need
    again. Their names are numbers, for doit refuses some names that artifacts may have."""
    plan = survey.plan
    chosen = set(names)
    numbers = {name: str(number) for number, name in enumerate(plan.steps)}
    again: dict[str, None] = {}

    def task(name: str, kind: str) -> Any:
        reads = steps_read(plan, plan.steps[name])
        setup = [each for each in reads if may_be_absent(survey, each)]
        again.update(dict.fromkeys(setup))
        first = [numbers[each] for each in reads if each in chosen]
        if kind == AGAIN and name in chosen:
            first.append(numbers[name])
        return Task(
            numbers[name] + kind,
            None,
            task_dep=first,
            setup=[numbers[each] + AGAIN for each in setup],
            io={"capture": False},
            meta={"step": name, "again": bool(kind)},
        )

    tasks = [task(name, "") for name in plan.steps if name in chosen]
    made: set[str] = set()
    while rest := [name for name in again if name not in made]:
        tasks += [task(name, AGAIN) for name in rest]
        made.update(rest)
    return tasks


def may_be_absent(survey: Survey, name: str) -> bool:
    """Can this step be fresh although its outputs are not there?"""
    verdict = survey.verdicts[name]
    return survey.plan.steps[name].temporary and (verdict.absent or verdict.state == "unsure")


class StepRunner:
    """Feeds ready steps to `Work` by priority, as far as resources go.

    Invariant: a node that doit handed out is ready, running, or was sent back to doit with its
    final status.
    """

    def __init__(
        self,
        survey: Survey,
        work: Work,
        temporaries: Temporaries,
        pool: Pool,
        display: Display,
        keep_going: bool,
    ) -> None:
        self._keep_going = keep_going
        self._stop_starting = False
        self._survey = survey
        self._work = work
        self._temporaries = temporaries
        self._pool = pool
        self._display = display
        self._priority: Mapping[str, float] = {}
        self._feed: Iterator[Any] = iter(())
        self._exhausted = False
        self._ready: list[tuple[float, int, Any]] = []
        self._count = 0
        self._running: dict[str, Any] = {}
        self._claims: dict[str, Claim] = {}
        self.blocked: list[str] = []
        self.stopped_by = 0

    def stop(self, signal_number: int) -> None:
        """Start nothing more and come back soon; may be called by a signal handler."""
        self.stopped_by = signal_number

    def run_steps(self, names: Collection[str]) -> None:
        """Run these steps (and temporary ones that they need), as far as they are stale."""
        self._priority = longest_paths(self._survey.plan, names, self._survey.entries)
        tasks = make_tasks(self._survey, names)
        done = self._survey.entries.done
        estimates = {name: done[name]["wall"] for name in names if name in done}
        self._display.begin(len(tasks), estimates, self._pool.jobs)
        control = TaskControl(tasks)
        # Not those that make something again: doit comes to them by who needs them.
        control.process([task.name for task in tasks if not task.meta["again"]])
        self._feed = control.task_dispatcher().generator
        self._give_back(None)
        while not self.stopped_by:
            self._start_what_fits()
            if not self._work.busy:
                break
            for name, made in self._work.wait():
                self._settle(name, made)

    def _settle(self, name: str, made: bool) -> None:
        """A step's outcome is known: tell doit, take what became ready."""
        node = self._running.pop(name)
        node.run_status = "successful" if made else "failure"
        if not made and not self._keep_going:
            self._stop_starting = True
        if made:
            self._temporaries.settled(name)
        self._give_back(node)

    def _give_back(self, node: Any) -> None:
        """Send a settled node to doit, then take every node that is ready now."""
        while not self._exhausted:
            try:
                got = self._feed.send(node)  # type: ignore[attr-defined]  # it is a generator
            except StopIteration:
                self._exhausted = True
                return
            if got == HOLD_ON:
                return
            node = self._select(got)

    def _select(self, node: Any) -> Any:
        """Look at a node whose dependencies are settled. Returned, if doit should go on with it;
        None, if it waits for its turn to run."""
        name = node.task.meta["step"]
        if node.bad_deps:
            node.run_status = "failure"
            self._block(name)
            return node
        if node.run_status is None:
            if not self._must_run(name, node.task.meta["again"]):
                node.run_status = "up-to-date"
                return node
            node.run_status = "run"
            if node.task.setup_tasks:
                return node  # doit runs those first, and hands the node out again
        self._count += 1
        self._work.look_ahead(name)
        self._display.ready(name)
        heapq.heappush(self._ready, (-self._priority.get(name, 0.0), self._count, node))
        return None

    def _must_run(self, name: str, again: bool) -> bool:
        if again:
            must = self._survey.verdicts[name].absent
        else:
            must = self._survey.judge(name).state != "fresh"
        if not must:
            self._display.unneeded(name)
            self._temporaries.settled(name)
        return must

    def _block(self, name: str) -> None:
        if name not in self.blocked:
            self.blocked.append(name)

    def _start_what_fits(self) -> None:
        passed_over = []
        while self._ready and not (self._pool.full or self._stop_starting or self.stopped_by):
            place = heapq.heappop(self._ready)
            node = place[2]
            name = node.task.meta["step"]
            claim = self._claim(name)
            if self._pool.fits(claim):
                self._pool.take(name, claim)
                self._running[name] = node
                self._start(name, node.task.meta["again"], claim)
            else:
                self._display.waits(name, self._pool.lacks(claim))
                passed_over.append(place)
        for place in passed_over:
            heapq.heappush(self._ready, place)

    def _claim(self, name: str) -> Claim:
        if name not in self._claims:
            survey = self._survey
            self._claims[name] = claim_of(survey.plan.steps[name], survey.entries, self._estimate)
        return self._claims[name]

    def _estimate(self, step: Step) -> int:
        """Everything that it reads is in place: it is ready."""
        blueprint = self._survey.blueprint
        facts = blueprint.rules[step.rule]
        return estimate(step, blueprint.plan, facts, self._work.root)

    def _start(self, name: str, again: bool, claim: Claim) -> None:
        reasons = self._survey.verdicts[name].reasons
        if again:
            reasons = (Reason("removed after use, and needed again"),)
        if not self._work.start(name, reasons, claim, self._priority.get(name, 0.0)):
            self._pool.give_back(name)
            self._settle(name, False)
