"""The standing answer: "nothing to do" without plan and journal, and never when it is not so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from buildsys.engine.lock import BuildLock
from tests.cli.conftest import Qbuild, environment, project, qbuild

__all__ = ["project", "qbuild"]  # the fixtures

RECIPE = """\
qbuild: 1
name: tiny
sources: {src: {file: src.txt}, more: {folder: more}}
artifacts:
  a: {rule: command, inputs: {i: src}, options: {argv: [cp, "${in.i}", "${out}"]}}
  t:
    rule: command
    inputs: {i: a, m: more}
    temporary: true
    options: {argv: [cp, "${in.i}", "${out}"]}
  tree/:
    rule: command
    inputs: {i: t}
    options: {argv: [sh, -c, 'mkdir -p "$2/x"; cp "$1" "$2/x/y"', sh, "${in.i}", "${out}"]}
  run.sh: {rule: script, options: {template: run.sh.j2}}
  gone: {rule: command, optional: true, resources: {gpu: 99}, options: {argv: [cp, "${out}"]}}
"""
TOLD = "nothing to do: 4 artifacts are up to date\n"


@pytest.fixture
def settled(project: Path, qbuild: Qbuild) -> Path:
    """A project that was built, with its answer."""
    (project / "more/deep").mkdir(parents=True)
    (project / "more/deep/file").write_text("more\n")
    (project / "templates").mkdir()
    (project / "templates/run.sh.j2").write_text("#!/bin/sh\necho hello\n")
    (project / "tiny.yaml").write_text(RECIPE)
    assert qbuild("all", "tiny.yaml").returncode == 0
    assert qbuild("all", "tiny.yaml").stdout == TOLD
    assert (project / "build/tiny/.qbuild/answer").is_file()
    return project


def own(project: Path, name: str) -> Path:
    return project / "build/tiny/.qbuild" / name


def test_answer_reads_neither_plan_nor_journal(settled: Path, qbuild: Qbuild) -> None:
    header = own(settled, "plan").read_bytes().splitlines()[0]
    own(settled, "plan").write_bytes(header + b"\nnot JSON")
    done = qbuild("all", "tiny.yaml")
    assert done.stdout == TOLD
    assert "skipped gone: it needs 99 GPU" in done.stderr


def rewrite(path: Path, text: str) -> None:
    """Other bytes of the same length, with the old times: only ctime tells."""
    before = path.stat()
    assert len(text) == before.st_size
    path.write_text(text)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


DISTURBED: dict[str, tuple[Callable[[Path], object], str]] = {
    "a source is edited": (lambda p: rewrite(p / "src.txt", "two\n"), "built 3\n"),
    "a file deep in a source is new": (
        lambda p: (p / "more/deep/new").write_text("x"),
        "built 1\n",
    ),
    "an output is edited": (lambda p: rewrite(p / "build/tiny/a", "two\n"), "built 1\n"),
    "an output is gone": (lambda p: (p / "build/tiny/run.sh").unlink(), "built 1\n"),
    "a file in an output's folder is edited": (
        lambda p: rewrite(p / "build/tiny/tree/x/y", "two\n"),
        "built 1\n",
    ),
    "a file in an output's folder is new": (
        lambda p: (p / "build/tiny/tree/x/z").write_text("x"),
        "built 1\n",
    ),
    "a template is edited": (
        lambda p: edit(p / "templates/run.sh.j2", "hello", "there"),
        "built 1\n",
    ),
    "an option is edited": (lambda p: edit(p / "tiny.yaml", "mkdir -p", "mkdir -vp"), "built 1\n"),
    "a temporary artifact lies there again": (
        lambda p: (p / "build/tiny/t").write_text("one\n"),
        TOLD,
    ),
    "a killed build left its staging folder": (
        lambda p: own(p, "staging/left").mkdir(),
        TOLD,
    ),
    "the answer is torn": (lambda p: os.truncate(own(p, "answer"), 100), TOLD),
    "the answer is another version's": (
        lambda p: own(p, "answer").write_text(
            json.dumps({**json.loads(own(p, "answer").read_text()), "version": 0})
        ),
        TOLD,
    ),
}


@pytest.mark.parametrize("what", DISTURBED)
def test_no_answer_stands_when(settled: Path, qbuild: Qbuild, what: str) -> None:
    disturb, said = DISTURBED[what]
    disturb(settled)
    done = qbuild("all", "tiny.yaml")
    assert (done.returncode, done.stdout) == (0, said)
    assert not list(own(settled, "staging").iterdir())
    assert not (settled / "build/tiny/t").exists()
    assert qbuild("all", "tiny.yaml").stdout == TOLD


def test_build_leaves_the_answer_for_the_next(settled: Path, qbuild: Qbuild) -> None:
    (settled / "src.txt").write_text("three\n")
    assert qbuild("all", "tiny.yaml").stdout == "built 3\n"
    header = own(settled, "plan").read_bytes().splitlines()[0]
    own(settled, "plan").write_bytes(header + b"\nnot JSON")
    assert qbuild("all", "tiny.yaml").stdout == TOLD


def test_source_that_was_touched_is_read_once(settled: Path, qbuild: Qbuild) -> None:
    (settled / "src.txt").touch()
    touched = (settled / "src.txt").stat().st_mtime_ns

    def remembered() -> object:
        if not own(settled, "stamps").exists():
            return None  # nothing in the project was old enough yet
        files = json.loads(own(settled, "stamps").read_text())["files"]
        return files.get(str(settled / "src.txt"), [None] * 4)[3]

    deadline = time.monotonic() + 60
    while remembered() != touched:  # not before the clock of the file system is past it
        assert qbuild("all", "tiny.yaml").stdout == TOLD
        assert time.monotonic() < deadline


SLOW = """\
qbuild: 1
name: tiny
sources: {src: {file: src.txt}}
artifacts:
  a: {rule: command, inputs: {i: src}, options: {argv: [cp, "${in.i}", "${out}"]}}
  b:
    rule: command
    inputs: {i: a}
    options:
      argv:
        - sh
        - -c
        - while [ ! -e "$2" ]; do sleep 0.05; done; cp "$0" "$1"
        - ${in.i}
        - ${out}
        - GATE
"""


def test_source_that_was_edited_while_another_step_ran_is_noticed(
    project: Path, qbuild: Qbuild
) -> None:
    """What the answer rests on is looked up when the build ends: a is stale by then."""
    gate = project / "gate"
    (project / "tiny.yaml").write_text(SLOW.replace("GATE", str(gate)))
    with subprocess.Popen(
        [sys.executable, "-m", "buildsys", "all", "tiny.yaml"],
        cwd=project,
        env=environment(project),
        stderr=subprocess.DEVNULL,
    ) as build:
        deadline = time.monotonic() + 60
        while not (project / "build/tiny/a").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        (project / "src.txt").write_text("two\n")
        gate.touch()
        assert build.wait(60) == 0
    assert qbuild("all", "tiny.yaml").stdout == "built 2\n"
    assert (project / "build/tiny/b").read_text() == "two\n"


def test_gate_on_a_figure_that_is_not_there_is_told_after_what_was_built(
    project: Path, qbuild: Qbuild
) -> None:
    step = 'a: {rule: command, options: {argv: [sh, -c, "echo {} > $0", "${out}"]}}'
    text = f"qbuild: 1\nname: tiny\nartifacts:\n  {step}\ngates: {{a: {{missing: 1}}}}\n"
    (project / "tiny.yaml").write_text(text)
    done = qbuild("all", "tiny.yaml")
    assert done.stdout == "built 1\n"
    assert "a has no figure 'missing'" in done.stderr


def test_damaged_journal_is_told_each_time_until_it_is_mended(
    settled: Path, qbuild: Qbuild
) -> None:
    data = bytearray(own(settled, "journal").read_bytes())
    data[20] ^= 1
    own(settled, "journal").write_bytes(data)
    done = qbuild("all", "tiny.yaml")
    assert "the journal is damaged (line 1)" in done.stderr


def test_build_that_runs_is_waited_for_and_not_answered_past(settled: Path, qbuild: Qbuild) -> None:
    lock = BuildLock(str(own(settled, "lock")), lambda line: None)
    assert lock.try_acquire()
    other = BuildLock(str(own(settled, "lock")), lambda line: None)
    assert not other.try_acquire()
    lock.release()
    assert other.try_acquire()
    other.release()


def test_quiet_build_says_nothing(settled: Path, qbuild: Qbuild) -> None:
    done: subprocess.CompletedProcess[str] = qbuild("all", "tiny.yaml", "-q")
    assert (done.stdout, done.stderr) == ("", "")
