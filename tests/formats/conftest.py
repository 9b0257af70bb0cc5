"""Golden data of the formats' tests: small pieces in the repository, large files beside it."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def small_golden() -> Path:
    return ROOT / "tests" / "golden" / "formats"


@pytest.fixture(scope="session")
def golden() -> Path:
    folder = ROOT.parent / "shared" / "golden"
    if not folder.is_dir():
        pytest.skip("../shared/golden (files of the real tools, 36 MB) is not here")
    return folder
