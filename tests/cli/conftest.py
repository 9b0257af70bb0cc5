"""A project folder, and the command `qbuild` in it as a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Qbuild = Callable[..., "subprocess.CompletedProcess[str]"]

RECIPE = """\
qbuild: 1
name: tiny
vars: {word: hello, limit: 10}
sources: {src: {file: src.txt}}
artifacts:
  a: {rule: command, inputs: {i: src}, options: {argv: [cp, "${in.i}", "${out}"]}}
  b:
    rule: command
    inputs: {i: a}
    options:
      argv: [sh, -c, 'cat "$1" > "$2"; echo "$3" >> "$2"', sh, "${in.i}", "${out}", "${word}"]
  sub/c: {rule: command, inputs: {i: b}, options: {argv: [cp, "${in.i}", "${out}"]}}
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "tiny.yaml").write_text(RECIPE)
    (folder / "src.txt").write_text("one\n")
    return folder


@pytest.fixture
def qbuild(project: Path) -> Qbuild:
    """qbuild(words...): run it in the project folder; the finished process."""

    def run(*words: str, folder: Path = project) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "buildsys", *words],
            cwd=folder,
            env=environment(project),
            capture_output=True,
            text=True,
            timeout=120,
        )

    return run


def environment(project: Path) -> dict[str, str]:
    """No store: on a busy machine a step may take long enough to be kept, and come back."""
    return {**os.environ, "COLUMNS": "80", "QBUILD_CACHE": ""}
