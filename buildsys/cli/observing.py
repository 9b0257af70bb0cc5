"""A build that something listens to: a trace (--trace FILE), a program (--log-format json)."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from buildsys.cli import build_steps
from buildsys.cli.build_words import project_of, say
from buildsys.engine.build import Outcome, Request, Tools, build_what_is_stale
from buildsys.engine.events import EventStream, Tee
from buildsys.engine.trace import Trace, check_place
from buildsys.engine.traced import TracedExecutor, TracedSteps
from buildsys.errors import QbuildError, UsageError

if TYPE_CHECKING:
    from buildsys.engine.display import Display
    from buildsys.engine.executor import Executor
    from buildsys.engine.project import Project, Scene
    from buildsys.plan.graph import Json


class Ears(NamedTuple):
    """Who listens; None: nobody."""

    trace: Trace | None
    stream: EventStream | None


def run(args: argparse.Namespace) -> int:
    """As `build_steps.run`; the trace is written and the stream ended however it ends."""
    if args.dry_run:
        raise UsageError("-n runs nothing that could be traced, or tell of itself")
    if args.trace is not None:
        check_place(args.trace)
    stream = EventStream(sys.stdout) if args.log_format == "json" else None
    ears = Ears(Trace() if args.trace is not None else None, stream)
    try:
        with ended(stream):
            return build(args, ears)
    finally:
        if ears.trace is not None:
            ears.trace.write(args.trace)


def build(args: argparse.Namespace, ears: Ears) -> int:
    """The build itself."""
    trace, stream = ears
    with trace.span("planning", "open the recipe") if trace is not None else nullcontext():
        project, words = project_of(args)
        request = build_steps.request_of(args, project, words)
    if trace is not None:
        trace.mark()
    if stream is not None:
        stream.opened(project.recipe, project.plan.name, project.folder.root, project.defines)
    project, scene, outcome = build_what_is_stale(project, request, tools_of(args, request, ears))
    if stream is None:
        return build_steps.finish(project, scene, outcome, request, args)
    return close(stream, project, scene, outcome, request)


def tools_of(args: argparse.Namespace, request: Request, ears: Ears) -> Tools:
    trace, stream = ears
    say_so: Callable[[str], None] = build_steps.quiet if args.quiet else say
    if stream is not None:
        say_so = stream.say
    shows = partial(display_of, args, ears)
    cache = partial(build_steps.open_cache, args, request)
    place = build_steps.place_of(args, request)
    runs = build_steps.executor_of(place)
    if trace is None:
        return Tools(runs, shows, say_so, cache=cache, place=place)
    steps = TracedSteps(trace)

    def executor(lock_fd: int) -> Executor:
        return TracedExecutor(runs(lock_fd), trace, steps)

    def tee() -> Display:
        return Tee([shows(), steps])

    traced_cache = partial(build_steps.open_cache, args, request, trace=trace)
    return Tools(executor, tee, say_so, trace.at, traced_cache, trace.watch, place)


def display_of(args: argparse.Namespace, ears: Ears) -> Display:
    return build_steps.display_of(args) if ears.stream is None else ears.stream


def close(
    stream: EventStream, project: Project, scene: Scene, outcome: Outcome | None, request: Request
) -> int:
    """Tell how the build ended; its exit code."""
    readings = build_steps.gate_readings(project, scene)
    told = outcome or Outcome((), (), (), 0)
    code = build_steps.exit_code(told)
    if code == 0 and not all(reading.passed for reading in readings):
        code = build_steps.FAILED
    status = "interrupted" if told.stopped_by else "failed" if code else "done"
    gates: list[Json] = [
        {"gate": str(reading), "passed": bool(reading.passed)} for reading in readings
    ]
    stream.closed(
        status,
        code,
        made=list(told.made),
        restored=list(told.restored),
        failed=[each.step for each in told.failures],
        not_started=[*told.blocked, *told.untried],
        fresh=[name for name in request.selection if scene.survey.verdicts[name].state == "fresh"],
        gates=gates,
    )
    return code


@contextmanager
def ended(stream: EventStream | None) -> Iterator[None]:
    """An error that ends the build before its steps do ends the stream, too."""
    try:
        yield
    except KeyboardInterrupt:
        if stream is not None:
            stream.closed("interrupted", build_steps.SIGNALLED + signal.SIGINT)
        raise
    except Exception as error:  # whatever it is, who listens must learn of the end
        if stream is not None:
            code = error.exit_code if isinstance(error, QbuildError) else QbuildError.exit_code
            stream.closed("error", code, error=str(error) or type(error).__name__)
        raise
