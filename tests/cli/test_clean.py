"""`qbuild clean` where the recipe is of no help."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import RECIPE, Qbuild


@pytest.fixture
def broken(qbuild: Qbuild, project: Path) -> Path:
    """A built project whose recipe no longer can be read."""
    assert qbuild("all", "tiny.yaml").returncode == 0
    (project / "tiny.yaml").write_text(RECIPE.replace("rule: command", "rule: comand"))
    return project


def artifacts(project: Path) -> set[str]:
    own = project / "build/tiny/.qbuild"
    files = (project / "build/tiny").rglob("*")
    return {str(f.relative_to(own.parent)) for f in files if f.is_file() and own not in f.parents}


def test_recipe_that_cannot_be_read_is_shown_and_its_artifacts_are_removed(
    qbuild: Qbuild, broken: Path
) -> None:
    done = qbuild("clean", "tiny.yaml")
    assert done.returncode == 0
    assert "unknown rule 'comand'" in done.stderr
    assert "the journal of build/tiny" in done.stderr
    assert done.stdout == "removed a\nremoved b\nremoved sub/c\n"
    assert artifacts(broken) == set()
    assert (broken / "src.txt").exists()


def test_clean_all_forgets_the_folder_without_the_recipe(qbuild: Qbuild, broken: Path) -> None:
    (broken / "build/tiny/mine.txt").write_text("not qbuild's")
    assert qbuild("clean", "--all").returncode == 0
    assert artifacts(broken) == {"mine.txt"}
    assert {f.name for f in (broken / "build/tiny/.qbuild").iterdir()} <= {"lock"}


def test_named_artifacts_are_removed_without_the_recipe(qbuild: Qbuild, broken: Path) -> None:
    assert qbuild("clean", "tiny.yaml", "b").stdout == "removed b\n"
    assert artifacts(broken) == {"a", "sub/c"}
    done = qbuild("clean", "tiny.yaml", "none")
    assert done.returncode == 2
    assert "nothing was built that is called 'none'" in done.stderr


def test_what_is_stale_only_the_recipe_says(qbuild: Qbuild, broken: Path) -> None:
    done = qbuild("clean", "tiny.yaml", "--stale")
    assert (done.returncode, done.stdout) == (2, "")
    assert artifacts(broken) == {"a", "b", "sub/c"}


def test_two_folders_of_one_broken_recipe_must_be_told_apart(qbuild: Qbuild, broken: Path) -> None:
    (broken / "tiny.yaml").write_text(RECIPE)
    qbuild("all", "tiny.yaml", "--build-dir", "build/other")
    (broken / "tiny.yaml").write_text("no recipe")
    assert qbuild("clean", "tiny.yaml").returncode == 2
    assert artifacts(broken) == {"a", "b", "sub/c"}
    assert qbuild("clean", "tiny.yaml", "--build-dir", "build/tiny").returncode == 0
    assert artifacts(broken) == set()
