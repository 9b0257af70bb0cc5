"""Some tokens' rows of everything that the linears of one decoder layer read and write.

All sites are seen for the same tokens, so that an error at one can be followed to the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from buildsys.models.computing import back
from buildsys.models.family import Kind, Linear
from buildsys.models.layer_walk import LayerVisit
from buildsys.models.profile import linears_in

# Tokens whose rows are kept of a layer: the first number, as long as they stay below so many
# bytes, and the second at least. What a range cuts is rare: chosen on 1,024 of 4,096 tokens,
# SmolLM2's ranges of up's output made three times the error on other text that those chosen on all
# make.
ROWS = 4096
BYTES = 1 << 28
LEAST = 1024
# The share of its state's energy that no token may lose at one site; and one with massive
# activations, whose energy is so many times the median. It is one of many in a mean, but all others
# attend to it: without the limit SmolLM2 loses four times the KL, in one layer's first token.
MOST = 0.05
MOST_OF_MASSIVE = 0.01
MASSIVE = 100.0


@dataclass
class SiteRows:
    """Rows [kept, features]: inputs by a group's first linear, outputs by linear and before the
    bias, states before and behind the layer. stand_for [kept]: how many tokens each stands for."""

    inputs: dict[str, list[Tensor]] = field(default_factory=dict)
    outputs: dict[str, list[Tensor]] = field(default_factory=dict)
    before: list[Tensor] = field(default_factory=list)
    behind: list[Tensor] = field(default_factory=list)
    chosen: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    stand_for: list[Tensor] = field(default_factory=list)


class Sites:
    """One layer's linears by kind, with the rows that were kept at each."""

    def __init__(self, visit: LayerVisit, rows: SiteRows) -> None:
        self._modules: dict[Kind, nn.Linear] = {}
        self.linears: dict[Kind, Linear] = {}
        for module, linear in linears_in(visit.part, visit.stage.name, visit.layerwise.family):
            self._modules[linear.kind], self.linears[linear.kind] = module, linear
        self._rows, self._group_of = rows, visit.layerwise.family.group_of
        # The share of first tokens among the rows.
        self.first = len(rows.before) / sum(map(len, rows.before))
        attended = torch.cat(rows.before) + self.output("o")
        stand_for = torch.cat(rows.stand_for)
        # By how much a row counts, 1 in the mean.
        self.share = stand_for / stand_for.mean()
        # Over what the next norm divides by, behind the attention and behind the MLP; and what a
        # token may lose of it.
        self.by_attention, self.most_by_attention = self._weights(attended)
        self.by_mlp, self.most_by_mlp = self._weights(torch.cat(rows.behind))

    def _weights(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """(share over energy, the most that may be lost of it) of each row, by its state."""
        energy = state.square().sum(-1).clamp(min=1e-30)
        massive = energy > MASSIVE * energy.median()
        most = torch.where(massive, MOST_OF_MASSIVE, MOST)
        return self.share / energy, most * self.share

    def input(self, kind: Kind) -> Tensor:
        """What a linear reads."""
        return torch.cat(self._rows.inputs[self._group_of[self.linears[kind].name][0]])

    def output(self, kind: Kind) -> Tensor:
        """What a linear writes, before its bias."""
        return torch.cat(self._rows.outputs[self.linears[kind].name])

    def weight(self, kind: Kind) -> Tensor:
        """Of one linear [out, in], float32 on the CPU, wherever the layer runs."""
        return back(self._modules[kind].weight)

    def columns(self, kind: Kind) -> Tensor:
        """The squared norm of every column: how much of an error in an input arrives."""
        return self.weight(kind).square().sum(0)


def sites_of(visit: LayerVisit) -> Sites:
    """Run all samples through the layer and keep rows of them."""
    return Sites(visit, _rows(visit, max(1, _count(visit) // len(visit.samples))))


def _count(visit: LayerVisit) -> int:
    """Tokens whose rows are kept."""
    family = visit.layerwise.family
    linears = [linear for _, linear in linears_in(visit.part, visit.stage.name, family)]
    row = sum(
        linear.shape[0] + linear.shape[1] * (linear.name == family.group_of[linear.name][0])
        for linear in linears
    )
    return max(LEAST, min(ROWS, BYTES // (4 * row)))


@torch.inference_mode()
def _rows(visit: LayerVisit, each: int) -> SiteRows:
    """`each` tokens of every sample: the first, which many models keep their massive activations
    in, and others at random (seeded)."""
    rows = SiteRows()
    generator = torch.Generator().manual_seed(visit.stage.index)
    with _watched(visit, rows):
        for number, state in enumerate(visit.states):
            others = torch.randperm(len(state) - 1, generator=generator)[: each - 1] + 1
            rows.chosen = torch.cat([torch.zeros(1, dtype=torch.int64), others])
            weights = torch.full((len(rows.chosen),), (len(state) - 1) / max(1, len(others)))
            weights[0] = 1.0
            rows.stand_for.append(weights)
            rows.before.append(state[rows.chosen])
            behind = visit.layerwise.run(visit.stage, visit.samples[number], state)
            rows.behind.append(behind[rows.chosen])
    return rows


@contextmanager
def _watched(visit: LayerVisit, rows: SiteRows) -> Iterator[None]:
    family = visit.layerwise.family

    def hook(name: str) -> Callable[[Any, Any, Any], None]:
        def see(module: nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x, y = inputs[0].flatten(0, -2), output.flatten(0, -2)
            chosen = rows.chosen.to(x.device)
            if name == family.group_of[name][0]:
                rows.inputs.setdefault(name, []).append(back(x[chosen]))
            y = back(y[chosen]) if module.bias is None else back(y[chosen]) - back(module.bias)
            rows.outputs.setdefault(name, []).append(y)

        return see

    linears = linears_in(visit.part, visit.stage.name, family)
    handles = [child.register_forward_hook(hook(linear.name)) for child, linear in linears]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
