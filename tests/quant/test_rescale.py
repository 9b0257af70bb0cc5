"""Rescaling up against down changes the weights and not the function."""

from __future__ import annotations

import pytest
import torch

from buildsys.quant.errors import QuantError
from buildsys.quant.rescale import divide_rows, equal_peaks, multiply_columns


def mlp_weights(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    gate, up = (torch.randn(48, 16, generator=generator, dtype=torch.float64) for _ in range(2))
    down = torch.randn(16, 48, generator=generator, dtype=torch.float64)
    up[[3, 17]] *= 300  # what real models have
    return gate.to(dtype), up.to(dtype), down.to(dtype)


def up_down_factors(up, down, powers_of_two=True):
    return equal_peaks(up.abs().amax(1).double(), down.abs().amax(0).double(), powers_of_two)


def mlp(x, gate, up, down):
    return (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T


@pytest.mark.parametrize("powers_of_two", [True, False])
def test_function_does_not_change(powers_of_two):
    gate, up, down = mlp_weights()
    s = up_down_factors(up, down, powers_of_two=powers_of_two)
    x = torch.randn(9, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    rescaled = mlp(x, gate, divide_rows(up, s), multiply_columns(down, s))
    torch.testing.assert_close(rescaled, mlp(x, gate, up, down), rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_powers_of_two_are_exact_in_stored_types(dtype):
    _, up, down = mlp_weights(dtype)
    s = up_down_factors(up, down)
    assert torch.equal(divide_rows(up, s).double(), up.double() / s[:, None])
    assert torch.equal(multiply_columns(down, s).double(), down.double() * s)


def test_maxima_are_equal_afterwards():
    _, up, down = mlp_weights()
    s = up_down_factors(up, down, powers_of_two=False)
    rows = divide_rows(up, s).abs().amax(dim=1)
    torch.testing.assert_close(rows, multiply_columns(down, s).abs().amax(dim=0))
    nearest = up_down_factors(up, down)
    assert ((nearest / s).log2().abs() <= 0.5 + 1e-12).all()


def test_outlier_rows_no_longer_set_the_range_of_up():
    _, up, down = mlp_weights()
    s = up_down_factors(up, down)
    assert divide_rows(up, s).abs().max() < up.abs().max() / 10


def test_dead_channels_keep_the_factor_one():
    _, up, down = mlp_weights()
    up[5], down[:, 6] = 0, 0
    s = up_down_factors(up, down)
    assert s[5] == 1
    assert s[6] == 1


def test_weights_that_are_not_finite_are_refused():
    with pytest.raises(QuantError, match="not finite"):
        up_down_factors(torch.full((4, 3), torch.inf), torch.ones(3, 4))
