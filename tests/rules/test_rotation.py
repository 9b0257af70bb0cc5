"""A rotation is seeded, complete, orthogonal, and says how it was made."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

from buildsys.formats.rotation_file import load_rotation
from buildsys.quant.errors import QuantError
from buildsys.rules.rotation import RULE
from buildsys.rules.spec import Input
from tests import tiny_models
from tests.rules.plans import plan_of


def test_one_seed_gives_one_file_and_another_another(make: Any, qwen2vl_folder: Path) -> None:
    seeds = (5, 5, 6)
    a, b, c = (make("rotation", "r.bin", {"model": qwen2vl_folder}, {"seed": s}) for s in seeds)
    assert a.out.read_bytes() == b.out.read_bytes() != c.out.read_bytes()


def test_every_matrix_of_a_vision_language_model_is_there(make: Any, qwen2vl_folder: Path) -> None:
    made = make("rotation", "rotation.bin", {"model": qwen2vl_folder})
    plain = torch.load(made.out, weights_only=True)
    assert [key for key in plain if key != "qbuild"] == ["R", "R_v", "R_vit", "R_vs_vit"]
    assert plain["R"].shape == (64, 64)
    assert [R.shape for R in plain["R_v"]] == [(16, 16)] * 2
    assert plain["R_vit"].shape == (80, 80)
    assert [R.shape for R in plain["R_vs_vit"]] == [(40, 40)] * 2
    assert made.notes["rotation"]["vision"] == "layernorm"
    # LayerNorm survives what keeps the vector of ones.
    ones = torch.ones(80, dtype=torch.float64)
    torch.testing.assert_close(ones @ plain["R_vit"], ones, rtol=0, atol=1e-12)


def test_vision_false_leaves_the_vision_tower_out(make: Any, qwen2vl_folder: Path) -> None:
    made = make("rotation", "rotation.bin", {"model": qwen2vl_folder}, {"vision": False})
    assert load_rotation(made.out).R_vit is None


def test_sizes_that_mllm_supports_get_its_construction(make: Any, qwen2_folder: Path) -> None:
    R = load_rotation(make("rotation", "r.bin", {"model": qwen2_folder}).out).R
    # diag(s) H / sqrt(n): every entry has one magnitude, and rows of H s are +-1.
    assert torch.equal(R.abs(), torch.full((64, 64), 1 / 8, dtype=torch.float64))


def test_a_size_without_a_hadamard_matrix_is_an_error_that_offers_kronecker(
    make: Any, tmp_path: Path
) -> None:
    sizes = {"hidden_size": 88, "num_attention_heads": 11, "num_key_value_heads": 11}
    folder = tiny_models.save_model(tiny_models.new_qwen2(**sizes), tmp_path)
    with pytest.raises(QuantError, match=r"size 88 has no Hadamard rotation.*method: kronecker"):
        make("rotation", "rotation.bin", {"model": folder})
    made = make("rotation", "rotation.bin", {"model": folder}, {"method": "auto"})
    assert made.notes["rotation"]["methods"] == {"R": "kronecker", "R_v": "hadamard"}
    stored = load_rotation(made.out).metadata
    assert stored["methods"] == made.notes["rotation"]["methods"]


def test_of_several_seeds_the_one_that_loses_least_is_kept(
    make: Any, qwen2_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 9)
    options = {"samples": 3, "tokens": 64}
    samples = Input("text", "text", {"path": tmp_path / "text.txt"}, "d", options)
    inputs = {"model": qwen2_folder, "weights": qwen2_folder, "samples": [samples]}
    made = make("rotation", "rotation.bin", inputs, {"seed": 3, "seeds": 3})
    losses = made.notes["seeds"]
    assert list(losses) == ["3", "4", "5"]
    best = min(losses, key=losses.__getitem__)
    alone = make("rotation", "alone.bin", {"model": qwen2_folder}, {"seed": int(best)})
    assert made.out.read_bytes() == alone.out.read_bytes()
    # The loss is that of the checkpoint that the rules make with this rotation.
    inputs = {"model": qwen2_folder, "rotation": alone.out, "samples": [samples]}
    scales = make("activation-scales", "scales.json", inputs).out
    inputs = {"model": qwen2_folder, "rotation": alone.out, "scales": scales}
    int8 = make("int8-checkpoint", "int8.pth", inputs).out
    inputs = {"model": qwen2_folder, "text": samples, "variants": [int8]}
    metrics = json.loads(make("evaluate", "metrics.json", inputs).out.read_text())
    ppl = metrics["variants"]["int8.pth"]["ppl"]
    assert math.log(ppl) == pytest.approx(losses[best], rel=1e-4)


def test_seeds_without_something_to_judge_by_are_refused() -> None:
    step, plan = plan_of("rotation.bin", "rotation", options={"seeds": 4}, model="m")
    assert RULE.check is not None
    assert [problem.option for problem in RULE.check(step, plan)] == ["seeds", "seeds"]


def learning_inputs(model: Path, tmp_path: Path) -> dict[str, Any]:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 9)
    samples = Input("text", "text", {"path": text}, "d", {"samples": 3, "tokens": 48})
    return {"model": model, "weights": model, "samples": [samples]}


def test_a_learned_rotation_makes_a_better_checkpoint_and_says_how(
    make: Any, qwen2_folder: Path, tmp_path: Path
) -> None:
    inputs = learning_inputs(qwen2_folder, tmp_path)
    options = {"learn": {"steps": 6, "batch": 3, "rate": 0.03}, "target": "mllm-v1-vl"}
    made = make("rotation", "rotation.bin", inputs, options)
    notes = made.notes["learned"]
    assert notes["after"] < notes["before"]
    assert len(notes["losses"]) == 6
    assert made.progress[-1] == (6, 6, "steps")
    told = load_rotation(made.out).metadata["learned"]
    assert told["weights"] is True
    assert (told["steps"], told["batch"], told["rate"]) == (6, 3, 0.03)
    random = make("rotation", "random.bin", {"model": qwen2_folder})
    variants = [int8_of(make, inputs, rotation.out) for rotation in (random, made)]
    judged = {"model": qwen2_folder, "text": inputs["samples"][0], "variants": variants}
    options = {"profile": "mllm-v1-vl"}
    rows = json.loads(make("evaluate", "metrics.json", judged, options).out.read_text())["variants"]
    plain, better = (rows[path.name]["kl"] for path in variants)
    assert better < plain


def int8_of(make: Any, inputs: dict[str, Any], rotation: Path) -> Path:
    """The plain int8 checkpoint under a rotation, which it has its name from."""
    turned = {"model": inputs["model"], "rotation": rotation}
    both = {**turned, "samples": inputs["samples"]}
    scales = make("activation-scales", "scales.json", both).out
    options = {"target": "mllm-v1-vl"}
    out: Path = make(
        "int8-checkpoint", f"{rotation.stem}.pth", {**turned, "scales": scales}, options
    ).out
    return out


def test_learning_leaves_the_vision_towers_matrices_as_they_were(
    make: Any, qwen2vl_folder: Path, tmp_path: Path
) -> None:
    inputs = learning_inputs(qwen2vl_folder, tmp_path)
    learned = make("rotation", "l.bin", inputs, {"learn": {"steps": 2}}).out
    plain = make("rotation", "p.bin", {"model": qwen2vl_folder}).out
    one, other = load_rotation(learned), load_rotation(plain)
    assert one.R_vit is not None
    assert other.R_vit is not None
    assert torch.equal(one.R_vit, other.R_vit)
    assert not torch.equal(one.R, other.R)


def test_learning_without_something_to_learn_from_is_refused() -> None:
    options = {"learn": {"steps": 4}, "seeds": 2}
    step, plan = plan_of("rotation.bin", "rotation", options=options, model="m")
    assert RULE.check is not None
    problems = list(RULE.check(step, plan))
    assert [problem.option for problem in problems] == ["seeds", "seeds", "learn", "learn"]
    assert problems[2].message == "learn needs `weights`: the model to judge"


@pytest.mark.parametrize(
    "learn", [{}, {"steps": 0}, {"steps": 2, "rate": 0}, {"steps": 2, "epochs": 1}, True]
)
def test_an_option_of_learn_that_cannot_be_meant_is_refused(learn: Any) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(learn, dict(RULE.options["learn"]))
