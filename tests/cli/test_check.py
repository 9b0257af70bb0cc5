"""`qbuild check`, `graph` and `schema`, typed as a user types them: they say what is wrong and
where, build nothing, write nothing and load nothing heavy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest

ROOT = Path(__file__).resolve().parents[2]
RECIPE = """\
qbuild: 1
name: copies
vars: {count: 2}
sources: {src: {file: in.txt}}
artifacts:
  a.txt: {rule: command, inputs: {src: src}, options: {argv: [cp, "${in.src}", "${out}"]}}
  "b/${i}.txt":
    matrix: {i: [1, 2]}
    rule: command
    inputs: {a: a.txt}
    options: {argv: [cp, "${in.a}", "${out}"], env: {COUNT: "${count}x"}}
"""


def qbuild(folder: Path, *words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "buildsys", *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "copies.yaml").write_text(RECIPE)
    (tmp_path / "recipes" / "in.txt").write_text("hello")
    return tmp_path


def test_check_says_that_all_is_well(project: Path) -> None:
    done = qbuild(project, "check")
    assert done.stdout == "recipes/copies.yaml: no mistakes; 3 artifacts from 1 source\n"


def test_check_shows_a_mistake_as_a_person_needs_it(project: Path) -> None:
    file = project / "recipes" / "copies.yaml"
    file.write_text(RECIPE.replace("inputs: {a: a.txt}", "inputs: {a: a.text}"))
    done = qbuild(project, "check", "recipes/copies.yaml", code=2)
    assert done.stderr == (
        "recipes/copies.yaml:10:17: error: there is no source and no artifact 'a.text'\n"
        "    inputs: {a: a.text}\n"
        "                ^\n"
        "did you mean 'a.txt'?\n"
    )
    assert done.stdout == ""


def test_check_looks_for_the_sources(project: Path) -> None:
    (project / "recipes" / "in.txt").rename(project / "recipes" / "in2.txt")
    done = qbuild(project, "check", code=2)
    assert done.stderr.startswith("recipes/copies.yaml:4:23: error: source 'src': there is no file")
    assert done.stderr.endswith("in2.txt?\n")


def test_check_knows_defines(project: Path) -> None:
    qbuild(project, "check", "-D", "count=3")
    done = qbuild(project, "check", "-D", "cout=3", code=2)
    assert "did you mean 'count'?" in done.stderr
    done = qbuild(project, "check", "-D", "count=many", code=2)
    assert "-D count=many: expected a whole number" in done.stderr
    done = qbuild(project, "check", "-D", "count", code=2)
    assert "expected -D NAME=VALUE" in done.stderr


def test_looking_executes_nothing_and_writes_nothing(project: Path) -> None:
    evil = RECIPE.replace("[cp, ", "[touch, ../../PWNED, ")
    (project / "recipes" / "copies.yaml").write_text(evil)
    before = {path: path.stat().st_mtime_ns for path in project.rglob("*")}
    for words in (["check"], ["graph"], ["graph", "--format", "dot"], ["schema"]):
        qbuild(project, *words)
    assert {path: path.stat().st_mtime_ns for path in project.rglob("*")} == before


def test_looking_loads_nothing_heavy(project: Path) -> None:
    code = (
        "import sys; from buildsys.cli.main import main\n"
        "for words in (['check'], ['graph']): assert main(words) == 0\n"
        "heavy = ('torch', 'doit', 'jinja2', 'transformers', 'numpy')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=project,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_graph_shows_what_hangs_on_what(project: Path) -> None:
    assert qbuild(project, "graph", "b/2.txt").stdout.splitlines() == [
        "b/2.txt [command]",
        "└─ a.txt [command]",
        "   └─ src (file source)",
    ]
    lines = qbuild(project, "graph", "recipes/copies.yaml", "--format", "mermaid").stdout
    assert lines.splitlines()[0] == "flowchart LR"
    done = qbuild(project, "graph", "b/3.txt", code=2)
    assert "there is no artifact 'b/3.txt'" in done.stderr


def test_the_schema_is_a_schema_and_takes_every_shipped_recipe(project: Path) -> None:
    import yaml

    schema = json.loads(qbuild(project, "schema").stdout)
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    shipped = sorted((ROOT / "recipes").glob("*.yaml"))
    assert len(shipped) >= 4
    for file in [*shipped, project / "recipes" / "copies.yaml"]:
        validator.validate(yaml.safe_load(file.read_text()))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("rule: command", "rule: comand"),
        ("argv:", "arg:"),
        ("inputs: {a:", "input: {a:"),
        ("count: 2", "count: {type: integer}"),
        ("[1, 2]", "7"),
        ("file: in.txt", "files: in.txt"),
        ("qbuild: 1", "qbuild: 2"),
        ("[cp,", "[2,"),
    ],
)
def test_an_editor_and_the_loader_refuse_the_same(project: Path, old: str, new: str) -> None:
    import yaml

    assert old in RECIPE
    text = RECIPE.replace(old, new)
    schema = json.loads(qbuild(project, "schema").stdout)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(schema).validate(yaml.safe_load(text))
    (project / "recipes" / "copies.yaml").write_text(text)
    done = qbuild(project, "check", code=2)
    assert done.stderr.startswith("recipes/copies.yaml:")


def test_shipped_recipes_make_plans_from_anywhere(tmp_path: Path) -> None:
    assert "import-gguf" in qbuild(tmp_path, "graph", "recipes/smollm2.yaml").stdout
    assert (
        "rescale.safetensors [rescale]" in qbuild(tmp_path, "graph", "qwen2vl-remedies.yaml").stdout
    )
    done = qbuild(tmp_path, "check", "recipes/qwen2.yaml", code=2)
    assert "give it one: -D model=..." in done.stderr


def test_the_recipe_of_the_quality_tables_is_without_mistakes(tmp_path: Path) -> None:
    told = qbuild(tmp_path, "check", str(ROOT / "bench" / "quality_vl.yaml")).stdout
    assert "no mistakes; 17 artifacts" in told
