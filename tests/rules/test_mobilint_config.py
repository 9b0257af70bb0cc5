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
    text = make("mobilint-config", "mxq/config.json", inputs).out.read_text(encoding="utf-8")
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
