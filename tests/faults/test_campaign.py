"""The command of the long campaign: its table, its exit code, and the seed of what it finds."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest

from tests.faults import __main__ as command
from tests.faults.registry import FAULTS, Fault
from tests.faults.world import ROOT, World

FEW = ["--rounds", "1", "--only", "dead_shared_cache", "--only", "output_edited_by_hand"]


def test_campaign_that_finds_nothing_ends_with_0() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults", *FEW],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stdout + done.stderr
    assert lines[0].split() == ["fault", "rounds", "differ", "again", "left", "other"]
    assert lines[1].split() == ["output", "edited", "by", "hand", "1", "0", "0", "0", "0"]
    assert lines[-1] == "seed 1: 2 rounds, 0 violations"


def test_violation_says_the_seed_that_repeats_it_and_ends_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def spoilt_behind_its_back(world: World, chance: random.Random) -> None:
        world.must()
        (world.build / "end").write_text("half")
        world.compare()
        world.settle()

    name = "spoilt_behind_its_back"
    monkeypatch.setitem(FAULTS, name, Fault(name, spoilt_behind_its_back, 200))
    monkeypatch.setattr(sys, "argv", ["faults", "--rounds", "1", "--seed", "5", "--only", name])
    assert command.main() == 1
    said = capsys.readouterr().out
    assert "differing: ['end']" in said
    assert f"repeat it: python -m tests.faults --only {name} --seed 5 --round 0" in said
    assert said.splitlines()[-1] == "seed 5: 1 rounds, 1 violations"
