"""Ranges below the maximum: found where they were asked for, and better for the layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from buildsys.models.clipped import Clipped, clipped_ranges
from buildsys.models.layer_walk import walk_layers
from buildsys.models.open import Model, open_model
from buildsys.models.profile import LinearStatistics
from buildsys.models.profile_layers import profile_layers
from buildsys.models.rotated import rotated_tensors
from buildsys.models.site_rows import Sites, sites_of
from buildsys.quant.profiles import fake_quantize
from tests import tiny_models
from tests.models.test_profile_layers import texts


@pytest.fixture(scope="module")
def outlier_model(qwen2_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Some rows of gate and up are larger than all others."""
    import shutil

    folder = tmp_path_factory.mktemp("outliers") / "model"
    shutil.copytree(qwen2_folder, folder)
    weights = tiny_models.weights_of(folder)
    for layer in range(2):
        weights[f"model.layers.{layer}.mlp.up_proj.weight"][5] *= 5
        weights[f"model.layers.{layer}.mlp.gate_proj.weight"][9] *= 5
    tiny_models.rewrite(folder, weights)
    return open_model(folder)


def made(
    model: Model, folder: Path, methods: Any, target: str = "mllm-v1-text"
) -> tuple[dict[str, Clipped], dict[str, LinearStatistics]]:
    for name in ("profile", "states"):
        (folder / name).mkdir(parents=True)
    tensors = rotated_tensors(model)
    statistics = profile_layers(model, tensors, [texts()], folder / "profile")
    found = clipped_ranges(
        model, tensors, [texts()], folder / "states",
        statistics=statistics, methods=methods, target=target,
    )  # fmt: skip
    return found, statistics


def kinds(found: dict[str, Clipped]) -> set[str]:
    return {name.rsplit(".", 1)[1].removesuffix("_proj") for name in found}


def test_only_what_was_asked_for_and_has_eight_bits_is_clipped(
    outlier_model: Model, tmp_path: Path
) -> None:
    every = dict.fromkeys(("q", "k", "v", "o", "gate", "up", "down"), "mse")
    found, statistics = made(outlier_model, tmp_path / "a", every)
    assert kinds(found) == {"o", "gate", "up"}
    for name, both in found.items():
        assert 0 < both.input <= abs(statistics[name].input.ori)
        assert 0 < both.output <= abs(statistics[name].output.ori)
    found, _ = made(outlier_model, tmp_path / "b", every, "mllm-v1-vl")
    assert kinds(found) == {"o", "gate", "up", "down"}
    found, _ = made(outlier_model, tmp_path / "c", {"o": "kl", "gate": "absmax"})
    assert kinds(found) == {"o"}


def test_relative_ranges_lose_less_in_what_the_mlp_writes(
    outlier_model: Model, tmp_path: Path
) -> None:
    found, statistics = made(outlier_model, tmp_path, {"gate": "relative", "up": "relative"})
    (tmp_path / "again").mkdir()
    tensors = rotated_tensors(outlier_model)
    for visit in walk_layers(outlier_model, tensors, [texts()], tmp_path / "again"):
        sites = sites_of(visit)
        names = [f"{visit.stage.name}.mlp.{kind}_proj" for kind in ("gate", "up")]
        chosen = mlp_error(sites, [found[name].output for name in names])
        assert chosen < mlp_error(sites, [abs(statistics[name].output.ori) for name in names])
        assert found[names[0]].input == found[names[1]].input


def mlp_error(sites: Sites, ranges: list[float]) -> float:
    """Of what the MLP writes, relative to the residual stream, with gate and up clipped so."""
    gate, up, down = sites.output("gate"), sites.output("up"), sites.weight("down")
    exact = (functional.silu(gate) * up) @ down.T
    gated = functional.silu(fake_quantize(gate, ranges[0], 8))
    lost = (gated * fake_quantize(up, ranges[1], 8)) @ down.T - exact
    return float(sites.by_mlp @ lost.square().sum(-1))


def test_kept_rows_are_the_states_of_the_same_tokens(qwen2_folder: Path, tmp_path: Path) -> None:
    model = open_model(qwen2_folder)
    for visit in walk_layers(model, rotated_tensors(model), [texts()], tmp_path):
        sites = sites_of(visit)
        hidden = functional.silu(sites.output("gate")) * sites.output("up")
        torch.testing.assert_close(sites.input("down"), hidden, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            sites.input("o") @ sites.weight("o").T, sites.output("o"), rtol=1e-4, atol=1e-5
        )


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.inference_mode():
        yield


def test_a_shadow_layers_range_serves_the_bulk(tmp_path: Path, outlier_model: Model) -> None:
    found, statistics = made(outlier_model, tmp_path, {"down": "relative"}, "mllm-v1-vl")
    for name, both in found.items():
        assert both.shadow is not None
        assert both.shadow.gain > 0
        assert both.shadow.input <= both.input <= abs(statistics[name].input.ori)
