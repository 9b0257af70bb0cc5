"""Rescaling factors with the least noise of static quantizers, by a model of that noise.

A vector between two linears may be divided by s in the first one's rows and multiplied by s in
the second one's columns. Every quantizer on the way has one step for all elements, set by the
largest; its noise arrives in each element as strong as what reads it makes it. The sum of that
over all quantizers is a smooth function of log s but for its maxima, and is minimised here.
Source: the idea of cross-layer equalization (Nagel et al., 2019), whose rule sets both maxima
equal; the objective is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from buildsys.quant.errors import QuantError

_STEPS = 300
_RATE = 0.05
# Factors are kept within e^+-10 of one another.
_LARGEST_LOG = 5.0


@dataclass(frozen=True)
class Quantizer:
    """One quantizer of the way: what it must hold, and how much of its noise arrives.

    ranges [n]: the magnitude that element j reaches. arrives [n]: the squared error behind
    the second linear that a unit of squared error in element j makes. divided: it stands where
    elements are divided by s (the first linear's weights and what comes out); else where they
    are multiplied (the second's weights). weight: its share.
    """

    ranges: Tensor
    arrives: Tensor
    divided: bool
    weight: float = 1.0

    def noise(self, log_s: Tensor) -> Tensor:
        """Its noise for factors exp(log_s), but for a constant."""
        moved = log_s if self.divided else -log_s
        step = (self.ranges * torch.exp(-moved)).max()
        return self.weight * step.square() * (self.arrives * torch.exp(2 * moved)).sum()


def balanced_factors(quantizers: Sequence[Quantizer], *, powers_of_two: bool = False) -> Tensor:
    """s [n], float64, with the least sum of noise; all ones where nothing is better.

    powers_of_two: rounded in the exponent at the end. Raises QuantError where a quantity is not
    finite.
    """
    wide = [
        Quantizer(q.ranges.double(), q.arrives.double(), q.divided, q.weight) for q in quantizers
    ]
    if not all(bool(torch.isfinite(t).all()) for q in wide for t in (q.ranges, q.arrives)):
        raise QuantError("rescaling: activations or weights are not finite; check the checkpoint")
    with torch.inference_mode(False), torch.enable_grad():
        wide = [Quantizer(q.ranges.clone(), q.arrives.clone(), q.divided, q.weight) for q in wide]
        log_s = _descend(wide, _start(wide))
    s = torch.exp(log_s)
    return torch.exp2(torch.round(torch.log2(s))) if powers_of_two else s


def total_noise(quantizers: Sequence[Quantizer], s: Tensor) -> float:
    """What `balanced_factors` minimises, for comparison."""
    return float(sum(q.noise(torch.log(s)) for q in quantizers))


def _start(quantizers: Sequence[Quantizer]) -> Tensor:
    """Without the maxima, sum A s^2 + B / s^2 is least at s = (B / A)^(1/4)."""
    before = sum(q.weight * q.arrives for q in quantizers if q.divided)
    behind = sum(q.weight * q.arrives for q in quantizers if not q.divided)
    assert isinstance(before, Tensor)
    assert isinstance(behind, Tensor)
    tiny = 1e-12
    log_s = 0.25 * torch.log(
        (behind / behind.max().clamp(min=1e-300) + tiny)
        / (before / before.max().clamp(min=1e-300) + tiny)
    )
    return (log_s - log_s.mean()).clamp(-_LARGEST_LOG, _LARGEST_LOG)


def _descend(quantizers: Sequence[Quantizer], start: Tensor) -> Tensor:
    """Adam on log s with a falling rate; the best point that was seen, or zero."""
    best, least = torch.zeros_like(start), _objective(quantizers, torch.zeros_like(start))
    log_s = start.clone().requires_grad_()
    optimiser = torch.optim.Adam([log_s], lr=_RATE)
    for step in range(_STEPS):
        optimiser.param_groups[0]["lr"] = _RATE * (1 - step / _STEPS)
        loss = _objective(quantizers, log_s)
        if float(loss.detach()) < float(least):
            best, least = log_s.detach().clone(), loss.detach()
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        optimiser.step()
    return best.clamp(-2 * _LARGEST_LOG, 2 * _LARGEST_LOG)


def _objective(quantizers: Sequence[Quantizer], log_s: Tensor) -> Tensor:
    total = torch.stack([q.noise(log_s) for q in quantizers]).sum()
    return torch.log(total.clamp(min=1e-300))
