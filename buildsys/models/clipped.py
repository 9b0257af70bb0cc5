"""Ranges below the maximum for what the linears of a model read and write, layer by layer.

Of every layer some tokens' rows are kept while it runs, all sites of it for the same tokens;
`quant.clipping` finds the ranges on them. Errors are weighed as the model feels them: by the
residual stream behind the site, and by the weights that read what is clipped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from buildsys.models.layer_walk import LayerVisit, walk_layers
from buildsys.models.profile import linears_in
from buildsys.quant.clipping import (
    Method,
    best_range,
    gate_up_ranges,
    kl_range,
    mse_range,
    weighted_range,
)
from buildsys.quant.profiles import fake_quantize, profile

if TYPE_CHECKING:
    from buildsys.formats.tensors import TensorSource
    from buildsys.models.family import Kind, Linear
    from buildsys.models.open import Model
    from buildsys.models.profile import LinearStatistics
    from buildsys.models.samples import Samples

# Tokens whose rows are kept of a layer: about 35 MB of SmolLM2, 300 MB of a 7B.
ROWS = 1024


@dataclass(frozen=True)
class Clipped:
    """The ranges of one linear; None where the maximum is kept."""

    input: float | None = None
    output: float | None = None


@dataclass
class SiteRows:
    """Some tokens' rows of what every linear of a layer reads and writes, before its bias."""

    inputs: dict[str, list[Tensor]] = field(default_factory=dict)
    outputs: dict[str, list[Tensor]] = field(default_factory=dict)
    before: list[Tensor] = field(default_factory=list)
    behind: list[Tensor] = field(default_factory=list)
    chosen: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))

    def input(self, name: str) -> Tensor:
        return torch.cat(self.inputs[name])

    def output(self, name: str) -> Tensor:
        return torch.cat(self.outputs[name])


def clipped_ranges(
    model: Model,
    tensors: TensorSource,
    samples: Sequence[Samples],
    folder: Path,
    *,
    statistics: Mapping[str, LinearStatistics],
    methods: Mapping[Kind, Method],
    target: str,
    progress: Callable[[float, float, str], None] = lambda done, total, unit: None,
) -> dict[str, Clipped]:
    """The ranges of all linears whose kind has a method other than absmax, by name.

    statistics: `profile_layers`' of the same tensors and samples: no range is above their
    maximum. target: the profile; what it gives 16 bits, or leaves in float, is not clipped.
    """
    peaks = {name: (abs(s.input.ori), abs(s.output.ori)) for name, s in statistics.items()}
    count = sum(len(part) for part in samples)
    found: dict[str, Clipped] = {}
    layers = 1 + max(linear.layer or 0 for linear in model.family.linears.values())
    for done, visit in enumerate(walk_layers(model, tensors, samples, folder)):
        progress(done, layers, "layers")
        rows = _rows(visit, max(1, ROWS // count))
        own = [linear for _, linear in linears_in(visit.part, visit.stage.name, model.family)]
        site = _Layer(visit.part, own, rows, peaks, methods, target)
        found |= site.ranges()
    progress(layers, layers, "layers")
    return found


def _rows(visit: LayerVisit, each: int) -> SiteRows:
    """`each` tokens of every sample: the first, which many models keep their massive activations
    in, and others at random (seeded)."""
    rows = SiteRows()
    generator = torch.Generator().manual_seed(visit.stage.index)
    with _watched(visit, rows):
        for number, state in enumerate(visit.states):
            others = torch.randperm(len(state) - 1, generator=generator)[: each - 1] + 1
            rows.chosen = torch.cat([torch.zeros(1, dtype=torch.int64), others])
            rows.before.append(state[rows.chosen])
            behind = visit.layerwise.run(visit.stage, visit.samples[number], state)
            rows.behind.append(behind[rows.chosen])
    return rows


@contextmanager
def _watched(visit: LayerVisit, rows: SiteRows) -> Iterator[None]:
    def hook(name: str) -> Callable[[Any, Any, Any], None]:
        def see(module: nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x, y = inputs[0].flatten(0, -2), output.flatten(0, -2)
            rows.inputs.setdefault(name, []).append(x[rows.chosen])
            y = y[rows.chosen] if module.bias is None else y[rows.chosen] - module.bias
            rows.outputs.setdefault(name, []).append(y)

        return see

    linears = linears_in(visit.part, visit.stage.name, visit.layerwise.family)
    handles = [child.register_forward_hook(hook(linear.name)) for child, linear in linears]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Layer:
    """One layer's linears by kind, its kept rows, and the search at each of its sites."""

    def __init__(
        self,
        part: nn.Module,
        linears: Sequence[Linear],
        rows: SiteRows,
        peaks: Mapping[str, tuple[float, float]],
        methods: Mapping[Kind, Method],
        target: str,
    ) -> None:
        self._linears = {linear.kind: linear for linear in linears}
        self._modules = {
            linear.kind: part.get_submodule(".".join(linear.name.split(".")[3:]))
            for linear in linears
        }
        self._rows, self._peaks, self._methods = rows, peaks, methods
        self._profile = profile(target)
        attended = torch.cat(rows.before)
        if "o" in self._linears:
            attended = attended + rows.output(self._linears["o"].name)
        # What the next norm divides by: behind the attention, and behind the MLP.
        self._by_attention = 1.0 / attended.square().sum(-1).clamp(min=1e-30)
        self._by_mlp = 1.0 / torch.cat(rows.behind).square().sum(-1).clamp(min=1e-30)

    def ranges(self) -> dict[str, Clipped]:
        found = {}
        for kind, linear in self._linears.items():
            method = self._methods.get(kind, "absmax")
            if method == "absmax" or self._profile.width(linear.name) != 8:
                continue
            found[linear.name] = Clipped(self._input(kind, method), self._output(kind, method))
        return found

    def _input(self, kind: Kind, method: Method) -> float:
        name = self._linears[kind].name
        x, peak = self._rows.input(name), self._peaks[name][0]
        if method != "relative":
            return _plain(method, x, peak)
        if kind in ("gate", "up"):
            return self._mlp_input
        rows = self._by_mlp if kind == "down" else self._by_attention
        return weighted_range(x, 8, peak, rows, self._columns(kind))

    def _output(self, kind: Kind, method: Method) -> float:
        name = self._linears[kind].name
        y, peak = self._rows.output(name), self._peaks[name][1]
        if method != "relative":
            return _plain(method, y, peak)
        if kind in ("gate", "up"):
            return self._gate_up[kind == "up"]
        rows = self._by_mlp if kind == "down" else self._by_attention
        return weighted_range(y, 8, peak, rows, torch.ones(y.shape[1]))

    @cached_property
    def _gate_up(self) -> tuple[float, float]:
        gate, up = self._linears["gate"].name, self._linears["up"].name
        return gate_up_ranges(
            self._rows.output(gate),
            self._rows.output(up),
            8,
            (self._peaks[gate][1], self._peaks[up][1]),
            self._by_mlp,
            self._columns("down"),
        )

    @cached_property
    def _mlp_input(self) -> float:
        """One range for what gate and up read, by the error in their product, to first order."""
        name = self._linears["gate"].name
        x, peak = self._rows.input(name), self._peaks[name][0]
        gate = self._rows.output(self._linears["gate"].name)
        up = self._rows.output(self._linears["up"].name)
        gate_weight, up_weight = self._weight("gate"), self._weight("up")
        sigmoid = torch.sigmoid(gate)
        by_gate, by_up = sigmoid * (1 + gate * (1 - sigmoid)) * up, functional.silu(gate)

        def error(magnitude: float) -> float:
            lost = fake_quantize(x, magnitude, 8) - x
            change = (lost @ gate_weight.T) * by_gate + (lost @ up_weight.T) * by_up
            return float(self._by_mlp @ (change.square_() @ self._columns("down")))

        return best_range(peak, error)

    def _weight(self, kind: Kind) -> Tensor:
        weight: Any = self._modules[kind].weight
        found: Tensor = weight
        return found

    def _columns(self, kind: Kind) -> Tensor:
        """The squared norm of every column: how much of an error in an input arrives."""
        return self._weight(kind).square().sum(0)


def _plain(method: Method, x: Tensor, peak: float) -> float:
    if method == "mse":
        return mse_range(x, 8, peak)
    return kl_range(x, 8, peak) if method == "kl" else peak
