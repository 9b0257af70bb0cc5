"""The rotated checkpoint is the real tool's, in any layout of the input and any container."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from buildsys.formats.errors import FormatError
from buildsys.rules.rotated_checkpoint import RULE
from tests import tiny_models
from tests.rules.plans import plan_of


def test_the_real_tools_checkpoint_is_reproduced(make: Any, golden: Path) -> None:
    folder = golden / "mllm_qwen2vl_tiny"
    inputs = {"model": folder, "rotation": folder / "rotation.bin"}
    made = make("rotated-checkpoint", "rotated.safetensors", inputs)
    found, expected = load_file(made.out), load_file(folder / "rotated.safetensors")
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-11)


def test_every_layout_of_one_model_gives_one_file(
    make: Any, qwen2vl_folder: Path, tmp_path: Path
) -> None:
    rotation = make("rotation", "rotation.bin", {"model": qwen2vl_folder}).out
    folders = [
        qwen2vl_folder,
        tiny_models.classic_folder(qwen2vl_folder, tmp_path / "classic"),
        tiny_models.transformers_keys(qwen2vl_folder, tmp_path / "modern"),
    ]
    files = {
        make(
            "rotated-checkpoint", "r.safetensors", {"model": f, "rotation": rotation}
        ).out.read_bytes()
        for f in folders
    }
    assert len(files) == 1


def test_pth_and_safetensors_hold_the_same_tensors(make: Any, qwen2_folder: Path) -> None:
    rotation = make("rotation", "rotation.bin", {"model": qwen2_folder}).out
    inputs = {"model": qwen2_folder, "rotation": rotation}
    one = load_file(make("rotated-checkpoint", "r.safetensors", inputs).out)
    other = torch.load(make("rotated-checkpoint", "r.pth", inputs).out, weights_only=True)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_type_is_rounded_to_once(make: Any, qwen2_folder: Path, dtype: str) -> None:
    rotation = make("rotation", "rotation.bin", {"model": qwen2_folder}).out
    inputs = {"model": qwen2_folder, "rotation": rotation}
    wide = load_file(make("rotated-checkpoint", "r.safetensors", inputs).out)
    kind = getattr(torch, dtype)
    found = load_file(make("rotated-checkpoint", "r.safetensors", inputs, {"dtype": dtype}).out)
    for name, tensor in found.items():
        assert tensor.dtype == kind
        torch.testing.assert_close(
            tensor, wide[name].to(kind), rtol=torch.finfo(kind).eps, atol=1e-7
        )


def test_the_file_says_which_rotation_it_holds_and_loads_in_transformers(
    make: Any, qwen2_folder: Path
) -> None:
    rotation = make("rotation", "rotation.bin", {"model": qwen2_folder}).out
    inputs = {"model": qwen2_folder, "rotation": rotation}
    made = make("rotated-checkpoint", "r.safetensors", inputs)
    with safe_open(made.out, "pt") as file:
        assert file.metadata() == {"format": "pt", "qbuild.rotation": "digest"}


def test_nan_in_the_checkpoint_is_told_by_its_tensor(
    make: Any, qwen2_folder: Path, tmp_path: Path
) -> None:
    import shutil

    folder = shutil.copytree(qwen2_folder, tmp_path / "model")
    weights = tiny_models.weights_of(folder)
    weights["model.layers.1.mlp.down_proj.weight"][0, 0] = float("nan")
    tiny_models.rewrite(folder, weights)
    with pytest.raises(FormatError, match=r"model\.layers\.1\.mlp\.down_proj\.weight.*1 NaN"):
        make("rotated-checkpoint", "r.safetensors", {"model": folder})


def test_an_unknown_kind_of_file_is_refused_by_the_plan() -> None:
    assert RULE.check is not None
    step, plan = plan_of("rotated.npz", "rotated-checkpoint", model="m")
    assert [p.message for p in RULE.check(step, plan)] == [
        "rotated.npz is neither .safetensors nor .pth"
    ]


def test_a_rotation_of_another_model_is_refused_by_the_plan() -> None:
    assert RULE.check is not None
    rotation, _ = plan_of("rotation.bin", "rotation", model="other")
    step, plan = plan_of(
        "r.pth", "rotated-checkpoint", rotation, model="m", rotation="rotation.bin"
    )
    (problem,) = RULE.check(step, plan)
    assert problem.input == "rotation"
    assert "made with model 'other', this one with 'm'" in problem.message
