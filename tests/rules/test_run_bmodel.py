"""The script for boards: tries the bmodel where it can, then starts the program that is named."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.rules.conftest import make, step

__all__ = ["make", "step"]
SAYS = '#!/bin/sh\nprintf "%s\\n" "$(basename "$0")" "$@"\n'


@pytest.fixture
def board(make: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    """board(program..., **variables): runs the script on a board that has these programs."""

    def run(*programs: str, words: tuple[str, ...] = (), **variables: Any) -> Any:
        options = {"template": "run_bmodel.sh.j2", "bmodel": "it's.bmodel", **variables}
        script: Path = make("script", "run.sh", {}, options).out
        for shell in filter(None, (shutil.which("dash"), shutil.which("bash"))):
            subprocess.run([shell, "-n", str(script)], check=True)
        (script.parent / "it's.bmodel").touch()
        (script.parent / "config").mkdir()
        tools = tmp_path / "tools"
        tools.mkdir(exist_ok=True)
        for name in programs:
            (tools / name).write_text(SAYS)
            (tools / name).chmod(0o755)
        done = subprocess.run(
            [str(script), *words],
            env={"PATH": f"{tools}:/usr/bin:/bin"},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout.splitlines(), done.stderr

    return run


def test_the_bmodel_is_tried_and_the_pipeline_gets_it(board: Callable[..., Any]) -> None:
    code, said, _ = board("bmrt_test", "chat", pipeline=["chat", "a b"], words=("--top", "1"))
    assert code == 0
    assert said == [
        "bmrt_test", "--bmodel", "./it's.bmodel",
        "chat", "a b", "--top", "1", "-m", "./it's.bmodel", "-c", "./config",
    ]  # fmt: skip


def test_without_a_pipeline_trying_is_all(board: Callable[..., Any]) -> None:
    assert board("bmrt_test") == (0, ["bmrt_test", "--bmodel", "./it's.bmodel"], "")


def test_trying_can_be_left_out(board: Callable[..., Any]) -> None:
    code, said, _ = board("bmrt_test", "chat", pipeline=["chat"], test=False)
    assert (code, said[0]) == (0, "chat")


@pytest.mark.parametrize(
    ("variables", "why"),
    [
        ({}, "there is no bmrt_test here"),
        ({"pipeline": ["chat"]}, "there is no program chat"),
        ({"pipeline": ["sh"], "config": "none"}, "the folder none is missing"),
    ],
)
def test_what_is_missing_is_named(
    board: Callable[..., Any], variables: dict[str, Any], why: str
) -> None:
    code, _, error = board(**variables)
    assert code == 3
    assert why in error
