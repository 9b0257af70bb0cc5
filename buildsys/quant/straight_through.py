"""Fake quantization that a gradient passes through, with its range at the maximum.

The gradient takes rounding as the identity (straight-through, Bengio et al. 2013) and reaches the
range too: what the rounding error, which grows with the range, costs (LSQ, Esser et al. 2020).
A maximum has its gradient at one value, and the next largest one takes over after any step; so
the range is differentiated as if it were a p-norm, which all values near the maximum share.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from buildsys.quant.int8 import weight_scale

# The order of the norm that the gradient of a range is taken of.
ORDER = 32
# Below this share of the maximum a value has no part in that gradient: 0.5^32 = 2e-10.
NEAR = 0.5
# The noise of wider quantizers is 1/65,536 of that of 8 bits: their ranges are not differentiated.
COARSE_BITS = 8
# A tensor of zeros still needs a range to divide by.
SMALLEST_RANGE = 1e-5


def quantize_activation(x: Tensor, bits: int) -> Tensor:
    """`profiles.fake_quantize` at the range max|x|, differentiable; any shape."""
    found: Tensor = _Activation.apply(x, bits)  # type: ignore[no-untyped-call]  # torch's
    return found


def quantize_weight_through(W: Tensor) -> Tensor:
    """`int8.quantize_weight`'s values as floats, differentiable; any shape."""
    found: Tensor = _Weight.apply(W)  # type: ignore[no-untyped-call]  # torch's
    return found


def product(x: Tensor, W: Tensor, *, narrow: bool = False) -> Tensor:
    """x W^T [..., out] for x [..., in] and W [out, in]; the gradients by `narrow_product`, and
    the product itself where it is to be `narrow`."""
    found: Tensor = _Product.apply(x, W, narrow)  # type: ignore[no-untyped-call]  # torch's
    return found


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: int) -> Tensor:
        top = 2 ** (bits - 1) - 1
        magnitude = max(float(torch.stack(x.aminmax()).abs().max()), SMALLEST_RANGE)
        y: Tensor = (x / (magnitude / top)).round_().mul_(magnitude / top)
        ctx.magnitude = magnitude
        ctx.save_for_backward(*((x, y) if bits <= COARSE_BITS else ()))
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        saved = ctx.saved_tensors  # once: a recomputed layer gives them once
        if not saved:
            return gradient, None
        x, y = saved
        return through_range(x, y, ctx.magnitude, gradient), None


class _Weight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, W: Tensor) -> Tensor:
        scale = weight_scale(W)
        y = torch.round(W / scale).mul_(scale)
        ctx.save_for_backward(W, y)
        ctx.magnitude = max(float(W.abs().max()), SMALLEST_RANGE)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        W, y = ctx.saved_tensors
        return through_range(W, y, ctx.magnitude, gradient)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, narrow: bool) -> Tensor:
        ctx.save_for_backward(x, W)
        if narrow:
            return narrow_product(x, W.T)
        y: Tensor = functional.linear(x, W)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, W = ctx.saved_tensors
        g = gradient.reshape(-1, gradient.shape[-1])
        of_x = of_W = None
        if ctx.needs_input_grad[0]:
            of_x = narrow_product(g, W).reshape(x.shape)
        if ctx.needs_input_grad[1]:
            of_W = narrow_product(g.T, x.reshape(-1, x.shape[-1]))
        return of_x, of_W, None


def narrow_product(a: Tensor, b: Tensor) -> Tensor:
    """a b, matrices; float32 ones are multiplied in bfloat16 where the processor does that: four
    times as fast, and exact enough for a gradient."""
    if a.dtype != torch.float32 or not multiplies_bfloat16():
        return a @ b
    return (a.to(torch.bfloat16) @ b.to(torch.bfloat16)).to(torch.float32)


@cache
def multiplies_bfloat16() -> bool:
    """Does the processor have instructions for it (else it is slower than float32)?"""
    return "avx512_bf16" in _processor_flags()


def _processor_flags() -> str:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return ""


def through_range(x: Tensor, y: Tensor, magnitude: float, gradient: Tensor) -> Tensor:
    """The gradient at x, where y is x quantized with the range `magnitude` = max|x|.

    With y = x + s u and the error u held, dy/ds = u: the loss changes with the range by
    sum(gradient (y - x)) / magnitude, which goes to the values that make the range.
    """
    of_range = float(torch.dot(gradient.reshape(-1), (y - x).reshape(-1))) / magnitude
    total = gradient.reshape(-1).clone()
    flat = x.reshape(-1)
    large = (flat.abs() > NEAR * magnitude).nonzero().squeeze(1)
    if len(large):
        ratio = flat[large] / magnitude
        share = ratio.abs() ** ORDER
        total[large] += of_range * share / share.sum() / ratio
    return total.reshape(x.shape)
