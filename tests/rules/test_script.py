"""The promises of rule `script`: no value becomes a command, nothing undefined slips through."""

from __future__ import annotations

import ast
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from buildsys.errors import StepError
from buildsys.rules.script import find_template, render

NASTY = [
    "a b",
    "$(id)",
    "`id`",
    "it's",
    '"; id; "',
    "two\nlines",
    "\\",
    "*",
    "-rf /",
    "~",
    "ü€",
    "",
]


def run(script: str) -> str:
    shell = shutil.which("dash") or "sh"
    return subprocess.run([shell, "-c", script], capture_output=True, check=True).stdout.decode()


@pytest.mark.parametrize("value", NASTY)
def test_values_stay_one_word(value: str):
    assert run(render("printf '%s|' {{ value }} end", {"value": value}, "t")) == f"{value}|end|"


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(blacklist_characters="\0", blacklist_categories=["Cs"]), max_size=30))
def test_no_text_becomes_a_command(value: str):
    script = render("X={{ x }}\nprintf '%s' \"$X\"\n", {"x": value}, "t")
    assert run(script) == value


def test_lists_become_words_and_numbers_stay():
    text = render(
        "run {{ models }} -n {{ n }} {{ on }}", {"models": NASTY[:2], "n": 4, "on": True}, "t"
    )
    assert text == "run 'a b' '$(id)' -n 4 true"


def test_raw_is_raw_until_something_is_done_to_it():
    assert render("{{ x | raw }}", {"x": "a && b"}, "t") == "a && b"
    assert render("{{ (x | raw) ~ '; id' }}", {"x": "a"}, "t") == "'a; id'"


@pytest.mark.parametrize(
    "template",
    [
        "echo '{{ x }}'",
        'echo "{{ x }}"',
        'echo "$(cmd "{{ x }}")"',
        "# for {{ x }}",
        "echo a # {{ x }}",
        "echo `cmd {{ x }}`",
        "echo ${y:-{{ x }}}",
        'echo "${y:-"{{ x }}"}"',
        "echo $(({{ x }} + 1))",
        "cat <<EOF\n{{ x }}\nEOF\n",
        "cat <<-'END' | tee f\nline\n\t{{ x }}\n\tEND\n",
        "cat <<{{ x }}",
        "echo \\{{ x }}",
        "echo $'{{ x }}'",
        'x="$(case a in a) echo "{{ x }}";; esac)"',
    ],
)
def test_a_value_where_quotes_do_not_quote_is_refused(template: str):
    with pytest.raises(StepError, match=r"t:\d+: "):
        render(template, {"x": "y"}, "t")


@pytest.mark.parametrize(
    "template",
    [
        "echo 'it' {{ x }}",
        'echo "a" {{ x }} "b"',
        "# don't\necho {{ x }}",
        "cat <<EOF\nit's\nEOF\necho {{ x }}",
        "cat <<A <<-B\nit's\nA\n\t`\n\tB\necho {{ x }}",
        'echo "$(cmd "$0")" {{ x }}',
        'echo "$(cmd {{ x }})"',
        "echo $((1 + 2)) ${y:-z} `id` {{ x }}",
        "echo a#{{ x }}",
        "case a in a) echo {{ x }};; esac",
        "echo \\' {{ x }}",
    ],
)
def test_a_value_among_words_is_welcome(template: str):
    assert "'$(id)'" in render(template, {"x": "$(id)"}, "t")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("a\n{{ nothing }}", "'nothing' is undefined"),
        ("a\n{% if %}", "t:2:"),
        ("{% include 'other' %}", "loader"),
        ("{{ x.__class__.__mro__ }}", "unsafe"),
        ("{{ none }}", "no text"),
        ("{{ {'a': 1} }}", "no text"),
        ("{{ zero }}", "NUL"),
    ],
)
def test_what_cannot_be_written_is_an_error(template: str, message: str):
    with pytest.raises(StepError, match=message):
        render(template, {"x": "y", "zero": "a\0b"}, "t")


def test_unknown_template_names_those_there_are():
    with pytest.raises(StepError, match=r"run_cpu\.sh\.j2"):
        find_template("run_gpu.sh.j2")


def deployed(make: Callable[..., Any], **variables: Any) -> Path:
    options = {"template": "run_cpu.sh.j2", "program": "demo qwen", "model": "it's.mllm"}
    script: Path = make("script", "run.sh", {}, {**options, **variables}).out
    for name in ("it's.mllm", "vocab.mllm", "merges.txt"):
        (script.parent / name).touch()
    program = script.parent / "demo qwen"
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$PWD" "$@"\n')
    program.chmod(0o755)
    return script


def test_run_cpu_starts_the_demo_with_the_files_beside_it(make: Callable[..., Any], tmp_path: Path):
    script = deployed(make, billion="1.5b", limit=800)
    assert script.stat().st_mode & 0o777 == 0o755
    for shell in filter(None, (shutil.which("dash"), shutil.which("bash"))):
        subprocess.run([shell, "-n", str(script)], check=True)
    done = subprocess.run(
        [str(script), "-x", "a b"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [
        str(script.parent), "--vocab", "./vocab.mllm", "--merge", "./merges.txt",
        "--model", "./it's.mllm", "--limits", "800", "--thread", "4", "-x", "a b",
        "--billion", "1.5b",
    ]  # fmt: skip


def test_run_cpu_names_the_file_that_is_missing(make: Callable[..., Any]):
    script = deployed(make)
    (script.parent / "merges.txt").unlink()
    done = subprocess.run([str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert "merges.txt is missing" in done.stderr


@pytest.mark.parametrize(
    "value", [*NASTY, ["a", 1], {"k": [True, None]}, 4, 1.5, None, '"""', "\\'"]
)
def test_a_python_templates_values_are_literals(value: Any):
    script = render("X = {{ x }}\n", {"x": value}, "t.py.j2")
    scope: dict[str, Any] = {}
    exec(compile(script, "t.py", "exec"), scope)
    assert scope["X"] == value


@pytest.mark.parametrize(
    "source",
    [
        "X = '{{ x }}'\n",
        'X = """\n{{ x }}\n"""\n',
        "# {{ x }}\n",
        "X = a{{ x }}\n",
        "X = f'{{ '{' }}{ {{ x }} }'\n",
    ],
)
def test_a_python_templates_value_inside_a_string_is_refused(source: str):
    with pytest.raises(StepError):
        render(source, {"x": "1"}, "t.py.j2")


def test_the_shipped_python_script_is_python_whatever_is_given():
    source = find_template("run_mblt.py.j2").read_text(encoding="utf-8")
    variables = {"model": 'it\'s "m"', "prompt": '"""\n', "mxq": ["a b.mxq"], "tokens": 3}
    script = render(source, variables, "run_mblt.py.j2")
    names = {
        each.targets[0].id: ast.literal_eval(each.value)
        for each in ast.parse(script).body
        if isinstance(each, ast.Assign) and isinstance(each.targets[0], ast.Name)
    }
    assert names["FOLDER"] == variables["model"]
    assert names["PROMPT"] == variables["prompt"]
    assert names["MXQ"] == ["a b.mxq"]
