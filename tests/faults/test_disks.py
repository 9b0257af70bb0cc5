"""One round of each fault in `disks`; `python -m tests.faults` has many."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.faults import disks
from tests.faults.registry import faults_of


@pytest.mark.parametrize("fault", faults_of(disks))
def test_qbuild_survives(fault: str, survives: Callable[[str], None]) -> None:
    survives(fault)
