"""Models on the hub: from its cache where they are there, and a way out where they are not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import environment

RECIPE = """\
qbuild: 1
name: hub
sources: {model: {model: org/name}}
artifacts:
  config.json:
    rule: command
    inputs: {m: model}
    options: {argv: [cp, "${in.m}/config.json", "${out}"]}
"""
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "hub.yaml").write_text(RECIPE)
    return folder


def put_in_cache(home: Path, commit: str, content: str) -> None:
    """A snapshot as huggingface_hub keeps it."""
    model = home / "hub/models--org--name"
    snapshot = model / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(content)
    (model / "refs").mkdir(exist_ok=True)
    (model / "refs/main").write_text(commit)


def qbuild(project: Path, *words: str) -> subprocess.CompletedProcess[str]:
    home = {"HF_HOME": str(project / "hf"), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-m", "buildsys", *words],
        cwd=project,
        env={**environment(project), **home},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_model_that_cannot_be_fetched_says_how_to_give_a_folder(project: Path) -> None:
    done = qbuild(project, "all", "hub.yaml")
    assert done.returncode == 1
    assert "hub.yaml:3:" in done.stderr
    assert "the model org/name could not be fetched" in done.stderr
    assert "there is no folder 'org/name' either" in done.stderr
    assert "-D model=FOLDER" in done.stderr
    assert "Traceback" not in done.stderr


def test_status_fetches_nothing(project: Path) -> None:
    done = qbuild(project, "status", "hub.yaml")
    assert (done.returncode, done.stdout) == (0, "stale    config.json  never built\n")


def test_build_folder_stays_with_the_snapshot_that_it_was_made_with(project: Path) -> None:
    put_in_cache(project / "hf", COMMIT, "{}")
    assert qbuild(project, "all", "hub.yaml").stdout == "built 1\n"
    assert (project / "build/hub/config.json").read_text() == "{}"
    put_in_cache(project / "hf", COMMIT[::-1], '{"newer": 1}')
    again = qbuild(project, "all", "hub.yaml")
    assert again.stdout == "nothing to do: 1 artifact is up to date\n"
    assert qbuild(project, "clean", "--all").returncode == 0
    assert qbuild(project, "all", "hub.yaml").stdout == "built 1\n"
    assert (project / "build/hub/config.json").read_text() == '{"newer": 1}'
