"""A variant is compared in its own basis, and the layer that was damaged is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from buildsys.models.agreement import Reference
from buildsys.models.open import open_model
from buildsys.models.rotated import rotated_tensors
from buildsys.models.runtime import load_module, logits
from buildsys.quant.metrics import kl_divergence, sqnr_db
from tests.models.test_profile_layers import texts
from tests.models.test_rescaling import rotations_of


def test_a_turned_model_is_the_same_in_its_own_basis(qwen2_folder: Path, tmp_path: Path) -> None:
    model = open_model(qwen2_folder)
    reference = Reference(load_module(model), texts().windows)
    rotations = rotations_of(qwen2_folder, tmp_path)
    turned = reference.compare(load_module(model, rotated_tensors(model, rotations)))
    assert turned.kl < 1e-9
    assert all(layer.sqnr > 90 for layer in turned.layers)
    same = reference.compare(load_module(model))
    assert same.kl == 0.0
    assert all(layer.sqnr == float("inf") for layer in same.layers)


def test_the_damaged_layer_is_the_worst(qwen2_folder: Path) -> None:
    model = open_model(qwen2_folder)
    reference = Reference(load_module(model), texts().windows)
    module: Any = load_module(model)
    module.model.layers[1].mlp.down_proj.weight.data *= 1.5
    found = reference.compare(module)
    assert found.worst()[0].layer == 1
    assert found.layers[0].sqnr == float("inf")
    assert found.layers[1].sqnr < 60


def test_kl_and_sqnr_are_those_of_the_states_and_logits(qwen2_folder: Path) -> None:
    model, window = open_model(qwen2_folder), texts().windows[2]
    plain, changed = load_module(model), load_module(model)
    part: Any = changed
    part.model.layers[0].mlp.up_proj.weight.data *= 1.1
    found = Reference(plain, [window]).compare(changed)
    both = logits(plain, window), logits(changed, window)
    assert found.kl == pytest.approx(float(kl_divergence(*both).mean()), rel=1e-4)
    states: list[torch.Tensor] = []
    for module in (plain, changed):
        layers: Any = module.model
        handle = layers.layers[1].register_forward_hook(
            lambda _, inputs, output: states.append(output[0])
        )
        logits(module, window)
        handle.remove()
    ratios = [sqnr_db(a, b) for a, b in zip(*states, strict=True)]
    mean = sum(10 ** (-ratio / 10) for ratio in ratios) / len(ratios)
    assert 10 ** (-found.layers[1].sqnr / 10) == pytest.approx(mean, rel=1e-3)
