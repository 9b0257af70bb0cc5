"""Outputs that cannot be: two of one name, inside another, outside the build folder."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from buildsys.plan.graph import Plan
from tests.plan.conftest import RUN, caret

Load = Callable[..., Plan]
Refuse = Callable[..., str]


def test_two_artifacts_with_one_output_show_both_places(refuse_artifacts: Refuse) -> None:
    text = f"a: {RUN}\nb: {{rule: run, options: {{argv: [a]}}, outputs: {{x: a}}}}\n"
    line = "  b: {rule: run, options: {argv: [a]}, outputs: {x: a}}"
    assert refuse_artifacts(text) == caret(
        line,
        line.rindex("a") + 1,
        "two artifacts make 'a': 'a' (r.yaml:8:3) is the other",
        "give one of them another path under `outputs`",
        number=9,
    )


def test_default_outputs_of_two_artifacts_may_not_meet(refuse_artifacts: Refuse) -> None:
    text = """\
"${i}.json":
  matrix: {i: [1, 2]}
  rule: scales
  inputs: {model: model, samples: text}
  options: {level: 1}
"""
    found = refuse_artifacts(text)
    assert found.startswith(
        "r.yaml:8:3: error: two artifacts make 'histogram.json': '1.json' (r.yaml:8:3) is the other"
    )
    assert found.endswith("put every axis of its matrix into the name")


@pytest.mark.parametrize(
    ("first", "second", "says"),
    [
        ("A.txt", "a.txt", "outputs 'a.txt' and 'A.txt' (r.yaml:8:3) are one file where case does"),
        ("é", "e\u0301", "are one file where case does not count"),
        ("x", "x/y", "output 'x/y' lies inside 'x', which is a file that 'x' makes (r.yaml:8:3)"),
        ("x/y/z", "x", "output 'x/y/z' lies inside 'x', which is a file that 'x' makes"),
        ("x/", "x/y", "output 'x/y' lies inside 'x/', which is a folder that 'x/' makes"),
        ("X/", "x/y", "output 'x/y' lies inside 'X/', which is a folder that 'X/' makes"),
        ("x/", "x", "outputs 'x' and 'x/' (r.yaml:8:3) are one file"),
    ],
)
def test_outputs_that_cannot_stand_beside_each_other(
    refuse_artifacts: Refuse, first: str, second: str, says: str
) -> None:
    assert says in refuse_artifacts(f'"{first}": {RUN}\n"{second}": {RUN}\n')


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("../x", "leads out of the build folder"),
        ("a/../../x", "leads out of the build folder"),
        ("../../.ssh/authorized_keys", "leads out of the build folder"),
        ("/etc/passwd", "is an absolute path"),
        ("~/x", "begins with '~'"),
        ("", "an output needs a name"),
        ("/", "an output needs a name"),
        ("a//b", "has an empty part"),
        ("a/./b", "has an empty part"),
        ("-rf", "begins with '-'"),
        ("a/-rf", "begins with '-'"),
        (".qbuild", "is qbuild's own"),
        (".qbuild/journal", "is qbuild's own"),
        ("a/.QBuild/x", "is qbuild's own"),
        ("a\\nb", "has '\\n' in it"),
        ("a\\0b", "has '\\x00' in it"),
        ("a\\x1b[31m", "has '\\x1b' in it"),
        ("a\\u2028b", "has '\\u2028' in it"),
        ("a*", "has '*' in it"),
        ("C:\\\\x", "has ':' in it"),
        ("tag:qnn", "has ':' in it"),
        (" a", "begins or ends with a space"),
        ("a/b ", "begins or ends with a space"),
        ("x" * 300, "is too long"),
        ("é" * 150, "is too long"),
    ],
)
def test_an_output_stays_inside_the_build_folder(
    refuse_artifacts: Refuse, name: str, why: str
) -> None:
    assert why in refuse_artifacts(f'"{name}": {RUN}')
    assert why in refuse_artifacts(
        f'ok: {{rule: run, options: {{argv: [a]}}, outputs: {{x: "{name}"}}}}'
    )


@pytest.mark.parametrize("name", ["a b", "$(id)", "`id`", "a;b", "it's", "é/ü.txt", "#a", "a&b=c"])
def test_strange_names_that_are_safe_are_names(artifacts: Load, name: str) -> None:
    assert list(artifacts(f'"{name}": {RUN}').steps) == [name]


def test_an_output_name_may_come_from_a_variable_and_is_checked_then(refuse: Refuse) -> None:
    text = f"""\
        qbuild: 1
        vars: {{where: out}}
        artifacts: {{"${{where}}/x": {RUN}}}
        """
    assert "leads out of the build folder" in refuse(text, where="..")
