"""Scales are the real tool's in its mode, and say what they were taken with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from buildsys.errors import StepError
from buildsys.rules.activation_scales import RULE
from buildsys.rules.spec import Input
from tests import tiny_models
from tests.rules.plans import plan_of

SAMPLES = ("abc def " * 9, "the quick brown fox " * 4, "zebra" * 3)


@pytest.fixture
def text(tmp_path: Path) -> Input:
    """The golden calibration samples, one JSON line each."""
    lines = "".join(json.dumps({"text": sample}) + "\n" for sample in SAMPLES)
    (tmp_path / "text.jsonl").write_text(lines)
    return Input("text", "text", {"path": tmp_path / "text.jsonl"}, "t", {"tokens": 512})


@pytest.fixture
def images(tmp_path: Path) -> Input:
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(2):
        Image.new("RGB", (84, 56), (100 * index, 50, 150)).save(folder / f"{index}.png")
    return Input("images", "images", {"path": folder}, "i", {"samples": 2})


def test_scales_of_the_real_tool_are_reproduced(
    make: Any, golden: Path, text: Input, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in (golden / "mllm_qwen2_tiny").iterdir():
        (folder / file.name).symlink_to(file)
    tiny_models.save_byte_tokenizer(folder)
    inputs = {"model": folder, "rotation": folder / "R.bin", "samples": text}
    made = make("activation-scales", "scales.json", inputs, {"statistics": "mllm"})
    found = json.loads(made.out.read_text(encoding="utf-8"))
    expected = json.loads((folder / "dis.json").read_text(encoding="utf-8"))
    assert list(found) == [*expected, "qbuild"]
    assert list(found["ori"]) == list(expected["ori"])
    for key in ("ori", "top_0_1"):
        for name, sides in expected[key].items():
            assert found[key][name] == pytest.approx(sides, rel=2e-6)
    for name, sides in expected["all_stat"].items():
        for side, moments in sides.items():
            assert found["all_stat"][name][side] == pytest.approx(moments, rel=2e-6, abs=1e-7)


def test_the_file_says_what_it_was_taken_with(make: Any, qwen2_folder: Path, text: Input) -> None:
    rotation = make("rotation", "rotation.bin", {"model": qwen2_folder}).out
    inputs = {
        "model": qwen2_folder,
        "rotation": Input("rotation.bin", "artifact", {"path": rotation}, "abc"),
        "samples": text,
    }
    made = make("activation-scales", "scales.json", inputs)
    assert json.loads(made.out.read_text())["qbuild"] == {
        "statistics": "absmax",
        "no_bias": True,
        "device": "cpu",
        "compute": "fp32",
        "model": "digest",
        "rotation": "abc",
        "rescale": None,
        "samples": [{"source": "text", "digest": "t", "count": 3}],
    }
    assert made.progress[-1] == (4, 4, "layers")  # embedding, two layers, head


def test_text_and_images_together_reach_every_linear(
    make: Any, qwen2vl_folder: Path, text: Input, images: Input
) -> None:
    inputs = {"model": qwen2vl_folder, "samples": [text, images]}
    made = make("activation-scales", "scales.json", inputs)
    names = set(json.loads(made.out.read_text())["ori"])
    assert {"visual.blocks.1.attn.qkv", "visual.merger.mlp.2", "lm_head"} < names
    assert not made.warnings


def test_linears_that_no_sample_reaches_are_warned_of(
    make: Any, qwen2vl_folder: Path, text: Input
) -> None:
    made = make("activation-scales", "scales.json", {"model": qwen2vl_folder, "samples": text})
    assert made.warnings == [
        "10 linears saw no sample and have no scale, such as visual.blocks.0.attn.qkv"
    ]


def test_two_runs_write_the_same_bytes(make: Any, qwen2_folder: Path, text: Input) -> None:
    inputs = {"model": qwen2_folder, "samples": text}
    one, other = (make("activation-scales", "scales.json", inputs).out for _ in range(2))
    assert one.read_bytes() == other.read_bytes()


def test_factors_made_with_another_rotation_are_refused_by_the_plan() -> None:
    assert RULE.check is not None
    rotation, _ = plan_of("rotation.bin", "rotation", model="m")
    rescale, _ = plan_of("rescale.safetensors", "rescale", model="m")
    step, plan = plan_of(
        "scales.json",
        "activation-scales",
        rotation,
        rescale,
        model="m",
        rotation="rotation.bin",
        rescale="rescale.safetensors",
    )
    (problem,) = RULE.check(step, plan)
    assert (problem.input, "rotation none, this one with 'rotation.bin'" in problem.message) == (
        "rescale",
        True,
    )


def test_clipped_ranges_stand_beside_mllms_sections_and_become_the_checkpoints(
    make: Any, qwen2_folder: Path, text: Input
) -> None:
    inputs = {"model": qwen2_folder, "samples": [text]}
    plain = json.loads(make("activation-scales", "plain.json", inputs).out.read_text())
    options = {"clipping": {"gate": "relative", "up": "relative", "o": "mse"}}
    file = make("activation-scales", "scales.json", inputs, options).out
    content = json.loads(file.read_text())
    assert {key: content[key] for key in ("ori", "top_0_1", "all_stat")} == {
        key: plain[key] for key in ("ori", "top_0_1", "all_stat")
    }
    assert content["qbuild"]["target"] == "mllm-v1-text"
    assert "clipped" not in plain
    inputs = {"model": qwen2_folder, "scales": file}
    state = torch.load(make("int8-checkpoint", "int8.pth", inputs).out, weights_only=True)
    for name, both in content["clipped"].items():
        assert float(state[f"{name}.output_scale"]) == pytest.approx(both["output"])
    down = "model.layers.0.mlp.down_proj"
    assert float(state[f"{down}.input_scale"]) == pytest.approx(content["ori"][down]["input"])
    with pytest.raises(StepError, match="clipped for target mllm-v1-text"):
        make("int8-checkpoint", "vl.pth", inputs, {"target": "mllm-v1-vl"})
