"""int8 weights, clip flags and shared scales: mllm's export, value for value."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from buildsys.quant import rotation
from buildsys.quant.errors import QuantError
from buildsys.quant.int8 import (
    ActivationScale,
    choose_scale,
    quantize_bias,
    quantize_weight,
    shadow_layers,
    share_scales,
    weight_scale,
)
from buildsys.quant.recover import recover

HEADS, KV_HEADS = 4, 2
FOLLOWS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}


def rotated_like_mllm(folder: Path) -> dict[str, torch.Tensor]:
    """The golden model after norm fusion, R1 and R2, rounded to float32 after each as mllm does."""
    tensors = load_file(folder / "model.safetensors")
    stored = torch.load(folder / "R.bin", weights_only=True)
    R = recover(stored["R"])
    for layer, matrix in enumerate(stored["R_v"]):
        prefix, R_v = f"model.layers.{layer}.", recover(matrix)
        for norm, readers in FOLLOWS.items():
            for reader in readers:
                key = f"{prefix}{reader}.weight"
                fused = rotation.fuse_norm(tensors[key], tensors[f"{prefix}{norm}.weight"])
                tensors[key] = rotation.rotate_input(fused, R)
        for writer in ("self_attn.o_proj", "mlp.down_proj"):
            key = f"{prefix}{writer}.weight"
            tensors[key] = rotation.rotate_output(tensors[key], R)
        v, o = f"{prefix}self_attn.v_proj", f"{prefix}self_attn.o_proj"
        tensors[f"{v}.weight"] = rotation.rotate_output(
            tensors[f"{v}.weight"], R_v, blocks=KV_HEADS
        )
        tensors[f"{v}.bias"] = rotation.rotate_bias(tensors[f"{v}.bias"], R_v, blocks=KV_HEADS)
        tensors[f"{o}.weight"] = rotation.rotate_input(tensors[f"{o}.weight"], R_v, blocks=HEADS)
    head = rotation.fuse_norm(tensors["lm_head.weight"], tensors["model.norm.weight"])
    tensors["lm_head.weight"] = rotation.rotate_input(head, R)
    embedding = "model.embed_tokens.weight"
    tensors[embedding] = rotation.rotate_input(tensors[embedding], R)
    return tensors


@pytest.fixture(scope="module")
def exported(golden):
    return torch.load(golden / "mllm_qwen2_tiny" / "int8.pth", weights_only=True)


def test_int8_checkpoint_of_mllm_is_reproduced(golden, exported):
    """All 1,179,648 int8 values, all weight scales and every float tensor bit for bit."""
    compared = 0
    for key, tensor in rotated_like_mllm(golden / "mllm_qwen2_tiny").items():
        expected = exported[key]
        if expected.dtype == torch.int8:
            ours = quantize_weight(tensor, name=key)
            assert torch.equal(ours.values.T, expected), key
            assert torch.equal(ours.scale, exported[f"{key}.scale"]), key
            compared += expected.numel()
        elif not key.endswith("norm.weight"):
            # Products by factors differ from dense ones in float64 rounding, so at most in the
            # last bit of float32.
            torch.testing.assert_close(tensor, expected, rtol=2.4e-7, atol=1e-9, msg=key)
    assert compared == 1_179_648


def test_scales_and_clip_flags_of_mllm_are_reproduced(golden, exported):
    distribution = json.loads((golden / "mllm_qwen2_tiny" / "dis.json").read_text())
    for name, largest in distribution["ori"].items():
        for side in ("input", "output"):
            top = distribution["top_0_1"][name][side]
            scale = choose_scale(largest[side], top, threshold=64)
            assert exported[f"{name}.{side}_scale"] == torch.tensor(scale.magnitude)
            assert bool(exported[f"{name}.clip_{side}"]) == scale.clip


def test_threshold_selects_outliers_and_all_selects_none():
    outlier = choose_scale(100.0, 1.0, threshold=64)
    assert outlier == ActivationScale(magnitude=1.0, clip=False)
    assert choose_scale(100.0, 1.0, threshold=None) == ActivationScale(100.0, True)
    assert choose_scale(60.0, 1.0, threshold=64) == ActivationScale(60.0, True)
    assert choose_scale(60.0, 1.0, threshold=64, clip=False) == ActivationScale(1.0, False)
    inside = ActivationScale(1.0, True)
    sides = {"l.0": (inside, inside), "l.1": (outlier, inside), "l.2": (inside, outlier)}
    assert shadow_layers(sides) == ("l.1", "l.2")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=50))
def test_decoded_weights_are_within_half_a_step(values):
    W = torch.tensor(values)
    levels = quantize_weight(W)
    assert levels.values.abs().max() <= 127
    step = levels.scale.double()
    error = (levels.values.double() * step - W.double()).abs().max()
    assert error <= step * (0.5 + 1e-5)


def test_halves_are_rounded_to_even():
    W = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5])
    assert quantize_weight(W).values.tolist() == [127, 0, 2, 2, 0, -2]


def test_zero_weights_have_a_scale_that_is_not_zero():
    assert weight_scale(torch.zeros(3, 3)) == torch.tensor(1e-5) / 127


def test_given_scale_saturates_and_never_wraps():
    levels = quantize_weight(torch.tensor([3.0, -3.0, 0.5]), scale=torch.tensor(1 / 127))
    assert levels.values.tolist() == [127, -127, 64]


def test_bias_stays_int32_within_a_byte():
    levels = quantize_bias(torch.tensor([-2.0, 1.0, 0.5]))
    assert levels.values.dtype == torch.int32
    assert levels.values.tolist() == [-127, 64, 32]
    assert levels.scale == torch.tensor(2.0) / 127


def test_chunks_do_not_change_values(monkeypatch):
    W = torch.randn(50, 30, generator=torch.Generator().manual_seed(0))
    whole = quantize_weight(W)
    monkeypatch.setattr("buildsys.quant.factored.CHUNK", 64)
    parts = quantize_weight(W)
    assert torch.equal(whole.values, parts.values)
    assert torch.equal(whole.scale, parts.scale)


def test_groups_share_the_largest_scale_and_missing_ones_are_named():
    scales = {"q": 1.0, "k": 3.0, "v": 2.0, "o": 9.0}
    shared = share_scales(scales, [("q", "k", "v")])
    assert shared == {"q": 3.0, "k": 3.0, "v": 3.0, "o": 9.0}
    with pytest.raises(QuantError, match=r"layers\.0\.up_proj: has no activation scale"):
        share_scales(scales, [("q", "layers.0.up_proj")])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_refused_by_name(bad):
    with pytest.raises(QuantError, match=r"layers\.3\.down_proj\.weight: has values that are not"):
        quantize_weight(torch.tensor([1.0, bad]), name="layers.3.down_proj.weight")
