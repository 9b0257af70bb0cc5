"""mllm-quantize by GPTQ keeps to the memory that the recipe reserves, and what it has rounded."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from buildsys.models import linear_inputs
from buildsys.models.errors import ModelError
from buildsys.models.hessian_memory import hessian_bytes, limit_of
from buildsys.models.open import open_model
from buildsys.quant import calibrated_blocks
from buildsys.rules.spec import Input
from tests import tiny_models

Runner = Callable[..., Any]
mllm_quantize = importlib.import_module("buildsys.rules.mllm_quantize")
GPTQ = {"type": "Q4_K", "calibration": "gptq"}
WIDEST = 512


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Any]:
    new = tiny_models.new_qwen2(hidden_size=256, intermediate_size=WIDEST, head_dim=64)
    folder = tiny_models.save_model(new, tmp_path / "model")
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 9)
    given = {"samples": 2, "tokens": 64}
    return {
        "model": folder,
        "samples": [Input("text", "text", {"path": tmp_path / "text.txt"}, "t", given)],
    }


def least_memory(model: Path) -> int:
    """What a step must reserve for the widest linear alone."""
    family = open_model(model).family
    start = 1 << 40
    left = limit_of(family, start)
    assert left is not None
    return start - left + hessian_bytes([WIDEST])


def test_a_short_reservation_takes_more_passes_and_gives_the_same_bytes(
    make: Runner, step: Runner, inputs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = make("mllm-quantize", "q.mllm", inputs, GPTQ).out.read_bytes()
    held: list[int] = []
    sums = linear_inputs._sums

    def watched(*given: Any) -> Any:
        found = sums(*given)
        held.append(hessian_bytes([len(each.H) for each in set(found.values())]))
        return found

    monkeypatch.setattr(linear_inputs, "_sums", watched)
    context = step("mllm-quantize", "q.mllm", inputs, GPTQ).context
    mllm_quantize.make(replace(context, memory=least_memory(inputs["model"])))
    assert context.out.read_bytes() == expected
    assert len(held) == 4  # twice two layers: the input of down_proj needs a pass of its own
    assert max(held) <= hessian_bytes([WIDEST])


def test_too_small_a_reservation_is_refused_before_the_work(
    step: Runner, inputs: dict[str, Any], tmp_path: Path
) -> None:
    context = step("mllm-quantize", "q.mllm", inputs, GPTQ).context
    (tmp_path / "kept").mkdir()
    short = least_memory(inputs["model"]) - 1
    with pytest.raises(ModelError, match=r"(?s)down_proj.*GPTQ needs 6 MiB for its 512 inputs"):
        mllm_quantize.make(replace(context, memory=short, kept=tmp_path / "kept"))
    assert not context.out.exists()
    assert not list((tmp_path / "kept").iterdir())


def test_an_imatrix_needs_no_hessians(step: Runner, make: Runner, inputs: dict[str, Any]) -> None:
    options = {**GPTQ, "calibration": "imatrix"}
    expected = make("mllm-quantize", "q.mllm", inputs, options).out.read_bytes()
    context = step("mllm-quantize", "q.mllm", inputs, options).context
    mllm_quantize.make(replace(context, memory=1 << 20))
    assert context.out.read_bytes() == expected


@pytest.mark.parametrize("method", ["gptq", "imatrix"])
def test_a_killed_step_takes_up_its_finished_layers(
    method: str,
    make: Runner,
    step: Runner,
    inputs: dict[str, Any],
    tmp_path: Path,
    monkeypatch: Any,
) -> None:
    options = {**GPTQ, "calibration": method}
    expected = make("mllm-quantize", "q.mllm", inputs, options).out.read_bytes()
    (tmp_path / "kept").mkdir()
    sums = linear_inputs._sums
    visited: list[str] = []

    def killed(visit: Any, *given: Any) -> Any:
        visited.append(visit.stage.name)
        if len(visited) == 2:
            raise KeyboardInterrupt
        return sums(visit, *given)

    monkeypatch.setattr(linear_inputs, "_sums", killed)
    context = replace(
        step("mllm-quantize", "q.mllm", inputs, options).context, kept=tmp_path / "kept"
    )
    with pytest.raises(KeyboardInterrupt):
        mllm_quantize.make(context)
    mllm_quantize.make(context)
    assert context.out.read_bytes() == expected
    assert visited == ["model.layers.0", "model.layers.1", "model.layers.1"]


def test_only_linears_that_get_such_a_type_are_looked_at(
    make: Runner, inputs: dict[str, Any], tmp_path: Path, monkeypatch: Any
) -> None:
    config = tmp_path / "quant.json"
    hints = '{"hints": {"quant_method": "gguf", "gguf_type": "%s"}}'
    config.write_text(
        r'{"model\\.layers\\.1\\.mlp\\.up_proj\\.weight": ' + hints % "Q4_K" + ","
        r' "model\\.layers\\.1\\.mlp\\.down_proj\\.weight": ' + hints % "Q6_K" + "}"
    )
    seen: list[tuple[int, str]] = []
    blocks = calibrated_blocks.gptq_blocks

    def watched(W: Any, H: Any, kind: str, *, name: str) -> Any:
        seen.append((len(H), name))
        return blocks(W, H, kind, name=name)

    monkeypatch.setattr(calibrated_blocks, "gptq_blocks", watched)
    options = {"type": None, "calibration": "gptq"}
    made = make("mllm-quantize", "q.mllm", {**inputs, "config": config}, options)
    assert seen == [(256, "model.layers.1.mlp.up_proj.weight")]
    assert made.notes["calibrated"] == 1
