"""What is installed is looked up again where, and only where, it may have changed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from buildsys import identity
from buildsys.identity import InstalledVersions


@pytest.fixture
def listings(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Every time that folders are listed."""
    real, seen = identity.distribution_versions, []

    def watched(search: tuple[str, ...]) -> dict[str, str]:
        seen.append(search)
        return real(search)

    monkeypatch.setattr(identity, "distribution_versions", watched)
    return seen


def ahead(monkeypatch: pytest.MonkeyPatch, seconds: int) -> None:
    now = identity.time.time_ns
    monkeypatch.setattr(identity.time, "time_ns", lambda: now() + seconds * 10**9)


def test_a_settled_folder_is_listed_once_until_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listings: list[object]
) -> None:
    (tmp_path / "Thing_One-1.0.dist-info").mkdir()
    ahead(monkeypatch, 10)
    versions = InstalledVersions([str(tmp_path), str(tmp_path / "gone")])
    assert versions() == versions() == {"thing_one": "1.0"}
    assert len(listings) == 1
    (tmp_path / "Thing_One-1.0.dist-info").rename(tmp_path / "Thing_One-1.1.dist-info")
    os.utime(tmp_path)
    assert versions() == {"thing_one": "1.1"}
    (tmp_path / "gone").mkdir()
    (tmp_path / "gone/more-2.dist-info").mkdir()
    assert versions() == {"thing_one": "1.1", "more": "2"}


def test_a_folder_that_changed_just_now_is_listed_every_time(
    tmp_path: Path, listings: list[object]
) -> None:
    (tmp_path / "a-1.dist-info").mkdir()
    versions = InstalledVersions([str(tmp_path)])
    assert versions() == versions() == {"a": "1"}
    assert len(listings) == 2
