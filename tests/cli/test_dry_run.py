"""`-n`: the forecast of time and disk, from what is known of each step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from buildsys.engine.folder import BuildFolder
from buildsys.engine.forecast import chains, simulated
from buildsys.engine.journal import Entries, read_journal
from buildsys.engine.schedule import Capacity
from tests.cli.conftest import RECIPE, Qbuild, environment
from tests.engine.shop import Shop


def forecast_of(qbuild: Qbuild, *words: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(qbuild("all", *words, "-n", "--log-format", "json").stdout)
    return found


def test_figures_are_those_of_the_journal_and_of_the_files(qbuild: Qbuild, project: Path) -> None:
    qbuild("all", "tiny.yaml")
    found = forecast_of(qbuild, "--force", "-j", "1")
    done = read_journal(BuildFolder(str(project / "build/tiny")).own("journal")).done
    for step in found["steps"]:
        name = step["artifact"]
        assert step["seconds"] == done[name]["wall"]
        assert step["bytes"] == (project / "build/tiny" / name).stat().st_size
        assert step["known_from"] == "last run"
    assert found["wall_seconds"] == pytest.approx(found["work_seconds"])
    free = os.statvfs(project)
    assert found["free_bytes"] == pytest.approx(free.f_bavail * free.f_frsize, rel=0.2)


def test_steps_without_a_record_are_named_and_counted_as_nothing(
    qbuild: Qbuild, project: Path
) -> None:
    qbuild("build", "tiny.yaml", "a")
    said = qbuild("all", "-n", "--force", "a").stdout
    assert "never run here, so of unknown time and size: b, sub/c" in said
    assert "time: at least " in said
    found = forecast_of(qbuild, "--force", "a")
    assert [step["known_from"] for step in found["steps"]] == ["last run", "none", "none"]
    assert found["work_seconds"] == found["steps"][0]["seconds"]


def test_what_the_store_holds_is_forecast_as_taken_from_it(project: Path) -> None:
    (project / "tiny.yaml").write_text(RECIPE.replace("[cp,", "[sh, -c, 'sleep 0.2; cp $0 $1',"))
    variables = {**environment(project), "QBUILD_CACHE": str(project / "store")}

    def run(*words: str) -> str:
        command = [sys.executable, "-m", "buildsys", *words]
        return subprocess.run(
            command, cwd=project, env=variables, capture_output=True, text=True, check=True
        ).stdout

    run("all", "tiny.yaml")
    size = (project / "build/tiny/a").stat().st_size
    run("clean", "a")
    found = json.loads(run("all", "-n", "--log-format", "json"))
    (step,) = (each for each in found["steps"] if each["artifact"] == "a")
    assert (step["restored"], step["seconds"], step["bytes"]) == (True, 0.0, size)
    assert "would take from the store a: a is missing" in run("all", "-n")
    assert "would run a" in run("all", "-n", "--no-cache")


def test_dry_run_without_a_store_makes_none(qbuild: Qbuild, project: Path) -> None:
    variables = {**environment(project), "QBUILD_CACHE": str(project / "store")}
    command = [sys.executable, "-m", "buildsys", "all", "tiny.yaml", "-n"]
    subprocess.run(command, cwd=project, env=variables, check=True, capture_output=True)
    assert sorted(path.name for path in project.iterdir()) == ["src.txt", "tiny.yaml"]


def test_dry_run_cannot_be_traced(qbuild: Qbuild) -> None:
    done = qbuild("all", "tiny.yaml", "-n", "--trace", "t.json")
    assert (done.returncode, done.stderr) == (2, "error: -n runs nothing that could be traced\n")


SECONDS = {"a": 2.0, "b": 3.0, "c": 5.0, "d": 1.0}
NO_ENTRIES = Entries({}, {}, (), 0)


@pytest.fixture
def diamond(tmp_path: Path) -> Shop:
    """a -> (b, c) -> d."""
    shop = Shop(tmp_path)
    shop.source("src", "")
    shop.step("a", "src")
    shop.step("b", "a")
    shop.step("c", "a")
    shop.step("d", "b", "c")
    return shop


@pytest.mark.parametrize(("jobs", "seconds"), [(1, 11.0), (2, 8.0), (9, 8.0)])
def test_time_is_that_of_the_schedule(diamond: Shop, jobs: int, seconds: float) -> None:
    capacity = Capacity(jobs, jobs, 1 << 40, 0)
    assert simulated(diamond.plan(), SECONDS, capacity, NO_ENTRIES) == seconds
    assert max(chains(diamond.plan(), SECONDS).values()) == 8.0


def test_steps_with_one_licence_wait_for_each_other_in_the_forecast(diamond: Shop) -> None:
    for name in ("b", "c"):
        diamond.steps[name] = diamond.steps[name]._replace(resources={"licence": "qubee"})
    capacity = Capacity(4, 4, 1 << 40, 0)
    assert simulated(diamond.plan(), SECONDS, capacity, NO_ENTRIES) == 11.0


def test_forecast_of_a_part_counts_only_that(diamond: Shop) -> None:
    part = {"c": 5.0, "d": 1.0}
    capacity = Capacity(4, 4, 1 << 40, 0)
    assert simulated(diamond.plan(), part, capacity, NO_ENTRIES) == 6.0
