"""YAML means what YAML 1.2 says, or is refused with its place."""

from __future__ import annotations

import contextlib
import textwrap

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from buildsys.errors import RecipeError
from buildsys.recipe import reading
from buildsys.recipe.nodes import Items, Scalar, Table, plain
from buildsys.recipe.reading import decode, parse, read_nodes

NO_TOKEN = "while scanning for the next token found character that cannot start any token"


def value_of(text: str) -> object:
    return plain(parse(f"x: {text}\n", "r.yaml").entries["x"])


def refusal(text: str) -> str:
    with pytest.raises(RecipeError) as caught:
        parse(text, "r.yaml")
    return str(caught.value)


def shown(text: str) -> str:
    return textwrap.dedent(text).strip("\n")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no", "no"),
        ("yes", "yes"),
        ("on", "on"),
        ("off", "off"),
        ("NO", "NO"),
        ("true", True),
        ("False", False),
        ("tRue", "tRue"),
        ("~", None),
        ("null", None),
        ("", None),
        ("012", 12),
        ("-07", -7),
        ("0o17", 15),
        ("0xFf", 255),
        ("0b11", "0b11"),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("1e3", 1000.0),
        ("3.10", 3.1),
        (".5", 0.5),
        ("1.", 1.0),
        ("1.2.3", "1.2.3"),
        ("2026-11-21", "2026-11-21"),
        ("=", "="),
        ("'12'", "12"),
        ('"null"', "null"),
        ("''", ""),
        ("١٢", "١٢"),
    ],
)
def test_words_mean_what_the_core_schema_says(text: str, value: object) -> None:
    found = value_of(text)
    assert found == value
    assert type(found) is type(value)


def test_keys_are_always_texts() -> None:
    nodes = parse("on: 1\nnull: 2\n12: 3\n? x\n: 4\n", "r.yaml")
    assert plain(nodes) == {"on": 1, "null": 2, "12": 3, "x": 4}


def test_every_value_knows_its_place() -> None:
    nodes = parse("a: 1\nb:\n  - {c: 'é x', d: y}\n  - |\n    text\n", "r.yaml")
    assert nodes.keys["b"][:3] == ("r.yaml", 2, 1)
    items = nodes.entries["b"]
    assert isinstance(items, Items)
    first, second = items.items
    assert isinstance(first, Table)
    assert first.entries["d"].where == ("r.yaml", 3, 19, "  - {c: 'é x', d: y}")
    assert isinstance(second, Scalar)
    assert second.value == "text\n"
    assert second.where[:3] == ("r.yaml", 4, 5)


def test_an_alias_is_the_value_of_its_anchor() -> None:
    nodes = parse("a: &x {b: [1, 2]}\nc: *x\n", "r.yaml")
    assert plain(nodes) == {"a": {"b": [1, 2]}, "c": {"b": [1, 2]}}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "bits: four\nx: 1\nbits: 4\n",
            """
            r.yaml:3:1: error: the key 'bits' is here twice: first in line 1
            bits: 4
            ^
            """,
        ),
        (
            "a: {b: 1, b: 2}\n",
            """
            r.yaml:1:11: error: the key 'b' is here twice: first in line 1
            a: {b: 1, b: 2}
                      ^
            """,
        ),
        (
            "a:\n\tb: 1\n",
            """
            r.yaml:2:1: error: YAML: NO_TOKEN
            \tb: 1
            ^
            YAML is indented with spaces, never with tabs
            """,
        ),
        (
            "argv: [@x]\n",
            """
            r.yaml:1:8: error: YAML: NO_TOKEN
            argv: [@x]
                   ^
            put quotes around a text that begins with @
            """,
        ),
        (
            "doc: one: two\n",
            """
            r.yaml:1:9: error: YAML: mapping values are not allowed in this context
            doc: one: two
                    ^
            a text with ': ' in it needs quotes
            """,
        ),
        (
            "a: 1\nb: 'never ends\n",
            """
            r.yaml:2:4: error: YAML: while scanning a quoted scalar found unexpected end of stream
            b: 'never ends
               ^
            """,
        ),
        (
            "a: !!python/object/apply:os.system [id]\n",
            """
            r.yaml:1:4: error: YAML tags are not part of recipes: !!python/object/apply:os.system
            a: !!python/object/apply:os.system [id]
               ^
            """,
        ),
        (
            "a: !!str 12\n",
            """
            r.yaml:1:4: error: YAML tags are not part of recipes: !!str
            a: !!str 12
               ^
            """,
        ),
        (
            "a: &x 1\n<<: {b: 2}\n",
            """
            r.yaml:2:1: error: merge keys (<<) are not part of YAML 1.2
            <<: {b: 2}
            ^
            use `extends`, or an alias
            """,
        ),
        (
            "a: *b\n",
            """
            r.yaml:1:4: error: there is no anchor &b before this alias
            a: *b
               ^
            """,
        ),
        (
            "a: &x [1, *x]\n",
            """
            r.yaml:1:11: error: the alias *x stands inside its own anchor
            a: &x [1, *x]
                      ^
            """,
        ),
        (
            "a: 1\n---\nb: 2\n",
            """
            r.yaml:2:1: error: a recipe is one YAML document
            ---
            ^
            """,
        ),
        (
            "a: .inf\n",
            """
            r.yaml:1:4: error: .inf is not a finite number
            a: .inf
               ^
            put quotes around it if it is a text
            """,
        ),
        (
            "a: 1e999\n",
            """
            r.yaml:1:4: error: 1e999 is not a finite number
            a: 1e999
               ^
            put quotes around it if it is a text
            """,
        ),
        (
            "[a, b]: 1\n",
            """
            r.yaml:1:1: error: a key must be a text, not a list or a mapping
            [a, b]: 1
            ^
            """,
        ),
        (
            "- a\n- b\n",
            """
            r.yaml:1:1: error: a recipe is a mapping of names to values
            - a
            ^
            """,
        ),
    ],
)
def test_what_is_not_yaml_1_2_is_refused_with_its_place(text: str, says: str) -> None:
    assert refusal(text) == shown(says).replace("NO_TOKEN", NO_TOKEN)


@pytest.mark.parametrize("text", ["", "\n\n", "# nothing\n", "---\n", "~\n"])
def test_an_empty_recipe_is_an_error(text: str) -> None:
    assert refusal(text).startswith(("error: r.yaml is empty", "r.yaml:1:1: error: a recipe is a"))


def test_digits_without_end_are_refused() -> None:
    assert "a number of 5000 digits" in refusal("a: " + "9" * 5000 + "\n")


def test_deep_nesting_is_refused_without_recursion() -> None:
    for text in ("[" * 3000 + "]" * 3000, "{a: " * 3000 + "}" * 3000):
        assert "nested more than 64 deep" in refusal("x: " + text + "\n")
    block = "".join(" " * depth + "a:\n" for depth in range(3000))
    assert "nested more than 64 deep" in refusal(block)


def test_deep_nesting_by_aliases_is_refused() -> None:
    lines = ["a0: &a0 " + "[" * 30 + "]" * 30]
    lines += [f"a{n}: &a{n} " + "[" * 30 + f"*a{n - 1}" + "]" * 30 for n in range(1, 4)]
    assert "nested more than 64 deep" in refusal("\n".join(lines) + "\n")


def test_an_alias_bomb_is_refused() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [" + ", ".join([f"*a{n - 1}"] * 10) + "]" for n in range(1, 10)]
    assert "aliases expand to more than 10000 values" in refusal("\n".join(lines) + "\n")


def test_a_byte_order_mark_is_no_part_of_the_text() -> None:
    assert plain(parse(decode(b"\xef\xbb\xbfa: 1\n", "r.yaml"), "r.yaml")) == {"a": 1}


def test_other_encodings_are_refused_with_their_place() -> None:
    with pytest.raises(RecipeError, match=r"^r.yaml:2:5: error: this is not UTF-8 text\n"):
        decode(b"a: 1\nb: x" + b"\xff\n", "r.yaml")
    with pytest.raises(RecipeError, match="not UTF-8"):
        decode("a: 1\n".encode("utf-16"), "r.yaml")


def test_control_characters_are_refused() -> None:
    assert refusal("a: 1\nb: x\x07\n").startswith("r.yaml:2:5: error: a recipe is text")
    assert refusal("a: x\x00\n").startswith("r.yaml:1:5: error: a recipe is text")


def test_windows_line_ends_are_line_ends() -> None:
    nodes = parse("a: 1\r\nb: c\r\n", "r.yaml")
    assert plain(nodes) == {"a": 1, "b": "c"}
    assert nodes.entries["b"].where == ("r.yaml", 2, 4, "b: c")


def test_a_huge_file_is_refused_unread(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MAX_BYTES", 1000)
    (tmp_path / "r.yaml").write_text("# " + "x" * 2000)
    with pytest.raises(RecipeError, match="larger than"):
        read_nodes(str(tmp_path / "r.yaml"))


def test_a_file_that_is_not_there_is_an_error(tmp_path) -> None:
    with pytest.raises(RecipeError, match=r"cannot read .*none.yaml: No such file"):
        read_nodes(str(tmp_path / "none.yaml"))
    with pytest.raises(RecipeError, match="Is a directory"):
        read_nodes(str(tmp_path))


def test_the_pure_python_parser_gives_the_same_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "a: [1, 'x', {b: null}]\nc: |\n  long\n  text\nd: &k [é]\ne: *k\n"
    with_c = parse(text, "r.yaml")
    monkeypatch.setattr(reading, "LOADER", yaml.SafeLoader)
    assert parse(text, "r.yaml") == with_c


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**12), 10**12)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["C"]), max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.text(st.characters(exclude_categories=["C"]), max_size=10).filter(
                lambda k: k != "<<"
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(json_values)
def test_json_is_read_as_what_it_says(value: object) -> None:
    import json

    text = json.dumps({"x": value}, ensure_ascii=False)
    assert plain(parse(text, "r.yaml")) == {"x": value}


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60))
def test_any_text_is_read_or_refused(text: str) -> None:
    # Anything else than a RecipeError would be a traceback on somebody's screen.
    with contextlib.suppress(RecipeError):
        parse(text, "r.yaml")
