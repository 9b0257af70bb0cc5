"""Ranges below the maximum for what the linears of a model read and write, layer by layer.

Of every layer some tokens' rows are kept while it runs, all sites of it for the same tokens;
`quant.clipping` finds the ranges on them. Errors are weighed as the model feels them: by the
residual stream behind the site, and by the weights that read what is clipped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from buildsys.models.computing import HERE, Compute
from buildsys.models.layer_walk import walk_layers
from buildsys.models.site_rows import Sites, sites_of
from buildsys.quant.clipping import (
    Method,
    best_range,
    gate_up_ranges,
    kl_range,
    mse_range,
    parts,
    repaired,
    repaired_range,
    weighted_range,
)
from buildsys.quant.profiles import fake_quantize, profile

if TYPE_CHECKING:
    from buildsys.formats.tensors import TensorSource
    from buildsys.models.family import Kind
    from buildsys.models.open import Model
    from buildsys.models.profile import LinearStatistics
    from buildsys.models.samples import Samples


# The share of values that may saturate in a shadow layer, each of which the CPU repairs.
SATURATED = 0.005
# Tokens that are worked on at a time, where weights are multiplied.
_TOKENS = 256


@dataclass(frozen=True)
class Shadow:
    """The ranges of a down_proj whose saturated values are repaired on the CPU. gain: by how much
    the layer's error, relative to the residual stream, is less than with the other ranges."""

    input: float
    output: float
    gain: float


@dataclass(frozen=True)
class Clipped:
    """The ranges of one linear, none above its maximum. shadow: those of a down_proj in a shadow
    layer."""

    input: float
    output: float
    shadow: Shadow | None = None


def clipped_ranges(
    model: Model,
    tensors: TensorSource,
    samples: Sequence[Samples],
    folder: Path,
    *,
    statistics: Mapping[str, LinearStatistics],
    methods: Mapping[Kind, Method],
    target: str,
    compute: Compute = HERE,
    progress: Callable[[float, float, str], None] = lambda done, total, unit: None,
) -> dict[str, Clipped]:
    """The ranges of all linears whose kind has a method other than absmax, by name.

    statistics: `profile_layers`' of the same tensors and samples: no range is above their
    maximum. target: the profile; what it gives 16 bits, or leaves in float, is not clipped.
    compute: where the layers run; the search is in float32 on the CPU.
    """
    peaks = {name: (abs(s.input.ori), abs(s.output.ori)) for name, s in statistics.items()}
    found: dict[str, Clipped] = {}
    layers = 1 + max(linear.layer or 0 for linear in model.family.linears.values())
    for done, visit in enumerate(walk_layers(model, tensors, samples, folder, compute)):
        progress(done, layers, "layers")
        found |= _Search(sites_of(visit), peaks, methods, target).ranges()
    progress(layers, layers, "layers")
    return found


class _Search:
    """The search at each site of one layer."""

    def __init__(
        self,
        sites: Sites,
        peaks: Mapping[str, tuple[float, float]],
        methods: Mapping[Kind, Method],
        target: str,
    ) -> None:
        self._sites, self._peaks, self._methods = sites, peaks, methods
        self._profile = profile(target)

    def ranges(self) -> dict[str, Clipped]:
        found = {}
        for kind, linear in self._sites.linears.items():
            method = self._methods.get(kind, "absmax")
            if method != "absmax" and self._profile.width(linear.name) == 8:
                both = Clipped(self._input(kind, method), self._output(kind, method))
                found[linear.name] = both
                if kind == "down":
                    found[linear.name] = replace(both, shadow=self._shadow(both))
        return found

    def _shadow(self, clipped: Clipped) -> Shadow:
        """Ranges of down_proj in a shadow layer, and what the shadow is worth."""
        sites, by = self._sites, self._sites.by_mlp
        x, y = sites.input("down"), sites.output("down")
        ones, columns = torch.ones(y.shape[1]), sites.columns("down")
        share = SATURATED + sites.first  # the first tokens are kept more often than they come
        before = repaired_range(x, 8, self._peak("down", 0), by, columns, share)
        behind = repaired_range(y, 8, self._peak("down", 1), by, ones, share)
        lost = _lost(x, lambda part: fake_quantize(part, clipped.input, 8), by, columns)
        lost += _lost(y, lambda part: fake_quantize(part, clipped.output, 8), by, ones)
        left = _lost(x, lambda part: repaired(part, before, 8), by, columns)
        left += _lost(y, lambda part: repaired(part, behind, 8), by, ones)
        return Shadow(before, behind, (lost - left) / len(by))

    def _peak(self, kind: Kind, side: int) -> float:
        return self._peaks[self._sites.linears[kind].name][side]

    def _input(self, kind: Kind, method: Method) -> float:
        x, peak = self._sites.input(kind), self._peak(kind, 0)
        if method != "relative":
            return _plain(method, x, peak)
        if kind in ("gate", "up"):
            return self._mlp_input
        columns = self._sites.columns(kind)
        return weighted_range(x, 8, peak, self._by(kind), columns, most=self._most(kind))

    def _output(self, kind: Kind, method: Method) -> float:
        y, peak = self._sites.output(kind), self._peak(kind, 1)
        if method != "relative":
            return _plain(method, y, peak)
        if kind in ("gate", "up"):
            return self._gate_up[kind == "up"]
        ones = torch.ones(y.shape[1])
        return weighted_range(y, 8, peak, self._by(kind), ones, most=self._most(kind))

    def _by(self, kind: Kind) -> Tensor:
        return self._sites.by_mlp if kind == "down" else self._sites.by_attention

    def _most(self, kind: Kind) -> Tensor:
        return self._sites.most_by_mlp if kind == "down" else self._sites.most_by_attention

    @cached_property
    def _gate_up(self) -> tuple[float, float]:
        return gate_up_ranges(
            self._sites.output("gate"),
            self._sites.output("up"),
            8,
            (self._peak("gate", 1), self._peak("up", 1)),
            self._sites.by_mlp,
            self._sites.columns("down"),
            most=self._sites.most_by_mlp,
        )

    @cached_property
    def _mlp_input(self) -> float:
        """One range for what gate and up read, by the error in their product, to first order."""
        sites = self._sites
        x, gate, up = sites.input("gate"), sites.output("gate"), sites.output("up")
        by_gate, by_up = sites.weight("gate").T, sites.weight("up").T
        columns = sites.columns("down")

        def error(magnitude: float) -> float:
            total = 0.0
            for start in range(0, len(x), _TOKENS):
                part = slice(start, start + _TOKENS)
                lost = fake_quantize(x[part], magnitude, 8).sub_(x[part])
                sigmoid = torch.sigmoid(gate[part])
                slope = (1 - sigmoid).mul_(gate[part]).add_(1).mul_(sigmoid).mul_(up[part])
                change = (lost @ by_gate).mul_(slope)
                change += (lost @ by_up).mul_(functional.silu(gate[part]))
                total += float(sites.by_mlp[part] @ (change.square_() @ columns))
            return total

        return best_range(self._peak("gate", 0), error)


def _lost(x: Tensor, seen: Callable[[Tensor], Tensor], rows: Tensor, columns: Tensor) -> float:
    """What is lost in x [n, features] by a quantizer, with the weights of `weighted_range`."""
    return float(rows @ torch.cat([seen(p).sub_(p).square_() @ columns for p in parts(x)]))


def _plain(method: Method, x: Tensor, peak: float) -> float:
    if method == "mse":
        return mse_range(x, 8, peak)
    return kl_range(x, 8, peak) if method == "kl" else peak
