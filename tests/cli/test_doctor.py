"""`qbuild doctor` and `qbuild toolchain`, as a person runs them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import Qbuild
from tests.toolchains.registry import environment_for, make_wheel

VARIABLES = [
    *("QNN_SDK_ROOT", "QAIRT_SDK_ROOT", "HEXAGON_SDK_ROOT"),
    *("ANDROID_NDK_ROOT", "ANDROID_NDK", "ANDROID_NDK_HOME"),
]


@pytest.fixture
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("unset")
def test_doctor_shows_every_toolchain_in_80_columns(qbuild: Qbuild) -> None:
    done = qbuild("doctor")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    named = [line.split()[1] for line in lines if not line.startswith(" ")]
    assert {"qnn-sdk", "hexagon-sdk", "android-ndk", "onnxruntime-qnn", "hexagon-llvm"} <= {*named}
    # Paths and pages are for copying: they alone may be longer.
    assert [line for line in lines if len(line) > 80 and " " in line.strip()] == []
    at = lines.index("missing  qnn-sdk")
    text = " ".join(line.strip() for line in lines[at : at + 9])
    assert "none of $QNN_SDK_ROOT, $QAIRT_SDK_ROOT is set" in text
    assert "-> Download the SDK" in text
    assert "https://softwarecenter.qualcomm.com/" in text


@pytest.mark.usefixtures("unset")
def test_asked_about_one_that_is_missing_it_ends_with_3(qbuild: Qbuild) -> None:
    done = qbuild("doctor", "hexagon-sdk", "--json")
    assert done.returncode == 3
    (finding,) = json.loads(done.stdout)
    assert finding["found"] is False
    assert finding["why"] == "$HEXAGON_SDK_ROOT is not set"
    assert finding["unlocks"] == ["htp-op-package"]
    assert qbuild("toolchain", "show", "hexagon-sdk").returncode == 3


def test_a_name_that_nothing_is_known_of_is_refused(qbuild: Qbuild) -> None:
    for words in (["doctor", "hexagon"], ["toolchain", "install", "hexagon"]):
        done = qbuild(*words)
        assert done.returncode == 2
        assert "there is no toolchain 'hexagon'" in done.stderr
        assert "hexagon-llvm" in done.stderr


def test_what_qbuild_cannot_install_says_where_it_is_to_be_had(qbuild: Qbuild) -> None:
    done = qbuild("toolchain", "install", "qnn-sdk")
    assert done.returncode == 2
    assert "set QNN_SDK_ROOT" in done.stderr
    assert "https://" in done.stderr


def test_a_projects_own_toolchain_is_installed_listed_and_found(project: Path) -> None:
    make_wheel(project / "wheels", "sometool", "1.0")
    (project / "toolchains").mkdir()
    (project / "toolchains" / "mine.yaml").write_text(
        "doc: a tool\nunlocks: [command]\nfind: [{python: sometool, installed: true}]\n"
        "install: {requirements: [sometool==1.0]}\n"
    )
    environment = environment_for(project / "wheels", project / "cache")

    def qbuild(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "buildsys", *words],
            cwd=project,
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
        )

    assert "-> qbuild toolchain install mine" in qbuild("doctor", "mine").stdout
    installed = qbuild("toolchain", "install", "mine")
    assert installed.returncode == 0, installed.stderr
    assert installed.stdout.startswith("mine is installed in ")
    listed = qbuild("toolchain", "list").stdout.splitlines()
    assert any(line.split() == ["found", "mine", "sometool", "1.0"] for line in listed)
    shown = json.loads(qbuild("toolchain", "show", "mine", "--json").stdout)
    assert shown["path"].startswith(os.fspath(project / "cache" / "toolchains" / "mine"))
    # The store's collector leaves it alone.
    assert qbuild("cache", "gc", "--keep", "1s").returncode == 0
    assert qbuild("doctor", "mine").returncode == 0
