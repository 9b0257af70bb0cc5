"""int8 weights rounded by GPTQ, layer by layer, each on what the quantized layers before it give.

All samples run through a layer whose activations are quantized as the runtime does it; what its
linears read makes their Hessians. Then its weights are rounded, and the samples go on through
the rounded layer. Memory: one layer, the Hessians of its groups, one sample.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from buildsys.models.hessian_memory import batches
from buildsys.models.layer_states import StateStore
from buildsys.models.layer_walk import LayerVisit, replace_module, walk_layers
from buildsys.models.profile import linears_in
from buildsys.models.simulate import StaticLinear, quantizers_of
from buildsys.quant.gptq import Hessian, best_scale, gptq_int8
from buildsys.quant.int8 import Quantized, weight_scale

if TYPE_CHECKING:
    from buildsys.formats.tensors import TensorSource
    from buildsys.models.family import Linear
    from buildsys.models.open import Model
    from buildsys.models.samples import Samples
    from buildsys.models.variant import StaticRanges


@dataclass(frozen=True)
class Rounded:
    """One linear's int8 weight [out, in] and scale. bias: what is to be added to its bias [out],
    the mean of what rounding takes from its outputs."""

    weight: Quantized
    bias: Tensor


def rounded_layers(
    model: Model,
    tensors: TensorSource,
    samples: Sequence[Samples],
    folder: Path,
    *,
    ranges: Mapping[str, StaticRanges],
    target: str,
    damping: float,
    correct_bias: bool = False,
    search_scale: bool = False,
    limit: int | None = None,
    progress: Callable[[float, float, str], None] = lambda done, total, unit: None,
) -> Iterator[dict[str, Rounded]]:
    """The rounded linears of each decoder layer by name, layer after layer.

    ranges: every linear that is int8. correct_bias: the samples go on through biases that are
    corrected. search_scale: `best_scale` instead of the maximum. limit: bytes for Hessians and
    their solution (`hessian_memory`); more passes, and the same bytes, where it is short. folder:
    also keeps what is rounded; a killed run with the same arguments goes on behind the last
    finished layer. Raises QuantError, naming the linear, for values that are not finite.
    """
    layers = 1 + max(linear.layer or 0 for linear in model.family.linears.values())
    kept = [layer for layer in map(_layer_index, StateStore(folder).finished) if layer is not None]
    for layer in kept:
        yield _load(folder, layer)
    for done, visit in enumerate(walk_layers(model, tensors, samples, folder), len(kept)):
        progress(done, layers, "layers")
        own = [
            (child, linear)
            for child, linear in linears_in(visit.part, visit.stage.name, model.family)
            if linear.name in ranges
        ]
        for child, linear in own:
            static = StaticLinear(child, quantizers_of(linear, model.family, ranges, target))
            replace_module(visit.part, _path(linear), static)
        made: dict[str, Rounded] = {}
        for part in batches(model.family, [linear for _, linear in own], limit):
            made |= _round(visit, part, damping, search_scale)
        for name, rounded in made.items():
            module: Any = visit.part.get_submodule(_path(model.family.linears[name]))
            values = rounded.weight.values.to(torch.float32) * rounded.weight.scale
            module.weight = nn.Parameter(values, requires_grad=False)
            if correct_bias and module.bias is not None:
                module.bias = nn.Parameter(module.bias + rounded.bias, requires_grad=False)
        _save(folder, visit.stage.index, made)
        yield made
    progress(layers, layers, "layers")


def rounded_by_name(
    model: Model,
    tensors: TensorSource,
    samples: Sequence[Samples],
    folder: Path,
    *,
    ranges: Mapping[str, StaticRanges],
    target: str,
    damping: float,
    correct_bias: bool = False,
    search_scale: bool = False,
    limit: int | None = None,
    progress: Callable[[float, float, str], None] = lambda done, total, unit: None,
) -> Callable[[str], Rounded | None]:
    """`rounded_layers` by linear: layers are made as their linears are asked for, in order.

    None for what GPTQ does not round (the vision tower's).
    """
    layers = rounded_layers(
        model,
        tensors,
        samples,
        folder,
        ranges=ranges,
        target=target,
        damping=damping,
        correct_bias=correct_bias,
        search_scale=search_scale,
        limit=limit,
        progress=progress,
    )
    made: dict[str, Rounded] = {}

    def find(linear: str) -> Rounded | None:
        if model.family.linears[linear].tower == "vision":
            return None
        if linear not in made:
            made.clear()
            made.update(next(layers))
        return made[linear]

    return find


def _layer_index(stage: str) -> int | None:
    """Which decoder layer a stage is; None for another kind of stage."""
    _, _, number = stage.partition("model.layers.")
    return int(number) if number else None


def _save(folder: Path, layer: int, made: Mapping[str, Rounded]) -> None:
    """Keep a layer's linears; complete on disk before the states behind the layer are."""
    content = {
        name: (each.weight.values, each.weight.scale, each.bias) for name, each in made.items()
    }
    with (folder / f"{layer}.rounded").open("wb") as stream:
        torch.save(content, stream)
        stream.flush()
        os.fsync(stream.fileno())


def _load(folder: Path, layer: int) -> dict[str, Rounded]:
    content = torch.load(folder / f"{layer}.rounded", weights_only=True)
    return {
        name: Rounded(Quantized(values, scale), bias)
        for name, (values, scale, bias) in content.items()
    }


def _path(linear: Linear) -> str:
    """A linear's place within its layer: model.layers.3.mlp.up_proj -> mlp.up_proj."""
    return linear.name.split(".", 3)[3]


def _round(
    visit: LayerVisit, linears: Sequence[Linear], damping: float, search_scale: bool
) -> dict[str, Rounded]:
    hessians = _hessians(visit, linears)
    family = visit.layerwise.family
    made = {}
    for linear in linears:
        module: Any = visit.part.get_submodule(_path(linear))
        W: Tensor = module.weight
        hessian = hessians[family.group_of[linear.name][0]]
        scale = best_scale(W, hessian.H) if search_scale else weight_scale(W)
        rounded = gptq_int8(W, hessian.H, scale, damping=damping, name=linear.name)
        lost = W - rounded.values.to(torch.float32) * rounded.scale
        made[linear.name] = Rounded(rounded, lost @ hessian.mean)
    return made


@torch.inference_mode()
def _hessians(visit: LayerVisit, linears: Sequence[Linear]) -> dict[str, Hessian]:
    """Of what every group of linears reads, by its first linear's name."""
    family = visit.layerwise.family
    first = [each for each in linears if each.name == family.group_of[each.name][0]]
    hessians = {linear.name: Hessian(linear.shape[1]) for linear in first}
    with _watched(visit, first, hessians):
        for _ in visit.run():
            pass
    return hessians


@contextmanager
def _watched(
    visit: LayerVisit, linears: Sequence[Linear], hessians: Mapping[str, Hessian]
) -> Iterator[None]:
    modules: list[Any] = [visit.part.get_submodule(_path(linear)) for linear in linears]
    for linear, module in zip(linears, modules, strict=True):
        module.watch = hessians[linear.name].add
    try:
        yield
    finally:
        for module in modules:
            module.watch = None
