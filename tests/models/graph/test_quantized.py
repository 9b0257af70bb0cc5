"""Encodings hold what they promise, and the simulation is onnx's own arithmetic."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from buildsys.models.errors import ModelError
from buildsys.models.graph.encodings import (
    DEPTH,
    LARGEST_BIAS,
    LIMITS,
    asymmetric,
    encodings_of,
    mask_depth,
    quantize_weight,
    symmetric,
)
from buildsys.models.graph.evaluate import evaluate
from buildsys.models.graph.graph import Graph, GraphBuilder
from buildsys.models.graph.language import MASK, attend
from buildsys.models.graph.quantized import quantized_graph

ENDS = st.floats(-1e4, 1e4, allow_subnormal=False)
KINDS = st.sampled_from(["uint16", "uint8"])


def attention() -> Graph:
    """Two heads of 8, four queries on six keys."""
    build = GraphBuilder("attention")
    build.input(MASK, (4, 6))
    q, k, v = (build.input(n, (2, 4 if n == "q" else 6, 8)) for n in "qkv")
    build.around_zero("k", "v")
    return build.graph((attend(build, "attn", q, k, v, (2, 4, 6)),))


RANGES = {
    "q": (-4.0, 4.0),
    "k": (-4.0, 3.0),
    "v": (-4.0, 4.0),
    "attn.scores": (-30.0, 20.0),
    "attn.softmax": (0.0, 1.0),
    "attn.attended": (-4.0, 4.0),
}


@settings(deadline=None)
@given(ENDS, ENDS, KINDS)
def test_values_within_the_range_are_off_by_half_a_step(a: float, b: float, kind: str) -> None:
    low, high = sorted((a, b))
    for make in (asymmetric, symmetric):
        encoding = make(low, high, kind)  # type: ignore[arg-type]  # a Literal
        x = torch.linspace(low, high, 50)
        error = (encoding.fake(x).double() - x.double()).abs().max()
        step = encoding.scale if max(-low, high) > 1e-14 else 0.0  # else it is taken as zero
        assert error <= step * 0.5001 + 1e-6 * max(abs(low), abs(high)) + 1e-14
        assert encoding.scale > 1e-20
        assert encoding.fake(torch.zeros(1)) == 0.0


@settings(deadline=None)
@given(st.lists(st.floats(-100, 100, width=32), min_size=6, max_size=6), st.booleans())
def test_a_bias_always_fits_and_weights_are_off_by_half_a_step(
    values: list[float], per_channel: bool
) -> None:
    weight, bias = torch.tensor(values).view(2, 3) * 1e-6, torch.tensor([100.0, -3.0])
    made = quantize_weight(weight, bias, 1e-5, per_channel=per_channel)
    assert made.bias is not None
    assert int(made.bias.abs().max()) <= LARGEST_BIAS * 1.001
    floats, summed = made.floats()
    assert bool(((floats - weight).abs() <= made.scales[:, None] * 0.501).all())
    assert summed is not None
    torch.testing.assert_close(summed, bias, rtol=1e-5, atol=1e-6)


def test_a_masked_score_weighs_nothing_and_costs_no_more_range_than_that() -> None:
    graph = attention()
    encodings = encodings_of(graph, RANGES, "uint16")
    assert mask_depth((graph,), RANGES) == math.ceil(50 + DEPTH)
    masked = encodings["attn.masked"]
    lowest = masked.dequantize(torch.tensor([0]))
    assert float(lowest) == pytest.approx(-30 - DEPTH, rel=1e-3)
    assert math.exp(-DEPTH) * 1000 < 1e-3


def test_a_product_of_16_bit_activations_keeps_16_bits() -> None:
    """Written out in two products by int8 it equals the plain one; in one by int8 it does not."""
    graph = attention()
    made = quantized_graph(graph, RANGES, "uint16", per_channel=True)
    second = [node.inputs[1] for node in made.graph.nodes if node.op == "matmul"]
    assert len(second) == 4
    assert {made.encodings[name].kind for name in second} == {"int8"}
    generator = torch.Generator().manual_seed(0)
    feeds = {n: torch.randn(graph.shapes[n], generator=generator) for n in ("q", "k", "v")}
    feeds[MASK] = torch.zeros(4, 6)
    exact = evaluate(graph, feeds, lambda node: pytest.fail(node.output))
    found = made.simulate(feeds, lambda node: pytest.fail(node.output))
    (name,) = graph.outputs
    noise = (found[name] - exact[name]).square().sum() / exact[name].square().sum()
    assert 10 * math.log10(float(noise)) < -60  # 8-bit keys and values give about -40


def test_hi_and_lo_hold_every_16_bit_value() -> None:
    made = quantized_graph(attention(), RANGES, "uint16", per_channel=True)
    key = made.encodings["k"]
    whole = torch.arange(*LIMITS["uint16"])
    x = key.dequantize(whole)
    hi = made.encodings["attn.scores.hi"].fake(x)
    lo = made.encodings["attn.scores.lo"].fake(made.encodings["attn.scores.lo.wide"].fake(x - hi))
    # lo's steps are a little wider than one: half of one is the most that is lost.
    assert float((hi + lo - x).abs().max()) <= key.scale * 0.53


def test_with_8_bit_linears_only_what_they_read_and_write_has_8_bits() -> None:
    build = GraphBuilder("two")
    x = build.input("x", (4, 8))
    y = build.linear(x, "a", 8, bias=True)
    z = build.linear(x, "b", 8, bias=False)
    graph = build.graph((build.elementwise("add", (y, z), "sum"),))
    ranges = dict.fromkeys(("x", "a", "b", "sum"), (-3.0, 2.0))
    made = quantized_graph(graph, ranges, "uint8", per_channel=True)
    for node in made.graph.nodes:
        kinds = [made.encodings[name].kind for name in (*node.inputs, node.output)]
        assert (set(kinds) == {"uint8"}) == (node.op == "linear")
    converted = [node.inputs[0] for node in made.graph.nodes if node.op == "convert"]
    assert converted.count("x") == 1
    for name in ("x", "sum"):  # what goes in and out is as it was
        assert made.encodings[name].kind == "uint16"


def test_a_tensor_without_a_range_is_named() -> None:
    ranges = {name: ends for name, ends in RANGES.items() if name != "attn.softmax"}
    with pytest.raises(ModelError, match=r"attn\.softmax") as caught:
        encodings_of(attention(), ranges, "uint16")
    assert "points: graph" in str(caught.value)
