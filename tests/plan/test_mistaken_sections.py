"""Mistakes of more than one word: circles, matrices, other sections, several at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from buildsys.errors import RecipeError, UsageError
from buildsys.plan.graph import Plan
from buildsys.recipe.mistakes import RecipeMistakes
from tests.plan.conftest import RUN, caret

Load = Callable[..., Plan]
Refuse = Callable[..., str]


def test_a_circle_is_shown_as_a_chain(refuse_artifacts: Refuse) -> None:
    text = f"""\
free: {RUN}
b: {{rule: run, inputs: {{y: own, x: c}}, options: {{argv: [a]}}}}
c: {{rule: run, inputs: {{x: [free, d]}}, options: {{argv: [a]}}}}
d: {{rule: run, inputs: {{x: "b*"}}, options: {{argv: [a]}}, outputs: {{more: d2}}}}
behind: {{rule: run, inputs: {{x: d2}}, options: {{argv: [a]}}}}
"""
    line = "  b: {rule: run, inputs: {y: own, x: c}, options: {argv: [a]}}"
    message = "artifacts need each other in a circle: b -> c -> d -> b"
    assert refuse_artifacts(text) == caret(line, line.index("c}") + 1, message, number=9)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("sources: {m: {modle: x}}", (11, "a source is one of model, text, images, file, folder")),
        ("sources: {m: {model: x, text: y}}", (11, "this is both model and text: choose one")),
        ("sources: {m: {text: x, sampels: 3}}", (24, "unknown key 'sampels'")),
        (
            "sources: {m: {text: x, samples: many}}",
            (33, "'samples' must be a whole number, not 'many'"),
        ),
        ("sources: {m: {images: x, size: [1]}}", (26, "'size' must have 2 or more values")),
        (
            "sources: {m: {file: x, url: 'http://h/y'}}",
            (24, "sources that qbuild fetches by `url`"),
        ),
        ("sources: {m: {file: x, sha256: aa}}", (32, "'sha256' cannot be 'aa'")),
        ("sources: {m: {file: ../x, package: p}}", (21, "'../x' is not inside a package")),
        ("sources: {m: {file: x, package: a.b}}", (33, "'a.b' is no name of a Python package")),
        ("sources: {m: x}", (14, "'m' must be a mapping, not 'x'")),
        ("source: {m: x}", (1, "unknown key 'source'")),
        ("name: ../x", (7, "'name' cannot be '../x'")),
        ("gates: {x: {a: 1}}", (13, "there is no artifact 'x' to put a gate on")),
        ("gates: {x: {a: low}}", (16, "'a' must be a number, not 'low'")),
        ("devices: {p: {transport: usb, root: /x}}", (26, "'transport' cannot be 'usb'")),
        ("devices: {p: {transport: adb, root: /x, psuh: {}}}", (41, "unknown key 'psuh'")),
        ("devices: {p: {transport: adb}}", (11, "'root' is missing here")),
        ("vars: [1]", (1, "'vars' must be a mapping, not a list")),
        ("vars: {s: '${t}'}", (12, "undefined variable 't'")),
    ],
)
def test_mistakes_in_the_other_sections(refuse: Refuse, text: str, says: tuple[int, str]) -> None:
    column, message = says
    assert refuse(f"qbuild: 1\n{text}\n").startswith(f"r.yaml:2:{column}: error: {message}")


def test_several_mistakes_are_told_at_once_in_file_order(artifacts: Load) -> None:
    text = (
        "a: {rule: rotation, inputs: {model: modle}}\n"
        "b: {rule: run, inputs: {x: missing}, options: {argv: [a]}}\n"
    )
    with pytest.raises(RecipeMistakes) as caught:
        artifacts(text)
    assert [error.location.line for error in caught.value.errors if error.location] == [8, 9]
    assert str(caught.value).count("error: ") == 2


def test_a_mistake_in_a_matrix_is_told_once(refuse_artifacts: Refuse) -> None:
    text = '"${i}": {matrix: {i: [1, 2, 3]}, rule: run, options: {argv: [a], note: 4}}'
    assert refuse_artifacts(text).count("error: ") == 1


def test_a_value_is_checked_after_substitution(refuse: Refuse) -> None:
    text = """\
        qbuild: 1
        vars: {seed: many}
        sources: {model: {model: ./m}}
        artifacts: {r: {rule: rotation, inputs: {model: model}, options: {seed: "${seed}"}}}
        """
    assert "'seed' must be a whole number, not 'many'" in refuse(text)


def test_a_mistake_in_an_extended_recipe_is_shown_there(project: Path, refuse: Refuse) -> None:
    (project / "base.yaml").write_text(
        "qbuild: 1\nartifacts:\n  a: {rule: run, options: {argv: [a], nte: x}}\n"
    )
    found = refuse("qbuild: 1\nextends: base.yaml\n")
    assert found.startswith("base.yaml:3:39: error: unknown option 'nte'")


def test_a_matrix_without_end_is_refused(refuse_artifacts: Refuse) -> None:
    axes = ", ".join(f"x{n}: [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]" for n in range(9))
    text = f'"${{x0}}": {{matrix: {{{axes}}}, rule: run, options: {{argv: [a]}}}}'
    assert "a matrix of more than 10000" in refuse_artifacts(text)


def test_an_axis_may_not_hide_a_variable(refuse: Refuse) -> None:
    text = """\
        qbuild: 1
        vars: {seed: 1}
        artifacts: {"${seed}": {matrix: {seed: [1]}, rule: run, options: {argv: [a]}}}
        """
    assert "'seed' cannot be the name of a matrix axis: it is a variable already" in refuse(text)


def test_what_is_switched_off_is_no_input(refuse: Refuse) -> None:
    text = """\
        qbuild: 1
        sources: {src: {folder: x, when: false}}
        artifacts: {a: {rule: run, inputs: {s: src}, options: {argv: [a]}}}
        """
    found = refuse(text)
    assert found.startswith("r.yaml:3:40: error: 'src' is switched off by its `when` (r.yaml:2:11)")
    assert found.endswith("write {from: ..., optional: true} if it may be missing")


def test_a_place_for_a_running_step_is_no_variable_elsewhere(refuse_artifacts: Refuse) -> None:
    found = refuse_artifacts('a: {rule: run, options: {argv: [a], note: "${out}"}}')
    assert found.startswith("r.yaml:8:46: error: ${out} is not known here")


def test_an_unknown_define_is_a_usage_error(load: Load) -> None:
    with pytest.raises(UsageError, match=r"no variable 'sed'\ndid you mean 'seed'\?") as caught:
        load("qbuild: 1\nvars: {seed: 1}\n", sed="2")
    assert caught.value.exit_code == 2


def test_a_thousand_links_in_a_circle_are_found_without_recursion(artifacts: Load) -> None:
    count = 1500
    text = "".join(
        f"n{n}: {{rule: run, inputs: {{x: n{(n + 1) % count}}}, options: {{argv: [a]}}}}\n"
        for n in range(count)
    )
    with pytest.raises(RecipeError, match="in a circle: n0 -> n1 -> n2"):
        artifacts(text)
