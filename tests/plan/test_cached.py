"""A plan survives its way through JSON, and reading it imports next to nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable

import pytest

from buildsys.plan.cached import from_json, to_json
from buildsys.plan.graph import Plan

Load = Callable[..., Plan]
RECIPE = """\
qbuild: 1
name: t
vars: {n: 3}
sources:
  model: {model: org/name, revision: abc}
  images: {images: i, prompts: p.yaml, size: [2, 3]}
  own: {file: own.bin}
artifacts:
  r.bin: {rule: rotation, inputs: {model: model}, options: {seed: "${n}"}}
  s.json:
    rule: scales
    inputs: {model: model, rotation: {from: r.bin, optional: true}, samples: [images]}
    options: {level: 0.1}
    outputs: {dump: "ü/d:e.npz"}
    resources: {memory: 2GiB, licence: [a, b]}
    timeout: 90s
    tags: [x, "y z"]
    environment: {A: "1"}
    temporary: true
  b/: {rule: bundle, inputs: {parts: ["*.bin", own]}, optional: true}
gates: {s.json: {figure: 0.5}}
devices: {d: {transport: local, root: /x, push: {r.bin: .}}}
""".replace("d:e", "de")


def without_text(plan: Plan) -> Plan:
    """The lines of steps are not kept."""
    steps = {
        name: step._replace(where=step.where._replace(text="")) for name, step in plan.steps.items()
    }
    return plan._replace(steps=steps)


def test_a_plan_comes_back_as_it_was(load: Load) -> None:
    plan = load(RECIPE, n="4")
    data = json.loads(json.dumps(to_json(plan)))
    back = from_json(data)
    assert back == without_text(plan)
    assert list(back.steps) == list(plan.steps)
    assert isinstance(back.steps["s.json"].tags, tuple)
    assert isinstance(back.steps["b/"].inputs["parts"], tuple)
    assert back.gates[0].where.text == "gates: {s.json: {figure: 0.5}}"


def test_the_same_recipe_gives_the_same_json(load: Load) -> None:
    assert json.dumps(to_json(load(RECIPE))) == json.dumps(to_json(load(RECIPE)))


@pytest.mark.parametrize("data", [None, [], {}, {"version": 2}, "plan"])
def test_what_is_no_plan_is_refused(data: object) -> None:
    with pytest.raises(ValueError, match="not a plan of this version"):
        from_json(data)


def test_reading_a_plan_imports_next_to_nothing() -> None:
    code = (
        "import sys, buildsys.plan.cached, buildsys.plan.targets, buildsys.plan.globs\n"
        "print(' '.join(sorted(sys.modules)))"
    )
    names = subprocess.run(
        [sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True, cwd="."
    ).stdout.split()
    heavy = {"yaml", "jsonschema", "dataclasses", "pathlib", "inspect", "torch", "doit", "jinja2"}
    assert heavy.isdisjoint(names)
    assert not [name for name in names if name.startswith(("buildsys.recipe", "buildsys.rules"))]
