"""Artifacts that were made elsewhere: with the digests of their inputs, fresh without the tool."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
RECIPE = """qbuild: 1
name: shop
sources: {src: {file: src.txt}}
artifacts:
  plan.txt: {rule: command, inputs: {src: src}, options: {argv: [cp, "${in.src}", "${out}"]}}
  part.bin:
    rule: command
    toolchain: far-away
    inputs: {plan: plan.txt}
    options: {argv: [cp, "${in.plan}", "${out}"]}
    optional: true
  whole.txt:
    rule: command
    inputs: {part: part.bin}
    options: {argv: [cp, "${in.part}", "${out}"]}
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "shop.yaml").write_text(RECIPE)
    (tmp_path / "src.txt").write_text("one")
    (tmp_path / "made.bin").write_text("made elsewhere")
    return tmp_path


def qbuild(project: Path, *words: str) -> Any:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "QBUILD_CACHE": str(project / "cache")}
    return subprocess.run(
        [sys.executable, "-m", "buildsys", *words],
        cwd=project, env=environment, capture_output=True, text=True,
    )  # fmt: skip


def test_an_adopted_artifact_is_fresh_without_its_toolchain(project: Path) -> None:
    assert "skipped part.bin" in qbuild(project, "all", "shop.yaml").stderr
    adopted = qbuild(project, "adopt", "part.bin", "made.bin")
    assert adopted.returncode == 0, adopted.stderr
    assert "plan.txt" in adopted.stdout
    assert qbuild(project, "adopt", "part.bin", "made.bin").returncode == 0  # twice is no harm
    built = qbuild(project, "all")
    assert built.returncode == 0, built.stderr
    assert (project / "build/shop/whole.txt").read_text() == "made elsewhere"
    assert "nothing to do" in qbuild(project, "all").stdout


def test_when_its_inputs_change_it_is_no_longer_taken(project: Path) -> None:
    qbuild(project, "all", "shop.yaml")
    qbuild(project, "adopt", "part.bin", "made.bin")
    qbuild(project, "all")
    (project / "src.txt").write_text("two")
    again = qbuild(project, "build", "plan.txt")
    assert again.returncode == 0, again.stderr
    stale = qbuild(project, "all")
    assert stale.returncode == 0, stale.stderr
    assert "skipped part.bin: toolchain 'far-away' is not installed" in stale.stderr
    assert "skipped whole.txt: needs part.bin" in stale.stderr
    assert qbuild(project, "build", "part.bin").returncode == 3
    (project / "src.txt").write_text("one")  # as it was when it was adopted
    qbuild(project, "build", "plan.txt")
    assert "nothing to do" in qbuild(project, "all").stdout


def test_a_change_by_hand_is_seen(project: Path) -> None:
    qbuild(project, "all", "shop.yaml")
    qbuild(project, "adopt", "part.bin", "made.bin")
    (project / "build/shop/part.bin").write_text("something else")
    assert "changed by hand" in qbuild(project, "status").stdout


def test_what_is_not_here_to_be_made_from_is_refused(project: Path) -> None:
    refused = qbuild(project, "adopt", "shop.yaml", "part.bin", "made.bin")
    assert refused.returncode == 2
    assert "plan.txt" in refused.stderr
    assert not (project / "build/shop/part.bin").exists()


def test_words_that_do_not_fit_are_refused(project: Path) -> None:
    qbuild(project, "all", "shop.yaml")
    for words, message in (
        (("part.bin",), "needs a target and a file"),
        (("part.bin", "missing.bin"), "there is no missing.bin"),
        (("part.bin", "made.bin", "more=made.bin"), "no output 'more'"),
        (("*.txt", "made.bin"), "means 2 artifacts"),
    ):
        refused = qbuild(project, "adopt", *words)
        assert refused.returncode == 2
        assert message in refused.stderr
