"""How the tensors of a graph are quantized: encodings from ranges, and weights as int8.

value = scale * (q - zero_point). Activations are uint16 or uint8 over [min, max] with zero
inside; keys and values, and what is made of them, are symmetric. A masked score lies so far below
every other that its softmax is 0, and no further: more depth would cost steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from buildsys.models.errors import ModelError
from buildsys.models.graph.graph import Graph
from buildsys.models.graph.language import COS, MASK, SIN
from buildsys.models.graph.ranges import Ranges

Kind = Literal["uint16", "uint8", "int8"]
LIMITS: Mapping[Kind, tuple[int, int]] = {
    "uint16": (0, 65535),
    "uint8": (0, 255),
    "int8": (-128, 127),
}
# exp(-16) = 1e-7: below half a step of the softmax in 16 bits, also for 1,000 masked tokens.
DEPTH = 16.0
# A bias is added in int32 steps of input scale x weight scale: it must fit, with room for sums.
LARGEST_BIAS = 1 << 30
SMALLEST_STEP = 1e-20
REMEDY = "Give scales of rule activation-scales with `points: graph`, made for this model."


@dataclass(frozen=True)
class Encoding:
    """How one tensor is quantized."""

    kind: Kind
    scale: float
    zero_point: int

    def quantize(self, x: Tensor) -> Tensor:
        """x as whole numbers in float64; half to even, saturating."""
        low, high = LIMITS[self.kind]
        return torch.round(x.double() / self.scale).add_(self.zero_point).clamp_(low, high)

    def dequantize(self, q: Tensor) -> Tensor:
        """float32 values of whole numbers."""
        return ((q.double() - self.zero_point) * self.scale).float()

    def fake(self, x: Tensor) -> Tensor:
        """x as a reader of the quantized tensor sees it."""
        return self.dequantize(self.quantize(x))


@dataclass(frozen=True)
class QuantizedWeight:
    """int8 weight [out, in] in [-127, 127] with one scale per row (equal ones: per tensor), and
    an int32 bias in steps of input scale x row scale."""

    weight: Tensor
    scales: Tensor
    bias: Tensor | None
    bias_scales: Tensor | None

    def floats(self) -> tuple[Tensor, Tensor | None]:
        """float32 weight and bias, as the compiled graph has them."""
        weight = self.weight.float() * self.scales[:, None]
        if self.bias is None or self.bias_scales is None:
            return weight, None
        return weight, (self.bias.double() * self.bias_scales.double()).float()


def asymmetric(low: float, high: float, kind: Kind) -> Encoding:
    """The encoding of [low, high], zero taken in."""
    low, high = min(low, 0.0), max(high, 0.0)
    bottom, top = LIMITS[kind]
    scale = _step((high - low) / (top - bottom))
    return Encoding(kind, scale, min(top, max(bottom, bottom + round(-low / scale))))


def symmetric(low: float, high: float, kind: Kind) -> Encoding:
    """The encoding of [-m, m] for the larger magnitude m."""
    bottom, top = LIMITS[kind]
    scale = _step(max(-low, high) / ((top - bottom) // 2))
    return Encoding(kind, scale, (top + bottom + 1) // 2)


def encodings_of(
    graph: Graph, ranges: Ranges, kind: Kind, depth: float | None = None
) -> dict[str, Encoding]:
    """Tensor -> its encoding. depth: of the mask, from `mask_depth` over all graphs that are
    given one mask; by default this graph's own. Raises ModelError for a range that is missing."""
    depth = mask_depth((graph,), ranges) if depth is None else depth
    made: dict[str, Encoding] = {}
    for name, kept in graph.ranges.items():
        if kept == MASK:
            made[name] = asymmetric(-depth, 0.0, kind)
            continue
        low, high = (-1.0, 1.0) if kept in (COS, SIN) else _range(kept, ranges)
        make = symmetric if kept in graph.symmetric else asymmetric
        made[name] = make(low, high, kind)
    return made


def mask_depth(graphs: tuple[Graph, ...], ranges: Ranges) -> float:
    """How far below zero the mask of these graphs goes: it takes the largest score below the
    smallest of every layer."""
    spans = [0.0]
    for graph in graphs:
        for kept in graph.ranges.values():
            if kept.endswith(".masked"):
                low, _ = _range(kept, ranges)
                _, high = _range(kept.removesuffix(".masked") + ".scores", ranges)
                spans.append(high - low)
    return math.ceil(max(spans))


def _range(kept: str, ranges: Ranges) -> tuple[float, float]:
    if kept.endswith(".masked"):
        low, high = _range(kept.removesuffix(".masked") + ".scores", ranges)
        return low - DEPTH, high
    if kept not in ranges:
        raise ModelError("the scales have no range for it", tensor=kept, remedy=REMEDY)
    return ranges[kept]


def quantize_weight(
    weight: Tensor, bias: Tensor | None, input_scale: float, *, per_channel: bool
) -> QuantizedWeight:
    """A linear's weight [out, in] and bias [out], for inputs with that scale; largest magnitudes
    give the scales, half to even. A row of which the bias would not fit has a larger scale."""
    largest = weight.abs().amax(1)
    if not per_channel:
        largest = largest.amax().expand_as(largest)
    scales = (largest / 127.0).clamp_min(1e-12)
    if bias is not None:
        scales = torch.maximum(scales, bias.abs() / (input_scale * LARGEST_BIAS))
        if not per_channel:
            scales = scales.amax().expand_as(scales)
    q = torch.round(weight / scales[:, None]).clamp_(-127, 127).to(torch.int8)
    if bias is None:
        return QuantizedWeight(q, scales, None, None)
    steps = (scales.double() * input_scale).float()
    whole = torch.round(bias.double() / steps.double()).to(torch.int32)
    return QuantizedWeight(q, scales, whole, steps)


def _step(value: float) -> float:
    """The nearest float32, which is what files of compilers keep; 1 for a tensor that is as good
    as zero, whose step no runtime could divide by."""
    return float(torch.tensor(value, dtype=torch.float32)) if value > SMALLEST_STEP else 1.0
