"""What may run now: processors, memory, GPUs and licences; and what should run first."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from buildsys.engine.memory import ENDLESS, available_memory, total_memory
from buildsys.errors import QbuildError
from buildsys.plan.targets import steps_read

if TYPE_CHECKING:
    from buildsys.engine.journal import Entries
    from buildsys.plan.graph import Plan, Step

UNKNOWN_SECONDS = 1.0
HEADROOM = 1.1  # over the last peak: allocators and page caches differ from run to run
TOLERANCE = 1.25  # of the recipe's figure: a round number by a person, who may have measured RSS
GIB = 1 << 30


class Capacity(NamedTuple):
    """What this machine, or a cluster, gives to a build. jobs: steps at a time; memory in bytes;
    licences: name -> how many steps may hold it at a time (1 where nothing is said of it);
    most: bytes that any step could ever have."""

    jobs: int
    threads: int
    memory: int
    gpus: int
    licences: Mapping[str, int] = {}  # a Mapping: nobody writes to it
    most: int = ENDLESS


class Claim(NamedTuple):
    """What one step takes while it runs. memory: reserved bytes; limit: bytes that it is ended
    for holding more than, None where what is reserved is only what is expected. jobs: how many
    of the -j places."""

    threads: int
    memory: int
    gpus: int
    licences: frozenset[str]
    limit: int | None = None
    jobs: int = 1


class Pool:
    """Resources in use. Invariant: the claims that are taken fit the capacity. Of what is
    expected to be more than the machine has, as many places and threads and as much memory are
    taken as there are, so that such a step runs alone."""

    def __init__(self, capacity: Capacity) -> None:
        self._capacity = capacity
        self._taken: dict[str, Claim] = {}

    def resize(self, capacity: Capacity) -> None:
        """There is more or less from here on. What was taken stays taken, even if that is more."""
        self._capacity = capacity

    @property
    def jobs(self) -> int:
        """Steps at a time."""
        return self._capacity.jobs

    @property
    def full(self) -> bool:
        """Is there no room for anything, however small?"""
        return sum(each.jobs for each in self._taken.values()) >= self._capacity.jobs

    def fits(self, claim: Claim) -> bool:
        return not self.lacks(claim)

    def lacks(self, claim: Claim) -> str:
        """What there is too little of for a claim that does not fit, a word for people; empty
        where it fits."""
        taken, has, claim = self._taken.values(), self._capacity, self._cut(claim)
        for name in sorted(claim.licences):
            if sum(name in each.licences for each in taken) >= has.licences.get(name, 1):
                return f"licence {name}"
        if sum(each.gpus for each in taken) + claim.gpus > has.gpus:
            return "gpu"
        threads = sum(each.threads for each in taken) + claim.threads
        if sum(each.jobs for each in taken) + claim.jobs > has.jobs or threads > has.threads:
            return "cpu"
        memory = sum(each.memory for each in taken) + claim.memory
        return "memory" if memory > has.memory else ""

    def _cut(self, claim: Claim) -> Claim:
        has = self._capacity
        threads, memory = min(claim.threads, has.threads), min(claim.memory, has.memory)
        alone = (threads, memory) != (claim.threads, claim.memory)
        jobs = has.jobs if alone else min(claim.jobs, has.jobs)
        return claim._replace(threads=threads, memory=memory, jobs=jobs)

    def take(self, name: str, claim: Claim) -> None:
        self._taken[name] = self._cut(claim)

    def give_back(self, name: str) -> None:
        self._taken.pop(name, None)


def claim_of(
    step: Step, entries: Entries, estimate: Callable[[Step], int] = lambda step: 0
) -> Claim:
    """A step's claim. Memory: as the recipe says, which then also limits it; else what it held
    at its peak last time and some more; else an estimate."""
    resources = step.resources
    record = entries.done.get(step.name)
    limit = None
    if resources.get("memory"):
        memory = int(resources["memory"])
        limit = int(memory * TOLERANCE)
    elif record is not None and record["memory"]:
        memory = int(record["memory"] * HEADROOM)
    else:
        memory = estimate(step)
    licences = resources.get("licence") or ()
    names = [licences] if isinstance(licences, str) else licences
    gpus = int(resources.get("gpu") or 0)
    jobs = int(resources.get("jobs") or 1)
    return Claim(step.threads, memory, gpus, frozenset(names), limit, jobs)


def machine_capacity(jobs: int | None, gpus: int, memory: int | None = None) -> Capacity:
    """Jobs as given, else one per processor that this process may use; memory as given, else
    what can be had."""
    processors = len(os.sched_getaffinity(0))
    jobs = processors if jobs is None else jobs
    most = total_memory() if memory is None else memory
    memory = available_memory() if memory is None else memory
    return Capacity(jobs, max(processors, jobs), memory, gpus, most=most)


def refuse_what_never_fits(steps: Iterable[Step], most: int) -> None:
    """QbuildError for a step whose memory, as the recipe says it, is more than there ever is."""
    for step in steps:
        wanted = int(step.resources.get("memory") or 0)
        if wanted > most:
            raise QbuildError(
                f"{step.name} needs {wanted / GIB:.1f} GiB of memory (`resources` in the recipe), "
                f"and there are {most / GIB:.1f} GiB for all steps",
                remedy="give it to a larger machine (--executor), or correct the figure",
                location=step.where,
            )


def longest_paths(plan: Plan, names: Iterable[str], entries: Entries) -> Mapping[str, float]:
    """Seconds from the start of each of these steps to the end of what waits for it, by what
    the journal says of the last time: the step with the most should run first."""
    chosen = set(names)
    after: dict[str, float] = {}
    found: dict[str, float] = {}
    for name in reversed([name for name in plan.steps if name in chosen]):
        record = entries.done.get(name)
        wall = record["wall"] if record is not None else UNKNOWN_SECONDS
        found[name] = wall + after.get(name, 0.0)
        for maker in steps_read(plan, plan.steps[name]):
            after[maker] = max(after.get(maker, 0.0), found[name])
    return found
