"""The runtime profiles say what the contract says, and fake quantization is its definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from buildsys.quant.errors import QuantError
from buildsys.quant.profiles import PROFILES, fake_quantize, profile


@pytest.mark.parametrize(
    ("name", "widths"),
    [
        (
            "mllm-v1-text",
            {"q_proj": 16, "o_proj": 8, "gate_proj": 8, "up_proj": 8, "down_proj": 16},
        ),
        ("mllm-v1-vl", {"v_proj": 16, "o_proj": 8, "gate_proj": 8, "up_proj": 8, "down_proj": 8}),
        ("mllm-v1-vit", {"qkv": 16, "proj": 16, "fc1": 16, "fc2": 16}),
    ],
)
def test_widths_are_those_of_the_runtime(name, widths):
    runtime = profile(name)
    assert {kind: runtime.width(f"model.layers.7.x.{kind}") for kind in widths} == widths
    assert runtime.width("lm_head") is None
    assert runtime.width("visual.merger.mlp.0") is None


def test_down_proj_of_a_shadow_layer_is_int8():
    text = PROFILES["mllm-v1-text"]
    assert text.width("model.layers.1.mlp.down_proj", shadow=True) == 8
    assert text.width("model.layers.1.mlp.o_proj", shadow=True) == 8
    assert PROFILES["mllm-v1-vit"].width("fc1", shadow=True) == 16


def test_unknown_profile_is_refused_with_the_known_ones():
    with pytest.raises(QuantError, match=r"'mllm-v3' is unknown; use one of mllm-v1-text, mllm-v1"):
        profile("mllm-v3")


@settings(max_examples=80, deadline=None)
@given(
    magnitude=st.floats(1e-6, 1e6),
    bits=st.sampled_from([8, 16]),
    seed=st.integers(0, 1000),
)
def test_fake_quantization_rounds_inside_and_saturates_outside(magnitude, bits, seed):
    generator = torch.Generator().manual_seed(seed)
    x = 3 * magnitude * torch.randn(200, dtype=torch.float64, generator=generator)
    y = fake_quantize(x, magnitude, bits)
    step = magnitude / (2 ** (bits - 1) - 1)
    inside = x.abs() <= magnitude
    assert ((y - x).abs()[inside] <= step * (0.5 + 1e-9)).all()
    torch.testing.assert_close(y[x > magnitude], torch.full_like(y[x > magnitude], magnitude))
    floor = -magnitude - step  # the lowest level has no positive partner
    assert (y[x < floor] == y.min()).all()
    assert (y.min() - floor).abs() <= 1e-9 * magnitude or y.min() >= floor
    assert torch.equal(fake_quantize(y, magnitude, bits), y)


def test_halves_are_rounded_to_even():
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, 126.5, 127.5, -300.0])
    assert fake_quantize(x, 127.0, 8).tolist() == [0, 2, 2, 0, 126, 127, -128]


@pytest.mark.parametrize("magnitude", [0.0, -1.0, float("nan")])
def test_range_that_is_not_positive_is_refused(magnitude):
    with pytest.raises(QuantError, match="is not positive; use statistics: absmax"):
        fake_quantize(torch.ones(2), magnitude, 8)
