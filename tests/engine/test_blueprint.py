"""The plan cache: used while it holds, and never after."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from buildsys.engine import blueprint
from buildsys.engine.blueprint import find_cache, load, read_cache, write_cache
from buildsys.rules import rule_modules
from tests.cli.conftest import RECIPE


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "base.yaml").write_text("qbuild: 1\nvars: {extra: 1}\n")
    text = RECIPE.replace("name: tiny", "extends: base.yaml\nname: tiny")
    (tmp_path / "tiny.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "tiny.yaml"


def cached(recipe: Path, defines: dict[str, str] | None = None) -> bool:
    return remembered(recipe, defines or {}) is not None


def remembered(recipe: Path, defines: dict[str, str]) -> blueprint.Blueprint | None:
    path = str(recipe.parent / "plan")
    found = find_cache(path, str(recipe), defines)
    return None if found is None else read_cache(path, found)


def write(recipe: Path) -> blueprint.Blueprint:
    found, files = load(str(recipe), {})
    write_cache(str(recipe.parent / "plan"), found, files, {})
    return found


def test_what_is_read_back_is_what_was_made(recipe: Path) -> None:
    made = write(recipe)
    found = remembered(recipe, {})
    assert found is not None
    assert found.fixed == made.fixed
    assert found.rules == made.rules
    assert found.plan.steps.keys() == made.plan.steps.keys()
    for name, step in made.plan.steps.items():
        assert found.plan.steps[name]._replace(where=step.where) == step


def test_a_recipe_that_takes_the_place_of_one_of_qbuilds_spoils_it(recipe: Path) -> None:
    recipe.write_text("qbuild: 1\nextends: smollm2.yaml\nname: tiny\n")
    write(recipe)
    assert cached(recipe)
    (recipe.parent / "smollm2.yaml").write_text("qbuild: 1\nname: other\n")
    assert not cached(recipe)


def edit(path: Path) -> None:
    path.write_text(path.read_text() + "# edited\n")


SPOILING: dict[str, Callable[[Path], object]] = {
    "the recipe is edited": edit,
    "a recipe that it extends is edited": lambda recipe: edit(recipe.parent / "base.yaml"),
    "a recipe that it extends is gone": lambda recipe: (recipe.parent / "base.yaml").unlink(),
    "the cache is torn": lambda recipe: os.truncate(recipe.parent / "plan", 900),
    "the cache is empty": lambda recipe: os.truncate(recipe.parent / "plan", 0),
}


@pytest.mark.parametrize("what", SPOILING)
def test_cache_does_not_hold_when(recipe: Path, what: str) -> None:
    write(recipe)
    assert cached(recipe)
    SPOILING[what](recipe)
    assert not cached(recipe)


def test_cache_is_for_one_set_of_defines_and_one_folder(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(recipe)
    assert not cached(recipe, {"word": "bye"})
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")  # paths of -D are seen from the current folder
    assert not cached(recipe)


def test_installed_distribution_makes_the_cache_void(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.setattr(sys, "path", [*sys.path, str(site)])
    write(recipe)
    assert cached(recipe)
    (site / "some_plugin-1.0.dist-info").mkdir()
    assert not cached(recipe)


def test_folder_that_takes_the_place_of_a_hub_model_makes_the_cache_void(recipe: Path) -> None:
    text = recipe.read_text().replace("sources: {", "sources: {model: {model: org/name}, ")
    recipe.write_text(text)
    write(recipe)
    assert cached(recipe)
    (recipe.parent / "org/name").mkdir(parents=True)
    assert not cached(recipe)


def test_folder_beside_a_recipe_that_is_extended_takes_the_place_of_a_model(recipe: Path) -> None:
    elsewhere = recipe.parent / "elsewhere"
    elsewhere.mkdir()
    text = "qbuild: 1\nsources: {model: {model: qwen2vl-tiny}}\n"
    (elsewhere / "parent.yaml").write_text(text)
    recipe.write_text("qbuild: 1\nname: shop\nextends: elsewhere/parent.yaml\n")
    write(recipe)
    assert cached(recipe)
    (elsewhere / "qwen2vl-tiny").mkdir()
    assert not cached(recipe)


def test_cache_is_for_one_home(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A path in a recipe may begin with "~"."""
    write(recipe)
    assert cached(recipe)
    monkeypatch.setenv("HOME", str(tmp_path / "another"))
    assert not cached(recipe)


@pytest.mark.parametrize("module", ["say_thing", "say_package.rules.say"])
def test_rule_of_a_plugin_that_is_edited_makes_the_cache_void(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    """Installed editable, it changes under the same version."""
    place = tmp_path / "site" / f"{module.replace('.', '/')}.py"
    place.parent.mkdir(parents=True)
    place.write_text(
        "from buildsys.rules.spec import Rule\n"
        'RULE = Rule(name="say", doc="", options={"word": {"type": "string", "default": "one"}})\n'
        "def make(step): pass\n"
    )
    info = tmp_path / "site/thing-1.0.dist-info"
    info.mkdir()
    (info / "entry_points.txt").write_text(f"[qbuild.rules]\nsay = {module}\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    rule_modules.cache_clear()
    try:
        recipe.write_text("qbuild: 1\nname: p\nartifacts:\n  o.txt: {rule: say}\n")
        assert write(recipe).plan.steps["o.txt"].options == {"word": "one"}
        assert cached(recipe)
        (place.parent / "notes.txt").write_text("this is no module")
        assert cached(recipe)
        place.write_text(place.read_text().replace('"one"', '"two"'))
        assert not cached(recipe)
    finally:
        rule_modules.cache_clear()
        for name in [name for name in sys.modules if name.startswith("say_")]:
            del sys.modules[name]
