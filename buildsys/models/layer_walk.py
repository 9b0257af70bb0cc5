"""Decoder layers one after the other, with the hidden states of all samples in front of each.

For methods that look at a layer more than once, or change it before the samples go on: clipping,
GPTQ, the choice of shadow layers. States lie on disk; memory is one layer and one sample.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from buildsys.models.computing import HERE, Compute
from buildsys.models.layer_states import States, StateStore
from buildsys.models.layerwise import LayerwiseModel, Stage

if TYPE_CHECKING:
    from buildsys.formats.tensors import TensorSource
    from buildsys.models.open import Model
    from buildsys.models.samples import Sample, Samples


@dataclass(frozen=True)
class LayerVisit:
    """A layer that has its weights, and the states in front of it.

    part: its module, whose linears may be replaced for as long as the visit lasts.
    """

    stage: Stage
    part: nn.Module
    layerwise: LayerwiseModel
    samples: Sequence[Sample]
    states: States

    def run(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(number of the sample, state before [n, hidden], state behind) of every sample."""
        for number, (sample, state) in enumerate(zip(self.samples, self.states, strict=True)):
            yield number, state, self.layerwise.run(self.stage, sample, state)


def walk_layers(
    model: Model,
    tensors: TensorSource,
    samples: Sequence[Samples],
    folder: Path,
    compute: Compute = HERE,
) -> Iterator[LayerVisit]:
    """Visit every decoder layer in order.

    What the visitor has made of the layer when it asks for the next one is what all samples go
    through. tensors: classic names, as of `rotated_tensors`. folder: for the states, float32
    [tokens, hidden], twice while a layer runs; layers that a killed run has finished there are
    left out, so a visitor that changes layers must itself keep what it made of them. compute:
    where the layers run, and what their weights are.
    """
    layerwise = LayerwiseModel(model, tensors, compute)
    store = StateStore(folder)
    light = [layerwise.light(sample) for sample in _every(samples)]
    images = any(length.patches for part in samples for length in part.lengths())
    for stage in layerwise.stages(images=images):
        if stage.kind == "head":
            return
        if stage.name in store.finished:
            continue
        if stage.kind == "embedding":
            features = None if store.states is None else iter(store.states)
            with store.stage(stage.name) as writer:
                for state in layerwise.embeddings(light, features):
                    writer.append(state)
            continue
        with layerwise.filled(stage) as part:
            if stage.kind == "layer":
                assert store.states is not None
                with restored(part):
                    yield LayerVisit(stage, part, layerwise, light, store.states)
                    _advance(layerwise, stage, light, store)
            else:
                _advance(layerwise, stage, _every(samples), store)


def _advance(
    layerwise: LayerwiseModel, stage: Stage, samples: Iterable[Sample], store: StateStore
) -> None:
    """All samples through the stage as it is now."""
    states = None if stage.kind == "patches" else iter(store.states or ())
    with store.stage(stage.name) as writer:
        for sample in samples:
            state = sample.pixel_values if states is None else next(states)
            if state is None or not len(state):
                writer.append(torch.empty(0, 1))
            else:
                writer.append(layerwise.run(stage, sample, state))


def _every(samples: Sequence[Samples]) -> Iterator[Sample]:
    return (sample for part in samples for sample in part)


@contextmanager
def restored(part: nn.Module) -> Iterator[None]:
    """Linears of a module that are replaced inside the context are put back behind it."""
    linears = [(name, each) for name, each in part.named_modules() if isinstance(each, nn.Linear)]
    try:
        yield
    finally:
        for name, child in linears:
            replace_module(part, name, child)


def replace_module(part: nn.Module, name: str, child: nn.Module) -> None:
    """Put `child` in the place of the module of that path."""
    parent, _, attribute = name.rpartition(".")
    setattr(part.get_submodule(parent), attribute, child)
