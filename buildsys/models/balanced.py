"""Rescaling factors by what the activations of a model need, layer by layer.

`quant.balance` says what is minimised. The shares of the quantizers here: noise in a site is
weighed by the residual stream behind it (`Sites.by_mlp`, `by_attention`), so that all quantizers
of a layer are in one unit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from buildsys.models.layer_walk import walk_layers
from buildsys.models.rescaling import Layer, PairKind, balance_by_weights, layers_of
from buildsys.models.site_rows import Sites, sites_of
from buildsys.quant.balance import Quantizer, balanced_factors
from buildsys.quant.clipping import parts
from buildsys.quant.gate_rows import shrink_gate
from buildsys.quant.profiles import Profile, profile

if TYPE_CHECKING:
    from buildsys.formats.tensors import TensorSource
    from buildsys.models.open import Model
    from buildsys.models.samples import Samples

# What GPTQ leaves of the noise of rounding to the nearest, about.
WEIGHTS = 0.3


def balance_by_activations(
    model: Model,
    tensors: TensorSource,
    samples: Sequence[Samples],
    folder: Path,
    pairs: Sequence[PairKind],
    *,
    target: str,
    powers_of_two: bool,
    progress: Callable[[float, float, str], None] = lambda done, total, unit: None,
) -> Iterator[tuple[str, Tensor]]:
    """(name, factors) with the least noise under the profile `target`, layer by layer.

    q and k, whose activations have 16 bits everywhere, are balanced by their weights. Rows of gate
    that reach too far are divided before up and down are balanced, if that is among the pairs.
    """
    layers, contract = layers_of(model.family), profile(target)
    weights = dict(balance_by_weights(model.family, tensors, [p for p in pairs if p == "q-k"],
                                      powers_of_two=powers_of_two))  # fmt: skip
    visits = walk_layers(model, tensors, samples, folder)
    for done, (layer, visit) in enumerate(zip(layers, visits, strict=True)):
        progress(done, len(layers), "layers")
        sites = sites_of(visit)
        mlp = _Mlp(sites, layer, contract, "gate-up" in pairs)
        for pair in pairs:
            names = layer.names_of(pair)
            if pair == "gate-up":
                yield names[0], mlp.divided.double()
                yield names[1], 1.0 / mlp.multiplied.double()
            elif pair == "q-k":
                yield names[0], weights[names[0]]
            else:
                made = mlp.up_down() if pair == "up-down" else _v_o(sites, layer)
                yield names[0], balanced_factors(made, powers_of_two=powers_of_two)
    progress(len(layers), len(layers), "layers")


class _Mlp:
    """The MLP of one layer, with rows of gate and up as `gate-up` leaves them."""

    def __init__(self, sites: Sites, layer: Layer, contract: Profile, shrink: bool) -> None:
        self._sites = sites
        self._wide_down = contract.width(layer.linears["down"].name) != 8
        gate, up = sites.output("gate"), sites.output("up")
        self.divided = self.multiplied = torch.ones(up.shape[1])
        if shrink and contract.width(layer.linears["gate"].name) == 8:
            peak = float(_largest(gate, 0).max())
            found = shrink_gate(
                gate, up, 8, peak, sites.by_mlp, sites.columns("down"), most=sites.most_by_mlp
            )
            self.divided, self.multiplied = found.divided, found.multiplied

    @torch.inference_mode()
    def up_down(self) -> list[Quantizer]:
        """What stands between up's weights and down's: up's output, and down's input at 8 bits."""
        sites, columns, by = self._sites, self._sites.columns("down"), self._sites.by_mlp
        gated, through, reach = torch.zeros((3, len(columns)))
        hidden_reach = torch.zeros(len(columns))
        at = 0
        for g, u in zip(parts(sites.output("gate")), parts(sites.output("up")), strict=True):
            rows, at = by[at : at + len(g)], at + len(g)
            gate, up = functional.silu(g / self.divided), u * self.multiplied
            gated += rows @ gate.square()
            reach = torch.maximum(reach, up.abs().amax(0))
            hidden = gate.mul_(up)
            hidden_reach = torch.maximum(hidden_reach, hidden.abs().amax(0))
            through += rows @ hidden.square_()
        energy = float(sites.input("up").square().sum(-1).mean())
        through_gate = columns * gated / len(by)
        up_weight = _largest(sites.weight("up"), 1) * self.multiplied.abs()
        down_weight = sites.weight("down")
        made = [
            Quantizer(reach, through_gate, divided=True),
            Quantizer(up_weight, through_gate, divided=True, weight=WEIGHTS * energy),
            Quantizer(
                _largest(down_weight, 0),
                len(down_weight) * through / len(by),
                divided=False,
                weight=WEIGHTS,
            ),
        ]
        if not self._wide_down:
            arrives = columns * float(by.mean())
            made.append(Quantizer(hidden_reach, arrives, divided=True))
        return made


def _largest(W: Tensor, axis: int) -> Tensor:
    """The largest magnitude along an axis, without a copy of W."""
    return torch.maximum(W.amax(axis), -W.amin(axis))


@torch.inference_mode()
def _v_o(sites: Sites, layer: Layer) -> list[Quantizer]:
    """What stands between v's weights and o's: o's input; v's output has 16 bits."""
    heads, by = layer.heads, sites.by_attention[:, None]
    attended, columns = sites.input("o"), sites.columns("o")
    shape = (heads.keys, heads.queries // heads.keys, heads.size)
    arrives = columns.view(shape).sum(1).reshape(-1) * float(by.mean())
    energy = float(sites.input("v").square().sum(-1).mean())
    v_weight, o_weight = sites.weight("v"), sites.weight("o")
    second = (by * attended.square()).mean(0).view(shape).sum(1).reshape(-1)
    return [
        Quantizer(heads.shared(attended.abs().amax(0)), arrives, divided=True),
        Quantizer(v_weight.abs().amax(1), arrives, divided=True, weight=WEIGHTS * energy),
        Quantizer(
            heads.shared(o_weight.abs().amax(0)),
            len(o_weight) * second,
            divided=False,
            weight=WEIGHTS,
        ),
    ]
