"""The short round of the campaign: one round of each fault, with one seed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.campaign import one_round
from tests.faults.registry import FAULTS
from tests.faults.world import References, Skip, compile_once

SEED = 7
FEW = 4  # instants of a scenario that can take all
GRAPHS = 2


@pytest.fixture(scope="session")
def references(tmp_path_factory: pytest.TempPathFactory) -> References:
    compile_once()
    return References(tmp_path_factory.mktemp("undisturbed"))


@pytest.fixture
def survives(references: References, tmp_path: Path) -> Callable[[str], None]:
    """survives(name): one round of a fault; a promise that it breaks is a failure."""

    def run(name: str) -> None:
        try:
            one_round(FAULTS[name], SEED, 0, references, tmp_path, few=FEW, graphs=GRAPHS)
        except Skip as skip:
            pytest.skip(str(skip))

    return run
