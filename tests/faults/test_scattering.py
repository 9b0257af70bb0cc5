"""One round of each fault in `scattering`; `python -m tests.faults` has many."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.faults import scattering
from tests.faults.registry import faults_of


@pytest.mark.parametrize("fault", faults_of(scattering))
def test_qbuild_survives(fault: str, survives: Callable[[str], None]) -> None:
    survives(fault)
