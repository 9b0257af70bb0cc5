"""Lines on a terminal fit it; in a pipe they are whole."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from buildsys.cli.window import folded, listed, width_of
from tests.cli.conftest import RECIPE, Qbuild, environment

LONG = "an option whose words are many and which does not fit into a narrow window at all"


def on_terminal(project: Path, *words: str) -> list[str]:
    """What qbuild prints on a terminal of 80 columns."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "buildsys", *words],
        cwd=project,
        env=environment(project),
        stdout=theirs,
        stderr=subprocess.DEVNULL,
    ) as process:
        os.close(theirs)
        said = b""
        while True:
            try:
                piece = os.read(ours, 4096)
            except OSError:  # Linux's way to say that nobody holds the other end
                break
            if not piece:
                break
            said += piece
    os.close(ours)
    assert process.returncode == 0
    return said.decode().replace("\r", "").splitlines()


@pytest.mark.parametrize("verb", [("status",), ("why", "b"), ("all", "-n"), ("log",)])
def test_lines_fit_a_terminal_and_lose_nothing(
    qbuild: Qbuild, project: Path, verb: tuple[str, ...]
) -> None:
    qbuild("all", "tiny.yaml")
    (project / "tiny.yaml").write_text(RECIPE.replace("word: hello", f"word: {LONG}"))
    lines = on_terminal(project, *verb)
    assert max(map(len, lines)) <= 80
    piped = qbuild(*verb).stdout
    free = r"\S+ \S+ are free"  # others write to this disk, too
    shown, whole = (re.sub(free, "", " ".join(text.split())) for text in ("\n".join(lines), piped))
    assert shown == whole
    if verb != ("log",):
        assert max(map(len, piped.splitlines())) > 80


def test_word_that_is_too_long_stays_whole_to_be_copied() -> None:
    path = "x/" * 60
    assert folded(f"would run {path}: never built", 80).splitlines() == [
        "would run",
        f"  {path}:",
        "  never built",
    ]


def test_what_goes_on_is_indented_as_far_as_the_longest_word_leaves_room() -> None:
    assert folded("state  aaa bbb ccc", 14, indent=7) == "state  aaa bbb\n       ccc"
    assert folded("state  aaa bbbbbbbbbb", 14, indent=7) == "state  aaa\n    bbbbbbbbbb"
    assert folded("short", 14) == "short"
    assert folded("a line for a pipe", None) == "a line for a pipe"


def test_many_names_are_cut_with_their_number() -> None:
    assert listed(["a", "b"], most=2) == "a, b"
    assert listed([str(n) for n in range(20)], most=3) == "0, 1, 2 and 17 more"


def test_file_has_no_width(tmp_path: Path) -> None:
    with (tmp_path / "out").open("w") as file:
        assert width_of(file) is None
