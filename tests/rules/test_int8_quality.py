"""int8.pth with fewer errors: GPTQ, searched scales, shadow layers, and the ladder of `quality`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from buildsys.errors import StepError
from buildsys.models.errors import ModelError
from buildsys.rules import int8_ladder
from buildsys.rules.int8_checkpoint import RULE
from buildsys.rules.spec import Input
from tests.rules.plans import plan_of

OPTIONS = {"clip": "all", "t01m_clip_threshold": None}


def _text(folder: Path) -> Input:
    path = folder / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    return Input("text", "text", {"path": path}, "d", {"samples": 4, "tokens": 64})


def test_gptq_changes_whole_numbers_and_no_scale(
    make: Any, qwen2_folder: Path, tmp_path: Path
) -> None:
    samples = _text(tmp_path)
    model = {"model": qwen2_folder}
    scales = make("activation-scales", "scales.json", {**model, "samples": [samples]}).out
    inputs = {**model, "scales": scales}
    nearest = torch.load(make("int8-checkpoint", "n.pth", inputs).out, weights_only=True)
    options = {"rounding": "gptq", "bias_correction": True}
    made = make("int8-checkpoint", "g.pth", {**inputs, "samples": [samples]}, options)
    found = torch.load(made.out, weights_only=True)
    assert list(found) == list(nearest)
    changed = {name for name in found if not torch.equal(found[name], nearest[name])}
    assert {name.rsplit(".", 2)[1] for name in changed if name.endswith("weight")} == {
        f"{kind}_proj" for kind in ("q", "k", "v", "o", "gate", "up", "down")
    }
    assert {name.rsplit(".", 2)[1] for name in changed if name.endswith("bias")} == {
        "q_proj", "k_proj", "v_proj",
    }  # fmt: skip
    assert {name.rsplit(".", 1)[1] for name in changed} == {"weight", "bias"}


def test_a_searched_scale_is_at_most_the_largest_weights(
    make: Any, qwen2_folder: Path, tmp_path: Path
) -> None:
    samples = _text(tmp_path)
    model = {"model": qwen2_folder}
    scales = make("activation-scales", "scales.json", {**model, "samples": [samples]}).out
    inputs = {**model, "scales": scales, "samples": [samples]}
    made = [
        torch.load(
            make(
                "int8-checkpoint",
                f"{how}.pth",
                inputs,
                {"rounding": "gptq", "weight_scale": how},
            ).out,
            weights_only=True,
        )
        for how in ("absmax", "search")
    ]
    names = [name for name in made[0] if name.endswith("weight.scale")]
    ratios = [float(made[1][name] / made[0][name]) for name in names]
    assert max(ratios) <= 1.0
    assert min(ratios) < 0.96


def test_gptq_without_samples_is_refused_before_anything_runs() -> None:
    for options in (
        {"rounding": "gptq"},
        {"bias_correction": True},
        {"weight_scale": "search"},
    ):
        step, plan = plan_of("int8.pth", "int8-checkpoint", options={**OPTIONS, **options})
        assert RULE.check is not None
        assert [problem.option for problem in RULE.check(step, plan)] == list(options)


def test_shadow_layers_are_those_that_it_is_worth_most_for(
    make: Any, qwen2_folder: Path, tmp_path: Path
) -> None:
    inputs = {"model": qwen2_folder, "samples": [_text(tmp_path)]}
    options = {"clipping": {"down": "relative"}, "target": "mllm-v1-vl"}
    file = make("activation-scales", "scales.json", inputs, options).out
    content = json.loads(file.read_text())
    names = [f"model.layers.{layer}.mlp.down_proj" for layer in range(2)]
    for gain, name in enumerate(names):
        content["clipped"][name]["shadow"]["gain"] = float(gain)
    file.write_text(json.dumps(content))
    inputs = {"model": qwen2_folder, "scales": file}
    made = make("int8-checkpoint", "int8.pth", inputs, {"target": "mllm-v1-vl", "shadow": 1})
    state = torch.load(made.out, weights_only=True)
    assert made.notes["shadow_layers"] == [1]
    ranges = content["clipped"][names[1]]["shadow"]
    assert float(state[f"{names[1]}.input_scale"]) == pytest.approx(ranges["input"])
    assert not bool(state[f"{names[1]}.clip_output"])
    assert bool(state[f"{names[0]}.clip_output"])
    del content["clipped"]
    file.write_text(json.dumps(content))
    with pytest.raises(ModelError, match="no linear has shadow ranges"):
        make("int8-checkpoint", "other.pth", inputs, {"target": "mllm-v1-vl", "shadow": 1})


def searched(make: Any, folder: Path, tmp_path: Path, within: float, **more: Any) -> Any:
    """The ladder on a tiny model whose scales are clipped; the text is another part."""
    words = "The quick brown fox jumps over the lazy dog. "
    (tmp_path / "a.txt").write_text(words * 20)
    (tmp_path / "b.txt").write_text(words[::-1] * 20)
    options = {"samples": 4, "tokens": 64}
    samples, text = (
        Input(name, "text", {"path": tmp_path / f"{name}.txt"}, "d", options) for name in "ab"
    )
    inputs = {"model": folder, "samples": [samples]}
    clipping = {"clipping": "mse", "target": "mllm-v1-vl"}
    scales = make("activation-scales", "scales.json", inputs, clipping).out
    inputs |= {"scales": scales, "text": [text]}
    quality = {"metric": "ppl", "within": within}
    return make(
        "int8-checkpoint", "int8.pth", inputs, {"target": "mllm-v1-vl", "quality": quality, **more}
    )


def test_the_cheapest_rung_that_is_good_enough_is_taken(
    make: Any, qwen2_folder: Path, tmp_path: Path
) -> None:
    made = searched(make, qwen2_folder, tmp_path, 10.0)
    assert made.notes["quality"]["chosen"] == "absmax"
    assert list(made.notes["quality"]["tried"]) == ["absmax"]
    told = json.loads(made.output("shadow_layers").read_text())["quality"]
    assert told == {"variant": "int8.pth", **made.notes["quality"]}
    assert torch.load(made.out, weights_only=True)


def test_a_quality_that_no_rung_reaches_is_an_error_with_all_figures(
    make: Any, qwen2_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A model with random weights is not made worse by rounding: its figures are set here.
    monkeypatch.setattr(int8_ladder, "_increase", lambda plain, found: 0.5)
    with pytest.raises(StepError) as caught:
        searched(make, qwen2_folder, tmp_path, 1e-9, shadow=2)
    for rung in ("absmax:", "clipped:", "clipped, gptq:", "1 shadow layers:", "2 shadow layers:"):
        assert rung in str(caught.value)


def test_quality_without_text_is_refused_before_anything_runs() -> None:
    quality = {"metric": "ppl", "within": 0.01}
    step, plan = plan_of("int8.pth", "int8-checkpoint", options={**OPTIONS, "quality": quality})
    assert RULE.check is not None
    assert [problem.option for problem in RULE.check(step, plan)] == ["quality"]
