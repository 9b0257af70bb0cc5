"""`device: auto` is settled with the plan, and what it came to is in the key."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from buildsys import gpus
from buildsys.engine.key import device_of, fixed_parts
from buildsys.errors import RecipeError
from buildsys.plan import load as loading
from buildsys.plan.graph import Plan

RECIPE = """\
qbuild: 1
sources: {{model: {{model: m}}, text: {{text: t.txt}}}}
artifacts:
  scales.json:
    rule: activation-scales
    inputs: {{model: model, samples: text}}
    {more}
"""


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    def make(more: str = "", cuda: bool = False) -> Plan:
        monkeypatch.setattr(gpus, "torch_has_cuda", lambda: cuda)
        (tmp_path / "r.yaml").write_text(RECIPE.format(more=more))
        return loading.load_plan(str(tmp_path / "r.yaml"), {})[0]

    return make


def parts_of(plan: Plan) -> dict[str, Any]:
    return fixed_parts(plan.steps["scales.json"], plan, ())


AUTO = "options: {device: auto}"


@pytest.mark.parametrize(
    ("more", "cuda", "device", "reserved"),
    [
        ("", True, "cpu", 0),
        (AUTO, False, "cpu", 0),
        (AUTO, True, "cuda", 1),
        ("options: {device: cuda}", False, "cuda", 1),
        (f"{AUTO}\n    resources: {{gpu: 2}}", False, "cuda", 2),
    ],
)
def test_the_device_is_settled(
    plan: Any, more: str, cuda: bool, device: str, reserved: int
) -> None:
    step = plan(more, cuda).steps["scales.json"]
    assert (step.options["device"], device_of(step)) == (device, device)
    assert step.resources.get("gpu", 0) == reserved


def test_what_auto_came_to_is_in_the_key(plan: Any) -> None:
    assert parts_of(plan(AUTO, False)) == parts_of(plan())
    assert parts_of(plan(AUTO, True)) == parts_of(plan("options: {device: cuda}", True))
    assert parts_of(plan(AUTO, True)) != parts_of(plan(AUTO, False))


def test_a_step_that_reserves_a_gpu_computes_on_it(plan: Any) -> None:
    with pytest.raises(RecipeError, match=r"reserves a GPU and computes on the CPU") as raised:
        plan("resources: {gpu: 1}")
    assert "device: cuda" in str(raised.value.remedy)


@pytest.mark.parametrize(
    ("nodes", "version", "found"),
    [
        (["nvidia0", "nvidia1", "nvidiactl"], "2.13.0", True),
        (["nvidia0"], "2.13.0+cu130", True),
        (["nvidia0"], "2.13.0+cpu", False),
        (["nvidiactl", "null"], "2.13.0", False),
    ],
)
def test_a_gpu_counts_where_torch_was_built_for_it(
    monkeypatch: pytest.MonkeyPatch, nodes: list[str], version: str, found: bool
) -> None:
    listed = [SimpleNamespace(name=node) for node in nodes]
    monkeypatch.setattr(gpus.os, "scandir", lambda path: nullcontext(listed))
    monkeypatch.setattr(gpus, "distribution_versions", lambda search: {"torch": version})
    assert gpus.torch_has_cuda() is found
