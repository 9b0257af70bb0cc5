"""Factors by the noise model make less noise than other choices do."""

from __future__ import annotations

import pytest
import torch

from buildsys.quant.balance import Quantizer, balanced_factors, total_noise
from buildsys.quant.errors import QuantError


def quantizers(n: int = 40, seed: int = 0) -> list[Quantizer]:
    generator = torch.Generator().manual_seed(seed)

    def spread() -> torch.Tensor:
        return torch.exp(2 * torch.randn(n, generator=generator, dtype=torch.float64))

    first, second = spread(), spread()
    return [
        Quantizer(first * 3, second, divided=True),
        Quantizer(spread(), second, divided=True, weight=0.2),
        Quantizer(second, first, divided=False, weight=0.5),
    ]


@pytest.mark.parametrize("seed", range(3))
def test_there_is_less_noise_than_without_and_than_with_equal_maxima(seed: int) -> None:
    made = quantizers(seed=seed)
    s = balanced_factors(made)
    noise = total_noise(made, s)
    equal = torch.sqrt(made[0].ranges / made[2].ranges)
    assert noise < 0.5 * total_noise(made, torch.ones_like(s))
    assert noise <= total_noise(made, equal)
    generator = torch.Generator().manual_seed(9)
    for _ in range(50):  # nothing near it is better by more than the search's last steps
        near = s * torch.exp(0.1 * torch.randn(len(s), generator=generator, dtype=torch.float64))
        assert noise < 1.01 * total_noise(made, near)


def test_one_large_element_is_divided_as_far_as_it_pays() -> None:
    ranges = torch.ones(8, dtype=torch.float64)
    ranges[3] = 64.0
    made = [
        Quantizer(ranges, torch.ones(8).double(), divided=True),
        Quantizer(torch.ones(8).double(), torch.full((8,), 0.01).double(), divided=False),
    ]

    def noise(factor: float) -> float:
        s = torch.ones(8, dtype=torch.float64)
        s[3] = factor
        return total_noise(made, s)

    best = min(noise(1.02**step) for step in range(300))
    assert noise(1.0) > 2 * best
    assert total_noise(made, balanced_factors(made)) < 1.02 * best


def test_a_common_factor_changes_nothing() -> None:
    made = quantizers()
    s = balanced_factors(made)
    assert total_noise(made, 7 * s) == pytest.approx(total_noise(made, s))


def test_powers_of_two_are_the_nearest_ones() -> None:
    made = quantizers()
    s, rounded = balanced_factors(made), balanced_factors(made, powers_of_two=True)
    assert torch.equal(torch.log2(rounded), torch.log2(rounded).round())
    assert ((rounded / s).log2().abs() <= 0.5 + 1e-9).all()


def test_what_is_not_finite_is_refused() -> None:
    broken = Quantizer(torch.tensor([1.0, torch.nan]), torch.ones(2), divided=True)
    with pytest.raises(QuantError, match="not finite"):
        balanced_factors([broken, Quantizer(torch.ones(2), torch.ones(2), divided=False)])
