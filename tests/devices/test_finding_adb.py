"""Which adb is used: the given one, $ADB's, the one in PATH, and at last the one of adbutils."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from buildsys.devices.adb import find_adb
from buildsys.errors import ToolchainMissing


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine that says of no adb; the folder is its whole PATH."""
    monkeypatch.delenv("ADB", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def program(path: Path) -> str:
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return str(path)


def test_the_adb_of_adbutils_is_found_last_and_runs(bare: Path) -> None:
    adbutils = pytest.importorskip("adbutils", reason="adbutils, which carries an adb, is missing")
    found = Path(find_adb())
    assert found == Path(adbutils.__file__).parent / "binaries" / "adb"
    done = subprocess.run([found, "version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("Android Debug Bridge version 1.0.")
    assert f"Installed as {found}" in done.stdout


def test_an_adb_that_is_named_wins(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_path = program(bare / "adb")
    assert find_adb() == in_path
    of_environment = program(bare / "other")
    monkeypatch.setenv("ADB", of_environment)
    assert find_adb() == of_environment
    assert find_adb(in_path) == in_path
    with pytest.raises(ToolchainMissing, match="there is no adb at"):
        find_adb(str(bare / "absent"))
