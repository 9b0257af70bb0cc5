"""int8-checkpoint by GPTQ keeps to the memory that the recipe reserves, and what it has rounded."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from buildsys.models import rounded
from buildsys.models.errors import ModelError
from buildsys.rules.spec import Input
from tests import tiny_models

GPTQ = {"rounding": "gptq", "target": "mllm-v1-text"}
Runner = Callable[..., Any]
int8_checkpoint = importlib.import_module("buildsys.rules.int8_checkpoint")


@pytest.fixture
def inputs(make: Runner, tmp_path: Path) -> dict[str, Any]:
    folder = tiny_models.save_model(tiny_models.new_qwen2(), tmp_path / "model")
    tiny_models.save_byte_tokenizer(folder)
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 9)
    given = {"samples": 2, "tokens": 64}
    samples = Input("text", "text", {"path": tmp_path / "text.txt"}, "t", given)
    both = {"model": folder, "samples": [samples]}
    return {**both, "scales": make("activation-scales", "scales.json", both).out}


def test_too_small_a_reservation_is_refused_before_the_work(
    step: Runner, inputs: dict[str, Any]
) -> None:
    prepared = step("int8-checkpoint", "int8.pth", inputs, GPTQ).context
    with pytest.raises(ModelError, match=r"(?s)GPTQ needs .* MiB for its .* inputs.*resources"):
        int8_checkpoint.make(replace(prepared, memory=100 << 20))
    assert not prepared.out.exists()


def test_a_killed_step_takes_up_its_rounded_layers(
    make: Runner, step: Runner, inputs: dict[str, Any], tmp_path: Path, monkeypatch: Any
) -> None:
    expected = make("int8-checkpoint", "int8.pth", inputs, GPTQ).out.read_bytes()
    (tmp_path / "kept").mkdir()
    rounds = rounded._round
    calls = []

    def killed(visit: Any, *given: Any) -> Any:
        calls.append(visit.stage.name)
        if visit.stage.index == 1 and len(calls) == 2:
            raise KeyboardInterrupt
        return rounds(visit, *given)

    monkeypatch.setattr(rounded, "_round", killed)
    for attempt in range(2):
        context = step("int8-checkpoint", "int8.pth", inputs, GPTQ).context
        context = replace(context, kept=tmp_path / "kept", memory=4 << 30)
        if attempt == 0:
            with pytest.raises(KeyboardInterrupt):
                int8_checkpoint.make(context)
        else:
            int8_checkpoint.make(context)
            assert context.out.read_bytes() == expected
    assert calls == ["model.layers.0", "model.layers.1", "model.layers.1"]
