"""Every mistake a user can make in a recipe is shown with file:line:col, the line, a caret and
the nearest right name, and ends qbuild with 2."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from buildsys.plan.graph import Plan
from tests.plan.conftest import RUN, caret

Load = Callable[..., Plan]
Refuse = Callable[..., str]


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
