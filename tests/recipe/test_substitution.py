"""`${...}`: values, functions, escapes, and what a stranger could try with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from buildsys.errors import RecipeError
from buildsys.recipe.nodes import plain
from buildsys.recipe.reading import parse
from buildsys.recipe.substitution import RUN_TIME, Budget, Scope, substitute

VALUES: Mapping[str, Any] = {
    "seed": 3,
    "rate": 0.5,
    "flag": True,
    "nothing": None,
    "model": "org/Qwen2-VL.gguf",
    "words": ["a", "b", 1],
    "soc": {"name": "SM8650", "arch": {"htp": "v75"}},
}


def scope_of(values: Mapping[str, Any] = VALUES, limit: int = 10**6) -> Scope:
    return Scope(values.__getitem__, lambda: list(values), Budget(limit))


def value_of(text: str, scope: Scope | None = None) -> Any:
    """What the recipe text `x: TEXT` becomes."""
    nodes = substitute(parse(f"x: {text}\n", "r.yaml"), scope or scope_of())
    return plain(nodes)["x"]


def refusal(text: str, scope: Scope | None = None) -> str:
    with pytest.raises(RecipeError) as caught:
        value_of(text, scope)
    return str(caught.value)


@pytest.mark.parametrize("name", list(VALUES))
def test_a_text_that_is_one_expression_keeps_the_type(name: str) -> None:
    assert value_of(f'"${{{name}}}"') == VALUES[name]
    assert type(value_of(f'"${{{name}}}"')) is type(VALUES[name])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a-${seed}", "a-3"),
        ("${seed}${seed}", "33"),
        ('"${ seed }"', 3),
        ("${rate} ${flag}", "0.5 true"),
        ("${soc.name}/${soc.arch.htp}.so", "SM8650/v75.so"),
        ("${basename(model)}", "Qwen2-VL.gguf"),
        ("${stem(model)}.mllm", "Qwen2-VL.mllm"),
        ("${lower(stem(model))}", "qwen2-vl"),
        ("${default(nothing, 'x y')}", "x y"),
        ("${default(seed, 9)}", 3),
        ('${join(words, "-")}', "a-b-1"),
        ("${equals(soc.name, 'SM8650')}", True),
        ("${equals(seed, '3')}", False),
        ("${equals(seed, 3)}", True),
        ("$${seed}", "${seed}"),
        ("$${seed} ${seed}", "${seed} 3"),
        ("^model\\.layers$", "^model\\.layers$"),
        ("a$$b $ {seed}", "a$$b $ {seed}"),
    ],
)
def test_expressions(text: str, value: object) -> None:
    assert value_of(text) == value


def test_what_is_put_in_is_not_read_again() -> None:
    scope = scope_of({"a": "${b}", "b": "no"})
    assert value_of("${a}", scope) == "${b}"
    assert value_of("x${a}", scope) == "x${b}"


def test_keys_are_filled_in_too() -> None:
    nodes = substitute(parse('"${soc.name}.so": lib/\n', "r.yaml"), scope_of())
    assert plain(nodes) == {"SM8650.so": "lib/"}


def test_names_of_the_running_step_are_left_alone() -> None:
    later = scope_of().leaving(RUN_TIME)
    text = "${in.src} ${out} ${out.x} ${toolchain.root} ${jobs} $${in.y}"
    assert value_of(f"'{text} ${{seed}}'", later) == f"{text} 3"
    assert value_of("'${in.src}'", later) == "${in.src}"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "a ${sed}",
            (
                "r.yaml:1:6: error: undefined variable 'sed'\nx: a ${sed}\n     ^\n"
                "did you mean 'seed'?"
            ),
        ),
        (
            "a ${soc.nmae}",
            (
                "r.yaml:1:6: error: 'soc' has no field 'nmae'\nx: a ${soc.nmae}\n     ^\n"
                "did you mean 'name'?"
            ),
        ),
        (
            "${lowr(model)}",
            (
                "r.yaml:1:4: error: unknown function 'lowr'\nx: ${lowr(model)}\n   ^\n"
                "did you mean 'lower'?"
            ),
        ),
        (
            "${seed",
            (
                "r.yaml:1:4: error: '${' without its '}'\nx: ${seed\n   ^\n"
                "write $${ for a ${ of your own"
            ),
        ),
        (
            "${out}",
            (
                "r.yaml:1:4: error: ${out} is not known here\nx: ${out}\n   ^\n"
                "it is filled in where a step runs (rule `command`) or where a device is known"
            ),
        ),
        (
            "${nothing}/x",
            "r.yaml:1:4: error: ${nothing} is null here: it has no text\nx: ${nothing}/x\n   ^",
        ),
    ],
)
def test_mistakes_are_shown_where_they_are(text: str, says: str) -> None:
    assert refusal(text) == says


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("${}", "something is missing"),
        ("${seed seed}", "stray 'seed'"),
        ("${.name}", "stray '.'"),
        ("${lower(}", "something is missing"),
        ("${lower(model}", "expected ')'"),
        ("${lower()}", "the function is lower(text)"),
        ("${lower(seed)}", "lower cannot work on 3"),
        ("${join(model, ',')}", "join cannot work on"),
        ("${words} x", "is a list or a mapping"),
        ("${seed.x}", "'seed' has no field 'x'"),
        ("${words.0}", "'words' has no field '0'"),
        ("${__class__}", "undefined variable"),
        ("${seed.__class__}", "has no field"),
        ("${a|b}", "cannot read"),
        ("${" + "lower(" * 40 + "model" + ")" * 40 + "}", "calls nested more than 16 deep"),
        ("${'" + "9" * 5000 + "}", "cannot read"),
    ],
)
def test_what_cannot_be_read_is_refused(text: str, says: str) -> None:
    assert says in refusal(f'"{text}"' if '"' not in text else f"'{text}'")


def test_growth_without_end_is_refused() -> None:
    scope = scope_of({"long": "x" * 10_000}, limit=50_000)
    assert value_of("a${long}", scope) == "a" + "x" * 10_000
    assert "expands to something enormous" in refusal(
        "[" + ", ".join(["'${long}'"] * 9) + "]", scope
    )
    scope = scope_of({"long": "x" * 10_000})
    assert "a text of more than 64 KiB" in refusal("a" + "${long}" * 7, scope)


names = st.from_regex(r"[a-z][a-z0-9_]{0,5}", fullmatch=True).filter(lambda n: n not in RUN_TIME)
words = st.text("abc ${}.$()xyz", max_size=12)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(names, words, max_size=3), words)
def test_a_text_without_expressions_stays_what_it_is(values: dict[str, str], text: str) -> None:
    assume("${" not in text)
    quoted = text.replace("'", "''")
    assert value_of(f"'{quoted}'", scope_of(values)) == text


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(names, words, min_size=1, max_size=4), st.data())
def test_substitution_is_replacement_piece_by_piece(
    values: dict[str, str], data: st.DataObject
) -> None:
    literal = st.text("abc /.$-", max_size=6).filter(lambda text: not text.endswith("$"))
    variable = st.sampled_from(sorted(values)).map(lambda name: (name,))
    pieces = data.draw(st.lists(st.one_of(literal, variable), min_size=2, max_size=6))
    text = "".join(piece if isinstance(piece, str) else f"${{{piece[0]}}}" for piece in pieces)
    expected = "".join(piece if isinstance(piece, str) else values[piece[0]] for piece in pieces)
    found = value_of(f"'{text}'", scope_of(values))
    assert found == expected


@settings(max_examples=200, deadline=None)
@given(words)
def test_escaping_gives_any_text_back(text: str) -> None:
    # A dollar before the escape would be taken for another escape's, so none ends there.
    assume("$${" not in text)
    escaped = text.replace("${", "$${").replace("'", "''")
    assert value_of(f"'{escaped}'", scope_of({})) == text
