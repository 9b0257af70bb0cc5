"""Rounds of faults, each with a seed of its own that repeats it."""

from __future__ import annotations

import random
import tempfile
import traceback
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tests.faults import project
from tests.faults.all_faults import FAULTS
from tests.faults.registry import Fault
from tests.faults.world import References, Skip, Violation, World, random_content

GRAPHS = 4  # how many a seed has; an undisturbed build is made once of each


class Tally(NamedTuple):
    """What came of the rounds of one fault. other: promises broken in another way."""

    fault: str
    rounds: int
    differing: int
    repeated: int
    left_over: int
    other: int
    skipped: str

    @property
    def violations(self) -> int:
        return self.differing + self.repeated + self.left_over + self.other


def one_round(
    fault: Fault,
    seed: int,
    round_: int,
    references: References,
    root: Path,
    *,
    few: int = 0,
    graphs: int = GRAPHS,
) -> World:
    """One round of a fault, in a new folder below `root`. Raises Violation and Skip."""
    chance = fault.chance(seed, round_)
    content = random_content(random.Random(f"graph {seed} {chance.randrange(graphs)}"))
    folder = root / f"{fault.name[:40]}-{round_}"
    project.write_project(folder, content)
    world = World(folder, content, references, None)
    world.round, world.few = round_, few
    try:
        fault.scenario(world, chance)
    except Violation as violation:
        violation.add_note(f"repeat it: {how_to_repeat(fault, seed, round_)}")
        violation.world = world  # type: ignore[attr-defined]  # for the tally
        raise
    return world


def how_to_repeat(fault: Fault, seed: int, round_: int) -> str:
    return f"python -m tests.faults --only {fault.name} --seed {seed} --round {round_}"


class Told(NamedTuple):
    """What one round came to, for the table; text: what is to be said of it."""

    tally: Tally
    text: str


def told_round(name: str, seed: int, number: int, few: int, scratch: str) -> Told:
    """One round, in this process, whatever comes of it."""
    fault, none = FAULTS[name], (0, 0, 0)
    count, found, other, text, skipped = 1, none, 0, "", ""
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        try:
            world = one_round(fault, seed, number, References(Path(scratch)), Path(folder), few=few)
            count = max(1, world.instants)
        except Skip as skip:
            count, skipped = 0, str(skip)
        except Violation as violation:
            world = violation.world  # type: ignore[attr-defined]  # see one_round
            found = (len(world.differing), len(world.repeated), len(world.left_over))
            other = int(found == none)
            text = "".join(traceback.format_exception_only(violation)).rstrip()
        except Exception:  # a bug of ours or of the campaign's: both must be seen
            other = 1
            text = f"{traceback.format_exc()}{how_to_repeat(fault, seed, number)}"
    return Told(Tally(name, count, *found, other, skipped), text)


def together(tallies: Sequence[Tally]) -> Tally:
    """The rounds of one fault as one."""
    return Tally(
        fault=tallies[0].fault,
        rounds=sum(tally.rounds for tally in tallies),
        differing=sum(tally.differing for tally in tallies),
        repeated=sum(tally.repeated for tally in tallies),
        left_over=sum(tally.left_over for tally in tallies),
        other=sum(tally.other for tally in tallies),
        skipped=max(tally.skipped for tally in tallies),
    )


def campaign(
    faults: Sequence[Fault],
    rounds_of: Callable[[Fault], Iterable[int]],
    seed: int,
    few: int,
    jobs: int,
    say: Callable[[str], None],
    progress: Callable[[str], None],
) -> list[Tally]:
    """All rounds of all these faults, so many at a time; violations are said as they come, and
    it is told when a fault has had all its rounds."""
    tallies = []
    with (
        tempfile.TemporaryDirectory(prefix="faults-") as scratch,
        ProcessPoolExecutor(jobs) as pool,
    ):
        begun = {
            fault.name: [
                pool.submit(told_round, fault.name, seed, number, few, scratch)
                for number in rounds_of(fault)
            ]
            for fault in faults
        }
        for futures in begun.values():
            results = []
            for future in futures:
                results.append(future.result())
                if results[-1].text:
                    say(results[-1].text)
            tallies.append(together([result.tally for result in results]))
            progress(row(tallies[-1]))
    return tallies


HEAD = f"{'fault':50} {'rounds':>6} {'differ':>6} {'again':>6} {'left':>6} {'other':>6}"


def row(tally: Tally) -> str:
    text = tally.fault.replace("_", " ")
    figures = (tally.rounds, tally.differing, tally.repeated, tally.left_over, tally.other)
    line = f"{text:50} " + " ".join(f"{figure:6}" for figure in figures)
    return f"{line}  skipped: {tally.skipped}" if tally.skipped else line
