"""Words of a command line mean what a person would think, or say what there is."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from buildsys.errors import UsageError
from buildsys.plan.graph import Plan
from buildsys.plan.targets import downstream, targets, upstream

Load = Callable[..., Plan]


@pytest.fixture
def plan(artifacts: Load) -> Plan:
    return artifacts(
        """\
        r.bin: {rule: rotation, inputs: {model: model}}
        s.json:
          rule: scales
          inputs: {model: model, rotation: r.bin, samples: text}
          options: {level: 1}
          tags: [npu]
        "k/${i}.so": {matrix: {i: [1, 2]}, rule: run, options: {argv: [a]}, tags: [npu, qnn]}
        kit/: {rule: bundle, inputs: {parts: ["k/*", histogram.json]}}
        """
    )


@pytest.mark.parametrize(
    ("words", "steps"),
    [
        ([], ["r.bin", "s.json", "k/1.so", "k/2.so", "kit/"]),
        (["kit/", "r.bin"], ["r.bin", "kit/"]),
        (["kit"], ["kit/"]),
        (["histogram.json"], ["s.json"]),
        (["k/*"], ["k/1.so", "k/2.so"]),
        (["*.json"], ["s.json"]),
        (["tag:npu"], ["s.json", "k/1.so", "k/2.so"]),
        (["tag:qnn", "k/1.so"], ["k/1.so", "k/2.so"]),
    ],
)
def test_words_name_steps(plan: Plan, words: list[str], steps: list[str]) -> None:
    assert list(targets(plan, words)) == steps


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("r.bim", "error: there is no artifact 'r.bim'\ndid you mean 'r.bin'?"),
        ("tag:qn", "error: no artifact has the tag 'qn'\ndid you mean 'tag:qnn'?"),
        ("model", "error: 'model' is a source: qbuild reads it and does not make it"),
        ("*.mllm", "error: there is no artifact '*.mllm'\nartifacts: histogram.json, "),
    ],
)
def test_what_means_nothing_is_a_usage_error(plan: Plan, word: str, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        targets(plan, ["r.bin", word])
    assert str(caught.value).startswith(says)
    assert caught.value.exit_code == 2


def test_upstream_is_everything_needed(plan: Plan) -> None:
    assert list(upstream(plan, ["s.json"])) == ["r.bin", "s.json"]
    assert list(upstream(plan, ["kit/"])) == ["r.bin", "s.json", "k/1.so", "k/2.so", "kit/"]
    assert list(upstream(plan, [])) == []


def test_downstream_is_everything_that_needs_it(plan: Plan) -> None:
    assert list(downstream(plan, ["r.bin"])) == ["r.bin", "s.json", "kit/"]
    assert list(downstream(plan, ["k/2.so"])) == ["k/2.so", "kit/"]
