"""`extends`: deep merge, the child wins, null removes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from buildsys.errors import RecipeError
from buildsys.recipe.merging import merge, read_extended
from buildsys.recipe.nodes import Items, Scalar, Table, plain
from buildsys.recipe.reading import parse


def nodes(value: dict[str, Any], file: str = "r.yaml") -> Table:
    return parse(json.dumps(value), file)


def merged(parent: dict[str, Any], child: dict[str, Any]) -> dict[str, Any]:
    result = merge(nodes(parent), nodes(child))
    found: dict[str, Any] = plain(result)
    return found


leaves = st.integers() | st.text("abc", max_size=3) | st.lists(st.integers(), max_size=2)
tables = st.recursive(
    st.dictionaries(st.sampled_from("abcd"), leaves, max_size=4),
    lambda inner: st.dictionaries(st.sampled_from("abcd"), leaves | inner, max_size=4),
    max_leaves=10,
)


@settings(max_examples=100, deadline=None)
@given(tables)
def test_nothing_laid_over_is_nothing_changed(one: dict[str, Any]) -> None:
    assert merged(one, {}) == merged({}, one) == merged(one, one) == one


@settings(max_examples=100, deadline=None)
@given(tables, tables, tables)
def test_the_order_of_laying_over_does_not_matter(
    a: dict[str, Any], b: dict[str, Any], c: dict[str, Any]
) -> None:
    left = merge(merge(nodes(a), nodes(b)), nodes(c))
    right = merge(nodes(a), merge(nodes(b), nodes(c)))
    # A mapping that a plain value hides stays hidden one way and not the other: leave those out.
    if not hides(a, b) and not hides(b, c) and not hides(a, c):
        assert plain(left) == plain(right)


def hides(parent: dict[str, Any], child: dict[str, Any]) -> bool:
    common = parent.keys() & child.keys()
    return any(
        isinstance(parent[key], dict) != isinstance(child[key], dict)
        or (isinstance(parent[key], dict) and hides(parent[key], child[key]))
        for key in common
    )


@settings(max_examples=100, deadline=None)
@given(tables, tables)
def test_the_child_wins_and_the_rest_stays(a: dict[str, Any], b: dict[str, Any]) -> None:
    result = merged(a, b)
    assert result.keys() == a.keys() | b.keys()
    for key in result:
        if key not in b:
            assert result[key] == a[key]
        elif not (isinstance(b[key], dict) and isinstance(a.get(key), dict)):
            assert result[key] == b[key]


@settings(max_examples=100, deadline=None)
@given(tables, st.sampled_from("abcd"))
def test_null_removes(a: dict[str, Any], key: str) -> None:
    rest = {name: value for name, value in a.items() if name != key}
    assert merged(a, {key: None}) == (rest if key in a else {**a, key: None})


def test_places_are_of_the_file_that_says_it() -> None:
    parent = parse("a: {x: 1, y: 2}\nb: 1\n", "p.yaml")
    child = parse("# mine\na: {y: 3}\nc: 4\n", "c.yaml")
    result = merge(parent, child)
    assert isinstance(result, Table)
    a = result.entries["a"]
    assert isinstance(a, Table)
    assert result.keys["a"].file == "p.yaml"
    assert result.keys["c"][:3] == ("c.yaml", 3, 1)
    assert a.entries["x"].where[:3] == ("p.yaml", 1, 8)
    assert a.entries["y"].where[:3] == ("c.yaml", 2, 8)
    assert isinstance(a.entries["y"], Scalar)


def test_lists_are_replaced_as_a_whole() -> None:
    result = merge(parse("a: [1, 2, 3]\n", "p.yaml"), parse("a: [4]\n", "c.yaml"))
    assert isinstance(result, Table)
    assert isinstance(result.entries["a"], Items)
    assert plain(result) == {"a": [4]}


def write(folder: Path, **texts: str) -> None:
    for name, text in texts.items():
        (folder / f"{name}.yaml").write_text(text)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_chain_of_recipes_is_laid_over_in_order(here: Path) -> None:
    (here / "sub").mkdir()
    write(here, a="qbuild: 1\nextends: sub/b.yaml\nvars: {x: 1}\n")
    write(here / "sub", b="qbuild: 1\nextends: c.yaml\nvars: {x: 2, y: 2}\n")
    write(here / "sub", c="qbuild: 1\nname: mine\nvars: {x: 3, y: 3, z: 3}\n")
    result, files = read_extended("a.yaml")
    assert plain(result) == {"qbuild": 1, "vars": {"x": 1, "y": 2, "z": 3}}
    assert files == ("a.yaml", "sub/b.yaml", "sub/c.yaml")


def test_a_name_is_not_inherited(here: Path) -> None:
    write(here, a="qbuild: 1\nextends: b.yaml\n", b="qbuild: 1\nname: b\n")
    assert "name" not in plain(read_extended("a.yaml")[0])


def test_a_recipe_that_qbuild_ships_can_be_extended_by_its_name(here: Path) -> None:
    write(here, a="qbuild: 1\nextends: qwen2.yaml\n")
    result, files = read_extended("a.yaml")
    assert "rotation.bin" in plain(result)["artifacts"]
    assert Path(files[1]).is_absolute()


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        (
            {"a": "qbuild: 1\nextends: b.yaml\n", "b": "qbuild: 1\nextends: a.yaml\n"},
            (
                "b.yaml:2:10: error: recipes extend each other in a circle: "
                "a.yaml -> b.yaml -> a.yaml\nextends: a.yaml\n         ^"
            ),
        ),
        (
            {"a": "qbuild: 1\nextends: qwn2.yaml\n"},
            (
                "a.yaml:2:10: error: there is no recipe 'qwn2.yaml' here, and qbuild ships none of "
                "that name\nextends: qwn2.yaml\n         ^\ndid you mean 'qwen2.yaml'?"
            ),
        ),
        (
            {"a": "qbuild: 1\nextends: ../../etc/passwd\n"},
            "a.yaml:2:10: error: there is no recipe '../../etc/passwd' here",
        ),
        (
            {"a": "name: x\n"},
            (
                "a.yaml:1:1: error: this file does not say which recipe language it is written in\n"
                "name: x\n^\nbegin it with `qbuild: 1`"
            ),
        ),
        (
            {"a": "qbuild: 2\n"},
            "a.yaml:1:9: error: this qbuild reads recipes of version 1\nqbuild: 2\n        ^",
        ),
        (
            {"a": "qbuild: true\n"},
            "a.yaml:1:9: error: this qbuild reads recipes of version 1",
        ),
        (
            {"a": "qbuild: 1\nextends: [b.yaml]\n"},
            "a.yaml:2:10: error: extends must be a string",
        ),
    ],
)
def test_mistakes_are_shown_where_they_are(here: Path, texts: dict[str, str], says: str) -> None:
    write(here, **texts)
    with pytest.raises(RecipeError) as caught:
        read_extended("a.yaml")
    assert str(caught.value).startswith(says)


def test_a_circle_through_a_link_is_seen(here: Path) -> None:
    write(here, a="qbuild: 1\nextends: b.yaml\n")
    (here / "b.yaml").symlink_to("a.yaml")
    with pytest.raises(RecipeError, match="in a circle"):
        read_extended("a.yaml")
