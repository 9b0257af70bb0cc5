"""Per-tensor symmetric int8 as mllm's QNN export writes it: weights, biases, clip flags, groups.

Source: mllm v1 tools/qnn_convertor/export_qnn_model.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from buildsys.quant.errors import QuantError
from buildsys.quant.factored import spans

LEVELS = 127
# Below this a tensor counts as zero: its scale stays a normal number.
_SMALLEST_ABSMAX = 1e-5


@dataclass(frozen=True)
class Quantized:
    """Whole numbers and the scale that makes them values again: value = values * scale."""

    values: Tensor
    scale: Tensor


def weight_scale(W: Tensor) -> Tensor:
    """max(max|W|, 1e-5) / 127, computed in float32; 0-d float32. Any shape; read in chunks."""
    flat = W.reshape(-1)
    peak = torch.zeros((), dtype=torch.float32)
    for first, count in spans(len(flat), 1):
        part = flat[first : first + count].to(torch.float32)
        peak = torch.maximum(peak, part.abs().max())
    return torch.clamp(peak, min=_SMALLEST_ABSMAX) / LEVELS


def quantize_weight(
    W: Tensor, *, scale: Tensor | None = None, out: Tensor | None = None, name: str = "weight"
) -> Quantized:
    """round(W / scale) in float32, half to even, as int8 [same shape], and the scale (0-d f32).

    `scale` defaults to `weight_scale(W)`, under which nothing saturates; with a scale of the
    caller's, values beyond +-127 saturate. Raises QuantError, naming `name`, for a value that
    is not finite.
    """
    scale = weight_scale(W) if scale is None else scale.to(torch.float32)
    if not bool(torch.isfinite(scale)):
        raise QuantError(f"{name}: has values that are not finite; the checkpoint is damaged")
    out = torch.empty(W.shape, dtype=torch.int8) if out is None else out
    source, target = W.reshape(-1), out.view(-1)
    for first, count in spans(len(source), 1):
        part = slice(first, first + count)
        levels = torch.round(source[part].to(torch.float32) / scale)
        target[part] = levels.clamp_(-LEVELS, LEVELS).to(torch.int8)
    return Quantized(out, scale)


def quantize_bias(bias: Tensor, *, name: str = "bias") -> Quantized:
    """The bias in mllm's `quant_bias` form: int32 holding -127 .. 127, and a scale of its own."""
    levels = quantize_weight(bias, name=name)
    return Quantized(levels.values.to(torch.int32), levels.scale)


@dataclass(frozen=True)
class ActivationScale:
    """One side of a linear in int8.pth: `magnitude` is the range (not divided by 127)."""

    magnitude: float
    clip: bool


def choose_scale(
    largest: float, top: float, *, threshold: float | None, clip: bool = True
) -> ActivationScale:
    """mllm's clip rule for one side of a linear.

    `largest` is `ori` (the maximum), `top` is `top_0_1` (the 0.999 order statistic). With
    threshold None (`clip: all`) the range is the maximum. With a threshold it is the maximum
    where top * threshold > largest, else `top`, and the values above are left to a shadow layer.
    `clip` False forces the latter (a layer that a user wants shadowed).
    """
    clip = clip and (threshold is None or top * threshold > largest)
    return ActivationScale(largest if clip else top, clip)


def shadow_layers(
    scales: Mapping[str, tuple[ActivationScale, ActivationScale]],
) -> tuple[str, ...]:
    """The linears whose input or output is not clipped, in order; they need a shadow layer.

    `scales`: name -> (input, output).
    """
    return tuple(name for name, sides in scales.items() if not all(side.clip for side in sides))


def share_scales(scales: Mapping[str, float], groups: Iterable[Sequence[str]]) -> dict[str, float]:
    """`scales` with every group at its largest value: {q, k, v} and {gate, up} read one quantizer.

    Order kept. Raises QuantError where a group names a linear that has no scale.
    """
    shared = dict(scales)
    for group in groups:
        for name in group:
            if name not in scales:
                raise QuantError(f"{name}: has no activation scale; profile it with the others")
        largest = max(scales[name] for name in group)
        shared.update(dict.fromkeys(group, largest))
    return shared
