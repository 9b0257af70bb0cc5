"""Some tokens' rows of everything that the linears of one decoder layer read and write.

All sites are seen for the same tokens, so that an error at one can be followed to the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from buildsys.models.computing import back
from buildsys.models.family import Kind, Linear
from buildsys.models.layer_walk import LayerVisit
from buildsys.models.profile import linears_in
from buildsys.quant.clipping import parts

# Tokens whose rows are kept of a layer: the first number, as long as they stay below so many
# bytes, and the second at least. What a range cuts is rare: chosen on 1,024 of 4,096 tokens, ranges
# of up's output in eight layers of SmolLM2 made 1.45 times the least error on other text, in one of
# them almost three times.
ROWS = 4096
BYTES = 160 << 20
LEAST = 1024
# Of these linears what they write is kept too; of the others nobody asks for it.
_WRITTEN: tuple[Kind, ...] = ("o", "gate", "up", "down")
# The share of its state's energy that no token may lose at one site; and one with massive
# activations, whose energy is so many times the median. It is one of many in a mean, but all others
# attend to it: without the limit one layer's first token made what gate's output costs SmolLM2 (KL)
# four times as large.
MOST = 0.05
MOST_OF_MASSIVE = 0.01
MASSIVE = 100.0


class SiteRows:
    """Rows of the same tokens at every site [kept, features], filled in sample by sample.

    Each site's memory is taken once: joining the samples' rows in the end would hold them twice.
    """

    def __init__(self, lengths: Sequence[int], each: int) -> None:
        self._kept = sum(min(each, length) for length in lengths)
        self._made: dict[str, Tensor] = {}
        self._at = 0
        self.chosen = torch.zeros(0, dtype=torch.int64)

    def choose(self, chosen: Tensor) -> None:
        """The tokens of the next sample."""
        self._at += len(self.chosen)
        self.chosen = chosen

    def put(self, site: str, values: Tensor) -> None:
        """What the chosen tokens have there."""
        if site not in self._made:
            self._made[site] = torch.empty((self._kept, *values.shape[1:]))
        self._made[site][self._at : self._at + len(values)] = values

    def take(self, site: str) -> Tensor:
        """A site's rows, which are no longer kept here."""
        return self._made.pop(site)

    def sites(self) -> list[str]:
        return list(self._made)


class Sites:
    """One layer's linears by kind, with the rows that were kept at each."""

    def __init__(self, visit: LayerVisit, rows: SiteRows) -> None:
        self._modules: dict[Kind, nn.Linear] = {}
        self.linears: dict[Kind, Linear] = {}
        for module, linear in linears_in(visit.part, visit.stage.name, visit.layerwise.family):
            self._modules[linear.kind], self.linears[linear.kind] = module, linear
        self._group_of = visit.layerwise.family.group_of
        before, behind, stand_for = map(rows.take, ("before", "behind", "stand for"))
        self._rows = {site: rows.take(site) for site in rows.sites()}
        # The share of first tokens among the rows.
        self.first = len(visit.samples) / len(before)
        attended = before + self.output("o")
        # By how much a row counts, 1 in the mean.
        self.share = stand_for / stand_for.mean()
        # Over what the next norm divides by, behind the attention and behind the MLP; and what a
        # token may lose of it.
        self.by_attention, self.most_by_attention = self._weights(attended)
        self.by_mlp, self.most_by_mlp = self._weights(behind)

    def _weights(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """(share over energy, the most that may be lost of it) of each row, by its state."""
        energy = state.square().sum(-1).clamp(min=1e-30)
        massive = energy > MASSIVE * energy.median()
        most = torch.where(massive, MOST_OF_MASSIVE, MOST)
        return self.share / energy, most * self.share

    def input(self, kind: Kind) -> Tensor:
        """What a linear reads."""
        return self._rows[f"into {self._group_of[self.linears[kind].name][0]}"]

    def output(self, kind: Kind) -> Tensor:
        """What o, gate, up or down writes, before its bias."""
        return self._rows[f"out of {self.linears[kind].name}"]

    def weight(self, kind: Kind) -> Tensor:
        """Of one linear [out, in], float32 on the CPU, wherever the layer runs."""
        return back(self._modules[kind].weight)

    def columns(self, kind: Kind) -> Tensor:
        """The squared norm of every column: how much of an error in an input arrives."""
        return sum_over(self.weight(kind), lambda part: part.square().sum(0))


def sum_over(x: Tensor, each: Callable[[Tensor], Tensor]) -> Tensor:
    """The sum of what `each` makes of runs of rows of x: a whole x beside it would be large."""
    return torch.stack([each(part) for part in parts(x)]).sum(0)


def sites_of(visit: LayerVisit) -> Sites:
    """Run all samples through the layer and keep rows of them."""
    return Sites(visit, _rows(visit, max(1, _count(visit) // len(visit.samples))))


def _count(visit: LayerVisit) -> int:
    """Tokens whose rows are kept."""
    family = visit.layerwise.family
    linears = [linear for _, linear in linears_in(visit.part, visit.stage.name, family)]
    row = sum(
        linear.shape[0] * (linear.kind in _WRITTEN)
        + linear.shape[1] * (linear.name == family.group_of[linear.name][0])
        for linear in linears
    )
    return max(LEAST, min(ROWS, BYTES // (4 * row)))


@torch.inference_mode()
def _rows(visit: LayerVisit, each: int) -> SiteRows:
    """`each` tokens of every sample: the first, which many models keep their massive activations
    in, and others at random (seeded)."""
    rows = SiteRows([length for length, _ in visit.states.shapes], each)
    generator = torch.Generator().manual_seed(visit.stage.index)
    with _watched(visit, rows):
        for number, state in enumerate(visit.states):
            others = torch.randperm(len(state) - 1, generator=generator)[: each - 1] + 1
            rows.choose(torch.cat([torch.zeros(1, dtype=torch.int64), others]))
            # How many tokens each of them stands for.
            weights = torch.full((len(rows.chosen),), (len(state) - 1) / max(1, len(others)))
            weights[0] = 1.0
            rows.put("stand for", weights)
            rows.put("before", state[rows.chosen])
            behind = visit.layerwise.run(visit.stage, visit.samples[number], state)
            rows.put("behind", behind[rows.chosen])
    return rows


@contextmanager
def _watched(visit: LayerVisit, rows: SiteRows) -> Iterator[None]:
    family = visit.layerwise.family

    def hook(linear: Linear) -> Callable[[Any, Any, Any], None]:
        name = linear.name

        def see(module: nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x, y = inputs[0].flatten(0, -2), output.flatten(0, -2)
            chosen = rows.chosen.to(x.device)
            if name == family.group_of[name][0]:
                rows.put(f"into {name}", back(x[chosen]))
            if linear.kind in _WRITTEN:
                y = back(y[chosen]) if module.bias is None else back(y[chosen]) - back(module.bias)
                rows.put(f"out of {name}", y)

        return see

    linears = linears_in(visit.part, visit.stage.name, family)
    handles = [child.register_forward_hook(hook(linear)) for child, linear in linears]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
