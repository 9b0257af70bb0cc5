"""The graph as text, dot and Mermaid."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable

import pytest

from buildsys.plan import drawing
from buildsys.plan.graph import Plan

Load = Callable[..., Plan]
RECIPE = """\
r.bin: {rule: rotation, inputs: {model: model}}
s.json: {rule: scales, inputs: {model: model, rotation: r.bin, samples: text}, options: {level: 1}}
a-b(1):
  rule: run
  inputs: {x: [r.bin, {from: s.json, optional: true}]}
  options: {argv: [a]}
  optional: true
  tags: [q]
"""


def test_the_tree_unfolds_each_artifact_once(artifacts: Load) -> None:
    plan = artifacts(RECIPE.replace("-b(1)", ""))
    assert list(drawing.tree(plan, tuple(plan.steps))) == [
        "a [run] optional tag:q",
        "├─ r.bin [rotation]",
        "│  └─ model (model source)",
        "└─ s.json + histogram.json [scales]",
        "   ├─ model (model source)",
        "   ├─ r.bin ...",
        "   └─ text (text source)",
    ]


def test_the_tree_of_a_long_chain_needs_no_recursion(artifacts: Load) -> None:
    count = 1200
    text = "n0: {rule: run, options: {argv: [a]}}\n" + "".join(
        f"n{n}: {{rule: run, inputs: {{x: n{n - 1}}}, options: {{argv: [a]}}}}\n"
        for n in range(1, count)
    )
    plan = artifacts(text)
    assert sum(1 for _ in drawing.tree(plan, tuple(plan.steps))) == count


def test_mermaid_has_a_node_for_each_name_and_dashes_for_what_may_miss(artifacts: Load) -> None:
    plan = artifacts(RECIPE)
    lines = list(drawing.mermaid(plan, tuple(plan.steps)))
    assert lines[0] == "flowchart LR"
    assert '  n4["a-b#40;1#41;"]' in lines
    assert "  n3 -.-> n4" in lines
    assert "  n2 --> n4" in lines
    assert "  s0 --> n2" in lines


@pytest.mark.skipif(shutil.which("dot") is None, reason="Graphviz is not installed")
def test_graphviz_reads_the_dot(artifacts: Load) -> None:
    plan = artifacts(RECIPE)
    text = "\n".join(drawing.dot(plan, tuple(plan.steps)))
    done = subprocess.run(
        ["dot", "-Tplain"], input=text, capture_output=True, text=True, check=True, timeout=60
    )
    assert sum(line.startswith("node ") for line in done.stdout.splitlines()) == 5
    assert sum(line.startswith("edge ") for line in done.stdout.splitlines()) == 6
