"""The promises of rule `mobilint-config`: the tutorial's edits and no other."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from buildsys.errors import Location, StepError
from buildsys.formats.errors import FormatError
from buildsys.plan.graph import Plan, Ref, Step
from buildsys.rules.mobilint_config import check
from buildsys.rules.spec import Input

CLASSIC: dict[str, Any] = {
    "architectures": ["Qwen2VLForConditionalGeneration"],
    "hidden_size": 1536,
    "max_position_embeddings": 32768,
    "model_type": "qwen2_vl",
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "vision_config": {"depth": 32, "embed_dim": 1280, "model_type": "qwen2_vl"},
    "note": "é",
}


def model(folder: Path, config: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def test_edits_are_the_tutorials(make: Callable[..., Any], tmp_path: Path):
    inputs = {
        "model": model(tmp_path, CLASSIC),
        "text": tmp_path / "Q_text_model.mxq",
        "vision": tmp_path / "Q_vision_transformer.mxq",
    }
    made = make("mobilint-config", "mxq/config.json", inputs, {"core_mode": None})
    text = made.out.read_text(encoding="utf-8")
    expected = json.loads(json.dumps(CLASSIC))
    expected["mxq_path"] = "Q_text_model.mxq"
    expected["vision_config"]["mxq_path"] = "Q_vision_transformer.mxq"
    expected["architectures"] = ["MobilintQwen2VLForConditionalGeneration"]
    expected["model_type"] = "mobilint-qwen2_vl"
    assert json.loads(text) == expected
    assert '\n  "note": "é"' in text


def test_core_mode_is_written_for_both_parts(make: Callable[..., Any], tmp_path: Path):
    options = {"text": "t.mxq", "vision": "v.mxq", "core_mode": "global8"}
    made = make("mobilint-config", "config.json", {"model": model(tmp_path, CLASSIC)}, options)
    config = json.loads(made.out.read_text(encoding="utf-8"))
    assert config["core_mode"] == config["vision_config"]["core_mode"] == "global8"
    assert (config["mxq_path"], config["vision_config"]["mxq_path"]) == ("t.mxq", "v.mxq")


def test_parts_may_run_in_modes_of_their_own(make: Callable[..., Any], tmp_path: Path):
    options = {
        "text": "t.mxq",
        "vision": "v.mxq",
        "core_mode": "single",
        "vision_core_mode": "multi",
        "target_cores": ["0:0"],
    }
    made = make("mobilint-config", "config.json", {"model": model(tmp_path, CLASSIC)}, options)
    config = json.loads(made.out.read_text(encoding="utf-8"))
    assert (config["core_mode"], config["vision_config"]["core_mode"]) == ("single", "multi")
    assert config["target_cores"] == config["vision_config"]["target_cores"] == ["0:0"]


def test_the_rotations_digest_is_written_down(make: Callable[..., Any], tmp_path: Path):
    rotation = Input("global_rotation.pth", "artifact", {"path": tmp_path / "r"}, "1234")
    inputs = {"model": model(tmp_path, CLASSIC), "rotation": rotation}
    made = make("mobilint-config", "config.json", inputs, {"text": "t.mxq", "vision": "v.mxq"})
    assert json.loads(made.out.read_text(encoding="utf-8"))["qbuild"] == {"rotation": "1234"}
    assert made.notes["rotation"] == {"digest": "1234"}


def mxq(name: str, outputs: dict[str, str], rotation: str | None, **options: Any) -> Step:
    inputs = {} if rotation is None else {"rotation": (Ref("artifact", rotation),)}
    return Step(
        name, "mxq", inputs, options, {"out": name, **outputs},
        False, False, (), 1, {}, None, None, {}, Location("r", 1, 1),
    )  # fmt: skip


def problems(text: Step, vision: Step, recorded: str = "R", **options: Any) -> list[str]:
    inputs = {
        "text": (Ref("artifact", text.name),),
        "vision": (Ref("artifact", vision.name),),
        "rotation": (Ref("artifact", recorded),),
    }
    step = Step(
        "c.json", "mobilint-config", inputs, {"core_mode": "global8", **options},
        {"out": "c.json"}, False, False, (), 1, {}, None, None, {}, Location("r", 1, 1),
    )  # fmt: skip
    steps = {each.name: each for each in (text, vision, step)}
    producer = {path: each.name for each in steps.values() for path in each.outputs.values()}
    plan = Plan("r", "r", {}, {}, steps, producer, (), {})
    return [problem.message for problem in check(step, plan)]


def test_a_vision_encoder_of_another_rotation_is_refused_before_anything_runs():
    text = mxq("t.mxq", {"rotation": "R"}, None)
    assert problems(text, mxq("v.mxq", {}, "R")) == []
    assert problems(text, mxq("v.mxq", {}, "old.pth")) == [
        "v.mxq is made with old.pth, and t.mxq with its own R"
    ]
    assert problems(text, mxq("v.mxq", {}, "R"), recorded="old.pth") == [
        "old.pth is not the rotation of t.mxq, which is R"
    ]


def test_a_mode_that_an_mxq_is_not_compiled_for_is_refused():
    text = mxq("t.mxq", {"rotation": "R"}, None, inference_scheme="single")
    vision = mxq("v.mxq", {}, "R", inference_scheme="all")
    assert problems(text, vision) == [
        "t.mxq is compiled for 'single' alone, and is to run as 'global8'"
    ]
    assert problems(text, vision, core_mode="single") == []
    regulus = mxq("v.mxq", {}, "R", target_device="regulus-ra")
    assert problems(text, regulus, core_mode="single", vision_core_mode="multi") == [
        "v.mxq is compiled for 'single' alone, and is to run as 'multi'"
    ]


def test_nested_text_fields_are_edited_where_they_are_read(
    make: Callable[..., Any], tmp_path: Path
):
    nested = {**CLASSIC, "text_config": {"hidden_size": 1536, "sliding_window": None}}
    options = {"text": "t.mxq", "vision": "v.mxq"}
    made = make("mobilint-config", "config.json", {"model": model(tmp_path, nested)}, options)
    config = json.loads(made.out.read_text(encoding="utf-8"))
    assert config["text_config"] == {
        "hidden_size": 1536,
        "max_position_embeddings": 32768,
        "sliding_window": 32768,
    }


def test_one_name_for_two_files_is_an_error(make: Callable[..., Any], tmp_path: Path):
    with pytest.raises(StepError, match="both mxq files"):
        make(
            "mobilint-config",
            "config.json",
            {"model": model(tmp_path, CLASSIC)},
            {"text": "a.mxq", "vision": "a.mxq"},
        )


def test_another_model_is_refused_by_name(make: Callable[..., Any], tmp_path: Path):
    text_only = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    with pytest.raises(FormatError, match=r"model_type.*qwen2"):
        make(
            "mobilint-config",
            "config.json",
            {"model": model(tmp_path, text_only)},
            {"text": "a.mxq", "vision": "b.mxq"},
        )


def test_check_wants_each_mxq_once():
    def planned(inputs: dict[str, tuple[Ref, ...]], options: dict[str, Any]) -> list[str]:
        step = Step(
            "c.json", "mobilint-config", inputs, {"text": None, "vision": None, **options},
            {"out": "c.json"}, False, False, (), 1, {}, None, None, {}, Location("r", 1, 1),
        )  # fmt: skip
        plan = Plan("r", "r", {}, {}, {}, {}, (), {})
        return [problem.message for problem in check(step, plan)]

    text = {"text": (Ref("artifact", "t.mxq"),)}
    assert planned(text, {"vision": "v.mxq"}) == []
    assert planned(text, {}) == ["the vision mxq is given nowhere"]
    assert planned(text, {"text": "t.mxq", "vision": "v.mxq"}) == ["the text mxq is given twice"]
