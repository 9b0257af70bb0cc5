"""The faults: every one a function of a world and of chance, under its own name."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

from tests.faults.world import World

Scenario = Callable[[World, random.Random], None]


class Fault(NamedTuple):
    """rounds: how many of a campaign's 200 it has; fewer where less is left to chance.
    alike: where rounds share the instants of one build among them: those whose numbers are the
    same modulo this have one graph and one chance; 0 where each has its own."""

    name: str
    scenario: Scenario
    rounds: int
    alike: int = 0

    def chance(self, seed: int, number: int) -> random.Random:
        """What a round of this number takes its choices from."""
        return random.Random(f"{self.name} {seed} {number % self.alike if self.alike else number}")


FAULTS: dict[str, Fault] = {}


def faults_of(module: ModuleType) -> list[str]:
    """The names of a file's faults."""
    own = module.__name__
    return [name for name, each in FAULTS.items() if each.scenario.__module__ == own]


def fault(rounds: int, alike: int = 0) -> Callable[[Scenario], Scenario]:
    """Register a scenario under its function's name."""

    def register(scenario: Scenario) -> Scenario:
        name = scenario.__name__
        FAULTS[name] = Fault(name, scenario, rounds, alike)
        return scenario

    return register
