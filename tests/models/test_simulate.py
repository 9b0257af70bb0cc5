"""Static int8 is simulated as the numeric contract defines it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from buildsys.formats.tensors import TensorEntry
from buildsys.formats.torch_archive import StateDictWriter
from buildsys.models.errors import ModelError
from buildsys.models.open import Model, open_model
from buildsys.models.runtime import load_module
from buildsys.models.simulate import Quantizers, StaticLinear, shadow_layers, simulate
from buildsys.models.variant import open_variant

LAYER = "model.layers.0"


def linear(out_features: int = 3, in_features: int = 4) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(in_features, out_features).requires_grad_(False)


def quantized(x: np.ndarray[Any, Any], magnitude: float, bits: int) -> np.ndarray[Any, Any]:
    top = 2 ** (bits - 1) - 1
    s = magnitude / top
    return np.clip(np.rint(x / s), -top - 1, top) * s


@pytest.mark.parametrize("bits", [8, 16])
def test_input_and_output_are_quantized_before_the_bias_is_added(bits: int) -> None:
    plain = linear()
    x = torch.randn(5, 4)
    found = StaticLinear(plain, Quantizers(1.3, 0.9, bits))(x)
    W, b = plain.weight.double().numpy(), plain.bias.double().numpy()
    expected = quantized(quantized(x.double().numpy(), 1.3, bits) @ W.T, 0.9, bits) + b
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-6)


def test_an_integer_bias_is_added_before_the_output_is_quantized() -> None:
    plain, x = linear(), torch.randn(5, 4)
    found = StaticLinear(plain, Quantizers(1.3, 0.9, 8, bias_before=True))(x)
    W, b = plain.weight.double().numpy(), plain.bias.double().numpy()
    expected = quantized(quantized(x.double().numpy(), 1.3, 8) @ W.T + b, 0.9, 8)
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-6)


def test_a_shadow_makes_up_for_what_saturates() -> None:
    """Values far beyond small ranges: the repaired product is off by rounding only."""
    torch.manual_seed(1)
    plain = nn.Linear(64, 32, bias=False).requires_grad_(False)
    x = torch.randn(20, 64)
    x[:, 5] *= 100
    product = plain(x)
    repaired = StaticLinear(plain, Quantizers(4.0, 1.0, 8, True, True))(x)
    lost = StaticLinear(plain, Quantizers(4.0, 1.0, 8))(x)
    rounding = 0.05
    assert float((lost - product).abs().max()) > 5
    # What saturated in the input is added in full; the int8 part of the output within range is
    # rounded, and replaced where it saturates.
    assert float((repaired - product).abs().max()) < rounding * 64**0.5


Weights = dict[str, torch.Tensor]


def int8_state(model: Model, **scales: dict[str, float]) -> Weights:
    """The tiny model with two int8 layers' worth of linears, by hand and not by the rule."""
    state: Weights = {}
    for name in model.tensors.names():
        tensor = model.tensors.read(name).clone()
        owner = name.removesuffix(".weight")
        if owner in scales:
            s = tensor.abs().max() / 127
            state[name] = torch.round(tensor / s).to(torch.int8).T
            state[f"{name}.scale"] = s
        else:
            state[name] = tensor
    for owner, sides in scales.items():
        for key, value in sides.items():
            flag = key.startswith("clip")
            state[f"{owner}.{key}"] = torch.tensor(bool(value) if flag else value)
    return state


def save(state: Weights, path: Path) -> Path:
    contiguous = {name: tensor.contiguous() for name, tensor in state.items()}
    entries = [TensorEntry(n, t.dtype, tuple(t.shape)) for n, t in contiguous.items()]
    with StateDictWriter(path, entries) as writer:
        for name, tensor in contiguous.items():
            writer.write(name, tensor)
    return path


def sides(low: float, high: float, **flags: bool) -> dict[str, float]:
    clips = {"clip_input": True, "clip_output": True, **flags}
    return {"input_scale": low, "output_scale": high, **clips}


@pytest.fixture
def model(qwen2_folder: Path) -> Model:
    return open_model(qwen2_folder)


Simulated = Callable[..., dict[str, Quantizers]]


@pytest.fixture
def simulated(model: Model, tmp_path: Path) -> Simulated:
    """The quantizers of every int8 linear of a checkpoint with the given scales."""

    def run(target: str, shadow: Any = "flags", **scales: dict[str, float]) -> Any:
        path = save(int8_state(model, **scales), tmp_path / "int8.pth")
        variant = open_variant(path, model.family)
        module = load_module(model, variant.tensors)
        simulate(module, model.family, variant, target, shadow)
        return {
            name: child.quantizers
            for name, child in module.named_modules()
            if isinstance(child, StaticLinear)
        }

    return run


ALL = {
    f"{LAYER}.self_attn.q_proj": sides(1.0, 2.0),
    f"{LAYER}.self_attn.k_proj": sides(1.5, 3.0),
    f"{LAYER}.self_attn.o_proj": sides(4.0, 5.0),
    f"{LAYER}.mlp.gate_proj": sides(6.0, 7.0),
    f"{LAYER}.mlp.up_proj": sides(8.0, 9.0),
    f"{LAYER}.mlp.down_proj": sides(10.0, 11.0),
}


@pytest.mark.parametrize(("target", "down"), [("mllm-v1-text", 16), ("mllm-v1-vl", 8)])
def test_widths_and_shared_quantizers_are_the_profiles(
    simulated: Simulated, target: str, down: int
) -> None:
    found = simulated(target, **ALL)
    attention, mlp = f"{LAYER}.self_attn", f"{LAYER}.mlp"
    assert found == {
        f"{attention}.q_proj": Quantizers(1.0, 2.0, 16),
        f"{attention}.k_proj": Quantizers(1.0, 3.0, 16),  # reads q_proj's quantizer
        f"{attention}.o_proj": Quantizers(4.0, 5.0, 8),
        f"{mlp}.gate_proj": Quantizers(8.0, 7.0, 8),  # reads up_proj's
        f"{mlp}.up_proj": Quantizers(8.0, 9.0, 8),
        f"{mlp}.down_proj": Quantizers(10.0, 11.0, down),
    }


def test_only_down_proj_has_a_shadow_and_only_if_the_runtime_does(
    simulated: Simulated, model: Model, tmp_path: Path
) -> None:
    loose = {
        f"{LAYER}.self_attn.o_proj": sides(4.0, 5.0, clip_input=False),
        f"{LAYER}.mlp.down_proj": sides(10.0, 11.0, clip_output=False),
    }
    down, o_proj = f"{LAYER}.mlp.down_proj", f"{LAYER}.self_attn.o_proj"
    found = simulated("mllm-v1-text", **loose)
    assert found[down] == Quantizers(10.0, 11.0, 8, False, True)  # int8 in a shadow layer
    assert found[o_proj] == Quantizers(4.0, 5.0, 8)
    assert simulated("mllm-v1-text", "none", **loose)[down] == Quantizers(10.0, 11.0, 16)
    path = save(int8_state(model, **loose), tmp_path / "flags.pth")
    assert shadow_layers(model.family, open_variant(path, model.family).ranges) == [0]


def test_a_range_that_is_missing_or_negative_is_an_error(model: Model, tmp_path: Path) -> None:
    name = f"{LAYER}.mlp.down_proj"
    state = int8_state(model, **{name: sides(-1.0, 2.0)})
    with pytest.raises(ModelError, match=rf"{name}.input_scale.*not a positive range"):
        open_variant(save(state, tmp_path / "n.pth"), model.family)
    del state[f"{name}.output_scale"]
    with pytest.raises(ModelError, match=rf"{name}.output_scale.*is missing"):
        open_variant(save(state, tmp_path / "m.pth"), model.family)
