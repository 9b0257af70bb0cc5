"""`qbuild log`: what a step said when it last ran; without a step, how all of them ended."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from buildsys.cli.build_words import add_folder_words, project_of, say
from buildsys.cli.window import width_of
from buildsys.errors import UsageError

if TYPE_CHECKING:
    from buildsys.engine.last_run import LastRun
    from buildsys.engine.project import Project

FOLLOWING = 0.1  # seconds between looks at a log that grows


def configure(parser: argparse.ArgumentParser) -> None:
    add_folder_words(parser, targets=True)
    parser.add_argument("-f", "--follow", action="store_true", help="go on while the step runs")
    parser.add_argument("--json", action="store_true", help="how the steps ended, for machines")
    parser.epilog = "Without a target: how the last run of every step ended."


def run(args: argparse.Namespace) -> int:
    """Print a log, or the list; returns 0."""
    from buildsys.plan.targets import targets

    project, words = project_of(args)
    steps = targets(project.plan, words)
    if words and not args.json:
        if len(steps) > 1:
            raise UsageError(
                f"'{' '.join(words)}' means {len(steps)} steps; a log is of one",
                remedy="qbuild log [RECIPE] TARGET, or without a target for the list",
            )
        return show_log(project, steps[0], follow=args.follow)
    runs = look(project, steps)
    if args.json:
        print(json.dumps([each._asdict() for each in runs], indent=1))
    else:
        print("\n".join(table([each for each in runs if each.how != "never"], width_of())))
    return 0


def look(project: Project, steps: Sequence[str]) -> list[LastRun]:
    from buildsys.engine.journal import read_journal
    from buildsys.engine.last_run import last_run

    entries = read_journal(project.folder.own("journal"))
    return [last_run(project.folder, entries, name) for name in steps]


def show_log(project: Project, step: str, *, follow: bool) -> int:
    """The log on standard output, and how the run ended on standard error."""
    (last,) = look(project, [step])
    offset = copy_from(last.log, 0)
    while follow and last.how == "running":
        time.sleep(FOLLOWING)
        (last,) = look(project, [step])
        offset = copy_from(last.log, offset)
    if last.log is None and last.how == "restored":
        print_record(project, step)
    say(f"{step}: {how_it_ended(last)}")
    return 0


def print_record(project: Project, step: str) -> None:
    """What came with outputs that a store had: the warnings, and what was noted."""
    from buildsys.engine.journal import read_journal

    record = read_journal(project.folder.own("journal")).done[step]
    for warning in record["warnings"]:
        print(f"warning: {warning}")
    for name, value in record["notes"].items():
        print(f"{name}: {json.dumps(value, indent=1, ensure_ascii=False)}")


def copy_from(log: str | None, offset: int) -> int:
    """Print what stands in a log from an offset on; the next offset."""
    if log is None:
        return offset
    sys.stdout.flush()
    try:
        with open(log, "rb") as file:
            file.seek(offset)
            shutil.copyfileobj(file, sys.stdout.buffer)
            offset = file.tell()
    except FileNotFoundError:
        return 0  # the step has just been started anew
    sys.stdout.buffer.flush()
    return offset


def how_it_ended(last: LastRun) -> str:
    """In a sentence, as: made 2026-11-21 13:05:12 in 3.1 s; it said nothing."""
    from buildsys.engine.progress import duration

    if last.how == "never":
        return "it has not run in this build folder"
    parts: list[str] = ["restored from a store" if last.how == "restored" else last.how]
    if last.at is not None and last.how != "running":
        parts.append(when(last.at))
    if last.seconds is not None and last.how in ("made", "failed"):
        parts.append(f"after {duration(last.seconds)}")
    text = " ".join(parts)
    if last.error:
        text += f": {last.error.splitlines()[0]}"
    if last.how in ("restored", "adopted"):
        return f"{text}; what made it said was not kept"
    if last.log is None:
        return f"{text}; there is no log"
    return text


def when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def table(runs: list[LastRun], width: int | None) -> Iterator[str]:
    """A line for each step that has run."""
    from buildsys.engine.progress import duration, memory, shortened

    if not runs:
        yield "no step has run in this build folder"
        return
    rows: list[tuple[str, ...]] = [
        (
            each.step,
            each.how,
            "" if each.exit is None else str(each.exit),
            "" if each.at is None else when(each.at),
            "" if each.seconds is None else duration(each.seconds),
            "" if each.memory is None else memory(each.memory),
        )
        for each in runs
    ]
    rows.insert(0, ("step", "how", "exit", "ended", "time", "memory"))
    sizes = [max(len(row[at]) for row in rows) for at in range(6)]
    if width is not None:
        sizes[0] = max(16, min(sizes[0], width - sum(sizes[1:]) - 2 * 5))
    for name, how, code, ended, took, held in rows:
        left = f"{shortened(name, sizes[0]):{sizes[0]}}  {how:{sizes[1]}}  {code:>{sizes[2]}}"
        yield f"{left}  {ended:{sizes[3]}}  {took:>{sizes[4]}}  {held:>{sizes[5]}}".rstrip()
