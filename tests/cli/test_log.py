"""`qbuild log`: what steps said, and how they ended."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.cli.conftest import RECIPE, Qbuild, environment

TALK = "  talk: {rule: command, inputs: {i: a}, options: {argv: [sh, -c, %s, '${out}']}}\n"
FINE = "'echo out; echo err >&2; echo x > $0'"
BAD = "'echo went wrong; exit 7'"


def recipe(project: Path, does: str) -> None:
    (project / "tiny.yaml").write_text(RECIPE + TALK % does)


def run_of(qbuild: Qbuild, step: str) -> dict[str, object]:
    (run,) = json.loads(qbuild("log", "--json", step).stdout)
    return dict(run)


def test_log_prints_both_streams_of_the_last_run_on_standard_output(
    qbuild: Qbuild, project: Path
) -> None:
    recipe(project, FINE)
    qbuild("all", "tiny.yaml")
    done = qbuild("log", "talk")
    assert (done.returncode, done.stdout) == (0, "out\nerr\n")
    assert done.stderr.startswith("talk: made 20")
    run = run_of(qbuild, "talk")
    assert (run["how"], run["exit"], run["error"]) == ("made", 0, "")


def test_log_of_a_failed_step_is_kept_with_its_exit_status(qbuild: Qbuild, project: Path) -> None:
    recipe(project, BAD)
    assert qbuild("all", "tiny.yaml", "-k").returncode == 1
    done = qbuild("log", "talk")
    assert done.stdout == "went wrong\n"
    assert "talk: failed 20" in done.stderr
    assert "sh ended with exit status 7" in done.stderr
    assert [run_of(qbuild, "talk")[name] for name in ("how", "exit", "signal")] == ["failed", 7, 0]
    recipe(project, FINE)
    qbuild("all", "tiny.yaml")
    assert run_of(qbuild, "talk")["how"] == "made"


def test_list_has_a_line_for_each_step_that_has_run(qbuild: Qbuild, project: Path) -> None:
    recipe(project, BAD)
    qbuild("build", "tiny.yaml", "a", "talk")
    lines = qbuild("log").stdout.splitlines()
    assert lines[0].split() == ["step", "how", "exit", "ended", "time", "memory"]
    assert [line.split()[:3] for line in lines[1:]] == [["a", "made", "0"], ["talk", "failed", "7"]]


def test_output_names_its_step_and_what_never_ran_says_so(qbuild: Qbuild, project: Path) -> None:
    qbuild("build", "tiny.yaml", "a")
    assert qbuild("log", "sub/c").stderr == "sub/c: it has not run in this build folder\n"
    assert qbuild("log", "nothing").returncode == 2
    several = qbuild("log", "a", "b")
    assert several.returncode == 2
    assert "means 2 steps" in several.stderr


def test_restored_step_says_that_its_log_was_not_kept(project: Path) -> None:
    recipe(project, "'sleep 0.2; echo x > $0'")
    for words in (["all", "tiny.yaml"], ["clean", "talk"], ["all"]):
        with_store(project, *words)
    said = with_store(project, "log", "talk").stderr
    assert "talk: restored from a store" in said
    assert "was not kept" in said


def with_store(project: Path, *words: str) -> subprocess.CompletedProcess[str]:
    variables = {**environment(project), "QBUILD_CACHE": str(project / "store")}
    return subprocess.run(
        [sys.executable, "-m", "buildsys", *words],
        cwd=project,
        env=variables,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )


def test_log_follows_a_running_step_to_its_end(qbuild: Qbuild, project: Path) -> None:
    gate = project / "gate"
    os.mkfifo(gate)
    recipe(project, f"'echo first; cat {gate}; echo last; echo x > $0'")
    command = [sys.executable, "-m", "buildsys"]
    given = {"cwd": project, "env": environment(project), "text": True}
    with (
        subprocess.Popen([*command, "all", "tiny.yaml"], **given) as build,  # type: ignore[call-overload]
        gate.open("w") as held,  # opens when the step reads
        subprocess.Popen(
            [*command, "log", "talk", "-f"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            **given,  # type: ignore[call-overload]
        ) as log,
    ):
        assert log.stdout.readline() == "first\n"
        assert run_of(qbuild, "talk")["how"] == "running"
        held.write("second\n")
        held.close()
        rest, said = log.communicate(timeout=60)
        assert rest == "second\nlast\n"
        assert "talk: made" in said
        assert build.wait(60) == 0


def test_run_that_was_killed_is_told_as_interrupted(qbuild: Qbuild, project: Path) -> None:
    gate = project / "gate"
    os.mkfifo(gate)
    recipe(project, f"'echo first; cat {gate}'")
    with (
        subprocess.Popen(
            [sys.executable, "-m", "buildsys", "build", "tiny.yaml", "talk"],
            cwd=project,
            env=environment(project),
            stderr=subprocess.DEVNULL,
        ) as build,
        gate.open("w"),
    ):
        build.terminate()
        assert build.wait(60) == 143
    assert run_of(qbuild, "talk")["how"] == "interrupted"
    assert qbuild("log", "talk").stdout == "first\n"
