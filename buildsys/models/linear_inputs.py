"""What the linears of a float model read, summed up, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from buildsys.models.hessian_memory import batches
from buildsys.models.layer_walk import LayerVisit, walk_layers
from buildsys.models.profile import linears_in

if TYPE_CHECKING:
    from buildsys.formats.tensors import TensorSource
    from buildsys.models.family import Family, Linear
    from buildsys.models.open import Model
    from buildsys.models.samples import Samples


class Sums(Protocol):
    """Running sums over the inputs of one linear: a `Hessian` or a `MeanSquare`."""

    def add(self, x: Tensor) -> None:
        """Take in inputs x [..., in]."""


S = TypeVar("S", bound=Sums)


def linears_of_layers(family: Family) -> Iterator[Linear]:
    """The linears that `inputs_by_layer` can tell of: not the head's, nor the vision tower's."""
    for linear in family.linears.values():
        if linear.tower == "language" and linear.layer is not None:
            yield linear


def inputs_by_layer(
    model: Model,
    tensors: TensorSource,
    samples: Sequence[Samples],
    folder: Path,
    sums: Callable[[int], S],
    *,
    wanted: Collection[str] | None = None,
    limit: int | None = None,
    progress: Callable[[float, float, str], None] = lambda done, total, unit: None,
) -> Iterator[dict[str, S]]:
    """Linear -> sums over its inputs, of one decoder layer after the other; linears that read
    one tensor share them.

    sums: makes those of so many inputs. wanted: of these linears alone. limit: bytes for
    Hessians and their solution (`hessian_memory`); a layer then comes in several parts, each of a
    pass over the samples of its own, and what was given is emptied when the next is asked for.
    folder: for the states; layers that a killed run has finished there are left out, so whoever
    asks must keep what it made of a layer before it asks for the next.
    """
    layers = 1 + max(linear.layer or 0 for linear in model.family.linears.values())
    for visit in walk_layers(model, tensors, samples, folder):
        progress(visit.stage.index, layers, "layers")
        own = [linear for _, linear in linears_in(visit.part, visit.stage.name, model.family)]
        chosen = [linear for linear in own if wanted is None or linear.name in wanted]
        for part in batches(model.family, chosen, limit):
            found = _sums(visit, part, sums)
            yield found
            found.clear()
    progress(layers, layers, "layers")


@torch.inference_mode()
def _sums(visit: LayerVisit, linears: Sequence[Linear], sums: Callable[[int], S]) -> dict[str, S]:
    """Of linears of which those that read one tensor come together."""
    family = visit.layerwise.family
    children = {
        linear.name: child for child, linear in linears_in(visit.part, visit.stage.name, family)
    }
    first: dict[str, Linear] = {}
    for linear in linears:
        first.setdefault(family.group_of[linear.name][0], linear)
    made = {group: sums(linear.shape[1]) for group, linear in first.items()}
    with _watched({group: children[linear.name] for group, linear in first.items()}, made):
        for _ in visit.run():
            pass
    return {linear.name: made[family.group_of[linear.name][0]] for linear in linears}


@contextmanager
def _watched(children: Mapping[str, nn.Linear], sums: Mapping[str, Sums]) -> Iterator[None]:
    def hook(name: str) -> Callable[[Any, Any, Any], None]:
        def see(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            sums[name].add(inputs[0])

        return see

    handles = [child.register_forward_hook(hook(name)) for name, child in children.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
