"""`qbuild shell`: a shell, or a program, where a step would run and with what it would see."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import subprocess
import sys
from typing import TYPE_CHECKING

from buildsys.cli.build_words import add_folder_words, project_of, say
from buildsys.cli.window import folded, width_of
from buildsys.engine.folder import shown
from buildsys.errors import UsageError

if TYPE_CHECKING:
    from buildsys.engine.by_hand import Place

SHELL = "/bin/sh"


def configure(parser: argparse.ArgumentParser) -> None:
    add_folder_words(parser, targets=True)
    parser.epilog = (
        "qbuild shell [RECIPE] TARGET [-- PROGRAM [WORD ...]]: what the step reads is in place, "
        "the environment is the step's, the current folder is a staging folder; nothing that is "
        "made there is committed. The exit code is the program's."
    )


def run(args: argparse.Namespace) -> int:
    """Run the shell or the program; its exit code."""
    from buildsys.engine import by_hand
    from buildsys.engine.project import survey_of
    from buildsys.plan.targets import targets

    project, words = project_of(args)
    steps = targets(project.plan, words) if words else ()
    if len(steps) != 1:
        told = f"'{' '.join(words)}' means {len(steps)} steps" if words else "which step?"
        raise UsageError(told, remedy="qbuild shell [RECIPE] TARGET [-- PROGRAM [WORD ...]]")
    place = by_hand.prepare(project, survey_of(project), steps[0])
    tell(place, steps[0])
    program = args.rest or [os.environ.get("SHELL", SHELL)]
    try:
        return run_in(place, program)
    finally:
        if by_hand.leave(place):
            say(f"what was made is in {shown(place.order.staging)}; nothing was committed")


def tell(place: Place, step: str) -> None:
    """Say what the step runs, reads and makes."""
    order, width = place.order, width_of(sys.stderr)
    rule = order.module.rpartition(".")[2].replace("_", "-")
    said = [f"{step} runs: {shlex.join(order.argv) if order.argv else f'rule {rule}'}"]
    for name, items in order.context["inputs"].items():
        paths = [shown(path) for item in items for path in item["paths"].values()]
        said.append(f"  reads {name}: {', '.join(paths)}")
    for name, path in order.context["outputs"].items():
        said.append(f"  makes {name}: {os.path.relpath(path, order.staging)}")
    said.append("in this folder ../run runs it, unconfined; nothing here is committed")
    for line in said:
        say(folded(line, width))


def run_in(place: Place, program: list[str]) -> int:
    """Run a program in a step's place; its exit code, as a shell counts."""
    from buildsys.engine import by_hand

    environment = by_hand.environment(place.order, os.environ)
    try:
        process = subprocess.Popen(program, cwd=place.order.staging, env=environment)
    except OSError as error:
        raise UsageError(
            f"cannot run '{program[0]}': {error.strerror}",
            remedy=f"the step's PATH is {environment['PATH']}",
        ) from error
    while True:
        with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C is for what runs there
            code = process.wait()
            return code if code >= 0 else 128 - code
