"""Rounds of faults, each with a seed of its own that repeats it."""

from __future__ import annotations

import random
import tempfile
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from tests.faults import project
from tests.faults.registry import Fault
from tests.faults.world import References, Skip, Violation, World, random_content

GRAPHS = 8  # how many a seed has; an undisturbed build is made once of each


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
    chance = random.Random(f"{fault.name} {seed} {round_}")
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


def campaign(
    faults: Iterable[Fault],
    rounds_of: Callable[[Fault], Iterable[int]],
    seed: int,
    few: int,
    say: Callable[[str], None],
) -> list[Tally]:
    """All rounds of all these faults; violations are said as they come."""
    tallies = []
    with tempfile.TemporaryDirectory(prefix="faults-") as scratch:
        references = References(Path(scratch))
        for fault in faults:
            tallies.append(rounds(fault, rounds_of(fault), seed, few, references, scratch, say))
            say(row(tallies[-1]))
    return tallies


def rounds(
    fault: Fault,
    numbers: Iterable[int],
    seed: int,
    few: int,
    references: References,
    scratch: str,
    say: Callable[[str], None],
) -> Tally:
    count = differing = repeated = left_over = other = 0
    for number in numbers:
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            try:
                world = one_round(fault, seed, number, references, Path(folder), few=few)
                count += max(1, world.instants)
            except Skip as skip:
                return Tally(fault.name, count, differing, repeated, left_over, other, str(skip))
            except Violation as violation:
                count += 1
                world = violation.world  # type: ignore[attr-defined]  # see one_round
                found = (len(world.differing), len(world.repeated), len(world.left_over))
                differing, repeated = differing + found[0], repeated + found[1]
                left_over += found[2]
                other += not any(found)
                say("".join(traceback.format_exception_only(violation)).rstrip())
            except Exception:  # a bug of ours or of the campaign's: both must be seen
                count, other = count + 1, other + 1
                say(f"{traceback.format_exc()}{how_to_repeat(fault, seed, number)}")
    return Tally(fault.name, count, differing, repeated, left_over, other, "")


HEAD = f"{'fault':50} {'rounds':>6} {'differ':>6} {'again':>6} {'left':>6} {'other':>6}"


def row(tally: Tally) -> str:
    text = tally.fault.replace("_", " ")
    figures = (tally.rounds, tally.differing, tally.repeated, tally.left_over, tally.other)
    line = f"{text:50} " + " ".join(f"{figure:6}" for figure in figures)
    return f"{line}  skipped: {tally.skipped}" if tally.skipped else line
