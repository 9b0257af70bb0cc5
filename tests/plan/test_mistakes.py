"""Every mistake a user can make in a recipe is shown with file:line:col, the line, a caret and
the nearest right name, and ends qbuild with 2."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from buildsys.errors import RecipeError, UsageError
from buildsys.plan.graph import Plan
from buildsys.recipe.mistakes import RecipeMistakes

Load = Callable[..., Plan]
Refuse = Callable[..., str]
RUN = "{rule: run, options: {argv: [a]}}"


def caret(line: str, column: int, message: str, remedy: str = "", number: int = 8) -> str:
    """What explain() prints about one place of the recipe r.yaml."""
    lines = [f"r.yaml:{number}:{column}: error: {message}", line, " " * (column - 1) + "^"]
    return "\n".join([*lines, remedy] if remedy else lines)


# The artifact as typed (two spaces deep, so in line 8), the word to point at, what is said.
ONE_LINERS = [
    # unknown names
    ("a: {rule: rotaton, inputs: {model: model}}", "rotaton", "unknown rule 'rotaton'", "rotation"),
    ("a: {rule: rotation, input: {model: model}}", "input:", "unknown key 'input'", "inputs"),
    ("a: {rule: rotation, inputs: {modle: model}}", "modle", "unknown input 'modle'", "model"),
    (
        "a: {rule: rotation, inputs: {model: modle}}",
        "modle",
        "there is no source and no artifact 'modle'",
        "model",
    ),
    (
        "a: {rule: rotation, inputs: {model: model}, options: {sed: 1}}",
        "sed:",
        "unknown option 'sed'",
        "seed",
    ),
    (
        "a: {rule: rotation, inputs: {model: model}, options: {method: hadamrd}}",
        "hadamrd",
        "'method' cannot be 'hadamrd'",
        "hadamard",
    ),
    (
        (
            "a: {rule: scales, inputs: {model: model, samples: text}, options: {level: 1}, "
            "outputs: {histgram: x}}"
        ),
        "histgram",
        "unknown output 'histgram'",
        "histogram",
    ),
    (
        "a: {rule: run, inputs: {x: {form: own}}, options: {argv: [a]}}",
        "form",
        "unknown key 'form'",
        "from",
    ),
    (
        "a: {rule: run, options: {argv: [a]}, resources: {memmory: 1GiB}}",
        "memmory",
        "unknown key 'memmory'",
        "memory",
    ),
    # wrong types
    (
        "a: {rule: rotation, inputs: {model: model}, options: {seed: one}}",
        "one",
        "'seed' must be a whole number, not 'one'",
        None,
    ),
    (
        "a: {rule: rotation, inputs: {model: model}, options: {seed: -1}}",
        "-1",
        "'seed' must be at least 0, not -1",
        None,
    ),
    (
        "a: {rule: rotation, inputs: {model: model}, options: {vision: no}}",
        "no}",
        "'vision' must be true or false, not 'no'",
        None,
    ),
    (
        "a: {rule: scales, inputs: {model: model, samples: text}, options: {level: 0}}",
        "0}",
        "'level' must be more than 0, not 0",
        None,
    ),
    ("a: {rule: run, options: {argv: cp x y}}", "cp", "'argv' must be a list, not 'cp x y'", None),
    ("a: {rule: run, options: {argv: [a]}, tags: t}", "t}", "'tags' must be a list, not 't'", None),
    (
        "a: {rule: run, options: {argv: [a]}, optional: maybe}",
        "maybe",
        "'optional' must be true or false, not 'maybe'",
        None,
    ),
    ("a: 3", "3", "'a' must be a mapping, not 3", None),
    ("a: {inputs: {model: model}}", "a:", "'rule' is missing here", None),
    (
        "a: {matrix: {i: 3}, rule: run, options: {argv: [a]}}",
        "3}",
        "'i' must be a list, not 3",
        None,
    ),
    # inputs that do not fit
    (
        "a: {rule: rotation, inputs: {model: text}}",
        "text",
        (
            "input 'model' takes a model or an artifact or a folder, "
            "and 'text' is a source of kind 'text'"
        ),
        None,
    ),
    (
        "a: {rule: rotation, inputs: {model: [model, own]}}",
        "model:",
        "input 'model' takes one thing, and this is 2: model, own",
        None,
    ),
    (
        "a: {rule: run, inputs: {x: 'q*'}, options: {argv: [a]}}",
        "'q*'",
        "no artifact matches 'q*'",
        None,
    ),
    (
        "a: {rule: run, inputs: {x: a}, options: {argv: [a]}}",
        "a}, o",
        "artifacts need each other in a circle: a -> a",
        None,
    ),
]


def test_a_number_in_a_text_is_refused_with_the_way_to_write_it(refuse_artifacts: Refuse) -> None:
    remedy = "put it in quotes, or declare its variable with {type: string}"
    message = "'argv' must be a text, not 1"
    line = "  a: {rule: run, options: {argv: [1]}}"
    assert refuse_artifacts(line[2:]) == caret(line, line.index("1]") + 1, message, remedy)


@pytest.mark.parametrize(("text", "word", "message", "near"), ONE_LINERS)
def test_a_mistake_is_shown_where_it_is(
    refuse_artifacts: Refuse, text: str, word: str, message: str, near: str | None
) -> None:
    remedy = f"did you mean '{near}'?" if near else ""
    line = f"  {text}"
    assert refuse_artifacts(text) == caret(line, line.index(word) + 1, message, remedy)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "a: {rule: rotation}",
            caret(
                "  a: {rule: rotation}",
                3,
                "'a' needs the input 'model': the model",
                "add `model: ...` under its `inputs`",
            ),
        ),
        (
            "a: {rule: scales, inputs: {model: model, samples: text}}",
            caret(
                "  a: {rule: scales, inputs: {model: model, samples: text}}",
                3,
                "'options' is missing here",
                "this rule needs level",
            ),
        ),
        (
            "a: {rule: run, options: {argv: [a]}, resources: {memory: lots}}",
            caret(
                "  a: {rule: run, options: {argv: [a]}, resources: {memory: lots}}",
                60,
                "'memory' cannot be 'lots'",
                "expected: an amount such as 12GiB",
            ),
        ),
        (
            "a: {rule: run, options: {argv: [a]}, timeout: soon}",
            caret(
                "  a: {rule: run, options: {argv: [a]}, timeout: soon}",
                49,
                "'timeout' cannot be 'soon'",
                "expected: a time such as 600s or 10m",
            ),
        ),
        (
            "b: {rule: bundle, inputs: {parts: own}}",
            caret(
                "  b: {rule: bundle, inputs: {parts: own}}",
                3,
                "rule 'bundle' makes a folder",
                "end its name with a slash: 'b/'",
            ),
        ),
        (
            "r/: {rule: rotation, inputs: {model: model}}",
            caret(
                "  r/: {rule: rotation, inputs: {model: model}}",
                3,
                "rule 'rotation' makes a file",
                "write its name without the slash: 'r'",
            ),
        ),
        (
            "a: {rule: rotation, inputs: {model: model}, options: {seed: 13}}",
            caret(
                "  a: {rule: rotation, inputs: {model: model}, options: {seed: 13}}",
                63,
                "13 brings bad luck",
                "take 12",
            ),
        ),
        (
            f"own: {RUN}",
            caret(
                f"  own: {RUN}",
                3,
                "'own' is the name of a source already (r.yaml:6:3)",
                "sources and artifacts share one namespace: rename one of them",
            ),
        ),
        (
            f"Own/: {RUN}",
            caret(
                f"  Own/: {RUN}",
                3,
                "'Own/' is the name of a source already (r.yaml:6:3)",
                "sources and artifacts share one namespace: rename one of them",
            ),
        ),
    ],
)
def test_a_mistake_says_what_to_do(refuse_artifacts: Refuse, text: str, says: str) -> None:
    assert refuse_artifacts(text) == says


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
