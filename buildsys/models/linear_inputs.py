"""What the linears of a float model read, as Hessians, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from buildsys.models.layer_walk import LayerVisit, walk_layers
from buildsys.models.profile import linears_in
from buildsys.quant.gptq import Hessian

if TYPE_CHECKING:
    from buildsys.formats.tensors import TensorSource
    from buildsys.models.open import Model
    from buildsys.models.samples import Samples


def inputs_by_layer(
    model: Model,
    tensors: TensorSource,
    samples: Sequence[Samples],
    folder: Path,
    progress: Callable[[float, float, str], None] = lambda done, total, unit: None,
) -> Iterator[dict[str, Hessian]]:
    """Linear -> Hessian of its inputs, of one decoder layer after the other; linears that read
    one tensor share one. The head and the vision tower have none."""
    layers = 1 + max(linear.layer or 0 for linear in model.family.linears.values())
    for done, visit in enumerate(walk_layers(model, tensors, samples, folder)):
        progress(done, layers, "layers")
        yield _hessians(visit)
    progress(layers, layers, "layers")


@torch.inference_mode()
def _hessians(visit: LayerVisit) -> dict[str, Hessian]:
    family = visit.layerwise.family
    linears = list(linears_in(visit.part, visit.stage.name, family))
    first = {family.group_of[linear.name][0]: linear for _, linear in linears}
    hessians = {name: Hessian(linear.shape[1]) for name, linear in first.items()}
    chosen = {linear.name: child for child, linear in linears if linear.name in hessians}
    with _watched(chosen, hessians):
        for _ in visit.run():
            pass
    return {linear.name: hessians[family.group_of[linear.name][0]] for _, linear in linears}


@contextmanager
def _watched(children: Mapping[str, nn.Linear], hessians: Mapping[str, Hessian]) -> Iterator[None]:
    def hook(name: str) -> Callable[[Any, Any, Any], None]:
        def see(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            hessians[name].add(inputs[0])

        return see

    handles = [child.register_forward_hook(hook(name)) for name, child in children.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
