"""Qualcomm's compiler, where it is installed, and a small model with the ranges of its graphs."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from buildsys.share import shared_folder
from buildsys.toolchains.finding import Found, find_toolchains
from tests.rules.conftest import make, step

__all__ = ["make", "step"]  # fixtures: rules are run here as in tests/rules
NAME = "onnxruntime-qnn"


@pytest.fixture(scope="session")
def compiler() -> Found:
    """The toolchain; without it the test is skipped, with the reason."""
    outcome = find_toolchains([NAME], [shared_folder("toolchains")], os.environ)
    if NAME not in outcome.found:
        pytest.skip(outcome.missing[NAME])
    return outcome.found[NAME]


@dataclass(frozen=True)
class Compiler:
    """Runs one of the programs in the compiler's Python, in a folder."""

    python: str
    folder: Path

    def __call__(self, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.python, program, *arguments],
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )


@pytest.fixture
def in_compiler(compiler: Found, tmp_path: Path) -> Callable[..., Any]:
    """in_compiler(program, *arguments): run a program of the compiler's Python in tmp_path."""
    return Compiler(str(compiler.fields["python"]), tmp_path)
