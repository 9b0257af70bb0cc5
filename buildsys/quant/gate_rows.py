"""Rows of gate_proj that reach too far: divided, and made up for in up_proj.

gate's output has 8 bits and one range for all rows, and no exact factor passes silu. A few rows
often set that range alone. Far from zero silu(g) is g (or 0), so that c u silu(g / d) is close
to u silu(g) for the right d > 1 and c; near zero it is not, and the float model becomes a
slightly different one. Range and rows are chosen together, by the error of the product, in which
both the quantizer's and this one count.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from buildsys.quant.clipping import best_range, limited, parts
from buildsys.quant.errors import QuantError
from buildsys.quant.profiles import fake_quantize

# 1 / d that are tried.
_SHRUNK = (0.84, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.12)
# At most this share of the rows is changed: where more would saturate, the range is too small.
_SHARE = 0.125


@dataclass(frozen=True)
class GateRows:
    """divided [n]: by what each row of gate is divided (1 where it stays). multiplied [n]: up's
    rows. range: of gate's output, which they were chosen under."""

    divided: Tensor
    multiplied: Tensor
    range: float


@torch.inference_mode()
def shrink_gate(
    gate: Tensor,
    up: Tensor,
    bits: int,
    peak: float,
    rows: Tensor,
    columns: Tensor,
    *,
    most: Tensor | None = None,
) -> GateRows:
    """The rows to divide, with the least error in silu(gate) * up under one range for gate.

    gate, up [tokens, n]: outputs; peak: the largest magnitude in gate of all tokens. rows
    [tokens], columns [n], most [tokens]: weights and limits, as in `clipping.weighted_range`.
    Raises QuantError where an output is not finite.
    """
    if not all(bool(torch.isfinite(t.sum())) for t in (gate, up, rows)):
        raise QuantError("gate-up: activations are not finite; check the checkpoint")
    search = _Search(gate, up, bits, rows, columns, most)
    magnitude = best_range(peak, limited(lambda r: search.at(r).lost, peak, most))
    found = search.at(magnitude)
    return GateRows(found.divided, found.multiplied, magnitude)


@dataclass(frozen=True)
class _Choice:
    """By what gate's rows are divided, up's factors, and what each token loses [tokens]: of all
    rows [n], or of one."""

    divided: Tensor
    multiplied: Tensor
    lost: Tensor


class _Search:
    """The best choice under a range, for every row that it would cut."""

    def __init__(
        self,
        gate: Tensor,
        up: Tensor,
        bits: int,
        rows: Tensor,
        columns: Tensor,
        most: Tensor | None,
    ) -> None:
        self._gate, self._up, self._bits = gate, up, bits
        self._rows, self._columns, self._most = rows, columns, most
        self._reach = gate.amax(0)  # upwards: downwards silu is nothing
        self._cut: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def at(self, magnitude: float) -> _Choice:
        by_row, lost = self._unchanged(magnitude)
        divided, multiplied = torch.ones_like(by_row), torch.ones_like(by_row)
        cut = torch.nonzero(self._reach > magnitude)[:, 0]
        worst = by_row[cut].argsort(descending=True)[: int(_SHARE * len(by_row))]
        for row in cut[worst].tolist():
            stays = self._choice(row, magnitude, 1.0)
            made = min((stays, *self._shrunk(row, magnitude)), key=self._cost)
            divided[row], multiplied[row] = made.divided, made.multiplied
            lost += made.lost - stays.lost
        return _Choice(divided, multiplied, lost)

    def _unchanged(self, magnitude: float) -> tuple[Tensor, Tensor]:
        """What is lost by row [n] and by token, where no row is divided."""
        by_row, by_token = torch.zeros_like(self._columns), []
        at = 0
        for g, u in zip(parts(self._gate), parts(self._up), strict=True):
            by = self._rows[at : at + len(g)]
            seen = functional.silu(fake_quantize(g, magnitude, self._bits))
            lost = seen.sub_(functional.silu(g)).mul_(u).square_()
            by_row += by @ lost
            by_token.append(by * (lost @ self._columns))
            at += len(g)
        return by_row * self._columns, torch.cat(by_token)

    def _shrunk(self, row: int, magnitude: float) -> Iterator[_Choice]:
        return (self._choice(row, magnitude, shrunk) for shrunk in _SHRUNK)

    def _choice(self, row: int, magnitude: float, shrunk: float) -> _Choice:
        """The row divided by 1 / shrunk, and the factor of up's that fits best."""
        g, u, product = self._outputs(row)
        c = torch.ones(())
        if shrunk != 1.0:
            near = functional.silu(g * shrunk) * u
            c = (self._rows @ (near * product)) / (self._rows @ near.square()).clamp(min=1e-30)
        made = functional.silu(fake_quantize(g * shrunk, magnitude, self._bits)) * u * c
        lost = self._rows * made.sub_(product).square_() * self._columns[row]
        return _Choice(torch.tensor(1.0 / shrunk), c, lost)

    def _outputs(self, row: int) -> tuple[Tensor, Tensor, Tensor]:
        """gate, up and their product of one row, kept side by side: most are asked for again."""
        if row not in self._cut:
            g, u = self._gate[:, row].contiguous(), self._up[:, row].contiguous()
            self._cut[row] = (g, u, functional.silu(g) * u)
        return self._cut[row]

    def _cost(self, choice: _Choice) -> tuple[float, float]:
        """Less is better: first, by how much a token loses too much; then the sum."""
        over = 0.0 if self._most is None else float((choice.lost / self._most).max())
        return max(over, 1.0), float(choice.lost.sum())
