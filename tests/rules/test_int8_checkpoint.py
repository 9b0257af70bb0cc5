"""int8.pth is the real tool's, and what would be silently wrong in its runtime is an error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from buildsys.errors import StepError
from buildsys.models.errors import ModelError
from buildsys.rules.int8_checkpoint import RULE
from buildsys.rules.spec import Input
from tests import tiny_models
from tests.rules.plans import plan_of

OPTIONS = {"clip": "all", "t01m_clip_threshold": None}


@pytest.fixture
def scales(qwen2_folder: Path, tmp_path: Path) -> Path:
    """Scales of the tiny Qwen2 as mllm's tool writes them: no word of their making."""
    return _write_scales(tmp_path / "scales.json", qwen2_folder)


def test_the_real_tools_checkpoint_is_reproduced(make: Any, golden: Path) -> None:
    folder = golden / "mllm_qwen2_tiny"
    inputs = {"model": folder, "rotation": folder / "R.bin", "scales": folder / "dis.json"}
    made = make("int8-checkpoint", "int8.pth", inputs, {"t01m_clip_threshold": 64})
    found = torch.load(made.out, weights_only=True)
    expected = torch.load(folder / "int8.pth", weights_only=True)
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].stride() == tensor.stride(), name
        assert torch.equal(found[name], tensor), name
    assert json.loads(made.output("shadow_layers").read_text())["shadow_layers"] == []


def test_by_default_every_range_is_the_maximum_and_clips(
    make: Any, qwen2_folder: Path, scales: Path
) -> None:
    inputs = {"model": qwen2_folder, "scales": scales}
    state = torch.load(make("int8-checkpoint", "int8.pth", inputs).out, weights_only=True)
    ranges = json.loads(scales.read_text())["ori"]
    for name, sides in ranges.items():
        assert bool(state[f"{name}.clip_input"])
        assert bool(state[f"{name}.clip_output"])
        assert state[f"{name}.output_scale"] == pytest.approx(sides["output"])


def test_a_group_that_reads_one_tensor_has_one_input_scale(
    make: Any, qwen2_folder: Path, scales: Path
) -> None:
    content = json.loads(scales.read_text())
    content["ori"]["model.layers.1.self_attn.k_proj"]["input"] = 77.0
    scales.write_text(json.dumps(content))
    inputs = {"model": qwen2_folder, "scales": scales}
    state = torch.load(make("int8-checkpoint", "int8.pth", inputs).out, weights_only=True)
    prefix = "model.layers.1.self_attn"
    assert {float(state[f"{prefix}.{k}_proj.input_scale"]) for k in "qkv"} == {77.0}
    state = _threshold(make, inputs, 1000)
    assert float(state[f"{prefix}.q_proj.input_scale"]) < 77.0


def test_outlier_layers_are_told_and_written(make: Any, qwen2_folder: Path, scales: Path) -> None:
    name = _with_outlier(scales, "model.layers.1.mlp.down_proj")
    inputs = {"model": qwen2_folder, "scales": scales}
    made = make("int8-checkpoint", "int8.pth", inputs, {"t01m_clip_threshold": 64})
    state = torch.load(made.out, weights_only=True)
    assert not bool(state[f"{name}.clip_input"])
    assert bool(state[f"{name}.clip_output"])
    assert json.loads(made.output("shadow_layers").read_text()) == {
        "target": "mllm-v1-text",
        "t01m_clip_threshold": 64,
        "shadow_layers": [1],
        "no_clip_input": [name],
        "no_clip_output": [],
    }
    assert any(name in warning for warning in made.warnings)


def test_a_runtime_config_that_does_not_shadow_an_outlier_layer_is_an_error(
    make: Any, qwen2_folder: Path, scales: Path
) -> None:
    _with_outlier(scales, "model.layers.1.mlp.down_proj")
    inputs = {"model": qwen2_folder, "scales": scales}
    options = {"t01m_clip_threshold": 64, "runtime_config": "1.5b-rotated"}
    with pytest.raises(StepError, match=r"does not shadow model\.layers\.1\.mlp\.down_proj"):
        make("int8-checkpoint", "int8.pth", inputs, options)
    make("int8-checkpoint", "int8.pth", inputs, options | {"runtime_config": "1.5b"})


def test_an_outlier_that_no_shadow_op_exists_for_is_an_error(
    make: Any, qwen2_folder: Path, scales: Path
) -> None:
    _with_outlier(scales, "model.layers.1.mlp.up_proj")
    inputs = {"model": qwen2_folder, "scales": scales}
    options = {"t01m_clip_threshold": 64, "runtime_config": "1.5b"}
    with pytest.raises(StepError, match=r"model\.layers\.1\.mlp\.up_proj"):
        make("int8-checkpoint", "int8.pth", inputs, options)


def test_a_linear_without_a_scale_is_named(make: Any, qwen2_folder: Path, scales: Path) -> None:
    content = json.loads(scales.read_text())
    for key in ("ori", "top_0_1"):
        del content[key]["model.layers.0.mlp.up_proj"]
    scales.write_text(json.dumps(content))
    with pytest.raises(ModelError, match=r"'model\.layers\.0\.mlp\.up_proj': is to be quantized"):
        make("int8-checkpoint", "int8.pth", {"model": qwen2_folder, "scales": scales})


def test_a_vision_tower_without_scales_is_named_or_left_in_float(
    make: Any, qwen2vl_folder: Path, qwen2_folder: Path, tmp_path: Path
) -> None:
    scales = _write_scales(tmp_path / "scales.json", qwen2_folder)
    inputs = {"model": qwen2vl_folder, "scales": scales}
    with pytest.raises(ModelError, match=r"'visual\.blocks\.0\.attn\.qkv': is to be quantized"):
        make("int8-checkpoint", "int8.pth", inputs)
    state = torch.load(
        make("int8-checkpoint", "int8.pth", inputs, {"vision": False}).out, weights_only=True
    )
    assert state["visual.blocks.0.attn.qkv.weight"].dtype == torch.float32
    assert state["model.layers.0.mlp.up_proj.weight"].dtype == torch.int8


def test_a_turned_vision_tower_has_mllms_keys_in_either_construction(
    make: Any, qwen2vl_folder: Path, tmp_path: Path
) -> None:
    scales = _write_scales(tmp_path / "scales.json", qwen2vl_folder)
    keys = []
    for construction in ("layernorm", "mllm"):
        options = {"construction": construction}
        rotation = make("rotation", "r.bin", {"model": qwen2vl_folder}, options).out
        inputs = {"model": qwen2vl_folder, "rotation": rotation, "scales": scales}
        made = make("int8-checkpoint", "int8.pth", inputs)
        keys.append(list(torch.load(made.out, weights_only=True)))
    assert keys[0] == keys[1]
    assert "visual.blocks.0.norm1.weight" in keys[0]
    assert "visual.blocks.0.norm1.bias" not in keys[0]
    assert "visual.merger.mlp.0.weight.scale" not in keys[0]
    assert "visual.blocks.0.attn.qkv.weight.scale" in keys[0]


def test_a_vision_tower_that_is_not_turned_is_warned_of(
    make: Any, qwen2vl_folder: Path, tmp_path: Path
) -> None:
    scales = _write_scales(tmp_path / "scales.json", qwen2vl_folder)
    made = make("int8-checkpoint", "int8.pth", {"model": qwen2vl_folder, "scales": scales})
    assert any("RMSNorm" in warning for warning in made.warnings)
    assert made.notes["target"] == "mllm-v1-vl"


def test_quant_bias_makes_int32_with_a_scale(make: Any, qwen2_folder: Path, scales: Path) -> None:
    inputs = {"model": qwen2_folder, "scales": scales}
    made = make("int8-checkpoint", "int8.pth", inputs, {"quant_bias": True})
    state = torch.load(made.out, weights_only=True)
    name = "model.layers.0.self_attn.v_proj.bias"
    keys = list(state)
    assert keys[keys.index(name) + 1] == f"{name}.scale"
    assert state[name].dtype == torch.int32
    assert int(state[name].abs().max()) == 127


def test_a_vision_tower_that_no_runtime_has_in_int8_is_refused(make: Any, tmp_path: Path) -> None:
    folder = tiny_models.save_model(tiny_models.new_qwen2_5_vl(), tmp_path / "model")
    scales = _write_scales(tmp_path / "scales.json", folder)
    inputs = {"model": folder, "scales": scales}
    with pytest.raises(StepError, match=r"gate_proj: profile mllm-v1-vit has no int8 linear"):
        make("int8-checkpoint", "int8.pth", inputs, OPTIONS)
    made = make("int8-checkpoint", "int8.pth", inputs, {**OPTIONS, "vision": False})
    state = torch.load(made.out, weights_only=True)
    assert state["visual.blocks.0.mlp.gate_proj.weight"].is_floating_point()
    assert state["model.layers.0.mlp.gate_proj.weight"].dtype == torch.int8


def test_scales_taken_with_another_rotation_are_refused(
    make: Any, qwen2_folder: Path, scales: Path
) -> None:
    content = json.loads(scales.read_text())
    content["qbuild"] = {"rotation": "abc", "rescale": None, "no_bias": True}
    scales.write_text(json.dumps(content))
    rotation = make("rotation", "rotation.bin", {"model": qwen2_folder}).out
    inputs = {"model": qwen2_folder, "scales": scales}
    with pytest.raises(StepError, match="taken with rotation abc, this step has none"):
        make("int8-checkpoint", "int8.pth", inputs)
    given = Input("rotation.bin", "artifact", {"path": rotation}, "def")
    with pytest.raises(StepError, match="taken with rotation abc, this step has def"):
        make("int8-checkpoint", "int8.pth", {**inputs, "rotation": given})
    right = Input("rotation.bin", "artifact", {"path": rotation}, "abc")
    make("int8-checkpoint", "int8.pth", {**inputs, "rotation": right})


def test_quant_bias_wants_scales_with_the_bias(make: Any, qwen2_folder: Path, scales: Path) -> None:
    content = json.loads(scales.read_text())
    content["qbuild"] = {"rotation": None, "rescale": None, "no_bias": True}
    scales.write_text(json.dumps(content))
    inputs = {"model": qwen2_folder, "scales": scales}
    with pytest.raises(StepError, match="before the bias"):
        make("int8-checkpoint", "int8.pth", inputs, {"quant_bias": True})


def test_a_negative_range_of_the_signed_statistics_is_an_error(
    make: Any, qwen2_folder: Path, scales: Path
) -> None:
    content = json.loads(scales.read_text())
    content["ori"]["model.layers.0.mlp.up_proj"]["output"] = -0.5
    scales.write_text(json.dumps(content))
    with pytest.raises(ModelError, match=r"up_proj': the range of its output is -0\.5"):
        make("int8-checkpoint", "int8.pth", {"model": qwen2_folder, "scales": scales})


def test_products_above_float16_are_warned_of_in_the_text_profile(
    make: Any, qwen2_folder: Path, scales: Path
) -> None:
    content = json.loads(scales.read_text())
    for kind in ("gate", "up"):
        content["ori"][f"model.layers.1.mlp.{kind}_proj"]["output"] = 300.0
    scales.write_text(json.dumps(content))
    inputs = {"model": qwen2_folder, "scales": scales}
    made = make("int8-checkpoint", "int8.pth", inputs)
    assert any("90000 in layers 1;" in warning for warning in made.warnings)
    made = make("int8-checkpoint", "int8.pth", inputs, {"target": "mllm-v1-vl"})
    assert not any("float16" in warning for warning in made.warnings)


def test_scales_of_another_rotation_are_refused_by_the_plan() -> None:
    assert RULE.check is not None
    rotation, _ = plan_of("rotation.bin", "rotation", model="m")
    scales, _ = plan_of("scales.json", "activation-scales", model="m", samples="text")
    step, plan = plan_of(
        "int8.pth",
        "int8-checkpoint",
        rotation,
        scales,
        options=OPTIONS,
        model="m",
        rotation="rotation.bin",
        scales="scales.json",
    )
    (problem,) = RULE.check(step, plan)
    assert problem.input == "scales"
    assert "made with rotation none, this one with 'rotation.bin'" in problem.message


def test_a_threshold_is_demanded_where_it_is_chosen() -> None:
    assert RULE.check is not None
    options = {**OPTIONS, "clip": "threshold"}
    step, plan = plan_of("int8.pth", "int8-checkpoint", options=options, model="m", scales="s")
    assert [problem.option for problem in RULE.check(step, plan)] == ["clip"]


def _threshold(make: Any, inputs: dict[str, Any], threshold: float) -> dict[str, torch.Tensor]:
    made = make("int8-checkpoint", "int8.pth", inputs, {"t01m_clip_threshold": threshold})
    state: dict[str, torch.Tensor] = torch.load(made.out, weights_only=True)
    return state


def _write_scales(file: Path, folder: Path) -> Path:
    """Plausible ranges of every linear, without a "qbuild" section."""
    from buildsys.models.open import open_model

    names = [n for n, each in open_model(folder).family.linears.items() if each.observed]
    ori = {name: {"input": 2.0 + i, "output": 1.0 + i} for i, name in enumerate(names)}
    top = {name: {"input": 1.0 + i, "output": 0.5 + i} for i, name in enumerate(names)}
    file.write_text(json.dumps({"ori": ori, "top_0_1": top, "all_stat": {}}))
    return file


def _with_outlier(scales: Path, name: str) -> str:
    content = json.loads(scales.read_text())
    content["ori"][name]["input"] = 100 * content["top_0_1"][name]["input"]
    scales.write_text(json.dumps(content))
    return name
