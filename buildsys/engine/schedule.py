"""What may run now: processors, memory, GPUs and licences; and what should run first."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from buildsys.plan.targets import steps_read

if TYPE_CHECKING:
    from buildsys.engine.journal import Entries
    from buildsys.plan.graph import Plan, Step

UNKNOWN_SECONDS = 1.0


class Capacity(NamedTuple):
    """What this machine gives to a build. jobs: steps at a time; memory in bytes."""

    jobs: int
    threads: int
    memory: int
    gpus: int


class Claim(NamedTuple):
    """What one step takes while it runs."""

    threads: int
    memory: int
    gpus: int
    licences: frozenset[str]


class Pool:
    """Resources in use. Invariant: the claims that are taken fit the capacity, but for a single
    claim that is larger than the machine and runs alone (GPUs and licences always fit)."""

    def __init__(self, capacity: Capacity) -> None:
        self._capacity = capacity
        self._taken: dict[str, Claim] = {}

    @property
    def jobs(self) -> int:
        """Steps at a time."""
        return self._capacity.jobs

    @property
    def full(self) -> bool:
        """Is there no room for anything, however small?"""
        return len(self._taken) >= self._capacity.jobs

    def fits(self, claim: Claim) -> bool:
        taken = self._taken.values()
        if any(claim.licences & each.licences for each in taken):
            return False
        if sum(each.gpus for each in taken) + claim.gpus > self._capacity.gpus:
            return False
        return not taken or (
            len(taken) < self._capacity.jobs
            and sum(each.threads for each in taken) + claim.threads <= self._capacity.threads
            and sum(each.memory for each in taken) + claim.memory <= self._capacity.memory
        )

    def lacks(self, claim: Claim) -> str:
        """What there is too little of for a claim that does not fit: a word for people."""
        taken = self._taken.values()
        held = [name for each in taken for name in sorted(claim.licences & each.licences)]
        if held:
            return f"licence {held[0]}"
        if sum(each.gpus for each in taken) + claim.gpus > self._capacity.gpus:
            return "gpu"
        threads = sum(each.threads for each in taken) + claim.threads
        if len(taken) >= self._capacity.jobs or threads > self._capacity.threads:
            return "cpu"
        return "memory"

    def take(self, name: str, claim: Claim) -> None:
        self._taken[name] = claim

    def give_back(self, name: str) -> None:
        self._taken.pop(name, None)


def claim_of(step: Step, entries: Entries) -> Claim:
    """A step's claim: memory as the recipe says, else what it held at its peak last time."""
    resources = step.resources
    record = entries.done.get(step.name)
    memory = resources.get("memory") or (record["memory"] if record is not None else 0)
    licences = resources.get("licence") or ()
    names = [licences] if isinstance(licences, str) else licences
    return Claim(step.threads, int(memory), int(resources.get("gpu") or 0), frozenset(names))


def machine_capacity(jobs: int | None, gpus: int) -> Capacity:
    """Jobs as given, else one per processor that this process may use."""
    processors = len(os.sched_getaffinity(0))
    jobs = processors if jobs is None else jobs
    return Capacity(jobs, max(processors, jobs), available_memory(), gpus)


def available_memory() -> int:
    """Bytes that can be had without swapping, as the kernel estimates; huge if it does not."""
    try:
        with open("/proc/meminfo", "rb") as file:
            fields = dict(line.split(b":") for line in file)
    except OSError:
        return 1 << 62
    return int(fields[b"MemAvailable"].split()[0]) * 1024


def gpu_count() -> int:
    """NVIDIA devices that this machine has a node for."""
    try:
        names = os.listdir("/dev")
    except OSError:
        return 0
    return sum(name.startswith("nvidia") and name[len("nvidia") :].isdigit() for name in names)


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
