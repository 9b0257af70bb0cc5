"""The faults: every one a function of a world and of chance, under its own name."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

from tests.faults.world import World

Scenario = Callable[[World, random.Random], None]


class Fault(NamedTuple):
    """rounds: how many of a campaign's 200 it has; fewer where less is left to chance, or where
    one round goes through every instant by itself."""

    name: str
    scenario: Scenario
    rounds: int


FAULTS: dict[str, Fault] = {}


def faults_of(module: ModuleType) -> list[str]:
    """The names of a file's faults."""
    own = module.__name__
    return [name for name, each in FAULTS.items() if each.scenario.__module__ == own]


def fault(rounds: int) -> Callable[[Scenario], Scenario]:
    """Register a scenario under its function's name."""

    def register(scenario: Scenario) -> Scenario:
        name = scenario.__name__
        FAULTS[name] = Fault(name, scenario, rounds)
        return scenario

    return register
