"""Which recipe a command line means, and what is read for it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from buildsys.errors import UsageError
from buildsys.plan.load import InstalledRules, find_recipe, load_plan
from buildsys.rules.spec import Rule


def test_a_recipe_that_is_named_is_the_one(project: Path) -> None:
    (project / "x.yaml").write_text("")
    assert find_recipe("x.yaml", "last.yaml") == "x.yaml"


def test_without_a_name_it_is_the_last_then_the_only_one(project: Path) -> None:
    assert find_recipe(None, "last.yaml") == "last.yaml"
    (project / "recipes").mkdir()
    (project / "recipes" / "a.yaml").write_text("")
    (project / "recipes" / "notes.txt").write_text("")
    assert find_recipe(None) == "recipes/a.yaml"
    (project / "recipes" / "b.yaml").write_text("")
    with pytest.raises(UsageError, match=r"name one of recipes/a.yaml, recipes/b.yaml"):
        find_recipe(None)


def test_without_recipes_it_says_which_are_shipped(project: Path) -> None:
    with pytest.raises(UsageError, match=r"recipes/qwen2vl\.yaml"):
        find_recipe(None)


@pytest.mark.parametrize("word", ["qwen2vl.yaml", "recipes/qwen2vl.yaml"])
def test_a_shipped_recipe_is_found_from_anywhere(project: Path, word: str) -> None:
    found = Path(find_recipe(word))
    assert found.is_absolute()
    assert found.name == "qwen2vl.yaml"


def test_a_recipe_of_the_project_wins_over_a_shipped_one(project: Path) -> None:
    (project / "recipes").mkdir()
    (project / "recipes" / "qwen2vl.yaml").write_text("")
    assert find_recipe("recipes/qwen2vl.yaml") == "recipes/qwen2vl.yaml"


def test_a_name_that_nothing_has_says_the_nearest(project: Path) -> None:
    with pytest.raises(UsageError, match=r"did you mean 'recipes/qwen2vl.yaml'\?"):
        find_recipe("recipes/qwn2vl.yaml")
    with pytest.raises(UsageError, match="there is no recipe"):
        find_recipe("../recipes/../../etc/passwd.yaml")


def test_every_file_that_was_read_is_told(project: Path, rules: Mapping[str, Rule]) -> None:
    (project / "sub").mkdir()
    (project / "sub/b.yaml").write_text("qbuild: 1\n")
    (project / "a.yaml").write_text("qbuild: 1\nextends: sub/b.yaml\n")
    plan, files = load_plan("a.yaml", {}, rules)
    assert files == ("a.yaml", "sub/b.yaml")
    assert (plan.name, plan.recipe) == ("a", "a.yaml")


def test_the_installed_rules_are_a_mapping_by_name() -> None:
    rules = InstalledRules()
    assert rules["command"].name == "command"
    assert "command" in list(rules)
    assert "no-such-rule" not in rules
    assert len(rules) == len(list(rules))
