"""Rescaling repairs outliers of up_proj that rotation cannot reach, and changes nothing else."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests import tiny_models

UP, DOWN = (f"model.layers.0.mlp.{kind}_proj.weight" for kind in ("up", "down"))


def test_outlier_rows_of_up_are_brought_back(make: Any, qwen2_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(qwen2_folder, tmp_path / "model")
    weights = tiny_models.weights_of(folder)
    weights[UP][7] *= 256.0
    weights[DOWN][:, 7] /= 256.0
    tiny_models.rewrite(folder, weights)
    rotation = make("rotation", "rotation.bin", {"model": folder}).out
    inputs = {"model": folder, "rotation": rotation}
    factors = make("rescale", "rescale.safetensors", inputs).out
    plain = load_file(make("rotated-checkpoint", "a.safetensors", inputs).out)
    inputs["rescale"] = factors
    repaired = load_file(make("rotated-checkpoint", "b.safetensors", inputs).out)
    assert plain[UP].abs().max() > 50 * plain[UP].abs().median(dim=0).values.max()
    assert repaired[UP].abs().max() <= plain[UP].abs().max() / 16
    changed = {name for name in plain if not torch.equal(plain[name], repaired[name])}
    assert {name.split(".")[-2] for name in changed} <= {"up_proj", "down_proj"}


def test_factors_are_powers_of_two_by_default(make: Any, qwen2_folder: Path) -> None:
    made = make("rescale", "rescale.safetensors", {"model": qwen2_folder})
    factors = load_file(made.out)
    assert list(factors) == [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
    for s in factors.values():
        assert torch.equal(torch.log2(s), torch.log2(s).round())
    exact = make("rescale", "r.safetensors", {"model": qwen2_folder}, {"powers_of_two": False}).out
    assert any(bool((torch.log2(s) % 1 != 0).any()) for s in load_file(exact).values())
