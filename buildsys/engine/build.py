"""A build, stage by stage: what is wanted, what is stale, run it, what came of it."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, NamedTuple, Protocol

from buildsys.engine import folder as folders
from buildsys.engine.hub import fetch_models
from buildsys.engine.lock import BuildLock
from buildsys.engine.own_file import remove_half_written
from buildsys.engine.project import remember_plan, survey_of
from buildsys.engine.staging import sweep
from buildsys.engine.staleness import skipped
from buildsys.engine.standing import leave_answer
from buildsys.engine.temporary import Temporaries
from buildsys.errors import QbuildError, ToolchainMissing

if TYPE_CHECKING:
    from types import FrameType

    from buildsys.engine.display import Display
    from buildsys.engine.executor import Executor
    from buildsys.engine.failure import Failure
    from buildsys.engine.project import Project, Scene
    from buildsys.engine.schedule import Capacity
    from buildsys.engine.staleness import Machine, Survey
    from buildsys.engine.stamps import Stamps
    from buildsys.engine.storing import StepCache

    OpenCache = Callable[[str, Stamps, Callable[[str], None]], StepCache | None]


class Request(NamedTuple):
    """What a command line asks of a build.

    selection: the steps that are wanted and what they need, in the plan's order; named: those
    that were asked for by name; jobs: None for one per processor; strict: skip nothing; memory:
    bytes for all steps together, None for what can be had.
    """

    selection: tuple[str, ...]
    named: frozenset[str]
    forced: tuple[str, ...] = ()
    jobs: int | None = None
    keep_going: bool = False
    strict: bool = False
    memory: int | None = None


class Outcome(NamedTuple):
    """made: committed steps; blocked: steps that wait for a failed one; stopped_by: a signal's
    number, 0 if none came; restored: committed steps that did not run, for their outputs were
    in the store; untried: steps that the build ended before."""

    made: tuple[str, ...]
    failures: tuple[Failure, ...]
    blocked: tuple[str, ...]
    stopped_by: int
    restored: tuple[str, ...] = ()
    untried: tuple[str, ...] = ()


class Place(Protocol):
    """Where steps run, if that is not this machine."""

    def machine(self, project: Project) -> Machine | None:
        """What of it is part of keys; None where that is what this machine has."""

    def capacity(self, jobs: int | None, gpus: int) -> Capacity:
        """What it gives to the build."""

    def follow(self, jobs: int | None, gpus: int, resize: Callable[[Capacity], None]) -> None:
        """Have `resize` told of every change of that, by the thread that polls the executor."""

    def close(self) -> None:
        """Nothing more is asked of it."""


class Tools(NamedTuple):
    """What a build works with. executor: makes one, given the lock's descriptor; say: a line
    for the person, before and after the display is up; at: told of the points between two
    operations; cache: opens the store for a build folder; watch: shown what is being judged;
    place: where steps run."""

    executor: Callable[[int], Executor]
    display: Callable[[], Display]
    say: Callable[[str], None]
    at: Callable[[str], None] = lambda point: None
    cache: OpenCache = lambda folder, stamps, say: None
    watch: Callable[[Scene], None] = lambda scene: None
    place: Place | None = None


def build_what_is_stale(
    project: Project, request: Request, tools: Tools
) -> tuple[Project, Scene, Outcome | None]:
    """Bring the selection up to date, under the build folder's lock. No outcome: nothing was
    to be done.

    Raises QbuildError before anything runs for what cannot be made, and after, where the disk
    takes nothing more; failures of steps are in the outcome.
    """
    with closing_place(tools.place), locked(project, tools.say) as lock_fd:
        if lock_fd >= 0:
            sweep(project.folder.own("staging"))
            remove_half_written(project.folder.own(""))
        tools.at("locked")
        project = with_models(project, request, tools.say)
        tools.at("models fetched")
        machine = tools.place.machine(project) if tools.place is not None else None
        scene = survey_of(project, request.forced, machine)
        tools.at("surveyed")
        tools.watch(scene)
        warn_of_damage(scene, tools.say)
        outcome = build_stale_of(project, scene, request, tools, lock_fd)
        whole = len(request.selection) == len(project.plan.steps)
        if lock_fd >= 0 and whole and machine is None:
            leave_answer(project, scene)
    return project, scene, outcome


def build_stale_of(
    project: Project, scene: Scene, request: Request, tools: Tools, lock_fd: int
) -> Outcome | None:
    """Judge the selection and make what is stale of it; see `build_what_is_stale`."""
    judge_all(scene.survey, request.selection)
    tools.at("judged")
    refuse_missing(scene.survey, request)
    for line in skipped(scene.survey):
        tools.say(line)
    temporaries = Temporaries(project.folder.root, scene.survey, request.named)
    names = to_run(scene.survey, request.selection, temporaries)
    outcome = None
    try:
        if names:
            refuse_missing_sources(project, names)
            outcome = build(project, scene, request, names, temporaries, lock_fd, tools)
        temporaries.sweep()
    finally:
        if lock_fd >= 0:
            remember(project, scene)
    return outcome


@contextmanager
def closing_place(place: Place | None) -> Iterator[None]:
    """However it ends, nothing more is asked of where steps run."""
    try:
        yield
    finally:
        if place is not None:
            place.close()


def refuse_missing_sources(project: Project, names: Collection[str]) -> None:
    """RecipeError for a source of these steps that is not there, before any of them runs."""
    given = (refs for name in names for refs in project.plan.steps[name].inputs.values())
    if not any(ref.kind == "source" for refs in given for ref in refs):
        return
    # Here and not at the top: a build with nothing to do needs neither.
    from buildsys.plan.missing import missing_sources
    from buildsys.recipe.mistakes import raise_all

    raise_all(missing_sources(project.plan, names))


def warn_of_damage(scene: Scene, say: Callable[[str], None]) -> None:
    if scene.entries.damaged:
        lines = ", ".join(map(str, scene.entries.damaged))
        say(f"warning: the journal is damaged (line {lines}); what it said of those steps is lost")


def remember(project: Project, scene: Scene) -> None:
    """Keep what was learnt for the next run."""
    remember_plan(project)
    scene.stamps.save()
    scene.code.save()


@contextmanager
def locked(project: Project, say: Callable[[str], None]) -> Iterator[int]:
    """Hold the build folder's lock; its descriptor, or -1 where the disk is read-only: then
    nothing may be built, and a build with nothing to do still says so."""
    own = project.folder.own("")
    try:
        os.makedirs(own, exist_ok=True)
        lock = BuildLock(project.folder.own("lock"), say)
        lock.acquire()
    except OSError as error:
        if not os.path.isfile(project.folder.own("journal")):
            raise QbuildError(f"cannot build in {project.folder.root}: {error.strerror}") from error
        yield -1
        return
    try:
        yield lock.fd
    finally:
        lock.release()


def with_models(project: Project, request: Request, say: Callable[[str], None]) -> Project:
    """The project with the models that it needs fetched from the hub."""
    plan = fetch_models(project.plan, request.selection, project.folder, say)
    return project._replace(blueprint=project.blueprint._replace(plan=plan))


def judge_all(survey: Survey, selection: Collection[str]) -> None:
    """Decide about every step of the selection, in the plan's order."""
    for name in selection:
        survey.judge(name)


def refuse_missing(survey: Survey, request: Request) -> None:
    """Raises ToolchainMissing for steps that may not be skipped: those that are not optional,
    those that were asked for by name, when strict, all."""
    refused: dict[str, list[str]] = {}
    for name in request.selection:
        verdict = survey.verdicts[name]
        if verdict.state != "skipped":
            continue
        own = not verdict.reasons[0].text.startswith("needs ")
        if (
            request.strict
            or name in request.named
            or (own and not survey.plan.steps[name].optional)
        ):
            refused.setdefault(str(verdict.reasons[0]), []).append(name)
    if refused:
        told = "; ".join(f"{', '.join(names)}: {why}" for why, names in refused.items())
        names = [name for each in refused.values() for name in each]
        how = list(dict.fromkeys(filter(None, map(survey.why_missing, names))))
        how.append("install what is missing, or mark the artifact `optional: true`")
        raise ToolchainMissing(f"cannot be made here: {told}", remedy="\n".join(how))


def to_run(survey: Survey, selection: Collection[str], temporaries: Temporaries) -> list[str]:
    """The steps that may run. A temporary artifact that is stale is none of them unless
    something that may run reads it."""
    chosen: set[str] = set()
    for name in reversed(list(selection)):
        may_run = survey.verdicts[name].state in ("stale", "unsure")
        if may_run and temporaries.needed(name, chosen):
            chosen.add(name)
    return [name for name in selection if name in chosen]


def build(
    project: Project,
    scene: Scene,
    request: Request,
    names: Sequence[str],
    temporaries: Temporaries,
    lock_fd: int,
    tools: Tools,
) -> Outcome:
    """Run the steps that may run; everything finished is committed when this returns.

    Raises QbuildError where the disk takes nothing.
    """
    if lock_fd < 0:
        raise QbuildError(f"{project.folder.root} is read-only, and {len(names)} steps must run")
    gc.enable()  # the command line's start had it off
    gc.freeze()  # plan and recipe stay: looking through them again and again finds nothing
    from buildsys.engine.commit import Committer
    from buildsys.engine.journal import Journal
    from buildsys.engine.runner import StepRunner
    from buildsys.engine.schedule import Pool, machine_capacity, refuse_what_never_fits
    from buildsys.engine.work import Work

    folder, survey = project.folder, scene.survey
    if tools.place is None:
        capacity = machine_capacity(request.jobs, scene.machine.gpus, request.memory)
    else:
        capacity = tools.place.capacity(request.jobs, scene.machine.gpus)
    refuse_what_never_fits((project.plan.steps[name] for name in names), capacity.most)
    os.makedirs(folder.own("logs"), exist_ok=True)
    folders.write_made(folder, folders.Made(project.recipe, project.defines))
    remember_plan(project)
    journal = Journal(folder.own("journal"), scene.entries)
    pool = Pool(capacity)
    if tools.place is not None:
        tools.place.follow(request.jobs, scene.machine.gpus, pool.resize)
    display = tools.display()
    cache = tools.cache(folder.root, scene.stamps, display.say)
    if cache is not None:
        temporaries.before_removal = cache.settle
    executor = tools.executor(lock_fd)
    committer = Committer(folder.root, journal, scene.stamps, tools.at)
    work = Work(folder, survey, scene.machine, committer, executor, display, pool.give_back, cache)
    runner = StepRunner(survey, work, temporaries, pool, display, request.keep_going)
    before = dict(survey.entries.done)
    try:
        with signals_to(runner.stop):
            runner.run_steps(names)
    finally:
        executor.close()
        try:
            work.ended_only()
        finally:
            work.close()
            journal.close()
            display.finished()
    if cache is not None:
        cache.close(hurry=bool(runner.stopped_by))
    done = survey.entries.done
    new = [name for name in names if done.get(name) is not before.get(name)]
    restored = tuple(name for name in new if "restored" in done[name])
    made = tuple(name for name in new if "restored" not in done[name])
    failures, blocked = tuple(work.failures), tuple(runner.blocked)
    told = {*new, *blocked, *(each.step for each in failures)}
    # What runs when a signal comes was started, and is as undone as what was not.
    untried = tuple(
        name for name in names if name not in told and survey.verdicts[name].state != "fresh"
    )
    return Outcome(made, failures, blocked, runner.stopped_by, restored, untried)


@contextmanager
def signals_to(stop: Callable[[int], None]) -> Iterator[None]:
    """While this lasts, a first SIGINT, SIGTERM or SIGHUP asks for a stop; a second is as usual.

    Raised where it strikes, an exception could fall between a rename and its journal line.
    """
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def handle(number: int, frame: FrameType | None) -> None:
        for each in numbers:
            signal.signal(each, before[each])
        stop(number)

    before = {}
    with suppress(ValueError):  # not in the main thread: then signals go elsewhere anyway
        before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
