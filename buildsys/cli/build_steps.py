"""What `all` and `build` do, as a list of stages."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from buildsys.cli.build_words import project_of, say, say_kept
from buildsys.cli.main import read_defines
from buildsys.cli.recipe_words import SUFFIX
from buildsys.cli.up_to_date import LOCAL, nothing_to_do
from buildsys.cli.window import listed, show
from buildsys.engine.build import (
    Request,
    Tools,
    build_what_is_stale,
)
from buildsys.engine.gates import keep_readings, read_gates, ready_gates
from buildsys.engine.standing import Answer
from buildsys.plan.targets import targets, upstream

if TYPE_CHECKING:
    from buildsys.engine.build import Outcome
    from buildsys.engine.dask.session import Session
    from buildsys.engine.display import Display
    from buildsys.engine.executor import Executor
    from buildsys.engine.gates import Reading
    from buildsys.engine.project import Project, Scene
    from buildsys.engine.stamps import Stamps
    from buildsys.engine.standing import Difference
    from buildsys.engine.storing import StepCache
    from buildsys.engine.trace import Trace

    Say = Callable[[str], None]

FAILED = 1
SIGNALLED = 128


def run(args: argparse.Namespace) -> int:
    """Build what is stale; 0, or the exit code that says what went wrong."""
    if args.dry_run:
        from buildsys.cli import dry_run

        return dry_run.run(args)
    if args.trace is not None or args.log_format == "json":
        from buildsys.cli import observing

        return observing.run(args)
    project, words = project_of(args)
    request = request_of(args, project, words)
    say_so = quiet if args.quiet else say
    opened = partial(open_cache, args, request)
    place = place_of(args, request)
    runs = executor_of(place)
    tools = Tools(runs, lambda: display_of(args), say_so, cache=opened, place=place)
    project, scene, outcome = build_what_is_stale(project, request, tools)
    return finish(project, scene, outcome, request, args)


def run_cone(difference: Difference, args: argparse.Namespace) -> int | None:
    """Build what hangs on a difference from the standing answer; None where that cannot be told
    without the whole plan. Lets go of the build folder's lock."""
    from buildsys.engine.cone import build_cone, cone_of

    try:
        cone = cone_of(difference)
        if cone is None:
            return None
        say_kept(difference.place.defines, read_defines(args.defines))
        fresh, skipped = difference.content["answer"]
        say_so = quiet if args.quiet else say
        for line in skipped:
            say_so(line)
        request = Request(tuple(cone.numbers), frozenset(), (), args.jobs, args.keep_going)
        request = request._replace(memory=args.memory)
        opened = partial(open_cache, args, request)
        tools = Tools(local_executor, lambda: display_of(args), say_so, cache=opened)
        outcome = build_cone(cone, difference, request, tools)
        answer = Answer(fresh, ())
        code = nothing_to_do(answer, args) if outcome is None else sum_up(outcome, args)
        return check_gates(cone.project, cone.scene, args) or code
    finally:
        difference.lock.release()


def finish(
    project: Project,
    scene: Scene,
    outcome: Outcome | None,
    request: Request,
    args: argparse.Namespace,
) -> int:
    """Say what came of the build, and read the gates; the exit code."""
    code = nothing_done(scene, request, args) if outcome is None else sum_up(outcome, args)
    return check_gates(project, scene, args) or code


def take_recipe(args: argparse.Namespace) -> None:
    """`--force r.yaml`: the recipe stands where a target may, and is none."""
    for at, word in enumerate(args.force):
        if word.endswith(SUFFIX):
            args.force[at] = ""
            args.words = [word, *args.words] if isinstance(args.words, list) else word


def request_of(args: argparse.Namespace, project: Project, words: tuple[str, ...]) -> Request:
    """What is asked for. `build --force TARGET` names TARGET: it does not mean everything."""
    if not words and getattr(args, "verb", "") == "build":
        words = tuple(filter(None, args.force))
    wanted = targets(project.plan, words)
    selection = upstream(project.plan, wanted) if words else wanted
    named = frozenset(wanted) if words else frozenset()
    forced = {
        name for word in args.force for name in (targets(project.plan, [word] if word else words))
    }
    ordered = tuple(name for name in project.plan.steps if name in forced)
    return Request(selection, named, ordered, args.jobs, args.keep_going, args.strict, args.memory)


def place_of(args: argparse.Namespace, request: Request) -> Session | None:
    """Where steps run; None: here. Raises UsageError for an --executor that cannot be."""
    if args.executor == LOCAL:
        return None
    from buildsys.engine.dask.session import session_of

    return session_of(args.executor, args.cache, args.no_cache, request.forced, request.memory)


def executor_of(place: Session | None) -> Callable[[int], Executor]:
    """Makes the executor, given the lock's descriptor."""
    return local_executor if place is None else place.executor


def local_executor(lock_fd: int) -> Executor:
    from buildsys.engine.local.executor import LocalExecutor

    return LocalExecutor(lock_fd)


def open_cache(
    args: argparse.Namespace,
    request: Request,
    folder: str,
    stamps: Stamps,
    say: Say,
    trace: Trace | None = None,
) -> StepCache | None:
    """The store and what is shared; None where there is none, or none is wanted.

    Raises UsageError for a --cache that cannot be.
    """
    from buildsys.engine.opening import open_step_cache

    if args.no_cache:
        return None
    return open_step_cache(folder, stamps, say, request.forced, args.cache, trace)


def display_of(args: argparse.Namespace) -> Display:
    from buildsys.engine.progress import choose_display

    return choose_display(sys.stderr, quiet=args.quiet, reasons=args.verbose)


def quiet(text: str) -> None:
    """What `say` is with -q: only warnings get through."""
    if text.startswith("warning"):
        say(text)


def nothing_done(scene: Scene, request: Request, args: argparse.Namespace) -> int:
    fresh = sum(scene.survey.verdicts[name].state == "fresh" for name in request.selection)
    return nothing_to_do(Answer(fresh, ()), args)


def sum_up(outcome: Outcome, args: argparse.Namespace) -> int:
    """Say in one line what came of the build; the exit code."""
    parts = [f"built {len(outcome.made)}"]
    if outcome.restored:
        parts[0] += f", restored {len(outcome.restored)}"
    if outcome.failures:
        parts.append(f"failed: {', '.join(each.step for each in outcome.failures)}")
    if outcome.blocked:
        parts.append(f"not tried, for want of these: {', '.join(outcome.blocked)}")
    if outcome.stopped_by:
        parts.append("interrupted; finished steps are kept")
    if outcome.untried:
        word = "not made" if outcome.stopped_by else "not started"
        parts.append(f"{word}: {listed(outcome.untried)}")
    if not args.quiet or outcome.failures:
        show(["; ".join(parts)], sys.stderr if len(parts) > 1 else sys.stdout)
    return exit_code(outcome)


def exit_code(outcome: Outcome) -> int:
    if outcome.stopped_by:
        return SIGNALLED + outcome.stopped_by
    return FAILED if outcome.failures else 0


def check_gates(project: Project, scene: Scene, args: argparse.Namespace) -> int:
    """Read the gates on artifacts that are fresh; 1 where one fails."""
    readings = gate_readings(project, scene)
    for reading in readings:
        if not reading.passed:
            say(f"error: {reading}")
        elif args.verbose:
            say(str(reading))
    return 0 if all(reading.passed for reading in readings) else FAILED


def gate_readings(project: Project, scene: Scene) -> list[Reading]:
    """The gates' figures, as they are now; kept for `deploy`."""
    readings = read_gates(ready_gates(project.plan, scene.survey.verdicts), project.folder)
    keep_readings(readings, project.folder)
    return readings
