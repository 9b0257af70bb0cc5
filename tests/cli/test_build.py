"""The verbs of a build, with real recipes, real programs and the real executor."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import RECIPE, Qbuild, environment

UP_TO_DATE = "nothing to do: 3 artifacts are up to date\n"


def artifacts(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file() and ".qbuild" not in path.parts)
    return {str(path.relative_to(folder)): path.read_text() for path in files}


def edit(project: Path, old: str, new: str) -> None:
    text = (project / "tiny.yaml").read_text()
    assert old in text
    (project / "tiny.yaml").write_text(text.replace(old, new))


def test_all_builds_and_the_second_time_there_is_nothing_to_do(
    qbuild: Qbuild, project: Path
) -> None:
    first = qbuild("all", "tiny.yaml")
    assert (first.returncode, first.stdout) == (0, "built 3\n")
    assert artifacts(project / "build/tiny") == {
        "a": "one\n",
        "b": "one\nhello\n",
        "sub/c": "one\nhello\n",
    }
    second = qbuild("all", "tiny.yaml")
    assert (second.returncode, second.stdout, second.stderr) == (0, UP_TO_DATE, "")


def test_build_whose_standard_streams_are_closed(project: Path) -> None:
    done = subprocess.run(
        ["sh", "-c", '"$0" -m buildsys all tiny.yaml <&- >&- 2>&-', sys.executable],
        cwd=project,
        env=environment(project),
        timeout=120,
    )
    assert done.returncode == 0
    assert artifacts(project / "build/tiny")["sub/c"] == "one\nhello\n"


def test_null_build_imports_nothing_heavy(qbuild: Qbuild, project: Path) -> None:
    assert qbuild("all", "tiny.yaml").returncode == 0
    code = (
        "import sys; from buildsys.cli.main import main; code = main(['all', 'tiny.yaml']); "
        "print('\\n'.join(sys.modules)); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=project,
        env=environment(project),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith(UP_TO_DATE)
    heavy = {"torch", "doit", "jinja2", "jsonschema", "yaml", "numpy", "transformers", "rich"}
    heavy |= {"dataclasses", "pathlib", "logging", "subprocess", "importlib.metadata", "ast"}
    heavy |= {f"buildsys.engine.{name}" for name in ("trace", "traced", "events", "forecast")}
    assert heavy & set(done.stdout.split()) == set()


def test_comment_in_the_recipe_rebuilds_nothing(qbuild: Qbuild, project: Path) -> None:
    qbuild("all", "tiny.yaml")
    edit(project, "artifacts:", "# what is made\nartifacts:")
    assert qbuild("all", "tiny.yaml").stdout == UP_TO_DATE


def test_why_names_the_option_and_both_values(qbuild: Qbuild, project: Path) -> None:
    qbuild("all", "tiny.yaml")
    edit(project, "word: hello", "word: bye")
    assert qbuild("why", "tiny.yaml", "b").stdout == (
        'b would be built:\n  option \'argv\', item 7: "hello" -> "bye"\n'
    )
    assert qbuild("why", "sub/c").stdout == (
        "sub/c may be built:\n"
        "  reads b, which is to be made\n"
        '  b would be built: option \'argv\', item 7: "hello" -> "bye"\n'
    )
    (answer,) = json.loads(qbuild("why", "b", "--json").stdout)
    assert answer["state"] == "stale"
    assert answer["reasons"] == [{"text": "option 'argv', item 7", "old": "hello", "new": "bye"}]
    assert qbuild("all", "tiny.yaml").stdout == "built 2\n"
    assert "option 'argv', item 7" in qbuild("why", "b").stdout


def test_dry_run_says_what_would_run_and_changes_nothing(qbuild: Qbuild, project: Path) -> None:
    said = qbuild("all", "tiny.yaml", "-n")
    assert said.stdout.splitlines() == [
        "would run a: never built",
        "would run b: never built",
        "would run sub/c: never built",
        "never run here, so of unknown time and size: a, b, sub/c",
    ]
    assert not (project / "build").exists()


def test_status_shows_every_state_and_takes_no_lock(qbuild: Qbuild, project: Path) -> None:
    qbuild("all", "tiny.yaml")
    edit(project, "word: hello", "word: bye")
    optional = "  q: {rule: command, toolchain: none-such, optional: true, inputs: {i: src}, "
    edit(project, "  a: {", f"{optional}options: {{argv: [x]}}}}\n  a: {{")
    rows = {row["artifact"]: row for row in json.loads(qbuild("status", "--json").stdout)}
    states = {name: row["state"] for name, row in rows.items()}
    assert states == {"q": "skipped", "a": "fresh", "b": "stale", "sub/c": "unsure"}
    assert "may run  sub/c" in qbuild("status").stdout


def test_artifact_that_left_the_recipe_is_listed_and_cleaned(qbuild: Qbuild, project: Path) -> None:
    qbuild("all", "tiny.yaml")
    lines = (project / "tiny.yaml").read_text().splitlines(keepends=True)
    (project / "tiny.yaml").write_text("".join(lines[:-1]))
    assert "orphan   sub/c  the recipe no longer makes it" in qbuild("status").stdout
    assert qbuild("all", "tiny.yaml").stdout == "nothing to do: 2 artifacts are up to date\n"
    assert qbuild("clean", "tiny.yaml", "--stale").stdout == "removed sub/c\n"
    assert not (project / "build/tiny/sub").exists()
    assert "orphan" not in qbuild("status").stdout


def test_clean_removes_the_artifacts_and_a_build_brings_them_back(
    qbuild: Qbuild, project: Path
) -> None:
    qbuild("all", "tiny.yaml")
    before = artifacts(project / "build/tiny")
    assert qbuild("clean", "b").stdout == "removed b\n"
    assert qbuild("clean").stdout == "removed a\nremoved sub/c\n"
    assert artifacts(project / "build/tiny") == {}
    qbuild("all", "tiny.yaml")
    assert artifacts(project / "build/tiny") == before


def test_recipe_of_the_last_build_is_the_one_that_is_meant(qbuild: Qbuild) -> None:
    qbuild("all", "tiny.yaml")
    assert qbuild("all").stdout == UP_TO_DATE


def test_defines_are_remembered_and_another_value_is_refused(qbuild: Qbuild, project: Path) -> None:
    qbuild("all", "tiny.yaml", "-D", "word=bye")
    again = qbuild("all", "tiny.yaml")
    assert again.stdout == UP_TO_DATE
    assert again.stderr == "using -D word=bye, which this build folder was made with\n"
    other = qbuild("all", "tiny.yaml", "-D", "word=other")
    assert other.returncode == 2
    assert "was made with -D word=bye, not with -D word=other" in other.stderr
    assert "--build-dir" in other.stderr
    assert "qbuild clean --all" in other.stderr
    elsewhere = qbuild("all", "tiny.yaml", "-D", "word=other", "--build-dir", "out")
    assert elsewhere.returncode == 0
    assert (project / "out/b").read_text() == "one\nother\n"
    assert qbuild("clean", "tiny.yaml", "--all").returncode == 0
    assert qbuild("all", "tiny.yaml", "-D", "word=other").stdout == "built 3\n"


def test_moved_project_rebuilds_nothing(qbuild: Qbuild, project: Path, tmp_path: Path) -> None:
    qbuild("all", "tiny.yaml", "-D", "word=bye")
    moved = tmp_path / "elsewhere"
    shutil.move(project, moved)
    assert qbuild("all", folder=moved).stdout == UP_TO_DATE


def test_mistake_in_the_recipe_builds_nothing(qbuild: Qbuild, project: Path) -> None:
    qbuild("all", "tiny.yaml")
    before = artifacts(project / "build/tiny")
    edit(project, "rule: command, inputs: {i: src}", "rule: comand, inputs: {i: src}")
    done = qbuild("all", "tiny.yaml")
    assert done.returncode == 2
    assert "tiny.yaml:6:" in done.stderr
    assert "^" in done.stderr
    assert artifacts(project / "build/tiny") == before


def test_missing_source_is_located(qbuild: Qbuild, project: Path) -> None:
    qbuild("all", "tiny.yaml")
    (project / "src.txt").unlink()
    done = qbuild("all", "tiny.yaml")
    assert (done.returncode, "tiny.yaml:4:" in done.stderr) == (2, True)


FAILING = {
    "exit status 3": "echo what went wrong >&2; exit 3",
    "signal SIGKILL": "echo what went wrong >&2; kill -9 $$",
    "signal SIGSEGV": "echo what went wrong >&2; kill -11 $$",
}


@pytest.mark.parametrize("how", FAILING)
def test_failure_shows_how_it_ended_its_memory_and_the_end_of_its_log(
    qbuild: Qbuild, project: Path, how: str
) -> None:
    command = f'[sh, -c, "echo half > $0; {FAILING[how]}", "${{out}}"]'
    (project / "tiny.yaml").write_text(
        RECIPE + f"  bad: {{rule: command, inputs: {{i: src}}, options: {{argv: {command}}}}}\n"
        "  worse: {rule: command, inputs: {i: bad}, options: {argv: [cp, '${in.i}', '${out}']}}\n"
    )
    done = qbuild("all", "tiny.yaml", "-k")
    assert done.returncode == 1
    assert "error: bad: " in done.stderr
    assert how in done.stderr
    assert "peak memory" in done.stderr
    assert "| what went wrong" in done.stderr
    assert "not tried, for want of these: worse" in done.stderr
    assert set(artifacts(project / "build/tiny")) == {"a", "b", "sub/c"}
    assert list((project / "build/tiny/.qbuild/staging").iterdir()) == []


def test_without_k_the_summary_names_what_was_not_started(qbuild: Qbuild, project: Path) -> None:
    fails = "{rule: command, inputs: {i: src}, options: {argv: [sh, -c, exit 3, '${out}']}}"
    (project / "tiny.yaml").write_text(RECIPE.replace("  a: {", f"  bad: {fails}\n  a: {{"))
    done = qbuild("all", "tiny.yaml", "-j", "1")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "built 1; failed: bad; not started: b, sub/c"


def test_error_of_a_file_says_error_once(qbuild: Qbuild, project: Path) -> None:
    (project / "w.safetensors").write_bytes(b"not a checkpoint")
    (project / "tiny.yaml").write_text(
        "qbuild: 1\nname: tiny\nsources: {w: {file: w.safetensors}}\nartifacts:\n"
        "  w.mllm: {rule: mllm-file, inputs: {checkpoint: w}, options: {version: 2}}\n"
    )
    done = qbuild("all", "tiny.yaml")
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: w.mllm")]
    assert line.startswith(f"error: w.mllm: {project}/w.safetensors: ")
    assert line.count("error:") == 1


def test_gate_fails_every_build_with_the_number_and_rebuilds_nothing(
    qbuild: Qbuild, project: Path
) -> None:
    figures = '{"variants": {"v": {"drop": 0.5}}}'
    gate = 'gates: {m.json: {"v drop": "${limit}"}}\n'
    (project / "figures.txt").write_text(figures)
    edit(project, "sources: {", "sources: {figures: {file: figures.txt}, ")
    edit(project, "limit: 10", "limit: 0.25")
    text = (project / "tiny.yaml").read_text()
    copy = "{rule: command, inputs: {i: figures}, options: {argv: [cp, '${in.i}', '${out}']}}"
    line = f"  m.json: {copy}\n"
    (project / "tiny.yaml").write_text(text + line + gate)
    for _ in range(2):
        done = qbuild("all", "tiny.yaml")
        assert done.returncode == 1
        assert "error: gate fails: m.json v drop = 0.5 > 0.25" in done.stderr
    assert (project / "build/tiny/m.json").read_text() == figures
    edit(project, "limit: 0.25", "limit: 0.75")
    done = qbuild("all", "tiny.yaml")
    assert (done.returncode, done.stdout[:13]) == (0, "nothing to do")


SLOW = "  slow: {rule: command, inputs: {i: b}, options: {argv: [sh, -c, 'mkfifo p; cat p']}}\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_keeps_what_is_finished_and_ends_every_child(
    qbuild: Qbuild, project: Path, number: signal.Signals
) -> None:
    (project / "tiny.yaml").write_text(RECIPE + SLOW)
    with subprocess.Popen(
        [sys.executable, "-m", "buildsys", "all", "tiny.yaml", "-v"],
        cwd=project,
        env=environment(project),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        seen = []
        for line in process.stderr:  # until all that can end has ended, and the rest has begun
            seen.append(line)
            if "sub/c (" in "".join(seen) and "slow:" in "".join(seen):
                break
        process.send_signal(number)
        process.communicate(timeout=20)
    assert process.returncode == 128 + number
    assert set(artifacts(project / "build/tiny")) == {"a", "b", "sub/c"}
    (project / "tiny.yaml").write_text(RECIPE)
    assert qbuild("all", "tiny.yaml").stdout == UP_TO_DATE


def test_killed_build_is_taken_up_where_it_was(qbuild: Qbuild, project: Path) -> None:
    (project / "tiny.yaml").write_text(RECIPE + SLOW)
    process = subprocess.Popen(
        [sys.executable, "-m", "buildsys", "all", "tiny.yaml", "-v"],
        cwd=project,
        env=environment(project),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    seen = ""
    while not ("sub/c (" in seen and "slow:" in seen):
        seen += process.stderr.readline()
    process.kill()
    process.communicate()
    (project / "tiny.yaml").write_text(RECIPE)
    assert qbuild("all", "tiny.yaml").stdout == UP_TO_DATE
    assert list((project / "build/tiny/.qbuild/staging").iterdir()) == []


def test_two_builds_at_once_take_turns(qbuild: Qbuild, project: Path) -> None:
    """One of them waits and then finds everything done."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "buildsys", "all", "tiny.yaml"],
            cwd=project,
            env=environment(project),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    said = sorted(process.communicate(timeout=60)[0] for process in processes)
    assert said == ["built 3\n", UP_TO_DATE]


def test_many_jobs_make_the_same_bytes(qbuild: Qbuild, project: Path) -> None:
    qbuild("all", "tiny.yaml", "-j", "1", "--build-dir", "one")
    qbuild("all", "tiny.yaml", "-j", "8", "--build-dir", "eight")
    assert artifacts(project / "one") == artifacts(project / "eight")


@pytest.mark.parametrize(
    ("words", "ran"),
    [
        (("build", "b", "--force"), ["b"]),
        (("build", "--force", "b"), ["b"]),
        (("build", "tiny.yaml", "--force", "a", "b"), ["a"]),
        (("all", "--force", "tiny.yaml"), ["a", "b", "sub/c"]),
        (("all", "tiny.yaml", "--force", "sub/c"), ["sub/c"]),
        (("all", "--force", "a", "--force", "sub/c"), ["a", "sub/c"]),
    ],
)
def test_force_runs_what_is_named_although_it_is_fresh(
    qbuild: Qbuild, words: tuple[str, ...], ran: list[str]
) -> None:
    qbuild("all", "tiny.yaml")
    done = qbuild(*words)
    assert (done.returncode, done.stdout) == (0, f"built {len(ran)}\n")
    assert sorted(line.split()[1] for line in done.stderr.splitlines()) == ran


def test_targets_may_stand_after_options(qbuild: Qbuild) -> None:
    done = qbuild("build", "tiny.yaml", "-D", "word=other", "b", "-j", "1", "a")
    assert (done.returncode, done.stdout) == (0, "built 2\n")
    wrong = qbuild("build", "tiny.yaml", "-j", "1", "b", "--nonsense")
    assert wrong.returncode == 2
    assert "unrecognized arguments: b --nonsense" in wrong.stderr


def test_a_folder_of_build_dir_never_stands_in_for_the_recipes_own(
    qbuild: Qbuild, project: Path
) -> None:
    qbuild("all", "tiny.yaml")
    qbuild("all", "tiny.yaml", "--build-dir", "build/other", "-D", "word=other")
    # The plan that the recipe's own folder remembers no longer holds; the other's still does.
    (project / "build/tiny/.qbuild/plan").write_text("")
    done = qbuild("all", "tiny.yaml")
    assert (done.returncode, done.stdout, done.stderr) == (0, UP_TO_DATE, "")
    status = qbuild("status", "--build-dir", "build/other")
    assert "using -D word=other" in status.stderr


def test_a_mistake_in_the_recipe_of_the_last_build_is_shown_with_its_path_from_here(
    qbuild: Qbuild, project: Path
) -> None:
    qbuild("build", "tiny.yaml", "a")
    edit(project, "name: tiny", "nam: tiny")
    for verb in ("check", "status"):
        done = qbuild(verb)
        assert (done.returncode, done.stderr.splitlines()[0]) == (
            2,
            "tiny.yaml:2:1: error: unknown key 'nam'",
        )
