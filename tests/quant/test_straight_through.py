"""Differentiable quantizers compute what the plain ones do; their gradient reaches the range."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from buildsys.quant.int8 import quantize_weight
from buildsys.quant.profiles import fake_quantize
from buildsys.quant.straight_through import (
    NEAR,
    product,
    quantize_activation,
    quantize_weight_through,
)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_an_activation_is_quantized_as_the_runtime_does_at_its_maximum(
    bits: int, sign: float
) -> None:
    x = sign * noise(7, 33).exp()
    expected = fake_quantize(x, float(x.abs().max()), bits)
    assert torch.equal(quantize_activation(x, bits), expected)


def test_a_weight_is_rounded_as_the_checkpoint_stores_it() -> None:
    W = noise(40, 50)
    made = quantize_weight(W)
    assert torch.equal(quantize_weight_through(W), made.values * made.scale)


def test_the_gradient_along_the_input_is_that_of_a_function_that_scales_with_it() -> None:
    """Q(a x) = a Q(x), range and all: by Euler, the gradient times x is the gradient's sum with
    Q(x), which rounding taken as the identity alone would miss."""
    upstream = noise(20, 30, seed=1)
    for quantize in (lambda x: quantize_activation(x, 8), quantize_weight_through):
        x = noise(20, 30).requires_grad_()
        y = quantize(x)
        (y * upstream).sum().backward()
        assert x.grad is not None
        along = float((x.grad * x.detach()).sum())
        assert along == pytest.approx(float((upstream * y.detach()).sum()), rel=1e-4)
        straight = float((upstream * x.detach()).sum())
        assert abs(along - straight) > 10 * abs(along - float((upstream * y.detach()).sum()))


def test_the_range_is_shared_by_the_values_near_the_maximum() -> None:
    x = torch.tensor([1.0, -0.99, NEAR - 0.01, 0.1]).requires_grad_()
    upstream = torch.tensor([0.0, 0.0, 0.0, 1.0])
    (quantize_activation(x, 8) * upstream).sum().backward()
    assert x.grad is not None
    rounding = float((quantize_activation(x, 8) - x).detach()[3])
    share = 0.99**32 / (1 + 0.99**32)
    expected = [rounding * (1 - share), -rounding * share / 0.99, 0.0, 1.0]
    torch.testing.assert_close(x.grad, torch.tensor(expected), rtol=1e-4, atol=1e-7)


def test_a_tensor_of_zeros_stays_zero_and_lets_the_gradient_through() -> None:
    x = torch.zeros(5).requires_grad_()
    y = quantize_activation(x, 8)
    y.sum().backward()
    assert torch.equal(y, torch.zeros(5))
    assert x.grad is not None
    assert torch.equal(x.grad, torch.ones(5))


def test_a_products_gradients_are_exact_in_float64_and_close_in_float32() -> None:
    x, W = noise(3, 6, 8).double(), noise(5, 8, seed=1).double()
    inputs = (x.requires_grad_(), W.requires_grad_())
    assert torch.autograd.gradcheck(product, inputs)  # type: ignore[no-untyped-call]  # torch's
    exact = torch.autograd.grad(product(x, W).square().sum(), inputs)
    narrow = (x.detach().float().requires_grad_(), W.detach().float().requires_grad_())
    found = torch.autograd.grad(product(*narrow).square().sum(), narrow)
    for one, other in zip(exact, found, strict=True):
        assert float((one - other).abs().max()) < 0.02 * float(one.abs().max())
