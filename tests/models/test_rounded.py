"""GPTQ on a whole model, layer by layer, as its runtime will compute."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from buildsys.models.layer_walk import walk_layers
from buildsys.models.open import Model, open_model
from buildsys.models.profile_layers import profile_layers
from buildsys.models.rotated import rotated_tensors
from buildsys.models.rounded import Rounded, rounded_layers
from buildsys.models.runtime import hidden_states, load_module
from buildsys.models.simulate import StaticLinear, quantizers_of
from buildsys.models.variant import StaticRanges
from buildsys.quant.int8 import quantize_weight
from tests.models.test_profile_layers import pictures, texts


def peaks_of(model: Model, samples: Any, folder: Path) -> dict[str, StaticRanges]:
    folder.mkdir()
    statistics = profile_layers(model, rotated_tensors(model), [samples], folder)
    return {
        name: StaticRanges(both.input.ori, both.output.ori, True, True, False)
        for name, both in statistics.items()
        if model.family.linears[name].quantized and model.family.linears[name].layer is not None
        and model.family.linears[name].tower == "language"
    }  # fmt: skip


def made_by_gptq(
    model: Model, samples: Any, folder: Path, **options: Any
) -> tuple[dict[str, Rounded], dict[str, StaticRanges]]:
    ranges = peaks_of(model, samples, folder / "profile")
    (folder / "states").mkdir()
    layers = rounded_layers(
        model, rotated_tensors(model), [samples], folder / "states",
        ranges=ranges, target="mllm-v1-text", damping=0.01, **options,
    )  # fmt: skip
    return {name: made for layer in layers for name, made in layer.items()}, ranges


def run_static(model: Model, ranges: Mapping[str, StaticRanges], weights: Any) -> torch.nn.Module:
    module = load_module(model)
    for name in ranges:
        linear = model.family.linears[name]
        child: Any = module.get_submodule(name)
        child.weight = torch.nn.Parameter(weights(name), requires_grad=False)
        static = StaticLinear(child, quantizers_of(linear, model.family, ranges, "mllm-v1-text"))
        parent, _, attribute = name.rpartition(".")
        setattr(module.get_submodule(parent), attribute, static)
    return module


def test_the_rounded_model_writes_nearer_to_the_float_model(
    qwen2_folder: Path, tmp_path: Path
) -> None:
    model, samples = open_model(qwen2_folder), texts()
    made, ranges = made_by_gptq(model, samples, tmp_path)
    assert set(made) == set(ranges)
    tensors = rotated_tensors(model)

    def nearest(name: str) -> torch.Tensor:
        found = quantize_weight(tensors.read(f"{name}.weight"))
        return found.values * found.scale

    def rounded(name: str) -> torch.Tensor:
        return made[name].weight.values * made[name].weight.scale

    modules = (run_static(model, ranges, nearest), run_static(model, ranges, rounded))
    plain = load_module(model)
    errors = []
    for module in modules:
        gaps = [hidden_states(module, s) - hidden_states(plain, s) for s in samples]
        errors.append(sum(float(gap.square().sum()) for gap in gaps))
    assert errors[1] < errors[0]


def test_samples_go_on_through_the_layers_as_they_were_left(
    qwen2_folder: Path, tmp_path: Path
) -> None:
    """A visitor that changes a layer changes what the next layer sees, and nothing else."""
    model, samples = open_model(qwen2_folder), texts()
    module: Any = load_module(model)
    module.model.layers[0].mlp.down_proj.weight.data.zero_()
    expected = [hidden_states(module, sample) for sample in samples]
    found = []
    for visit in walk_layers(model, rotated_tensors(model), [samples], tmp_path):
        if visit.stage.index == 0:
            down: Any = visit.part.get_submodule("mlp.down_proj")
            down.weight = torch.nn.Parameter(torch.zeros_like(down.weight), requires_grad=False)
        else:
            found = [behind for _, _, behind in visit.run()]
    norm = module.model.norm
    for mine, whole in zip(found, expected, strict=True):
        torch.testing.assert_close(norm(mine), whole, rtol=1e-5, atol=1e-5)


def test_images_reach_the_language_layers(qwen2vl_folder: Path, tmp_path: Path) -> None:
    model = open_model(qwen2vl_folder)
    made, ranges = made_by_gptq(model, pictures(), tmp_path)
    assert set(made) == set(ranges)
    assert all(name.startswith("model.layers.") for name in made)


def test_the_mean_error_of_rounding_is_what_a_bias_can_take(
    qwen2_folder: Path, tmp_path: Path
) -> None:
    """With the correction the outputs of q over the samples have the mean that they should."""
    model, samples = open_model(qwen2_folder), texts()
    made, _ = made_by_gptq(model, samples, tmp_path, correct_bias=True)
    name = "model.layers.0.self_attn.q_proj"
    seen: list[torch.Tensor] = []
    module = load_module(model)
    handle = module.get_submodule(name).register_forward_hook(
        lambda _, inputs, output: seen.append(inputs[0].flatten(0, -2))
    )
    for sample in samples:
        hidden_states(module, sample)
    handle.remove()
    x = torch.cat(seen)
    W = rotated_tensors(model).read(f"{name}.weight")
    rounded = made[name].weight.values * made[name].weight.scale
    gap = (x @ W.T - (x @ rounded.T + made[name].bias)).mean(0)
    # The input is rounded to 16 bits before the mean is taken.
    assert float(gap.abs().max()) < 1e-4
    assert float((x @ (W - rounded).T).mean(0).abs().max()) > 1e-3


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.inference_mode():
        yield
