"""Where to clip an activation: the range of a static quantizer below its maximum.

A symmetric quantizer of few bits serves the bulk better when rare values saturate. Each method
gives a range (a magnitude) for values x that were sampled; the peak is of all values.
Sources: mean squared error, as in OCTAV and every PTQ tool; relative entropy of histograms,
Migacz, "8-bit inference with TensorRT" (GTC 2017); error relative to the residual stream:
what the next RMSNorm divides by, so that a few tokens with massive activations do not decide
for all others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from buildsys.quant.profiles import fake_quantize

Method = Literal["absmax", "mse", "kl", "relative"]
METHODS: tuple[Method, ...] = ("absmax", "mse", "kl", "relative")
# From the peak down to a 50,000th of it in steps of a fifth, then finer around the best.
_STEP = 0.8
_STEPS = 48
_FINE = 4
# The search ends where the error is so many times the least: below, all saturates.
_HOPELESS = 1.5
_BINS = 2048
# Numbers that are worked on at a time, so that they stay in the cache.
_PART = 1 << 16


def parts(x: Tensor) -> Iterator[Tensor]:
    """Runs of rows of x [n, features] that stay in the cache, and need little beside it."""
    count = max(1, _PART // x.shape[1])
    return (x[start : start + count] for start in range(0, len(x), count))


def best_range(peak: float, error: Callable[[float], float]) -> float:
    """The range at or below `peak` with the least error.

    From the peak downwards in steps of a fifth, until the error is half as large again as the
    least (not until it stops falling: under massive activations it is flat for long, with all
    else rounded to zero); then steps of about a twentieth on both sides of the best.
    """
    tried = {peak: error(peak)}
    for step in range(1, _STEPS):
        candidate = peak * _STEP**step
        tried[candidate] = error(candidate)
        if tried[candidate] > _HOPELESS * min(tried.values()):  # not while all are infinite
            break
    best = min(tried, key=tried.__getitem__)
    for fine in range(1 - _FINE, _FINE):
        candidate = min(best * _STEP ** (fine / _FINE), peak)
        if candidate not in tried:
            tried[candidate] = error(candidate)
    return min(tried, key=tried.__getitem__)


def mse_range(x: Tensor, bits: int, peak: float) -> float:
    """The range with the least squared error over the sampled values x (any shape)."""
    return best_range(peak, lambda r: _squares(fake_quantize(x, r, bits) - x))


def weighted_range(
    x: Tensor,
    bits: int,
    peak: float,
    rows: Tensor,
    columns: Tensor,
    *,
    most: Tensor | None = None,
) -> float:
    """The range of x [n, features] with the least error in what is made of it.

    rows [n]: weight of a token, such as 1 / |residual|^2. columns [features]: how much of an
    error in a feature arrives, such as the squared norm of the next weight's column. most [n]: no
    token may lose more than this, with its weight, unless it loses as much at the peak: one whose
    massive activations are cut costs little by itself and ruins all others, which attend to it.
    """

    def lost(magnitude: float) -> Tensor:
        made = [fake_quantize(p, magnitude, bits).sub_(p).square_() @ columns for p in parts(x)]
        return rows * torch.cat(made)

    return best_range(peak, limited(lost, peak, most))


def limited(
    lost: Callable[[float], Tensor], peak: float, most: Tensor | None
) -> Callable[[float], float]:
    """What all tokens lose together under a range; infinite where one of them loses more than
    `most` [n] and more than under the range `peak`. lost: range -> what each token loses [n]."""
    allowed = None if most is None else torch.maximum(most, lost(peak))

    def total(magnitude: float) -> float:
        each = lost(magnitude)
        over = allowed is not None and bool((each > allowed).any())
        return math.inf if over else float(each.sum())

    return total


def repaired_range(
    x: Tensor, bits: int, peak: float, rows: Tensor, columns: Tensor, share: float
) -> float:
    """`weighted_range` where saturated values are repaired, as in a shadow layer: the bulk alone
    decides. share: at most this share of the values saturates, because each costs CPU time.
    """
    magnitudes = x.abs().flatten().numpy()
    order = len(magnitudes) - max(1, int(len(magnitudes) * share))
    magnitudes.partition(order)  # in place; torch.topk would take five times the memory
    least = float(magnitudes[order])
    del magnitudes

    def error(magnitude: float) -> float:
        if magnitude < least:
            return math.inf
        made = [repaired(p, magnitude, bits).sub_(p).square_() @ columns for p in parts(x)]
        return float(rows @ torch.cat(made))

    return best_range(peak, error)


def repaired(x: Tensor, magnitude: float, bits: int) -> Tensor:
    """`fake_quantize`, but what is at the quantizer's limit passes as it is."""
    top = 2 ** (bits - 1) - 1
    limit = torch.round(x / (magnitude / top)).abs() >= top
    return torch.where(limit, x, fake_quantize(x, magnitude, bits))


def gate_up_ranges(
    gate: Tensor,
    up: Tensor,
    bits: int,
    peaks: tuple[float, float],
    rows: Tensor,
    columns: Tensor,
    *,
    most: Tensor | None = None,
) -> tuple[float, float]:
    """Ranges of gate's and up's outputs [n, intermediate] with the least error in their product.

    silu(gate) * up is what down_proj reads. `rows`, `columns`, `most` as in `weighted_range`, with
    down_proj's columns. In turns: up's range, gate's, and both once more. What is large and
    negative in gate costs nothing when it saturates, and the search finds that by itself.
    """
    product = _Product(gate, up, bits, rows, columns)

    def of_up(gate_range: float | None) -> float:
        lost = partial(product.lost, gate_range)
        return best_range(peaks[1], limited(lost, peaks[1], most))

    def of_gate(up_range: float) -> float:
        lost = partial(product.lost, up_range=up_range)
        return best_range(peaks[0], limited(lost, peaks[0], most))

    up_range = of_up(of_gate(of_up(None)))
    return of_gate(up_range), up_range


class _Product:
    """What each token loses in silu(gate) * up under ranges for both; None: gate stays float."""

    def __init__(self, gate: Tensor, up: Tensor, bits: int, rows: Tensor, columns: Tensor) -> None:
        self._bits, self._rows, self._columns = bits, rows, columns
        self._parts = [
            (g, u, functional.silu(g).mul_(u)) for g, u in zip(parts(gate), parts(up), strict=True)
        ]

    def lost(self, gate_range: float | None, up_range: float) -> Tensor:
        found = []
        for g, u, product in self._parts:
            seen = g if gate_range is None else fake_quantize(g, gate_range, self._bits)
            made = functional.silu(seen).mul_(fake_quantize(u, up_range, self._bits))
            found.append(made.sub_(product).square_() @ self._columns)
        return self._rows * torch.cat(found)


def kl_range(x: Tensor, bits: int, peak: float) -> float:
    """The range under which the histogram of |x| loses least in relative entropy.

    2,048 bins up to the peak. For every cut, what is beyond it counts in the last bin (it
    saturates), and the bins are merged into as many levels as the quantizer has on one side.
    """
    levels = 2 ** (bits - 1)
    counts = torch.histc(x.abs().flatten().to(torch.float32), _BINS, 0.0, peak).double()
    counts[0] = 0.0 if float(counts[1:].sum()) else counts[0]  # zeros are exact in any range
    best, least = peak, math.inf
    for cut in range(levels, _BINS + 1, max(1, levels // 16)):
        entropy = _relative_entropy(counts, cut, levels)
        if entropy < least:
            best, least = peak * cut / _BINS, entropy
    return best


def _relative_entropy(counts: Tensor, cut: int, levels: int) -> float:
    """KL(clipped histogram || the same in `levels` levels), nats."""
    kept = counts[:cut]
    reference = kept.clone()
    reference[-1] += counts[cut:].sum()
    level = torch.arange(cut) * levels // cut
    there = (kept > 0).double()
    sums = torch.zeros(levels, dtype=torch.float64).index_add_(0, level, kept)
    sizes = torch.zeros(levels, dtype=torch.float64).index_add_(0, level, there)
    merged = (sums / sizes.clamp(min=1.0))[level] * there
    p, q = reference / reference.sum(), merged / merged.sum().clamp(min=1e-300)
    both = (p > 0) & (q > 0)
    lost = float(p[(p > 0) & (q == 0)].sum())
    # A bin that only the saturated fill would cost infinity: it counts as if one value were there.
    floor = 1.0 / float(counts.sum().clamp(min=1.0))
    entropy = float((p[both] * (p[both] / q[both]).log()).sum())
    return entropy + (lost * math.log(lost / floor) if lost > floor else 0.0)


def _squares(x: Tensor) -> float:
    flat = x.reshape(-1)
    return float(flat @ flat)
