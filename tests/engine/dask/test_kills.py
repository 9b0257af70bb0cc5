"""Whoever is killed: what was finished is kept, nothing is left running, the build goes on."""

from __future__ import annotations

import json
import os
from pathlib import Path

import psutil
import pytest

from buildsys.engine.journal import read_journal
from tests.engine.dask.crew import Crew, Running, crew_in, interrupt, until

# Waits for a file that the test makes, and whose name tells the step from all others.
WAIT = 'while [ ! -e "$0" ]; do sleep 0.05; done; echo done > "$1"'
GONE = 2.0  # seconds


def write_recipe(project: Path) -> Path:
    """`early`, then `late`, which waits for the file that is returned."""
    gate = project / "gate"
    wait = json.dumps(["sh", "-c", WAIT, str(gate), "${out}"])
    (project / "r.yaml").write_text(
        f"""\
qbuild: 1
name: kills
artifacts:
  early: {{rule: command, options: {{argv: [sh, -c, 'echo {project} > "$0"', "${{out}}"]}}}}
  late: {{rule: command, inputs: {{early: early}}, options: {{argv: {wait}}}}}
"""
    )
    return gate


@pytest.fixture
def workers(crew: Crew) -> list[Running]:
    """Two that work; those that a test has killed are replaced."""
    alive = [each for each in _WORKERS if each.process.poll() is None]
    _WORKERS[:] = [*alive, *(crew.worker() for _ in range(2 - len(alive)))]
    return _WORKERS


_WORKERS: list[Running] = []


def who_runs(workers: list[Running], gate: Path) -> Running:
    """The worker that has the waiting step; and its process is there."""
    until(lambda: any(each.runs(str(gate)) for each in workers), "step that waits")
    return next(each for each in workers if each.runs(str(gate)))


def journal(project: Path) -> list[str]:
    """The steps that the journal has, in order."""
    return list(read_journal(str(project / "build/kills/.qbuild/journal")).done)


def all_gone(processes: list[psutil.Process]) -> bool:
    return not any(each.is_running() and each.status() != "zombie" for each in processes)


def test_step_of_a_killed_worker_runs_elsewhere(
    crew: Crew, workers: list[Running], project: Path
) -> None:
    gate = write_recipe(project)
    build = crew.qbuild(project, "r.yaml")
    first = who_runs(workers, gate)
    below = first.children()
    first.kill()
    until(lambda: all_gone(below), "end of what the killed worker ran", GONE)
    rest = [each for each in workers if each is not first]
    assert who_runs(rest, gate) is not first
    gate.touch()
    assert build.process.wait(60) == 0, build.text
    assert "built 2" in build.text
    assert (project / "build/kills/late").read_text() == "done\n"


def test_step_of_a_worker_that_is_told_to_stop_runs_elsewhere(
    crew: Crew, workers: list[Running], project: Path
) -> None:
    """It says nothing of the step as if that had failed."""
    gate = write_recipe(project)
    build = crew.qbuild(project, "r.yaml")
    first = who_runs(workers, gate)
    below = first.children()
    first.process.terminate()
    assert first.process.wait(60) == 128 + 15
    assert all_gone(below)
    who_runs([each for each in workers if each is not first], gate)
    gate.touch()
    assert build.process.wait(60) == 0, build.text
    assert "built 2" in build.text


def test_outputs_of_a_source_that_was_edited_meanwhile_come_back_under_no_key(
    crew: Crew, workers: list[Running], project: Path
) -> None:
    """The worker reads the file in its place, and cannot tell that it is another one."""
    gate, source = project / "gate", project / "src.txt"
    argv = ["sh", "-c", f'{WAIT}; cat "$2" > "$1"', str(gate), "${out}", "${in.i}"]
    step = {"rule": "command", "inputs": {"i": "src"}, "options": {"argv": argv}}
    content = {"qbuild": 1, "name": "kills", "sources": {"src": {"file": "src.txt"}}}
    source.write_text("old\n")
    before = source.stat()
    (project / "r.yaml").write_text(json.dumps({**content, "artifacts": {"late": step}}))
    build = crew.qbuild(project, "r.yaml")
    who_runs(workers, gate)
    source.write_text("new\n")
    gate.touch()
    assert build.process.wait(60) == 1
    assert "changed while the step ran" in build.text
    source.write_text("old\n")
    os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns))
    again = crew.qbuild(project, "r.yaml")
    assert again.process.wait(60) == 0, again.text
    assert (project / "build/kills/late").read_text() == "old\n"


def test_worker_that_joins_a_build_is_given_work(crew: Crew, project: Path) -> None:
    """One worker runs one step and has a second; the others are for who comes."""
    for each in _WORKERS[1:]:
        each.end()
    gate = write_recipe(project)
    waits = {f"s{n}": ["sh", "-c", WAIT, str(gate), "${out}"] for n in range(4)}
    steps = {name: {"rule": "command", "options": {"argv": argv}} for name, argv in waits.items()}
    content = {"qbuild": 1, "name": "kills", "artifacts": steps}
    (project / "r.yaml").write_text(json.dumps(content))
    first = _WORKERS[0] if _WORKERS and _WORKERS[0].process.poll() is None else crew.worker()
    build = crew.qbuild(project, "r.yaml")
    who_runs([first], gate)
    second = crew.worker(cpus=2)
    _WORKERS[:] = [first, second]
    until(lambda: len(second.runs(str(gate))) == 2, "two steps on the worker that came")
    gate.touch()
    assert build.process.wait(60) == 0, build.text


def test_step_that_kills_its_workers_is_given_up_and_says_so(
    crew: Crew, workers: list[Running], project: Path
) -> None:
    gate = write_recipe(project)
    build = crew.qbuild(project, "r.yaml")
    first = who_runs(workers, gate)
    first.kill()
    second = who_runs([each for each in workers if each is not first], gate)
    second.kill()
    assert build.process.wait(60) == 1
    assert "error: late: 2 workers died one after another while they ran it" in build.text
    assert journal(project) == ["early"]


def test_ctrl_c_ends_what_runs_on_workers(
    crew: Crew, workers: list[Running], project: Path
) -> None:
    gate = write_recipe(project)
    build = crew.qbuild(project, "r.yaml")
    steps = who_runs(workers, gate).runs(str(gate))
    assert interrupt(build) == 130
    until(lambda: all_gone(steps), "end of the step's processes", GONE)
    assert "interrupted; finished steps are kept" in build.text
    assert journal(project) == ["early"]


def test_steps_of_a_killed_qbuild_are_ended(
    crew: Crew, workers: list[Running], project: Path
) -> None:
    gate = write_recipe(project)
    build = crew.qbuild(project, "r.yaml")
    steps = who_runs(workers, gate).runs(str(gate))
    build.kill()
    until(lambda: all_gone(steps), "end of the step's processes", GONE)
    gate.touch()
    again = crew.qbuild(project, "r.yaml")
    assert again.process.wait(60) == 0, again.text
    assert journal(project) == ["early", "late"]


def test_lost_scheduler_is_an_error_and_the_same_command_goes_on(
    tmp_path: Path, project: Path
) -> None:
    gate = write_recipe(project)
    (tmp_path / "one").mkdir()
    with crew_in(tmp_path / "one") as crew:
        worker = crew.worker()
        build = crew.qbuild(project, "r.yaml")
        steps = who_runs([worker], gate).runs(str(gate))
        crew.scheduler.kill()
        assert build.process.wait(60) == 1
        assert f"the scheduler at {crew.url.replace('dask:', 'tcp:')} is gone" in build.text
        assert "run the same command again" in build.text
        assert "Traceback" not in build.text, build.text
        # The worker has nobody to work for any more.
        assert worker.process.wait(60) == 1
        assert "is gone; so is this worker" in worker.text
        until(lambda: all_gone(steps), "end of the step's processes", GONE)
    assert journal(project) == ["early"]
    gate.touch()
    (tmp_path / "two").mkdir()
    with crew_in(tmp_path / "two") as crew:
        crew.worker()
        build = crew.qbuild(project, "r.yaml")
        assert build.process.wait(60) == 0, build.text
    assert journal(project) == ["early", "late"]
