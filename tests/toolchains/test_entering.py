"""Steps that use a toolchain run in its environment, and only what it declares gets in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from buildsys.errors import RecipeError
from buildsys.toolchains.definitions import definition

SETUP = """\
echo "welcome to the SDK"
cd /
helper() { :; }
export SDK_PATH="$SDK_HOME/bin:two  words
and lines"
export SECRET=leaked
SHELL_ONLY=plain
[ -n "$NOTHING" ] && export NOTHING   # the last test of a script is its status
"""
TOOLCHAIN = """\
find: [{variable: SDK, file: setup.sh}]
enter:
  environment: {SDK_HOME: "${root}"}
  source: setup.sh
  pass: [SDK_PATH, SHELL_ONLY, NEVER_SET]
"""
RECIPE = """\
qbuild: 1
name: entering
sources: {}
artifacts:
  out.json:
    rule: command
    toolchain: sdk
    options:
      argv: [PYTHON, -c, 'import json,os,sys; json.dump({"env": dict(os.environ),
        "cwd": os.getcwd(), "argv": sys.argv[1:]}, open(sys.argv[1], "w"))', "${out}", "a b", "$x"]
      env: {MINE: "1"}
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "sdk").mkdir()
    (tmp_path / "sdk" / "setup.sh").write_text(SETUP)
    (tmp_path / "toolchains").mkdir()
    (tmp_path / "toolchains" / "sdk.yaml").write_text(TOOLCHAIN)
    (tmp_path / "r.yaml").write_text(RECIPE.replace("PYTHON", sys.executable))
    return tmp_path


def qbuild(project: Path, *words: str) -> subprocess.CompletedProcess[str]:
    own = {"SDK": str(project / "sdk"), "XDG_CONFIG_HOME": str(project / "config")}
    return subprocess.run(
        [sys.executable, "-m", "buildsys", *words],
        cwd=project,
        env={**os.environ, **own, "QBUILD_CACHE": "", "COLUMNS": "80"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_only_declared_variables_of_a_script_reach_the_program(project: Path) -> None:
    assert qbuild(project, "toolchain", "trust", "sdk").returncode == 0
    built = qbuild(project, "all", "r.yaml")
    assert built.returncode == 0, built.stderr
    told = json.loads((project / "build/entering/out.json").read_text())
    sdk = project / "sdk"
    assert told["env"]["SDK_HOME"] == str(sdk)
    assert told["env"]["SDK_PATH"] == f"{sdk}/bin:two  words\nand lines"
    assert told["env"]["SHELL_ONLY"] == "plain"
    assert told["env"]["MINE"] == "1"
    assert not {"SECRET", "NEVER_SET", "NOTHING"} & told["env"].keys()
    assert not [name for name in told["env"] if "helper" in name]
    assert told["cwd"] != "/"
    assert told["argv"][1:] == ["a b", "$x"]
    # The script is part of the key.
    assert "nothing to do" in qbuild(project, "all", "r.yaml").stdout
    (sdk / "setup.sh").write_text(f"{SETUP}export SHELL_ONLY=other\n")
    assert "script" in qbuild(project, "why", "r.yaml", "out.json").stdout


def test_a_projects_own_script_runs_only_once_it_is_trusted(project: Path) -> None:
    """And a changed toolchain file has to be trusted again."""
    marker = project / "ran"
    (project / "sdk" / "setup.sh").write_text(f"touch {marker}\n")
    for words in (["status", "r.yaml"], ["check", "r.yaml"], ["doctor", "sdk"]):
        qbuild(project, *words)
    assert "qbuild toolchain trust sdk" in qbuild(project, "doctor", "sdk").stdout
    built = qbuild(project, "all", "r.yaml")
    assert built.returncode == 3, built.stderr
    assert "qbuild toolchain trust sdk" in " ".join(built.stderr.split())
    assert not marker.exists()
    trusted = qbuild(project, "toolchain", "trust", "sdk")
    assert trusted.returncode == 0
    assert "is trusted as it is now" in trusted.stdout
    assert "is not installed" not in qbuild(project, "status", "r.yaml").stdout
    (project / "toolchains" / "sdk.yaml").write_text(f"doc: changed\n{TOOLCHAIN}")
    assert "is not installed" in qbuild(project, "status", "r.yaml").stdout


def test_a_script_that_is_gone_or_ends_the_shell_fails_the_step(project: Path) -> None:
    qbuild(project, "toolchain", "trust", "sdk")
    (project / "sdk" / "setup.sh").write_text("exit 0\n")
    built = qbuild(project, "all", "r.yaml")
    assert built.returncode == 1
    assert "the environment script" in built.stderr
    assert not (project / "build/entering/out.json").exists()


@pytest.mark.parametrize("enter", ["{source: a}", "{pass: [A]}", "yes", "{environ: {}}"])
def test_a_wrong_enter_section_is_named(enter: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(f"find: [{{variable: A}}]\nenter: {enter}\n")
    with pytest.raises(RecipeError, match=r"a\.yaml: (`enter` has|unknown key 'environ')"):
        definition("a", [str(tmp_path)])
