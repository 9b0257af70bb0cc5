"""Variables are typed; -D is checked; paths are relative to where they are written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from buildsys.errors import RecipeError, UsageError
from buildsys.recipe.reading import parse
from buildsys.recipe.variables import read_variables


def values(text: str, /, **defines: str) -> dict[str, Any]:
    variables = read_variables(parse(f"vars:\n{text}", "rec/r.yaml"), defines)
    return {name: variables.lookup(name) for name in variables.declared}


def refusal(text: str, /, **defines: str) -> str:
    with pytest.raises((RecipeError, UsageError)) as caught:
        values(text, **defines)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_a_variable_may_refer_to_others_in_any_order() -> None:
    text = "  a: ${b}-${c}\n  b: x${c}\n  c: 1\n  d: [1, '${c}', {e: '${a}'}]\n"
    assert values(text) == {"a": "x1-1", "b": "x1", "c": 1, "d": [1, 1, {"e": "x1-1"}]}


@pytest.mark.parametrize(
    ("declared", "word", "value"),
    [
        ("0", "7", 7),
        ("0", "0x10", 16),
        ("0.5", "2", 2),
        ("0.5", "1e-3", 0.001),
        ("true", "false", False),
        ("a", "12", "12"),
        ("a", "${x} = y", "${x} = y"),
        ("null", "12", 12),
        ("null", "x y", "x y"),
        ("[1]", "[2, 3]", [2, 3]),
        ("{a: 1}", "{a: 2}", {"a": 2}),
        ("{type: int, default: 1}", "-3", -3),
        ("{type: number}", "2.5", 2.5),
        ("{type: bool}", "true", True),
        ("{type: string}", "", ""),
        ("{type: choice, choices: [v73, v75]}", "v75", "v75"),
        ("{type: choice, choices: [4, 8]}", "8", 8),
        ("{type: path}", "", None),
        ("{type: path}", "/a/../b", "/b"),
        ("{type: model}", "org/name", "org/name"),
    ],
)
def test_defines_take_the_type_of_the_variable(declared: str, word: str, value: object) -> None:
    found = values(f"  v: {declared}\n", v=word)["v"]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("declared", "word", "says"),
    [
        ("0", "x", "-D v=x: expected a whole number"),
        ("0", "", "-D v=: expected a whole number"),
        ("0", "1.5", "-D v=1.5: expected a whole number"),
        ("0", "true", "-D v=true: expected a whole number"),
        ("0.5", "fast", "-D v=fast: expected a number"),
        ("true", "yes", "-D v=yes: expected true or false"),
        ("{type: choice, choices: [a, b]}", "c", "-D v=c: expected one of a, b"),
        ("[1]", "[1", "-D v=[1: YAML"),
    ],
)
def test_defines_of_another_type_are_refused(declared: str, word: str, says: str) -> None:
    assert says in refusal(f"  v: {declared}\n", v=word)


def test_a_define_of_no_variable_is_refused_with_the_nearest() -> None:
    says = "error: -D sed=...: the recipe has no variable 'sed'\ndid you mean 'seed'?"
    assert refusal("  seed: 0\n", sed="1") == says


def test_paths_are_relative_to_where_they_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").mkdir()
    text = "  data: {type: path, default: assets/x}\n  model: {type: model, default: m}\n"
    assert values(text)["data"] == str(tmp_path / "rec" / "assets" / "x")
    assert values(text)["model"] == "m"
    given = values(text, data="../y", model="m")
    assert given["data"] == str(tmp_path.parent / "y")
    assert given["model"] == str(tmp_path / "m")
    assert values(text, model="other")["model"] == "other"
    # What no hub id can be is a folder seen from here, there or not: never one of the recipe's.
    assert values(text, model="./other")["model"] == str(tmp_path / "other")
    assert "expected a folder, a hub id" in refusal(text, model="")
    # A default is seen from the recipe that names it, also where that one extends another.
    (tmp_path / "rec" / "m").mkdir(parents=True)
    assert values(text)["model"] == str(tmp_path / "rec" / "m")
    assert values("  model: {type: model, default: ../m}\n")["model"] == str(tmp_path / "m")
    hub = "  model: {type: model, default: org/name}\n"
    assert values(hub)["model"] == "org/name"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "  a: ${b}\n  b: ${a}\n",
            (
                "rec/r.yaml:2:3: error: variables refer to each other in a circle: a -> b -> a\n"
                "  a: ${b}\n  ^"
            ),
        ),
        (
            "  a: {type: integer, default: 1}\n",
            (
                "rec/r.yaml:2:13: error: unknown type 'integer'\n"
                "  a: {type: integer, default: 1}\n            ^\ndid you mean 'int'?"
            ),
        ),
        (
            "  a: {type: int, default: four}\n",
            (
                "rec/r.yaml:2:27: error: variable 'a' must be a whole number, not 'four'\n"
                "  a: {type: int, default: four}\n                          ^"
            ),
        ),
        (
            "  a: {type: int, defualt: 4}\n",
            (
                "rec/r.yaml:2:18: error: unknown key 'defualt'\n"
                "  a: {type: int, defualt: 4}\n                 ^\ndid you mean 'default'?"
            ),
        ),
        (
            "  a: {type: choice, choices: [x, y], default: z}\n",
            "rec/r.yaml:2:47: error: 'z' is not one of x, y\n"
            "  a: {type: choice, choices: [x, y], default: z}\n" + " " * 46 + "^",
        ),
        (
            "  a: {type: model}\n",
            (
                "rec/r.yaml:2:3: error: variable 'a' has no value\n  a: {type: model}\n  ^\n"
                "give it one: -D a=..."
            ),
        ),
        (
            "  out: 3\n",
            (
                "rec/r.yaml:2:3: error: '${out}' is filled in by qbuild itself\n  out: 3\n  ^\n"
                "choose another name for this variable"
            ),
        ),
        (
            "  a b: 3\n",
            "rec/r.yaml:2:3: error: 'a b' cannot be the name of a variable\n  a b: 3\n  ^",
        ),
    ],
)
def test_mistakes_are_shown_where_they_are(text: str, says: str) -> None:
    assert refusal(text) == says


def test_a_long_chain_of_variables_is_refused_without_recursion() -> None:
    text = "".join(f"  v{n}: ${{v{n + 1}}}\n" for n in range(5000)) + "  v5000: 1\n"
    assert "variables refer to each other too deeply" in refusal(text)


def test_variables_that_double_each_other_are_refused() -> None:
    text = "  v0: [x, x]\n" + "".join(
        f"  v{n}: ['${{v{n - 1}}}', '${{v{n - 1}}}']\n" for n in range(1, 40)
    )
    assert "expands to something enormous" in refusal(text)
    text = "  v0: xxxxxxxx\n" + "".join(
        f"  v{n}: ${{v{n - 1}}}${{v{n - 1}}}\n" for n in range(1, 40)
    )
    assert "a text of more than 64 KiB" in refusal(text)
