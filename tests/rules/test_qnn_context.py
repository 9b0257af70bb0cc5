"""What the plan already knows to be wrong about a QNN context."""

from __future__ import annotations

from typing import Any

import pytest

from buildsys.rules.qnn_context import RULE
from tests.rules.plans import plan_of

OPTIONS = {name: spec.get("default") for name, spec in RULE.options.items()}


def problems(points: str = "graph", scales: dict[str, str] | None = None, **options: Any) -> Any:
    """(input or option, message, remedy) of every problem of a step."""
    rotation, _ = plan_of("rotation.bin", "rotation", model="m")
    made_with = {"model": "m", "rotation": "rotation.bin"} if scales is None else scales
    maker, _ = plan_of(
        "scales.json", "activation-scales", rotation, options={"points": points}, **made_with
    )
    step, plan = plan_of(
        "qnn/",
        "qnn-context",
        rotation,
        maker,
        options={**OPTIONS, **options},
        model="m",
        rotation="rotation.bin",
        scales="scales.json",
    )
    assert RULE.check is not None
    return [(p.input or p.option, p.message, p.remedy) for p in RULE.check(step, plan)]


def test_a_step_that_fits_together_is_silent() -> None:
    assert problems() == []
    assert problems(arch=73, soc="SM8550") == []


def test_a_soc_of_another_arch_is_refused() -> None:
    ((where, message, remedy),) = problems(soc="SM8550")
    assert (where, message) == ("soc", "SM8550 has a Hexagon v73, not v75")
    assert "arch: 73" in remedy


def test_scales_of_linears_alone_are_refused() -> None:
    ((where, message, remedy),) = problems(points="linears")
    assert where == "scales"
    assert "ranges of linears only" in message
    assert "points: graph" in remedy


@pytest.mark.parametrize("scales", [{"model": "m"}, {"model": "n", "rotation": "rotation.bin"}])
def test_scales_of_another_rotation_or_model_are_refused(scales: dict[str, str]) -> None:
    found = problems(scales=scales)
    assert [where for where, _, _ in found] == ["scales"]


def test_patches_must_merge() -> None:
    ((where, _, remedy),) = problems(patches=30)
    assert (where, remedy) == ("patches", "Give a multiple of 4.")
