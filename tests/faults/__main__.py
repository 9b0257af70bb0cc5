"""The long campaign: python -m tests.faults --rounds 200."""

from __future__ import annotations

import argparse
import math
import resource
import sys
from collections.abc import Iterable
from functools import partial

from tests.faults.all_faults import FAULTS
from tests.faults.campaign import HEAD, campaign, row
from tests.faults.registry import Fault
from tests.faults.world import compile_once

FULL = 200


def main() -> int:
    """1 where a promise was broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument(
        "--rounds",
        type=int,
        default=FULL,
        help="of a fault that is all chance; the others have their share (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", action="append", metavar="FAULT", choices=sorted(FAULTS))
    parser.add_argument("--round", type=int, help="only this one: as a violation says it")
    parser.add_argument("--few", type=int, default=0, help="take so many instants, not all")
    parser.add_argument("-j", "--jobs", type=int, default=1, help="rounds at a time")
    words = parser.parse_args()

    def rounds_of(fault: Fault) -> Iterable[int]:
        if words.round is not None:
            return [words.round]
        return range(math.ceil(fault.rounds * words.rounds / FULL))

    chosen = [fault for name, fault in FAULTS.items() if not words.only or name in words.only]
    # What counts every instant of a build takes longest, and comes last.
    chosen.sort(key=lambda fault: (fault.alike > 0, -fault.rounds))
    compile_once()
    say, progress = partial(print, flush=True), partial(print, file=sys.stderr, flush=True)
    tallies = campaign(chosen, rounds_of, words.seed, words.few, words.jobs, say, progress)
    broken = sum(tally.violations for tally in tallies)
    print(HEAD, *map(row, tallies), sep="\n")
    print(f"seed {words.seed}: {sum(t.rounds for t in tallies)} rounds, {broken} violations")
    progress(f"{cpu_seconds():.0f} CPU seconds")
    return 1 if broken else 0


def cpu_seconds() -> float:
    """Of this process and all that it has waited for."""
    spent = [resource.getrusage(of) for of in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in spent)


if __name__ == "__main__":
    sys.exit(main())
