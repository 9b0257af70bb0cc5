"""Small rules of every shape, and recipes typed into files as a user would."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import pytest

from buildsys.errors import RecipeError
from buildsys.plan.graph import Plan, Step
from buildsys.plan.load import load_plan
from buildsys.rules.spec import ANY_FILE, InputSpec, OutputSpec, Problem, Rule

Load = Callable[..., Plan]
Refuse = Callable[..., str]
RUN = "{rule: run, options: {argv: [a]}}"


def caret(line: str, column: int, message: str, remedy: str = "", number: int = 8) -> str:
    """What explain() prints about one place of the recipe r.yaml."""
    lines = [f"r.yaml:{number}:{column}: error: {message}", line, " " * (column - 1) + "^"]
    return "\n".join([*lines, remedy] if remedy else lines)


def odd_seed(step: Step, plan: Plan) -> Iterable[Problem]:
    if step.options["seed"] == 13:
        yield Problem("13 brings bad luck", remedy="take 12", option="seed")
    if plan.producer.get("forbidden.txt") and step.inputs.get("rotation"):
        yield Problem("not together with forbidden.txt", input="rotation")


RULES = {
    rule.name: rule
    for rule in (
        Rule(
            name="rotation",
            doc="a matrix",
            inputs={"model": InputSpec("the model", kinds=("model", "artifact", "folder"))},
            options={
                "method": {"enum": ["hadamard", "random"], "default": "hadamard"},
                "seed": {"type": "integer", "minimum": 0, "default": 0},
                "vision": {"type": "boolean", "default": True},
            },
            threads=2,
            check=odd_seed,
        ),
        Rule(
            name="scales",
            doc="ranges",
            inputs={
                "model": InputSpec("the model", kinds=("model", "artifact", "folder")),
                "rotation": InputSpec("the matrix", kinds=ANY_FILE, required=False),
                "samples": InputSpec("what to measure on", kinds=("text", "images"), many=True),
            },
            options={"level": {"type": "number", "exclusiveMinimum": 0, "maximum": 1}},
            outputs={
                "histogram": OutputSpec("a picture", "histogram.json"),
                "dump": OutputSpec("everything", None),
            },
        ),
        Rule(
            name="bundle",
            doc="a folder of things",
            inputs={"parts": InputSpec("what goes in", kinds=ANY_FILE, many=True)},
            folder=True,
            toolchain="packer",
        ),
        Rule(
            name="run",
            doc="any program",
            options={
                "argv": {"type": "array", "items": {"type": "string"}, "minItems": 1},
                "note": {"type": "string", "default": ""},
            },
            open_inputs=True,
            rendered=("argv",),
        ),
    )
}
HEAD = """\
qbuild: 1
name: t
sources:
  model: {model: ./m}
  text: {text: t.txt}
  own: {file: own.bin}
"""


@pytest.fixture
def rules() -> Mapping[str, Rule]:
    return RULES


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty project, which is the current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def load(project: Path) -> Load:
    """load(text, **defines): the plan of a recipe with this text, called r.yaml."""

    def read(text: str, /, **defines: str) -> Plan:
        (project / "r.yaml").write_text(textwrap.dedent(text), encoding="utf-8")
        return load_plan("r.yaml", defines, RULES)[0]

    return read


@pytest.fixture
def artifacts(load: Load) -> Load:
    """artifacts(text, **defines): the same, after three sources (model, text, own)."""

    def read(text: str, /, **defines: str) -> Plan:
        return load(HEAD + "artifacts:\n" + textwrap.indent(textwrap.dedent(text), "  "), **defines)

    return read


@pytest.fixture
def refuse(load: Load) -> Refuse:
    """refuse(text, **defines): what qbuild prints about a recipe that is wrong."""

    def read(text: str, /, **defines: str) -> str:
        with pytest.raises(RecipeError) as caught:
            load(text, **defines)
        assert caught.value.exit_code == 2
        return str(caught.value)

    return read


@pytest.fixture
def refuse_artifacts(artifacts: Load) -> Refuse:
    def read(text: str, /, **defines: str) -> str:
        with pytest.raises(RecipeError) as caught:
            artifacts(text, **defines)
        return str(caught.value)

    return read
