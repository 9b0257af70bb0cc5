"""The promises of rule `command`: an argument list, filled in, and a bare environment."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from buildsys.errors import Location, StepError
from buildsys.plan.graph import Plan, Ref, Step
from buildsys.rules import command as rule
from buildsys.rules.spec import Command


def rendered(step: Callable[..., Any], argv: list[str], **given: Any) -> Command:
    inputs = given.pop("inputs", {})
    options = {"argv": argv, "env": given.pop("env", {})}
    return rule.command(step("command", "out/made.txt", inputs, options, **given).context)


@pytest.mark.parametrize("name", ["plain", "a b", "$(id)", "`id`", "new\nline", "it's", "-rf", "ü"])
def test_paths_reach_the_program_as_they_are(step: Callable[..., Any], tmp_path: Path, name: str):
    source = tmp_path / name
    source.write_text(f"content of {name}")
    made = step("command", "copy.txt", {"src": source}, {"argv": ["cp", "${in.src}", "${out}"]})
    program = rule.command(made.context)
    subprocess.run(program.argv, env=dict(program.environment), check=True)
    assert made.out.read_text() == f"content of {name}"


def test_every_placeholder_is_filled_in(step: Callable[..., Any], tmp_path: Path):
    program = rendered(
        step,
        [
            "run",
            "--src=${in.src}",
            "${out}",
            "-j${jobs}",
            "${toolchain.root}/b",
            "$HOME $$ $${x}",
        ],
        inputs={"src": tmp_path / "s"},
        env={"SDK": "${toolchain.root}"},
        toolchain={"root": "/opt/sdk"},
    )
    out = program.argv[2]
    assert program.argv == (
        "run", f"--src={tmp_path / 's'}", out, "-j1", "/opt/sdk/b", "$HOME $$ ${x}"
    )  # fmt: skip
    assert out.endswith("out/made.txt")
    assert program.environment["SDK"] == "/opt/sdk"


def test_environment_is_bare(step: Callable[..., Any], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SECRET", "token")
    program = rendered(step, ["true"], environment={"LANG": "C"}, env={"MODE": "fast"})
    home = program.environment["HOME"]
    assert dict(program.environment) == {
        "PATH": os.environ["PATH"], "HOME": home, "LANG": "C", "MODE": "fast"
    }  # fmt: skip
    assert (Path(home) / "out").is_dir()


def test_many_inputs_become_many_arguments(step: Callable[..., Any], tmp_path: Path):
    files = [tmp_path / "a", tmp_path / "b c"]
    program = rendered(step, ["cat", "${in.files}"], inputs={"files": files})
    assert program.argv == ("cat", str(files[0]), str(files[1]))
    with pytest.raises(StepError, match="2 files inside one argument"):
        rendered(step, ["cat", "--files=${in.files}"], inputs={"files": files})


@pytest.mark.parametrize("text", ["${in.nothing}", "${out.nothing}", "${home}", "${}"])
def test_a_placeholder_without_meaning_is_an_error(step: Callable[..., Any], text: str):
    with pytest.raises(StepError, match=r"\$\{"):
        rendered(step, ["echo", text + " "])


@pytest.mark.parametrize("name", ["A=B", "", "A\0B"])
def test_a_variable_that_no_environment_can_hold_is_named(step: Callable[..., Any], name: str):
    with pytest.raises(StepError, match=r"no environment variable can be called"):
        rendered(step, ["true"], env={name: "x"})


def planned(argv: list[str], toolchain: str | None = None) -> Step:
    return Step(
        name="made.txt",
        rule="command",
        inputs={"src": (Ref("source", "text"),)},
        options={"argv": argv, "env": {"X": "${in.src}"}},
        outputs={"out": "made.txt", "log": "made.log"},
        optional=False,
        temporary=False,
        tags=(),
        threads=1,
        resources={},
        timeout=None,
        toolchain=toolchain,
        environment={},
        where=Location("r.yaml", 1, 1),
    )


def test_check_names_what_is_missing_before_anything_runs():
    plan = Plan("r", "r.yaml", {}, {}, {}, {}, (), {})
    good = planned(["cp", "${in.src}", "${out}", "${out.log}", "${jobs}", "$${x}"])
    assert list(rule.check(good, plan)) == []
    wrong = planned(["cp", "${in.scr}", "${out.lgo}", "${toolchain.root}", "${jbos}"])
    messages = [problem.message for problem in rule.check(wrong, plan)]
    assert messages == [
        "no input is called 'scr'",
        "no output is called 'lgo'",
        "${toolchain.root} is used, and the step has no toolchain",
        "unknown placeholder ${jbos}",
    ]
    assert all(problem.option == "argv" for problem in rule.check(wrong, plan))
