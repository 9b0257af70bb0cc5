"""Rows of gate that set the range alone are divided, others stay, and other tokens gain too."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from buildsys.quant.errors import QuantError
from buildsys.quant.gate_rows import shrink_gate
from buildsys.quant.profiles import fake_quantize

WIDTH, FAR = 64, 5


def outputs(seed: int, reach: float) -> tuple[Tensor, Tensor]:
    """gate, up [512, 64]; row FAR of gate lies around `reach` on every token."""
    generator = torch.Generator().manual_seed(seed)
    gate = torch.randn(512, WIDTH, generator=generator)
    gate[:, FAR] = reach + torch.randn(512, generator=generator)
    return gate, torch.randn(512, WIDTH, generator=generator)


def error(gate: Tensor, up: Tensor, divided: Tensor, multiplied: Tensor, magnitude: float) -> float:
    made = functional.silu(fake_quantize(gate / divided, magnitude, 8)) * up * multiplied
    return float((made - functional.silu(gate) * up).square().sum(1).mean())


def test_a_row_far_from_zero_is_divided_and_every_token_gains() -> None:
    gate, up = outputs(0, 40.0)
    peak = float(gate.abs().max())
    ones = torch.ones(WIDTH)
    found = shrink_gate(gate, up, 8, peak, torch.ones(len(gate)), ones)
    assert torch.nonzero(found.divided != 1.0)[:, 0].tolist() == [FAR]
    assert found.range < peak / 3
    # far from zero silu(g / d) is g / d: what was divided comes back
    torch.testing.assert_close(found.multiplied[FAR], found.divided[FAR], rtol=0.02, atol=0)
    others = outputs(1, 40.0)
    before = min(error(*others, ones, ones, peak * share) for share in (1.0, 0.8, 0.6, 0.4))
    assert error(*others, found.divided, found.multiplied, found.range) < before / 3


def test_where_no_row_reaches_far_nothing_is_divided() -> None:
    gate, up = outputs(0, 0.0)
    ones = torch.ones(WIDTH)
    found = shrink_gate(gate, up, 8, float(gate.abs().max()), torch.ones(len(gate)), ones)
    # each row cut by the range is one of a Gauss's tail: dividing it costs the bulk more
    assert int((found.divided != 1.0).sum()) <= WIDTH // 8
    assert error(gate, up, found.divided, found.multiplied, found.range) <= error(
        gate, up, ones, ones, found.range
    )


def test_a_token_that_may_lose_little_keeps_its_range_or_has_its_row_divided_further() -> None:
    """One token reaches ten times as far as all others, as massive activations do."""
    gate, up = outputs(0, 0.0)
    gate[0, FAR] = 60.0
    ones, rows = torch.ones(WIDTH), torch.ones(len(gate))
    most = torch.full_like(rows, 1e-3 * float((functional.silu(gate[0]) * up[0]).square().sum()))
    found = shrink_gate(gate, up, 8, 60.0, rows, ones, most=most)
    seen = functional.silu(fake_quantize(gate / found.divided, found.range, 8)) * up
    lost = (seen * found.multiplied - functional.silu(gate) * up).square().sum(1)
    assert float(lost[0]) <= float(most[0])
    free = shrink_gate(gate, up, 8, 60.0, rows, ones)
    assert free.range < found.range or float(free.divided[FAR]) != float(found.divided[FAR])


def test_activations_that_are_not_finite_are_refused() -> None:
    gate, up = outputs(0, 40.0)
    gate[3, 2] = torch.inf
    with pytest.raises(QuantError, match="not finite"):
        shrink_gate(gate, up, 8, 40.0, torch.ones(len(gate)), torch.ones(WIDTH))
