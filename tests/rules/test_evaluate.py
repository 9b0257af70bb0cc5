"""The promises of rule `evaluate`: figures by definition, the same bytes every time."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from buildsys.errors import StepError
from buildsys.models.errors import ModelError
from buildsys.models.open import open_model
from buildsys.models.runtime import load_module, logits
from buildsys.models.samples import text_samples
from buildsys.models.scoring import AnswerScore, WindowScore
from buildsys.rules.evaluate import Scores, check, figures, rounded
from buildsys.rules.spec import Input
from tests.rules.plans import plan_of

TEXT = "".join(f"{n} sheep are in the field, and {n % 7} dogs. " for n in range(300))
Make = Callable[..., Any]


@pytest.fixture
def text(tmp_path: Path) -> Input:
    (tmp_path / "eval.txt").write_text(TEXT)
    options = {"samples": 6, "tokens": 80}
    return Input("eval", "text", {"path": tmp_path / "eval.txt"}, "d", options)


@pytest.fixture
def images(tmp_path: Path) -> Input:
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(3):
        Image.new("RGB", (56, 56), (80 * index, 10, 200)).save(folder / f"{index}.png")
    prompts = ["What is it?", "How many?", "Which colour?"]
    answers = {f"{i}.png": ["yes", "two", "blue, red"] for i in range(3)}
    (tmp_path / "p.json").write_text(json.dumps(prompts))
    (tmp_path / "a.json").write_text(json.dumps(answers))
    paths = {"path": folder, "prompts": tmp_path / "p.json", "answers": tmp_path / "a.json"}
    return Input("questions", "images", paths, "d", {"size": [56, 56]})


@pytest.fixture
def variants(make: Make, qwen2vl_folder: Path, text: Input, images: Input) -> list[Input]:
    """The recipe of a Qwen2-VL, by the rules themselves: rotated, int8, 4-bit."""
    model: dict[str, Any] = {"model": qwen2vl_folder}
    rotation = make("rotation", "rotation.bin", model, {"method": "auto", "vision": True}).out
    rotated = {**model, "rotation": rotation}
    scales = make("activation-scales", "scales.json", {**rotated, "samples": [text, images]}).out
    made = {
        "rotated.safetensors": make("rotated-checkpoint", "r.safetensors", rotated).out,
        "int8.pth": make("int8-checkpoint", "int8.pth", {**rotated, "scales": scales}).out,
        "q8.mllm": make(
            "mllm-quantize", "q8.mllm", rotated, {"type": "Q8_0", "fallback": "F32"}
        ).out,
    }
    made["int8.mllm"] = make("mllm-file", "int8.mllm", {"checkpoint": made["int8.pth"]}).out
    return [Input(name, "artifact", {"path": path}, "d") for name, path in made.items()]


def test_each_variant_costs_what_it_should(
    make: Make, qwen2vl_folder: Path, variants: list[Input], text: Input, images: Input
) -> None:
    itself = Input("same", "artifact", {"path": qwen2vl_folder / "model.safetensors"}, "d")
    inputs = {
        "model": qwen2vl_folder, "text": text, "images": images, "variants": [itself, *variants]
    }  # fmt: skip
    made = make("evaluate", "metrics.json", inputs)
    content = json.loads(made.out.read_text())
    rows = content["variants"]
    fp32, same = rows["fp32"], rows["same"]
    zero = {"ppl_increase": 0, "ppl_increase_error": 0, "exact_match_drop": 0}
    assert {**fp32, **zero} == fp32
    assert {key: same[key] for key in fp32} == fp32
    assert same["bits_per_weight"] == 32
    # Rotation changes nothing but rounding; what is quantized does.
    assert abs(rows["rotated.safetensors"]["ppl_increase"]) < 1e-4
    assert rows["rotated.safetensors"]["margin"] == pytest.approx(fp32["margin"], abs=1e-3)
    for name in ("int8.pth", "q8.mllm"):
        assert 1e-3 < abs(rows[name]["ppl_increase"]) < 0.5
    assert rows["int8.mllm"] == rows["int8.pth"]
    assert rows["int8.pth"]["types"] == {"F32": 5, "I8": 22}
    # The ViT's rows of 80 do not divide, its rows of 160 and 320 do.
    assert rows["q8.mllm"]["types"] == {"F32": 7, "Q4_0": 1, "Q8_0": 19}
    assert content["protocol"]["profile"] == "mllm-v1-vl"
    assert content["protocol"]["text"] == [{"source": "eval", "tokens": 480, "windows": 6}]
    assert content["protocol"]["questions"] == [{"questions": 9, "source": "questions"}]
    assert made.progress[-1][0] == made.progress[-1][1]
    again = make("evaluate", "metrics.json", inputs)
    assert again.out.read_bytes() == made.out.read_bytes()


def test_perplexity_is_that_of_the_logits(make: Make, qwen2_folder: Path, text: Input) -> None:
    made = make("evaluate", "metrics.json", {"model": qwen2_folder, "text": text})
    model = open_model(qwen2_folder)
    module = load_module(model)
    total = count = 0.0
    for window in text_samples(model, text.path, samples=6, tokens=80):
        ids = window.input_ids[0]
        rows = torch.log_softmax(logits(module, window).double(), -1)[:-1]
        total -= float(rows[range(len(ids) - 1), ids[1:]].sum())
        count += len(ids) - 1
    found = json.loads(made.out.read_text())["variants"]["fp32"]["ppl"]
    assert found == pytest.approx(math.exp(total / count), rel=1e-5)
    assert count == 6 * 79


def test_the_profile_decides_what_int8_costs(
    make: Make, qwen2vl_folder: Path, variants: list[Input], text: Input
) -> None:
    """down_proj is 16 bits wide in the text profile and 8 in the other."""

    def ppl(profile: str) -> float:
        inputs = {"model": qwen2vl_folder, "text": text, "variants": variants[1:2]}
        made = make("evaluate", "metrics.json", inputs, {"profile": profile})
        increase = json.loads(made.out.read_text())["variants"]["int8.pth"]["ppl_increase"]
        return abs(float(increase))

    assert ppl("mllm-v1-text") != ppl("mllm-v1-vl")


def test_questions_without_answers_are_an_error(
    make: Make, qwen2vl_folder: Path, images: Input
) -> None:
    unanswered = replace(images, paths={k: v for k, v in images.paths.items() if k != "answers"})
    with pytest.raises(ModelError, match=r"0\.png: What is it\?: has no given answer"):
        make("evaluate", "metrics.json", {"model": qwen2vl_folder, "images": unanswered})


def test_two_variants_of_one_name_are_an_error(make: Make, qwen2_folder: Path, text: Input) -> None:
    weights = qwen2_folder / "model.safetensors"
    with pytest.raises(StepError, match=r"two variants are called 'model\.safetensors'"):
        make(
            "evaluate",
            "metrics.json",
            {"model": qwen2_folder, "text": text, "variants": [weights, weights]},
        )


def test_differences_are_paired() -> None:
    """Two variants that miss the same question differ by nothing, however few questions."""

    def scores(*exact: bool) -> Scores:
        windows = (WindowScore(10.0 + sum(exact), 5), WindowScore(11.0, 5))
        return Scores(windows, tuple(AnswerScore(each, -1.0, 0.5) for each in exact))

    base = scores(True, True, False, True)
    row = figures(scores(True, False, False, True), base)
    assert row["exact_match"] == 0.5
    assert row["exact_match_drop"] == 0.25
    # Drops are 0, 1, 0, 0: their standard deviation is 1/2, over the root of 4.
    assert row["exact_match_drop_error"] == pytest.approx(0.25)
    assert row["ppl"] == pytest.approx(math.exp(23.0 / 10))
    assert row["ppl_increase"] == pytest.approx(math.exp(-1.0 / 10) - 1)
    assert figures(base, base)["exact_match_drop_error"] == 0


def test_figures_are_written_with_six_digits_and_without_noise_or_nan() -> None:
    found = rounded({"a": [1.23456789, 123456789.0], "b": math.nan, "c": 3, "d": -8.3e-9, "e": "x"})
    assert found == {"a": [1.23457, 123457000.0], "b": None, "c": 3, "d": 0.0, "e": "x"}
    assert math.copysign(1, found["d"]) == 1


def test_check_holds_the_profile_to_the_variants_target() -> None:
    int8, _ = plan_of("int8.pth", "int8-checkpoint", options={"target": "mllm-v1-text"})
    file, _ = plan_of("int8.mllm", "mllm-file", int8, checkpoint="int8.pth")

    def problems(profile: str | None, variant: str = "int8.pth") -> list[str]:
        options = {"profile": profile}
        step, plan = plan_of(
            "m.json", "evaluate", int8, file, options=options, text="t", variants=variant
        )
        return [problem.message for problem in check(step, plan)]

    assert problems("mllm-v1-text") == []
    assert problems("mllm-v1-vl") == [
        "int8.pth is made for target mllm-v1-text, and is evaluated under profile mllm-v1-vl"
    ]
    assert len(problems(None)) == 1
    assert problems("mllm-v1-text", "int8.mllm") == []
    assert len(problems("mllm-v1-vl", "int8.mllm")) == 1
    step, plan = plan_of("m.json", "evaluate", options={"profile": None}, model="m")
    assert [p.message for p in check(step, plan)] == ["there is nothing to evaluate on"]


def test_what_a_search_for_a_quality_tried_stands_beside_the_variants_figures(
    make: Make, qwen2_folder: Path, text: Input, tmp_path: Path
) -> None:
    searched = {"metric": "ppl", "within": 0.01, "chosen": "absmax", "tried": {"absmax": 0.002}}
    told = tmp_path / "shadow_layers.json"
    told.write_text(json.dumps({"quality": {"variant": "int8.pth", **searched}}))
    plain = tmp_path / "plain.json"
    plain.write_text(json.dumps({"shadow_layers": []}))
    itself = Input("int8.pth", "artifact", {"path": qwen2_folder / "model.safetensors"}, "d")
    inputs = {
        "model": qwen2_folder, "text": text, "variants": [itself],
        "choices": [Input(p.name, "artifact", {"path": p}, "d") for p in (told, plain)],
    }  # fmt: skip
    rows = json.loads(make("evaluate", "m.json", inputs).out.read_text())["variants"]
    assert rows["int8.pth"]["quality"] == searched
    assert "quality" not in rows["fp32"]
    with pytest.raises(StepError, match=r"how int8\.pth was chosen, and that is no variant"):
        make("evaluate", "n.json", {**inputs, "variants": []})
