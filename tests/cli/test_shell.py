"""`qbuild shell`: a step's place, for a person; nothing that happens there counts."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import RECIPE, Qbuild

PYTHON = """\
  R.bin: {rule: rotation, inputs: {model: model}, options: {vision: true}}
"""


def place(project: Path, step: str) -> Path:
    return project / "build/tiny/.qbuild/shell" / step


def test_program_runs_in_the_steps_place_with_its_environment(
    qbuild: Qbuild, project: Path
) -> None:
    environment = "    environment: {DECLARED: yes sir}\n"
    (project / "tiny.yaml").write_text(RECIPE.replace("  b:\n", "  b:\n" + environment))
    qbuild("build", "tiny.yaml", "a")
    script = "pwd; echo $HOME; echo $OMP_NUM_THREADS; echo $DECLARED; echo [$COLUMNS]"
    done = qbuild("shell", "b", "--", "sh", "-c", script)
    staging = place(project, "b") / "staging"
    assert done.stdout.splitlines() == [str(staging), str(staging), "1", "yes sir", "[]"]
    assert done.stderr.splitlines()[0].startswith("b runs: sh -c 'cat ")
    assert "reads i: build/tiny/a" in done.stderr
    assert "makes out: b" in done.stderr
    assert not place(project, "b").exists()  # nothing was made: nothing is left


def test_step_run_by_hand_makes_its_output_and_commits_nothing(
    qbuild: Qbuild, project: Path
) -> None:
    qbuild("build", "tiny.yaml", "a")
    done = qbuild("shell", "b", "--", "../run")
    assert done.returncode == 0
    assert (place(project, "b") / "staging/b").read_text() == "one\nhello\n"
    assert "nothing was committed" in done.stderr
    assert not (project / "build/tiny/b").exists()
    assert "stale    b" in qbuild("status").stdout
    assert qbuild("all").stdout == "built 2\n"
    qbuild("clean", "--all")
    assert not place(project, "b").exists()


def test_rule_in_python_runs_by_hand_with_the_same_bytes(
    qbuild: Qbuild, project: Path, qwen2vl_folder: Path
) -> None:
    sources = f"sources: {{model: {{model: {qwen2vl_folder}}}, "
    (project / "tiny.yaml").write_text(RECIPE.replace("sources: {", sources) + PYTHON)
    done = qbuild("shell", "tiny.yaml", "R.bin", "--", "../run")
    made = place(project, "R.bin") / "staging/R.bin"
    assert "R.bin runs: rule rotation" in done.stderr
    assert f"made out: {made}" in done.stdout
    by_hand = made.read_bytes()
    assert qbuild("build", "tiny.yaml", "R.bin").returncode == 0
    assert (project / "build/tiny/R.bin").read_bytes() == by_hand


def test_exit_code_is_the_programs(qbuild: Qbuild) -> None:
    qbuild("all", "tiny.yaml")
    assert qbuild("shell", "b", "--", "sh", "-c", "exit 9").returncode == 9
    assert qbuild("shell", "b", "--", "sh", "-c", "kill -9 $$").returncode == 137
    missing = qbuild("shell", "b", "--", "no-such-program")
    assert missing.returncode == 2
    assert "cannot run 'no-such-program'" in missing.stderr


@pytest.mark.parametrize("words", [(), ("a", "b"), ("nothing",)])
def test_shell_is_in_the_place_of_one_step(qbuild: Qbuild, words: tuple[str, ...]) -> None:
    qbuild("all", "tiny.yaml")
    assert qbuild("shell", *words, "--", "true").returncode == 2


def test_step_whose_inputs_are_not_there_names_them(qbuild: Qbuild) -> None:
    done = qbuild("shell", "tiny.yaml", "b", "--", "true")
    assert done.returncode == 2
    assert done.stderr == ("error: b reads a, which is not here, or stale\nqbuild build a\n")
